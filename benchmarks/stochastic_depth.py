"""Does a block with stochastic depth cost only the samples that it keeps?

    python benchmarks/stochastic_depth.py          # ViT-S/16, 96 px, 20 images, one thread

Ours: forward and backward of the encoder; each branch of a block computes the samples that it keeps. Peer: the same
blocks with timm's ``DropPath``, which computes all samples and multiplies. Rates grow linearly with depth, so the mean
rate is half of the last block's. CPU time, interleaved. Goal: at most 1 - 0.8 x mean rate. The same for a DINOv3
encoder with rotary positions.
"""

import copy
import sys
from pathlib import Path

import torch
from timm.layers import DropPath
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from _bench import interleave, report
from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder

BATCH, SIZE = 20, 96


def with_drop_path(encoder: Encoder) -> Encoder:
    """The encoder with timm's module in place of ours, at the same rates."""
    peer = copy.deepcopy(encoder)
    for block in peer.vit.blocks:
        for name in ("drop_path1", "drop_path2"):
            rate = getattr(getattr(block, name), "drop_prob", 0.0)
            setattr(block, name, DropPath(rate) if rate else nn.Identity())
    return peer


def main() -> None:
    torch.set_num_threads(1)
    images = torch.randn(BATCH, 3, SIZE, SIZE)
    for name in ("vit_small_patch16_224", "vit_small_patch16_dinov3"):
        for rate in (0.2, 0.4, 0.6):
            ours = build_encoder(name, img_size=SIZE, seed=0).train()
            ours.set_drop_path(rate)
            peer = with_drop_path(ours)

            def step(encoder: Encoder) -> None:
                encoder.zero_grad()
                encoder.encode(images).patches.square().mean().backward()

            timings = interleave({"ours": lambda: step(ours), "timm": lambda: step(peer)}, rounds=9)  # noqa: B023
            report(f"stochastic_depth {name}, 0 to {rate}", timings, "ours", "timm", round(1 - 0.8 * rate / 2, 3))


if __name__ == "__main__":
    main()
