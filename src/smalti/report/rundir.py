"""What a run directory holds, read for people: every part but ``config.yaml`` may be missing."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.config import Tree, read_yaml
from smalti.errors import RunError, SmaltiError
from smalti.evaluation.details import INDEX, read_details
from smalti.evaluation.result import Result, read_results
from smalti.reading import as_number, read_csv, read_mapping
from smalti.runs.posttrain import VERDICT_FILE, Verdict, read_verdict


@dataclass(frozen=True)
class RunFiles:
    """A run directory, read."""

    path: Path
    config: Tree
    """Resolved settings, nested."""
    info: Tree
    """``run.json``: versions, machine, commit, times, command; empty if it is missing."""
    log: dict[str, list[float]]
    """Column -> values, a row a logged step; NaN if a cell is empty."""
    events: list[dict[str, str]]
    unreadable: list[dict[str, str]]
    results: list[Result]
    """Final evaluations: the newest of each protocol, data set and encoder."""
    during: list[tuple[int, Result]]
    """Evaluations in training and their steps, in order."""
    notes: list[str]
    """What could not be read, a sentence each."""
    verdict: Verdict | None = None
    """Of post-training: before against after."""

    @property
    def newest_results(self) -> list[Result]:
        """The final evaluations; if there are none, those of the last step during training, and the baselines."""
        last = self.during[-1][0] if self.during else 0
        return self.results or [result for step, result in self.during if step == last or result.is_baseline]

    @property
    def command(self) -> str:
        """The command that started the run; empty if it isn't known."""
        command = self.info.get("command") or ""
        return shlex.join(str(word) for word in command) if isinstance(command, list) else str(command)

    def setting(self, key: str, default: Any = None) -> Any:
        """A setting by its dotted key; the ``name`` of a group such as ``method``."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, dict):
            value = value.get("name")
        return default if value is None else value


def read_run(path: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        RunError: if there is no ``config.yaml`` in it.
    """
    if not (path / "config.yaml").is_file():
        raise RunError(f"{path}: is not a run directory (it has no config.yaml); give the --out of smalti train")
    notes: list[str] = []
    results, during = _read_all_results(path / "results", notes)
    log = _read_log(path / "log.csv", notes)
    if not log:
        notes.append("log.csv is missing or empty: no curves.")
    info = _read_info(path / "run.json", notes)
    verdict = None
    try:
        verdict = read_verdict(path)
    except SmaltiError as error:
        notes.append(f"{error}.")
    return RunFiles(
        path=path,
        config=read_yaml(path / "config.yaml"),
        info=info,
        log=log,
        events=_read_rows(path / "events.csv", notes),
        unreadable=_read_rows(path / "unreadable.csv", notes),
        results=results,
        during=during,
        notes=notes,
        verdict=verdict,
    )


def _read_rows(path: Path, notes: list[str]) -> list[dict[str, str]]:
    try:
        return read_csv(path) if path.is_file() else []
    except SmaltiError as error:
        notes.append(f"{error}.")
        return []


def _read_log(path: Path, notes: list[str]) -> dict[str, list[float]]:
    rows = [row for row in _read_rows(path, notes) if math.isfinite(as_number(row.get("step", "")))]
    return {key: [as_number(row[key]) for row in rows] for key in rows[0]} if rows else {}


def _identity(result: Result) -> tuple[str, str, str, str]:
    """What a newer result replaces: the same protocol, data, encoder and network of it."""
    weights = str(result.settings.get("weights", ""))
    network = weights.rpartition("(")[2].removesuffix(")") if weights.endswith(")") else ""
    return result.protocol, result.data, result.encoder, network


def _read_info(path: Path, notes: list[str]) -> Tree:
    try:
        return read_mapping(path)
    except SmaltiError:
        notes.append("run.json is missing or damaged: versions, machine and command aren't known.")
        return {}


def _read_all_results(folder: Path, notes: list[str]) -> tuple[list[Result], list[tuple[int, Result]]]:
    final: dict[tuple[str, str, str, str], Result] = {}
    during: list[tuple[int, Result]] = []
    written = (file for file in folder.glob("*.json") if file.name != VERDICT_FILE)
    files = sorted(written, key=lambda file: (file.stat().st_mtime, file.name))
    for file in files:
        try:
            results = read_results(file)
            if (file.with_suffix("") / INDEX).is_file():
                results = read_details(file.with_suffix(""), results)
        except SmaltiError as error:
            notes.append(f"{error}.")
            continue
        step = file.stem.removeprefix("step_")
        if step != file.stem and step.isdecimal():
            during += [(int(step), result) for result in results]
        else:
            final.update({_identity(result): result for result in results})
    return list(final.values()), sorted(during, key=lambda item: item[0])
