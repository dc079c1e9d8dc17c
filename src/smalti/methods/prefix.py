"""Prefix: how well the tokens that are seen first tell all the others; the judge of orders of patches.

Paper: none. Guo et al., arXiv:2511.22281v2, define an order's worth by how uncertain what isn't seen yet remains
(Eq. 8) and measure it for no order at all. This learns that uncertainty for any set of seen tokens. It shares no weight
and no training with what finds orders, so it owes none of them anything.
Letters: B images, N tokens, d values a token, k of them seen, D width of the network.
"""

import math
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smalti.config import Depth, NumHeads, Width, settings
from smalti.data.views import CentreCrop, ViewMaker, Views
from smalti.errors import ConfigError
from smalti.functional.positions import sincos_positions
from smalti.functional.precision import at_least_float32
from smalti.functional.random import sample_uniform
from smalti.layers.tokens import TokenSource
from smalti.methods.base import MethodConfig, TokenMethod, register

_BOUND = 10.0
"""Log-variances lie within this: variances from 5e-5 to 2e4 of a token's own."""
_COUNT, _WHICH = 0, 1  # streams of a sample's random numbers


@settings
class PrefixConfig(MethodConfig):
    """Settings of the judge."""

    name: str = "prefix"
    dim: Width = 192
    """D, a multiple of 4 and of ``num_heads``."""
    depth: Depth = 6
    """Transformer blocks."""
    num_heads: NumHeads = 3
    """Attention heads."""
    flip_prob: float = 0.5
    """Share of images that are mirrored left to right."""


class Told(NamedTuple):
    """What is said of each token, seen or not: a normal law for each of its values."""

    mean: Float[Tensor, "B N d"]
    log_variance: Float[Tensor, "B N d"]


def gaussian_nll(told: Told, tokens: Float[Tensor, "B N d"], seen: Bool[Tensor, "B N"]) -> Float[Tensor, ""]:
    """Minus the log-likelihood of the tokens that aren't seen, in nats a value: mean over an image's, then over images.

    Args:
        told: in any float type; computed in float32.
        tokens: the truth.
        seen: at least one of each image is not.
    """
    mean, log_variance = (at_least_float32(values) for values in told)
    each = 0.5 * (log_variance + (tokens - mean).square() * (-log_variance).exp() + math.log(2 * math.pi)).mean(-1)
    hidden = (~seen).to(each.dtype)
    return ((each * hidden).sum(1) / hidden.sum(1)).mean()


def random_seen(keys: Int[Tensor, " B"], num_tokens: int) -> Bool[Tensor, "B N"]:
    """True for the k tokens of each image that are seen; k uniform in 0..N-1, then which of them."""
    count = (sample_uniform(keys, 1, _COUNT) * num_tokens).long()
    places = sample_uniform(keys, num_tokens, _WHICH).argsort(dim=1, stable=True).argsort(dim=1)
    return places < count


@register("prefix")
class Prefix(TokenMethod):
    """Show some tokens of an image, any number of any of them; say of the others what they will be, and how surely.

    One trunk of timm's blocks over all places, mask tokens in those that aren't seen, so that images of a batch may
    show different numbers.
    """

    Config = PrefixConfig
    title = "judge of orders of patches: what is still unsaid after the first k"
    paper = "measures what Guo et al. 2025, arXiv:2511.22281v2, define and don't measure"
    next_command = "smalti rank COMAE_RUN --data IMAGES --out ORDERS --judge {run}"
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {"lr": 5e-4, "betas": [0.9, 0.95], "weight_decay": 0.05, "warmup_ratio": 0.05, "clip_norm": 1.0}
    }

    def __init__(self, tokens: TokenSource, config: PrefixConfig) -> None:
        super().__init__(tokens, config)
        if config.dim % 4 or config.num_heads < 1 or config.dim % config.num_heads:
            raise ConfigError(
                f"method.dim={config.dim}: must be a multiple of 4 and of method.num_heads={config.num_heads}"
            )
        if config.depth < 1:
            raise ConfigError(f"method.depth={config.depth}: at least 1 is needed")
        dim = config.dim
        self.embed = nn.Linear(tokens.token_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.register_buffer("positions", sincos_positions(dim, tokens.grid))
        self.positions: Tensor
        self.blocks = nn.Sequential(*(Block(dim, config.num_heads, qkv_bias=True) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 2 * tokens.token_dim)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.head.weight, std=0.002)  # at first: the mean token, with its own variance

    def make_views(self, image_size: int) -> ViewMaker:
        """The central square and its mirror image, as for what finds orders."""
        return CentreCrop(image_size, self.config.flip_prob)

    def tell(self, tokens: Float[Tensor, "B N d"], seen: Bool[Tensor, "B N"]) -> Told:
        """What is said of all tokens when some are seen.

        Args:
            tokens: of unit mean variance; those that aren't seen are not looked at.
            seen: any number of each image, also none.
        """
        shown = torch.where(seen[..., None], self.embed(tokens), self.mask_token)
        said = self.head(self.norm(self.blocks(shown + self.positions)))
        mean, raw = said.chunk(2, dim=-1)
        return Told(mean, _BOUND * torch.tanh(raw / _BOUND))

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """``{"nll": ...}``, nats a value of a token that isn't seen."""
        tokens = self.tokens.encode(views.global_crops)
        seen = random_seen(views.keys, tokens.shape[1])
        told = self.tell(tokens, seen)
        with torch.no_grad():
            errors = (at_least_float32(told.mean) - tokens).square().mean(-1)
            self.observations = {"squared_error": (errors * ~seen).sum() / (~seen).sum()}
        return {"nll": gaussian_nll(told, tokens, seen)}
