"""From tokens to one vector per image: names, checks and modules of the poolings that an encoder can have.

Letters: B images, N patches, R prefix tokens (class token first), D embed_dim.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import timm
from jaxtyping import Float
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.layers.pooling import PRRConfig, PRRPool

POOLS = ("auto", "cls", "avg", "map", "prr")
"""Poolings of tokens to an image vector, see :meth:`smalti.models.encoder.Encoder.set_pool`."""
MODULES = ("map", "prr")
"""Poolings that need a module, and all tokens of an image."""


class PatchFeatures(NamedTuple):
    """Output of an encoder for a batch of images."""

    patches: Tensor
    """``(B, N, D)`` patch tokens in raster order, after the final norm, prefix tokens removed."""
    prefix: Tensor
    """``(B, R, D)`` class token (first, if there is one) and registers; R may be 0."""
    grid: tuple[int, int]
    """``(h, w)`` patches down and across, ``N = h * w``."""


def pool_features(features: PatchFeatures, pool: str, has_class_token: bool) -> Float[Tensor, "B D"]:
    """One vector per image, without parameters or attention: ``cls``, ``avg`` (mean patch) or ``auto`` (``cls`` if
    there is a class token, else ``avg``).

    Raises:
        ConfigError: for another ``pool``, or ``cls`` without a class token.
    """
    check_pool(pool, has_class_token)
    return features.patches.mean(1) if pool == "avg" or not has_class_token else features.prefix[:, 0]


def check_pool(pool: str, has_class_token: bool) -> None:
    """Refuse a pooling that an encoder can't do.

    Raises:
        ConfigError: for another name than :data:`POOLS`, or ``cls`` without a class token.
    """
    if pool not in POOLS:
        raise ConfigError(f"pool={pool!r}: one of {', '.join(POOLS)} is needed")
    if pool == "cls" and not has_class_token:
        raise ConfigError("pool=cls needs a class token, which this encoder does not have; use pool=avg")


def make_pool(
    pool: str,
    prr: PRRConfig,
    *,
    name: str,
    timm_args: Mapping[str, Any],
    embed_dim: int,
    num_heads: int,
    num_prefix_tokens: int,
    has_class_token: bool,
    fresh: bool = False,
) -> nn.Module | None:
    """The module of a pooling on the CPU, randomly initialised; None for a pooling without one.

    Args:
        pool: one of :data:`POOLS`.
        prr: settings of ``prr``.
        name: timm's name of the architecture.
        timm_args: arguments with which ``timm.create_model(name)`` builds it.
        embed_dim: D.
        num_heads: attention heads of ``prr``.
        num_prefix_tokens: R.
        has_class_token: whether the first prefix token is a class token.
        fresh: allow parameters that are not trained yet.

    Raises:
        ConfigError: for another name, ``cls`` without a class token, or untrained parameters.
    """
    check_pool(pool, has_class_token)
    if pool not in MODULES:
        return None
    if not fresh and (pool == "map" or prr.pre_norm or prr.post_norm):
        raise ConfigError(
            f"pool={pool} has parameters, and {name} comes without trained ones; choose another pool, or "
            f"train an encoder with pool={pool}"
        )
    if pool == "prr":
        return PRRPool(embed_dim, num_heads, num_prefix_tokens, has_class_token, prr)
    # timm builds its own pooling
    return timm.create_model(name, **{**timm_args, "global_pool": "map", "depth": 1}).attn_pool
