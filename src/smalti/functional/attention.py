"""Attention between patches, and foreground detection from the class token's attention.

Letters: B images, H heads, T tokens (prefix and patches), Q queries, h w the patch grid, N = h * w patches.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from smalti.functional.transfer import move

MASS = 0.6
_SIGMA, _RADIUS = 0.6, 3  # patches
_ROUNDING = 1e-6
EPS = 1e-8
"""Added to each weight to a patch before rows are renormalised."""


def to_patches(attention: Float[Tensor, "*B Q T"], num_prefix: int, eps: float = EPS) -> Float[Tensor, "*B Q N"]:
    """Attention of any queries to the patches: prefix keys removed, ``eps`` added, rows renormalised to sum to 1."""
    weights = attention[..., num_prefix:] + eps
    return weights / weights.sum(-1, keepdim=True)


def between_patches(attention: Float[Tensor, "*B T T"], num_prefix: int, eps: float = EPS) -> Float[Tensor, "*B N N"]:
    """Attention between patches: :func:`to_patches` without the queries of prefix tokens."""
    return to_patches(attention[..., num_prefix:, :], num_prefix, eps)


def keep_mass(attention: Float[Tensor, "*B N"], ratio: float = MASS) -> Bool[Tensor, "*B N"]:
    """True for the patches with the largest attention that together hold the fraction ``ratio`` of it.

    Args:
        attention: ``(..., N)`` not negative; each row is divided by its sum.
        ratio: smallest fraction of the sum to keep, 0..1.

    Source: Caron et al., DINO, arXiv:2104.14294v2, Fig. 4 (60 % of the mass).
    """
    ascending, order = attention.float().sort(dim=-1, stable=True)
    mass = ascending.cumsum(-1) / ascending.sum(-1, keepdim=True)
    return torch.empty_like(mass, dtype=torch.bool).scatter_(-1, order, mass > 1 - ratio + _ROUNDING)


def blur_maps(maps: Float[Tensor, "B h w"]) -> Float[Tensor, "B h w"]:
    """Gaussian blur of 7 x 7 patches and standard deviation 0.6, reflected at the border."""
    radius = min(_RADIUS, maps.shape[1] - 1, maps.shape[2] - 1)  # limit of reflection padding; the weight at 3 is 2e-6
    weights = move(torch.tensor([math.exp(-0.5 * (i / _SIGMA) ** 2) for i in range(-radius, radius + 1)]), maps.device)
    weights = (weights / weights.sum()).to(maps.dtype)
    padded = F.pad(maps[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))[:, 0]


def drop_specks(mask: Bool[Tensor, "B h w"]) -> Bool[Tensor, "B h w"]:
    """The mask without connected components of one or two patches (8-connectivity).

    A component is that small if its patches have at most one neighbour, which has no other: two small convolutions.
    """
    ones = torch.ones(1, 1, 3, 3, device=mask.device)

    def around(patches: Bool[Tensor, "B h w"]) -> Float[Tensor, "B h w"]:
        return F.conv2d(patches[:, None].float(), ones, padding=1)[:, 0] - patches.float()

    neighbours = around(mask)
    single = mask & (neighbours == 1)
    return mask & (neighbours > 0) & ~(single & (around(single) > 0))


def foreground(attention: Float[Tensor, "B H N"], grid: tuple[int, int], ratio: float = MASS) -> Bool[Tensor, "B h w"]:
    """Foreground patches: mean over heads, blur, patches with most of the mass, without small components.

    Args:
        attention: ``(B, H, N)`` of the class token to the patches, from ``Encoder.encode_with_attention``.
        grid: ``(h, w)``.
        ratio: fraction of the attention to keep.

    Source: as :func:`keep_mass`; blur and small components as in the code of Pariza et al., NeCo, arXiv:2408.11054v3.
    """
    maps = blur_maps(attention.float().mean(1).reshape(-1, *grid))
    return drop_specks(keep_mass(maps.flatten(1), ratio).reshape(maps.shape))
