"""Checkpoints: written atomically, resumed bit for bit.

A checkpoint is a folder ``checkpoints/step_00001000`` with ``weights.safetensors`` (the method), ``optimizer.pt``
(tensors and numbers, read with ``weights_only=True``), ``state.json``, and ``crc32.json`` with checksums of the first
two. Data order, augmentation and all random numbers are functions of seed and step, so no other state of data loader
or random number generators is stored.
"""

import contextlib
import errno
import json
import shutil
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from smalti.config import Count, build, settings
from smalti.errors import ConfigError, RunError, SmaltiError, WeightsError
from smalti.files import WRITING, remove_leftovers, sync, sync_folder, write_atomically
from smalti.methods.base import Method
from smalti.models.loading import CHECKPOINTS, STATE_FILE, WEIGHTS_FILE, latest_checkpoint
from smalti.models.weights import read_tensors, read_torch
from smalti.reading import read_mapping, reading
from smalti.training.parallel import gathered, optimizer_rows, rows_like

OPTIMIZER_FILE, CHECKSUM_FILE = "optimizer.pt", "crc32.json"
REPLACED = ".replaced_"
"""Prefix of a checkpoint's name while a new one of the same step replaces it."""


@settings
class CheckpointConfig:
    """When checkpoints are written and how many are kept; nothing here changes the trained weights."""

    every: Count = 500
    """Steps between checkpoints; one is always written at the last step."""
    keep: Count = 2
    """Number of newest checkpoints to keep; the best one, if the run is evaluated during training, is kept too."""


@dataclass
class TrainingState:
    """State of a run apart from weights and optimiser."""

    step: int = 0
    """Completed steps."""
    lr_scale: float = 1.0
    """Halved at each roll back."""
    setbacks: int = 0
    """How often the run was rolled back."""
    best_score: float | None = None
    """Highest score of an evaluation in training."""
    best_step: int | None = None
    """Its step; 0: before training."""
    evaluated_step: int = -1
    """Step of the newest evaluation counted here."""
    num_evaluations: int = 0
    """Number of evaluations from which the best one was selected."""
    without_best: int = 0
    """Evaluations since the best one; training stops when they reach ``eval.patience``."""
    evaluated_with: str = ""
    """Data and evaluation settings that affect these scores, apart from the weights."""
    num_processes: int = 1
    """Processes that train together."""
    micro_batch: int = 0
    """Images per forward pass of one process; 0: unknown."""
    warned: list[str] = field(default_factory=list)
    """Warnings of the method that have been logged."""


class Checkpoints:
    """The checkpoints of one run directory; only the main process writes, and all call :meth:`save` together.

    A checkpoint has whole tensors, whether or not the method is sharded.

    Args:
        run: the run directory.
        method: the method to save, not wrapped.
        optimizer: its optimiser, saved too.
        config: how often checkpoints are written, and how many are kept.
        main_process: whether this process writes.
    """

    def __init__(
        self,
        run: Path,
        method: Method,
        optimizer: torch.optim.Optimizer,
        config: CheckpointConfig,
        main_process: bool = True,
    ) -> None:
        self.run = run
        self.method = method
        self.optimizer = optimizer
        self.config = config
        self.main_process = main_process

    @property
    def folder(self) -> Path:
        """Folder of the checkpoints."""
        return self.run / CHECKPOINTS

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step_{step:08d}"

    def save(self, state: TrainingState) -> None:
        """Write the checkpoint of ``state.step`` to a temporary folder, rename it, and remove old ones.

        Raises:
            RunError: if the disk is full or can't be written; earlier checkpoints are unchanged.
        """
        weights = gathered(self.method.state_dict(), keep=self.main_process)
        optimizer = gathered(self.optimizer.state_dict(), keep=self.main_process)
        if not self.main_process:
            return
        final = self.path(state.step)
        temporary, aside = (self.folder / f"{start}{final.name}" for start in (WRITING, REPLACED))
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file({key: value.detach().contiguous() for key, value in weights.items()}, temporary / WEIGHTS_FILE)
            torch.save(optimizer, temporary / OPTIMIZER_FILE)
            sums = {name: _checksum(temporary / name) for name in (WEIGHTS_FILE, OPTIMIZER_FILE)}
            (temporary / CHECKSUM_FILE).write_text(json.dumps(sums), encoding="utf-8")
            (temporary / STATE_FILE).write_text(json.dumps(self._describe(state), indent=2), encoding="utf-8")
            sync_folder(temporary)
            shutil.rmtree(aside, ignore_errors=True)
            if final.exists():
                final.rename(aside)
            temporary.rename(final)
            sync(self.folder)
            shutil.rmtree(aside, ignore_errors=True)
        except Exception as error:  # safetensors and torch wrap a full disk in errors of their own
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, SmaltiError) or not _is_disk_trouble(error):
                raise
            last = latest_checkpoint(self.run)
            raise RunError(
                f"{final}: the checkpoint could not be written ({_reason(error)}); last good checkpoint: "
                f"{last or 'none'}; free some space and resume with: smalti train --resume {self.run}"
            ) from error
        self._prune(state)

    def update_state(self, state: TrainingState) -> None:
        """Rewrite the state file of the checkpoint of ``state.step``; its weights are unchanged."""
        if self.main_process:
            write_atomically(self.path(state.step) / STATE_FILE, json.dumps(self._describe(state), indent=2))

    def restore(self, path: Path) -> TrainingState:
        """Load weights, optimiser and state from a checkpoint folder.

        Raises:
            WeightsError: if a part is missing, damaged or from another method.
        """
        with reading(path, "a checkpoint of this run", WeightsError):
            return self._restore(path)

    def _restore(self, path: Path) -> TrainingState:
        state = _read_state(path)
        weights = read_tensors(path / WEIGHTS_FILE)
        own = self.method.state_dict()
        misfits = sorted({*weights} ^ {*own}) or [key for key in own if own[key].shape != weights[key].shape]
        if misfits:
            raise WeightsError(
                f"{path}: doesn't match the method and architecture in the run's config.yaml: "
                f"'{misfits[0]}' is missing, unexpected or has another shape"
            )
        self.method.load_state_dict({key: rows_like(value, own[key]) for key, value in weights.items()})
        self.optimizer.load_state_dict(optimizer_rows(read_torch(path / OPTIMIZER_FILE), self.optimizer))
        return state

    def _describe(self, state: TrainingState) -> dict[str, Any]:
        """Content of ``state.json``: the state, and which weights belong to which encoder."""
        networks = self.method.networks()
        names = {module: name for name, module in self.method.named_modules()}
        keys: dict[Tensor, str] = {parameter: key for key, parameter in self.method.named_parameters()}
        heads, prunings = {}, {}
        for name in networks:
            pruning = self.method.token_pruning(name)
            if pruning is not None:
                prunings[name] = {
                    "blocks": pruning.blocks, "keep_ratio": pruning.keep_ratio, "predictors": names[pruning.predictors]
                }  # fmt: skip
            head = self.method.class_head(name)
            if head is not None:
                heads[name] = {**head._asdict(), "weight": keys[head.weight], "bias": keys[head.bias]}
        return {
            "state": asdict(state),
            "method": self.method.name,
            "encoder": next(iter(networks.values())).config() if networks else {},
            "networks": {name: names[encoder] for name, encoder in networks.items()},
            "export_network": self.method.export_network,
            **({"class_heads": heads} if heads else {}),
            **({"token_prunings": prunings} if prunings else {}),
        }

    def last_good(self) -> Path | None:
        """The newest readable checkpoint whose step is a multiple of ``checkpoint.every``; a run is rolled back to it.
        None if there is none.

        Checkpoints written for an evaluation or a signal are not used, so that neither can change the weights.
        """
        for _, path in reversed(self._regular()):
            with contextlib.suppress(WeightsError):
                check_checkpoint(path)
                return path
        return None

    def _regular(self) -> list[tuple[int, Path]]:
        return sorted((step, path) for step, path in _finished(self.run) if step % self.config.every == 0)

    def _prune(self, state: TrainingState) -> None:
        """Keep the newest regular checkpoints, and of the others only the best and the one just written."""
        stay = {path for _, path in self._regular()[-max(self.config.keep, 1) :]}
        stay |= {self.path(step) for step in (state.step, state.best_step) if step is not None}
        for path in self.folder.glob("step_*"):
            if path not in stay:
                shutil.rmtree(path, ignore_errors=True)


def check_checkpoint(path: Path) -> None:
    """Read a checkpoint completely and compare its checksums; without checksums, open its parts.

    Raises:
        WeightsError: if a part is missing or damaged.
    """
    _read_state(path)
    if not (path / CHECKSUM_FILE).exists():
        read_tensors(path / WEIGHTS_FILE)
        read_torch(path / OPTIMIZER_FILE)
        return
    sums = read_mapping(path / CHECKSUM_FILE, "the checksums of a checkpoint", WeightsError)
    for name in (WEIGHTS_FILE, OPTIMIZER_FILE):
        with reading(path / name, "a part of a checkpoint", WeightsError):
            is_whole = _checksum(path / name) == sums.get(name)
        if not is_whole:
            raise WeightsError(f"{path / name}: is damaged (its checksum differs from the stored one)")


def usable_checkpoint(run: Path, set_aside: bool) -> tuple[Path | None, list[str]]:
    """The newest readable checkpoint of a run, and a line about each newer one that is damaged.

    Args:
        run: the run directory.
        set_aside: rename the damaged ones to ``damaged_step_...``, so that they are ignored from now on; only one of
            several processes does.

    Returns:
        None if the run has no checkpoint yet.

    Raises:
        WeightsError: if it has some, and none of them can be read.
    """
    folder = run / CHECKPOINTS
    broken: list[tuple[Path, WeightsError]] = []
    for _, path in sorted(_finished(run), reverse=True):
        try:
            check_checkpoint(path)
            break
        except WeightsError as error:
            broken.append((path, error))
    else:
        if broken:
            raise WeightsError(f"{run}: none of its {len(broken)} checkpoints can be read; the newest: {broken[0][1]}")
        return None, []
    if set_aside:
        for old, _ in broken:
            aside = folder / f"damaged_{old.name}"
            shutil.rmtree(aside, ignore_errors=True)
            old.rename(aside)
    kept = f"rolled back to {path.name}; it is kept as damaged_"
    return path, [f"{error}; {kept}{old.name}" for old, error in broken]


def _finished(run: Path) -> list[tuple[int, Path]]:
    """Checkpoints with their steps, including damaged ones; temporary names are skipped."""
    found = ((path.name.removeprefix("step_"), path) for path in (run / CHECKPOINTS).glob("step_*"))
    return [(int(step), path) for step, path in found if step.isdigit()]


def tidy(run: Path) -> None:
    """Clean up after a killed process: remove temporary files, restore the name of a checkpoint being replaced."""
    folder = run / CHECKPOINTS
    for aside in folder.glob(f"{REPLACED}*"):
        final = folder / aside.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(final)
    remove_leftovers(folder)


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while part := file.read(2**22):
            total = zlib.crc32(part, total)
    return total


def read_state(run: Path) -> TrainingState:
    """The state of a run's newest checkpoint.

    Raises:
        WeightsError: if it has none, or it can't be read.
    """
    path = latest_checkpoint(run)
    if path is None:
        raise WeightsError(f"{run}: contains no complete checkpoint")
    return _read_state(path)


def _read_state(path: Path) -> TrainingState:
    file = path / STATE_FILE
    with reading(file, "the state of a checkpoint", WeightsError):
        known = json.loads(file.read_bytes())["state"]
        try:
            return build(TrainingState, known, str(file), group="state")
        except ConfigError as error:
            raise WeightsError(str(error)) from error


def _is_disk_trouble(error: Exception) -> bool:
    """Whether an error of a writer comes from the file system."""
    return isinstance(error, OSError) or any(
        word in str(error)
        for word in ("No space left", "os error", "PytorchStreamWriter", "unexpected pos", "I/O error")
    )


def _reason(error: Exception) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if "unexpected pos" in str(error):  # torch's message for an incomplete write
        return "the disk is full, or a limit on the size of files"
    return "the disk is full" if full else str(error).splitlines()[0]
