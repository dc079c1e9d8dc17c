"""Compare methods and encoders on the user's own data: several seeds, equal budgets, one table with intervals.

An arm is a method to train or an existing encoder. Every cell (arm and seed) runs in its own process
(:mod:`smalti.comparison.cell`) and is cached by its settings and data. Interrupted comparisons therefore resume, and an
extended plan runs only the new cells. Every trained cell is also evaluated before training; the table reports the gain
over that baseline. An arm that fails doesn't stop the others.
"""

import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smalti.comparison.arm_data import first_data, has_recordings, own_path, read_recordings, with_data
from smalti.comparison.cell import (
    FAILED,
    RESULTS_FILE,
    TRAINED,
    Job,
    evaluation_key,
    is_trained,
    run_cell,
)
from smalti.comparison.outcome import Cell, Comparison, Cost
from smalti.comparison.plan import CELLS, Plan, baseline_job, load_job, read_plan, source_arm, taken, train_job
from smalti.comparison.tables import markdown, short_name
from smalti.config import (
    Tree,
    build,
    merge,
    read_yaml,
    to_tree,
    write_yaml,
)
from smalti.data.images.folders import ImageSet, open_images
from smalti.data.images.pixels import NO_PIXELS, trained_pixels
from smalti.data.signals.signal_set import SignalSet
from smalti.errors import ConfigError, Interrupted, RunError, SmaltiError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.evaluate import open_sets
from smalti.evaluation.intervals import LEVEL, RESAMPLINGS, Interval, few_seeds
from smalti.evaluation.paired import (
    Row,
    metric_rows,
    read_row,
    row_tree,
    shared_headline,
)
from smalti.evaluation.protocol import find_protocol
from smalti.evaluation.result import Result
from smalti.files import check_folder, is_free, remove_leftovers, write_atomically
from smalti.reading import read_mapping, reading
from smalti.runs.lock import locked
from smalti.runs.machine import describe_machine
from smalti.training.processes import STOPPED, run_process

PLAN_FILE, TABLE, MARKDOWN, SUMMARY = "plan.yaml", "comparison.parquet", "comparison.md", "compare.json"
PAGE = "report.html"
"""The HTML page, written by :mod:`smalti.report.comparison`."""


@dataclass(frozen=True)
class _Arm:
    """A prepared arm: one job per seed, or an error."""

    jobs: tuple[Job, ...]
    baselines: tuple[Job, ...] = ()
    """Jobs that evaluate the networks of a trained arm before training."""
    error: str = ""


def compare(
    plan: str | Path | Mapping[str, Any] | Plan, out: str | Path, *, quiet: bool = False, isolate: bool = True
) -> Comparison:
    """Train and evaluate all cells of a plan and write the comparison; implements ``smalti compare``.

    Args:
        plan: a YAML file, a tree, or what :func:`read_plan` made of one.
        out: a folder for cells and tables; finished cells in it are reused.
        quiet: show no progress.
        isolate: run each cell in its own process, which measures its peak memory and contains a crash. Otherwise cells
            run in this process: quicker to start, but the peak is that of all cells so far.

    Raises:
        ConfigError, DataError: if the plan is invalid.
        RunError: if all arms failed.
    """
    plan = plan if isinstance(plan, Plan) else read_plan(plan)
    folder = Path(out).expanduser()
    if not is_free(folder) and not (folder / PLAN_FILE).is_file():
        raise ConfigError(f"{folder}: is not empty and not a comparison; choose another --out")
    check_folder(folder)
    started = time.time()
    data: ImageSet | SignalSet | None
    evaluated: Sequence[ImageSet | SignalSet]
    of_recordings = has_recordings(plan)
    if of_recordings:
        first = first_data(plan)
        data, evaluated = first.training, first.evaluated
    else:
        for entry in plan.evaluate:
            open_sets(entry["data"], build(EvalConfig, {**entry, "split_seed": plan.split_seed}, "evaluate"))
        data = open_images(plan.data) if plan.data else None
        evaluated = [open_images(entry["data"], class_depth=entry.get("class_depth")) for entry in plan.evaluate]
    for name, one in (("train on", data), *(("evaluate on", images) for images in evaluated)):
        if one is not None:
            _note(f"{name}: {one.account()}", quiet)
    images = data.training() if data is not None else None
    arms: dict[str, _Arm] = {}
    for name in plan.arms:
        arms[name] = _prepare(name, plan, folder, images, evaluated, quiet, arms)
    failures = {name: arm.error for name, arm in arms.items() if arm.error}
    for name, error in failures.items():
        _note(f"arm '{name}' can't run: {error}", quiet=False)
    with locked(folder):
        remove_leftovers(folder)
        write_yaml(folder / PLAN_FILE, to_tree(plan))
        cells = _run_all(plan, arms, failures, quiet, isolate)
    if not cells:
        raise RunError(f"{folder}: all arms failed; {'; '.join(f'{name}: {e}' for name, e in failures.items())}")
    rows = _rows(plan, cells)
    unit = "recordings" if of_recordings else "images"
    info = {
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "took_s": round(time.time() - started, 1),
        "intervals": f"{LEVEL:.0%}, percentile bootstrap with {RESAMPLINGS} resamplings of {_resampled(rows, unit)} "
        "and seeds; seeds widened by sqrt(S/(S-1)) and Student's quantile; no correction for multiple comparisons",
        "few_seeds": few_seeds(len(plan.seeds), unit),
        "resampled": unit,
        "samples": "windows" if of_recordings else "images",
        **describe_machine(),
    }
    costs = {arm: _cost([cell for cell in cells if cell.arm == arm]) for arm in plan.arms}
    costs = {arm: cost for arm, cost in costs.items() if any(cell.arm == arm for cell in cells)}
    result = Comparison(folder, plan, tuple(rows), tuple(cells), failures, costs, info)
    _write(result)
    return result


def read_comparison(out: str | Path) -> Comparison:
    """Load the outcome of :func:`compare` from the summary in its folder; the cells may have been removed since.

    Raises:
        RunError: if there is no finished comparison in it.
    """
    folder = Path(out).expanduser()
    if not (folder / SUMMARY).is_file():
        raise RunError(f"{folder}: contains no complete comparison; smalti compare PLAN --out writes one")
    with reading(folder / SUMMARY, "the summary of a comparison", RunError):
        summary = json.loads((folder / SUMMARY).read_bytes())
        rows = tuple(read_row(row) for row in summary["rows"])
        plan = build(Plan, read_yaml(folder / PLAN_FILE), str(folder / PLAN_FILE))
        return Comparison(
            out=folder,
            plan=plan,
            rows=rows,
            cells=tuple(
                Cell(
                    cell["arm"],
                    cell["seed"],
                    folder / CELLS / cell["folder"],
                    tuple(cell["evaluations"]),
                    folder / CELLS / cell["baseline"] if cell["baseline"] else None,
                )
                for cell in summary["cells"]
            ),
            failures=summary["failures"],
            costs={arm: Cost(**cost) for arm, cost in summary["costs"].items()},
            info=summary["info"],
        )


def _prepare(
    name: str,
    plan: Plan,
    out: Path,
    images: ImageSet | SignalSet | None,
    evaluated: Sequence[ImageSet | SignalSet],
    quiet: bool,
    above: Mapping[str, _Arm],
) -> _Arm:
    """The jobs of an arm, or the error where one can be detected before it runs; ``above``: the arms before it."""
    arm = dict(plan.arms[name])
    own_eval = arm.pop("eval", {})
    try:
        if (own_data := own_path(arm)) and not isinstance(evaluated[0], SignalSet):
            images = open_images(own_data).training()
        source = source_arm(name, plan)
        if source is not None and not above[source].jobs:
            raise ConfigError(f"arm '{source}', whose weights it starts from, can't run")
        pixels = to_tree(trained_pixels(merge(plan.settings, {"data": arm.get("data") or {}})))
        pixels = {key: value for key, value in pixels.items() if value != getattr(NO_PIXELS, key)}
        evaluations: Sequence[Tree] = [
            {**pixels, **entry, **own_eval, "split_seed": plan.split_seed, "data": entry["data"]}
            for entry in plan.evaluate
        ]
        if isinstance(evaluated[0], SignalSet):
            read = read_recordings(arm, plan, evaluations)
            arm, plan = with_data(arm, plan, read)
            evaluations, evaluated = read.entries, read.evaluated
            images = read.training.training() if read.training is not None else None
        for entry in evaluations:
            for protocol in build(EvalConfig, entry, f"arm '{name}': eval").protocols:
                find_protocol(protocol)
        jobs, baselines = [], []
        for number, seed in enumerate(plan.seeds):
            what = {
                "name": f"{name} seed {seed}",
                "seed": seed,
                "quiet": quiet,
                "evaluations": tuple(
                    {"key": evaluation_key(entry, one, seed), "data": entry["data"], "settings": entry}
                    for entry, one in zip(evaluations, evaluated, strict=True)
                ),
            }
            if taken(arm) is not None:
                jobs.append(load_job(arm, seed, out, plan, what))
            else:
                assert images is not None
                start = above[source].jobs[number] if source is not None else None
                jobs.append(train_job(arm, seed, out, plan, images, what, start))
                baselines.append(baseline_job(jobs[-1], out))
        return _Arm(tuple(jobs), tuple(baselines))
    except SmaltiError as error:
        return _Arm((), error=str(error))


def _run_all(plan: Plan, arms: Mapping[str, _Arm], failures: dict[str, str], quiet: bool, isolate: bool) -> list[Cell]:
    """Run all cells seed by seed, so that early results are comparable; adds to ``failures``."""
    order = [(name, number) for number in range(len(plan.seeds)) for name in plan.arms if arms[name].jobs]
    started, done_now = time.monotonic(), 0
    for name, arm in arms.items():
        if not all(_is_done(job) for job in arm.jobs):
            _measure(name, arm.jobs[0], quiet, isolate)
    waiting = sum(not _is_done(arms[name].jobs[number]) for name, number in order)
    cells = []
    for place, (name, number) in enumerate(order, 1):
        job = arms[name].jobs[number]
        baseline = arms[name].baselines[number] if arms[name].baselines else None
        was_done, error = _is_done(job), ""
        if not was_done:
            left = (time.monotonic() - started) / done_now * (waiting - done_now) if done_now else math.nan
            eta = f", about {left / 60:.0f} min left" if done_now else ""
            _note(f"[{place}/{len(order)}] {job.name}{eta}", quiet)
            error = _run(job, isolate)
            done_now += 1
        else:
            _note(f"[{place}/{len(order)}] {job.name}: done before", quiet)
        if not error and baseline is not None and not _is_done(baseline):
            error = _run(baseline, isolate)
        if error:
            _note(f"arm '{name}' failed at seed {job.seed}: {error}", quiet=False)
            failures.setdefault(name, f"seed {job.seed}: {error}")
            continue
        keys = tuple(entry["key"] for entry in job.evaluations)
        cells.append(Cell(name, job.seed, Path(job.folder), keys, Path(baseline.folder) if baseline else None))
    return cells


def _measure(name: str, job: Job, quiet: bool, isolate: bool) -> None:
    """Measure the steps of an arm that fit into a budget of time, before the first arm is trained: all on the same
    machine, whenever the rest follows. An arm that starts from another's weights waits for these; a failure is
    reported when the arm is trained."""
    if job.steps_file and not job.start and not Path(job.steps_file).is_file():
        _note(f"measuring a step of {name}", quiet)
        _run(dataclasses.replace(job, measures=True), isolate)


def _is_done(job: Job) -> bool:
    folder = Path(job.folder)
    trained = not is_trained(job) or (folder / TRAINED).is_file()
    return trained and all((folder / entry["key"] / RESULTS_FILE).is_file() for entry in job.evaluations)


def _run(job: Job, isolate: bool) -> str:
    """Run a cell; returns the error message, or None."""
    folder = Path(job.folder)
    if not isolate:
        try:
            run_cell(job)
        except SmaltiError as error:
            return str(error)
        except Exception as error:  # a bug in one arm must not cost the others their results
            return f"{type(error).__name__}: {error}"
        return ""
    path = folder / "job.json"
    write_atomically(path, json.dumps(to_tree(job), indent=1))
    command = [sys.executable, "-m", "smalti.comparison.cell", str(path), str(os.getpid())]
    code, asked = run_process(command, {**os.environ, "PYTHONUNBUFFERED": "1"})
    if code in STOPPED and not asked:  # the cell was stopped from outside, not the comparison
        asked = STOPPED[code]
    if asked:
        raise Interrupted(asked, f"interrupted by {signal.Signals(asked).name}; the same command resumes")
    if code == 0:
        return ""
    try:
        return (folder / FAILED).read_text(encoding="utf-8").strip()
    except OSError:
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"its process ended with {reason}" + (" (out of memory?)" if code == -9 else "")


def _rows(plan: Plan, cells: Sequence[Cell]) -> list[Row]:
    """Every metric of every arm with intervals: differences to the plan's first arm, gains over the arm's network
    before training."""
    found: dict[tuple[int, str, str], dict[str, dict[int, Result]]] = {}
    before: dict[tuple[int, str], dict[str, dict[int, Result]]] = {}
    of_protocol: dict[tuple[int, str], list[Result]] = {}
    for cell in cells:
        for number in range(len(cell.evaluations)):
            for result in cell.results_of(number):
                of_protocol.setdefault((number, result.protocol), []).append(result)
                for metric in result.metrics:
                    place = found.setdefault((number, result.protocol, metric), {})
                    place.setdefault(cell.arm, {})[cell.seed] = result
            for result in cell.baseline_of(number):
                before.setdefault((number, result.protocol), {}).setdefault(cell.arm, {})[cell.seed] = result
    rows: list[Row] = []
    for (number, protocol, metric), by_arm in sorted(found.items(), key=lambda item: item[0][0]):
        ordered = {arm: by_arm[arm] for arm in plan.arms if arm in by_arm}
        data, first = short_name(plan.evaluate[number]["data"], plan), next(iter(plan.arms))
        groups, headline = plan.evaluate[number].get("groups"), shared_headline(of_protocol[number, protocol])
        rows += metric_rows(ordered, metric, data, first, before.get((number, protocol)), groups, headline)
    return rows


def _resampled(rows: Sequence[Row], unit: str) -> str:
    """What the intervals resample: images or recordings, and groups of them."""
    over = {part for row in rows for part in row.score.over.split(" and ")}
    if "groups" in over:
        return f"{unit} (of groups, if defined)"
    return f"{unit} (of subjects, if one has several)" if "subjects" in over else unit


def _cost(cells: Sequence[Cell]) -> Cost:
    """Mean over the cells of an arm."""
    trained, evaluated = [], []
    parameters = 0
    for cell in cells:
        if (cell.folder / TRAINED).is_file():
            trained.append(read_mapping(cell.folder / TRAINED, error=RunError))
        for key in cell.evaluations:
            evaluated.append(read_mapping(cell.folder / key / "cost.json", error=RunError))
            parameters = int(evaluated[-1].get("parameters", parameters))

    def mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
        return float(np.mean([row[key] for row in rows])) if rows else 0.0

    return Cost(
        steps=mean(trained, "steps"),
        images_seen=mean(trained, "images_seen"),
        wall_s=mean(trained, "wall_s"),
        cpu_s=mean(trained, "cpu_s"),
        gpu_s=mean(trained, "gpu_s"),
        peak_mib=max((row["peak_mib"] for row in trained or evaluated), default=0.0),
        eval_s=mean(evaluated, "wall_s") * len(evaluated) / max(len(cells), 1),
        parameters=parameters,
        is_partial=any(row["resumed"] for row in trained),
    )


def _write(comparison: Comparison) -> None:
    """Write the tables as Parquet and Markdown, and the JSON for the report."""
    columns: dict[str, list[Any]] = {}
    for row in comparison.rows:
        against, gain = (gap or Interval(math.nan, math.nan, math.nan, "") for gap in (row.difference, row.gain))
        cost = comparison.costs[row.arm]
        cells = {
            **{name: getattr(row, name) for name in ("data", "protocol", "metric", "unit", "arm", "is_headline")},
            **{"mean": row.score.mean, "low": row.score.low, "high": row.score.high, "interval_over": row.score.over},
            "seeds": list(row.seeds),
            "scores": list(row.seeds.values()),
            "difference": against.mean,
            "difference_low": against.low,
            "difference_high": against.high,
            "difference_over": against.over,
            "verdict": row.verdict,
            "gain": gain.mean,
            "gain_low": gain.low,
            "gain_high": gain.high,
            "gain_over": row.gain_over,
            "gain_verdict": row.gain_verdict,
            **{f"cost_{key}": value for key, value in dataclasses.asdict(cost).items()},
        }
        for key, value in cells.items():
            columns.setdefault(key, []).append(value)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    write_atomically(comparison.out / TABLE, sink.getvalue().to_pybytes())
    write_atomically(comparison.out / MARKDOWN, markdown(comparison))
    summary = {
        "rows": [row_tree(row) for row in comparison.rows],
        "failures": dict(comparison.failures),
        "costs": {arm: dataclasses.asdict(cost) for arm, cost in comparison.costs.items()},
        "cells": [
            {"arm": cell.arm, "seed": cell.seed, "folder": cell.folder.name, "evaluations": list(cell.evaluations)}
            | {"baseline": cell.baseline.name if cell.baseline else None}
            for cell in comparison.cells
        ],
        "info": dict(comparison.info),
    }
    write_atomically(comparison.out / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def _note(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)
