"""Fixed position embeddings."""

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.errors import ShapeError


def sincos_positions(embed_dim: int, grid: tuple[int, int]) -> Float[Tensor, "N D"]:
    """Sine-cosine positions of a patch grid.

    The first half of the dimensions encodes the column, the second the row, each as [sin | cos] with frequencies
    ``10000 ** (-k / (D / 4))``, k = 0..D/4-1.

    Args:
        embed_dim: D, a multiple of 4.
        grid: ``(h, w)`` patches down and across.

    Returns:
        ``(N, D)`` float32 in -1..1, raster order.

    Raises:
        ShapeError: if 4 does not divide ``embed_dim``.

    Source: He et al., MAE, arXiv:2111.06377v3, App. A.1; the order of the axes as in its released code.
    """
    if embed_dim % 4:
        raise ShapeError(f"embed_dim={embed_dim} has no 2-D sine-cosine positions; a multiple of 4 is needed")
    quarter = embed_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    halves = [torch.outer(axis.flatten(), frequencies) for axis in (columns, rows)]
    return torch.cat([part for half in halves for part in (half.sin(), half.cos())], dim=1).float()
