"""Scores beside their baseline: what they say in a sentence, and how the evaluated encoder is called."""

import math
import re

import pytest

from smalti.evaluation.result import Result
from smalti.report.verdict import conclude, pair_results, results_lead, results_table


def scores(protocol: str, values: dict[str, float], baseline: bool = False, unit: str = "higher is better") -> Result:
    kind = "untrained" if baseline else None
    return Result(protocol, "run", "d", values, {key: unit for key in values}, {}, baseline=kind)


@pytest.mark.parametrize(
    ("trained", "random", "unit", "kind", "words"),
    [
        (0.5, 0.4, "higher is better", "better", "Better than the same network untrained: knn top1 on d is 0.500"),
        (0.41, 0.4, "higher is better", "better", "Slightly better than the same network untrained"),
        (0.402, 0.4, "higher is better", "same", "Not better than the same network untrained"),
        (0.3, 0.4, "higher is better", "worse", r"Worse than the same network untrained: .* \(-0.100\)"),
        (0.3, 0.4, "lower is better", "better", r"Better than the same network untrained: .* \(-0.100\)"),
        (0.5, math.nan, "higher is better", "unknown", "No comparison with a baseline"),
    ],
)
def test_the_verdict_is_plain(trained, random, unit, kind, words):
    results = [scores("knn", {"top1": trained}, unit=unit), scores("knn", {"top1": random}, True, unit)]
    found, sentence = conclude(pair_results(results))
    assert found == kind and re.search(words, sentence)


def test_without_results_nothing_is_claimed():
    assert conclude([])[0] == "unknown"


def test_dense_protocols_come_first_in_the_verdict():
    results = [
        scores(name, {"x": value}, base)
        for name in ("knn", "linear-segmentation")
        for value, base in ((0.5, False), (0.6, True))
    ]
    assert conclude(pair_results(results))[1].startswith("Worse than the same network untrained: linear-segmentation")


@pytest.mark.parametrize(
    ("low", "kind", "words"), [(-0.01, "same", "Not better than"), (0.02, "better", "Better than")]
)
def test_an_interval_that_holds_zero_is_not_called_better(low: float, kind: str, words: str) -> None:
    ends = {"difference": 0.05, "difference_low": low, "difference_high": 0.11}
    units = {"top1": "0 to 1, higher is better"}
    trained = Result("knn", "a", "d", {"top1": 0.5}, units, {}, intervals={"top1": ends})
    before = Result("knn", "a", "d", {"top1": 0.45}, units, {}, baseline="untrained")
    said, sentence = conclude(pair_results([trained, before]))
    assert said == kind and sentence.startswith(f"{words} the same network untrained")
    assert f"(+0.050, 95 % interval {low:+.3f} to +0.110)" in sentence


def imported(baseline: bool = True, **settings) -> list[Result]:
    """Results of weights from a file, beside timm's initialisation."""
    units = {"top1": "higher is better"}
    result = Result("knn", "timm:vit@w.pth", "d", {"top1": 0.5}, units, settings)
    random = Result("knn", "x", "d", {"top1": 0.4}, units, {}, baseline="random-init")
    return [result, random] if baseline else [result]


def test_imported_weights_are_never_called_trained():
    pairs = pair_results(imported(imported="w.pth: 54 of 54 tensors matched"))
    assert pairs[0].arm == "imported" and list(pairs[0].evaluated.arms) == ["imported", "random init"]
    assert results_lead(pairs).startswith("Imported weights: w.pth: 54 of 54 tensors matched.")
    assert [getattr(cell, "text", cell) for cell in results_table(pairs).columns][3:] == [
        "imported",
        "random init",
        "difference",
    ]
    assert pair_results(imported())[0].arm == "imported"  # known by its baseline alone
    alone = pair_results(imported(baseline=False, imported="w.pth"))
    assert "train" not in conclude(alone)[1] and results_lead(alone).startswith("Imported weights: w.pth.")


def test_weights_of_a_run_are_called_trained_and_random_ones_untrained():
    assert pair_results([scores("knn", {"top1": 0.5})])[0].arm == "trained"
    assert pair_results([Result("knn", "random:vit", "d", {"top1": 0.5}, {}, {})])[0].arm == "untrained"


def test_what_a_score_stands_beside_is_said():
    reference = {"name": "real images", "score": 0.25}
    result = Result("p", "x", "d", {"distance": 1.5}, {}, {"reference": reference})
    assert conclude(pair_results([result])) == ("unknown", "p distance on d is 1.500; real images get 0.250.")
