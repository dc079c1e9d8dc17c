"""A method of your own, outside of the package, compared with MAE and with no training.

    python examples/own_method.py IMAGES LABELLED runs/compare

The method is SimMIM (Xie et al., 2021, arXiv:2111.09886), in short: hidden patches are replaced by a learned token, the
encoder sees all of them, and one linear layer predicts their pixels.
"""

import argparse
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import smalti
from smalti.config import settings
from smalti.data.crops import MultiCrop, ViewSpec
from smalti.data.views import ViewMaker, Views
from smalti.functional.masking import random_mask
from smalti.functional.patches import patchify
from smalti.functional.random import sample_uniform
from smalti.methods.base import EncoderMethod, MethodConfig, register
from smalti.models.encoder import Encoder


@settings
class SimMIMConfig(MethodConfig):
    """Settings, ``method.*`` in plans and on the command line."""

    name: str = "simmim"
    mask_ratio: float = 0.6
    """Fraction of patches that are hidden."""


@register("simmim")
class SimMIM(EncoderMethod):
    """Predict the pixels of hidden patches from the tokens at their places."""

    Config = SimMIMConfig
    title = "pixels of hidden patches, by a linear layer"
    paper = "Xie et al. 2021, arXiv:2111.09886"
    defaults: ClassVar[Mapping[str, Any]] = {"optim": {"weight_decay": 0.05}}

    def __init__(self, encoder: Encoder, config: SimMIMConfig) -> None:
        super().__init__(encoder, config)
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(encoder.embed_dim))
        height, width = encoder.patch_size
        self.head = nn.Linear(encoder.embed_dim, encoder.in_chans * height * width)

    def make_views(self, image_size: int) -> ViewMaker:
        """One random resized crop, and a flip."""
        return MultiCrop([ViewSpec(count=1, size=image_size, scale=(0.67, 1.0), flip_prob=0.5)])

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """The mean absolute error over hidden patches."""
        images = self.encoder.normalize(views.global_crops)
        tokens, grid = self.encoder.embed_patches(images)  # (B, N, D)
        num_patches = tokens.shape[1]
        # views.keys hold one number per image: the same images are masked alike on any number of devices
        num_keep = max(1, round(num_patches * (1 - self.config.mask_ratio)))
        _, mask, _ = random_mask(sample_uniform(views.keys, num_patches), num_keep)  # (B, N), True = hidden
        tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        sequence = self.encoder.assemble(tokens, self.encoder.positions(grid))
        encoded = self.encoder.forward_tokens(sequence)[:, self.encoder.num_prefix_tokens :]
        error = (self.head(encoded).float() - patchify(images, self.encoder.patch_size)).abs().mean(dim=-1)  # (B, N)
        return {"pixels": (error * mask).sum() / mask.sum()}

    def networks(self) -> dict[str, Encoder]:
        """What is evaluated and exported."""
        return {"encoder": self.encoder}


def main() -> None:
    """Compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="what to train on")
    parser.add_argument("labelled", help="class folders to evaluate on")
    parser.add_argument("out", help="a folder for runs and tables")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--size", type=int, default=96, help="side of the training crops in pixels, divisible by 8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()

    encoder = {"name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 4}
    plan = {
        "data": options.images,
        "evaluate": [{"data": options.labelled, "protocols": ["knn"]}],
        "budget": {"steps": options.steps},
        "seeds": options.seeds,
        "settings": {"encoder": encoder, "data.image_size": options.size, "batch_size": 64, "optim.lr": 1e-3},
        "arms": {
            "random": {"load": "random"},  # differences are taken against the first arm
            "mae": {"method": "mae"},
            "simmim": {"method": "simmim", "method.mask_ratio": 0.6},
        },
    }
    # isolate=False: cells run in this process, which knows the method
    comparison = smalti.compare(plan, options.out, isolate=False)
    for title, rows in comparison.table():
        print(title)
        for row in rows:
            gap = f", {row.difference.mean:+.3f} against random: {row.verdict}" if row.difference else ""
            print(f"  {row.arm}: {row.score.mean:.3f}{gap}")
    for arm, error in comparison.failures.items():
        print(f"{arm} failed: {error}")


if __name__ == "__main__":
    main()
