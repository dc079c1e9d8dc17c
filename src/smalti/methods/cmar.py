"""CMAR: MAR fine-tuned to draw the tokens of an image in an order that was found for it.

Paper: Guo et al., "The collapse of patches", 2025, arXiv:2511.22281; no code was released.
Letters: as in MAR.
Orders list the most important token first, as everywhere here: the first L of it are visible, the rest are learned. In
MAR's own convention, in which a row begins with what is hidden, that is the *reversed* list; not to turn it round
trains the paper's "ascending" arm (``order=collapse_reversed`` here), which is worse in its Table 4.
Differs from the paper: the share of hidden tokens is drawn as the sampler meets it (``ratio=paper`` for MAR's own).
MAR's law hides 70 % at least: with one order for an image, most tokens would never be seen, though sampling shows them.
Without a control that is fine-tuned as long in random orders (``order=random``) a gain says nothing about orders; the
paper has none.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from smalti.config import PathText, settings
from smalti.data.images.image_set import ImageSet
from smalti.data.order_files import TrainingOrders
from smalti.data.signals.signal_set import SignalSet
from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.functional.orders import random_orders
from smalti.functional.random import fork_keys, sample_uniform
from smalti.layers.tokens import TokenSource
from smalti.methods.base import register
from smalti.methods.mar import MAR, MARConfig, step_uniform

_REPLACED = 5  # branch of a sample's keys


@settings
class CMARConfig(MARConfig):
    """Settings of CMAR: MAR's, which ``init`` brings, and what follows."""

    name: str = "cmar"
    order: str = "collapse"
    """The order of an image's tokens: collapse, collapse_reversed, collapse_static, collapse_shuffled, coverage,
    in_strength or attention out of a file; random, fixed_random, halton, raster, spiral, centre_out or border_in."""
    orders: PathText | None = None
    """The file of ``smalti rank`` with the orders of the training images."""
    random_order_prob: float = 0.1
    """Share of images that are learned in a random order all the same."""
    ratio: Literal["sampler", "paper"] = "sampler"
    """Law of the share of hidden tokens: what sampling meets, or MAR's (``mask_ratio_min``, ``mask_ratio_std``)."""


def sampler_ratio(share: float) -> float:
    """The share of hidden tokens at a random moment of sampling with a cosine schedule, in (0, 1].

    Args:
        share: how far sampling is, 0..1 (1 excluded).
    """
    return math.cos(math.pi / 2 * share)


@register("cmar")
class CMAR(MAR):
    """Fine-tune a MAR on one order for each image."""

    Config = CMARConfig
    title = "MAR fine-tuned to draw in an order found for each image"
    paper = "Guo et al. 2025, arXiv:2511.22281"
    starts_from = ("mar",)
    needs_start: ClassVar[bool] = True
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {"lr": 1e-7, "betas": [0.9, 0.95], "weight_decay": 0.02, "warmup_ratio": 0.1, "clip_norm": 3.0}
    }

    def __init__(self, tokens: TokenSource, config: CMARConfig) -> None:
        super().__init__(tokens, config)
        if not 0 <= config.random_order_prob <= 1:
            raise ConfigError(f"method.random_order_prob={config.random_order_prob}: a share in 0..1 is needed")
        self.source = TrainingOrders(config.order, config.orders)
        if self.source.name == "variance":
            raise ConfigError("method.order=variance looks at pixels, cmar learns from tokens; choose another order")

    def bind(self, images: ImageSet | SignalSet, image_size: int) -> None:
        """Read the orders of the images.

        Raises:
            DataError, ShapeError: if the file is about others, or lacks a flip state.
        """
        self.source.bind(images, self.tokens.grid, self.config.flip_prob > 0)

    def orders(self, views: Views) -> Int[Tensor, "B N"]:
        """The order of each image; in training a random one now and then."""
        found = self.source.of(views, self.tokens.grid)
        if not self.training or self.source.name == "random":
            return found
        is_replaced = sample_uniform(fork_keys(views.keys, _REPLACED), 1) < self.config.random_order_prob
        return torch.where(is_replaced, random_orders(views.keys, self.tokens.num_tokens), found)

    def mask_ratio(self, progress: float) -> float:
        """As ``ratio`` says; one for the whole batch."""
        return sampler_ratio(step_uniform(progress)) if self.config.ratio == "sampler" else super().mask_ratio(progress)
