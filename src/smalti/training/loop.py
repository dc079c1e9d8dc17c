"""The training loop of all runs, independent of any method."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from smalti.config import Count, settings
from smalti.data.loader import UnreadableLog, key_of_step, sample_key
from smalti.data.views import Views
from smalti.errors import Interrupted, RunError
from smalti.functional.processes import own_part
from smalti.methods.base import Method
from smalti.training.checkpoint import CheckpointConfig, Checkpoints, TrainingState
from smalti.training.health import GRAD_NORM, WEIGHTS, Health, HealthReading, feature_health
from smalti.training.interrupt import Interrupt, StopRequested
from smalti.training.optim import OptimConfig, peak_lr
from smalti.training.parallel import callable_parts, is_sharded, prepare
from smalti.training.step import StepResult, Whole, training_step

_WATCHED = {GRAD_NORM: "the gradient norm is", WEIGHTS: "the weights are"}
MAX_SETBACKS = 3
HEALTH_IMAGES = 32


@settings
class LogConfig:
    """Logging; nothing here changes the trained weights."""

    every: Count = 50
    """Steps between rows of ``log.csv``; non-finite values are checked for at the same steps."""
    trackers: tuple[str, ...] = ()
    """Additional trackers, by Accelerate's names: ``tensorboard``, ``wandb``, ``mlflow``."""


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a run that the loop uses."""

    steps: int
    batch_size: int
    """Images per optimiser step, over all processes and accumulated gradients."""
    accumulate: int
    """Forward and backward passes per process and step."""
    seed: int
    optim: OptimConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    patience: int = 0
    """Evaluations without a new best after which training stops; 0 never stops early."""
    evaluated_with: str = ""
    """Settings that affect the scores of hooks; if they change, the best score so far is discarded."""


@runtime_checkable
class Listener(Protocol):
    """Receives the progress of training: log file, progress bar or tracker."""

    def started(self, step: int, steps: int) -> None:
        """Training starts or resumes after ``step`` steps."""

    def step(self, step: int) -> None:
        """``step`` steps are completed."""

    def row(self, row: dict[str, float]) -> None:
        """A row of the log."""

    def event(self, step: int, event: str, detail: str) -> None:
        """An event to log: resumed, rolled back, skipped images."""


@runtime_checkable
class Hook(Protocol):
    """Called after some of the steps, such as for evaluation during training."""

    def due(self, step: int) -> bool:
        """Whether to call it after ``step`` steps, the same in all processes, which first check together for non-finite
        values."""

    def __call__(self, step: int, method: Method) -> float | None:
        """Run the hook, in the main process only, where a sharded method can't be called; the checkpoint of this step
        is then written already. A returned number is a score (higher is better), passed to all
        processes; the best step's checkpoint is kept."""


def train(
    method: Method,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    make_batches: Callable[[int], Iterator[Views]],
    config: LoopConfig,
    run: Path,
    *,
    state: TrainingState | None = None,
    hooks: tuple[Hook, ...] = (),
    listeners: tuple[Listener, ...] = (),
    unreadable: UnreadableLog | None = None,
    interrupt: Interrupt | None = None,
) -> TrainingState:
    """Train until ``config.steps``, until ``config.patience`` scores in a row without a new best, or until a signal.

    Args:
        method: on the accelerator's device, not wrapped; its parameters may be sharded.
        optimizer: over the method's parameter groups.
        accelerator: device, precision, processes.
        make_batches: infinite iterator over batches of this process, from a given batch number on.
        config: settings of the loop.
        run: the run directory.
        state: state of a resumed run, whose weights are already restored; None: start a new run.
        hooks: called after the steps at which they are due, including step 0.
        listeners: receive rows and events.
        unreadable: collects images that could not be read.
        interrupt: whether a signal to stop was received; None: never.

    Returns:
        The state after the last step.

    Raises:
        Interrupted: after a signal; the current step was finished and its checkpoint written.
        RunError: at the third roll back because of non-finite values, or if a checkpoint can't be written.
        DataError: when too many images are unreadable.
    """
    optim, device = config.optim, accelerator.device
    model, prepared = prepare(accelerator, method, optimizer)
    world, rank = accelerator.num_processes, accelerator.process_index
    checkpoints = Checkpoints(run, method, optimizer, config.checkpoint, accelerator.is_main_process)
    is_new = state is None
    state = TrainingState() if state is None else state
    if config.evaluated_with and state.evaluated_with != config.evaluated_with:  # earlier scores are not comparable
        state.best_score, state.best_step, state.without_best, state.num_evaluations = None, None, 0, 0
        state.evaluated_with = config.evaluated_with
    state.num_processes, state.micro_batch = world, config.batch_size // (config.accumulate * world)
    if is_new:
        checkpoints.save(state)  # to roll back to
    interrupt = interrupt or Interrupt()

    health, clock = Health(), Clock(config.batch_size)
    batches = make_batches(state.step * config.accumulate)
    method.train()

    def read(views: Views) -> Views:
        if unreadable is not None:
            unreadable.add(views.skipped)
        return views.to(device)

    stop = 0
    if state.evaluated_step < state.step:  # before training, or after a kill during an evaluation
        stop = _run_hooks([hook for hook in hooks if hook.due(state.step)], method, state, checkpoints, accelerator)
    clock.start(state.step)
    for listener in listeners:
        listener.started(state.step, config.steps)

    while state.step < config.steps and not _has_lost_patience(state, config) and not stop:
        progress = state.step / config.steps
        torch.manual_seed(
            sample_key(config.seed, state.step, rank)
        )  # random numbers depend on seed, step and rank only
        done = training_step(
            method,
            optimizer,
            (read(next(batches)) for _ in range(config.accumulate)),
            optim,
            peak=peak_lr(optim, config.batch_size) * state.lr_scale,
            progress=progress,
            model=model,
            update=prepared,
            engine=accelerator,
            whole=Whole(key_of_step(config.seed, state.step), config.batch_size, rank, world),
        )
        state.step += 1
        stop = interrupt.agreed()
        health.observe(state.step, done.losses, done.grad_norm, done.observations)

        last = state.step == config.steps
        to_log = last or state.step == 1 or state.step % config.log.every == 0
        to_save = last or state.step % config.checkpoint.every == 0 or stop != 0
        due = [hook for hook in hooks if hook.due(state.step)]
        if to_log or to_save or due:
            reading = health.read(state.step, map(own_part, method.state_dict().values()))
            if reading.bad:
                state = _roll_back(checkpoints, state, reading.bad, listeners)
                accelerator.wait_for_everyone()
                batches = make_batches(state.step * config.accumulate)
                clock.start(state.step)
                continue
            if to_log:
                with callable_parts(method):
                    row = _log_row(state.step, config.steps, done, reading, method, accelerator)
                    findings = method.diagnose(done.views, progress)
                row |= findings.numbers
                for name, text in findings.warnings.items():
                    if name not in state.warned:
                        state.warned.append(name)
                        for listener in listeners:
                            listener.event(state.step, name, text)
                row |= clock.read(state.step)
                for listener in listeners:
                    listener.row(row)
        for listener in listeners:
            listener.step(state.step)
        if to_save:
            checkpoints.save(state)
        if due and not stop:
            if is_sharded(method) and not to_save:
                checkpoints.save(state)  # hooks take whole weights from there
            stop = _run_hooks(due, method, state, checkpoints, accelerator)
            if stop and not to_save:
                checkpoints.save(state)
            if _has_lost_patience(state, config) and not last:
                if not to_save:
                    checkpoints.save(state)
                text = f"none of the last {config.patience} evaluations was better than that of step {state.best_step}"
                for listener in listeners:
                    listener.event(state.step, "stopped early", text)
    interrupt.finish()
    is_evaluated = state.evaluated_step == state.step or not any(hook.due(state.step) for hook in hooks)
    if stop and not (state.step == config.steps and is_evaluated):
        for listener in listeners:
            listener.event(state.step, "interrupted", signal.Signals(stop).name)
        accelerator.wait_for_everyone()  # until the checkpoint is written
        raise Interrupted(stop)
    return state


def _log_row(
    step: int, steps: int, done: StepResult, reading: HealthReading, method: Method, accelerator: Accelerator
) -> dict[str, float]:
    """A row of the log: schedules, means since the last row, and feature statistics of the exported network."""
    losses_sum = sum(value for name, value in reading.means.items() if name.startswith("loss/"))
    row = {"step": float(step), "progress": step / steps, "lr": done.lr}
    row |= {"weight_decay": done.weight_decay, "loss": losses_sum, **reading.means}
    if method.export_network:
        encoder = method.networks()[method.export_network]
        with accelerator.autocast():
            row |= feature_health(encoder, encoder.normalize(done.views.global_crops[:HEALTH_IMAGES]))
    return row


def _run_hooks(
    hooks: list[Hook],
    method: Method,
    state: TrainingState,
    checkpoints: Checkpoints,
    accelerator: Accelerator,
) -> int:
    """Call the hooks and track the best score, which is stored with the step's checkpoint, so that a resumed run stops
    at the same step as an uninterrupted one.

    Returns:
        The signal that stopped a hook early, else 0; a resumed run calls the hooks again.
    """
    if not hooks:
        return 0
    is_best = False
    for hook in hooks:
        outcome: list[Any] = [None, 0]
        try:
            outcome[0] = hook(state.step, method)
        except StopRequested as stop:
            outcome[1] = stop.number
        if accelerator.num_processes > 1:
            broadcast_object_list(outcome)  # all processes stop, or none
        score, number = outcome
        if number:
            return int(number)
        if score is None:
            continue
        state.num_evaluations += not math.isnan(score)
        if not math.isnan(score) and (state.best_score is None or score > state.best_score):
            state.best_score, state.best_step, state.without_best, is_best = score, state.step, 0, True
        else:
            state.without_best += 1
    state.evaluated_step = state.step
    if is_best:
        checkpoints.save(state)
    elif checkpoints.path(state.step).exists():
        checkpoints.update_state(state)
    return 0


def _has_lost_patience(state: TrainingState, config: LoopConfig) -> bool:
    return 0 < config.patience <= state.without_best


def _roll_back(
    checkpoints: Checkpoints,
    state: TrainingState,
    bad: dict[str, int],
    listeners: tuple[Listener, ...],
) -> TrainingState:
    """Restore the last good checkpoint and halve the learning rate.

    Raises:
        RunError: at the third roll back, or without a checkpoint; names the term and the step.
    """
    name, step = min(bad.items(), key=lambda item: item[1])
    kind = f"loss term '{name.removeprefix('loss/')}' is" if name.startswith("loss/") else _WATCHED[name]
    others = "the others are finite" if len(bad) == 1 else f"also not finite: {', '.join(k for k in bad if k != name)}"
    found = [checkpoints.last_good()]
    broadcast_object_list(found)  # on a shared file system another process may see other files
    path = found[0]
    text = f"{kind} not finite at step {step} ({others}); last good checkpoint: {path}"
    setbacks = state.setbacks + 1
    if setbacks >= MAX_SETBACKS:
        raise RunError(
            f"{text}; training stops at the {setbacks}rd time: lower optim.lr (it was halved {setbacks - 1} "
            "times), clip gradients (optim.clip_norm=1) or use precision=fp32"
        )
    if path is None:
        raise RunError(f"{text}; no checkpoint to roll back to; start again with a lower optim.lr")
    state = checkpoints.restore(path)
    state.setbacks, state.lr_scale = setbacks, 0.5**setbacks
    checkpoints.update_state(state)
    for listener in listeners:
        listener.event(state.step, "rolled back", f"{text}; learning rate halved to {state.lr_scale:g} of its schedule")
    return state


class Clock:
    """Measures throughput and memory."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self._start = self._last = time.perf_counter()
        self._last_step = 0
        self._process = psutil.Process()

    def start(self, step: int) -> None:
        """Start measuring."""
        self._last, self._last_step = time.perf_counter(), step

    def read(self, step: int) -> dict[str, float]:
        """``images_per_s`` since the last reading, ``elapsed_s`` of this process, ``memory_mib`` (GPU peak or RSS)."""
        now = time.perf_counter()
        rate = self.images_per_step * (step - self._last_step) / max(now - self._last, 1e-9)
        self._last, self._last_step = now, step
        gpu = torch.cuda.is_available()
        memory = torch.cuda.max_memory_allocated() if gpu else self._process.memory_info().rss
        return {"images_per_s": rate, "elapsed_s": now - self._start, "memory_mib": memory / 2**20}
