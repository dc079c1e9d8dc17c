"""Images as patches, and back."""

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.errors import ShapeError


def patchify(images: Float[Tensor, "B C H W"], patch_size: tuple[int, int]) -> Float[Tensor, "B N P"]:
    """Cut images into a grid of patches, in raster order.

    Args:
        images: ``(B, C, H, W)``.
        patch_size: ``(ph, pw)`` in pixels.

    Returns:
        ``(B, N, P)`` with ``P = C * ph * pw`` values per patch, ordered (channel, row, column) as a convolution's
        kernel.

    Raises:
        ShapeError: if the patch size does not divide the images.
    """
    batch, channels, height, width = images.shape
    ph, pw = patch_size
    if height % ph or width % pw:
        raise ShapeError(
            f"images are {height}x{width} pixels, which a patch of {ph}x{pw} does not divide; crop them first"
        )
    # (B, C, h, ph, w, pw) -> (B, h, w, C, ph, pw)
    cells = images.reshape(batch, channels, height // ph, ph, width // pw, pw).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, (height // ph) * (width // pw), channels * ph * pw)


def unpatchify(
    patches: Float[Tensor, "B N P"], patch_size: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "B C H W"]:
    """The inverse of :func:`patchify`.

    Args:
        patches: ``(B, N, P)`` in the order of :func:`patchify`.
        patch_size: ``(ph, pw)`` in pixels.
        grid: ``(h, w)`` of the patch grid.

    Raises:
        ShapeError: if N is not ``h * w``, or P is not a multiple of ``ph * pw``.
    """
    batch, num_patches, values = patches.shape
    (ph, pw), (h, w) = patch_size, grid
    if num_patches != h * w or values % (ph * pw):
        raise ShapeError(
            f"{num_patches} patches of {values} values don't make a {h}x{w} grid of {ph}x{pw} pixel patches; "
            f"{h * w} patches with a multiple of {ph * pw} values are needed"
        )
    cells = patches.reshape(batch, h, w, values // (ph * pw), ph, pw).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(batch, values // (ph * pw), h * ph, w * pw)


def patch_variance(images: Float[Tensor, "B C H W"], patch_size: tuple[int, int]) -> Float[Tensor, "B N"]:
    """Variance of the values of each patch, over all channels.

    Args:
        images: ``(B, C, H, W)``.
        patch_size: ``(ph, pw)`` in pixels.

    Raises:
        ShapeError: if the patch size does not divide the images.
    """
    return patchify(images, patch_size).var(-1, correction=0)


def standardize_patches(patches: Float[Tensor, "B N P"], eps: float = 1e-6) -> Float[Tensor, "B N P"]:
    """Standardise each patch: subtract its mean, divide by the square root of its unbiased variance plus ``eps``.

    Source: He et al., MAE, arXiv:2111.06377v3, Sec. 4.2 "Reconstruction target"; variance and eps as in its code.
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) * torch.rsqrt(variance + eps)
