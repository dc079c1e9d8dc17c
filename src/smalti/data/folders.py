"""Readers: a folder tree, a list file, class folders or images with masks becomes one :class:`ImageSet`.

The layout is detected, or forced by ``NAME=PATH``. Nothing is decoded here; order never depends on the file system.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from smalti.config import unknown_key
from smalti.data.images import ENDINGS
from smalti.data.images import read_image as read_image
from smalti.errors import ConfigError, DataError

SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
"""Names of split folders and lists, and what we call them."""
_SPLIT_ORDER = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class ImageSample:
    """One image file and what its layout says about it."""

    path: Path
    label: int | None = None
    """Place of its class in ``ImageSet.classes``."""
    mask: Path | None = None
    split: str | None = None
    instances: Path | None = None


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
    def splits(self) -> tuple[str, ...]:
        """Splits that hold images, in the order train, val, test."""
        found = {sample.split for sample in self.samples}
        return tuple(split for split in _SPLIT_ORDER if split in found)

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
        return ImageSet(self.root, self.layout, samples, self.classes)

    def describe(self) -> str:
        """One line for the log: layout, number of images, splits, classes."""
        counts = Counter(sample.split for sample in self.samples)
        splits = ", ".join(f"{split} {counts[split]:,}" for split in self.splits)
        classes = f", {len(self.classes)} classes" if self.classes else ""
        images = f"{len(self):,} image{'s' * (len(self) != 1)}"
        return f"{self.layout}: {images}{f' ({splits})' if splits else ''}{classes}"


def open_images(data: str | Path, layout: str | None = None) -> ImageSet:
    """The images at a path, their layout detected or forced.

    Args:
        data: a folder or a list file; ``NAME=PATH`` forces the reader NAME.
        layout: forces a reader as well: ``folder``, ``list``, ``classes`` or ``masks``. ``folder`` takes all images of
            the tree; ``list`` a text file with a path a line, relative to it or absolute; ``classes`` ``CLASS/img`` or
            ``SPLIT/CLASS/img``; ``masks`` ``images/`` with ``masks/`` or ``instances/``, by stem.

    Raises:
        ConfigError: if there is no reader of that name.
        DataError: if the path is missing, holds no images, or doesn't fit the layout; one line.
    """
    path, layout = _split_name(data, layout)
    if layout is not None and layout not in _READERS:
        raise ConfigError(unknown_key(layout, _READERS, "--data").replace("field", "reader"))
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if layout is not None:
        if path.is_dir() == (layout == "list"):
            needed = "a text file with one path a line" if layout == "list" else "a folder"
            raise DataError(
                f"{path}: layout '{layout}' needs {needed}, this is a {'folder' if path.is_dir() else 'file'}"
            )
        return _READERS[layout](path)
    if path.is_file():
        if path.suffix.lower() == ".txt":
            return _read_list(path)
        raise DataError(f"{path}: a file; give a folder of images, or a .txt list with one path a line")
    return _detect(path)


def training_images(images: ImageSet) -> ImageSet:
    """What pretraining reads: the train split where the layout has splits, else all.

    Raises:
        DataError: if there are splits, but none is for training.
    """
    if not images.splits:
        return images
    if "train" not in images.splits:
        raise DataError(
            f"{images.root}: holds the split{'s' * (len(images.splits) > 1)} {', '.join(images.splits)}, but no train; "
            f"to read every image, write folder={images.root}"
        )
    return images.subset("train")


def _split_name(data: str | Path, layout: str | None) -> tuple[Path, str | None]:
    """``NAME=PATH`` apart; a path that exists is a path, whatever signs are in it."""
    path = Path(data).expanduser()
    if layout is None and not path.exists():
        match = re.fullmatch(r"([A-Za-z][\w-]*)=(.*)", str(data), re.DOTALL)
        if match:
            return Path(match[2]).expanduser(), match[1]
    return path, layout


def _detect(root: Path) -> ImageSet:
    if (root / "images").is_dir() and ((root / "masks").is_dir() or (root / "instances").is_dir()):
        return _read_masks(root)
    names = _image_names(root)
    if _class_problem(names) is None and len({name.parts[-2] for name in names}) > 1:
        return _class_set(root, names)
    return _folder_set(root, names)


def _read_folder(root: Path) -> ImageSet:
    return _folder_set(root, _image_names(root))


def _folder_set(root: Path, names: Sequence[PurePosixPath]) -> ImageSet:
    return ImageSet(root, "folder", tuple(ImageSample(root / name) for name in names), None)


def _read_list(path: Path) -> ImageSet:
    entries = [(number, path.parent / Path(line).expanduser()) for number, line in _lines(path)]
    if not entries:
        raise DataError(f"{path}: an empty list; it needs one image path a line")
    missing = [(number, entry) for number, entry in entries if not entry.is_file()]
    if missing:
        number, entry = missing[0]
        raise DataError(
            f"{path}: {len(missing)} of {len(entries)} files don't exist, the first: {entry} (line {number})"
        )
    return ImageSet(path, "list", tuple(ImageSample(entry) for _, entry in entries), None)


def _read_classes(root: Path) -> ImageSet:
    names = _image_names(root)
    if problem := _class_problem(names):
        raise DataError(f"{root}: {problem}; layout 'classes' needs CLASS/image or SPLIT/CLASS/image everywhere")
    return _class_set(root, names)


def _class_problem(names: Sequence[PurePosixPath]) -> str | None:
    """Why these aren't class folders; None where they are."""
    depth = 3 if names[0].parts[0].lower() in SPLITS else 2
    for name in names:
        is_split = name.parts[0].lower() in SPLITS
        if len(name.parts) != depth or is_split != (depth == 3):
            return f"{name} doesn't lie where {names[0]} does" if name != names[0] else f"{name} has no class folder"
    return None


def _class_set(root: Path, names: Sequence[PurePosixPath]) -> ImageSet:
    has_splits = len(names[0].parts) == 3
    for split in _SPLIT_ORDER if has_splits else ():
        spellings = sorted({name.parts[0] for name in names if SPLITS[name.parts[0].lower()] == split})
        if len(spellings) > 1:
            raise DataError(f"{root}: the same split twice: {', '.join(spellings)}; keep one")
    classes = tuple(sorted({name.parts[-2] for name in names}))
    number = {name: i for i, name in enumerate(classes)}
    samples = tuple(
        ImageSample(
            root / name,
            label=number[name.parts[-2]],
            split=SPLITS[name.parts[0].lower()] if has_splits else None,
        )
        for name in names
    )
    return ImageSet(root, "classes", samples, classes)


def _read_masks(root: Path) -> ImageSet:
    if not (root / "images").is_dir() or not ((root / "masks").is_dir() or (root / "instances").is_dir()):
        raise DataError(f"{root}: layout 'masks' needs the folders images/ and masks/ (or images/ and instances/)")
    images = _by_stem(root / "images", _image_names(root / "images"))
    masks = _by_stem(root / "masks", _image_names(root / "masks")) if (root / "masks").is_dir() else {}
    instances = {}
    if (root / "instances").is_dir():
        instances = _by_stem(root / "instances", _image_names(root / "instances"))
    split_of = _read_splits(root, images)
    wanted = [stem for stem in images if not split_of or stem in split_of]
    folder, there = ("masks", masks) if (root / "masks").is_dir() else ("instances", instances)
    missing = [stem for stem in wanted if stem not in there]
    if missing:
        raise DataError(
            f"{root}: {len(missing)} of {len(wanted)} images have no mask in {folder}/, "
            f"the first: {images[missing[0]].relative_to(root).as_posix()}"
        )
    samples = tuple(
        ImageSample(path, mask=masks.get(stem), split=split_of.get(stem), instances=instances.get(stem))
        for stem, path in images.items()
    )
    return ImageSet(root, "masks", samples, _read_class_names(root, has_masks=folder == "masks"))


def _read_splits(root: Path, images: dict[str, Path]) -> dict[str, str]:
    """``{stem: split}`` from train.txt, val.txt and test.txt."""
    by_name = {path.relative_to(root / "images").as_posix(): stem for stem, path in images.items()}
    split_of: dict[str, str] = {}
    sources: dict[str, Path] = {}
    for spelling, split in SPLITS.items():
        path = root / f"{spelling}.txt"
        if not path.is_file():
            continue
        if split in sources:
            raise DataError(f"{root}: the same split twice: {sources[split].name}, {path.name}; keep one")
        sources[split] = path
        names = [(number, line.removeprefix("images/")) for number, line in _lines(path)]
        stems = [by_name.get(name, name) for _, name in names]
        unknown = [entry for entry, stem in zip(names, stems, strict=True) if stem not in images]
        if unknown:
            number, name = unknown[0]
            raise DataError(
                f"{path}: {len(unknown)} of {len(names)} names have no image in images/, "
                f"the first: {name} (line {number})"
            )
        for stem in stems:
            if split_of.setdefault(stem, split) != split:
                raise DataError(f"{root}: image '{stem}' is in both {split_of[stem]}.txt and {path.name}")
    return split_of


def _read_class_names(root: Path, has_masks: bool) -> tuple[str, ...] | None:
    path = root / "classes.txt"
    if path.is_file():
        classes = tuple(line for _, line in _lines(path))
        if repeated := [name for name, count in Counter(classes).items() if count > 1]:
            raise DataError(f"{path}: class '{repeated[0]}' stands in several lines")
        return classes or None
    return None if has_masks else ("background", "object")


def _by_stem(root: Path, names: Iterable[PurePosixPath]) -> dict[str, Path]:
    """``{relative path without its ending: file}``, in order."""
    result: dict[str, Path] = {}
    for name in names:
        stem = name.with_suffix("").as_posix()
        if stem in result:
            raise DataError(f"{root}: {result[stem].name} and {name.name} have the same stem; masks are found by stem")
        result[stem] = root / name
    return result


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines of a text file that aren't blank, with their numbers from 1."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a UTF-8 text file; it needs one name a line") from None
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _image_names(root: Path) -> list[PurePosixPath]:
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


_READERS: dict[str, Callable[[Path], ImageSet]] = {
    "folder": _read_folder,
    "classes": _read_classes,
    "list": _read_list,
    "masks": _read_masks,
}
