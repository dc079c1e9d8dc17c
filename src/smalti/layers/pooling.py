"""Pool the tokens of an image to one vector by parameter-free attention.

Letters: B images, T tokens (R of the prefix first, then patches), D embed_dim.
"""

from jaxtyping import Float
from timm.layers import AttentionPoolPrr
from torch import Tensor

from smalti.config import settings
from smalti.errors import ConfigError
from smalti.functional.refinement import check_heads, prr_refine, prr_token


@settings
class PRRConfig:
    """Settings of PRR pooling; the defaults are those of the paper and of timm's ``global_pool='prr'``."""

    num_heads: int | None = None
    """Number of heads H; None: that of the backbone."""
    pre_norm: bool = False
    """Add a layer norm before the attention, after the backbone's final norm."""
    post_norm: bool = False
    """Add a layer norm after the attention, before the pooling."""
    include_prefix: bool = True
    """Encoders without a class token: average over all tokens, including registers (as timm does), or patches only."""


class PRRPool(AttentionPoolPrr):  # type: ignore[misc]  # timm has no types
    """timm's PRR pooling: tokens refined by :func:`~smalti.functional.refinement.prr_refine`, then pooled to one
    vector: the class token, or the mean if there is none.

    Differs from timm's class: only the required tokens are computed, so a class token costs ``2 T D`` instead of
    ``2 T^2 D``; timm's switch for fused attention may be set later; ``include_prefix``.

    Args:
        width: D.
        num_heads: the backbone's heads, for ``config.num_heads=None``.
        num_prefix: R, tokens before the patches.
        has_class_token: whether the first of them is a class token.
        config: the settings.

    Raises:
        ConfigError: if D isn't divisible by the heads, or ``include_prefix=False`` with a class token.

    Source: Hajimiri et al., arXiv:2603.04892.
    """

    def __init__(
        self, width: int, num_heads: int, num_prefix: int, has_class_token: bool, config: PRRConfig = PRRConfig()
    ) -> None:
        num_heads = num_heads if config.num_heads is None else config.num_heads
        check_heads(width, num_heads)
        if has_class_token and not config.include_prefix:
            raise ConfigError(
                "prr.include_prefix=false only applies to the mean over tokens; this encoder has a class token; leave "
                "it out"
            )
        super().__init__(
            width, num_heads, "token" if has_class_token else "avg", config.pre_norm, config.post_norm, norm_layer=None
        )
        self.config = config
        self.num_skipped = 0 if config.include_prefix else num_prefix
        """Number of refined tokens excluded from the mean."""

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B D"]:
        """Pool tokens, after the final norm, to one vector."""
        x = self.pre_norm(x)
        if self.pool == "token":
            return self.post_norm(prr_token(x, self.num_heads))
        return self.post_norm(prr_refine(x, self.num_heads))[:, self.num_skipped :].mean(1)
