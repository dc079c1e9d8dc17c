"""Small methods that hide patches, and batches of noise for them."""

import numpy as np
import torch

from smalti.data.views import Views, collate
from smalti.methods.ibot import IBOT
from smalti.models.build import build_encoder

SMALL = {"num_prototypes": 16, "hidden_dim": 32, "bottleneck_dim": 8, "num_local_views": 2}


def tiny(cls: type[IBOT] = IBOT, registers: int = 0, **config: object) -> IBOT:
    torch.manual_seed(0)
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        reg_tokens=registers,
        seed=0,
    )
    method = cls(encoder, cls.Config(**{**SMALL, "linear_init": "fan_in", **config})).train()
    with torch.no_grad():  # student and teacher, heads and mask token that differ
        for parameter in method.student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return method


def batch(method: IBOT, count: int = 3, size: int = 32) -> Views:
    crops, samples = method.make_views(size), []
    for place in range(count):
        rng = np.random.default_rng([5, place])
        samples.append(crops(rng.integers(0, 256, (60, 70, 3), dtype=np.uint8), rng))
    views = collate(samples)
    views.keys = torch.arange(count)
    return views
