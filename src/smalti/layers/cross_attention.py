"""A transformer block with cross-attention."""

from functools import partial

from jaxtyping import Bool, Float
from timm.layers import Mlp
from torch import Tensor, nn

from smalti.errors import ConfigError


class CrossAttentionBlock(nn.Module):
    """Pre-norm block: cross-attention of queries to tokens, then an MLP; both with a residual connection of the
    queries.

    Args:
        dim: D, width of queries and tokens.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP relative to D.

    Raises:
        ConfigError: if the number of heads does not divide the width.

    Source: Caron et al., LOCA, arXiv:2212.02400, released code: separate norms for queries and tokens, GELU with the
    tanh approximation.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(
                f"{num_heads} cross-attention heads don't divide the encoder's width {dim}; choose a divisor"
            )
        self.query_norm, self.token_norm, self.mlp_norm = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))

    def forward(
        self,
        queries: Float[Tensor, "B Q D"],
        tokens: Float[Tensor, "B R D"],
        hidden: Bool[Tensor, "B Q R"] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Queries after attending to the tokens of their image.

        Args:
            queries: queries.
            tokens: keys and values.
            hidden: True where attention is masked; every query needs at least one visible token. None: no mask.
        """
        tokens = self.token_norm(tokens)
        mask = None if hidden is None else hidden.repeat_interleave(self.attn.num_heads, dim=0)
        queries = queries + self.attn(self.query_norm(queries), tokens, tokens, need_weights=False, attn_mask=mask)[0]
        return queries + self.mlp(self.mlp_norm(queries))
