"""The page of a choice: the sentence, quality against time, every round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.charts import Point, ScatterChart
from smalti.choosing.candidates import short_name
from smalti.choosing.choose import PAGE, Choice, candidate_cells, candidate_columns, export_command
from smalti.evaluation.paired import gain_cells
from smalti.files import write_atomically
from smalti.report.parts import Fact, Figure, Kind, Summary, Table
from smalti.report.render import render
from smalti.runs.machine import describe_machine

_NOTE = (
    "Intervals of 95 % over the evaluated images, one seed. They are not corrected for the number of candidates: the "
    "best of many is a little worse than it looks; a new set of labelled images shows its true score."
)


@dataclass(frozen=True)
class ChoicePage:
    """All that the page shows."""

    title: str
    subtitle: str
    summary: Summary
    facts: Sequence[Fact]
    figures: Sequence[Figure]
    last: Table
    rounds: Sequence[tuple[str, Table]]
    """Heading and candidates of each round."""
    unscored: Sequence[str]
    adapted: Table | None
    failures: Mapping[str, str]
    agreement: Table | None
    export: str
    info: Mapping[str, Any]


def write_choice_page(choice: Choice, out: Path, command: str = "") -> Path:
    """Write the page as one HTML file that loads nothing, and return its path."""
    write_atomically(out / PAGE, render("choice", choice_page(choice, out.resolve().name, command)))
    return out / PAGE


def choice_page(choice: Choice, title: str, command: str = "") -> ChoicePage:
    """The data of the page."""
    done = choice.rounds[-1]
    kind: Kind = "unknown" if len(done.rows) < 2 else "better"
    scored = len(choice.rounds[0].scores)
    return ChoicePage(
        title=title,
        subtitle=f"encoders for {choice.labelled or choice.data}",
        summary=Summary(kind, tuple(choice.sentences), _NOTE),
        facts=(
            Fact(str(scored), "candidates: encoder, layer, size"),
            Fact(str(len(choice.rounds)), "rounds"),
            Fact(str(done.num_test), "images evaluated in the last"),
            Fact(f"{choice.minutes:.0f} min", f"of {choice.budget:g} min"),
        ),
        figures=[_figure(choice, number) for number in dict.fromkeys((len(choice.rounds) - 1, 0))],
        last=Table(candidate_columns(choice), tuple(candidate_cells(choice, row) for row in done.rows)),
        rounds=[_round(choice, number) for number in range(len(choice.rounds))],
        unscored=choice.unscored,
        adapted=Table(
            ("adapted by", "score after", "gain over the weights before", "verdict"),
            tuple((row.arm, f"{row.score.mean:.3f}", *gain_cells(row)) for row in choice.adapted),
        )
        if choice.adapted
        else None,
        failures=choice.failures,
        agreement=Table(
            ("score without labels", "Spearman correlation with the deciding score", "95 % interval"),
            tuple((name, f"{mean:+.2f}", f"{low:+.2f} to {high:+.2f}") for name, (mean, low, high) in items),
        )
        if (items := list(choice.agreement.items()))
        else None,
        export=export_command(choice),
        info={"command": command, **describe_machine()},
    )


def _figure(choice: Choice, number: int) -> Figure:
    done, is_last = choice.rounds[number], number == len(choice.rounds) - 1
    points, front = [], choice.front(done)
    for row, score in zip(done.rows, done.scores, strict=True):
        one = score.candidate
        points.append(
            Point(
                short_name(one.encoder),
                choice.costs[row.arm].ms_per_image,
                row.score.mean,
                row.score.low,
                row.score.high,
                f"{one.reading}, {one.image_size} px" if row.arm in front else "",
            )
        )
    names = [row.arm for row in done.rows]
    row = done.rows[0]
    chart = ScatterChart(
        f"{'Last round' if is_last else 'First round, all candidates'}: {done.num_test} images",
        tuple(points),
        tuple(names.index(name) for name in front),
        "milliseconds per image on this machine",
        f"{row.protocol} {row.metric}",
    )
    explanation = (
        "The joined, filled points are the candidates that no other beats in both score and time. Bars: 95 % intervals "
        "over images."
    )
    return Figure(chart.title, explanation, chart, is_wide=True)


def _round(choice: Choice, number: int) -> tuple[str, Table]:
    one = choice.rounds[number]
    metrics = [(name, metric) for name, result in one.scores[0].results.items() for metric in list(result.metrics)[:1]]
    rows = []
    for score in one.scores:
        values = [score.results[name].metrics.get(metric) for name, metric in metrics]
        rows.append(
            (
                score.candidate.name,
                *("" if value is None else f"{value:.3f}" for value in values),
                f"{score.seconds:.1f}",
                one.dropped.get(score.candidate.name, ""),
            )
        )
    heads = ("candidate", *(f"{name} {metric}" for name, metric in metrics), "seconds", "dropped because")
    learned = f"{one.num_train} images to learn from, " if one.num_train else ""
    return f"Round {number + 1}: {learned}{one.num_test} evaluated", Table(heads, tuple(rows))
