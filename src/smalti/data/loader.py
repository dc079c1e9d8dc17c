"""The training loader: an endless stream of batches that depends on the seed and the step, and on nothing else.

Which images a step sees, and every random number of their augmentation, are functions of (seed, epoch, image). So
there is no state to save: a loader started at step k gives the same bits as one that ran there, with any number of
workers, and one process sees the same images as two with half its batch each.
"""

import contextlib
import csv
import functools
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from smalti.data.dataset import Dataset
from smalti.data.images.image_set import as_text
from smalti.data.views import SampleViews, Skipped, ViewMaker, Views, collate
from smalti.data.workers import default_workers, load_items
from smalti.errors import DataError, RunError
from smalti.files import set_aside

_MAX_TRIES = 32
MAX_UNREADABLE = 0.1
"""Fraction of unreadable images above which training stops."""
_HEADER = ("path", "reason")
_GOLDEN, _MIX_A, _MIX_B = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def sample_key(seed: int, epoch: int, index: int) -> int:
    """A 63-bit hash of (seed, epoch, index): the randomness of one image in one epoch."""
    return int(_sample_keys(seed, epoch, np.array([index], dtype=np.uint64))[0])


def key_of_step(seed: int, step: int) -> int:
    """A 63-bit hash of (seed, step): the randomness that all parts of an optimiser step share."""
    return int(_sample_keys(seed, step, np.zeros(1, dtype=np.uint64), stream=2)[0])


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """``(n,)`` int64: the permutation in which an epoch goes through n images; the same in every version of NumPy."""
    keys = _sample_keys(seed, epoch, np.arange(n, dtype=np.uint64), stream=1)
    return np.argsort(keys, kind="stable")


def _sample_keys(seed: int, epoch: int, index: np.ndarray, stream: int = 0) -> np.ndarray:
    """splitmix64's finaliser over the parts, one after the other; int64, not negative."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what the generator wants
        state = np.full_like(index, np.uint64(stream + 1) * _GOLDEN)
        for part in (np.uint64(seed % 2**64), np.uint64(epoch), index):
            z = state + (part + np.uint64(1)) * _GOLDEN
            z = (z ^ (z >> np.uint64(30))) * _MIX_A
            z = (z ^ (z >> np.uint64(27))) * _MIX_B
            state = z ^ (z >> np.uint64(31))
    return (state >> np.uint64(1)).astype(np.int64)


class TrainLoader:
    """Iterates for ever over batches of :class:`Views`."""

    def __init__(
        self,
        data: Dataset,
        views: ViewMaker,
        *,
        batch_size: int,
        seed: int,
        channels: int = 3,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int | None = None,
        start_step: int = 0,
        pin_memory: bool = False,
    ):
        """
        Args:
            data: images, or windows of signals.
            views: how an image becomes a sample; it is sent to the workers, so it must be picklable.
            batch_size: images a step of this process; epochs run into one another, no image is dropped.
            seed: of order and augmentation.
            channels: of the images.
            rank: number of this process; its step s starts at position ``(s * world_size + rank) * batch_size``.
            world_size: number of processes.
            num_workers: worker processes; None: the default on CPU; 0: load in this process.
            start_step: the first step to give.
            pin_memory: page-locked batches, where there is a CUDA device.
        """
        self.start_step = start_step
        self.num_workers = default_workers("cpu") if num_workers is None else num_workers
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.seed = seed
        self._batches = _Batches(data, views, batch_size, seed, channels, rank, world_size)

    def __iter__(self) -> Iterator[Views]:
        """Batches from ``start_step`` on.

        Raises:
            DataError: if many images in a row can't be read.
            RunError: if a worker process was killed, or an archive changed.
        """
        yield from load_items(self._batches, _Steps(self.start_step), self.num_workers, self.seed, self.pin_memory)


class _Steps(Sampler[int]):
    """Steps from a first one on, without end."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1


class _Batches(TorchDataset[Views]):
    """The batch of a step."""

    def __init__(
        self,
        data: Dataset,
        views: ViewMaker,
        batch_size: int,
        seed: int,
        channels: int,
        rank: int,
        world_size: int,
    ):
        if not len(data):
            raise DataError(f"{data.root}: no images to train on")
        self.source, self.labels = data.source(channels), data.labels
        self.views = views
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, step: int) -> Views:
        first = (step * self.world_size + self.rank) * self.batch_size
        skipped: list[Skipped] = []
        return collate([self._sample(first + i, skipped) for i in range(self.batch_size)], skipped)

    def _sample(self, position: int, skipped: list[Skipped]) -> SampleViews:
        num_images = len(self.source)
        epoch, offset = divmod(position, num_images)
        order = _cached_order(self.seed, epoch, num_images)
        key = sample_key(self.seed, epoch, int(order[offset]))  # also a replacement's: it has a turn of its own
        failed: list[Skipped] = []
        for attempt in range(min(_MAX_TRIES, num_images)):
            index = int(order[(offset + attempt) % num_images])
            try:
                image = self.source.read(index)
            except DataError as error:
                path = self.source.path(index)
                failed.append(Skipped(path, str(error).removeprefix(f"{path}: ")))
                continue
            sample = self.views(image, np.random.Generator(np.random.Philox(key=key)))
            sample.index, sample.key = index, key
            sample.label = None if self.labels is None else int(self.labels[index])
            skipped.extend(failed)
            return sample
        path, reason = failed[0]
        raise DataError(f"{len(failed)} images in a row can't be read, the first: {path}: {reason}")


@functools.lru_cache(maxsize=2)
def _cached_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return epoch_order(seed, epoch, n)


class UnreadableLog:
    """The images of a run that couldn't be read, in a CSV file that several processes may write."""

    def __init__(self, path: Path, total: int):
        """
        Args:
            path: the file; what it holds already counts.
            total: images in the whole set.
        """
        self.path, self.total = path, total
        self._reasons: dict[str, str] = {}
        self._read()

    @property
    def count(self) -> int:
        """Distinct unreadable images, of all processes, as of the last ``add``."""
        return len(self._reasons)

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Write down what is new.

        Raises:
            DataError: if more than a tenth of all images can't be read.
        """
        seen = {as_text(path): reason for path, reason in skipped}
        if not seen.keys() - self._reasons.keys():
            return
        self._read()  # what other processes found since
        self._append([(path, reason) for path, reason in seen.items() if path not in self._reasons])
        self._reasons |= {path: reason for path, reason in seen.items() if path not in self._reasons}
        if self.count > self.total * MAX_UNREADABLE:
            path, reason = next(iter(self._reasons.items()))
            raise DataError(
                f"{self.count} of {self.total} images can't be read, more than a tenth; the first: {path}: {reason}; "
                f"all of them: {self.path}"
            )

    def _read(self) -> None:
        if not self.path.exists():
            return
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.reader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            with contextlib.suppress(FileNotFoundError):  # another process has set it aside
                set_aside(self.path, error)
            return
        for row in rows:
            if len(row) == 2 and tuple(row) != _HEADER:
                self._reasons.setdefault(row[0], row[1])

    def _append(self, rows: Iterable[tuple[str, str]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self._write([_HEADER], os.O_CREAT | os.O_EXCL)
            self._write(rows, 0)
        except OSError as error:
            raise RunError(f"{self.path}: can't be written ({error.strerror or error})") from error

    def _write(self, rows: Iterable[tuple[str, str]], flags: int) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | flags, 0o644)
        try:
            os.write(handle, text.getvalue().encode())  # one write: lines of several processes don't mix
        finally:
            os.close(handle)
