"""Test-time changes of an image: hidden patches and affine maps.

Letters: B images, C channels, S side in pixels, N patches of an h x w grid.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from smalti.errors import ShapeError
from smalti.functional.random import sample_uniform

Warp = Literal["rotation", "shear", "translation", "scale"]
_SALIENCY_SIDE = 64
"""Side at which saliency is computed, as in its paper."""
_CENTRE_STREAM, _SIGN_STREAM = 83, 89  # of an image's random numbers


def contiguous_orders(keys: Int[Tensor, " B"], grid: tuple[int, int]) -> Int[Tensor, "B N"]:
    """Orders of patches by their distance from a random patch: any first part is one block around it.

    Args:
        keys: ``(B,)`` int64 key of each image, which determines its patch.
        grid: ``(h, w)``.
    """
    rows, columns = torch.meshgrid(*(torch.arange(side, device=keys.device) for side in grid), indexing="ij")
    cells = torch.stack([rows, columns], dim=-1).view(-1, 2)
    centres = cells[(sample_uniform(keys, 1, _CENTRE_STREAM)[:, 0] * len(cells)).long().clamp(max=len(cells) - 1)]
    distances = (cells[None] - centres[:, None]).square().sum(-1)
    return distances.argsort(dim=1, stable=True)


def saliency(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B S S"]:
    """Spectral residual saliency of images, from their grey values alone: no network decides what is salient.

    Returns:
        ``(B, 64, 64)``, not negative; larger is more salient.

    Source: Hou & Zhang, "Saliency Detection: A Spectral Residual Approach", CVPR 2007, Eq. (3) to (5): a 3 x 3 mean
    filter on the log spectrum of a 64 px image; here the result is smoothed by a Gaussian of 2.5 px.
    """
    grey = F.interpolate(
        images.float().mean(1, keepdim=True),
        (_SALIENCY_SIDE,) * 2,
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    spectrum = torch.fft.fft2(grey)
    log_amplitude = spectrum.abs().clamp(min=1e-8).log()
    mean = F.avg_pool2d(F.pad(log_amplitude, (1, 1, 1, 1), mode="circular"), 3, stride=1)
    residual = log_amplitude - mean
    found = torch.fft.ifft2(torch.polar(residual.exp(), spectrum.angle())).abs().square()
    return _blur(found, 2.5)[:, 0]


def salient_orders(images: Float[Tensor, "B C H W"], grid: tuple[int, int]) -> Int[Tensor, "B N"]:
    """Orders of patches by mean :func:`saliency`, the most salient first."""
    pooled = F.interpolate(saliency(images)[:, None], grid, mode="area")
    return pooled.flatten(1).argsort(dim=1, descending=True, stable=True)


def hidden_patches(orders: Int[Tensor, "B N"], ratio: float) -> Bool[Tensor, "B N"]:
    """Mask of the first ``ratio`` of the patches in their orders, rounded to a whole number of patches."""
    num_hidden = round(ratio * orders.shape[1])
    mask = torch.zeros_like(orders, dtype=torch.bool)
    return mask.scatter(1, orders[:, :num_hidden], True)


def hide(
    images: Float[Tensor, "B C S1 S2"], mask: Bool[Tensor, "B N"], grid: tuple[int, int]
) -> Float[Tensor, "B C S1 S2"]:
    """Normalised images with the pixels of some patches set to 0, the mean color.

    Args:
        images: ``(B, C, S1, S2)``, their sides multiples of the grid.
        mask: ``(B, N)``, True where a patch is hidden.
        grid: ``(h, w)``.

    Raises:
        ShapeError: if the grid does not divide the images.
    """
    height, width = images.shape[-2:]
    if height % grid[0] or width % grid[1]:
        raise ShapeError(f"images of {height}x{width} pixels can't be cut into {grid[0]}x{grid[1]} patches")
    cells = mask.view(-1, 1, *grid)
    pixels = cells.repeat_interleave(height // grid[0], 2).repeat_interleave(width // grid[1], 3)
    return images.masked_fill(pixels, 0.0)


def warp(
    images: Float[Tensor, "B C S S"], kind: Warp, amount: float, keys: Int[Tensor, " B"]
) -> Float[Tensor, "B C S S"]:
    """Square normalised images under an affine map about their centre, bilinear; what has no source is 0, the mean.

    Rotation and shear go in a random direction, translation in one of four, as the keys determine: the same image
    moves the same way for every encoder and at every amount.

    Args:
        images: ``(B, C, S, S)``.
        kind: ``rotation``: degrees; ``shear``: degrees of the slant, along x; ``translation``: fraction of the side;
            ``scale``: factor, above 1 enlarges.
        amount: of the change.
        keys: ``(B,)`` int64 key of each image.

    Raises:
        ShapeError: if images aren't square.
    """
    if images.shape[-1] != images.shape[-2]:
        raise ShapeError(f"images of {images.shape[-2]}x{images.shape[-1]} pixels, square ones are needed")
    draws = sample_uniform(keys, 2, _SIGN_STREAM).to(images)
    sign = torch.where(draws[:, 0] < 0.5, -1.0, 1.0)
    one, zero = torch.ones_like(sign), torch.zeros_like(sign)
    if kind == "rotation":
        angle = sign * math.radians(amount)
        rows = [(angle.cos(), -angle.sin(), zero), (angle.sin(), angle.cos(), zero)]
    elif kind == "shear":
        rows = [(one, sign * math.tan(math.radians(amount)), zero), (zero, one, zero)]
    elif kind == "translation":
        shift, along_x = -2 * amount * sign, draws[:, 1] < 0.5  # affine maps work on -1..1
        rows = [(one, zero, torch.where(along_x, shift, zero)), (zero, one, torch.where(along_x, zero, shift))]
    else:
        rows = [(one / amount, zero, zero), (zero, one / amount, zero)]
    matrices = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)  # (B, 2, 3): output -> source
    where = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, where, mode="bilinear", padding_mode="zeros", align_corners=False)


def _blur(maps: Float[Tensor, "B 1 H W"], sigma: float) -> Float[Tensor, "B 1 H W"]:
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = (-(offsets**2) / (2 * sigma**2)).exp()
    kernel = kernel / kernel.sum()
    padded = F.pad(maps, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
