"""Charts as data: the numbers of a chart, and the one sentence that says how to read it.

Whoever measures something describes its charts; :mod:`smalti.report.svg` draws any of them without knowing where they
come from.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

XAxis = Literal["count", "fraction", "log fraction", "log"]
"""``count``: whole numbers such as steps or layers; ``fraction``: 0..1 in percent; ``log fraction``: a few fractions on
a logarithmic scale, each with its tick; ``log``: any positive numbers on a logarithmic scale."""
Role = Literal["encoder", "control", "truth"]
"""``encoder``: drawn for every encoder; ``control``: drawn for the first encoder only; ``truth``: the same for all
encoders, drawn once."""
EVALUATIONS = "Charts of the evaluations"
"""Heading of charts that name no section of their own."""


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    y: tuple[float, ...]
    """NaN leaves a gap."""
    x: tuple[float, ...] = ()
    """Empty: 1, 2, 3 ..."""
    name: str = ""
    """Empty: pages name it after the encoder."""
    low: tuple[float, ...] = ()
    """Lower and upper ends of intervals, drawn as a band; empty: none."""
    high: tuple[float, ...] = ()
    role: Role = "encoder"
    level: float = math.nan
    """A value to compare with, drawn as a dashed level line; NaN: none."""
    is_baseline: bool = False
    """Drawn in grey; pages set it."""

    @property
    def steps(self) -> tuple[float, ...]:
        """``x``, or 1, 2, 3 ..."""
        return self.x or tuple(float(number) for number in range(1, len(self.y) + 1))


@dataclass(frozen=True)
class LineChart:
    """Lines over a common axis, with what a reader must know of them."""

    title: str
    """Without names of encoders and data sets, which pages add."""
    explanation: str
    """One sentence: what the lines show and which way is better."""
    lines: tuple[Line, ...]
    section: str = EVALUATIONS
    """Heading under which pages show it."""
    x_axis: XAxis = "count"
    x_label: str = ""
    smooth: bool = False
    """Whether a running mean is drawn over long, noisy lines."""
    has_points: bool = False
    """Whether single values are marked, for a few of them."""
    levels: tuple[str, ...] = ()
    """Names of the values 0, 1, 2 ... from bottom to top; each line is then drawn as steps in a panel of its own."""
    marks: tuple[float, ...] = ()
    """Places on the axis at which something happened, drawn as dotted vertical lines."""
    is_wide: bool = False
    """Whether it takes the whole width of the page."""
    per_encoder: bool = False
    """Whether each encoder has a chart of its own, with the first line of its baseline; else all share one chart."""
    needs_several: bool = False
    """Whether it is shown only where several trained encoders are compared."""

    @property
    def is_constant(self) -> bool:
        """Whether all finite values are the same, so that there is nothing to see; with intervals or named levels, even
        that is a finding."""
        is_finding = bool(self.levels) or any(line.low for line in self.lines)
        return not is_finding and len({y for line in self.lines for y in line.y if math.isfinite(y)}) < 2


@dataclass(frozen=True)
class ForestRow:
    """A row of a :class:`ForestChart`; NaN where there is nothing to draw."""

    name: str
    mean: float
    low: float
    high: float
    points: tuple[float, ...] = ()
    """Single values, such as those of seeds."""
    difference: float = math.nan
    difference_low: float = math.nan
    difference_high: float = math.nan


@dataclass(frozen=True)
class ForestChart:
    """Means with intervals, and differences from a reference with theirs."""

    title: str
    rows: tuple[ForestRow, ...]
    """From top to bottom, the reference included."""
    reference: str
    """What the differences are relative to."""


@dataclass(frozen=True)
class MatrixChart:
    """A confusion matrix."""

    title: str
    counts: np.ndarray
    """``(G, P)`` ground truth down, prediction across; a row without counts stays empty."""
    names: tuple[str, ...]
    """Names of the classes; numbers replace missing names."""

    def name(self, number: int) -> str:
        """Name of a class."""
        return self.names[number] if number < len(self.names) else str(number)


@dataclass(frozen=True)
class Point:
    """A point of a :class:`ScatterChart`."""

    name: str
    """The legend names points that share a name once."""
    x: float
    y: float
    low: float = math.nan
    """Ends of the interval of ``y``; NaN: none."""
    high: float = math.nan
    label: str = ""
    """Text beside the point."""


@dataclass(frozen=True)
class ScatterChart:
    """Points with intervals, and the front that no other point beats in both coordinates."""

    title: str
    points: tuple[Point, ...]
    front: tuple[int, ...]
    """Indices of the points on the front, by ``x``."""
    x_label: str
    y_label: str


Chart = LineChart | ForestChart | MatrixChart | ScatterChart


@dataclass(frozen=True)
class LogColumn:
    """A column of ``log.csv`` as pages show it."""

    title: str
    meaning: str
    """One sentence: what it is and which way is better."""
    smooth: bool = False
    """Whether it is so noisy that a running mean helps."""


def floats(values: Iterable[float]) -> tuple[float, ...]:
    """Numbers of any kind as a tuple of floats."""
    return tuple(float(value) for value in values)


def loss_chart(values: Sequence[float]) -> LineChart:
    """The loss of what an evaluation trains, at each of its steps."""
    return LineChart(
        "Training loss",
        "Loss of what this evaluation trains, at each of its training steps; lower is a better fit, but not a score.",
        (Line(floats(values)),),
        x_label="step",
        smooth=True,
    )


def layer_chart(title: str, explanation: str, values: Sequence[float]) -> LineChart:
    """A number for each layer, the first block on the left."""
    return LineChart(title, explanation, (Line(floats(values)),), x_label="layer", has_points=True)


def chart_tree(chart: LineChart) -> dict[str, Any]:
    """Plain values for JSON, without those that are the default; :func:`read_chart` reads them."""
    return _without_defaults(chart) | {"lines": [_without_defaults(line) for line in chart.lines]}


def read_chart(tree: Mapping[str, Any]) -> LineChart:
    """A chart from what :func:`chart_tree` gave.

    Raises:
        KeyError, TypeError, ValueError: if it has another form.
    """
    return LineChart(**{**_with_tuples(tree, ("levels", "marks")), "lines": tuple(map(_read_line, tree["lines"]))})


def _read_line(tree: Mapping[str, Any]) -> Line:
    return Line(**_with_tuples(tree, ("x", "y", "low", "high")))


def _with_tuples(tree: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The values of these names as tuples; null is NaN again."""
    tuples = {
        name: tuple(math.nan if value is None else value for value in tree[name]) for name in names if name in tree
    }
    return {**tree, **tuples}


def _without_defaults(item: Line | LineChart) -> dict[str, Any]:
    values = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    kept = {f.name: values[f.name] for f in dataclasses.fields(item) if not _is_same(values[f.name], f.default)}
    return {key: [_plain(one) for one in value] if isinstance(value, tuple) else value for key, value in kept.items()}


def _is_same(value: Any, default: Any) -> bool:
    is_nan = isinstance(value, float) and math.isnan(value) and isinstance(default, float) and math.isnan(default)
    return is_nan or bool(value == default)


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
