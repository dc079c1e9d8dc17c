"""The sentences of a comparison follow its intervals."""

from pathlib import Path

from smalti.comparison.outcome import Cell, Comparison, Cost
from smalti.comparison.plan import Plan
from smalti.evaluation.intervals import Interval
from smalti.evaluation.paired import Row
from smalti.report.comparison_verdict import sentences


def conclude(*gaps: Interval | None, unit: str = "0 to 1, higher is better", failures=()) -> tuple[str, list[str]]:
    score = Interval(0.5, 0.4, 0.6, "images and seeds")
    arms = {"first": {"load": "random"}, **{f"arm{n}": {"load": "random"} for n in range(len(gaps))}}
    rows = [Row("d", "knn", "top1", unit, "first", score, {0: 0.5}, None, True)]
    rows += [Row("d", "knn", "top1", unit, f"arm{n}", score, {0: 0.5}, gap, True) for n, gap in enumerate(gaps)]
    cells = [Cell(row.arm, 0, Path(), ()) for row in rows]
    plan = Plan(arms=arms, evaluate=({"data": "d"},))
    return sentences(Comparison(Path(), plan, tuple(rows), tuple(cells), dict(failures), {"first": Cost()}, {}))


def test_the_sentences_follow_the_intervals():
    up, down, none = (Interval((a + b) / 2, a, b, "images") for a, b in ((0.1, 0.3), (-0.3, -0.1), (-0.1, 0.2)))
    nothing = Interval(0.1, float("nan"), float("nan"), "nothing")
    assert conclude(up) == ("better", ["arm0 is better than first in knn top1 on d (+0.200 [+0.100, +0.300])."])
    assert (
        conclude(down)[0] == "worse"
        and conclude(up, down)[0] == "better"
        and conclude(down, unit="lower is better")[0] == "better"
    )
    assert conclude(none) == (
        "same",
        ["No difference found between arm0 and first in knn top1 on d (+0.050 [-0.100, +0.200])."],
    )
    assert conclude(nothing)[0] == "unknown" and "nothing can be said" in conclude(nothing)[1][0]
    kind, lines = conclude(None, failures={"arm0": "seed 1: out of memory"})
    assert (
        kind == "unknown" and lines[0].startswith("arm0 failed at some of its seeds") and "can be compared" in lines[1]
    )
