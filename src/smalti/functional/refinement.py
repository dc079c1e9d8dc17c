"""Patch Representation Refinement (PRR): self-attention of tokens without any parameters.

Source: Hajimiri et al., "Locality-Attending Vision Transformer", ICLR 2026, arXiv:2603.04892; the function is that of
timm's ``AttentionPoolPrr``.
Letters: B images, T tokens (prefix and patches), D embed_dim, H heads, d = D / H channels per head.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smalti.errors import ConfigError, ShapeError


def check_heads(width: int, num_heads: int) -> None:
    """Check that the number of heads divides the width of the tokens.

    Raises:
        ConfigError: if it doesn't.
    """
    if num_heads < 1 or width % num_heads:
        raise ConfigError(
            f"PRR with {num_heads} heads on tokens of width {width}; the number of heads must divide the width"
        )


def prr_refine(tokens: Float[Tensor, "B T D"], num_heads: int) -> Float[Tensor, "B T D"]:
    """Self-attention without parameters, per head: ``softmax(X X^T / sqrt(d)) X``.

    No projections, residual or masks: each token is its own query, key and value. After a layer norm, a token attends
    mostly to itself; for tokens of much larger norm, only to itself, so that nothing changes.

    Args:
        tokens: ``(B, T, D)`` after the final norm, including prefix tokens.
        num_heads: H, a divisor of D; that of the backbone in the paper.

    Returns:
        ``(B, T, D)``; costs ``2 T^2 D`` multiplications per image.

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
    """One token of :func:`prr_refine`, by default the class token, in ``2 T D`` multiplications; gradients are equal,
    too.

    Args:
        tokens: ``(B, T, D)`` as in :func:`prr_refine`.
        num_heads: H, a divisor of D.
        place: index of the token.

    Raises:
        ConfigError: if ``num_heads`` does not divide D.
        ShapeError: if the index is out of range.
    """
    check_heads(tokens.shape[-1], num_heads)
    if not 0 <= place < tokens.shape[1]:
        raise ShapeError(f"place={place}: an index in 0..{tokens.shape[1] - 1} is needed")
    heads = tokens.reshape(*tokens.shape[:2], num_heads, -1)  # (B, T, H, d)
    query = heads[:, place] * heads.shape[-1] ** -0.5
    weights = torch.einsum("bhd,bthd->bht", query, heads).softmax(-1)
    return torch.einsum("bht,bthd->bhd", weights.to(heads.dtype), heads).flatten(1)
