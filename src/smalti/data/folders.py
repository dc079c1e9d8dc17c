"""Readers: a folder tree, a list file, class folders, images with masks or a public data set becomes one
:class:`ImageSet`.

The layout is detected, or forced by ``NAME=PATH``. Nothing is decoded here; order never depends on the file system.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from smalti.config import unknown_key
from smalti.data import datasets
from smalti.data.image_set import SPLIT_ORDER, by_stem, image_names, read_lines
from smalti.data.image_set import SPLITS as SPLITS
from smalti.data.image_set import ImageSample as ImageSample
from smalti.data.image_set import ImageSet as ImageSet
from smalti.data.images import read_image as read_image
from smalti.errors import ConfigError, DataError


def open_images(data: str | Path, layout: str | None = None) -> ImageSet:
    """The images at a path, their layout detected or forced.

    Args:
        data: a folder or a list file; ``NAME=PATH`` forces the reader NAME.
        layout: forces a reader as well: ``folder``, ``list``, ``classes`` or ``masks``. ``folder`` takes all images of
            the tree; ``list`` a text file with a path a line, relative to it or absolute; ``classes`` ``CLASS/img`` or
            ``SPLIT/CLASS/img``; ``masks`` ``images/`` with ``masks/`` or ``instances/``, by stem. Those of
            :mod:`~smalti.data.datasets` take the folders that a public data set comes in.

    Raises:
        ConfigError: if there is no reader of that name.
        DataError: if the path is missing, holds no images, or doesn't fit the layout; one line.
    """
    path, layout = _split_name(data, layout)
    if layout is not None and layout not in READERS:
        raise ConfigError(unknown_key(layout, READERS, "--data").replace("field", "reader"))
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if layout is not None:
        if path.is_dir() == (layout == "list"):
            needed = "a text file with one path a line" if layout == "list" else "a folder"
            raise DataError(
                f"{path}: layout '{layout}' needs {needed}, this is a {'folder' if path.is_dir() else 'file'}"
            )
        return READERS[layout](path)
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
    if known := datasets.detect(root):
        return READERS[known](root)
    names = image_names(root)
    if _class_problem(names) is None and len({name.parts[-2] for name in names}) > 1:
        return _class_set(root, names)
    return _folder_set(root, names)


def _read_folder(root: Path) -> ImageSet:
    return _folder_set(root, image_names(root))


def _folder_set(root: Path, names: Sequence[PurePosixPath]) -> ImageSet:
    return ImageSet(root, "folder", tuple(ImageSample(root / name) for name in names), None)


def _read_list(path: Path) -> ImageSet:
    entries = [(number, path.parent / Path(line).expanduser()) for number, line in read_lines(path)]
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
    names = image_names(root)
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
    for split in SPLIT_ORDER if has_splits else ():
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
    images = by_stem(root / "images", image_names(root / "images"))
    masks = by_stem(root / "masks", image_names(root / "masks")) if (root / "masks").is_dir() else {}
    instances = {}
    if (root / "instances").is_dir():
        instances = by_stem(root / "instances", image_names(root / "instances"))
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
        names = [(number, line.removeprefix("images/")) for number, line in read_lines(path)]
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
        classes = tuple(line for _, line in read_lines(path))
        if repeated := [name for name, count in Counter(classes).items() if count > 1]:
            raise DataError(f"{path}: class '{repeated[0]}' stands in several lines")
        return classes or None
    return None if has_masks else ("background", "object")


READERS: dict[str, Callable[[Path], ImageSet]] = {
    "folder": _read_folder,
    "classes": _read_classes,
    "list": _read_list,
    "masks": _read_masks,
    **datasets.READERS,
}
"""Name -> reader: what may stand before ``=PATH``."""
