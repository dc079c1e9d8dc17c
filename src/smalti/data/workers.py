"""Worker processes that read and prepare images: how many, what they need of the machine, and how they end."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from smalti.data.views import SampleViews
from smalti.errors import ConfigError, RunError, SmaltiError, machine_error
from smalti.reading import reason
from smalti.threads import usable_cores

T = TypeVar("T")
WORKER_TIMEOUT_S = 900
"""Seconds without a batch after which workers count as hung, as on a disk that no longer answers."""
SHARED_MEMORY = Path("/dev/shm")
"""Where workers leave batches for the main process; a container often has 64 MiB of it."""
_PREFETCHED = 3  # batches a worker: two that wait, one that is being made
_FILES, _FILES_A_WORKER = 32, 4
"""Open files that a loader needs at least, and more for each worker: measured with torch 2.14."""


def default_workers(device_type: str) -> int:
    """Default number of worker processes: none on CPU, where they would compete with training for cores."""
    return 0 if device_type == "cpu" else min(8, usable_cores())


def shared_memory_mib() -> float | None:
    """Free shared memory in MiB; None if the system has no such folder."""
    return shutil.disk_usage(SHARED_MEMORY).free / 2**20 if SHARED_MEMORY.is_dir() else None


def needed_mib(sample: SampleViews, batch_size: int, num_workers: int) -> float:
    """Shared memory that the batches of workers take, in MiB.

    Args:
        sample: of one image.
        batch_size: images that one process takes at a time.
        num_workers: of one process.
    """
    return sum(crops.nbytes for crops in sample.crops) * batch_size * num_workers * _PREFETCHED / 2**20


def check_workers(sample: SampleViews, batch_size: int, num_workers: int, processes: int = 1) -> None:
    """Check before the start whether this machine has the resources for the workers of a run.

    Args:
        sample: of one image.
        batch_size: images that one process takes at a time.
        num_workers: of one process.
        processes: that train on this machine.

    Raises:
        ConfigError: if shared memory or open files don't suffice, with a number of workers that would.
    """
    if not num_workers:
        return
    free, needed = shared_memory_mib(), needed_mib(sample, batch_size, num_workers) * processes
    if free is not None and needed > free:
        fits = int(num_workers * free / needed)
        raise ConfigError(
            f"data.num_workers={num_workers}: batches need {needed:,.0f} MiB of shared memory, {SHARED_MEMORY} has "
            f"{free:,.0f} MiB free; set data.num_workers={fits}, or enlarge it (docker run --shm-size=8g)"
        )
    limit = _open_files_limit()
    wanted = _FILES + _FILES_A_WORKER * num_workers
    if limit is not None and limit < wanted:
        raise ConfigError(
            f"data.num_workers={num_workers}: {wanted} open files are needed, {limit} are allowed; raise the limit "
            "(ulimit -n 4096), or set data.num_workers=0"
        )


def _open_files_limit() -> int | None:
    """Files that this process may still open; None: no limit, or not known."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return None if limit == resource.RLIM_INFINITY else limit - len([*Path("/proc/self/fd").iterdir()])
    except (ImportError, OSError):
        return None


def load_items(
    items: Dataset[T], order: Iterable[int], num_workers: int, seed: int = 0, pin_memory: bool = False
) -> Iterator[T]:
    """The items of a dataset in an order, each made whole (no collation), by worker processes if there are any.

    Args:
        items: picklable.
        order: places in ``items``, perhaps without end.
        num_workers: processes; 0 makes the items in this one.
        seed: of the workers' own generators, which no item uses; torch's generator is left alone.
        pin_memory: page-locked tensors.

    Raises:
        RunError: if a worker is killed, finds no shared memory or files, or gives nothing for :data:`WORKER_TIMEOUT_S`.
        SmaltiError: what making an item raises, from a worker as well.
    """
    loader: DataLoader[T | SmaltiError] = DataLoader(
        _Returning(items),
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        timeout=WORKER_TIMEOUT_S if num_workers else 0,
        generator=torch.Generator().manual_seed(seed % 2**63),
    )
    made: Iterator[T | SmaltiError] | None = None
    while True:
        try:
            if made is None:
                with _term_blocked():
                    made = iter(loader)
            item = next(made)
        except StopIteration:
            return
        except (OSError, EOFError, RuntimeError) as error:
            line = (_lost_worker(error) if num_workers else None) or machine_error(error)
            if line is None:
                raise
            raise RunError(line) from error
        if isinstance(item, SmaltiError):
            raise item
        yield item


class _Returning(Dataset[Any]):
    """Items, or Smalti's errors as they are: those raised in a worker would come with its traceback as their text."""

    def __init__(self, items: Dataset[Any]) -> None:
        self._items = items

    def __getitem__(self, place: int) -> Any:
        try:
            return self._items[place]
        except SmaltiError as error:
            return error


def _lost_worker(error: Exception) -> str | None:
    """One line where a worker was killed while its batch was fetched; None for other errors, those of its own work
    included."""
    if not isinstance(error, (ConnectionError, EOFError)) or "in DataLoader worker process" in str(error):
        return None
    with contextlib.suppress(RuntimeError):  # torch's own notice of a dead worker is raised by a signal, perhaps now
        time.sleep(0.2)
    return f"a data worker was killed ({reason(error)}); lower data.num_workers or free memory"


def _unchanged(item: Any) -> Any:
    """A collate function, for data that come as batches; a name, so that workers can be given it."""
    return item


@contextlib.contextmanager
def _term_blocked() -> Iterator[None]:
    """Block SIGTERM in this thread, so that it is blocked in all threads of worker processes that are started here:
    torch starts a pool of threads in each, before :func:`_start_worker`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    """What each worker process does first. Signals to the whole group are the main process's affair: it still needs
    batches to finish its step, and ends the workers itself."""
    cv2.setNumThreads(0)
    if multiprocessing.parent_process() is None:
        return
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, args=(os.getppid(),), daemon=True).start()


def _end_by_parent(parent: int) -> None:
    """End this worker at the first SIGTERM that its main process sends."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
