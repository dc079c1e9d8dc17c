"""A MAR of a few thousand weights for 8x8 images of one channel, and a batch for it."""

import torch

from smalti.data.views import Views
from smalti.layers.tokens import TokenConfig, build_tokens
from smalti.methods.mar import MAR, MARConfig

SMALL = {
    "num_classes": 3,
    "embed_dim": 16,
    "depth": 2,
    "decoder_depth": 2,
    "num_heads": 2,
    "buffer_size": 2,
    "dropout": 0.0,
    "head_depth": 1,
    "head_width": 16,
    "diffusion_repeats": 2,
    "clip": 4.0,
}


def make(seed: int = 0, opened: bool = True, **config: object) -> MAR:
    torch.manual_seed(seed)
    tokens = build_tokens(TokenConfig(kind="pixels", patch_size=2), 8, 1)
    mar = MAR(tokens, MARConfig(**{**SMALL, **config}))
    if opened:  # layers that start at 0 would make all outputs alike
        for name, parameter in mar.network.named_parameters():
            if "modulation" in name or name.startswith("head.out"):
                torch.nn.init.normal_(parameter, std=0.2)
        mar.average.module.load_state_dict(mar.network.state_dict())
    return mar.eval()


def views(count: int = 4, labels: bool = True) -> Views:
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return Views(
        crops=(images,),
        boxes=torch.zeros(count, 4),
        flips=torch.zeros(count, dtype=torch.bool),
        source_size=torch.full((count, 2), 8),
        index=torch.arange(count),
        keys=torch.arange(count) * 7,
        labels=torch.arange(count) % 3 if labels else None,
    )
