"""Image-level positional embeddings: a learned field over the image, from which each crop reads its positions.

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
    """A learned table of vectors that spans the image, and a separate position for the class token.

    Args:
        embed_dim: D.
        grid: ``(F_h, F_w)`` rows and columns, at least 2 each.
        has_class_token: add a learned position for the class token.
        mode: interpolation between nodes, ``bicubic`` or ``bilinear``.
        align_corners: the outermost nodes lie on the borders of the image; otherwise half a cell inside.

    Raises:
        ConfigError: for another mode, or a grid of less than 2x2 nodes.

    Source: Liu et al., "Self-Supervised Learning of Intertwined Content and Positional Features for Object Detection",
    ICML 2025. The paper does not specify interpolation, corners, or whether the field is learned.
    """

    def __init__(
        self,
        embed_dim: int,
        grid: tuple[int, int] = (50, 50),
        has_class_token: bool = True,
        mode: str = "bicubic",
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ConfigError(f"position field with mode={mode!r}: {' or '.join(MODES)} is needed")
        if min(grid) < 2:
            raise ConfigError(f"position field of {grid[0]}x{grid[1]} nodes: at least 2x2 are needed")
        self.mode, self.align_corners = mode, align_corners
        self.field = nn.Parameter(torch.empty(1, embed_dim, *grid))
        self.class_position = nn.Parameter(torch.empty(1, 1, embed_dim)) if has_class_token else None
        self.init_normal()

    @property
    def grid(self) -> tuple[int, int]:
        """``(F_h, F_w)``, rows and columns."""
        return self.field.shape[2], self.field.shape[3]

    def config(self) -> dict[str, Any]:
        """Plain values from which, with width and class token, the same field can be built."""
        return {"grid": list(self.grid), "mode": self.mode, "align_corners": self.align_corners}

    def forward(self, boxes: Float[Tensor, "M 4"], grid: tuple[int, int]) -> Float[Tensor, "M N D"]:
        """Positions of the patches of some views, float32 (float64 for such a field).

        Args:
            boxes: ``(M, 4)`` x0 y0 x1 y1 in fractions of the field; no gradient flows to them.
            grid: ``(h, w)`` patches of each view, raster order.
        """
        with torch.autocast(boxes.device.type, enabled=False):
            return self._sample(*patch_centres(boxes.detach().to(self.field.dtype), grid))

    def whole(self, grid: tuple[int, int]) -> Float[Tensor, "1 N D"]:
        """Positions of the patches of a whole image."""
        return self(move(torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=self.field.dtype), self.field.device), grid)

    def _sample(self, across: Float[Tensor, "M w"], down: Float[Tensor, "M h"]) -> Float[Tensor, "M N D"]:
        """All views in one call on one field; expanding the field per view would also expand its gradient."""
        (num_views, width), height = across.shape, down.shape[1]
        x, y = across[:, None].expand(-1, height, -1), down[..., None].expand(-1, -1, width)
        places = (2 * torch.stack([x, y], dim=-1) - 1).reshape(1, num_views * height, width, 2)
        values = F.grid_sample(self.field, places, self.mode, "border", self.align_corners)
        # (1, D, M*h, w) -> (M, h*w, D)
        return values[0].reshape(-1, num_views, height, width).permute(1, 2, 3, 0).flatten(1, 2)

    @torch.no_grad()
    def init_normal(self, std: float = 0.02) -> None:
        """Truncated normal, as a ViT's position table; the class token's position, too."""
        nn.init.trunc_normal_(self.field, std=std)
        if self.class_position is not None:
            nn.init.trunc_normal_(self.class_position, std=std)

    @torch.no_grad()
    def init_sincos(self, native: tuple[int, int]) -> None:
        """Sine-cosine embedding in units of a patch on the grid ``native``: read on that grid, it equals
        :func:`~smalti.functional.positions.sincos_positions` up to interpolation. Root mean square 0.71.

        Raises:
            ShapeError: if 4 does not divide the width.
        """
        y, x = (self._nodes(length) * cells - 0.5 for length, cells in zip(self.grid, native, strict=True))
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        self.field.copy_(sincos_at(torch.stack([columns, rows], dim=-1), self.field.shape[1]).permute(2, 0, 1))

    @torch.no_grad()
    def init_table(self, table: Float[Tensor, "1 N D"], grid: tuple[int, int]) -> None:
        """Interpolate a table of positions on a patch grid, as in pretrained weights.

        Args:
            table: ``(1, N, D)`` raster order, without rows of prefix tokens.
            grid: ``(h, w)`` of the table.
        """
        plane = table.mT.reshape(1, -1, *grid).to(self.field)  # (1, N, D) -> (1, D, h, w)
        rows, columns = (
            # a table's entries lie at the centres of its cells
            interpolation_weights(self._nodes(length), cells, "bicubic", align_corners=False)
            for length, cells in zip(self.grid, grid, strict=True)
        )
        self.field.copy_(torch.einsum("yh,bdhw,xw->bdyx", rows, plane, columns))

    @torch.no_grad()
    def set_rms(self, rms: float) -> None:
        """Scale the field to the root mean square ``rms``."""
        self.field.mul_(rms / self.field.square().mean().sqrt())

    def _nodes(self, length: int) -> Float[Tensor, " n"]:
        """Coordinates of the nodes of a row, in fractions of the image."""
        number = torch.arange(length, device=self.field.device, dtype=torch.float32)
        return number / (length - 1) if self.align_corners else (number + 0.5) / length
