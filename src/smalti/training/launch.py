"""Devices and processes: what ``devices=``, ``precision=`` and ``micro_batch=`` mean on this machine."""

import importlib.util
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

from smalti.config import unknown_key
from smalti.errors import ConfigError, MissingExtraError
from smalti.functional.precision import has_bf16, multiplies_bf16
from smalti.methods.base import Method
from smalti.models.encoder import Encoder
from smalti.threads import chosen_by_command, chosen_by_user, usable_cores

PRECISIONS = {"fp32": "no", "bf16": "bf16"}
TRACKERS = ("tensorboard", "wandb", "mlflow")
MIN_LAYER_WORK = 5_000_000
"""Tokens per batch times their squared width, below which two threads are less than 10 % faster than one; measured in
docs/evidence/benchmarks.md."""
PATIENCE = timedelta(hours=2)  # one process evaluates while the others wait


@dataclass(frozen=True)
class Devices:
    """Devices of a run."""

    kind: str
    """``cuda`` or ``cpu``."""
    processes: int
    """Number of processes, one per device."""


def resolve_devices(devices: int | str) -> Devices:
    """Resolve ``devices=auto|cpu|N`` on this machine: one GPU or the CPU, or N GPUs, or N processes on the CPU. Under a
    launcher, N may count the GPUs of several machines.

    Raises:
        ConfigError: for another value, or more GPUs than available.
    """
    gpus = torch.cuda.device_count()
    if devices == "auto":
        return Devices("cuda" if gpus else "cpu", 1)
    if devices == "cpu":
        return Devices("cpu", 1)
    if not isinstance(devices, int) or devices < 1:
        raise ConfigError(f"devices={devices!r}: auto, cpu or a number of at least 1 is needed")
    if gpus and devices > gpus and not under_launcher():
        raise ConfigError(f"devices={devices}: this machine has only {gpus} GPU{'s' if gpus > 1 else ''}")
    return Devices("cuda" if gpus else "cpu", devices)


def resolve_precision(precision: str, kind: str) -> str:
    """Resolve ``auto``: bf16 on GPUs with native support (not emulated), else fp32.

    Raises:
        ConfigError: for another name (float16 isn't supported, since its loss scaling would make resuming inexact), or
            bf16 on a CPU for which torch lacks it.
    """
    if precision == "auto":
        return "bf16" if has_bf16(kind) else "fp32"
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r}: one of auto, {', '.join(PRECISIONS)} is needed")
    if precision == "bf16" and kind == "cpu" and not multiplies_bf16(kind):
        raise ConfigError("precision=bf16: this torch can't multiply matrices in bfloat16 on this CPU; use fp32")
    return precision


def split_batch(batch_size: int, micro_batch: int | None, processes: int) -> tuple[int, int]:
    """How a step's images are divided over processes and accumulation steps.

    Args:
        batch_size: images per optimiser step.
        micro_batch: images per forward pass of one process; None: all images of a process in a step.
        processes: number of training processes, one per device.

    Returns:
        Images per forward pass of one process, and forward passes per process and step.

    Raises:
        ConfigError: if the images can't be divided evenly; the line names numbers that work.
    """
    if micro_batch is not None and micro_batch < 1:
        raise ConfigError(f"micro_batch={micro_batch}: at least 1 is needed; leave it out for batch_size / devices")
    if batch_size % processes:
        below = max(batch_size // processes, 1)
        near = (below * processes, (below + 1) * processes)
        works = " or ".join(f"batch_size={size}" for size in near)
        fewer = [count for count in range(processes - 1, 0, -1) if batch_size % count == 0][:1]
        works += "".join(f", or devices={count}" for count in fewer)
        raise ConfigError(f"batch_size={batch_size} can't be divided over devices={processes}; use {works}")
    own = batch_size // processes
    if micro_batch is None:
        return own, 1
    if own % micro_batch:
        fits = [size for size in range(1, own + 1) if own % size == 0]
        smaller, larger = [size for size in fits if size < micro_batch], [size for size in fits if size > micro_batch]
        works = " or ".join(f"micro_batch={size}" for size in (*smaller[-1:], *larger[:1]))
        of = f"batch_size={batch_size}" + (f" on devices={processes} ({own} each)" if processes > 1 else "")
        raise ConfigError(f"{of} is not a multiple of micro_batch={micro_batch}; use {works}")
    return micro_batch, own // micro_batch


def num_processes(devices: int | str) -> int:
    """Number of processes of a run: the launcher's, or as set by ``devices``."""
    return int(os.environ["WORLD_SIZE"]) if under_launcher() else resolve_devices(devices).processes


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that don't exist or aren't installed.

    Raises:
        ConfigError: for a name that isn't among ``TRACKERS``.
        MissingExtraError: if the tracker's package isn't installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(unknown_key(name, TRACKERS, kind="tracker"))
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(f'log.trackers={name} needs the package {name}: pip install "smalti[{name}]"')


def under_launcher() -> bool:
    """Whether torchrun, srun or Smalti started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def make_accelerator(
    kind: str, precision: str, accumulate: int, trackers: tuple[str, ...] = (), folder: Path | None = None
) -> Accelerator:
    """Create the Accelerator of this process; trackers write their files to ``folder``. An earlier one with another
    precision must no longer be used."""
    if AcceleratorState._shared_state.get("_mixed_precision", PRECISIONS[precision]) != PRECISIONS[precision]:
        AcceleratorState._reset_state()  # otherwise it refuses a second run with another precision
    return Accelerator(
        cpu=kind == "cpu",
        project_dir=folder,
        mixed_precision=PRECISIONS[precision],
        gradient_accumulation_steps=accumulate,
        log_with=list(trackers) or None,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )


def share_threads(processes: int) -> None:
    """Divide the usable cores among processes that train on the CPU, unless the user has set OMP_NUM_THREADS."""
    if not torch.cuda.is_available() and not chosen_by_user():
        torch.set_num_threads(max(1, usable_cores() // processes))


def limit_threads(method: Method, batch_size: int) -> None:
    """Use one thread for small steps, where synchronisation costs as much as a second thread gains.

    Only if the command chose the number of threads; the user's OMP_NUM_THREADS and the threads of a host program are
    respected.

    Args:
        method: the method of the run; one without an encoder keeps its threads.
        batch_size: images per forward pass of this process.
    """
    encoders = method.networks().values()
    if (
        chosen_by_command()
        and encoders
        and max(layer_work(encoder, batch_size) for encoder in encoders) < MIN_LAYER_WORK
    ):
        torch.set_num_threads(1)


def layer_work(encoder: Encoder, batch_size: int) -> int:
    """Patches of a batch times the squared width; each matrix product of a block needs 1 to 4 times as many
    multiplications."""
    (height, width), (patch_height, patch_width) = encoder.img_size, encoder.patch_size
    return batch_size * (height // patch_height) * (width // patch_width) * encoder.embed_dim**2
