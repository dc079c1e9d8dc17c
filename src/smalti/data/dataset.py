"""What training and evaluation read: the contract of a data set, and a labelled one in two parts.

Two kinds implement it: :class:`~smalti.data.images.image_set.ImageSet` and
:class:`~smalti.data.signals.signal_set.SignalSet`.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

Kind = Literal["images", "signals"]


@runtime_checkable
class Source(Protocol):
    """Samples by index. It is sent to the data workers, so it must be picklable and small."""

    @property
    def root(self) -> Path:
        """Folder, list or table of the data set."""

    def __len__(self) -> int:
        """Number of samples."""

    def path(self, index: int) -> Path:
        """File that a sample is read from."""

    def read(self, index: int) -> np.ndarray:
        """A sample as an image ``(H, W, C)``.

        Raises:
            DataError: if it can't be read.
        """


@runtime_checkable
class Dataset(Protocol):
    """Images, or windows of signals, in an order that is the same on every machine."""

    @property
    def kind(self) -> Kind:
        """What a sample is."""

    @property
    def root(self) -> Path:
        """Folder, list or table of the data set."""

    @property
    def layout(self) -> str:
        """Name of the reader, such as ``classes``."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes; None without class labels and masks."""

    @property
    def labels(self) -> np.ndarray | None:
        """``(n,)`` int64 class of each sample, a place in ``classes``; None unless every sample has one."""

    @property
    def channels(self) -> tuple[str, ...] | None:
        """Names of the channels of a sample; None: a sample is read with any number of channels."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the files, relative to the data set."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Group of each file (a video, a patient); empty if there are no groups."""

    @property
    def label_note(self) -> str | None:
        """What the labels mean, one line."""

    def __len__(self) -> int:
        """Number of samples."""

    def training(self) -> "Dataset":
        """The train split if there are splits, else all.

        Raises:
            DataError: if there are splits, but none is for training.
        """

    def source(self, channels: int) -> Source:
        """The samples for the training loader, images decoded with that number of channels."""

    def describe(self) -> str:
        """One line for the log."""

    def account(self) -> str:
        """:meth:`describe`, and what was left out."""

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with the names of the files and their order."""


D = TypeVar("D", bound=Dataset, covariant=True)


@dataclass(frozen=True)
class Labelled(Generic[D]):
    """Training data, and data to evaluate on."""

    train: D
    test: D
    classes: tuple[str, ...]
    note: str
    """How the data were split, one line for logs and results."""
    drawn: bool = False
    """Whether ``train`` is a random draw from the training data."""
    split: str = "test"
    """Name of the evaluated split; ``held-out`` of a seeded split, empty if all images are evaluated."""
    missing: tuple[str, ...] = ()
    """Classes with training images but no images to evaluate on (class folders)."""

    @property
    def evaluated(self) -> str:
        """Name of the evaluated samples, such as ``val images``."""
        sample = {"images": "images", "signals": "windows"}[self.test.kind]
        return f"{self.split} {sample}".strip()


def names_fingerprint(names: Iterable[str]) -> str:
    """Sixteen hex digits that change with the names and their order."""
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16]
