"""Prefix: predicts unseen patch tokens from any set of seen ones; used to score patch orders.

Paper: none. Guo et al., arXiv:2511.22281v2, define the quality of an order by the remaining uncertainty of unseen
patches (Eq. 8), but do not measure it for any order. This model learns that uncertainty for any set of seen tokens. It
shares no weights and no training with the methods that produce orders, so it favours none of them.
Letters: B images, N tokens, d values per token, k of them seen, D width of the network.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import Depth, NumHeads, Ratio, Width, settings
from smalti.data.crops import CentreCrop
from smalti.data.views import ViewMaker, Views
from smalti.errors import ConfigError
from smalti.functional.positions import sincos_positions
from smalti.functional.precision import at_least_float32
from smalti.functional.random import sample_uniform
from smalti.layers.tokens import TokenSource
from smalti.methods.base import MethodConfig, TokenMethod, register

_BOUND = 10.0
"""Bound of log-variances: variances from 5e-5 to 2e4 of a token's own."""
_COUNT, _WHICH = 0, 1  # random streams of a sample


@settings
class PrefixConfig(MethodConfig):
    """Settings of the predictor."""

    name: str = "prefix"
    dim: Width = 192
    """D, a multiple of 4 and of ``num_heads``."""
    depth: Depth = 6
    """Transformer blocks."""
    num_heads: NumHeads = 3
    """Attention heads."""
    flip_prob: Ratio = 0.5
    """Probability of a horizontal flip, in 0..1."""


class Prediction(NamedTuple):
    """A normal distribution for each value of each token, seen or not."""

    mean: Float[Tensor, "B N d"]
    log_variance: Float[Tensor, "B N d"]


def gaussian_nll(
    prediction: Prediction, tokens: Float[Tensor, "B N d"], seen: Bool[Tensor, "B N"]
) -> Float[Tensor, ""]:
    """Negative log-likelihood of the unseen tokens, in nats per value: mean over an image's tokens, then over images.

    Args:
        prediction: any float type; computed in float32.
        tokens: the true tokens.
        seen: at least one token per image is unseen.
    """
    mean, log_variance = (at_least_float32(values) for values in prediction)
    each = 0.5 * (log_variance + (tokens - mean).square() * (-log_variance).exp() + math.log(2 * math.pi)).mean(-1)
    hidden = (~seen).to(each.dtype)
    return ((each * hidden).sum(1) / hidden.sum(1)).mean()


def random_seen(keys: Int[Tensor, " B"], num_tokens: int) -> Bool[Tensor, "B N"]:
    """True for k random tokens of each image; k is uniform in 0..N-1."""
    count = (sample_uniform(keys, 1, _COUNT) * num_tokens).long()
    places = sample_uniform(keys, num_tokens, _WHICH).argsort(dim=1, stable=True).argsort(dim=1)
    return places < count


@register("prefix")
class Prefix(TokenMethod):
    """Predict mean and variance of the unseen tokens of an image from any subset of its tokens.

    One stack of timm's blocks over all positions, with mask tokens at unseen ones, so that images of a batch may have
    different numbers of seen tokens.
    """

    Config = PrefixConfig
    title = "predicts unseen patch tokens from the first k; used to score patch orders"
    paper = "none; estimates a quantity defined by Guo et al. 2025, arXiv:2511.22281v2"
    next_command = "smalti rank COMAE_RUN --data IMAGES --out ORDERS --predictor {run}"
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        "squared_error": LogColumn(
            "Squared error", "Mean squared error of the predicted unseen tokens; lower is better."
        ),
    }
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
        """The central square, flipped at random, as for methods that produce orders."""
        return CentreCrop(image_size, self.config.flip_prob)

    def predict(self, tokens: Float[Tensor, "B N d"], seen: Bool[Tensor, "B N"]) -> Prediction:
        """Predicted distributions of all tokens, given the seen ones.

        Args:
            tokens: of unit mean variance; unseen ones are not used.
            seen: any number per image, including none.
        """
        shown = torch.where(seen[..., None], self.embed(tokens), self.mask_token)
        said = self.head(self.norm(self.blocks(shown + self.positions)))
        mean, raw = said.chunk(2, dim=-1)
        return Prediction(mean, _BOUND * torch.tanh(raw / _BOUND))

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss term ``nll``, in nats per value of an unseen token."""
        tokens = self.tokens.encode(views.global_crops)
        seen = random_seen(views.keys, tokens.shape[1])
        prediction = self.predict(tokens, seen)
        with torch.no_grad():
            errors = (at_least_float32(prediction.mean) - tokens).square().mean(-1)
            self.observations = {"squared_error": (errors * ~seen).sum() / (~seen).sum()}
        return {"nll": gaussian_nll(prediction, tokens, seen)}
