"""The log of a run as charts: the loss, and every logged value that is explained."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smalti.charts import Line, LineChart, LogColumn, floats
from smalti.methods.base import Method
from smalti.report.formats import decimals
from smalti.report.parts import Figure
from smalti.report.rundir import RunFiles
from smalti.training.logs import LOG_COLUMNS, UNDRAWN_COLUMNS


@dataclass(frozen=True)
class TrainingCurves:
    """The log of training."""

    figures: Sequence[Figure]
    has_events: bool
    constants: str
    """Logged values that did not change, as a sentence; empty if there are none."""
    others: Mapping[str, str]
    """Columns that nobody explains -> last value."""


def training_curves(files: RunFiles, method: type[Method] | None) -> TrainingCurves:
    """The curves of all columns that are explained and change.

    Args:
        files: with a log that isn't empty.
        method: explains its columns; None: unknown.
    """
    steps = floats(files.log["step"])
    marks = floats(float(e["step"]) for e in files.events if e.get("step", "").isdecimal())
    explained = {**LOG_COLUMNS, **(method.log_columns if method else {})}
    figures = [_loss_figure(files.log, steps, marks)] if "loss" in files.log else []
    constants, others = [], {}
    for name, values in files.log.items():
        finite = [value for value in values if math.isfinite(value)]
        if name in UNDRAWN_COLUMNS or name.startswith("loss/") or not finite:
            continue
        column = explained.get(name)
        if column is None:
            others[name] = decimals(finite[-1])
        elif len(set(finite)) == 1:
            constants.append(f"{column.title} {finite[0]:.4g}")
        else:
            figures.append(_column_figure(column, steps, floats(values), marks))
    figures = [figure for figure in figures if not _is_constant(figure)]
    sentence = f"Constant in all logged steps: {', '.join(constants)}." if constants else ""
    return TrainingCurves(figures, bool(marks), sentence, others)


def _is_constant(figure: Figure) -> bool:
    return isinstance(figure.chart, LineChart) and figure.chart.is_constant


def _loss_figure(log: Mapping[str, Sequence[float]], steps: tuple[float, ...], marks: tuple[float, ...]) -> Figure:
    terms = {key.removeprefix("loss/"): floats(values) for key, values in log.items() if key.startswith("loss/")}
    lines = [Line(floats(log["loss"]), steps, "loss" if len(terms) > 1 else "")]
    if len(terms) > 1:
        lines += [Line(values, steps, name) for name, values in terms.items()]
        explanation = f"The training loss and the terms that it is the sum of ({', '.join(terms)}); lower is better."
    else:
        only = f", its only term is {next(iter(terms))}" if terms else ""
        explanation = f"The training loss{only}; lower is better."
    chart = LineChart(
        "Loss against the step", explanation, tuple(lines), x_label="step", smooth=True, marks=marks, is_wide=True
    )
    return Figure("Loss", explanation, chart, is_wide=True)


def _column_figure(
    column: LogColumn, steps: tuple[float, ...], values: tuple[float, ...], marks: tuple[float, ...]
) -> Figure:
    chart = LineChart(
        f"{column.title} against the step",
        column.meaning,
        (Line(values, steps),),
        x_label="step",
        smooth=column.smooth,
        marks=marks,
    )
    return Figure(column.title, column.meaning, chart)
