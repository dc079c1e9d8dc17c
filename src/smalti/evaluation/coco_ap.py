"""COCO's average precision of boxes and masks, computed by faster-coco-eval.

Source: Lin et al., COCO, arXiv:1405.0312, and the evaluation on its site: 101 points of recall, 10 overlaps from 0.5 to
0.95, at most 100 detections per image, objects of up to 32^2, up to 96^2 and more pixels; detections in a crowd count
neither as correct nor as wrong.
Letters: n detections in an image, K classes, H x W an image in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from smalti.data.images.coco import CocoImage, CocoObject
from smalti.errors import DataError, MissingExtraError

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
UNIT = "average precision, higher is better"
MOST = 100
"""Maximum number of detections per image."""
_IOU50 = 0  # index of IoU 0.5 among the thresholds


@dataclass(frozen=True)
class Detections:
    """Predictions for one image, any number in any order."""

    boxes: np.ndarray
    """``(n, 4)`` x0 y0 x1 y1 in pixels of the image."""
    labels: np.ndarray
    """``(n,)`` int, 0..K-1."""
    scores: np.ndarray
    """``(n,)``."""
    outlines: tuple[dict[str, Any], ...] | None = None
    """Run-length encoded masks, from :func:`encode_masks`; None for boxes only."""


def need_extra() -> Any:
    """Import faster-coco-eval.

    Raises:
        MissingExtraError: if it isn't installed.
    """
    try:
        import faster_coco_eval
        import faster_coco_eval.core.mask
    except ImportError:
        raise MissingExtraError('detection needs faster-coco-eval: pip install "smalti[detection]"') from None
    return faster_coco_eval


def average_precision(
    truth: Sequence[CocoImage], found: Sequence[Detections], num_classes: int, kind: Literal["bbox", "segm"]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """AP of one kind over a set of images.

    Args:
        truth: true objects of each image, including crowds.
        found: detections of each image, in the same order.
        num_classes: K.
        kind: ``bbox`` compares boxes; ``segm`` compares masks, which all objects and detections must have.

    Returns:
        Values of :data:`NAMES`, NaN if there is no object of that size; and ``ap`` and ``ap50`` of each class,
        ``(K,)``, NaN for classes without objects.
    """
    library = need_extra()
    images = [{"id": n, "height": image.height, "width": image.width} for n, image in enumerate(truth)]
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, (image, detections) in enumerate(zip(truth, found, strict=True)):
        for item in image.objects:
            x0, y0, x1, y1 = item.box
            entry = {
                "id": len(annotations) + 1,  # 0 means "no match"
                "image_id": number,
                "category_id": item.label,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": item.area,
                "iscrowd": int(item.is_crowd),
            }
            if kind == "segm":
                entry["segmentation"] = run_lengths(item, image.height, image.width)
            annotations.append(entry)
        for i, (x0, y0, x1, y1) in enumerate(detections.boxes.tolist()):
            entry = {
                "image_id": number,
                "category_id": int(detections.labels[i]),
                "score": float(detections.scores[i]),
            }
            if kind == "segm":
                assert detections.outlines is not None
                entry["segmentation"] = detections.outlines[i]
            else:
                entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            results.append(entry)
    categories = [{"id": label, "name": str(label)} for label in range(num_classes)]
    table = library.COCO({"info": {}, "images": images, "annotations": annotations, "categories": categories})
    evaluator = library.COCOeval_faster(table, table.loadRes(results), kind)
    evaluator.run()
    stats = [float(value) for value in evaluator.stats[: len(NAMES)]]
    metrics = {name: value if value >= 0 else math.nan for name, value in zip(NAMES, stats, strict=True)}
    precision = np.asarray(evaluator.eval["precision"])[:, :, :, 0, -1]  # (10, 101, K)
    return metrics, {"ap": _known_mean(precision), "ap50": _known_mean(precision[_IOU50 : _IOU50 + 1])}


def _known_mean(precision: np.ndarray) -> np.ndarray:
    """``(T, R, K)`` -> ``(K,)``; -1 marks a class without objects."""
    mean = precision.mean((0, 1))
    return np.where(mean < 0, np.nan, mean)


def encode_masks(masks: np.ndarray) -> tuple[dict[str, Any], ...]:
    """``(n, H, W)`` bool -> run-length encoded masks."""
    codes = need_extra().core.mask
    return tuple(codes.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks)


def run_lengths(item: CocoObject, height: int, width: int) -> dict[str, Any]:
    """The run-length encoded mask of an object, from polygons or run lengths.

    Raises:
        DataError: if the outline can't be used.
    """
    codes = need_extra().core.mask
    outline = item.outline
    try:
        if isinstance(outline, list):
            return codes.merge(codes.frPyObjects(outline, height, width))
        if list(outline["size"]) != [height, width]:
            raise ValueError(f"its size is {outline['size']}, that of the image {[height, width]}")
        return codes.frPyObjects(outline, height, width) if isinstance(outline["counts"], list) else dict(outline)
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise DataError(f"the outline of the object at {_spell(item)} can't be used ({error})") from None


def outline_mask(item: CocoObject, height: int, width: int) -> np.ndarray:
    """``(H, W)`` uint8, 1 inside the object's outline.

    Raises:
        DataError: if the outline can't be used.
    """
    codes = run_lengths(item, height, width)
    try:
        return np.asarray(need_extra().core.mask.decode(codes))
    except ValueError as error:  # run lengths that don't fill the image
        raise DataError(f"the outline of the object at {_spell(item)} can't be used ({error})") from None


def has_outline(item: CocoObject) -> bool:
    """Whether there is a valid outline: polygons of at least three corners, or run lengths."""
    outline = item.outline
    if isinstance(outline, dict):
        return bool(outline.get("counts")) and "size" in outline
    return (
        isinstance(outline, list)
        and bool(outline)
        and all(isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in outline)
    )


def is_only_box(item: CocoObject) -> bool:
    """Whether the outline is just the rectangle of the box."""
    outline = item.outline
    if not isinstance(outline, list) or len(outline) != 1 or len(outline[0]) not in (8, 10):
        return False
    xs, ys = np.array(outline[0][0::2], np.float64), np.array(outline[0][1::2], np.float64)
    x0, y0, x1, y1 = item.box
    on_x = np.minimum(abs(xs - x0), abs(xs - x1)) <= 1
    on_y = np.minimum(abs(ys - y0), abs(ys - y1)) <= 1
    return bool((on_x & on_y).all())


def _spell(item: CocoObject) -> str:
    x0, y0, x1, y1 = item.box
    return f"x {x0:g}..{x1:g}, y {y0:g}..{y1:g}"
