"""The honest comparison: arms and seeds under one budget, on the user's own images, one table with intervals.

An arm is a method to train or an encoder to take as it is. Every cell (arm and seed) runs in a process of its own
(:mod:`smalti.comparison.cell`) and is cached by what determines it, so that an interrupted comparison resumes where
it was, and a plan that grows does only what is new. Every trained cell stands beside its own network before training:
what training was worth is the gain over it. An arm that fails doesn't stop the others.
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

import smalti
from smalti.comparison.cell import (
    DETAILS,
    FAILED,
    RANDOM,
    RESULTS_FILE,
    TRAINED,
    Job,
    RandomEncoder,
    digest,
    evaluation_key,
    is_trained,
    run_cell,
    training_key,
    untrained_key,
)
from smalti.config import (
    Seed,
    build,
    merge,
    read_yaml,
    resolve_paths,
    settings,
    to_tree,
    unfold,
    unknown_key,
    write_yaml,
)
from smalti.data.images.folders import ImageSet, open_images, training_images
from smalti.data.images.pixels import NO_PIXELS, trained_pixels
from smalti.errors import ConfigError, Interrupted, RunError, SmaltiError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.details import read_details
from smalti.evaluation.evaluate import open_sets
from smalti.evaluation.intervals import LEVEL, RESAMPLINGS, Interval, few_seeds
from smalti.evaluation.paired import (
    Row,
    about_lines,
    gain_cells,
    metric_rows,
    read_row,
    row_tree,
    shared_headline,
    table_cells,
)
from smalti.evaluation.protocol import find_protocol
from smalti.evaluation.result import BaselineKind, Result, read_results
from smalti.files import check_folder, is_free, remove_leftovers, write_atomically
from smalti.models.loading import weights_digest
from smalti.models.weights import LoadConfig
from smalti.reading import read_mapping, reading
from smalti.runs.config import absolute, absolute_paths, check_start, resolve
from smalti.runs.lock import locked
from smalti.runs.machine import describe_machine
from smalti.runs.recipes import find_recipe
from smalti.training.launch import num_processes, split_batch
from smalti.training.processes import STOPPED, run_process

PLAN_FILE, CELLS, TABLE, MARKDOWN, SUMMARY = "plan.yaml", "cells", "comparison.parquet", "comparison.md", "compare.json"
PAGE = "report.html"
"""What :mod:`smalti.report.comparison` makes of it all."""
UNTRAINED, BEFORE = "untrained", "before"
"""Kinds of cells of networks before training: with random weights, or with those that the run starts from."""
BUDGETS = ("steps", "images", "minutes")
LOAD_KEYS = ("load", "weights", "pool", "eval")
"""What an arm that is not trained may say."""


@settings
class Plan:
    """What is compared with what; a YAML file."""

    arms: dict[str, dict[str, Any]]
    """Name -> ``{method: NAME, KEY: VALUE ...}`` or ``{recipe: FILE, ...}``, which are trained, or ``{load: ENCODER}``,
    which is taken as it is, ``{load: random}`` being the plan's own encoder before training. Differences are taken
    against the first. ``eval.KEY`` holds for this arm's evaluations, ``load.KEY`` says how its weights are fitted."""
    evaluate: tuple[dict[str, Any], ...]
    """``{data: PATH, protocols: [...]}`` each, and any setting of an evaluation, such as ``image_size``."""
    data: str | None = None
    """Images to train on; not needed if no arm is trained."""
    budget: dict[str, float] = dataclasses.field(default_factory=dict)
    """One for all arms: ``steps``, ``images`` seen, or ``minutes`` of wall time for training."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Of weights, data order and augmentation, and of the evaluations' heads."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of training that all arms share, such as ``encoder`` and ``batch_size``; an arm's own come on top."""
    split_seed: Seed = 0
    """Of the split of evaluation data that has none; the same for all seeds, so that all judge the same images."""


@dataclass(frozen=True)
class Cost:
    """What an arm cost, mean over its seeds; training only, but for ``eval_s``."""

    steps: float = 0.0
    images_seen: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    gpu_s: float = 0.0
    peak_mib: float = 0.0
    """Of the training process or its GPU; of an arm that isn't trained: of its evaluation."""
    eval_s: float = 0.0
    parameters: int = 0
    """Of the encoder."""
    is_partial: bool = False
    """Whether a cell was cut short and resumed: seconds before the last start are not in here."""


@dataclass(frozen=True)
class Cell:
    """An arm at a seed."""

    arm: str
    seed: int
    folder: Path
    evaluations: tuple[str, ...]
    """Keys, in the order of the plan."""
    baseline: Path | None = None
    """Of a trained arm: folder of the cell of its network before training."""

    @property
    def results(self) -> list[Result]:
        """Everything that was measured, with its details."""
        return [result for number in range(len(self.evaluations)) for result in self.results_of(number)]

    def results_of(self, number: int) -> list[Result]:
        """What an evaluation of the plan measured, by its place.

        Raises:
            DataError: if it isn't there any more.
        """
        return _results(self.folder / self.evaluations[number])

    def baseline_of(self, number: int) -> list[Result]:
        """What the same evaluation measured of the network before training; nothing for arms that aren't trained.

        Raises:
            DataError: if it isn't there any more.
        """
        if self.baseline is None:
            return []
        kind: BaselineKind = "before" if self.baseline.name.startswith(BEFORE) else "untrained"
        found = _results(self.baseline / self.evaluations[number])
        return [dataclasses.replace(result, baseline=kind) for result in found]


def _results(target: Path) -> list[Result]:
    return read_details(target / DETAILS, read_results(target / RESULTS_FILE))


@dataclass(frozen=True)
class Comparison:
    """What came out."""

    out: Path
    plan: Plan
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]
    """Those that are finished."""
    failures: Mapping[str, str]
    """Arm -> why it failed, one line."""
    costs: Mapping[str, Cost]
    info: Mapping[str, Any]
    """Machine, versions, commit, times."""

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms with results, in the order of the plan."""
        return tuple(arm for arm in self.plan.arms if any(cell.arm == arm for cell in self.cells))

    def table(self, headlines: bool = True) -> list[tuple[str, list[Row]]]:
        """Rows by ``DATA: PROTOCOL METRIC``, in the order of the plan."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.is_headline or not headlines:
                groups.setdefault(f"{row.data}: {row.protocol} {row.metric}", []).append(row)
        return list(groups.items())


@dataclass(frozen=True)
class _Arm:
    """An arm made ready: a job a seed, or what is wrong with it."""

    jobs: tuple[Job, ...]
    baselines: tuple[Job, ...] = ()
    """Of a trained arm, the same networks before training."""
    error: str = ""


def read_plan(source: str | Path | Mapping[str, Any]) -> Plan:
    """A plan from a YAML file or a tree; relative paths that aren't there are looked for beside the file.

    Raises:
        ConfigError: for what can't be used, with one line.
    """
    if isinstance(source, Mapping):
        tree, where, folder = dict(source), "plan", Path()
    else:
        path = Path(source).expanduser()
        tree, where, folder = read_yaml(path), str(path), path.parent
    plan = build(Plan, tree, where)
    if not plan.arms:
        raise ConfigError(f"{where}: no arms; name at least two things to compare")
    if not plan.evaluate:
        raise ConfigError(f"{where}: evaluate is empty; give what to judge by, such as [{{data: DIR}}]")
    if not plan.seeds or len(set(plan.seeds)) < len(plan.seeds):
        raise ConfigError(f"{where}: seeds={list(plan.seeds)}: different numbers are needed, at least one")
    trained = [name for name, arm in plan.arms.items() if _taken(arm) is None]
    if trained and not plan.data:
        raise ConfigError(f"{where}: arm '{trained[0]}' is to be trained, but no images are named; give data: DIR")
    if trained and (len(plan.budget) != 1 or next(iter(plan.budget)) not in BUDGETS):
        raise ConfigError(f"{where}: budget={dict(plan.budget)}: exactly one of {', '.join(BUDGETS)} is needed")
    if trained and not next(iter(plan.budget.values())) > 0:
        raise ConfigError(f"{where}: budget={dict(plan.budget)}: a number above 0 is needed")
    entries = []
    for number, entry in enumerate(plan.evaluate):
        entry = unfold(entry)
        if not entry.get("data"):
            raise ConfigError(f"{where}: evaluate[{number}] names no data")
        entry = resolve_paths(entry, EvalConfig, lambda text: absolute(text, folder))
        config = build(EvalConfig, entry, f"{where}: evaluate[{number}]")
        for name in config.protocols:
            find_protocol(name)
        entries.append(entry)
    arms = {name: _with_absolute_paths(unfold(arm), folder) for name, arm in plan.arms.items()}
    return dataclasses.replace(
        plan,
        arms=arms,
        evaluate=tuple(entries),
        data=absolute(plan.data, folder) if plan.data else None,
        settings=_with_absolute_paths(unfold(plan.settings), folder),
    )


def compare(
    plan: str | Path | Mapping[str, Any] | Plan, out: str | Path, *, quiet: bool = False, isolate: bool = True
) -> Comparison:
    """Train and evaluate all cells of a plan, and say what the numbers allow to say; what ``smalti compare`` does.

    Args:
        plan: a YAML file, a tree, or what :func:`read_plan` made of one.
        out: a folder for cells and tables; what is finished in it is not done again.
        quiet: show no progress.
        isolate: a process a cell, which measures its peak memory and keeps a crash to itself. Without, cells run in
            this process: quicker to start, and the peak is that of everything so far.

    Raises:
        ConfigError, DataError: for a plan that can't be used.
        RunError: if no arm came through.
    """
    plan = plan if isinstance(plan, Plan) else read_plan(plan)
    folder = Path(out).expanduser()
    if not is_free(folder) and not (folder / PLAN_FILE).is_file():
        raise ConfigError(f"{folder}: is not empty and holds no comparison; choose another --out")
    check_folder(folder)
    started = time.time()
    for entry in plan.evaluate:
        open_sets(entry["data"], build(EvalConfig, {**entry, "split_seed": plan.split_seed}, "evaluate"))
    data = open_images(plan.data) if plan.data else None
    evaluated = [open_images(entry["data"], class_depth=entry.get("class_depth")) for entry in plan.evaluate]
    for name, one in (("train on", data), *(("evaluate on", images) for images in evaluated)):
        if one is not None:
            _note(f"{name}: {one.account()}", quiet)
    images = training_images(data) if data is not None else None
    arms = {name: _prepare(name, plan, folder, images, evaluated, quiet) for name in plan.arms}
    failures = {name: arm.error for name, arm in arms.items() if arm.error}
    for name, error in failures.items():
        _note(f"arm '{name}' can't run: {error}", quiet=False)
    with locked(folder):
        remove_leftovers(folder)
        write_yaml(folder / PLAN_FILE, to_tree(plan))
        cells = _run_all(plan, arms, failures, quiet, isolate)
    if not cells:
        raise RunError(f"{folder}: no arm came through; {'; '.join(f'{name}: {e}' for name, e in failures.items())}")
    rows = _rows(plan, cells)
    info = {
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "took_s": round(time.time() - started, 1),
        "intervals": f"{LEVEL:.0%}, percentile bootstrap with {RESAMPLINGS} resamplings of images "
        f"{'(of whole groups, where they are known) ' if any('groups' in row.score.over for row in rows) else ''}"
        "and seeds; seeds widened by sqrt(S/(S-1)) and Student's quantile; each comparison by itself",
        "few_seeds": few_seeds(len(plan.seeds)),
        **describe_machine(),
    }
    costs = {arm: _cost([cell for cell in cells if cell.arm == arm]) for arm in plan.arms}
    costs = {arm: cost for arm, cost in costs.items() if any(cell.arm == arm for cell in cells)}
    result = Comparison(folder, plan, tuple(rows), tuple(cells), failures, costs, info)
    _write(result)
    return result


def read_comparison(out: str | Path) -> Comparison:
    """What :func:`compare` left in a folder, from its summary: cells may have been removed since.

    Raises:
        RunError: if there is no finished comparison in it.
    """
    folder = Path(out).expanduser()
    if not (folder / SUMMARY).is_file():
        raise RunError(f"{folder}: holds no finished comparison; smalti compare PLAN --out writes one")
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
    images: ImageSet | None,
    evaluated: Sequence[ImageSet],
    quiet: bool,
) -> _Arm:
    """The jobs of an arm, with all mistakes that can be found before it runs."""
    arm = dict(plan.arms[name])
    own_eval = arm.pop("eval", {})
    try:
        pixels = to_tree(trained_pixels(merge(plan.settings, {"data": arm.get("data") or {}})))
        pixels = {key: value for key, value in pixels.items() if value != getattr(NO_PIXELS, key)}
        evaluations = [
            {**pixels, **entry, **own_eval, "split_seed": plan.split_seed, "data": entry["data"]}
            for entry in plan.evaluate
        ]
        for entry in evaluations:
            for protocol in build(EvalConfig, entry, f"arm '{name}': eval").protocols:
                find_protocol(protocol)
        jobs, baselines = [], []
        for seed in plan.seeds:
            what = {
                "name": f"{name} seed {seed}",
                "seed": seed,
                "quiet": quiet,
                "evaluations": tuple(
                    {"key": evaluation_key(entry, one, seed), "data": entry["data"], "settings": entry}
                    for entry, one in zip(evaluations, evaluated, strict=True)
                ),
            }
            if _taken(arm) is not None:
                jobs.append(_load_job(arm, seed, out, plan, what))
            else:
                assert images is not None
                jobs.append(_train_job(arm, seed, out, plan, images, what))
                baselines.append(_baseline_job(jobs[-1], out))
        return _Arm(tuple(jobs), tuple(baselines))
    except SmaltiError as error:
        return _Arm((), error=str(error))


def _taken(arm: Mapping[str, Any]) -> str | None:
    """The encoder that an arm takes as it is; None: it trains one, and ``load.*`` fits the weights of its ``init``."""
    spec = arm.get("load")
    spec = spec.get("name") if isinstance(spec, Mapping) else spec
    return None if spec is None else str(spec)


def _load_job(arm: Mapping[str, Any], seed: int, out: Path, plan: Plan, what: Mapping[str, Any]) -> Job:
    for key in arm:
        if key not in LOAD_KEYS:
            raise ConfigError(unknown_key(key, LOAD_KEYS, "an arm with load is taken as it is and"))
    spec = str(_taken(arm))
    fit = dict(arm["load"]) if isinstance(arm["load"], Mapping) else {}
    fit = {key: value for key, value in {**fit, "weights": arm.get("weights")}.items() if key != "name"}
    if build(LoadConfig, fit, group="load") != LoadConfig() and spec == RANDOM:
        raise ConfigError("load: random has no weights that load.* or weights could apply to; leave them out")
    fit["network"] = fit.pop("weights")
    options = {key: value for key, value in {**fit, "pool": arm.get("pool")}.items() if value is not None}
    parts: list[Any] = [weights_digest(spec), options, smalti.__version__]
    tree: dict[str, Any] = {}
    if spec == RANDOM:
        tree = merge(
            {name: plan.settings[name] for name in ("encoder", "data") if name in plan.settings}, {"seed": seed}
        )
        parts.append(to_tree(build(RandomEncoder, tree)))
    if spec.partition(":")[0] == RANDOM:
        parts.append(seed)
    folder = out / CELLS / f"load-{digest(*parts)}"
    return Job(folder=str(folder), load=spec, load_options=options, train=tree, **what)


def _train_job(
    arm: Mapping[str, Any], seed: int, out: Path, plan: Plan, images: ImageSet, what: Mapping[str, Any]
) -> Job:
    own = dict(arm)
    recipe = own.pop("recipe", None)
    own = {**own, "method": {"name": own["method"]}} if isinstance(own.get("method"), str) else own
    tree = merge(merge(read_yaml(find_recipe(recipe)) if recipe else {}, plan.settings), own)
    for key in ("steps", "seed"):
        if key in own or key in plan.settings:
            raise ConfigError(f"{key}={own.get(key, plan.settings.get(key))}: the plan's budget and seeds set this")
    (kind, amount) = next(iter(plan.budget.items()))
    tree = merge(tree, {"seed": seed, "data": {"path": plan.data}})
    if kind == "steps":
        tree["steps"] = int(amount)
    config = resolve(tree)
    check_start(config)
    split_batch(config.batch_size, config.micro_batch, num_processes(config.devices))
    if config.eval.patience:
        raise ConfigError(f"eval.patience={config.eval.patience}: the plan's budget says how long arms train")
    if kind == "images":
        tree["steps"] = math.ceil(amount / config.batch_size)
    budget = {kind: amount}
    folder = out / CELLS / f"{config.method.name}-{training_key(tree, budget, images)}"
    return Job(folder=str(folder), train=tree, minutes=amount if kind == "minutes" else None, **what)


def _baseline_job(job: Job, out: Path) -> Job:
    """The cell of the network that a job trains, before its first step; arms that start alike share it."""
    kind = BEFORE if job.train.get("init") else UNTRAINED
    folder = out / CELLS / f"{kind}-{untrained_key(job.train)}"
    return dataclasses.replace(job, folder=str(folder), name=f"{job.name}, {kind}", untrained=True, minutes=None)


def _run_all(plan: Plan, arms: Mapping[str, _Arm], failures: dict[str, str], quiet: bool, isolate: bool) -> list[Cell]:
    """All cells, seed by seed, so that what is there early can be compared; ``failures`` grows."""
    order = [(name, number) for number in range(len(plan.seeds)) for name in plan.arms if arms[name].jobs]
    started, done_now = time.monotonic(), 0
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


def _is_done(job: Job) -> bool:
    folder = Path(job.folder)
    trained = not is_trained(job) or (folder / TRAINED).is_file()
    return trained and all((folder / entry["key"] / RESULTS_FILE).is_file() for entry in job.evaluations)


def _run(job: Job, isolate: bool) -> str:
    """Run a cell; what went wrong, or nothing."""
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
    if code in STOPPED and not asked:  # somebody has stopped the cell, not the comparison
        asked = signal.SIGINT if code == STOPPED[0] else signal.SIGTERM
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
    """Every metric of every arm, with intervals: differences against the plan's first arm, gains over the arm's own
    network before training."""
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


def _cost(cells: Sequence[Cell]) -> Cost:
    """Mean over the cells of an arm."""
    trained, judged = [], []
    parameters = 0
    for cell in cells:
        if (cell.folder / TRAINED).is_file():
            trained.append(read_mapping(cell.folder / TRAINED, error=RunError))
        for key in cell.evaluations:
            judged.append(read_mapping(cell.folder / key / "cost.json", error=RunError))
            parameters = int(judged[-1].get("parameters", parameters))

    def mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
        return float(np.mean([row[key] for row in rows])) if rows else 0.0

    return Cost(
        steps=mean(trained, "steps"),
        images_seen=mean(trained, "images_seen"),
        wall_s=mean(trained, "wall_s"),
        cpu_s=mean(trained, "cpu_s"),
        gpu_s=mean(trained, "gpu_s"),
        peak_mib=max((row["peak_mib"] for row in trained or judged), default=0.0),
        eval_s=mean(judged, "wall_s") * len(judged) / max(len(cells), 1),
        parameters=parameters,
        is_partial=any(row["resumed"] for row in trained),
    )


def _write(comparison: Comparison) -> None:
    """Parquet for machines, Markdown for people, JSON for the page."""
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


def markdown(comparison: Comparison) -> str:
    """The tables as Markdown: headlines first, all other metrics below."""
    plan, info = comparison.plan, comparison.info
    budget = ", ".join(f"{value:g} {name}" for name, value in plan.budget.items()) or "none: nothing is trained"
    machine = info["machine"]
    lines = [
        "# Comparison",
        "",
        f"Budget: {budget}. Seeds: {', '.join(map(str, plan.seeds))}. Trained on: {plan.data or 'nothing'}.",
        f"In brackets: {info['intervals']}. Differences are against **{next(iter(plan.arms))}**, paired. The gain of a "
        "trained arm is over its own network before training (untrained, or before where it started from weights).",
        *([info["few_seeds"]] if info.get("few_seeds") else []),
        f"Commit {info['commit']}, {machine['processor']}, {machine['cores']} cores, "
        f"{', '.join(machine['gpus']) or 'no GPU'}; {info['finished']}.",
        "",
    ]
    for arm, error in comparison.failures.items():
        lines += [f"**Arm {arm} failed**: {error}", ""]
    for only_headlines in (True, False):
        if not only_headlines:
            lines += ["## All metrics", ""]
        for title, rows in comparison.table(only_headlines):
            lines += [f"{'##' if only_headlines else '###'} {title} ({rows[0].unit})", ""]
            lines += [*("  \n".join(about_lines(rows)),), ""]
            lines += ["| arm | mean | seeds | difference | | gain | |", "|---|---|---|---|---|---|---|"]
            pairs = zip(table_cells(rows), map(gain_cells, rows), strict=True)
            lines += [f"| {' | '.join((*cells, *gain))} |" for cells, gain in pairs]
            lines.append("")
    lines += ["## Cost", "", "| arm | " + " | ".join(COST_COLUMNS) + " |", "|---" * (1 + len(COST_COLUMNS)) + "|"]
    lines += [f"| {arm} | {' | '.join(cost_cells(cost))} |" for arm, cost in comparison.costs.items()]
    return "\n".join(lines) + "\n"


COST_COLUMNS = ("steps", "images seen", "training", "CPU", "GPU", "peak memory", "eval", "parameters")


def cost_cells(cost: Cost) -> tuple[str, ...]:
    """Text for :data:`COST_COLUMNS`, mean over seeds."""
    more = "≥ " if cost.is_partial else ""
    return (
        f"{cost.steps:,.0f}",
        f"{cost.images_seen:,.0f}",
        f"{more}{cost.wall_s:,.0f} s",
        f"{more}{cost.cpu_s:,.0f} s",
        f"{more}{cost.gpu_s:,.0f} s" if cost.gpu_s else "–",
        f"{cost.peak_mib:,.0f} MiB",
        f"{cost.eval_s:,.0f} s",
        f"{cost.parameters / 1e6:.2f} M",
    )


def short_name(data: str, plan: Plan) -> str:
    """The last parts of a path that tell the plan's evaluation sets apart."""
    parts = [Path(str(entry["data"])).parts for entry in plan.evaluate]
    mine = Path(data).parts
    for depth in range(1, len(mine) + 1):
        if len({other[-depth:] for other in parts}) == len(set(parts)):
            return "/".join(mine[-depth:])
    return data


def _with_absolute_paths(tree: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings of an arm, or of all arms, with absolute paths."""
    result = absolute_paths(tree, folder)
    for key in ("load", "recipe"):  # of arms only
        if isinstance(value := tree.get(key), str):
            result[key] = absolute(value, folder)
    if isinstance(load := tree.get("load"), Mapping) and isinstance(load.get("name"), str):
        result["load"] = {**load, "name": absolute(load["name"], folder)}
    return result


def _note(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)
