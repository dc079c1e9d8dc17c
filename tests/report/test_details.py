"""What stands behind the numbers: right pictures, for all arms, from whatever the details hold."""

import base64
import dataclasses

import cv2
import numpy as np
import pytest
import torch

from htmlpage import Page, check_page
from smalti.evaluation.details import read_details, write_details
from smalti.evaluation.result import Boxes, Details, Result
from smalti.evaluation.shown import Shown
from smalti.evaluation.tally import tally_mean
from smalti.functional.colours import palette
from smalti.report.details import Evaluated, class_bars, detail_sections
from smalti.report.figures import (
    ForestRow,
    boxes_picture,
    confusion_chart,
    forest_chart,
    line_chart,
    overlay,
    similarity_picture,
)
from smalti.report.html import verdict_box, whole_page

EVIL = "<script>alert(1)</script>"


def shown(seed: int, grid: tuple[int, int] = (4, 4), places: tuple[int, ...] = (0, 2)) -> Shown:
    rng = np.random.default_rng(seed)
    return Shown(
        places,
        tuple(1.5 for _ in places),
        {place: rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for place in places},
        {place: rng.integers(-1, 3, (224, 224)).astype(np.int32) for place in places},
        torch.from_numpy(rng.standard_normal((len(places), grid[0] * grid[1], 5)).astype(np.float16)),
        0.9,
        grid,
        64,
    )


def result(seed: int, classes=("sky", EVIL, "road"), keep=True, **shape) -> Result:
    rng = np.random.default_rng(seed)
    details = Details(
        images=("a.png", "b.png", "c <b>.png"),
        classes=classes,
        tallies={"miou": tally_mean(rng.random(3))},
        confusion=rng.integers(0, 50, (3, 3)),
        predictions={place: rng.integers(0, 3, (16, 16)).astype(np.int32) for place in (0, 2)},
        curves={"nmi": rng.random(6).tolist(), "loss": rng.random(80).tolist()},
        shown=shown(seed, **shape) if keep else None,
    )
    per_class = {"iou": {classes[0]: 0.9, classes[1]: 0.2 + 0.1 * seed, classes[2]: float("nan")}}
    return Result("linear-segmentation", "x", "d", {"miou": 0.5}, {}, {"seed": seed}, per_class, details)


@pytest.fixture
def judged() -> Evaluated:
    """Three arms of two seeds; patches of another size in the second, a hostile name for the third."""
    arms = {"one": [result(0), result(1)], "two": [result(2, grid=(2, 3))], EVIL: [result(3)]}
    return Evaluated("d", "linear-segmentation", arms)


def page_of(sections, tmp_path) -> Page:
    (tmp_path / "page.html").write_text(whole_page("x", "y", verdict_box("same", ["z"], None), sections))
    return check_page(tmp_path / "page.html")


def test_every_figure_is_there_for_every_arm(judged, tmp_path):
    page = page_of(detail_sections([judged]), tmp_path)
    alts = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
    for arm in judged.arms:
        for what in (
            "classes that {} predicts",
            "PCA map of a.png by {}",
            "similarity of the patches of a.png to one, by {}",
        ):
            assert any(what.format(arm) in alt for alt in alts), (arm, what)
    assert sum(alt.startswith("true classes") for alt in alts) == 2
    labels = page.attributes("aria-label")
    assert sum(label.startswith("Confusion of") for label in labels) == 3
    assert {
        "linear-segmentation on d: nmi against the layer",
        "linear-segmentation on d: loss against the step",
    } <= set(labels)
    assert "iou of each class (3)" in page.text and "by seed 0" in page.text


def test_hostile_names_stay_text(judged, tmp_path):
    page = page_of(detail_sections([judged]), tmp_path)
    assert page.text.count(EVIL) >= 3 and not any(tag == "script" for tag, _ in page.elements)
    assert any("c <b>.png" in alt for alt in page.attributes("alt"))


def test_without_kept_pictures_predictions_are_shown_alone_and_the_page_says_so(tmp_path):
    page = page_of(detail_sections([Evaluated("d", "p", {"a": [result(0, keep=False)]})]), tmp_path)
    assert "The images themselves were not kept" in page.text and "No patch tokens were kept" in page.text
    assert sum(tag == "img" for tag, _ in page.elements) == 2


def test_results_without_details_have_no_figures():
    bare = Result("knn", "x", "d", {"top1": 0.5}, {}, {})
    sections = detail_sections([Evaluated("d", "knn", {"a": [bare]})], tokens=False)
    assert all(content is None for _, content in sections.values())
    assert all(content is None for _, content in detail_sections([], tokens=True).values())


def test_only_images_that_all_arms_have_get_feature_maps(tmp_path):
    arms = {"a": [result(0)], "b": [result(1, places=(2,))]}
    page = page_of(detail_sections([Evaluated("d", "p", arms)]), tmp_path)
    maps = [alt for alt in page.attributes("alt") if alt.startswith("PCA map")]
    assert maps == ["PCA map of c <b>.png by a", "PCA map of c <b>.png by b"]


def test_bars_are_means_over_seeds_the_best_class_first_and_the_baseline_grey(judged):
    arms = {"one": judged.arms["one"], "untrained": judged.arms["two"]}
    bars = class_bars(Evaluated("d", "p", arms))
    assert bars.index(">sky<") < bars.index("&lt;script&gt;alert(1)&lt;/script&gt;<") < bars.index(">road<")
    assert "0.250" in bars  # of 0.2 and 0.3
    assert "background:var(--none)" in bars and "background:var(--c2)" not in bars


def test_an_overlay_shows_the_colours_of_its_classes_and_void_stays_grey():
    classes = np.array([[0, 1], [2, -1]])
    picture = overlay(np.full((40, 40, 3), 120, np.uint8), classes)
    for (row, column), value in np.ndenumerate(classes):
        colour = picture[row * 20 + 10, column * 20 + 10].astype(int)
        wanted = 0.3 * 120 + 0.7 * palette(3)[value].astype(float) if value >= 0 else np.full(3, 0.6 * 120 + 100)
        assert np.abs(colour - wanted).max() <= 1


def test_frames_lie_around_their_objects_in_the_colours_of_their_classes():
    boxes = np.array([[0.1, 0.2, 0.5, 0.6], [0.6, 0.6, 1.0, 1.0]])
    picture = boxes_picture(np.full((50, 100, 3), 120, np.uint8), boxes, np.array([0, 2]))
    assert picture.shape == (100, 200, 3)
    for (x0, y0, x1, y1), label in zip(boxes * np.array([199, 99, 199, 99]), (0, 2), strict=True):
        for row, column in ((y0, (x0 + x1) / 2), (y1, (x0 + x1) / 2), ((y0 + y1) / 2, x0), ((y0 + y1) / 2, x1)):
            assert picture[round(row), round(column)].tolist() == palette(4)[label + 1].tolist()
        assert len(set(picture[round((y0 + y1) / 2), round((x0 + x1) / 2)].tolist())) == 1
    empty = boxes_picture(np.zeros((8, 8, 3), np.uint8), np.zeros((0, 4)), np.zeros(0, np.int64))
    assert empty.shape == (16, 16, 3) and np.ptp(empty) == 0


def test_objects_found_stand_beside_the_true_ones_also_when_read_from_disk(tmp_path):
    true = Boxes(np.array([[0.1, 0.2, 0.5, 0.6]]), np.array([1]), np.ones(1))
    nothing = Boxes(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0))
    results = []
    for seed, found in ((0, true), (1, nothing)):
        plain = result(seed)
        details = dataclasses.replace(plain.details, predictions={}, found={0: (true, found), 2: (nothing, nothing)})
        results.append(dataclasses.replace(plain, protocol="detection", details=details))
    write_details(tmp_path / "details", results)
    again = read_details(tmp_path / "details", results)
    for old, new in zip(results, again, strict=True):
        assert old.details.found.keys() == new.details.found.keys()
        for pair, other in zip(old.details.found.values(), new.details.found.values(), strict=True):
            for one, two in zip(pair, other, strict=True):
                assert np.array_equal(one.boxes, two.boxes) and np.array_equal(one.labels, two.labels)
                assert np.array_equal(one.scores, two.scores)
    arms = {"ours": [again[0]], "untrained": [again[1]]}
    page = page_of({"predictions": detail_sections([Evaluated("d", "detection", arms)])["predictions"]}, tmp_path)
    alts = [alt for alt in page.attributes("alt") if alt.endswith("a.png")]
    assert sorted(alts) == ["ours: a.png", "truth: a.png", "untrained: a.png"]
    assert EVIL in page.text


def test_the_framed_patch_is_most_similar_to_itself():
    coordinates = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    picture = similarity_picture(np.zeros((160, 160, 3), np.uint8), coordinates, (4, 4), 5)
    centres = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[20::40, 20::40]
    assert centres.argmax() == 5 and picture[40, 60].tolist() == [255, 255, 255]


def test_a_confusion_matrix_says_the_share_of_each_row_and_leaves_empty_rows_empty():
    svg = confusion_chart("Confusion", np.array([[3, 1], [0, 0]]), ["a <b>", "c"])
    assert ">75<" in svg and ">25<" in svg and "nan" not in svg.lower()
    assert "a &lt;b&gt;" in svg and "data:image/png;base64" in svg


def test_sixty_classes_stay_legible():
    names = [f"class number {number}, a long name" for number in range(60)]
    svg = confusion_chart("Confusion", np.eye(60, dtype=np.int64), names)
    width = float(svg.split('viewBox="0 0 ')[1].split()[0])
    assert svg.count("…") == 120 and 7 * min(1.45, 1060 / width) >= 9  # text of 7 points on the page's 1060 pixels


def test_a_forest_fills_the_marks_of_differences_that_exclude_zero():
    rows = [
        ForestRow("first", 0.5, 0.4, 0.6, (0.45, 0.55)),
        ForestRow("better", 0.7, 0.6, 0.8, (), 0.2, 0.1, 0.3),
        ForestRow("same", 0.5, float("nan"), float("nan"), (), 0.01, -0.1, 0.1),
    ]
    svg = forest_chart("Forest", rows, "first")
    assert svg.count("var(--card)") >= 1 and "difference to first" in svg and "nan" not in svg.lower()
    assert forest_chart("Forest", rows[:2], "first").count("var(--card)") == 0


def test_more_lines_than_colours_are_dashed():
    svg = line_chart("x", {str(n): ([1.0, 2.0, 3.0], [n, n, n]) for n in range(7)})
    assert "stroke-dasharray" in svg
    assert "stroke-dasharray" not in line_chart("x", {str(n): ([1.0, 2.0, 3.0], [n, n, n]) for n in range(6)})


def test_a_baseline_is_grey_in_a_chart_and_layers_are_whole_numbers():
    svg = line_chart("x", {"a": ([1.0, 2.0], [0.0, 1.0]), "b": ([1.0, 2.0], [1.0, 0.0])}, muted="b")
    assert "var(--none)" in svg and "var(--c1)" in svg and "var(--c2)" not in svg
    assert "1.25" not in svg


def test_small_confusions_among_many_classes_are_seen():
    matrix = np.full((20, 20), 1) + 80 * np.eye(20, dtype=np.int64)
    data = confusion_chart("x", matrix, ["y"] * 20).split("data:image/png;base64,")[1].split('"')[0]
    pixels = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels[..., 3].min() == pytest.approx(0.1 * 255, abs=2)  # the root of one in a hundred


def keep_result(order: str, ranking: float | None = 0.0) -> Result:
    curve = {"rate": [0.0, 0.5, 0.9], "top1": [0.9, 0.7, 0.2], "low": [0.8, 0.6, 0.1], "high": [0.95, 0.8, 0.3]}
    orders = [order, "random", "fixed_random", "collapse_static"]
    settings = {
        "order": order,
        "keep_curve": dict.fromkeys(orders, curve),
        "speed": {"rate": [0.0, 0.5, 0.9], "image_s": [0.1, 0.05, 0.02]},
        "ranking_s": {**dict.fromkeys(orders, 0.0), order: ranking},
        "speed_note": "seconds per image",
    }
    return Result("keep-curve", "x", "d", {"mean_top1": 0.6}, {}, settings)


def test_keep_curves_have_their_controls_in_every_figure(tmp_path):
    arms = {"c": [keep_result("collapse", None)], "h": [keep_result("halton")], "untrained": [keep_result("halton")]}
    sections = detail_sections([Evaluated("d", "keep-curve", arms)], tokens=False)
    page = page_of({"keep": sections["keep"]}, tmp_path)
    labels = page.attributes("aria-label")
    assert [label for label in labels if "keep-curve" in label] == [
        "keep-curve on d: arms",
        "keep-curve on d: c, by order",
        "keep-curve on d: c: accuracy against images a second",
        "keep-curve on d: h, by order",
        "keep-curve on d: h: accuracy against images a second",
    ]
    assert page.text.count("fixed_random") >= 3 and "not known, so left out: collapse" in page.text
