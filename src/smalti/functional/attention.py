"""The class token's attention as a detector of foreground.

Letters: B images, H heads, h w the patch grid, N = h * w patches.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from smalti.functional.transfer import move

MASS = 0.6
_SIGMA, _RADIUS = 0.6, 3  # in patches
_ROUNDING = 1e-6


def keep_mass(attention: Float[Tensor, "*B N"], share: float = MASS) -> Bool[Tensor, "*B N"]:
    """True for the patches that hold most of the attention, the smallest left out as long as they hold ``1 - share``.

    Args:
        attention: ``(..., N)`` not negative; each row is divided by its sum.
        share: of the sum that is kept, at least, 0..1.

    Source: Caron et al., DINO, arXiv:2104.14294v2, Fig. 4 (60 % of the mass).
    """
    ascending, order = attention.float().sort(dim=-1, stable=True)
    mass = ascending.cumsum(-1) / ascending.sum(-1, keepdim=True)
    return torch.empty_like(mass, dtype=torch.bool).scatter_(-1, order, mass > 1 - share + _ROUNDING)


def blur_maps(maps: Float[Tensor, "B h w"]) -> Float[Tensor, "B h w"]:
    """Gaussian blur of 7 x 7 patches and standard deviation 0.6, reflected at the border."""
    radius = min(_RADIUS, maps.shape[1] - 1, maps.shape[2] - 1)  # what can be reflected; the weight at 3 is 2e-6
    weights = move(torch.tensor([math.exp(-0.5 * (i / _SIGMA) ** 2) for i in range(-radius, radius + 1)]), maps.device)
    weights = (weights / weights.sum()).to(maps.dtype)
    padded = F.pad(maps[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))[:, 0]


def drop_specks(mask: Bool[Tensor, "B h w"]) -> Bool[Tensor, "B h w"]:
    """The mask without its connected parts of one or two patches; diagonal neighbours are connected.

    A part is that small if a patch has no neighbour, or one that has no other: two small convolutions, on any device.
    """
    ones = torch.ones(1, 1, 3, 3, device=mask.device)

    def around(patches: Bool[Tensor, "B h w"]) -> Float[Tensor, "B h w"]:
        return F.conv2d(patches[:, None].float(), ones, padding=1)[:, 0] - patches.float()

    neighbours = around(mask)
    single = mask & (neighbours == 1)
    return mask & (neighbours > 0) & ~(single & (around(single) > 0))


def foreground(attention: Float[Tensor, "B H N"], grid: tuple[int, int], share: float = MASS) -> Bool[Tensor, "B h w"]:
    """Patches of the foreground: mean over heads, blur, the patches with most of the mass, small parts dropped.

    Args:
        attention: ``(B, H, N)`` of the class token to the patches, as ``Encoder.encode_with_attention`` gives it.
        grid: ``(h, w)``.
        share: of the attention that is kept.

    Source: as :func:`keep_mass`; blur and small parts as in the code of Pariza et al., NeCo, arXiv:2408.11054v3.
    """
    maps = blur_maps(attention.float().mean(1).reshape(-1, *grid))
    return drop_specks(keep_mass(maps.flatten(1), share).reshape(maps.shape))
