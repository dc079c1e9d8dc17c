"""The report of ``smalti doctor``: versions, devices, data, and what a run needs, from measured steps.

Letters: b images in a batch.
"""

import gc
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from smalti.config import to_tree
from smalti.data.workers import SHARED_MEMORY, shared_memory_mib
from smalti.errors import ConfigError
from smalti.preflight.dataset import DataReport, Progress, fact_line, look_at_data
from smalti.preflight.devices import MARGIN, Hardware, find_devices, main_memory
from smalti.preflight.keep import KeepReport
from smalti.runs.config import DataConfig
from smalti.runs.machine import describe_machine, package_version
from smalti.training.launch import split_batch

_EXTRAS = {"samples": "scikit-image", "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_MIN_MEASURED_S, _MAX_MEASURED_STEPS = 1.0, 5
_CPU_FIRST_BATCH = 4
_CPU_STEP_S = 10.0  # longest measured step; a smaller batch than the run's is measured if it would take longer
_MIB = 2**20

MakeStep = Callable[[int], Callable[[], None]]
"""``make_step(batch_size)`` returns a function that runs one training step."""


@dataclass(frozen=True)
class Measured:
    """Time and memory of steps with one batch size."""

    batch_size: int
    seconds: float
    """Duration of the fastest step; other processes may slow down the others."""
    memory_mib: float
    """Peak memory: allocated on the GPU, or resident memory of this process."""


@dataclass(frozen=True)
class StepEstimate:
    """What a training run will need, from steps measured at two batch sizes."""

    device: str
    batch_size: int
    """Images per optimiser step, over all devices."""
    micro_batch: int
    """Images per forward pass of one device."""
    accumulate: int
    """Forward and backward passes of one device per step."""
    steps: int
    measured: tuple[Measured, Measured]
    """Measured with the smaller and the larger micro-batch."""
    free_mib: float
    """Memory of the device available to the run."""
    checkpoint_mib: float
    """Size of one checkpoint: weights and optimiser."""
    keep: int
    """Number of checkpoints kept."""
    shared_mib: float = 0.0
    """Shared memory that data workers need."""

    @property
    def seconds(self) -> float:
        """Duration of one optimiser step, without communication between devices."""
        return max(self._at(self.micro_batch, [one.seconds for one in self.measured]), 0.0) * self.accumulate

    @property
    def memory_mib(self) -> float:
        """Peak memory of one device at ``micro_batch``."""
        return self._at(self.micro_batch, [one.memory_mib for one in self.measured])

    @property
    def largest_micro_batch(self) -> int | None:
        """Largest ``micro_batch`` that fits into the free memory less :data:`MARGIN`; 0 if not even one image fits.

        None if measured memory does not grow with the batch.
        """
        if self._sizes == [1, 1]:
            return 1
        fixed, each = _fit(self._sizes, [one.memory_mib for one in self.measured])
        if each <= 0:
            return None
        return max(math.floor((self.free_mib * (1 - MARGIN) - fixed) / each), 0)

    @property
    def proposed_micro_batch(self) -> int | None:
        """The largest ``micro_batch`` that divides the images of one device and fits into its memory; None: none fits.
        An even number, if there is one: some methods pair images."""
        own, largest = self.micro_batch * self.accumulate, self.largest_micro_batch
        limit = own if largest is None else largest
        fits = [size for size in range(1, min(own, limit) + 1) if own % size == 0]
        return max((size for size in fits if size % 2 == 0), default=max(fits, default=None))

    @property
    def hours(self) -> float:
        """Duration of the whole run."""
        return self.seconds * self.steps / 3600

    @property
    def disk_mib(self) -> float:
        """Disk space of the checkpoints: those kept, the best one, and one being written."""
        return self.checkpoint_mib * (self.keep + 2)

    @property
    def fits(self) -> bool:
        """Whether ``micro_batch`` images fit into the free memory less :data:`MARGIN`."""
        return self.largest_micro_batch is None or self.micro_batch <= self.largest_micro_batch

    def lines(self) -> list[str]:
        """The estimate as text."""
        sizes = " and ".join(str(size) for size in self._sizes)
        own = self.micro_batch * self.accumulate
        rate = own / self.seconds if self.seconds else math.inf
        largest = self.largest_micro_batch
        limit = (
            "growth with micro_batch is too small to measure"
            if largest is None
            else f"largest micro_batch about {largest:,}"
        )
        devices = "" if own == self.batch_size else f" on {self.batch_size // own} devices"
        times = "" if self.accumulate == 1 else f" x {self.accumulate:,} accumulated"
        return [
            fact_line("batch", f"batch_size={self.batch_size:,}{devices}: micro_batch={self.micro_batch:,}{times}"),
            fact_line("step", f"{self.seconds:.3g} s on {self.device} ({rate:,.3g} images/s per device)"),
            fact_line("", f"measured at micro_batch {sizes}"),
            fact_line("needs memory", f"{self.memory_mib / 1024:.2f} of {self.free_mib / 1024:.1f} GiB free; {limit}"),
            fact_line("needs time", f"{_duration(self.seconds * self.steps)} for {self.steps:,} steps"),
            fact_line(
                "needs disk",
                f"{self.disk_mib / 1024:.2f} GiB: checkpoints of {self.checkpoint_mib:,.0f} MiB, {self.keep} kept, "
                "the best, one being written",
            ),
        ]

    @property
    def _sizes(self) -> list[int]:
        return [one.batch_size for one in self.measured]

    def _at(self, batch_size: int, values: Sequence[float]) -> float:
        fixed, each = _fit(self._sizes, values)
        return fixed + each * batch_size


@dataclass(frozen=True)
class DoctorReport:
    """Everything that ``smalti doctor`` reports."""

    versions: dict[str, str]
    extras: dict[str, str]
    """Name of an extra -> version of its package, or ``not installed``."""
    devices: Hardware
    disk_free_mib: float
    out: Path
    """Folder whose disk was checked."""
    data: DataReport | None
    step: StepEstimate | None
    keep: KeepReport | None = None
    shared_mib: float | None = None
    """Free shared memory, through which data workers pass batches; None if the system has none."""

    @property
    def problems(self) -> list[str]:
        """Problems that will cause errors or misleading results, one sentence each; empty if none were found."""
        found = list(self.data.problems) if self.data is not None else []
        if self.step is not None:
            found += self._step_problems(self.step)
        return found

    def lines(self) -> list[str]:
        """The report as text, with blank lines between its parts and problems at the end."""
        have = [f"{name} {version}" for name, version in self.versions.items()]
        parts = [
            [
                fact_line("versions", ", ".join(have[:4])),
                *(fact_line("", ", ".join(have[n : n + 4])) for n in range(4, len(have), 4)),
            ],
            [fact_line("extras", ", ".join(f"{name} {version}" for name, version in self.extras.items()))],
            self.devices.lines(),
            [fact_line("disk", f"{self.disk_free_mib / 1024:,.1f} GiB free at {self.out.absolute()}")],
            [fact_line("shared mem", f"{self.shared_mib:,.0f} MiB free in {SHARED_MEMORY}")] if self.shared_mib else [],
        ]
        parts = [[line for part in parts for line in part]]
        if self.data is not None:
            parts.append(self.data.lines())
        if self.step is not None:
            parts.append(self.step.lines())
        if self.keep is not None:
            parts.append(self.keep.lines())
        problems = self.problems
        parts.append([f"! {problem}" for problem in problems] or ["no problems found"])
        return [line for number, part in enumerate(parts) for line in ([""] if number else []) + part]

    def to_json(self) -> dict[str, Any]:
        """Plain values, including derived ones."""
        plain: dict[str, Any] = to_tree(self)
        if self.step is not None:
            sizes = ("largest_micro_batch", "proposed_micro_batch", "fits")
            worked_out = ("seconds", "memory_mib", *sizes, "hours", "disk_mib")
            plain["step"] |= {name: getattr(self.step, name) for name in worked_out}
        if self.keep is not None:
            plain["keep"] |= {"pays": self.keep.pays}
        return plain | {"problems": self.problems}

    def _step_problems(self, step: StepEstimate) -> list[str]:
        found = []
        if self.shared_mib is not None and step.shared_mib > self.shared_mib:
            found.append(
                f"data workers need {step.shared_mib:,.0f} MiB of shared memory, {SHARED_MEMORY} has "
                f"{self.shared_mib:,.0f} MiB free; lower data.num_workers, or enlarge it (docker run --shm-size=8g)"
            )
        if not step.fits:
            size = step.proposed_micro_batch
            remedy = f"use micro_batch={size}" if size else "use a smaller encoder or image_size"
            found.append(
                f"micro_batch={step.micro_batch:,} needs {step.memory_mib / 1024:.2f} GiB, "
                f"{step.free_mib * (1 - MARGIN) / 1024:.2f} GiB can be used on {step.device}; {remedy}"
            )
        if step.disk_mib > self.disk_free_mib:
            found.append(
                f"checkpoints need {step.disk_mib / 1024:.2f} GiB, {self.out} has {self.disk_free_mib / 1024:.2f} GiB "
                "free; lower checkpoint.keep or choose another --out"
            )
        if self.data is not None and self.data.files is not None and self.data.trained_on < step.batch_size:
            found.append(f"fewer images than a batch of {step.batch_size:,}: each batch repeats some of them")
        return found


def doctor(
    data: str | None = None,
    settings: DataConfig | None = None,
    *,
    against: str | None = None,
    out: Path = Path(),
    step: StepEstimate | None = None,
    keep: KeepReport | None = None,
    progress: Progress | None = None,
) -> DoctorReport:
    """Check this machine and, if given, the data.

    Args:
        data: images or recordings as for :func:`~smalti.preflight.dataset.look_at_data`; all images are read once.
        settings: how the data are read; None: the defaults.
        against: a second set, to evaluate on; its images that are also trained on are reported.
        out: where a run would be written; need not exist.
        step: result of :func:`measure_step`.
        keep: result of :func:`~smalti.preflight.keep.measure_keep`.
        progress: called as ``progress(done, total)`` while files are read.

    Raises:
        ConfigError: for ``against`` without ``data``.
        DataError: if nothing can be read, or the layout is ambiguous.
    """
    if against is not None and data is None:
        raise ConfigError("--against compares two sets of images; also name the first: smalti doctor DATA")
    return DoctorReport(
        versions=describe_machine()["versions"] | {"cuda": str(torch.version.cuda or "not in this torch")},
        extras={name: package_version(package) for name, package in _EXTRAS.items()},
        devices=find_devices(),
        disk_free_mib=shutil.disk_usage(_existing(out)).free / _MIB,
        out=out,
        data=None if data is None else look_at_data(data, settings, against=against, progress=progress),
        step=step,
        keep=keep,
        shared_mib=shared_memory_mib(),
    )


def measure_step(
    make_step: MakeStep,
    *,
    batch_size: int,
    steps: int,
    micro_batch: int | None = None,
    processes: int = 1,
    device: torch.device | str = "cpu",
    checkpoint_mib: float = 0.0,
    keep: int = 2,
    batch_sizes: tuple[int, int] | None = None,
    shared_mib: float = 0.0,
    clock: Callable[[], float] | None = None,
) -> StepEstimate:
    """Run a few steps at two batch sizes and estimate what a run needs.

    Memory and time are assumed to grow linearly with the batch size. Both sizes are even, since some methods pair
    images. The larger one is the micro-batch; it is halved until it fits on a GPU, and smaller on a CPU if a step would
    take too long or fill the memory.

    Args:
        make_step: builds method, optimiser and a batch of that size, and returns a function that runs one step.
            If the function also reads the images, this time is included.
        batch_size: images per optimiser step of the run.
        steps: steps of the run.
        micro_batch: images per forward pass of one device; None: ``batch_size / processes``.
        processes: processes of the run, one per device; one of them is measured.
        device: device of ``make_step``.
        checkpoint_mib: size of one checkpoint, weights and optimiser.
        keep: number of checkpoints kept.
        batch_sizes: the two sizes to measure, ascending; None: chosen automatically.
        shared_mib: shared memory that data workers of the run need.
        clock: seconds, such as ``time.process_time``; None: real time.

    Raises:
        ConfigError: if not even one image fits, or the batch sizes aren't ascending.
    """
    device, clock = torch.device(device), clock or time.perf_counter
    micro_batch, accumulate = split_batch(batch_size, micro_batch, processes)
    if batch_sizes is not None and not 1 <= batch_sizes[0] < batch_sizes[1]:
        raise ConfigError(
            f"batch_sizes={batch_sizes[0]},{batch_sizes[1]}: two ascending numbers of at least 1 are needed"
        )
    if batch_sizes is None and device.type == "cpu":
        measured = _measure_on_cpu(make_step, micro_batch, clock)
    else:
        low, high = batch_sizes or (_even(micro_batch // 2), max(_even(micro_batch), _even(micro_batch // 2) + 2))
        measured = _measure_two(make_step, low, high, device, clock)
    return StepEstimate(
        device=_name(device),
        batch_size=batch_size,
        micro_batch=micro_batch,
        accumulate=accumulate,
        steps=steps,
        measured=measured,
        free_mib=_free_mib(device),
        checkpoint_mib=checkpoint_mib,
        keep=keep,
        shared_mib=shared_mib,
    )


def _even(batch_size: int) -> int:
    """The next lower even number, at least 2, since some methods pair images."""
    return max(batch_size - batch_size % 2, 2)


def _measure_two(
    make_step: MakeStep, low: int, high: int, device: torch.device, clock: Callable[[], float]
) -> tuple[Measured, Measured]:
    """Measure both sizes, halved until they fit; if 2 images don't fit, 1 image counts for both."""
    while high > 1:
        try:
            return _measure(make_step, low, device, clock), _measure(make_step, high, device, clock)
        except torch.OutOfMemoryError:
            low, high = max(low // 2, 1), high // 2
    try:
        one = _measure(make_step, 1, device, clock)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"not even a batch of 1 image fits into the memory of {_name(device)}; use a smaller encoder or image_size"
        ) from None
    return one, one


def _measure_on_cpu(make_step: MakeStep, batch_size: int, clock: Callable[[], float]) -> tuple[Measured, Measured]:
    """Measure a small batch, and the largest up to ``batch_size`` that is quick and fits, estimated from the small
    one."""
    device = torch.device("cpu")
    _free(device)
    before_mib = psutil.Process().memory_info().rss / _MIB
    low = _even(min(_CPU_FIRST_BATCH, batch_size // 2))
    first = _measure(make_step, low, device, clock)
    quick = low * _CPU_STEP_S / max(first.seconds, 1e-9)
    at_most_mib = max(first.memory_mib - before_mib, 1.0) / low  # per image, including its part of the fixed memory
    safe = (_free_mib(device) / 2 - before_mib) / at_most_mib
    high = max(_even(min(batch_size, int(quick), int(safe))), 3 * low if batch_size >= 3 * low else low + 2)
    return first, _measure(make_step, high, device, clock)


def _measure(make_step: MakeStep, batch_size: int, device: torch.device, clock: Callable[[], float]) -> Measured:
    """Time and peak memory of a step; the first step, which allocates buffers, counts for memory only."""
    _free(device)
    seconds: list[float] = []
    with _peak_memory(device) as peak_mib:
        step = make_step(batch_size)
        step()
        _wait(device)
        while len(seconds) < _MAX_MEASURED_STEPS and (len(seconds) < 2 or sum(seconds) < _MIN_MEASURED_S):
            start = clock()
            step()
            _wait(device)
            seconds.append(clock() - start)
    return Measured(batch_size, min(seconds), peak_mib())


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Peak memory within the block, in MiB: the allocator's on a GPU, else sampled resident memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) / _MIB
        return
    process, is_over = psutil.Process(), threading.Event()
    highest = [process.memory_info().rss]

    def watch() -> None:
        while not is_over.wait(0.002):
            highest[0] = max(highest[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: highest[0] / _MIB
    finally:
        is_over.set()
        watcher.join()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_mib(device: torch.device) -> float:
    """Memory available to a new process once this one has ended."""
    _free(device)
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / _MIB
    return (main_memory()[1] + psutil.Process().memory_info().rss) / _MIB


def _fit(sizes: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """The line through two points, as (intercept, slope); slope 0 if the points are equal or it would be negative."""
    (low, high), (at_low, at_high) = sizes, values
    each = max((at_high - at_low) / (high - low), 0.0) if high > low else 0.0
    return at_high - each * high, each


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
