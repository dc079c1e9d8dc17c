"""CMAR: MAR fine-tuned to generate the tokens of an image in an order chosen for it.

Paper: Guo et al., "The collapse of patches", 2025, arXiv:2511.22281; no code was released.
Letters: as in MAR.
Orders list the most important token first, as everywhere here: the first L are visible, the rest are predicted. In
MAR's own convention, in which an order starts with the masked tokens, that is the *reversed* list; without reversing
it, one trains the paper's "ascending" arm (``order=collapse_reversed`` here), which is worse in its Table 4.
Differs from the paper: the fraction of masked tokens has the distribution met in sampling (``ratio=paper`` for MAR's).
MAR's distribution masks at least 70 %: with one order per image, most tokens would never be visible in training,
although they are in sampling. A gain says nothing about orders without a control that is fine-tuned as long in random
orders (``order=random``); the paper has none.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from smalti.config import PathText, Ratio, settings
from smalti.data.dataset import Dataset
from smalti.data.order_files import TrainingOrders
from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.functional.orders import random_orders
from smalti.functional.random import fork_keys, sample_uniform
from smalti.layers.tokens import TokenSource
from smalti.methods.base import register
from smalti.methods.mar import MAR, MARConfig, step_uniform

_REPLACED = 5  # branch of a sample's random seed


@settings
class CMARConfig(MARConfig):
    """Settings of CMAR: MAR's, which are taken from ``init``, and its own."""

    name: str = "cmar"
    order: str = "collapse"
    """The order of an image's tokens: collapse, collapse_reversed, collapse_static, collapse_shuffled, coverage,
    in_strength or attention from a file; random, fixed_random, halton, raster, spiral, centre_out or border_in."""
    orders: PathText | None = None
    """File from ``smalti rank`` with the orders of the training images."""
    random_order_prob: Ratio = 0.1
    """Fraction of images that are trained in a random order instead."""
    ratio: Literal["sampler", "paper"] = "sampler"
    """Distribution of the fraction of masked tokens: that of sampling, or MAR's (the paper's;
    ``mask_ratio_min``, ``mask_ratio_std``)."""


def sampler_ratio(progress: float) -> float:
    """Fraction of masked tokens in sampling with a cosine schedule, in (0, 1].

    Args:
        progress: of sampling, in [0, 1).
    """
    return math.cos(math.pi / 2 * progress)


@register("cmar")
class CMAR(MAR):
    """Fine-tune MAR on one order per image."""

    Config = CMARConfig
    title = "MAR fine-tuned to generate tokens in an order chosen for each image"
    paper = "Guo et al. 2025, arXiv:2511.22281"
    starts_from = ("mar",)
    needs_start: ClassVar[bool] = True
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {"lr": 1e-7, "betas": [0.9, 0.95], "weight_decay": 0.02, "warmup_ratio": 0.1, "clip_norm": 3.0}
    }

    def __init__(self, tokens: TokenSource, config: CMARConfig) -> None:
        super().__init__(tokens, config)
        self.source = TrainingOrders(config.order, config.orders)
        if self.source.name == "variance":
            raise ConfigError("method.order=variance needs pixels, but cmar trains on tokens; choose another order")

    def bind(self, images: Dataset, image_size: int) -> None:
        """Read the orders of the images.

        Raises:
            DataError, ShapeError: if the file belongs to other images, or lacks orders of flipped images.
        """
        self.source.bind(images, self.tokens.grid, self.config.flip_prob > 0)

    def orders(self, views: Views) -> Int[Tensor, "B N"]:
        """The order of each image; in training, a random one for some."""
        found = self.source.of(views, self.tokens.grid)
        if not self.training or self.source.name == "random":
            return found
        is_replaced = sample_uniform(fork_keys(views.keys, _REPLACED), 1) < self.config.random_order_prob
        return torch.where(is_replaced, random_orders(views.keys, self.tokens.num_tokens), found)

    def mask_ratio(self, progress: float) -> float:
        """Sampled according to ``ratio``; one for the whole batch."""
        return sampler_ratio(step_uniform(progress)) if self.config.ratio == "sampler" else super().mask_ratio(progress)
