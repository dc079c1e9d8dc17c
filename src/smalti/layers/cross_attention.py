"""A transformer block in which some tokens look at others."""

from functools import partial

from jaxtyping import Float
from timm.layers import Mlp
from torch import Tensor, nn

from smalti.errors import ConfigError


class CrossAttentionBlock(nn.Module):
    """Pre-norm block: queries attend to other tokens, then a perceptron; both with a residual of the queries.

    Args:
        dim: D, of queries and tokens.
        num_heads: attention heads.
        mlp_ratio: hidden width of the perceptron over D.

    Raises:
        ConfigError: if the heads do not divide the width.

    Source: Caron et al., LOCA, arXiv:2212.02400, released code: norms of their own for queries and tokens, GELU by the
    tangent approximation.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"{num_heads} heads of the cross-attention do not divide the encoder's width {dim}")
        self.query_norm, self.token_norm, self.mlp_norm = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))

    def forward(self, queries: Float[Tensor, "B Q D"], tokens: Float[Tensor, "B R D"]) -> Float[Tensor, "B Q D"]:
        """Queries that have looked at the tokens of their own image."""
        tokens = self.token_norm(tokens)
        queries = queries + self.attn(self.query_norm(queries), tokens, tokens, need_weights=False)[0]
        return queries + self.mlp(self.mlp_norm(queries))
