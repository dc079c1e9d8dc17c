"""Fixed positional embeddings, resampling of position tables, and sampling coordinates of position fields."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from smalti.errors import ConfigError, ShapeError


class Resampling(NamedTuple):
    """How a position table is resampled to another grid; the default is as in timm."""

    mode: str = "bicubic"
    """``bicubic`` or ``bilinear``."""
    antialias: bool = True
    """Antialias when downsampling; also changes the cubic coefficient from -0.75 to -0.5, so upsampling differs,
    too."""
    offset: float = 0.0
    """Added to the new grid size in the scale factor, ``(n + offset) / m``; 0.1 in the official DINO, iBOT and DINOv2
    code."""

    def check(self) -> "Resampling":
        """Validate and return itself.

        Raises:
            ConfigError: for another mode, or an offset outside [0, 1).
        """
        if self.mode not in ("bicubic", "bilinear"):
            raise ConfigError(f"pos_mode={self.mode!r}: bicubic or bilinear is needed")
        if not 0 <= self.offset < 1:
            raise ConfigError(f"pos_offset={self.offset}: a number in 0..1 (1 excluded) is needed")
        return self


def resample_positions(
    pos_embed: Float[Tensor, "1 T D"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_prefix: int = 0,
    how: Resampling = Resampling(),
) -> Float[Tensor, "1 S D"]:
    """Resample a position table to another grid; prefix rows (class token, registers) are unchanged.

    Args:
        pos_embed: ``(1, P + h*w, D)``, P = ``num_prefix``, patches in raster order.
        old_grid: ``(h, w)`` of the table.
        new_grid: ``(h, w)`` of the result.
        num_prefix: rows that aren't patches.
        how: interpolation; computed in float32.

    Returns:
        ``(1, P + h*w, D)`` with the new h and w.

    Source: Caron et al., DINO, official code, for the offset; timm for the rest.
    """
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    if not how.offset:
        return resample_abs_pos_embed(
            pos_embed, list(new_grid), list(old_grid), num_prefix, interpolation=how.mode, antialias=how.antialias
        )
    prefix, patches = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    scale = [(new + how.offset) / old for new, old in zip(new_grid, old_grid, strict=True)]
    plane = patches.float().mT.reshape(1, -1, *old_grid)  # (1, h*w, D) -> (1, D, h, w)
    # by scale, not by size: torch then samples at steps of 1 / scale, instead of old / new
    plane = F.interpolate(plane, scale_factor=scale, mode=how.mode, antialias=how.antialias)
    return torch.cat([prefix, plane.flatten(2).mT.to(patches.dtype)], dim=1)


def sincos_positions(embed_dim: int, grid: tuple[int, int]) -> Float[Tensor, "N D"]:
    """Sine-cosine positions of a patch grid.

    The first half of the dimensions encodes the column, the second the row, each as [sin | cos] with frequencies
    ``10000 ** (-k / (D / 4))``, k = 0..D/4-1.

    Args:
        embed_dim: D, a multiple of 4.
        grid: ``(h, w)`` of the patch grid.

    Returns:
        ``(N, D)`` float32 in -1..1, raster order.

    Raises:
        ShapeError: if 4 does not divide ``embed_dim``.

    Source: He et al., MAE, arXiv:2111.06377v3, App. A.1; the order of the axes as in its released code.
    """
    if embed_dim % 4:
        raise ShapeError(f"embed_dim={embed_dim}: a multiple of 4 is needed for 2-D sine-cosine positions")
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    return sincos_at(torch.stack([columns.flatten(), rows.flatten()], dim=1), embed_dim)


def sincos_at(coordinates: Float[Tensor, "*B A"], embed_dim: int) -> Float[Tensor, "*B D"]:
    """Sine-cosine embedding of any coordinates: each axis has an equal part of the dimensions, [sin | cos].

    At columns and rows of a grid this is :func:`sincos_positions`.

    Args:
        coordinates: ``(..., A)`` real numbers, x first.
        embed_dim: D, a multiple of 2*A.

    Returns:
        ``(..., D)`` float32 in -1..1, on the device of ``coordinates``.

    Raises:
        ShapeError: if ``2 * A`` does not divide ``embed_dim``.
    """
    axes = coordinates.shape[-1]
    if embed_dim % (2 * axes):
        raise ShapeError(f"embed_dim={embed_dim}: a multiple of {2 * axes} is needed for {axes} coordinates")
    count = embed_dim // (2 * axes)
    frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64, device=coordinates.device) / count)
    angles = coordinates.double()[..., None] * frequencies  # (..., A, count)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2).float()


def matching_cells(
    grid: tuple[int, int], other: tuple[int, int], device: torch.device | None = None
) -> Int[Tensor, " N"]:
    """For each cell of a grid, the cell of another grid over the same image that contains its centre.

    Args:
        grid: ``(h, w)``, N = h * w cells in raster order.
        other: ``(h, w)``; equal grids give 0..N-1.
        device: device of the result; None: the CPU.

    Returns:
        ``(N,)`` raster indices in the other grid.
    """
    # integers: the centre of cell i is (2 i + 1) / (2 n), so rounding can't move it across an edge
    rows, columns = ((2 * torch.arange(n, device=device) + 1) * m // (2 * n) for n, m in zip(grid, other, strict=True))
    return (rows[:, None] * other[1] + columns).flatten()


def patch_centres(
    boxes: Float[Tensor, "M 4"], grid: tuple[int, int]
) -> tuple[Float[Tensor, "M w"], Float[Tensor, "M h"]]:
    """Coordinates of the centres of a view's patches.

    Args:
        boxes: ``(M, 4)`` x0 y0 x1 y1 of the views, in fractions of the image; if x0 and x1 are exchanged, columns run
            from right to left, as in a mirrored view.
        grid: ``(h, w)`` of the patch grid.

    Returns:
        ``(M, w)`` x of each column and ``(M, h)`` y of each row, in fractions of the image.
    """
    x0, y0, x1, y1 = boxes[..., None].unbind(1)  # (M, 1) each
    down, across = ((torch.arange(n, device=boxes.device, dtype=boxes.dtype) + 0.5) / n for n in grid)
    return x0 + (x1 - x0) * across, y0 + (y1 - y0) * down


_CUBIC = -0.75
"""torch's cubic coefficient in ``interpolate`` without antialiasing and in ``grid_sample``."""


def interpolation_weights(
    places: Float[Tensor, "*S n"], length: int, mode: str = "bicubic", align_corners: bool = True
) -> Float[Tensor, "*S n F"]:
    """Interpolation weights of the nodes of a row at given coordinates.

    Args:
        places: coordinates 0..1 along the row; beyond its ends, the outermost node is repeated.
        length: F, number of nodes.
        mode: ``bicubic`` (four nodes) or ``bilinear`` (two).
        align_corners: 0 and 1 are the first and the last node; otherwise half a node outside of them.

    Returns:
        ``(..., n, F)``; rows sum to 1. Two such matrices, one per axis, are equivalent to torch's ``grid_sample`` with
        ``padding_mode="border"``, since the centres of a view's patches form a grid.
    """
    at = places * (length - 1) if align_corners else places * length - 0.5
    first = at.floor()
    t = at - first
    if mode == "bilinear":
        taps = [(0, 1 - t), (1, t)]
    else:
        taps = [(step, _cubic((t - step).abs())) for step in (-1, 0, 1, 2)]
    weights = places.new_zeros(*places.shape, length)
    for step, weight in taps:
        node = (first.long() + step).clamp(0, length - 1)
        weights.scatter_add_(-1, node[..., None], weight[..., None])
    return weights


def _cubic(dist: Tensor) -> Tensor:
    """Weight of a node at a distance of 0..2 nodes.

    Source: Keys, "Cubic convolution interpolation for digital image processing", IEEE TASSP 1981, with a = -0.75.
    """
    a = _CUBIC
    near = ((a + 2) * dist - (a + 3)) * dist * dist + 1
    far = ((a * dist - 5 * a) * dist + 8 * a) * dist - 4 * a
    return torch.where(dist <= 1, near, far)
