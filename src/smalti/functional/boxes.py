"""Boxes: x0 y0 x1 y1, x to the right, y down."""

import torch
from jaxtyping import Bool, Float, Int
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


def place_in_field(
    boxes: Float[Tensor, "V B 4"],
    num_anchors: int,
    area: Float[Tensor, " B"],
    shift: Float[Tensor, "B 2"],
    anchor: str = "crops",
) -> Float[Tensor, "V B 4"]:
    """Scale and shift all views of an image together, as if it were part of a larger one that a field spans.

    A is the smallest rectangle around the anchors; it gets the area that is asked for, or as much of it as leaves all
    views inside, and is put somewhere where they are.

    Args:
        boxes: ``(V, B, 4)`` in shares of the image, as :func:`normalize_boxes` gives them, anchors first.
        num_anchors: views that A is drawn around: the global ones.
        area: s, of A afterwards, as a share of the field, above 0.
        shift: where between its leftmost and rightmost (topmost and lowest) place, each in 0..1.
        anchor: ``crops``, or ``image``: A is the whole image, whatever its crops.

    Returns:
        ``(V, B, 4)`` in shares of the field, inside 0..1.

    Source: Liu et al., "Intertwined content and positional features", ICML 2025: A, ``sqrt(s / |A|)`` and a uniform
    shift. That local views must fit as well, and the scale be cut where they don't, is ours.
    """
    low, high = (edge(boxes[:num_anchors], dim=0) for edge in (torch.amin, torch.amax))
    size = high[:, 2:] - low[:, :2]
    covered = size.prod(1) if anchor == "crops" else torch.ones_like(area)
    first, last = boxes[..., :2].amin(0), boxes[..., 2:].amax(0)  # (B, 2): Q, around all views
    scale = torch.minimum((area / covered).sqrt(), (1 / (last - first)).amin(1))[:, None]
    lowest, highest = -scale * first, 1 - scale * last
    offset = lowest + (highest - lowest) * shift
    return (boxes * scale.repeat(1, 4) + offset.repeat(1, 2)).clamp(0, 1)  # rounding alone leads out


def overlaps(boxes: Float[Tensor, "V B 4"], num_anchors: int) -> Float[Tensor, "G V B 4"]:
    """Intersection of each of the first G views with every view, in pixels of the source image.

    Boxes that don't meet come out empty or turned inside out; whoever draws views must see that they meet.
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
        boxes: in pixels of the source image.
        view: the view's own box there; leading axes broadcast.
        height: of the view, in the unit wanted (pixels, tokens).
        width: likewise.
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
    """For each patch of a view, the patch of a reference view that shows the same place: the one its centre lies in.

    Args:
        boxes: of the views, in pixels of the source image.
        flips: True where a view is mirrored left to right.
        reference: boxes of the reference views, not mirrored; leading axes broadcast.
        grid: ``(h, w)`` patches of a view, N = h * w.
        reference_grid: likewise of the reference views.

    Returns:
        ``(..., N)`` raster numbers in the reference grid, -1 where the reference doesn't show the centre.

    Source: Caron et al., LOCA, arXiv:2212.02400, whose code enlarges, cuts and twice shrinks a map of numbers instead:
    equal but for centres within half a source pixel and half a pixel of the view of an edge.
    """
    boxes, reference = boxes.double(), reference.double()  # a centre near an edge must not change sides by rounding
    indices = []
    for axis, length in ((1, grid[0]), (0, grid[1])):  # rows, columns
        low, high = boxes[..., axis, None], boxes[..., axis + 2, None]
        share = (torch.arange(length, device=boxes.device, dtype=torch.float64) + 0.5) / length
        if axis == 0:
            share = torch.where(flips[..., None], 1 - share, share)
        start, end = reference[..., axis, None], reference[..., axis + 2, None]
        indices.append(((low + share * (high - low) - start) / (end - start) * reference_grid[1 - axis]).floor())
    rows, columns = indices[0][..., :, None], indices[1][..., None, :]
    is_shown = (rows >= 0) & (rows < reference_grid[0]) & (columns >= 0) & (columns < reference_grid[1])
    return torch.where(is_shown, rows * reference_grid[1] + columns, -1.0).long().flatten(-2)


def roi_weights(low: Float[Tensor, "*B"], high: Float[Tensor, "*B"], length: int, out: int) -> Float[Tensor, "*B P H"]:
    """RoI-Align along one axis as a matrix: how much each of H tokens counts for each of P bins between two edges.

    Args:
        low: edges in tokens, 0..H.
        high: likewise, at or above ``low``.
        length: H.
        out: P.

    Returns:
        ``(..., P, H)``; rows sum to 1 for edges inside.

    Source: He et al., Mask R-CNN, arXiv:1703.06870v3, Sec. 3, with the half-pixel shift (``aligned``) and
    ``ceil(extent / P)`` samples a bin, as torchvision's ``roi_align`` with ``sampling_ratio=-1``.
    """
    low, high = (edge[..., None, None] - 0.5 for edge in (low, high))
    bin_size = (high - low) / out
    most = max(1, -(-length // out))  # edges inside have no more; rounding may say otherwise
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
    """The parts of each map that some boxes show, on a grid of ``out`` x ``out`` cells.

    Args:
        maps: ``(B, h, w, E)``.
        boxes: ``(A, B, 4)`` x0 y0 x1 y1 in tokens of the map, A for each; no gradient flows to them.
        out: P.

    Returns:
        ``(A, B, P, P, E)``, rows first: two small products a map, equal to torchvision's ``roi_align``.
    """
    height, width = maps.shape[1:3]
    across = roi_weights(boxes[..., 0], boxes[..., 2], width, out)
    down = roi_weights(boxes[..., 1], boxes[..., 3], height, out)
    narrow = torch.einsum("abpw,bhwe->abhpe", across, maps)
    return torch.einsum("abqh,abhpe->abqpe", down, narrow)
