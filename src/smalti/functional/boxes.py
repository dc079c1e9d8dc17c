"""Boxes: x0 y0 x1 y1, x to the right, y down."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def normalize_boxes(boxes: Float[Tensor, "VB 4"], source_size: Int[Tensor, "B 2"]) -> Float[Tensor, "VB 4"]:
    """Boxes in fractions of their image: x divided by its width, y by its height, so all lie in 0..1.

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


def place_in_field(
    boxes: Float[Tensor, "V B 4"],
    num_anchors: int,
    area: Float[Tensor, " B"],
    shift: Float[Tensor, "B 2"],
    anchor: str = "crops",
) -> Float[Tensor, "V B 4"]:
    """Scale and shift all views of an image together, as if it were part of a larger image that the field spans.

    A is the smallest rectangle around the anchors; it gets the requested area, or the largest for which all views are
    inside the field, and is shifted so that they are.

    Args:
        boxes: ``(V, B, 4)`` in fractions of the image, from :func:`normalize_boxes`, anchors first.
        num_anchors: number of views that A encloses: the global ones.
        area: s, the area of A after scaling as a fraction of the field, above 0.
        shift: position between the leftmost and rightmost (topmost and lowest) possible one, each in 0..1.
        anchor: ``crops``, or ``image``: A is the whole image, independent of its crops.

    Returns:
        ``(V, B, 4)`` in fractions of the field, inside 0..1.

    Source: Liu et al., "Intertwined content and positional features", ICML 2025: A, ``sqrt(s / |A|)`` and a uniform
    shift. That local views must also fit, and the limit on the scale, are ours.
    """
    low, high = (edge(boxes[:num_anchors], dim=0) for edge in (torch.amin, torch.amax))
    size = high[:, 2:] - low[:, :2]
    covered = size.prod(1) if anchor == "crops" else torch.ones_like(area)
    first, last = boxes[..., :2].amin(0), boxes[..., 2:].amax(0)  # (B, 2): Q encloses all views
    scale = torch.minimum((area / covered).sqrt(), (1 / (last - first)).amin(1))[:, None]
    lowest, highest = -scale * first, 1 - scale * last
    offset = lowest + (highest - lowest) * shift
    return (boxes * scale.repeat(1, 4) + offset.repeat(1, 2)).clamp(0, 1)  # only rounding errors exceed this range


def overlaps(boxes: Float[Tensor, "V B 4"], num_anchors: int) -> Float[Tensor, "G V B 4"]:
    """Intersection of each of the first G views with every view, in pixels of the source image.

    Boxes that don't overlap give empty or inverted boxes; callers must draw views that overlap.
    """
    anchors = boxes[:num_anchors, None]
    return torch.cat(
        [torch.maximum(anchors[..., :2], boxes[None, ..., :2]), torch.minimum(anchors[..., 2:], boxes[None, ..., 2:])],
        dim=-1,
    )


def in_view(
    boxes: Float[Tensor, "*S 4"], view: Float[Tensor, "*#S 4"], height: float, width: float
) -> Float[Tensor, "*S 4"]:
    """Boxes in the coordinates of a view that shows part of the image.

    Args:
        boxes: boxes in pixels of the source image.
        view: box of the view in the source image; leading axes broadcast.
        height: height of the view, in the desired unit (pixels, tokens).
        width: width of the view, in that unit.
    """
    x = (boxes[..., 0::2] - view[..., 0:1]) / (view[..., 2:3] - view[..., 0:1]) * width
    y = (boxes[..., 1::2] - view[..., 1:2]) / (view[..., 3:4] - view[..., 1:2]) * height
    return torch.stack([x, y], dim=-1).flatten(-2)  # (..., [x0 x1]), (..., [y0 y1]) -> (..., [x0 y0 x1 y1])


def reference_cells(
    boxes: Float[Tensor, "*S 4"],
    flips: Bool[Tensor, "*S"],
    reference: Float[Tensor, "*#S 4"],
    grid: tuple[int, int],
    reference_grid: tuple[int, int],
) -> Int[Tensor, "*S N"]:
    """For each patch of a view, the patch of a reference view that contains its centre.

    Args:
        boxes: boxes of the views, in pixels of the source image.
        flips: True if a view is mirrored horizontally.
        reference: boxes of the reference views, not mirrored; leading axes broadcast.
        grid: ``(h, w)`` patches of a view, N = h * w.
        reference_grid: patch grid of the reference views.

    Returns:
        ``(..., N)`` raster indices in the reference grid, -1 if the centre is outside the reference.

    Source: Caron et al., LOCA, arXiv:2212.02400, whose code resizes and crops a map of indices instead; results differ
    only for centres within half a source pixel and half a view pixel of an edge.
    """
    boxes, reference = boxes.double(), reference.double()  # rounding must not move a centre across an edge
    indices = []
    for axis, length in ((1, grid[0]), (0, grid[1])):  # rows, columns
        low, high = boxes[..., axis, None], boxes[..., axis + 2, None]
        fraction = (torch.arange(length, device=boxes.device, dtype=torch.float64) + 0.5) / length
        if axis == 0:
            fraction = torch.where(flips[..., None], 1 - fraction, fraction)
        start, end = reference[..., axis, None], reference[..., axis + 2, None]
        indices.append(((low + fraction * (high - low) - start) / (end - start) * reference_grid[1 - axis]).floor())
    rows, columns = indices[0][..., :, None], indices[1][..., None, :]
    is_shown = (rows >= 0) & (rows < reference_grid[0]) & (columns >= 0) & (columns < reference_grid[1])
    return torch.where(is_shown, rows * reference_grid[1] + columns, -1.0).long().flatten(-2)


def roi_weights(low: Float[Tensor, "*B"], high: Float[Tensor, "*B"], length: int, out: int) -> Float[Tensor, "*B P H"]:
    """RoI-Align along one axis as a matrix: weights of H tokens for each of P bins between two edges.

    Args:
        low: lower edges in tokens, 0..H.
        high: upper edges, at least ``low``.
        length: H.
        out: P.

    Returns:
        ``(..., P, H)``; rows sum to 1 for edges in 0..H.

    Source: He et al., Mask R-CNN, arXiv:1703.06870v3, Sec. 3, with the half-pixel shift (``aligned``) and
    ``ceil(extent / P)`` samples per bin, as torchvision's ``roi_align`` with ``sampling_ratio=-1``.
    """
    low, high = (edge[..., None, None] - 0.5 for edge in (low, high))
    bin_size = (high - low) / out
    most = max(1, -(-length // out))  # maximum for edges in 0..H, except for rounding
    samples = bin_size.ceil().clamp(1, most)
    i = torch.arange(most, device=low.device)
    bins = torch.arange(out, device=low.device)[:, None]
    y = low + (bins + (i + 0.5) / samples) * bin_size  # (..., P, most)
    counts = (i < samples) & (y >= -1) & (y <= length)
    y = y.clamp(0, length - 1)
    tokens = torch.arange(length, device=low.device)
    near = (1 - (y[..., None] - tokens).abs()).clamp(min=0)  # bilinear: (..., P, most, H)
    return (near * counts[..., None]).sum(-2) / samples


def roi_align(maps: Float[Tensor, "B h w E"], boxes: Float[Tensor, "A B 4"], out: int) -> Float[Tensor, "A B P P E"]:
    """RoI-Align of each map within boxes, on a grid of ``out`` x ``out`` cells.

    Args:
        maps: ``(B, h, w, E)``.
        boxes: ``(A, B, 4)`` x0 y0 x1 y1 in tokens of the map, A per map; without gradient.
        out: P.

    Returns:
        ``(A, B, P, P, E)``, rows first; two small products per map, equal to torchvision's ``roi_align``.
    """
    height, width = maps.shape[1:3]
    across = roi_weights(boxes[..., 0], boxes[..., 2], width, out)
    down = roi_weights(boxes[..., 1], boxes[..., 3], height, out)
    narrow = torch.einsum("abpw,bhwe->abhpe", across, maps)
    return torch.einsum("abqh,abhpe->abqpe", down, narrow)
