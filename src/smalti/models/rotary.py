"""Rotary positions of timm's ``Eva`` models, for the patches of any sequence.

Letters: B sequences, H heads, d channels per head, h w the patch grid, N = h*w patches, L of them in the sequence.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from timm.models.eva import Eva
from torch import Tensor, nn

from smalti.layers.gaussian_bias import Places


@dataclass(frozen=True)
class Rotation:
    """Sines and cosines by which queries and keys of the patches are rotated; prefix tokens never are."""

    table: Tensor
    """``(N, 2 d)`` for all blocks and heads, or ``(depth, H, N, 2 d)``; float32."""
    ids_keep: Tensor | None
    """``(B, L)`` raster indices of the patches in the sequence; None: all."""

    def of_block(self, number: int) -> Float[Tensor, "*#B L e"]:
        """What a block of timm's takes as ``rope``, with e = 2 d.

        Args:
            number: of the block, from 0; only its part of the table is gathered.

        Returns:
            ``(N, e)`` or ``(H, N, e)`` for a whole grid, ``(B, 1, L, e)`` or ``(B, H, L, e)`` for kept patches.
        """
        table = self.table[number] if self.table.ndim == 4 else self.table
        if self.ids_keep is None:
            return table
        if table.ndim == 2:
            return table[self.ids_keep][:, None]
        return table[:, self.ids_keep].transpose(0, 1)


def is_rotary(vit: nn.Module) -> bool:
    """Whether a timm model rotates queries and keys by their positions."""
    return isinstance(vit, Eva) and vit.rope is not None


def rotation(vit: nn.Module, places: Places | None) -> Rotation | None:
    """The rotation of a sequence.

    Args:
        vit: a timm model; augmentations of coordinates, if it has any, are drawn in training mode.
        places: where the patches are; None: nowhere, and nothing is rotated.

    Returns:
        None for a model without rotary positions, or without places.
    """
    if places is None or not is_rotary(vit):
        return None
    model: Any = vit
    return Rotation(model.rope.get_embed(shape=places.grid), places.ids_keep)
