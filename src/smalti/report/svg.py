"""Draws charts (:mod:`smalti.charts`) as inline SVG that takes its colours from the page, light or dark."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from smalti.charts import Chart, ForestChart, ForestRow, Line, LineChart, MatrixChart, ScatterChart

FEW_CLASSES = 12
"""Up to this many classes a confusion matrix has numbers."""
_INK = "#010203"  # stands for the page's text colour, see _as_svg
_GREY = "#010205"  # stands for the page's grey
_PAPER = "#010204"  # stands for the page's background
_SERIES = tuple(f"#0a0b{number:02x}" for number in range(1, 7))  # stand for the page's variables --c1..--c6
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))  # for more lines than colours
_CELL = (52, 128, 196)  # full cells of a confusion matrix: dark and light text are legible on it
_LONGEST_NAME = 22
_SMALL, _WIDE = (3.6, 2.0), (9.2, 2.7)  # inches
_FEW_POINTS, _SMOOTHED_FROM = 48, 60


def draw(chart: Chart) -> str:
    """The chart as SVG; its title is the text for readers who cannot see it."""
    with _svg_style(chart.title):
        if isinstance(chart, LineChart):
            figure = _draw_panels(chart) if chart.levels else _draw_lines(chart)
        elif isinstance(chart, ForestChart):
            figure = _draw_forest(chart)
        elif isinstance(chart, ScatterChart):
            figure = _draw_scatter(chart)
        else:
            figure = _draw_matrix(chart)
        return _as_svg(figure, chart.title)


def _draw_lines(chart: LineChart) -> Figure:
    figure = Figure(figsize=_WIDE if chart.is_wide else _SMALL, layout="constrained")
    axes = figure.subplots()
    for number, line in enumerate(chart.lines):
        _draw_line(axes, line, _colour(line, number), _DASHES[number // len(_SERIES) % len(_DASHES)], chart)
    for mark in chart.marks:
        axes.axvline(mark, color=_INK, linewidth=0.8, linestyle=(0, (1, 2)), alpha=0.6)
    if any(line.name for line in chart.lines):
        axes.legend(frameon=False, labelcolor=_INK, handlelength=1.2)
    axes.margins(x=0.01 if chart.x_axis == "count" else 0.02, y=0.12)
    if chart.x_axis == "count":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5), useMathText=False)
        axes.yaxis.get_offset_text().set_color(_INK)
        axes.locator_params(axis="both", nbins=5)
        axes.locator_params(axis="x", integer=True)
    else:
        _scale_x(axes, chart)
    if chart.x_label:
        axes.set_xlabel(chart.x_label, color=_INK, alpha=0.7)
    _plain_axes(axes)
    axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
    return figure


def _draw_line(axes: Axes, line: Line, colour: str, dashes: Any, chart: LineChart) -> None:
    is_count = chart.x_axis == "count"
    x, y = _with_gaps(line.steps, line.y) if is_count else (list(line.steps), list(line.y))
    is_smoothed = chart.smooth and len(y) > _SMOOTHED_FROM
    has_points = (chart.has_points and len(y) <= _FEW_POINTS) or len(y) < 3
    axes.plot(
        x,
        y,
        color=colour,
        linewidth=0.7 if is_smoothed else 1.4,
        linestyle=dashes,
        alpha=0.35 if is_smoothed else 1,
        marker="o" if has_points else None,
        markersize=3,
        label=None if is_smoothed else line.name,
    )
    if is_smoothed:
        axes.plot(x, _running_mean(y), color=colour, linewidth=1.5, linestyle=dashes, label=line.name)
    if line.low:
        axes.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    if math.isfinite(line.level):
        axes.axhline(line.level, color=colour, linewidth=1.1, linestyle=(0, (4, 3)))


def _scale_x(axes: Axes, chart: LineChart) -> None:
    if chart.x_axis != "fraction":
        axes.set_xscale("log")
    if chart.x_axis == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        return
    is_log = chart.x_axis == "log fraction"
    places = sorted({x for line in chart.lines for x in line.steps})
    step = 0.1 if chart.is_wide or places[-1] <= 0.5 else 0.2
    ticks = places if is_log else [n * step for n in range(round(places[-1] / step + 0.49) + 1)]
    axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _draw_panels(chart: LineChart) -> Figure:
    """Lines between named levels as steps, a panel each."""
    figure = Figure(figsize=(_WIDE[0], 1.1 * len(chart.lines) + 0.2), layout="constrained")
    panels = figure.subplots(len(chart.lines), 1, sharex=True, squeeze=False)[:, 0]
    number = 0
    for axes, line in zip(panels, chart.lines, strict=True):
        colour = _INK if line.role == "truth" else _colour(line, number)
        number += line.role != "truth"
        axes.step(line.steps, line.y, where="mid", color=colour, linewidth=1.1)
        axes.set_yticks(range(len(chart.levels)), chart.levels)
        axes.set_ylim(-0.4, len(chart.levels) - 0.6)
        axes.set_title(line.name, loc="left", color=_INK, fontsize=8)
        axes.margins(x=0.01)
        _plain_axes(axes)
    panels[-1].set_xlabel(chart.x_label, color=_INK, alpha=0.7)
    return figure


def _draw_matrix(chart: MatrixChart) -> Figure:
    """Fractions of each true class as the opacity of blue.

    Up to a dozen classes show percentages; with more, the opacity is the square root of the fraction, so that small
    confusions can be seen.
    """
    rows, columns = chart.counts.shape
    total = chart.counts.sum(1, keepdims=True)
    fractions = np.divide(chart.counts, total, out=np.zeros(chart.counts.shape), where=total > 0)
    few = max(rows, columns) <= FEW_CLASSES
    picture = np.empty((rows, columns, 4))
    picture[..., :3], picture[..., 3] = np.array(_CELL) / 255, fractions if few else np.sqrt(fractions)
    labels = [_shorten(chart.name(number)) for number in range(max(rows, columns))]
    side = 0.42 if few else max(0.125, min(0.3, 7.2 / max(rows, columns)))  # of a cell, in inches
    margin = 0.075 * max(map(len, labels)) + 0.5
    figure = Figure(figsize=(side * columns + margin, side * rows + margin), layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture, interpolation="none", aspect="equal")
    axes.set_xticks(range(columns), labels[:columns], rotation=90)
    axes.set_yticks(range(rows), labels[:rows])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("predicted class", color=_INK, alpha=0.7)
    axes.set_ylabel("true class", color=_INK, alpha=0.7)
    _plain_axes(axes)
    axes.tick_params(length=0, labelsize=8 if side > 0.14 else 7)
    axes.spines[:].set_visible(False)
    edges: tuple[tuple[int, Callable[..., object]], ...] = ((rows, axes.axhline), (columns, axes.axvline))
    for count, line in edges:
        for place in range(count + 1) if few else (0, count):
            line(place - 0.5, color=_INK, alpha=0.15, linewidth=0.5)
    if few:
        for row, column in zip(*np.nonzero(fractions >= 0.005), strict=True):
            axes.text(column, row, f"{fractions[row, column] * 100:.0f}", ha="center", va="center", color=_INK)
    return figure


def _draw_forest(chart: ForestChart) -> Figure:
    """Means with intervals on the left, differences to the reference on the right.

    A difference whose interval includes zero has a hollow mark, the others a filled one.
    """
    figure = Figure(figsize=(_WIDE[0], 0.62 + 0.27 * len(chart.rows)), layout="constrained")
    means, gaps = figure.subplots(1, 2, sharey=True)
    for number, row in enumerate(chart.rows):
        colour = _SERIES[number % len(_SERIES)]
        _draw_interval(means, number, colour, row.mean, row.low, row.high, True)
        ends = row.difference_low, row.difference_high
        _draw_interval(gaps, number, colour, row.difference, *ends, _excludes_zero(row))
        means.plot(row.points, [number + 0.27] * len(row.points), "|", color=colour, markersize=4.5)
    means.set_yticks(range(len(chart.rows)), [row.name for row in chart.rows])
    means.set_ylim(len(chart.rows) - 0.4, -0.6)
    gaps.axvline(0, color=_INK, alpha=0.5, linewidth=0.8, linestyle=(0, (4, 3)))
    for axes, label in ((means, "mean; ticks: seeds"), (gaps, f"difference to {chart.reference}")):
        _plain_axes(axes)
        axes.locator_params(axis="x", nbins=5)
        axes.margins(x=0.06)
        axes.set_xlabel(label, color=_INK, alpha=0.7)
        axes.grid(axis="x", color=_INK, alpha=0.12, linewidth=0.6)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    gaps.tick_params(axis="y", labelleft=False)
    return figure


def _draw_scatter(chart: ScatterChart) -> Figure:
    """Time on a logarithmic axis; points on the front are filled and joined."""
    figure = Figure(figsize=(_WIDE[0], 3.4), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(point.name for point in chart.points))
    front = [chart.points[place] for place in chart.front]
    axes.plot([point.x for point in front], [point.y for point in front], color=_INK, alpha=0.35, linewidth=1.0)
    for place, point in enumerate(chart.points):
        colour = _SERIES[names.index(point.name) % len(_SERIES)]
        if math.isfinite(point.low):
            axes.plot([point.x, point.x], [point.low, point.high], color=colour, linewidth=1.0, alpha=0.6)
        is_first = all(one.name != point.name for one in chart.points[:place])
        axes.plot(
            point.x,
            point.y,
            marker="o",
            markersize=5,
            linestyle="none",
            color=colour,
            markerfacecolor=colour if place in chart.front else "none",
            label=point.name if is_first else None,
        )
        axes.annotate(
            point.label, (point.x, point.y), xytext=(6, 3), textcoords="offset points", color=_INK, fontsize="small"
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(chart.x_label, color=_INK, alpha=0.7)
    axes.set_ylabel(chart.y_label, color=_INK, alpha=0.7)
    axes.margins(x=0.15, y=0.12)
    if len(names) > 1:
        axes.legend(frameon=False, labelcolor=_INK, handlelength=1.2)
    _plain_axes(axes)
    axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
    return figure


def _draw_interval(axes: Axes, place: int, colour: str, mean: float, low: float, high: float, is_filled: bool) -> None:
    if math.isfinite(low) and math.isfinite(high):
        axes.plot([low, high], [place, place], color=colour, linewidth=1.8, solid_capstyle="round")
    if math.isfinite(mean):
        face = colour if is_filled else "none"
        axes.plot([mean], [place], "o", color=colour, markerfacecolor=face, markersize=6.5)
        if not is_filled:  # the interval would show through
            axes.plot([mean], [place], "o", color=_PAPER, markersize=4.2)


def _excludes_zero(row: ForestRow) -> bool:
    return row.difference_low > 0 or row.difference_high < 0


def _colour(line: Line, number: int) -> str:
    return _GREY if line.is_baseline else _SERIES[number % len(_SERIES)]


def _shorten(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _with_gaps(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """NaN between a step and an earlier one (the run was rolled back), and for what isn't finite."""
    x: list[float] = []
    y: list[float] = []
    for step, value in zip(steps, values, strict=True):
        if x and step <= x[-1]:
            x.append(x[-1])
            y.append(math.nan)
        x.append(step)
        y.append(value if math.isfinite(value) else math.nan)
    return x, y


def _running_mean(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about 1/30 of the line; restarts after a gap."""
    keep = 1 - min(1.0, 30 / len(values))
    result: list[float] = []
    mean = weight = 0.0
    for value in values:
        if math.isnan(value):
            mean = weight = 0.0
            result.append(value)
            continue
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        result.append(mean / weight)
    return result


@contextmanager
def _svg_style(title: str) -> Iterator[None]:
    settings = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 8, "path.simplify": True}
    with matplotlib.rc_context({**settings, "text.parse_math": False}):  # names of classes and images may hold $
        yield


def _plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=_INK, alpha=0.35)
    axes.tick_params(colors=_INK, length=2.5, width=0.6)


def _as_svg(figure: Figure, title: str) -> str:
    """A figure as SVG without what a page doesn't need, in the page's own colours."""
    drawn = StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # several charts of a page would share them
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    replaced = {"xlink:href": "href", _INK: "currentColor", _PAPER: "var(--card)", _GREY: "var(--none)"}
    replaced |= {colour: f"var(--c{number})" for number, colour in enumerate(_SERIES, 1)}
    for text, by in replaced.items():
        svg = svg.replace(text, by)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
