"""The plan of a comparison (arms, evaluation data, budget) and the jobs that follow from it."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import smalti
from smalti.comparison.cell import (
    RANDOM,
    RUN,
    Job,
    RandomEncoder,
    digest,
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
)
from smalti.data.images.folders import ImageSet
from smalti.data.signals.signal_set import SignalSet
from smalti.errors import ConfigError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocol import find_protocol
from smalti.models.loading import weights_digest
from smalti.models.weights import LoadConfig
from smalti.runs.config import absolute, absolute_paths, check_start, resolve
from smalti.runs.recipes import find_plan, find_recipe
from smalti.training.launch import Devices, num_processes, resolve_devices, split_batch

CELLS = "cells"
"""Folder of the cells, inside the folder of the comparison."""
UNTRAINED, BEFORE = "untrained", "before"
"""Name prefixes of the folders of cells before training: with random weights, or with those of ``init``."""
STEPS = "steps"
"""Folder of the numbers of steps that fit into a budget of time, one file per arm."""
OF_ARM = "arm:"
"""Prefix of ``init``: the trained weights of another arm."""
BUDGETS = ("steps", "images", "minutes", "cpu_minutes")
LOAD_KEYS = ("load", "weights", "pool", "eval")
"""Keys allowed in an arm that is not trained."""


@settings
class Plan:
    """A comparison: arms, evaluations, seeds and training budget; read from a YAML file."""

    arms: dict[str, dict[str, Any]]
    """Name -> ``{method: NAME, KEY: VALUE ...}`` or ``{recipe: FILE, ...}``, which are trained, or ``{load: ENCODER}``,
    which is evaluated without training; ``{load: random}`` is the plan's own encoder at random initialisation.
    Differences are relative to the first arm. ``init: arm:NAME`` starts from the trained weights of an arm above, of
    the same seed; ``encoder`` of ``settings`` applies only to arms without ``init``. ``data.path`` trains an arm on
    other images, such as class folders. ``eval.KEY`` applies to the evaluations of this arm, ``load.KEY`` to loading
    its weights."""
    evaluate: tuple[dict[str, Any], ...]
    """One ``{data: PATH, protocols: [...]}`` per data set, plus any evaluation setting, such as ``image_size``."""
    data: str | None = None
    """Images or recordings to train on; not needed if no arm is trained."""
    budget: dict[str, float] = dataclasses.field(default_factory=dict)
    """Training budget of every arm: ``steps``, ``images`` (or windows of recordings) seen, ``minutes`` of wall-clock
    time, or ``cpu_minutes`` of processor time on one thread."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of weights, data order, augmentation and evaluation heads; one run per arm and seed."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Training settings of all arms, such as ``encoder`` and ``batch_size``; settings of an arm override them."""
    split_seed: Seed = 0
    """Seed of the split if the evaluation data has none; all seeds are evaluated on the same images."""


def read_plan(source: str | Path | Mapping[str, Any]) -> Plan:
    """Read a plan from a YAML file, the name of one that comes with Smalti, or a dict; missing relative paths are
    resolved against the file's folder.

    Raises:
        ConfigError: if the plan is invalid.
    """
    if isinstance(source, Mapping):
        tree, where, folder = dict(source), "plan", Path()
    else:
        path = find_plan(source)
        tree, where, folder = read_yaml(path), str(path), path.parent
    plan = build(Plan, tree, where)
    if not plan.arms:
        raise ConfigError(f"{where}: no arms; give at least two to compare")
    if not plan.evaluate:
        raise ConfigError(f"{where}: evaluate is empty; name evaluation data, such as [{{data: DIR}}]")
    if not plan.seeds or len(set(plan.seeds)) < len(plan.seeds):
        raise ConfigError(f"{where}: seeds={list(plan.seeds)}: at least one seed is needed, and no seed twice")
    trained = [name for name, arm in plan.arms.items() if taken(arm) is None]
    if trained and not plan.data:
        raise ConfigError(f"{where}: arm '{trained[0]}' is trained, but no training images are given; set data: DIR")
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


def taken(arm: Mapping[str, Any]) -> str | None:
    """The encoder that an arm evaluates as is; None: the arm is trained, and ``load.*`` applies to its ``init``."""
    spec = arm.get("load")
    spec = spec.get("name") if isinstance(spec, Mapping) else spec
    return None if spec is None else str(spec)


def load_job(arm: Mapping[str, Any], seed: int, out: Path, plan: Plan, what: Mapping[str, Any]) -> Job:
    for key in arm:
        if key not in LOAD_KEYS:
            raise ConfigError(unknown_key(key, LOAD_KEYS, "an arm with load is not trained and"))
    spec = str(taken(arm))
    fit = dict(arm["load"]) if isinstance(arm["load"], Mapping) else {}
    fit = {key: value for key, value in {**fit, "weights": arm.get("weights")}.items() if key != "name"}
    if build(LoadConfig, fit, group="load") != LoadConfig() and spec == RANDOM:
        raise ConfigError("load: random loads no weights, so load.* and weights have no effect; leave them out")
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


def source_arm(name: str, plan: Plan) -> str | None:
    """The arm whose trained weights an arm starts from; None: it starts from none.

    Raises:
        ConfigError: if there is no such arm above it, or that arm is not trained.
    """
    init = str(plan.arms[name].get("init") or plan.settings.get("init") or "")
    if not init.startswith(OF_ARM):
        return None
    source, above = init.removeprefix(OF_ARM), list(plan.arms)[: list(plan.arms).index(name)]
    if source not in plan.arms:
        raise ConfigError(unknown_key(source, plan.arms, kind="arm"))
    if source not in above:
        raise ConfigError(f"init={init}: list arm '{source}' above arm '{name}'")
    if (weights := taken(plan.arms[source])) is not None:
        raise ConfigError(f"init={init}: arm '{source}' is not trained; write init: {weights}")
    return source


def train_job(
    arm: Mapping[str, Any],
    seed: int,
    out: Path,
    plan: Plan,
    images: ImageSet | SignalSet,
    what: Mapping[str, Any],
    source: Job | None = None,
) -> Job:
    """The cell that trains an arm.

    Args:
        arm: the arm's settings.
        seed: seed of the cell.
        out: folder of the comparison.
        plan: the plan.
        images: training images of the arm.
        what: name, evaluations and other fields of the job.
        source: the cell whose weights it starts from.
    """
    own = dict(arm)
    if source is not None:
        own["init"] = str(Path(source.folder) / RUN)
    recipe = own.pop("recipe", None)
    own = {**own, "method": {"name": own["method"]}} if isinstance(own.get("method"), str) else own
    shared = merge(read_yaml(find_recipe(recipe)) if recipe else {}, plan.settings)
    if own.get("init"):
        shared.pop("encoder", None)  # weights have their own architecture
    tree = merge(shared, own)
    for key in ("steps", "seed"):
        if key in own or key in plan.settings:
            raise ConfigError(
                f"{key}={own.get(key, plan.settings.get(key))}: is set by the plan's budget and seeds; leave it out"
            )
    (kind, amount) = next(iter(plan.budget.items()))
    tree = merge({"data": {"path": plan.data}}, merge(tree, {"seed": seed}))
    if kind == "steps":
        tree["steps"] = int(amount)
    config = resolve(tree)
    check_start(config)
    split_batch(config.batch_size, config.micro_batch, num_processes(config.devices))
    if config.eval.patience:
        raise ConfigError(
            f"eval.patience={config.eval.patience}: the plan's budget sets the length of training; leave it out"
        )
    if kind == "images":
        tree["steps"] = math.ceil(amount / config.batch_size)
    if kind == "cpu_minutes":
        if resolve_devices(config.devices) != Devices("cpu", 1):
            raise ConfigError(f"devices={config.devices}: a budget of cpu_minutes needs devices: cpu")
        tree = merge(tree, {"data": {"num_workers": 0}})
    budget = {kind: amount}
    start = Path(source.folder).name if source else None
    folder = out / CELLS / f"{config.method.name}-{training_key(tree, budget, images, start)}"
    timed: dict[str, Any] = {}
    if kind in ("minutes", "cpu_minutes"):
        any_seed = training_key(merge(tree, {"seed": 0}), budget, images, OF_ARM if source else None)
        timed = {kind: amount, "steps_file": str(out / STEPS / f"{config.method.name}-{any_seed}.json")}
    return Job(folder=str(folder), train=tree, start=source.folder if source else None, **timed, **what)


def baseline_job(job: Job, out: Path) -> Job:
    """The cell of a job's network before training; arms with the same initial network use the same cell."""
    kind = BEFORE if job.train.get("init") else UNTRAINED
    folder = out / CELLS / f"{kind}-{untrained_key(job.train, Path(job.start).name if job.start else None)}"
    untimed: dict[str, Any] = {"minutes": None, "cpu_minutes": None, "steps_file": ""}
    return dataclasses.replace(job, folder=str(folder), name=f"{job.name}, {kind}", untrained=True, **untimed)


def _with_absolute_paths(tree: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings of an arm, or of all arms, with absolute paths."""
    result = absolute_paths(tree, folder)
    for key in ("load", "recipe"):  # of arms only
        if isinstance(value := tree.get(key), str):
            result[key] = absolute(value, folder)
    if isinstance(load := tree.get("load"), Mapping) and isinstance(load.get("name"), str):
        result["load"] = {**load, "name": absolute(load["name"], folder)}
    return result
