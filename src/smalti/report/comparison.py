"""The page of a comparison: verdict first, numbers with intervals, cost, every figure for all arms side by side."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smalti.comparison.cell import RUN
from smalti.comparison.outcome import Cell, Comparison
from smalti.comparison.run import PAGE, read_comparison
from smalti.comparison.tables import COST_COLUMNS, cost_cells, short_name
from smalti.config import flatten, to_tree
from smalti.errors import SmaltiError
from smalti.evaluation.intervals import few_seeds
from smalti.evaluation.paired import NO_DIFFERENCE, Row, about_lines, gain_cells, table_cells
from smalti.evaluation.result import Result
from smalti.files import write_atomically
from smalti.report.details import Evaluated, detail_sections
from smalti.report.figures import ForestRow, forest_chart, line_chart
from smalti.report.html import (
    Html,
    chart_figure,
    fact_boxes,
    join,
    missing,
    settings_table,
    tag,
    verdict_box,
    whole_page,
)
from smalti.report.rundir import RunFiles, read_run

_MAX_SENTENCES = 12


def write_comparison(source: Comparison | Path, out: Path | None = None) -> Path:
    """Write the page of a comparison as one HTML file that needs nothing beside it, network included.

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
    write_atomically(out, _page(comparison))
    return out


def sentences(comparison: Comparison) -> tuple[str, list[str]]:
    """What the numbers allow to say: ``better``, ``same``, ``worse`` or ``unknown``, and a few sentences for each arm.

    First the gains of trained arms over their own networks before training, then the differences to the first arm. The
    kind is that of the gains where arms were trained, else that of the differences: ``better`` if some arm is better in
    some evaluation, ``worse`` if some are only worse.
    """
    first = next(iter(comparison.plan.arms))
    headlines = [row for row in comparison.rows if row.is_headline]
    said = [text for arm in comparison.plan.arms for text in _gains(arm, [row for row in headlines if row.arm == arm])]
    words: set[str] = set()
    gained = {row.gain_verdict for row in headlines if row.gain is not None}
    for arm in comparison.plan.arms:
        if arm in comparison.failures:
            done = any(row.arm == arm for row in headlines)
            part = " at some of its seeds; what follows is from the others" if done else " and has no results"
            said.append(f"{arm} failed{part}: {comparison.failures[arm]}")
        by_word: dict[str, list[str]] = {}
        for row in headlines:
            if row.arm == arm and row.verdict and row.difference is not None:
                by_word.setdefault(row.verdict, []).append(f"{_title(row)} ({_gap(row)})")
                words.add(row.verdict)
        for word, where in by_word.items():
            said.append(_sentence(arm, first, word, where))
    if not any(row.difference for row in headlines):
        alone = "it is the only arm with results" if len(comparison.arms) == 1 else "it has no results"
        said.append(f"Nothing can be compared with {first}, the first arm: {alone}.")
    words = gained or words
    kind = next((k for k in ("better", "worse") if k in words), "same" if NO_DIFFERENCE in words else "unknown")
    return kind, said


def _gains(arm: str, rows: Sequence[Row]) -> list[str]:
    """A sentence per verdict on what training was worth."""
    by_word: dict[str, list[str]] = {}
    for row in rows:
        if row.gain is not None:
            by_word.setdefault(row.gain_verdict, []).append(f"{_title(row)} ({gain_cells(row)[0]})")
    over = next((row.gain_over for row in rows if row.gain_over), "")
    whole = {"before": "the weights that it started from"}.get(over, "its own network untrained")
    said = []
    for word, where in by_word.items():
        listed = "; ".join(where)
        if word == NO_DIFFERENCE:
            said.append(f"No gain of {arm} over {whole} was found in {listed}.")
        elif word in ("better", "worse", "higher", "lower"):
            said.append(f"{arm} is {word} than {whole} in {listed}.")
        else:
            said.append(f"{arm} against {whole}: {word}, so nothing can be said of {listed}.")
    return said


def _sentence(arm: str, first: str, word: str, where: Sequence[str]) -> str:
    listed = "; ".join(where)
    if word == NO_DIFFERENCE:
        return f"No difference found between {arm} and {first} in {listed}."
    if word in ("better", "worse", "higher", "lower"):
        return f"{arm} is {word} than {first} in {listed}."
    return f"{arm} against {first}: {word}, so nothing can be said of {listed}."


def _title(row: Row) -> str:
    return f"{row.protocol} {row.metric} on {row.data}"


def _gap(row: Row) -> str:
    return table_cells([row])[0][3]


def _page(comparison: Comparison) -> str:
    kind, said = sentences(comparison)
    judged, runs, lost = _read_cells(comparison)
    shown = said[:_MAX_SENTENCES]
    if len(said) > len(shown):
        shown.append(f"{len(said) - len(shown)} further sentences are in the tables below.")
    caution = (
        "Intervals of 95 % over evaluated images and seeds; “no difference found” is not “no difference”. Each "
        "comparison stands by itself: among twenty comparisons of equal arms, one difference is expected to be found."
    )
    if few := few_seeds(len(comparison.plan.seeds)):
        caution = f"{few} {caution}"
    sections: dict[str, tuple[str, Html | None]] = {
        "results": ("Results", _results(comparison)),
        "cost": ("Cost", _costs(comparison)),
        "training": ("Training", _training(runs)),
        **detail_sections(judged),
        "broke": ("Failures", _broke(comparison, lost)),
        "settings": ("What was run", _settings(comparison)),
    }
    name = comparison.out.resolve().name
    return whole_page(
        name, _subtitle(comparison), verdict_box(kind, shown, caution), sections, facts=_facts(comparison)
    )


def _subtitle(comparison: Comparison) -> str:
    plan = comparison.plan
    trained = f", trained on {plan.data}" if plan.data else ""
    return (
        f"{', '.join(plan.arms)}: under one budget{trained}" if plan.budget else f"{', '.join(plan.arms)}, as they are"
    )


def _facts(comparison: Comparison) -> Html:
    plan, machine = comparison.plan, comparison.info.get("machine", {})
    budget = [(f"{value:,g}", f"{name}, the budget of each arm") for name, value in plan.budget.items()]
    return fact_boxes(
        [
            (str(len(plan.arms)), "arms"),
            (", ".join(map(str, plan.seeds)), "seeds" if len(plan.seeds) > 1 else "seed"),
            *budget,
            (str(len(comparison.table())), "evaluations"),
            (f"{machine.get('cores', '–')}", f"cores; {', '.join(machine.get('gpus', ())) or 'no GPU'}"),
            (str(comparison.info.get("commit") or "–"), "commit of Smalti"),
        ]
    )


def _results(comparison: Comparison) -> Html:
    first = next(iter(comparison.plan.arms))
    parts: list[Html | None] = [
        tag(
            "p",
            f"Mean over seeds and, in brackets, its interval. The gain is over the arm's own network before training, "
            f"the difference to {first}; both are paired: the same images and the same seeds. A hollow mark: the "
            "interval of the difference includes zero.",
            class_="lead",
        )
    ]
    for title, rows in comparison.table():
        parts += [tag("h3", f"{title} ({rows[0].unit})"), _table(rows, first), _forest(title, rows, first)]
    others = [(title, rows) for title, rows in comparison.table(headlines=False) if not rows[0].is_headline]
    if others:
        tables = (join((tag("h3", f"{title} ({rows[0].unit})"), _table(rows, first))) for title, rows in others)
        parts.append(tag("details", tag("summary", f"All other metrics ({len(others)})"), *tables))
    return join(parts)


def _table(rows: Sequence[Row], first: str) -> Html:
    labels = dict.fromkeys(row.gain_over for row in rows if row.gain_over)
    gains = (f"gain over {' or '.join(labels)}", "") if labels else ()
    head = tag("tr", *(tag("th", t) for t in ("arm", "mean", "seeds", *gains, f"difference to {first}", "")))
    lines = []
    for row, (arm, mean, seeds, gap, word) in zip(rows, table_cells(rows), strict=True):
        gain, gain_word = gain_cells(row)
        over = tag("span", f" over {row.score.over}", class_="muted")
        lines.append(
            tag(
                "tr",
                tag("td", arm, class_="path"),
                tag("td", mean, over),
                tag("td", seeds, class_="muted"),
                *((tag("td", gain), _word(gain_word)) if labels else ()),
                tag("td", gap),
                _word(word),
            )
        )
    about = (tag("div", line, class_="muted") for line in about_lines(rows))
    table = tag("table", tag("thead", head), tag("tbody", *lines), class_="numbers")
    return join((*about, tag("div", table, class_="scroll")))


def _word(word: str) -> Html:
    return tag("td", word, class_=f"word {word if word in ('better', 'worse') else ''}")


def _forest(title: str, rows: Sequence[Row], first: str) -> Html:
    drawn = [
        ForestRow(
            row.arm,
            row.score.mean,
            row.score.low,
            row.score.high,
            tuple(row.seeds.values()),
            *((row.difference.mean, row.difference.low, row.difference.high) if row.difference else ()),
        )
        for row in rows
    ]
    return tag("figure", Html(forest_chart(f"{title}: means and differences", drawn, first)), class_="forest")


def _costs(comparison: Comparison) -> Html:
    head = tag("tr", tag("th", "arm"), *(tag("th", name, class_="number") for name in COST_COLUMNS))
    rows = (
        tag("tr", tag("td", arm, class_="path"), *(tag("td", cell, class_="number") for cell in cost_cells(cost)))
        for arm, cost in comparison.costs.items()
    )
    lead = tag(
        "p",
        "Mean over seeds. Training only, but for the time of evaluation; of an arm that isn't trained, the peak memory "
        "is that of its evaluation. ≥: a cell was cut short, and its first part isn't counted.",
        class_="lead",
    )
    return join((lead, tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="scroll")))


def _read_cells(
    comparison: Comparison,
) -> tuple[list[Evaluated], dict[str, dict[int, RunFiles]], list[str]]:
    """Results by evaluation and arm, the arms' training runs by seed, and what could not be read."""
    found: dict[tuple[int, str, int], dict[str, list[Result]]] = {}
    runs: dict[str, dict[int, RunFiles]] = {}
    lost = []
    by_arm = sorted(comparison.cells, key=lambda cell: list(comparison.plan.arms).index(cell.arm))
    for cell in by_arm:
        for number, results, problem in _results_of(cell):
            if problem:
                lost.append(f"{cell.arm}, seed {cell.seed}: {problem}")
            for result in results:
                key = (number, result.protocol, _num_clusters(result))
                found.setdefault(key, {}).setdefault(cell.arm, []).append(result)
        if (cell.folder / RUN).is_dir():
            try:
                runs.setdefault(cell.arm, {})[cell.seed] = read_run(cell.folder / RUN)
            except SmaltiError as error:
                lost.append(f"{cell.arm}, seed {cell.seed}: {error}")
    judged = [
        Evaluated(
            short_name(str(comparison.plan.evaluate[number]["data"]), comparison.plan),
            f"{protocol} (K = {clusters})"
            if len([key for key in found if key[:2] == (number, protocol)]) > 1
            else protocol,
            arms,
        )
        for (number, protocol, clusters), arms in sorted(found.items(), key=lambda item: item[0][0])
    ]
    return judged, runs, lost


def _num_clusters(result: Result) -> int:
    """Of overclustering: K of what stands class by class and in pictures, which must be the same in one figure; else
    0."""
    return max(result.settings.get("clusters") or (0,))


def _results_of(cell: Cell) -> list[tuple[int, list[Result], str]]:
    rows: list[tuple[int, list[Result], str]] = []
    for number in range(len(cell.evaluations)):
        try:
            rows.append((number, cell.results_of(number), ""))
        except SmaltiError as error:
            rows.append((number, [], str(error)))
    return rows


def _training(runs: Mapping[str, Mapping[int, RunFiles]]) -> Html | None:
    if not runs:
        return None
    charts = []
    for arm, seeds in runs.items():
        lines = {
            f"seed {seed}": (files.log["step"], files.log["loss"])
            for seed, files in seeds.items()
            if files.log.get("loss")
        }
        method = next(iter(seeds.values())).setting("method", "")
        if lines:
            svg = line_chart(f"Loss of {arm} against the step", lines, smooth=True)
            charts.append(chart_figure(f"{arm}: loss", f"{method}, each seed", svg))
    lead = tag(
        "p",
        "Loss against the step. Every method has a loss of its own: that of one arm says nothing beside that of "
        "another. What can be compared are scores.",
        class_="lead",
    )
    metrics = _metric_curves(runs)
    if not metrics:
        none = (
            "No arm was evaluated in training (the plan's settings eval.data and eval.every), so no curves of scores."
        )
        return join((lead, tag("div", *charts, class_="charts"), missing(none)))
    title = tag("h3", "Scores in training, mean over seeds")
    return join((lead, tag("div", *charts, class_="charts"), title, tag("div", *metrics, class_="charts")))


def _metric_curves(runs: Mapping[str, Mapping[int, RunFiles]]) -> list[Html]:
    """A chart for each protocol and data set, a line an arm: the mean at the steps that all its seeds have."""
    found: dict[tuple[str, str, str], dict[str, dict[int, list[float]]]] = {}
    for arm, seeds in runs.items():
        for files in seeds.values():
            for step, result in files.during:
                if result.metrics:
                    key = (result.protocol, result.headline[0], result.data)
                    found.setdefault(key, {}).setdefault(arm, {}).setdefault(step, []).append(result.headline[1])
    charts = []
    for (protocol, metric, data), arms in found.items():
        lines = {}
        for arm, steps in arms.items():
            most = max(map(len, steps.values()))
            whole = {step: float(np.mean(values)) for step, values in steps.items() if len(values) == most}
            lines[arm] = (list(map(float, whole)), list(whole.values()))
        title = f"{protocol} {metric} on {Path(data).name}"
        svg = line_chart(f"{title} against the step, for every arm", lines, points=True)
        charts.append(chart_figure(title, "against the step", svg))
    return charts


def _broke(comparison: Comparison, lost: Sequence[str]) -> Html:
    parts = [
        tag("p", tag("b", arm), f" failed: {error}", class_="broke") for arm, error in comparison.failures.items()
    ] or [tag("p", "Nothing: all arms came through.", class_="muted")]
    gone = [f"{cell.arm}, seed {cell.seed}" for cell in comparison.cells if not cell.folder.is_dir()]
    if gone:
        words = f"Removed since, so numbers stand in the tables and figures are without: {'; '.join(gone)}."
        parts.append(missing(words))
    there = [line for line in lost if not any(line.startswith(f"{name}:") for name in gone)]
    parts += [missing(f"Can't be read, {line}.") for line in there]
    return join(parts)


def _settings(comparison: Comparison) -> Html:
    plan = flatten(to_tree(comparison.plan))
    info: dict[str, Any] = {key: value for key, value in comparison.info.items() if not _is_nan(value)}
    command = f"smalti compare {comparison.out / 'plan.yaml'} --out DIR"
    return join(
        (
            settings_table(info),
            tag("details", tag("summary", "The plan (plan.yaml)"), settings_table(plan), open="open"),
            tag("p", "The same plan anew, with the same data and the same Smalti:", class_="lead"),
            tag("pre", command),
        )
    )


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
