"""Patch Representation Refinement (PRR): self-attention of tokens without any parameters.

Source: Hajimiri et al., "Locality-Attending Vision Transformer", ICLR 2026, arXiv:2603.04892; the function is that of
timm's ``AttentionPoolPrr``.
Letters: B images, T tokens (prefix and patches), D embed_dim, H heads, d = D / H channels a head.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smalti.errors import ConfigError, ShapeError


def check_heads(width: int, num_heads: int) -> None:
    """Refuse a number of heads that doesn't divide the tokens' width.

    Raises:
        ConfigError: naming both.
    """
    if num_heads < 1 or width % num_heads:
        raise ConfigError(f"PRR with {num_heads} heads on tokens of {width} channels; the heads must divide the width")


def prr_refine(tokens: Float[Tensor, "B T D"], num_heads: int) -> Float[Tensor, "B T D"]:
    """Every token as the mean of all tokens, weighted by likeness head by head: ``softmax(X X^T / sqrt(d)) X``.

    No projections, no residual, nothing masked: each token is a query, a key and a value of its own. On tokens behind
    a layer norm a token keeps most of its weight for itself; on much longer ones it keeps all, and nothing happens.

    Args:
        tokens: ``(B, T, D)`` after the final norm, prefix tokens among them.
        num_heads: H, which divides D; the backbone's own in the paper.

    Returns:
        ``(B, T, D)``; the cost is ``2 T^2 D`` multiplications an image.

    Raises:
        ConfigError: if ``num_heads`` does not divide D.

    Example:
        >>> prr_refine(torch.ones(1, 3, 4), num_heads=2).tolist() == torch.ones(1, 3, 4).tolist()
        True
    """
    check_heads(tokens.shape[-1], num_heads)
    heads = tokens.reshape(*tokens.shape[:2], num_heads, -1).transpose(1, 2)  # (B, T, D) -> (B, H, T, d)
    return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def prr_token(tokens: Float[Tensor, "B T D"], num_heads: int, place: int = 0) -> Float[Tensor, "B D"]:
    """One token of :func:`prr_refine`, the class token, in ``2 T D`` multiplications: values and gradients are equal.

    Args:
        tokens: ``(B, T, D)`` as there.
        num_heads: H, which divides D.
        place: of the token among the T.

    Raises:
        ConfigError: if ``num_heads`` does not divide D.
        ShapeError: if there is no token at that place.
    """
    check_heads(tokens.shape[-1], num_heads)
    if not 0 <= place < tokens.shape[1]:
        raise ShapeError(f"token {place} of {tokens.shape[1]} is asked for; places go from 0 to {tokens.shape[1] - 1}")
    heads = tokens.reshape(*tokens.shape[:2], num_heads, -1)  # (B, T, H, d)
    query = heads[:, place] * heads.shape[-1] ** -0.5
    weights = torch.einsum("bhd,bthd->bht", query, heads).softmax(-1)
    return torch.einsum("bht,bthd->bhd", weights.to(heads.dtype), heads).flatten(1)
