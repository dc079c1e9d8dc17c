"""Train an encoder on a folder of images, into a run directory."""

import contextlib
import os
import shlex
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from timm.models.vision_transformer import Block

from smalti.config import (
    Tree,
    flatten,
    merge,
    read_yaml,
    to_tree,
    unfold,
    write_yaml,
)
from smalti.data.dataset import Dataset
from smalti.data.images.image_set import as_text, is_text
from smalti.data.loader import TrainLoader, UnreadableLog
from smalti.data.views import Views
from smalti.data.workers import check_workers
from smalti.errors import ConfigError, DataError, Interrupted, RunError
from smalti.files import check_folder, is_free, remove_leftovers
from smalti.layers.stochastic_depth import StochasticDepth
from smalti.methods.base import Method
from smalti.models.licences import licence_note
from smalti.models.loading import (
    encoder_description,
    latest_checkpoint,
)
from smalti.runs.build import (
    build_method,
    chosen_precision,
    count_classes,
    divide_batch,
    fitting_batches,
    measure_scale,
    num_workers,
    open_data,
    open_training,
    training_part,
)
from smalti.runs.config import (
    MAY_CHANGE,
    RunConfig,
    absolute_paths,
    check_start,
    posttrain_note,
    resolve,
    with_signals,
    with_start,
)
from smalti.runs.evaluation_hook import EvaluationHook, check_evaluation, encoder_at, evaluated_with
from smalti.runs.folder import (
    CONFIG_FILE,
    RUN_FILE,
    check_same_images,
    record_end,
    repair_folder,
    write_run_file,
)
from smalti.runs.lock import locked
from smalti.runs.recipes import find_recipe
from smalti.training.checkpoint import Checkpoints, TrainingState, usable_checkpoint
from smalti.training.interrupt import Interrupt, StopRequested, end_at_once, handled_signals
from smalti.training.launch import (
    PATIENCE,
    limit_threads,
    make_accelerator,
    resolve_devices,
    resolve_precision,
    under_launcher,
)
from smalti.training.logs import CSVLog, Screen, Trackers
from smalti.training.loop import Listener, LoopConfig
from smalti.training.loop import train as run_loop
from smalti.training.optim import OptimConfig, build_optimizer
from smalti.training.parallel import check_parallel, is_sharded, shard
from smalti.training.processes import end_with_launcher, launch, lost_process
from smalti.training.slurm import join_step

SHARED_AFTER_S = 60
"""How long a process waits for a run directory on a shared file system to appear."""
FIRST_LOOK = 20
"""Number of first images of which at least one must be readable before a run starts."""


def train(
    method: str | None = None,
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    init: str | None = None,
    recipe: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Path:
    """Train an encoder on a folder of images, as ``smalti train`` does.

    Args:
        method: name of the method, such as ``mae``; None: the recipe's.
        data: value of ``data.path``.
        out: the run directory, new or empty.
        init: weights to start from, see :class:`RunConfig`.
        recipe: a YAML file of settings, or the name of a shipped recipe.
        overrides: further settings as a tree, such as ``{"steps": 100, "method": {"mask_ratio": 0.6}}``.
        quiet: show no progress.

    Returns:
        The run directory.

    Raises:
        ConfigError, DataError, WeightsError, RunError: for an invalid setting or input, or if training fails.
        Interrupted: after a signal; a checkpoint was written, from which :func:`resume` continues.
    """
    join_step()
    tree = with_start(with_signals(given_settings(method, data, init, recipe, overrides)))
    config = resolve(tree, str(recipe) if recipe else "settings")
    check_start(config)
    if not config.data.path:
        raise ConfigError("no images are given; use --data DIR")
    if out is None:
        raise ConfigError("no run directory is given; use --out DIR")
    run = Path(out).expanduser()
    if run.is_file():
        raise ConfigError(f"{run}: is a file; --out needs a folder that is new or empty")
    if not is_text(run.absolute()):
        raise ConfigError(f"{as_text(run)}: the path is not UTF-8, so weights can't be read from it; rename it")
    if _is_first_process():
        _check_free(run)
        check_folder(run)
    found = open_data(config)
    config, images = measure_scale(config, training_part(found, config))
    config = count_classes(config, images)
    _check_before_writing(config, images, quiet=under_launcher() and not _is_first_process())
    with _written_by_this_process(run):
        if _is_first_process():
            _check_free(run)  # again: another process may have written to it
            remove_leftovers(run)
            if not quiet:
                print(f"data: {found.account()}", file=sys.stderr)
                notes = (posttrain_note(tree, config), licence_note(config.init) if config.init else "")
                print(*(f"{note}\n" for note in notes if note), sep="", end="", file=sys.stderr)
            write_yaml(run / CONFIG_FILE, to_tree(config))
            write_run_file(run, images, config.init, chosen_precision(config))
        _start(run, config, images, None, quiet)
    return run


def given_settings(
    method: str | None,
    data: str | Path | None,
    init: str | None,
    recipe: str | Path | None,
    overrides: Mapping[str, Any] | None,
) -> Tree:
    """The settings that a user gives: those of the recipe, and over them the others; with absolute paths."""
    tree = read_yaml(find_recipe(recipe)) if recipe else {}
    given: Tree = {"method": {"name": method}} if method else {}
    given |= {"data": {"path": str(data)}} if data else {}
    given |= {"init": init} if init else {}
    return absolute_paths(merge(merge(tree, given), overrides or {}))


def resume_or_start(
    method: str | None = None,
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    init: str | None = None,
    recipe: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Path:
    """Resume the run in ``out`` if there is one, else start it: one command for a job that may be started several
    times, as ``smalti train --resume-or-start`` does. The arguments are those of :func:`train`.

    Raises:
        ConfigError: also if the run was started with other settings, and :func:`resume` can't change these.
        DataError, WeightsError, RunError, Interrupted: as :func:`train` and :func:`resume`.
    """
    path = None if out is None else Path(out).expanduser() / CONFIG_FILE
    if out is None or path is None or not path.is_file():
        return train(method, data, out, init=init, recipe=recipe, overrides=overrides, quiet=quiet)
    tree = given_settings(method, data, init, recipe, overrides)
    if isinstance(tree.get("method"), str):
        tree["method"] = {"name": tree["method"]}
    now = flatten(to_tree(resolve(with_start(with_signals(tree)), str(recipe) if recipe else "settings")))
    before = flatten(read_yaml(path))
    changed = {key: now[key] for key in flatten(tree) if key in now and now[key] != before.get(key)}
    if changed.get("data.scale") == "percentiles":
        del changed["data.scale"]  # the run has the ranges that were measured
    return resume(out, unfold(changed), quiet=quiet)


def resume(run: str | Path, overrides: Mapping[str, Any] | None = None, *, quiet: bool = False) -> Path:
    """Resume an interrupted run from its newest readable checkpoint, as ``smalti train --resume RUN`` does.

    Args:
        run: the run directory.
        overrides: changed settings, of those in ``MAY_CHANGE``.
        quiet: show no progress.

    Raises:
        ConfigError: if there is no such run, or a setting can't be changed.
        RunError: if another process is writing into it.
        WeightsError: if none of its checkpoints can be read.
        Interrupted: after a signal; a checkpoint was written.
    """
    join_step()
    run = Path(run).expanduser()
    path = run / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(
            f"{run}: is not a run directory (it has no {CONFIG_FILE}); start one with: smalti train METHOD"
        )
    before = read_yaml(path)
    overrides = overrides or {}
    for name in flatten(overrides):
        if not any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE):
            raise ConfigError(
                f"{name} can't change when a run is resumed, since it affects the weights; only "
                f"{', '.join(MAY_CHANGE)} can"
            )
    config = resolve(merge(before, absolute_paths(overrides)), str(path))
    divide_batch(config)
    check_evaluation(config)
    images = open_training(config)
    with _written_by_this_process(run):
        if _is_first_process():
            repair_folder(run)
        check_same_images(run, images)
        checkpoint = None  # the other processes take that of the first
        if _is_first_process():
            checkpoint, notes = usable_checkpoint(run, set_aside=True)
            for note in notes:
                warnings.warn(note, stacklevel=2)
            if not (run / RUN_FILE).exists():
                write_run_file(run, images, config.init, chosen_precision(config))
            if checkpoint is None:
                print(f"{run}: has no checkpoint yet; starting from step 0", file=sys.stderr)
        _start(run, config, images, checkpoint, quiet)
    return run


def _check_free(run: Path) -> None:
    """Check that a folder is missing or empty.

    Raises:
        ConfigError: if it isn't; for a run, names the command that resumes it.
    """
    if not is_free(run):
        resume = f", or resume it with: smalti train --resume {run}" if (run / CONFIG_FILE).is_file() else ""
        raise ConfigError(f"{run}: is not empty; choose another --out{resume}")


def _written_by_this_process(run: Path) -> contextlib.AbstractContextManager[None]:
    """The lock of a run directory, held by the first of several processes."""
    return locked(run) if _is_first_process() else contextlib.nullcontext()


def _check_before_writing(config: RunConfig, images: Dataset, quiet: bool) -> None:
    """Check settings and images before anything is written.

    Raises:
        ConfigError, DataError, ShapeError, WeightsError: if a check fails.
    """
    check_evaluation(config)
    resolve_precision(config.precision, resolve_devices(config.devices).kind)
    method = build_method(config, quiet=quiet)
    micro_batch, accumulate = divide_batch(config)
    method.check_batch(micro_batch)
    check_parallel(method, config.parallel)
    if accumulate > 1 and method.couples_samples and not quiet:
        print(
            f"gradients of {accumulate} micro-batches of {micro_batch} are accumulated, but {method.name} couples the "
            f"images of a micro-batch ({method.couples_samples}): results differ from one batch of {config.batch_size}",
            file=sys.stderr,
        )
    method.bind(images, config.data.image_size)
    if config.weights is not None and config.weights not in method.networks():
        raise ConfigError(
            f"weights={config.weights}: {method.name} with these settings has {', '.join(method.networks())}; choose "
            "one"
        )
    views = method.make_views(config.data.image_size)
    build_optimizer(method.param_groups(), config.optim)
    _check_freeze(method, config.optim)
    _check_pool(method, config)
    workers = num_workers(config)
    if images.kind == "images" and config.eval.data and config.eval.image_size:
        method.networks()[method.export_network].check_size(config.eval.image_size, config.eval.image_size)
    trouble: DataError | None = None
    source = images.source(config.data.channels)
    for index in range(min(FIRST_LOOK, len(source))):
        try:
            view = views(source.read(index), np.random.default_rng(0))
            check_workers(view, micro_batch, workers, resolve_devices(config.devices).processes)
            return
        except DataError as error:
            trouble = error
    if trouble is not None:
        raise trouble


def _check_freeze(method: Method, config: OptimConfig) -> None:
    """Check that parameters are left to train while the encoder is frozen.

    Raises:
        ConfigError: if there are none outside the encoder.
    """
    inside = {parameter for encoder in method.networks().values() for parameter in encoder.parameters()}
    beside = any(parameter.requires_grad and parameter not in inside for parameter in method.parameters())
    if config.freeze_encoder_ratio and not beside:
        raise ConfigError(
            f"optim.freeze_encoder_ratio={config.freeze_encoder_ratio}: {method.name} trains only its "
            "encoder; leave it out"
        )


def _check_pool(method: Method, config: RunConfig) -> None:
    """Check that a pooling with parameters is part of the method's loss; otherwise it would be exported untrained.

    Raises:
        ConfigError: if it doesn't.
    """
    if not method.networks():
        return
    pool = next(iter(method.networks().values())).vit.attn_pool
    if pool is not None and any(True for _ in pool.parameters()) and not method.pools_images:
        raise ConfigError(
            f"pool={config.pool}: the loss of {method.name} uses patch tokens only, so the parameters of this pooling "
            "would stay untrained; choose auto, cls, avg, or prr without norms"
        )


def _start(run: Path, config: RunConfig, images: Dataset, checkpoint: Path | None, quiet: bool) -> None:
    """Start the processes set by ``devices``, or use this one if it was started by a launcher or is the only one; the
    images are opened once in each.

    Raises:
        Interrupted: after a signal; the message says how to resume.
    """
    devices = resolve_devices(config.devices)
    if config.precision == "auto" and not quiet and _is_first_process():
        kind = "GPU" if devices.kind == "cuda" else "CPU"
        print(f"precision=auto: {chosen_precision(config)} on this {kind}", file=sys.stderr)
    try:
        if devices.processes > 1 and not under_launcher():
            launch(_work, (run, config, None, checkpoint, quiet), devices.processes)
        else:
            _work(run, config, images, checkpoint, quiet)
    except Interrupted as end:
        kept = latest_checkpoint(run)
        where = f"; checkpoint: {kept}" if kept is not None else ""
        name = signal.Signals(end.number).name
        line = f"interrupted by {name}{where}; resume with: smalti train --resume {shlex.quote(str(run))}"
        raise Interrupted(end.number, line if _is_first_process() else "") from None


def _resumed(state: TrainingState, checkpoint: Path | None, processes: int, micro_batch: int) -> str:
    """A line about the step at which a run resumes, and changes in how the batch is divided."""
    changes = [
        f"{name} {before} -> {now}"
        for name, before, now in (
            ("processes", state.num_processes, processes),
            ("micro_batch", state.micro_batch, micro_batch),
        )
        if before not in (0, now)
    ]
    return "; ".join((str(checkpoint), *changes))


def _work(run: Path, config: RunConfig, images: Dataset | None, checkpoint: Path | None, quiet: bool) -> None:
    """One process of a run.

    Raises:
        Interrupted: after a signal.
        RunError: if another process has ended.
    """
    interrupt = Interrupt()
    end_with_launcher()
    with handled_signals(interrupt.ask, None if under_launcher() else end_at_once):
        try:
            _train(run, config, images or open_training(config), checkpoint, quiet, interrupt)
        except StopRequested as stop:
            raise Interrupted(stop.number) from None
        except Exception as error:
            if not (reason := lost_process(error)):
                raise
            raise RunError(
                f"another process of this run has ended or can't be reached ({reason}); last checkpoint: "
                f"{latest_checkpoint(run) or 'none'}; resume with: smalti train --resume {shlex.quote(str(run))}"
            ) from error


def _first_decides(run: Path, checkpoint: Path | None) -> Path | None:
    """The checkpoint that the first of several processes resumes from, for all of them.

    Raises:
        RunError: if this process doesn't see the run directory.
    """
    chosen: list[Path | None] = [checkpoint]
    broadcast_object_list(chosen)  # the first process has written its files before
    for _ in range(SHARED_AFTER_S):
        if (run / CONFIG_FILE).is_file():
            return chosen[0]
        time.sleep(1)  # network file systems remember for a while that a file was missing
    raise RunError(
        f"{run}: does not exist on {socket.gethostname()}, where another process of this run works; all machines need "
        "the run directory, on a shared file system"
    )


def _prepare_method(config: RunConfig, images: Dataset, checkpoint: Path | None, device: torch.device) -> Method:
    """Build the method, bind it to the images, fit its statistics in a new run, and compile it if configured."""
    description = None if checkpoint is None else encoder_description(checkpoint)
    method = build_method(config, description)
    method.bind(images, config.data.image_size)
    if method.fit_images and checkpoint is None and not config.init:
        method.fit(fitting_batches(method, images, config))
    method = method.to(device)
    if config.compile:
        for module in method.modules():
            if isinstance(module, Block):
                module.compile()
                if isinstance(module.drop_path1, StochasticDepth):  # runs the parts of a block, not the block
                    module.attn.compile(dynamic=True)
                    module.mlp.compile(dynamic=True)
    return method


def _train(
    run: Path, config: RunConfig, images: Dataset, checkpoint: Path | None, quiet: bool, interrupt: Interrupt
) -> None:
    kind = resolve_devices("cpu" if config.devices == "cpu" else "auto").kind
    micro_batch, accumulate = divide_batch(config)
    accelerator = make_accelerator(
        kind, resolve_precision(config.precision, kind), accumulate, config.log.trackers, run
    )
    if accelerator.num_processes > 1:
        interrupt.synchronize(PATIENCE)
        checkpoint = _first_decides(run, checkpoint)
    method = _prepare_method(config, images, checkpoint, accelerator.device)
    limit_threads(method, micro_batch)
    if config.parallel == "fsdp" and accelerator.num_processes > 1:
        shard(method, accelerator.device)
    optimizer = build_optimizer(method.param_groups(), config.optim)
    main = accelerator.is_main_process
    state: TrainingState | None = None
    if checkpoint is not None:
        state = Checkpoints(run, method, optimizer, config.checkpoint, main).restore(checkpoint)

    views = method.make_views(config.data.image_size)

    def make_batches(start: int) -> Iterator[Views]:
        return iter(
            TrainLoader(
                images,
                views,
                batch_size=micro_batch,
                seed=config.seed,
                channels=config.data.channels,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                num_workers=num_workers(config),
                start_step=start,
                pin_memory=kind == "cuda",
            )
        )

    screen = Screen(method.name) if main and not quiet else None
    csv_log = CSVLog(run)
    listeners: tuple[Listener, ...] = ((csv_log,) if main else ()) + ((screen,) if screen else ())
    if config.log.trackers:
        accelerator.init_trackers(
            "smalti", config={name: str(value) for name, value in flatten(to_tree(config)).items()}
        )
        listeners += (Trackers(accelerator),) if main else ()
    if main and state is not None:
        csv_log.event(state.step, "resumed", _resumed(state, checkpoint, accelerator.num_processes, micro_batch))
    hook = EvaluationHook(config, run, evaluates=main, progress=interrupt.check) if config.eval.data else None
    counted = -1 if state is None else state.evaluated_step
    is_here = state is not None and (counted == state.step or not is_sharded(method))
    if hook is not None and main and is_here and hook.due(counted) and not hook.file(counted).exists():
        hook.evaluate(counted, method)  # already counted, but its file is missing
    loop = LoopConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        accumulate=accumulate,
        seed=config.seed,
        optim=config.optim,
        checkpoint=config.checkpoint,
        log=config.log,
        patience=config.eval.patience,
        evaluated_with=evaluated_with(config),
    )
    started = time.time()
    try:
        state = run_loop(
            method,
            optimizer,
            accelerator,
            make_batches,
            loop,
            run,
            state=state,
            hooks=() if hook is None else (hook,),
            listeners=listeners,
            unreadable=UnreadableLog(run / "unreadable.csv", len(images)),
            interrupt=interrupt,
        )
    finally:
        if screen is not None:
            screen.close()
        for tracker in accelerator.trackers:
            tracker.finish()  # not end_training, which would destroy the process group used below
    if main:
        record_end(run, started, method)
        if hook is not None and hook.before_and_after is not None:
            best = state.best_step if state.num_evaluations > 1 else None  # nothing is selected from one score
            hook.before_and_after.conclude(state.step, best, partial(encoder_at, run, config))
    accelerator.wait_for_everyone()


def _is_first_process() -> bool:
    """Whether this process writes files: the only one, or the first of several."""
    return int(os.environ.get("RANK", "0")) == 0
