"""What stands behind the scores of evaluations, side by side for every arm: classes, confusion, charts, pictures.

Everything comes from the details that results carry. What isn't there is left out; where a whole part is missing, the
page says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from smalti.charts import MatrixChart
from smalti.evaluation.result import Result
from smalti.report.evaluated import BASELINES, Evaluated, chart_sections
from smalti.report.formats import as_float, decimals
from smalti.report.parts import Figure, LegendEntry, PictureGroup, Table, TableCell
from smalti.report.patch_maps import TokenMaps, token_maps
from smalti.report.prediction_pictures import object_groups, prediction_groups, sheet_groups

MANY_CLASSES = 20
"""With more classes, a confusion matrix has a table of the most confused pairs beside it."""
MOST_PAIRS = 12
"""Rows of that table."""
_MAX_CLASSES = 500
_OPEN_CLASSES = 24


@dataclass(frozen=True)
class Bar:
    """A value of one arm."""

    arm: str
    colour: str
    percent: float
    """Length, 0..100."""
    text: str


@dataclass(frozen=True)
class ClassBars:
    """A metric class by class."""

    title: str
    key: tuple[LegendEntry, ...]
    classes: tuple[tuple[str, tuple[Bar, ...]], ...]
    """Name of each class and its bars, the best class first."""
    is_open: bool


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix of one arm."""

    arm: str
    chart: MatrixChart
    pairs: Table | None
    """The most confused pairs; None for few classes."""


@dataclass(frozen=True)
class DetailSections:
    """Sections of a page; empty where there is nothing to show."""

    charts: Mapping[str, Sequence[Figure]]
    """Heading -> charts of the protocols."""
    classes: Sequence[ClassBars]
    sheets: Sequence[PictureGroup]
    """Pictures that protocols made."""
    predictions: Sequence[PictureGroup]
    confusions: Sequence[tuple[str, Sequence[Confusion]]]
    """Evaluation -> matrices of its arms."""
    tokens: TokenMaps | None
    """None if the page shows tokens elsewhere, or nothing was evaluated."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing at all."""
        parts = (self.charts, self.classes, self.sheets, self.predictions, self.confusions)
        return not any(parts) and self.tokens is None


def detail_sections(evaluated: Sequence[Evaluated], *, with_tokens: bool = True) -> DetailSections:
    """The data of all sections.

    Args:
        evaluated: in the order in which they are shown; the same arms in the same order.
        with_tokens: also maps of patch tokens and their similarities.
    """
    return DetailSections(
        charts=chart_sections(evaluated),
        classes=[bars for one in evaluated for bars in class_bars(one)],
        sheets=sheet_groups(evaluated),
        predictions=[*prediction_groups(evaluated), *object_groups(evaluated)],
        confusions=[(one.name, found) for one in evaluated if (found := _confusions(one))],
        tokens=token_maps(evaluated) if with_tokens and evaluated else None,
    )


def class_bars(one: Evaluated) -> list[ClassBars]:
    """Each metric that is known class by class, mean over seeds; the best class of all arms first."""
    found = []
    arms = one.arms
    for metric in dict.fromkeys(metric for results in arms.values() for r in results for metric in r.per_class):
        values = {arm: _class_means(results, metric) for arm, results in arms.items()}
        values = {arm: of_class for arm, of_class in values.items() if of_class}
        names = list(dict.fromkeys(name for of_class in values.values() for name in of_class))
        table = np.array([[values[arm].get(name, np.nan) for arm in values] for name in names])
        known = np.isfinite(table)
        top = max(float(table[known].max(initial=0)), 1e-9)
        mean = np.where(known, table, 0).sum(1) / known.sum(1).clip(1)
        order = sorted(range(len(names)), key=lambda i: (not known[i].any(), -mean[i]))
        colours = {arm: _colour(number, arm) for number, arm in enumerate(arms)}
        found.append(
            ClassBars(
                f"{one.name}: {metric} of each class ({len(names)})",
                tuple(LegendEntry(colours[arm], arm) for arm in values),
                tuple(
                    (names[i], tuple(_bar(arm, colours[arm], float(table[i, n]), top) for n, arm in enumerate(values)))
                    for i in order[:_MAX_CLASSES]
                ),
                len(names) <= _OPEN_CLASSES,
            )
        )
    return found


def _class_means(results: Sequence[Result], metric: str) -> dict[str, float]:
    """Mean over seeds; NaN if no seed has a value."""
    found: dict[str, list[float]] = {}
    for result in results:
        for name, value in result.per_class.get(metric, {}).items():
            found.setdefault(name, []).append(as_float(value))
    known = {name: [v for v in values if np.isfinite(v)] for name, values in found.items()}
    return {name: float(np.mean(values)) if values else np.nan for name, values in known.items()}


def _bar(arm: str, colour: str, value: float, top: float) -> Bar:
    return Bar(arm, colour, max(value, 0) / top * 100 if np.isfinite(value) else 0.0, decimals(value))


def _colour(number: int, arm: str) -> str:
    return "var(--none)" if arm in BASELINES else f"var(--c{number % 6 + 1})"


def _confusions(one: Evaluated) -> list[Confusion]:
    """A matrix for each arm that has one, counts of all seeds together."""
    confusions = []
    for arm, results in one.arms.items():
        found = [r.details for r in results if r.details is not None and r.details.confusion is not None]
        matrices = [details.confusion for details in found if details.confusion is not None]
        if matrices:
            counts = np.sum([matrix for matrix in matrices if matrix.shape == matrices[0].shape], axis=0)
            chart = MatrixChart(f"Confusion of {arm}, {one.name}", counts, found[0].classes)
            confusions.append(
                Confusion(arm, chart, confused_pairs(chart) if max(counts.shape) > MANY_CLASSES else None)
            )
    return confusions


def confused_pairs(chart: MatrixChart) -> Table:
    """The pairs of classes with the largest counts off the diagonal, the largest first."""
    counts = chart.counts.copy()
    totals = counts.sum(1)
    np.fill_diagonal(counts, 0)
    largest = np.argsort(-counts, axis=None, kind="stable")[:MOST_PAIRS]
    places = [np.unravel_index(place, counts.shape) for place in largest]
    rows = tuple(
        (
            chart.name(int(true)),
            chart.name(int(predicted)),
            TableCell(f"{counts[true, predicted]:,}", "number"),
            TableCell(f"{100 * counts[true, predicted] / totals[true]:.1f} %", "number"),
        )
        for true, predicted in places
        if counts[true, predicted] > 0
    )
    columns = ("true class", "predicted class", TableCell("count", "number"), TableCell("of the true class", "number"))
    return Table(columns, rows)
