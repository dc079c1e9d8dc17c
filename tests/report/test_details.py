"""What stands behind the scores: every section for all arms, from whatever the details hold."""

import dataclasses

import numpy as np

from smalti.charts import MatrixChart
from smalti.evaluation.result import Result
from smalti.report.details import MANY_CLASSES, MOST_PAIRS, class_bars, confused_pairs, detail_sections
from smalti.report.evaluated import Evaluated

EVIL = "<script>alert(1)</script>"


def test_every_figure_is_there_for_every_arm(evaluated, page_of):
    page = page_of(detail_sections([evaluated]))
    alts = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
    for arm in evaluated.arms:
        for what in (
            "classes that {} predicts",
            "PCA map of a.png by {}",
            "similarity of the patches of a.png to one, by {}",
        ):
            assert any(what.format(arm) in alt for alt in alts), (arm, what)
    assert sum(alt.startswith("true classes") for alt in alts) == 2
    labels = page.attributes("aria-label")
    assert sum(label.startswith("Confusion of") for label in labels) == 3
    titles = {"mutual information (linear-segmentation on d)", "Training loss (linear-segmentation on d)"}
    assert titles <= set(labels) and "What it is." in page.text
    assert "iou of each class (3)" in page.text and "by seed 0" in page.text


def test_hostile_names_stay_text(evaluated, page_of):
    page = page_of(detail_sections([evaluated]))
    assert page.text.count(EVIL) >= 3 and not any(tag == "script" for tag, _ in page.elements)
    assert any("c <b>.png" in alt for alt in page.attributes("alt"))


def test_results_without_details_have_no_figures():
    bare = Result("knn", "x", "d", {"top1": 0.5}, {}, {})
    assert detail_sections([Evaluated("d", "knn", {"a": [bare]})], with_tokens=False).is_empty
    assert detail_sections([], with_tokens=True).is_empty


def test_bars_are_means_over_seeds_the_best_class_first_and_the_baseline_grey(evaluated, page_of):
    arms = {"one": evaluated.arms["one"], "untrained": evaluated.arms["two"]}
    one = Evaluated("d", "p", arms)
    (bars,) = class_bars(one)
    assert [name for name, _ in bars.classes] == ["sky", EVIL, "road"]
    assert [bar.text for bar in bars.classes[1][1]] == ["0.250", "0.400"]  # the first of 0.2 and 0.3
    assert [entry.colour for entry in bars.key] == ["var(--c1)", "var(--none)"]
    page = page_of(detail_sections([one]))
    styles = " ".join(page.attributes("style"))
    assert "background:var(--none)" in styles and "background:var(--c2)" not in styles
    assert page.text.index("sky") < page.text.index(EVIL) < page.text.index("road")


def big_matrix(num_classes: int) -> np.ndarray:
    """Half of class n goes to class n + 1, and more of it the larger n is."""
    counts = np.diag(np.arange(1, num_classes + 1))
    counts[np.arange(num_classes - 1), np.arange(1, num_classes)] = np.arange(1, num_classes)
    return counts


def test_the_most_confused_pairs_are_the_largest_counts_off_the_diagonal():
    names = tuple(f"c{n}" for n in range(29))  # the last one has no name
    table = confused_pairs(MatrixChart("x", big_matrix(30), names))
    cells = [tuple(cell if isinstance(cell, str) else cell.text for cell in row) for row in table.rows]
    assert len(cells) == MOST_PAIRS
    assert cells[0] == ("c28", "29", "29", "50.0 %") and cells[1] == ("c27", "c28", "28", "50.0 %")
    assert not confused_pairs(MatrixChart("x", np.diag([3, 0, 2]), ())).rows  # nothing is confused, one class is absent


def test_the_pairs_stand_beside_matrices_of_many_classes_and_only_there(make_result, page_of):
    plain = make_result(0)
    for num_classes, expected in ((MANY_CLASSES, 0), (MANY_CLASSES + 1, 1)):
        names = tuple(f"<i>{n}</i>" for n in range(num_classes))
        details = dataclasses.replace(plain.details, confusion=big_matrix(num_classes), classes=names, predictions={})
        one = Evaluated("d", "p", {"a": [dataclasses.replace(plain, details=details)]})
        page = page_of(detail_sections([one]))
        assert page.text.count("Most confused pairs of a") == expected
        assert not any(tag == "i" and not attributes for tag, attributes in page.elements)
    assert f"<i>{num_classes - 2}</i>" in page.text and "of the true class" in page.text


def test_counts_of_all_seeds_are_added(evaluated):
    (name, confusions), *_ = detail_sections([evaluated]).confusions
    first = confusions[0]
    seeds = [result.details.confusion for result in evaluated.arms["one"]]
    assert name == evaluated.name and first.arm == "one" and (first.chart.counts == sum(seeds)).all()
