"""COCO's AP on cases whose answer is known, and against pycocotools."""

import contextlib
import io
import math

import numpy as np
import pycocotools.mask
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from smalti.data.images.coco import CocoImage, CocoObject
from smalti.errors import DataError
from smalti.evaluation.coco_ap import (
    NAMES,
    Detections,
    average_precision,
    encode_masks,
    has_outline,
    is_only_box,
    outline_mask,
)


def thing(x0, y0, x1, y1, label=0, is_crowd=False):
    outline = [[x0, y0, x1, y0, x1, y1, x0, y1]]
    return CocoObject(
        (float(x0), float(y0), float(x1), float(y1)), label, is_crowd, float((x1 - x0) * (y1 - y0)), outline
    )


def image(number, *objects, side=120):
    return CocoImage(number, side, side, tuple(objects))


def found(*rows, masks=False, side=120):
    """Rows of x0 y0 x1 y1 label score."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    outlines = None
    if masks:
        drawn = np.zeros((len(table), side, side), bool)
        for mask, (x0, y0, x1, y1) in zip(drawn, table[:, :4].astype(int), strict=True):
            mask[y0:y1, x0:x1] = True
        outlines = encode_masks(drawn)
    return Detections(table[:, :4], table[:, 4].astype(np.int64), table[:, 5], outlines)


# Images in no order, one without objects, and one with objects of two sizes.
TRUTH = (image(9, thing(10, 10, 30, 30), thing(40, 40, 100, 100, 1)), image(4), image(7, thing(5, 5, 25, 65, 1)))
PERFECT = (found((10, 10, 30, 30, 0, 0.9), (40, 40, 100, 100, 1, 0.8)), found(), found((5, 5, 25, 65, 1, 0.7)))


def test_everything_found_is_one_and_sizes_that_are_not_there_have_no_score():
    metrics, of_class = average_precision(TRUTH, PERFECT, 3, "bbox")
    assert tuple(metrics) == NAMES
    assert [metrics[name] for name in NAMES[:5]] == pytest.approx([1.0] * 5)
    assert math.isnan(metrics["ap_large"])
    assert of_class["ap"][:2] == pytest.approx([1, 1]) and math.isnan(of_class["ap"][2])


def test_nothing_found_and_swapped_classes_are_zero():
    for guesses in ([found()] * 3, [Detections(d.boxes, 1 - d.labels, d.scores) for d in PERFECT]):
        metrics, of_class = average_precision(TRUTH, guesses, 2, "bbox")
        assert metrics["ap"] == metrics["ap50"] == 0
        assert of_class["ap50"].tolist() == [0, 0]


def test_half_an_object_counts_at_the_overlaps_that_it_reaches():
    # 14 of 20 columns: an overlap of 0.7, enough for 0.5 to 0.7, which are 5 of 10
    metrics, _ = average_precision([image(1, thing(10, 10, 30, 30))], [found((10, 10, 24, 30, 0, 0.9))], 1, "bbox")
    assert metrics["ap50"] == pytest.approx(1) and metrics["ap75"] == 0
    assert metrics["ap"] == pytest.approx(0.5)


def test_a_false_alarm_costs_only_where_it_comes_first():
    truth = [image(1, thing(10, 10, 30, 30))]
    after = found((10, 10, 30, 30, 0, 0.9), (60, 60, 80, 80, 0, 0.5))
    before = found((10, 10, 30, 30, 0, 0.5), (60, 60, 80, 80, 0, 0.9))
    assert average_precision(truth, [after], 1, "bbox")[0]["ap"] == pytest.approx(1)
    assert average_precision(truth, [before], 1, "bbox")[0]["ap"] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_what_lies_in_a_crowd_counts_neither_way(kind):
    truth = [image(1, thing(0, 0, 20, 20), thing(50, 50, 110, 110, is_crowd=True))]
    rows = [(0, 0, 20, 20, 0, 0.5), (55, 55, 70, 70, 0, 0.9), (80, 80, 95, 95, 0, 0.8)]
    metrics, _ = average_precision(truth, [found(*rows, masks=True)], 1, kind)
    assert metrics["ap"] == pytest.approx(1)
    plain = [image(1, thing(0, 0, 20, 20))]
    assert average_precision(plain, [found(*rows, masks=True)], 1, kind)[0]["ap"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_random_scenes_score_as_pycocotools_says(kind, seed):
    rng = np.random.default_rng(seed)
    truth, guesses = [], []
    for number in rng.permutation(8):
        objects, rows = [], []
        for _ in range(int(rng.integers(0, 6))):
            x0, y0, width, height = (int(value) for value in rng.integers((0, 0, 5, 5), (60, 60, 60, 60)))
            label = int(rng.integers(3))
            objects.append(thing(x0, y0, x0 + width, y0 + height, label, bool(rng.random() < 0.2)))
            if rng.random() < 0.8:
                left, top = rng.integers(0, 4, 2)
                label = label if rng.random() < 0.8 else (label + 1) % 3
                rows.append((x0 + left, y0 + top, x0 + width, y0 + height, label, rng.random()))
        rows += [(1, 1, 9 + int(rng.integers(9)), 9, int(rng.integers(3)), rng.random())]
        truth.append(image(int(number), *objects))
        guesses.append(found(*rows, masks=True))
    ours, of_class = average_precision(truth, guesses, 3, kind)
    theirs = pycocotools_stats(truth, guesses, 3, kind)
    expected = [value if value >= 0 else math.nan for value in theirs.stats[:6]]
    assert list(ours.values()) == pytest.approx(expected, abs=1e-9, nan_ok=True)
    for label in range(3):
        of_one = theirs.eval["precision"][:, :, label, 0, -1]
        expected = of_one.mean() if of_one.max() > -1 else math.nan
        assert of_class["ap"][label] == pytest.approx(expected, abs=1e-9, nan_ok=True)


def pycocotools_stats(truth, guesses, num_classes, kind):
    annotations, results = [], []
    for number, (one, detections) in enumerate(zip(truth, guesses, strict=True), 1):
        for item in one.objects:
            x0, y0, x1, y1 = item.box
            codes = pycocotools.mask.frPyObjects(item.outline, one.height, one.width)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": item.label + 1, "area": item.area}
                | {"bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": int(item.is_crowd)}
                | {"segmentation": pycocotools.mask.merge(codes)}
            )
        for i, (x0, y0, x1, y1) in enumerate(detections.boxes.tolist()):
            shape = {"bbox": [x0, y0, x1 - x0, y1 - y0]} if kind == "bbox" else {"segmentation": detections.outlines[i]}
            row = {"image_id": number, "category_id": int(detections.labels[i]) + 1}
            results.append({**row, "score": float(detections.scores[i]), **shape})
    table = COCO()
    table.dataset = {
        "info": {},
        "images": [{"id": n + 1, "height": 120, "width": 120} for n in range(len(truth))],
        "annotations": annotations,
        "categories": [{"id": n + 1, "name": str(n)} for n in range(num_classes)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        table.createIndex()
        judge = COCOeval(table, table.loadRes(results), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


def test_outlines_become_masks_from_polygons_and_from_runs():
    box = np.zeros((10, 12), np.uint8)
    box[2:5, 3:9] = 1
    polygons = CocoObject((3, 2, 9, 5), 0, False, 18, [[3, 2, 6, 2, 6, 5, 3, 5], [6, 2, 9, 2, 9, 5, 6, 5]])
    runs = np.diff(np.flatnonzero(np.diff(np.r_[-1, box.T.ravel().astype(int), -1]))).tolist()  # down the columns
    counts = CocoObject((3, 2, 9, 5), 0, True, 18, {"size": [10, 12], "counts": runs})
    text = CocoObject((3, 2, 9, 5), 0, True, 18, pycocotools.mask.encode(np.asfortranarray(box)))
    for item in (polygons, counts, text):
        assert has_outline(item)
        assert np.array_equal(outline_mask(item, 10, 12), box)
    with pytest.raises(
        DataError, match=r"object at x 3..9, y 2..5 can't be used \(its size is \[10, 12\], that of the image"
    ):
        outline_mask(counts, 12, 10)


def test_what_is_an_outline_and_what_only_the_box():
    rectangle, none = thing(3, 4, 9, 9), CocoObject((3, 4, 9, 9), 0, False, 30, None)
    triangle = CocoObject((3, 4, 9, 9), 0, False, 30, [[3, 4, 9, 4, 6, 9]])
    diamond = CocoObject((0, 0, 10, 10), 0, False, 50, [[5, 0, 10, 5, 5, 10, 0, 5]])
    assert [has_outline(item) for item in (rectangle, none, triangle, diamond)] == [True, False, True, True]
    assert [is_only_box(item) for item in (rectangle, none, triangle, diamond)] == [True, False, False, False]
    for outline in ([], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], {"size": [1, 1]}, "text"):
        assert not has_outline(CocoObject((3, 4, 9, 9), 0, False, 30, outline))
