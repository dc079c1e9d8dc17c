"""The page of an evaluation that is not a run's: an encoder beside its baseline, with every figure."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.errors import ConfigError, DataError, RunError, SmaltiError
from smalti.evaluation.details import INDEX, read_details, write_details
from smalti.evaluation.result import Result, read_results, write_results
from smalti.files import is_free, write_atomically
from smalti.reading import read_mapping
from smalti.report.details import DetailSections, detail_sections
from smalti.report.parts import Summary, Table
from smalti.report.render import render
from smalti.report.verdict import conclude, pair_results, results_lead, results_table
from smalti.runs.machine import describe_machine

RESULTS_FILE, DETAILS, INFO, PAGE = "results.json", "details", "info.json", "report.html"


@dataclass(frozen=True)
class EvaluationPage:
    """All that the page shows."""

    title: str
    subtitle: str
    summary: Summary
    lead: str
    table: Table
    details: DetailSections
    info: Mapping[str, Any]
    settings: Sequence[tuple[str, Mapping[str, Any]]]
    """Protocol, data and encoder, and the settings of that result."""


def check_free(folder: Path) -> None:
    """Refuse a folder of something else.

    Raises:
        ConfigError: if there is something in it that :func:`save_evaluation` did not write.
    """
    is_ours = (folder / INFO).is_file() or (folder / RESULTS_FILE).is_file()
    if not is_ours and not is_free(folder):
        raise ConfigError(f"{folder}: is not empty and holds no evaluation; choose another --out")


def save_evaluation(folder: Path, results: Sequence[Result], command: str = "") -> Path:
    """Write results, their details and the page; replaces an older evaluation there.

    Args:
        folder: new, empty, or of an older evaluation.
        results: of :func:`smalti.evaluation.protocol.evaluate`; with ``figures=True`` the page has feature maps.
        command: that made them.

    Returns:
        The page.

    Raises:
        ConfigError: if the folder holds something else, or can't be written.
    """
    check_free(folder)
    info = {"command": command, **describe_machine()}
    write_atomically(folder / INFO, json.dumps(info, indent=1, ensure_ascii=False) + "\n")
    (folder / RESULTS_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / DETAILS, ignore_errors=True)
    write_details(folder / DETAILS, results)
    write_results(folder / RESULTS_FILE, list(results))  # last: a folder with it is whole
    return write_evaluation(folder)


def write_evaluation(folder: Path, out: Path | None = None) -> Path:
    """Write the page of an evaluation's folder as one HTML file that loads nothing.

    Raises:
        RunError: if the folder holds no evaluation.
        ConfigError: if ``out`` can't be written.
    """
    if not (folder / RESULTS_FILE).is_file():
        raise RunError(f"{folder}: holds no evaluation (it has no {RESULTS_FILE}); smalti evaluate --out makes one")
    results = read_results(folder / RESULTS_FILE)
    problem = ""
    try:
        if (folder / DETAILS / INDEX).is_file():
            results = read_details(folder / DETAILS, results)
    except SmaltiError as error:
        problem = f"No figures: {error}."
    out = out or folder / PAGE
    write_atomically(out, render("evaluation", evaluation_page(folder, results, problem)))
    return out


def evaluation_page(folder: Path, results: Sequence[Result], problem: str = "") -> EvaluationPage:
    """The data of the page.

    Args:
        folder: of the evaluation.
        results: with their details, if these could be read.
        problem: why there are no figures.
    """
    pairs = pair_results(results)
    kind, sentence = conclude(pairs)
    note = "One seed of what is fitted, and of the baseline: a small difference may be chance."
    try:
        info = read_mapping(folder / INFO)
    except DataError:
        info = {}
    return EvaluationPage(
        title=", ".join(dict.fromkeys(pair.result.subject for pair in pairs)),
        subtitle=f"evaluated on {', '.join(dict.fromkeys(pair.result.data for pair in pairs))}",
        summary=Summary(kind, tuple(filter(None, (sentence, problem))), note),
        lead=results_lead(pairs),
        table=results_table(pairs),
        details=detail_sections([pair.evaluated for pair in pairs]),
        info=info,
        settings=[(f"{one.protocol} on {one.data}, {one.encoder}", one.settings) for one in results],
    )
