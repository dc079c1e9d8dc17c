"""SimMIM: predict the pixels of hidden patches from their tokens.

Paper: Xie et al., "SimMIM: A simple framework for masked image modeling", 2021, arXiv:2111.09886.
Letters: B images, N patches, D embed_dim.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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
    log_columns: ClassVar[Mapping[str, str]] = {"loss/pixels": "mean absolute error of the pixels of hidden patches"}
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
