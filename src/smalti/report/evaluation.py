"""The page of an evaluation that is not a run's: an encoder beside its baseline, with every figure."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from smalti.errors import ConfigError, DataError, RunError, SmaltiError
from smalti.evaluation.details import INDEX, read_details, write_details
from smalti.evaluation.result import Result, read_results, write_results
from smalti.files import is_free, write_atomically
from smalti.reading import read_mapping
from smalti.report.details import detail_sections
from smalti.report.html import Html, settings_table, tag, verdict_box, whole_page
from smalti.report.page import compare, judged, results_table, verdict
from smalti.runs.machine import describe_machine

RESULTS_FILE, DETAILS, INFO, PAGE = "results.json", "details", "info.json", "report.html"


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
    """Write the page of an evaluation's folder as one HTML file that needs nothing beside it, network included.

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
    write_atomically(out, _page(folder, results, problem))
    return out


def _page(folder: Path, results: Sequence[Result], problem: str) -> str:
    comparisons = compare(results)
    kind, sentence = verdict(comparisons)
    pairs = [judged(pair) for pair in comparisons]
    details = detail_sections(pairs)
    said = [sentence, problem] if problem else [sentence]
    caution = "One seed of what is fitted, and of the baseline: a small difference may be chance."
    sections = {"results": ("Results", results_table(comparisons)), **details}
    sections["settings"] = ("What was run", _settings(folder, results))
    names = ", ".join(
        dict.fromkeys(str(pair.trained.settings.get("generated") or pair.trained.encoder) for pair in comparisons)
    )
    sets = ", ".join(dict.fromkeys(pair.trained.data for pair in comparisons))
    return whole_page(names, f"evaluated on {sets}", verdict_box(kind, said, caution), sections)


def _settings(folder: Path, results: Sequence[Result]) -> Html:
    try:
        info = read_mapping(folder / INFO)
    except DataError:
        info = {}
    parts = [settings_table(info)] if info else []
    parts += [
        tag("details", tag("summary", f"{r.protocol} on {r.data}, {r.encoder}"), settings_table(r.settings))
        for r in results
    ]
    return tag("div", *parts)
