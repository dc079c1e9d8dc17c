"""What a reader hands back, an :class:`ImageSet`, and how files below a folder are found.

Nothing is decoded here; order never depends on the file system.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from smalti.data.images import ENDINGS, NO_PIXELS, PixelConfig, read_image
from smalti.errors import DataError

SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
"""Names of split folders and lists, and what we call them."""
SPLIT_ORDER = ("train", "val", "test")

IGNORED = 255
"""Value of the pixels in a mask that count for nothing, as long as there are at most 255 classes."""
REFUSED = -1
"""Class of the values that a data set's masks must not hold."""


@dataclass(frozen=True, slots=True)
class LabelMap:
    """How the values in a data set's mask files become classes: one lookup a pixel."""

    name: str
    """The data set, as its reader is called."""
    note: str
    """Which classes there are and what is ignored, one line for logs and results."""
    table: tuple[int, ...]
    """``(256,)``: place of the class of each value, :data:`IGNORED` or :data:`REFUSED`."""
    outside: int = REFUSED
    """The same for values below 0 or above 255."""

    def classes(self, numbers: np.ndarray) -> np.ndarray:
        """``(H, W)`` int16: the class of each pixel of a mask file, or :data:`IGNORED`, or :data:`REFUSED`."""
        table = np.array((*self.table, self.outside), np.int16)
        if numbers.dtype != np.uint8:
            numbers = np.where((numbers >= 0) & (numbers < 256), numbers, 256).astype(np.int16)
        return table[numbers]


@dataclass(frozen=True, slots=True)
class ImageSample:
    """One image file and what its layout says about it."""

    path: Path
    label: int | None = None
    """Place of its class in ``ImageSet.classes``."""
    mask: Path | None = None
    split: str | None = None
    instances: Path | None = None
    label_map: LabelMap | None = None
    """What the values in the mask mean; None where they are places in ``ImageSet.classes``."""
    annotations: Path | None = None
    """COCO's JSON with the objects of this and other images."""
    pixels: PixelConfig = NO_PIXELS
    """How its file is decoded; one object for all images of a set."""

    def read(self, channels: int = 3) -> np.ndarray:
        """Its pixels, see :func:`~smalti.data.images.read_image`."""
        return read_image(self.path, channels, self.pixels)


@dataclass(frozen=True)
class ImageSet:
    """Images that were found, in an order that is the same on every machine."""

    root: Path
    layout: str
    samples: tuple[ImageSample, ...] = field(repr=False)
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files of the images."""
        return tuple(sample.path for sample in self.samples)

    @property
    def names(self) -> tuple[str, ...]:
        """Files of the images, relative to the set where they lie in it."""
        return tuple(
            (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix() for path in self.paths
        )

    @property
    def pixels(self) -> PixelConfig:
        """How the files are decoded."""
        return self.samples[0].pixels if self.samples else NO_PIXELS

    def with_pixels(self, pixels: PixelConfig) -> "ImageSet":
        """The same images, decoded in another way."""
        if pixels == self.pixels:
            return self
        return replace(self, samples=tuple(replace(sample, pixels=pixels) for sample in self.samples))

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that hold images, in the order train, val, test."""
        found = {sample.split for sample in self.samples}
        return tuple(split for split in SPLIT_ORDER if split in found)

    def subset(self, split: str) -> "ImageSet":
        """The images of one split.

        Raises:
            DataError: if there is no such split, naming those there are.
        """
        name = SPLITS.get(split, split)
        if name not in self.splits:
            there = f"it has: {', '.join(self.splits)}" if self.splits else "it has no splits"
            raise DataError(f"{self.root}: no split '{split}'; {there}")
        samples = tuple(sample for sample in self.samples if sample.split == name)
        return replace(self, samples=samples)

    @property
    def label_note(self) -> str | None:
        """What the values of the masks mean, one line; None where they are places in ``classes``."""
        label_map = self.samples[0].label_map if self.samples else None
        return label_map.note if label_map else None

    def describe(self) -> str:
        """One line for the log: layout, number of images, splits, classes."""
        counts = Counter(sample.split for sample in self.samples)
        splits = ", ".join(f"{split} {counts[split]:,}" for split in self.splits)
        classes = f", {len(self.classes)} classes" if self.classes else ""
        images = f"{len(self):,} image{'s' * (len(self) != 1)}"
        return f"{self.layout}: {images}{f' ({splits})' if splits else ''}{classes}"


def as_text(name: str | Path) -> str:
    """A file's name as text, also one that is not UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")


def by_stem(root: Path, names: Iterable[PurePosixPath]) -> dict[str, Path]:
    """``{relative path without its ending: file}``, in order."""
    result: dict[str, Path] = {}
    for name in names:
        stem = name.with_suffix("").as_posix()
        if stem in result:
            raise DataError(f"{root}: {result[stem].name} and {name.name} have the same stem; masks are found by stem")
        result[stem] = root / name
    return result


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Lines of a text file that aren't blank, with their numbers from 1."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a UTF-8 text file; it needs one name a line") from None
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def image_names(root: Path) -> list[PurePosixPath]:
    """Images below a folder as relative paths, sorted; hidden files are left out, links followed, folders read once.

    Raises:
        DataError: if there is none, or a folder can't be read.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    # Links come after all real folders, so that a folder keeps its own name and a loop ends.
    waiting = [(str(root), "")]
    links: list[tuple[str, str]] = []
    try:
        while waiting or links:
            folder, prefix = waiting.pop() if waiting else links.pop()
            status = os.stat(folder)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda e: e.name, reverse=True):
                    if entry.name.startswith("."):
                        continue
                    if entry.name.rpartition(".")[2].lower() in ENDINGS and _is(entry.is_file):
                        found.append(prefix + entry.name)
                    elif _is(entry.is_dir):
                        (links if entry.is_symlink() else waiting).append((entry.path, f"{prefix}{entry.name}/"))
    except OSError as error:
        raise DataError(f"{error.filename or root}: can't be read ({error.strerror or error})") from None
    if not found:
        raise DataError(f"{root}: no images found (looked in all its folders for {', '.join(ENDINGS)}, in any case)")
    return [PurePosixPath(name) for name in sorted(found)]


def _is(question: Callable[[], bool]) -> bool:
    """The answer, no for a link that leads to itself."""
    try:
        return question()
    except OSError:
        return False
