"""Positions as a field over the image, out of which each crop reads those of its patches.

Letters: M views, N = h*w patches of each, D embed_dim, F_h F_w nodes of the field.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.functional.positions import interpolation_weights, patch_centres, sincos_at
from smalti.functional.transfer import move

MODES = ("bicubic", "bilinear")


class PositionField(nn.Module):
    """A table of vectors spread over the image, learned, and a position of its own for the class token.

    Args:
        embed_dim: D.
        grid: ``(F_h, F_w)`` nodes down and across, at least 2 each.
        has_class_token: whether there is a class token, whose position is an ordinary vector.
        mode: interpolation between nodes, ``bicubic`` or ``bilinear``.
        align_corners: the outermost nodes lie on the borders of the image; otherwise half a node inside.
        separable: read by two small matrix products a view, whose gradient is the same bits every time on a GPU, where
            that of ``grid_sample`` is not. Equal but for rounding; needs memory for ``M * h * F_w * D`` numbers.

    Raises:
        ConfigError: for another mode, or a grid of less than 2x2 nodes.

    Source: Liu et al., "Self-Supervised Learning of Intertwined Content and Positional Features for Object Detection",
    ICML 2025. Interpolation, corners and that the field is learned are not said there.
    """

    def __init__(
        self,
        embed_dim: int,
        grid: tuple[int, int] = (50, 50),
        has_class_token: bool = True,
        mode: str = "bicubic",
        align_corners: bool = True,
        separable: bool = False,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ConfigError(f"a field read by {mode!r}: {' or '.join(MODES)} is needed")
        if min(grid) < 2:
            raise ConfigError(f"a field of {grid[0]}x{grid[1]} nodes: at least 2x2 are needed")
        self.mode, self.align_corners, self.separable = mode, align_corners, separable
        self.field = nn.Parameter(torch.empty(1, embed_dim, *grid))
        self.class_position = nn.Parameter(torch.empty(1, 1, embed_dim)) if has_class_token else None
        self.init_normal()

    @property
    def grid(self) -> tuple[int, int]:
        """``(F_h, F_w)``, nodes down and across."""
        return self.field.shape[2], self.field.shape[3]

    def config(self) -> dict[str, Any]:
        """Plain values that, with the width and whether there is a class token, build the same field again."""
        return {
            "grid": list(self.grid),
            "mode": self.mode,
            "align_corners": self.align_corners,
            "separable": self.separable,
        }

    def forward(self, boxes: Float[Tensor, "M 4"], grid: tuple[int, int]) -> Float[Tensor, "M N D"]:
        """Positions of the patches of some views, float32 (float64 for such a field).

        Args:
            boxes: ``(M, 4)`` x0 y0 x1 y1 in shares of the field; no gradient flows to them.
            grid: ``(h, w)`` patches of each view, raster order.
        """
        with torch.autocast(boxes.device.type, enabled=False):
            across, down = patch_centres(boxes.detach().to(self.field.dtype), grid)
            read = self._product if self.separable else self._sample
            return read(across, down)

    def whole(self, grid: tuple[int, int]) -> Float[Tensor, "1 N D"]:
        """Positions of the patches of a whole image."""
        return self(move(torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=self.field.dtype), self.field.device), grid)

    def _sample(self, across: Float[Tensor, "M w"], down: Float[Tensor, "M h"]) -> Float[Tensor, "M N D"]:
        """All views in one call on one field: a field a view would have a gradient of that size, too."""
        (num_views, width), height = across.shape, down.shape[1]
        x, y = across[:, None].expand(-1, height, -1), down[..., None].expand(-1, -1, width)
        places = (2 * torch.stack([x, y], dim=-1) - 1).reshape(1, num_views * height, width, 2)
        values = F.grid_sample(self.field, places, self.mode, "border", self.align_corners)
        # (1, D, M*h, w) -> (M, h*w, D)
        return values[0].reshape(-1, num_views, height, width).permute(1, 2, 3, 0).flatten(1, 2)

    def _product(self, across: Float[Tensor, "M w"], down: Float[Tensor, "M h"]) -> Float[Tensor, "M N D"]:
        """Rows, then columns."""
        rows = interpolation_weights(down, self.grid[0], self.mode, self.align_corners)
        columns = interpolation_weights(across, self.grid[1], self.mode, self.align_corners)
        narrow = torch.einsum("mhy,dyx->mhxd", rows, self.field[0])
        return torch.einsum("mwx,mhxd->mhwd", columns, narrow).flatten(1, 2)

    @torch.no_grad()
    def init_normal(self, std: float = 0.02) -> None:
        """Truncated normal, as ViTs begin with their table; the class token's position, too."""
        nn.init.trunc_normal_(self.field, std=std)
        if self.class_position is not None:
            nn.init.trunc_normal_(self.class_position, std=std)

    @torch.no_grad()
    def init_sincos(self, native: tuple[int, int]) -> None:
        """The sine-cosine code, whose unit is a patch of a whole image on the grid ``native``: read there, it is
        :func:`~smalti.functional.positions.sincos_positions` but for interpolation. Root mean square 0.71.

        Raises:
            ShapeError: if 4 does not divide the width.
        """
        y, x = (self._nodes(length) * cells - 0.5 for length, cells in zip(self.grid, native, strict=True))
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        self.field.copy_(sincos_at(torch.stack([columns, rows], dim=-1), self.field.shape[1]).permute(2, 0, 1))

    @torch.no_grad()
    def init_table(self, table: Float[Tensor, "1 N D"], grid: tuple[int, int]) -> None:
        """From a table of positions on a patch grid, as pretrained weights have them.

        Args:
            table: ``(1, N, D)`` raster order, without rows of prefix tokens.
            grid: ``(h, w)`` of the table.
        """
        plane = table.mT.reshape(1, -1, *grid).to(self.field)  # (1, N, D) -> (1, D, h, w)
        rows, columns = (
            # a table's entries are the middles of its cells
            interpolation_weights(self._nodes(length), cells, "bicubic", align_corners=False)
            for length, cells in zip(self.grid, grid, strict=True)
        )
        self.field.copy_(torch.einsum("yh,bdhw,xw->bdyx", rows, plane, columns))

    @torch.no_grad()
    def set_rms(self, rms: float) -> None:
        """Multiply the field so that the root mean square of its numbers is ``rms``."""
        self.field.mul_(rms / self.field.square().mean().sqrt())

    def _nodes(self, length: int) -> Float[Tensor, " n"]:
        """Places of the nodes of a row, in shares of the image."""
        number = torch.arange(length, device=self.field.device, dtype=torch.float32)
        return number / (length - 1) if self.align_corners else (number + 0.5) / length
