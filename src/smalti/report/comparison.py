"""The page of a comparison: verdict first, numbers with intervals, cost, every figure for all arms side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smalti.charts import ForestChart, ForestRow, Line, LineChart, floats
from smalti.comparison.cell import RANDOM, RUN
from smalti.comparison.outcome import Cell, Comparison
from smalti.comparison.plan import OF_ARM, taken
from smalti.comparison.run import PAGE, read_comparison
from smalti.comparison.tables import cost_cells, cost_columns, samples_name, short_name
from smalti.config import flatten, to_tree
from smalti.errors import SmaltiError
from smalti.evaluation.intervals import few_seeds
from smalti.evaluation.paired import Row, about_lines, gain_cells, table_cells
from smalti.evaluation.result import Result
from smalti.files import write_atomically
from smalti.report.comparison_verdict import sentences
from smalti.report.details import DetailSections, detail_sections
from smalti.report.evaluated import Evaluated
from smalti.report.parts import Fact, Figure, Summary, Table, TableCell
from smalti.report.render import render
from smalti.report.rundir import RunFiles, read_run

_MAX_SENTENCES = 12


@dataclass(frozen=True)
class ScoreTable:
    """One metric of all arms on one data set."""

    title: str
    about: Sequence[str]
    """Images, split and what was left out."""
    table: Table
    figure: Figure | None


@dataclass(frozen=True)
class Training:
    """Curves of the arms' training."""

    losses: Sequence[Figure]
    scores: Sequence[Figure]


@dataclass(frozen=True)
class ComparisonPage:
    """All that the page shows."""

    title: str
    subtitle: str
    summary: Summary
    facts: Sequence[Fact]
    arms: Table
    first: str
    """Name of the first arm, from which differences are taken."""
    resampled: str
    """What scores are paired over: images or recordings."""
    headlines: Sequence[ScoreTable]
    others: Sequence[ScoreTable]
    costs: Table
    training: Training | None
    details: DetailSections
    failures: Mapping[str, str]
    removed: Sequence[str]
    """Arms and seeds whose files are gone."""
    unreadable: Sequence[str]
    info: Mapping[str, Any]
    plan: Mapping[str, Any]
    command: str


def write_comparison(source: Comparison | Path, out: Path | None = None) -> Path:
    """Write the page of a comparison as one HTML file that loads nothing.

    Args:
        source: what :func:`smalti.compare` returned, or its folder. Cells that were removed since are left out of the
            figures, and the page says so.
        out: the file; None takes ``report.html`` in the folder.

    Returns:
        The file written.

    Raises:
        RunError: if the folder holds no comparison.
        ConfigError: if ``out`` can't be written.
    """
    comparison = source if isinstance(source, Comparison) else read_comparison(source)
    out = out or comparison.out / PAGE
    write_atomically(out, render("comparison", comparison_page(comparison)))
    return out


def comparison_page(comparison: Comparison) -> ComparisonPage:
    """The data of the page."""
    kind, texts = sentences(comparison)
    evaluated, runs, unreadable = _read_cells(comparison)
    shown = texts[:_MAX_SENTENCES]
    if len(texts) > len(shown):
        shown.append(f"{len(texts) - len(shown)} further sentences are in the tables below.")
    unit = str(comparison.info.get("resampled", "images"))
    note = (
        f"Intervals of 95 % over evaluated {unit} and seeds; “no difference found” is not “no difference”. The "
        "comparisons are not corrected for their number: of twenty comparisons of equal arms, about one finds one."
    )
    if few := few_seeds(len(comparison.plan.seeds), unit):
        note = f"{few} {note}"
    removed = [f"{cell.arm}, seed {cell.seed}" for cell in comparison.cells if not cell.folder.is_dir()]
    others = [(title, rows) for title, rows in comparison.table(headlines=False) if not rows[0].is_headline]
    first = next(iter(comparison.plan.arms))
    return ComparisonPage(
        title=comparison.out.resolve().name,
        subtitle=_subtitle(comparison),
        summary=Summary(kind, tuple(shown), note),
        facts=_facts(comparison),
        arms=_arms(comparison, evaluated, runs),
        first=first,
        resampled=unit,
        headlines=[_score_table(title, rows, first, with_figure=True) for title, rows in comparison.table()],
        others=[_score_table(title, rows, first) for title, rows in others],
        costs=_costs(comparison),
        training=_training(runs) if runs else None,
        details=detail_sections(evaluated),
        failures=comparison.failures,
        removed=removed,
        unreadable=[line for line in unreadable if not any(line.startswith(f"{name}:") for name in removed)],
        info={key: value for key, value in comparison.info.items() if not _is_nan(value)},
        plan=flatten(to_tree(comparison.plan)),
        command=f"smalti compare {comparison.out / 'plan.yaml'} --out DIR",
    )


def _subtitle(comparison: Comparison) -> str:
    plan = comparison.plan
    trained = f", trained on {plan.data}" if plan.data else ""
    return (
        f"{', '.join(plan.arms)}: under one budget{trained}" if plan.budget else f"{', '.join(plan.arms)}, as they are"
    )


def _facts(comparison: Comparison) -> list[Fact]:
    plan, machine, samples = comparison.plan, comparison.info.get("machine", {}), samples_name(comparison)
    budget = [
        Fact(f"{value:,g}", f"{samples if name == 'images' else name}, the budget of each arm")
        for name, value in plan.budget.items()
    ]
    return [
        Fact(str(len(plan.arms)), "arms"),
        Fact(", ".join(map(str, plan.seeds)), "seeds" if len(plan.seeds) > 1 else "seed"),
        *budget,
        Fact(str(len(comparison.table())), "evaluations"),
        Fact(f"{machine.get('cores', '–')}", f"cores; {', '.join(machine.get('gpus', ())) or 'no GPU'}"),
        Fact(str(comparison.info.get("commit") or "–"), "commit of Smalti"),
    ]


def _arms(comparison: Comparison, evaluated: Sequence[Evaluated], runs: Mapping[str, Mapping[int, RunFiles]]) -> Table:
    """Where the weights of each arm come from: trained here, imported, of a run, or random."""
    imported = {
        arm: result.imported
        for one in evaluated
        for arm, results in one.arms.items()
        for result in results
        if result.imported
    }
    rows = []
    for arm, settings in comparison.plan.arms.items():
        spec = taken(settings)
        if spec is None:
            files = next(iter(runs.get(arm, {}).values()), None)
            given = str(settings.get("init") or comparison.plan.settings.get("init") or "")
            init = files.setting("init") if files else given
            if given.startswith(OF_ARM):
                init = f"arm {given.removeprefix(OF_ARM)}"
            method = (files.setting("method") if files else None) or settings.get("method") or settings.get("recipe")
            method = method.get("name") if isinstance(method, Mapping) else method
            about = f"trained with {method}, started from {f'the weights of {init}' if init else 'random weights'}"
        elif spec.partition(":")[0] == RANDOM:
            about = "not trained: random weights"
        elif arm in imported:
            about = f"imported weights, not trained here: {imported[arm]}"
        else:
            about = f"evaluated as they are: {spec}"
        rows.append((arm, about))
    return Table(("arm", "weights"), tuple(rows))


def _score_table(title: str, rows: Sequence[Row], first: str, with_figure: bool = False) -> ScoreTable:
    labels = dict.fromkeys(row.gain_over for row in rows if row.gain_over)
    gains = (f"gain over {' or '.join(labels)}", "") if labels else ()
    lines = []
    for row, (arm, mean, seeds, gap, word) in zip(rows, table_cells(rows), strict=True):
        gain, gain_word = gain_cells(row)
        lines.append(
            (
                arm,
                TableCell(mean, note=f"over {row.score.over}"),
                TableCell(seeds, "muted"),
                *((TableCell(gain), _word(gain_word)) if labels else ()),
                TableCell(gap),
                _word(word),
            )
        )
    columns = ("arm", "mean", "seeds", *gains, f"difference to {first}", "")
    full_title = f"{title} ({rows[0].unit})"
    figure = Figure(full_title, "", _forest(title, rows, first)) if with_figure else None
    return ScoreTable(full_title, about_lines(rows), Table(columns, tuple(lines)), figure)


def _word(word: str) -> TableCell:
    return TableCell(word, f"word {word}" if word in ("better", "worse") else "word")


def _forest(title: str, rows: Sequence[Row], first: str) -> ForestChart:
    drawn = tuple(
        ForestRow(
            row.arm,
            row.score.mean,
            row.score.low,
            row.score.high,
            tuple(row.seeds.values()),
            *((row.difference.mean, row.difference.low, row.difference.high) if row.difference else ()),
        )
        for row in rows
    )
    return ForestChart(f"{title}: means and differences", drawn, first)


def _costs(comparison: Comparison) -> Table:
    columns: tuple[TableCell | str, ...] = ("arm", *(TableCell(name, "number") for name in cost_columns(comparison)))
    rows: list[tuple[TableCell | str, ...]] = [
        (arm, *(TableCell(cell, "number") for cell in cost_cells(cost))) for arm, cost in comparison.costs.items()
    ]
    return Table(columns, tuple(rows))


def _read_cells(
    comparison: Comparison,
) -> tuple[list[Evaluated], dict[str, dict[int, RunFiles]], list[str]]:
    """Results by evaluation and arm, the arms' training runs by seed, and what could not be read."""
    found: dict[tuple[int, str, str], dict[str, list[Result]]] = {}
    runs: dict[str, dict[int, RunFiles]] = {}
    unreadable = []
    by_arm = sorted(comparison.cells, key=lambda cell: list(comparison.plan.arms).index(cell.arm))
    for cell in by_arm:
        for number, results, problem in _results_of(cell):
            if problem:
                unreadable.append(f"{cell.arm}, seed {cell.seed}: {problem}")
            for result in results:
                key = (number, result.protocol, result.variant)
                found.setdefault(key, {}).setdefault(cell.arm, []).append(result)
        if (cell.folder / RUN).is_dir():
            try:
                runs.setdefault(cell.arm, {})[cell.seed] = read_run(cell.folder / RUN)
            except SmaltiError as error:
                unreadable.append(f"{cell.arm}, seed {cell.seed}: {error}")
    evaluated = [
        Evaluated(
            short_name(str(comparison.plan.evaluate[number]["data"]), comparison.plan),
            f"{protocol} ({variant})" if len([key for key in found if key[:2] == (number, protocol)]) > 1 else protocol,
            arms,
        )
        for (number, protocol, variant), arms in sorted(found.items(), key=lambda item: item[0][0])
    ]
    return evaluated, runs, unreadable


def _results_of(cell: Cell) -> list[tuple[int, list[Result], str]]:
    rows: list[tuple[int, list[Result], str]] = []
    for number in range(len(cell.evaluations)):
        try:
            rows.append((number, cell.results_of(number), ""))
        except SmaltiError as error:
            rows.append((number, [], str(error)))
    return rows


def _training(runs: Mapping[str, Mapping[int, RunFiles]]) -> Training:
    """The loss of each arm, and the scores of all arms during training."""
    losses = []
    for arm, seeds in runs.items():
        lines = tuple(
            Line(floats(files.log["loss"]), floats(files.log["step"]), f"seed {seed}")
            for seed, files in seeds.items()
            if files.log.get("loss")
        )
        method = next(iter(seeds.values())).setting("method", "")
        explanation = f"Training loss of {method}, one line per seed; lower is better, but only for the same method."
        chart = LineChart(f"Loss of {arm} against the step", explanation, lines, x_label="step", smooth=True)
        if not chart.is_constant:
            losses.append(Figure(f"{arm}: loss", explanation, chart))
    return Training(losses, _score_curves(runs))


def _score_curves(runs: Mapping[str, Mapping[int, RunFiles]]) -> list[Figure]:
    """A chart for each protocol and data set, a line for each arm: the mean at the steps that all its seeds have."""
    found: dict[tuple[str, str, str], dict[str, dict[int, list[float]]]] = {}
    for arm, seeds in runs.items():
        for files in seeds.values():
            for step, result in files.during:
                if result.metrics:
                    key = (result.protocol, result.headline[0], result.data)
                    found.setdefault(key, {}).setdefault(arm, {}).setdefault(step, []).append(result.headline[1])
    figures = []
    for (protocol, metric, data), arms in found.items():
        lines = []
        for arm, steps in arms.items():
            most = max(map(len, steps.values()))
            means = {step: float(np.mean(values)) for step, values in steps.items() if len(values) == most}
            lines.append(Line(floats(means.values()), floats(means), arm))
        title = f"{protocol} {metric} on {Path(data).name}"
        explanation = "Mean score over the seeds at steps of training, one line per arm."
        chart = LineChart(
            f"{title} against the step, for every arm", explanation, tuple(lines), x_label="step", has_points=True
        )
        figures.append(Figure(title, explanation, chart))
    return figures


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
