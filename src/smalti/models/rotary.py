"""Rotary positions of timm's ``Eva`` models, for the patches of any sequence.

Letters: B sequences, H heads, d channels per head, h w the patch grid, N = h*w patches, L of them in the sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import RotaryEmbeddingDinoV3
from timm.models.eva import Eva
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.layers.gaussian_bias import Places


@dataclass(frozen=True)
class Rotation:
    """Sines and cosines by which queries and keys of the patches are rotated; prefix tokens never are."""

    table: Tensor
    """``(N, 2 d)`` for all blocks and heads, ``(B, N, 2 d)`` for each sample, or ``(depth, H, N, 2 d)``; float32."""
    ids_keep: Tensor | None
    """``(B, L)`` raster indices of the patches in the sequence; None: all."""

    def of_block(self, number: int) -> Float[Tensor, "*#B L e"]:
        """What a block of timm's takes as ``rope``, with e = 2 d.

        Args:
            number: of the block, from 0; only its part of the table is gathered.

        Returns:
            ``(N, e)`` or ``(H, N, e)`` for a whole grid, ``(B, 1, L, e)`` or ``(B, H, L, e)`` for kept patches and for
            positions of each sample.
        """
        if self.table.ndim == 3:
            if self.ids_keep is None:
                return self.table[:, None]
            ids = self.ids_keep[..., None].expand(-1, -1, self.table.shape[-1])
            return self.table.gather(1, ids)[:, None]
        table = self.table[number] if self.table.ndim == 4 else self.table
        if self.ids_keep is None:
            return table
        if table.ndim == 2:
            return table[self.ids_keep][:, None]
        return table[:, self.ids_keep].transpose(0, 1)


def is_rotary(vit: nn.Module) -> bool:
    """Whether a timm model rotates queries and keys by their positions."""
    return isinstance(vit, Eva) and vit.rope is not None


def reads_boxes(vit: nn.Module) -> bool:
    """Whether rotary positions can be read at the places of crops: those of DINOv3, whose coordinates are fractions of
    the image."""
    rope: Any = getattr(vit, "rope", None) if isinstance(vit, Eva) else None
    return type(rope) is RotaryEmbeddingDinoV3 and (rope.normalize_coords, rope.grid_indexing, rope.grid_offset) == (
        "separate",
        "ij",
        0.0,
    )


def _at_boxes(rope: Any, grid: tuple[int, int], boxes: Float[Tensor, "B 4"]) -> Float[Tensor, "B N e"]:
    """Sines and cosines of crops: coordinates run from -1 to 1 over the larger image.

    Args:
        rope: DINOv3's.
        grid: ``(h, w)`` of each crop.
        boxes: x0 y0 x1 y1 as fractions of the larger image; x0 above x1 for a mirrored crop.
    """
    with torch.autocast(boxes.device.type, enabled=False):
        axes = []
        for count, (low, high) in zip(grid, ((1, 3), (0, 2)), strict=True):
            centres = (torch.arange(count, device=boxes.device) + 0.5) / count
            start, end = boxes[:, low, None].float(), boxes[:, high, None].float()
            axes.append(2 * (start + (end - start) * centres) - 1)  # (B, h), then (B, w)
        rows, columns = axes[0][:, :, None].expand(-1, *grid), axes[1][:, None].expand(-1, *grid)
        coordinates = torch.stack([rows, columns], dim=-1).flatten(0, 2)  # (B, h, w, 2) -> (B h w, 2)
        table = torch.cat(rope._get_pos_embed_from_coords(coordinates), dim=-1)
    return table.reshape(len(boxes), -1, table.shape[-1])


def rotation(vit: nn.Module, places: Places | None) -> Rotation | None:
    """The rotation of a sequence.

    Args:
        vit: a timm model; augmentations of coordinates, if it has any, are drawn in training mode.
        places: where the patches are; None: nowhere, and nothing is rotated.

    Returns:
        None for a model without rotary positions, or without places.

    Raises:
        ConfigError: for places with boxes, and rotary positions other than DINOv3's.
    """
    if places is None or not is_rotary(vit):
        return None
    model: Any = vit
    if places.boxes is not None:
        if not reads_boxes(vit):
            raise ConfigError(f"{type(model.rope).__name__} reads no positions at boxes; only DINOv3's does")
        return Rotation(_at_boxes(model.rope, places.grid, places.boxes), places.ids_keep)
    return Rotation(model.rope.get_embed(shape=places.grid), places.ids_keep)
