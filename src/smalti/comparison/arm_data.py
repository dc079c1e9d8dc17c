"""Comparisons on recordings: a plan has images or recordings, and each arm reads recordings with its own settings."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.comparison.cell import RANDOM
from smalti.comparison.plan import Plan, taken
from smalti.config import Tree, build, merge, read_yaml
from smalti.data.images.folders import open_images
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import SignalSet, as_read, is_signals, open_signals
from smalti.errors import ConfigError, SmaltiError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.evaluate import open_sets
from smalti.runs.config import with_signals
from smalti.runs.folder import CONFIG_FILE
from smalti.runs.recipes import find_recipe


@dataclass(frozen=True)
class ArmData:
    """How one arm reads the recordings of its plan, and what it found."""

    data: Tree
    """``channels`` and ``signal``, as in the settings of a training run."""
    entries: tuple[Tree, ...]
    """The evaluations of the plan with ``signal``."""
    training: SignalSet | None
    """All recordings to train on; None if neither arm nor plan names any."""
    evaluated: tuple[SignalSet, ...]


def own_path(arm: Mapping[str, Any]) -> str | None:
    """``data.path`` of an arm that is trained on data of its own."""
    data = arm.get("data")
    return str(data["path"]) if isinstance(data, Mapping) and data.get("path") else None


def has_recordings(plan: Plan) -> bool:
    """Whether the data of a plan are recordings.

    Raises:
        ConfigError: if some are and some are images.
        DataError: if these images can't be read.
    """
    trained = (plan.data, *map(own_path, plan.arms.values()))
    paths = [path for path in trained if path] + [str(entry["data"]) for entry in plan.evaluate]
    kinds = {path: is_signals(path) for path in paths}
    if len(set(kinds.values())) < 2:
        return kinds[paths[0]]
    recordings, images = (next(path for path, found in kinds.items() if found == wanted) for wanted in (True, False))
    open_images(images)  # a path that doesn't exist is neither
    raise ConfigError(
        f"{recordings} holds recordings, {images} holds images; a plan compares on one kind of data, so write two plans"
    )


def read_recordings(arm: Mapping[str, Any], plan: Plan, entries: Sequence[Mapping[str, Any]]) -> ArmData:
    """The recordings of a plan as an arm reads them: its training does, and its evaluations do the same.

    Args:
        arm: settings of the arm.
        plan: of recordings.
        entries: its evaluations, with the settings of the arm.

    Raises:
        ConfigError, DataError: if the recordings can't be read.
    """
    path = own_path(arm) or plan.data
    data = _data_settings(arm, plan, path or str(plan.evaluate[0]["data"]))
    known = data["signal"]
    completed = list[Tree]()
    for entry in entries:
        own = entry.get("signal") or {}
        completed.append({**entry, "signal": merge(as_read(known, str(entry["data"]), own.get("labels")), own)})
    return ArmData(
        data,
        tuple(completed),
        open_signals(path, build(SignalConfig, known, group="data.signal")) if path else None,
        tuple(
            open_signals(str(entry["data"]), build(SignalConfig, entry["signal"], group="eval.signal"))
            for entry in completed
        ),
    )


def first_data(plan: Plan) -> ArmData:
    """The recordings as the first arm reads them that can, with the labels that the evaluations need.

    Raises:
        ConfigError, DataError: if no arm can read them, or the data lack what a protocol needs.
    """
    trouble: SmaltiError | None = None
    for arm in plan.arms.values():
        try:
            read = read_recordings(arm, plan, plan.evaluate)
        except SmaltiError as error:
            trouble = trouble or error
            continue
        for entry in read.entries:
            open_sets(str(entry["data"]), build(EvalConfig, {**entry, "split_seed": plan.split_seed}, "evaluate"))
        return read
    assert trouble is not None, "a plan has arms"
    raise trouble


def with_data(arm: Mapping[str, Any], plan: Plan, read: ArmData) -> tuple[Tree, Plan]:
    """The arm and the plan with the settings of the recordings filled in, as jobs need them."""
    completed = dataclasses.replace(plan, settings=merge(plan.settings, {"data": read.data}))
    if taken(arm) is not None:
        return dict(arm), completed
    return merge(arm, {"data": read.data}), plan


def _data_settings(arm: Mapping[str, Any], plan: Plan, path: str) -> Tree:
    """``channels`` and ``signal`` of an arm: of its training, of the run that it loads, or of the plan; where they name
    no channels, those of the recordings at a path."""
    spec = taken(arm)
    parts: list[Any] = [plan.settings.get("data")]
    if spec is None:
        recipe = read_yaml(find_recipe(arm["recipe"])) if arm.get("recipe") else {}
        parts = [recipe.get("data"), *parts, arm.get("data")]
    elif spec != RANDOM:
        parts.append({"signal": _signal_of_run(Path(spec))})
    tree: Tree = {}
    for part in parts:
        tree = merge(tree, {"data": part or {}})
    tree = with_signals(merge(tree, {"data": {"path": path}}))
    return {name: tree["data"][name] for name in ("channels", "signal")}


def _signal_of_run(path: Path) -> Tree:
    """``data.signal`` of a run, given by its folder or a checkpoint in it; empty for other encoders."""
    for folder in (path, path.parent, path.parent.parent):  # RUN, RUN/best, RUN/checkpoints/step_...
        if (folder / CONFIG_FILE).is_file():
            data = read_yaml(folder / CONFIG_FILE).get("data")
            return dict((data or {}).get("signal") or {})
    return {}
