"""Heads that predict the relative position of pairs of patches from the tokens of an image.

All take ``(B, N, D)`` tokens and ``(1, K, 2)`` pairs, shared by all images, and return ``(B, K, C)``. A linear layer on
the concatenated tokens of a pair is computed as two products per token, gathered and added per pair:
``W [x_i; x_j] = A x_i + B x_j``. The ``(B, K, 2D)`` concatenation is never built.
Letters: B images, N patches, D width, K pairs, C outputs.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.functional.pairs import gather_pairs
from smalti.functional.positions import sincos_at


class RelativeEncoder(nn.Module):
    """PART's relative encoder: cross-attention from pairs (queries) to all patches of their image (keys, values).

    Args:
        dim: D.
        num_outputs: C.
        num_heads: attention heads.
        query: ``patch_cat``, the concatenated tokens of the pair, or ``positional``, fixed codes of their indices in
            the sequence (keys and values get such codes, too).
        residual: add the query to the output of attention.
        norm: layer norms before attention, of queries and of tokens.
        mlp: a norm and a two-layer MLP after attention, with a residual connection.
        width: width to which tokens are projected first; None: D, without a projection.

    Raises:
        ConfigError: if the number of heads does not divide the width.

    Source: Ayoughi et al., PART, arXiv:2506.03682. Its released code has one head and no residual, norm or MLP;
    initialisation as there: truncated normal 0.02, biases 0, the joint projection of attention Xavier uniform.
    """

    def __init__(
        self,
        dim: int,
        num_outputs: int,
        num_heads: int = 1,
        query: Literal["patch_cat", "positional"] = "patch_cat",
        residual: bool = False,
        norm: bool = False,
        mlp: bool = False,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.token_project = nn.Identity() if width is None else nn.Linear(dim, width)
        whose, dim = ("the encoder's width", dim) if width is None else ("method.head_dim", width)
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"method.head_num_heads={num_heads} does not divide {whose} {dim}")
        self.residual = residual
        self.input_project = nn.Linear(2 * dim, dim) if query == "patch_cat" else None
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.query_norm, self.token_norm = (nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity() for _ in range(2))
        self.mlp = (
            nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            if mlp
            else None
        )
        self.output_project = nn.Linear(dim, num_outputs)
        self._is_plain = not (residual or norm or mlp)
        init_linear(self)

    def forward(self, tokens: Float[Tensor, "B N D"], pairs: Int[Tensor, "1 K 2"]) -> Float[Tensor, "B K C"]:
        """Predicted targets of the pairs."""
        attention = self.multihead_attn
        q_weight, k_weight, v_weight = attention.in_proj_weight.chunk(3)
        q_bias, k_bias, v_bias = attention.in_proj_bias.chunk(3)
        keys = tokens = self.token_project(tokens)
        if self.input_project is None:
            slots = torch.arange(tokens.shape[1], device=tokens.device).double()[:, None]
            keys = tokens + sincos_at(slots, tokens.shape[-1]).to(tokens.dtype)
            query = sincos_at(pairs.double(), tokens.shape[-1]).to(tokens.dtype)  # (1, K, D)
            q = F.linear(self.query_norm(query), q_weight, q_bias).expand(len(tokens), -1, -1)
        elif self._is_plain:  # project queries per token: there are fewer tokens than pairs
            left, right = (F.linear(F.linear(tokens, w), q_weight) for w in _halves(self.input_project))
            query = tokens
            q = _add_pairs(left, right, pairs) + F.linear(self.input_project.bias, q_weight, q_bias)
        else:
            query = _of_pairs(self.input_project, tokens, pairs)
            q = F.linear(self.query_norm(query), q_weight, q_bias)
        keys = self.token_norm(keys)
        k, v = F.linear(keys, k_weight, k_bias), F.linear(keys, v_weight, v_bias)
        q, k, v = (_split_heads(part, attention.num_heads) for part in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, K, D)
        out, last = attention.out_proj, self.output_project
        if self._is_plain:  # merge the two last linear layers into one with C outputs
            return F.linear(found, last.weight @ out.weight, F.linear(out.bias, last.weight, last.bias))
        found = F.linear(found, out.weight, out.bias)
        if self.residual:
            found = found + query
        if self.mlp is not None:
            found = found + self.mlp(found)
        return last(found)


class PairwiseLinear(nn.Module):
    """One linear layer on the two tokens of a pair: the paper's "pairwise MLP", as in its code.

    Its output is always ``a(x_i) + b(x_j) + c``.
    """

    def __init__(self, dim: int, num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * dim, num_outputs)
        init_linear(self)

    def forward(self, tokens: Float[Tensor, "B N D"], pairs: Int[Tensor, "1 K 2"]) -> Float[Tensor, "B K C"]:
        """Predicted targets of the pairs."""
        return _of_pairs(self.linear, tokens, pairs)


class DifferenceHead(nn.Module):
    """Difference of two predicted positions: antisymmetric and additive for any weights."""

    def __init__(self, dim: int, num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, num_outputs, bias=False)
        init_linear(self)

    def forward(self, tokens: Float[Tensor, "B N D"], pairs: Int[Tensor, "1 K 2"]) -> Float[Tensor, "B K C"]:
        """Predicted targets of the pairs."""
        own, other = gather_pairs(self.linear(tokens), pairs)
        return other - own


def init_linear(module: nn.Module) -> None:
    """Truncated normal 0.02 for the weights of all linear layers, zero for their biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _halves(linear: nn.Linear) -> tuple[Tensor, ...]:
    return linear.weight.chunk(2, dim=1)


def _add_pairs(left: Tensor, right: Tensor, pairs: Tensor) -> Tensor:
    return gather_pairs(left, pairs)[0] + gather_pairs(right, pairs)[1]


def _of_pairs(linear: nn.Linear, tokens: Tensor, pairs: Tensor) -> Tensor:
    """``linear`` of the concatenated tokens of each pair, factored."""
    left, right = (F.linear(tokens, weight) for weight in _halves(linear))
    return _add_pairs(left, right, pairs) + linear.bias


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``(B, T, D) -> (B, heads, T, D / heads)``."""
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)
