"""Positions of an encoder's tokens at any grid: from timm's table, or from a continuous field.

Letters: B images, N = h*w patches, R prefix tokens (class token first, then registers), D embed_dim.
"""

import torch
from jaxtyping import Float
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smalti.functional.positions import Resampling, resample_positions
from smalti.layers.position_field import PositionField

Positions = tuple[Float[Tensor, "#B N D"], Float[Tensor, "1 R D"] | None]
"""What is added to the patch tokens, and to the prefix tokens (None: nothing)."""


def table_positions(vit: VisionTransformer | Eva, grid: tuple[int, int], resampling: Resampling) -> Positions | None:
    """Positions from timm's table, resampled to a grid; None for a model without positions."""
    if vit.pos_embed is None:
        return None
    num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    table = resample_positions(vit.pos_embed, vit.patch_embed.grid_size, grid, num_prefix, resampling)
    return table[:, num_prefix:], table[:, :num_prefix] if num_prefix else None


def field_positions(
    field: PositionField, grid: tuple[int, int], num_prefix_tokens: int, boxes: Float[Tensor, "B 4"] | None = None
) -> Positions:
    """Positions from a field, evaluated at a grid over the whole image or over boxes.

    Args:
        field: the position field; only a class token has a position of its own in it.
        grid: ``(h, w)``.
        num_prefix_tokens: R.
        boxes: ``(B, 4)`` x0 y0 x1 y1 of crops as fractions of the image; None: the whole image.
    """
    patches = field.whole(grid) if boxes is None else field(boxes, grid)
    if field.class_position is None:
        return patches, None
    registers = field.class_position.new_zeros(1, num_prefix_tokens - 1, patches.shape[-1])
    return patches, torch.cat([field.class_position, registers], dim=1)


@torch.no_grad()
def field_table(
    vit: VisionTransformer | Eva, field: PositionField, grid: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """A field as timm's ``pos_embed`` at a grid, and the class token that belongs to it."""
    patches, prefix = field_positions(field, grid, vit.num_prefix_tokens)
    token = None if vit.cls_token is None else vit.cls_token.detach().clone()
    if prefix is None:
        return patches, token
    if not vit.no_embed_class:
        return torch.cat([prefix, patches], dim=1), token
    assert token is not None, "only a class token has a position"
    return patches, token + prefix[:, :1]  # timm's table has no row for it
