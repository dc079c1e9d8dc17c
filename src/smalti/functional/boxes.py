"""Boxes: x0 y0 x1 y1, x to the right, y down."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def normalize_boxes(boxes: Float[Tensor, "VB 4"], source_size: Int[Tensor, "B 2"]) -> Float[Tensor, "VB 4"]:
    """Boxes in shares of their image: x divided by its width, y by its height, so all lie in 0..1.

    Args:
        boxes: ``(V * B, 4)`` in pixels of the source images, view-major.
        source_size: ``(B, 2)`` height and width of the source images.

    Returns:
        ``(V * B, 4)``, in the same order.

    Source: Liu et al., "Intertwined content and positional features", ICML 2025: the field is stretched over the image.
    """
    num_views = boxes.shape[0] // source_size.shape[0]
    size = source_size.flip(1).to(boxes.dtype)  # (B, 2): width, height
    return boxes / torch.cat([size, size], dim=1).repeat(num_views, 1)
