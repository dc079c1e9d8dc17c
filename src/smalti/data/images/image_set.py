"""What a reader returns, an :class:`ImageSet`, and the small text files that lie beside images."""

import itertools
import operator
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import SupportsIndex, overload

import numpy as np

from smalti.data.archives.members import is_file, read_bytes
from smalti.data.archives.names import Names
from smalti.data.dataset import Kind, names_fingerprint
from smalti.data.images.decode import NO_PIXELS, PixelConfig, read_image
from smalti.errors import DataError

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Names of split folders and lists, in lower case, and what we call them."""
SPLIT_ORDER = ("train", "val", "test")

IGNORED = 255
"""Value of the pixels in a mask that count for nothing, as long as there are at most 255 classes."""
_CVAT_CLASS = re.compile(r"([^:]+):\d+,\d+,\d+:[^:]*:[^:]*")
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
    """What the values in the mask mean; None if they are places in ``ImageSet.classes``."""
    annotations: Path | None = None
    """COCO's JSON with the objects of this and other images."""
    group: str | None = None
    """What the image belongs to (a video, patient or site), where a table says so."""
    pixels: PixelConfig = NO_PIXELS
    """How its file is decoded; one object for all images of a set."""

    def read(self, channels: int = 3) -> np.ndarray:
        """Its pixels, see :func:`~smalti.data.images.decode.read_image`."""
        return read_image(self.path, channels, self.pixels)


class PlainSamples(Sequence[ImageSample]):
    """Samples without masks, in a few arrays: a million objects would take a gigabyte, and ten seconds to make."""

    def __init__(
        self,
        root: Path,
        names: Names,
        labels: np.ndarray | None = None,
        splits: np.ndarray | None = None,
        pixels: PixelConfig = NO_PIXELS,
    ) -> None:
        """
        Args:
            root: what the names are relative to.
            names: files of n samples.
            labels: ``(n,)`` place of the class of each; None: no labels.
            splits: ``(n,)`` place of the split of each in :data:`SPLIT_ORDER`; None: no splits.
            pixels: how the files are decoded.
        """
        self.root, self.names, self.labels, self.splits, self.pixels = root, names, labels, splits, pixels
        self._start = os.path.join(root, "")  # noqa: PTH118

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, place: SupportsIndex) -> ImageSample: ...
    @overload
    def __getitem__(self, place: slice) -> "PlainSamples": ...
    def __getitem__(self, place: SupportsIndex | slice) -> "ImageSample | PlainSamples":
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        number = operator.index(place)
        return self._made(number, self.names[number])

    def __iter__(self) -> Iterator[ImageSample]:
        return (self._made(place, name) for place, name in enumerate(self.names))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    def __hash__(self) -> int:
        return hash((self.root, len(self)))

    def _made(self, place: int, name: str) -> ImageSample:
        label = None if self.labels is None else int(self.labels[place])
        split = None if self.splits is None else SPLIT_ORDER[self.splits[place]]
        return ImageSample(Path(self._start + name), label=label, split=split, pixels=self.pixels)

    def paths(self) -> Iterator[Path]:
        """Files of the images."""
        return (Path(self._start + name) for name in self.names)

    def take(self, places: np.ndarray) -> "PlainSamples":
        """Some of the samples, in a given order."""
        labels, splits = (None if column is None else column[places] for column in (self.labels, self.splits))
        return PlainSamples(self.root, self.names.take(places), labels, splits, self.pixels)

    def decoded(self, pixels: PixelConfig) -> "PlainSamples":
        """The same samples, decoded in another way."""
        return PlainSamples(self.root, self.names, self.labels, self.splits, pixels)


@dataclass(frozen=True)
class ImageSet:
    """Images that were found, in an order that is the same on every machine."""

    root: Path
    layout: str
    samples: Sequence[ImageSample] = field(repr=False)
    classes: tuple[str, ...] | None
    left_out: tuple[str, ...] = ()
    """Images or masks that the layout would have and that are not in ``samples``, and why: a phrase each."""
    not_read: tuple[str, ...] = ()
    """What else lies there: a phrase each."""
    remarks: tuple[str, ...] = ()
    """What else a reader may not expect: a phrase each."""
    no_labels: str = ""
    """Why there are no class labels."""
    no_masks: str = ""
    """Why there are no masks, if some files look like masks."""
    container: str = ""
    """What the images are packed into, such as ``3 tar shards``; empty for files."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def kind(self) -> Kind:
        """``images``."""
        return "images"

    @property
    def channels(self) -> None:
        """None: an image file is decoded with any number of channels."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files of the images."""
        if isinstance(self.samples, PlainSamples):
            return tuple(self.samples.paths())
        return tuple(sample.path for sample in self.samples)

    @property
    def labels(self) -> np.ndarray | None:
        """``(n,)`` int64 class of each image; None unless every image has one."""
        if isinstance(self.samples, PlainSamples):
            return None if self.samples.labels is None else self.samples.labels.astype(np.int64)
        labels = [sample.label for sample in self.samples if sample.label is not None]
        return np.array(labels, dtype=np.int64) if labels and len(labels) == len(self) else None

    @property
    def groups(self) -> tuple[str, ...]:
        """Group of each image by the table, its path if it has none; empty if no image has one, or all are in one."""
        if not any(sample.group is not None for sample in self._marked):
            return ()
        groups = tuple(sample.group or str(sample.path) for sample in self.samples)
        return groups if len(set(groups)) > 1 else ()

    @property
    def _marked(self) -> Sequence[ImageSample]:
        """Samples that may have a mask, boxes or a group."""
        return () if isinstance(self.samples, PlainSamples) else self.samples

    @property
    def names(self) -> tuple[str, ...]:
        """Files of the images as printable text, relative to the folder of the set, list or table where they lie in
        it."""
        if isinstance(self.samples, PlainSamples) and self.samples.root == self.root:
            return tuple(map(as_text, self.samples.names))
        folder = self.root.parent if self.layout in ("list", "table") else self.root
        relative = (path.relative_to(folder) if path.is_relative_to(folder) else path for path in self.paths)
        return tuple(as_text(path.as_posix()) for path in relative)

    @property
    def pixels(self) -> PixelConfig:
        """How the files are decoded."""
        return self.samples[0].pixels if self.samples else NO_PIXELS

    def with_pixels(self, pixels: PixelConfig) -> "ImageSet":
        """The same images, decoded in another way."""
        if pixels == self.pixels:
            return self
        if isinstance(self.samples, PlainSamples):
            return replace(self, samples=self.samples.decoded(pixels))
        return replace(self, samples=tuple(replace(sample, pixels=pixels) for sample in self.samples))

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that hold images, in the order train, val, test."""
        return tuple(split for split in SPLIT_ORDER if self._split_counts()[split])

    def _split_counts(self) -> Counter[str | None]:
        if not isinstance(self.samples, PlainSamples):
            return Counter(sample.split for sample in self.samples)
        if self.samples.splits is None:
            return Counter({None: len(self)})
        return Counter(dict(zip(SPLIT_ORDER, np.bincount(self.samples.splits, minlength=3).tolist(), strict=True)))

    def subset(self, split: str) -> "ImageSet":
        """The images of one split.

        Raises:
            DataError: if there is no such split, naming those there are.
        """
        name = SPLITS.get(split, split)
        if name not in self.splits:
            there = f"it has: {', '.join(self.splits)}" if self.splits else "it has no splits"
            raise DataError(f"{self.root}: no split '{split}'; {there}")
        if isinstance(self.samples, PlainSamples):
            assert self.samples.splits is not None
            places = np.flatnonzero(self.samples.splits == SPLIT_ORDER.index(name))
            return replace(self, samples=self.samples if len(places) == len(self) else self.samples.take(places))
        samples = tuple(sample for sample in self.samples if sample.split == name)
        return replace(self, samples=samples)

    @property
    def label_note(self) -> str | None:
        """What the values of the masks mean, one line; None if they are places in ``classes``."""
        label_map = self.samples[0].label_map if self.samples else None
        return label_map.note if label_map else None

    def training(self) -> "ImageSet":
        """The train split if the layout has splits, else all.

        Raises:
            DataError: if there are splits, but none is for training.
        """
        if not self.splits:
            return self
        if "train" not in self.splits:
            root = as_text(self.root)
            raise DataError(
                f"{root}: holds the split{'s' * (len(self.splits) > 1)} {', '.join(self.splits)}, but "
                f"no train; to read every image, write folder={root}"
            )
        return self.subset("train")

    def source(self, channels: int) -> "ImageFiles":
        """The images for the training loader."""
        return ImageFiles(self, channels)

    def fingerprint(self) -> str:
        """Changes with the names of the files and their order, not with the place of the folder."""
        if isinstance(self.samples, PlainSamples) and self.samples.root == self.root:
            return names_fingerprint(self.samples.names)
        return names_fingerprint(
            path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)
            for path in self.paths
        )

    def describe(self) -> str:
        """One line for the log: layout, number of images, splits, classes."""
        counts = self._split_counts()
        named = [(split, counts[split]) for split in self.splits]
        if named and counts[None]:
            named.append(("in no split", counts[None]))
        splits = ", ".join(f"{split} {count:,}" for split, count in named)
        classes = f", {len(self.classes)} classes" if self.classes else ""
        images = f"{len(self):,} image{'s' * (len(self) != 1)}"
        inside = f" in {self.container}" if self.container else ""
        return f"{self.layout}: {images}{inside}{f' ({splits})' if splits else ''}{classes}"

    def account(self) -> str:
        """:meth:`describe`, remarks, and what was left out or not read."""
        parts = [self.describe(), *self.remarks]
        parts += [f"left out: {', '.join(self.left_out)}"] if self.left_out else []
        parts += [f"not read: {', '.join(self.not_read)}"] if self.not_read else []
        return "; ".join(parts)


class ImageFiles:
    """Image files as a :class:`~smalti.data.dataset.Source`."""

    def __init__(self, images: ImageSet, channels: int) -> None:
        self._root, self._channels, self._pixels = images.root, channels, images.pixels
        if isinstance(images.samples, PlainSamples):
            self._start, self._names = os.path.join(images.samples.root, ""), images.samples.names  # noqa: PTH118
        else:
            self._start, self._names = "", Names(map(os.fspath, images.paths))

    @property
    def root(self) -> Path:
        """Folder, list or table of the data set."""
        return self._root

    def __len__(self) -> int:
        return len(self._names)

    def path(self, index: int) -> Path:
        """File of an image."""
        return Path(self._start + self._names[index])

    def read(self, index: int) -> np.ndarray:
        """An image, see :func:`~smalti.data.images.decode.read_image`."""
        return read_image(self.path(index), self._channels, self._pixels)


def as_text(name: str | Path) -> str:
    """A file's name as printable text on one line: bytes that are not UTF-8 and control characters are escaped."""
    if (text := os.fspath(name)).isascii() and text.isprintable():
        return text
    text = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def expand_home(path: str | Path) -> Path:
    """A path with ``~`` replaced by the home directory; as it is if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_text(name: str | Path) -> bool:
    """Whether a file's name is UTF-8."""
    try:
        os.fsencode(name).decode()
    except UnicodeDecodeError:
        return False
    return True


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
        text = read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a UTF-8 text file; it needs one name a line") from None
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_class_names(root: Path) -> tuple[str, ...] | None:
    """Names of the classes of masks from ``classes.txt``: one a line, the first for value 0; None without that file.

    CVAT's ``labelmap.txt`` under that name is understood: the name is what comes before the first colon.

    Raises:
        DataError: if the file can't be read, or has a blank line between names, or a name twice.
    """
    path = root / "classes.txt"
    if not is_file(path):
        return None
    lines = read_lines(path)
    if lines and lines[0][1].startswith("#") and all(_CVAT_CLASS.fullmatch(line) for _, line in lines[1:]):
        lines = lines[1:]
    elif lines and lines[0][1].startswith("#"):
        raise DataError(
            f"{as_text(path)}: line {lines[0][0]} begins with #, and comments are not read; remove it, or a class is "
            "counted too many"
        )
    if gap := next((number for (number, _), (after, _) in itertools.pairwise(lines) if after > number + 1), None):
        raise DataError(
            f"{as_text(path)}: line {gap + 1} is blank; every value needs a name, so name that class or remove the line"
        )
    if lines and lines[0][0] > 1 and not all(_CVAT_CLASS.fullmatch(line) for _, line in lines):
        raise DataError(f"{as_text(path)}: line 1 is blank; it needs the name of value 0, or to be removed")
    names = tuple(match[1] if (match := _CVAT_CLASS.fullmatch(line)) else line for _, line in lines)
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(
            f"{as_text(path)}: class '{repeated[0]}' is listed more than once; each needs a name of its own"
        )
    return names or None
