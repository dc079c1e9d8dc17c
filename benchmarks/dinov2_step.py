"""What does a DINOv2 step cost beside its dense blocks?

    python benchmarks/dinov2_step.py          # ViT-S/16, 2 x 224 + 8 x 96 px, 65,536 prototypes, 2 images, one thread

Ours: forward and backward of the method, with masks, heads, targets and losses. Dense: the bare blocks on all tokens of
all views (teacher forward on the global views, student forward and backward), and the products of both heads with all
tokens of the global views and all image tokens, teacher forward, student forward and backward; no loss. Needed: the
same blocks, and the head products of only the tokens that the losses read. CPU time, interleaved. Goal: ours <= 1.00 x
dense.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _bench import interleave, report
from smalti.data.views import Views, collate
from smalti.methods.dinov2 import DINOv2, DINOv2Config
from smalti.methods.masked_tokens import MaskedNetwork
from smalti.models.build import build_encoder

BATCH = 2


def make(images: int = BATCH, num_prototypes: int = 65536) -> tuple[DINOv2, Views]:
    method = DINOv2(build_encoder("vit_small_patch16_224", seed=0), DINOv2Config(num_prototypes=num_prototypes)).train()
    crops, samples = method.make_views(224), []
    for place in range(images):
        rng = np.random.default_rng(place)
        samples.append(crops(rng.integers(0, 256, (400, 500, 3), dtype=np.uint8), rng))
    views = collate(samples)
    views.keys = torch.arange(images)
    return method, views


def products(network: MaskedNetwork, image_tokens: Tensor, patch_tokens: Tensor) -> Tensor:
    """Logits of both heads, as one number whose gradient is as dense as a loss's."""
    return sum(
        network.heads[name](tokens).square().sum()
        for name, tokens in (("image", image_tokens), ("patch", patch_tokens))
    )


def main() -> None:
    torch.set_num_threads(1)
    method, views = make()
    student, teacher = method.student, method.teacher.module
    width = student.encoder.embed_dim
    globals_, locals_ = (torch.randn(len(crops), n, width) for crops, n in zip(views.crops, (197, 37), strict=True))
    num_masked = int(method.draw_masks(views.keys, (14, 14))["patch"].sum())

    def ours() -> None:
        method.zero_grad()
        torch.stack(list(method(views, 0.5).values())).sum().backward()

    def floor(read: int | None) -> None:
        method.zero_grad()
        with torch.no_grad():
            out = teacher.encoder.vit.blocks(globals_)
            products(teacher, out[:, 0], out[:, 1:].flatten(0, 1)[:read])
        large, small = (student.encoder.vit.blocks(tokens.requires_grad_()) for tokens in (globals_, locals_))
        images = torch.cat([large[:, 0], small[:, 0]])
        products(student, images, large[:, 1:].flatten(0, 1)[:read]).backward()

    timings = interleave({"ours": ours, "dense": lambda: floor(None), "needed": lambda: floor(num_masked)}, rounds=3)
    question = f"dinov2_step {BATCH} images, {num_masked} masked patches"
    report(question, timings, "ours", "dense", 1.0)
    report(f"{question}, dense blocks and the head products of tokens read", timings, "ours", "needed", 1.0)


if __name__ == "__main__":
    main()
