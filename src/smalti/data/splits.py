"""Which split an image belongs to: from the folders on its path, or from lists such as ``train.txt``.

A name that could be a split and is not understood is an error: images that are labelled test must not be trained on.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from smalti.data.image_files import first_of
from smalti.data.image_set import SPLIT_ORDER, SPLITS, as_text, read_lines
from smalti.errors import DataError

_WITH_MORE = re.compile(r"(.+?)[\s,;]+(?:-?\d+|\S+\.(?:png|tiff?|bmp|jpe?g|webp))")
"""A line of a list with an image, and its class's number or its mask."""
SPELLINGS = "train or training; val, valid, validation or dev; test or testing"


def split_of(name: str) -> str | None:
    """``train``, ``val`` or ``test`` by the name of a folder, a list or a cell; None for any other name."""
    return SPLITS.get(name.lower())


def folder_splits(root: Path, names: Sequence[PurePosixPath]) -> tuple[str, ...]:
    """The folders right below ``root`` that are splits, as spelt; empty where the folders are no splits.

    Args:
        root: for messages.
        names: of all images, relative to ``root``.

    Raises:
        DataError: if some folders are splits and others are not, names only resemble splits, a split is there twice,
            or splits lie inside of other folders.
    """
    tops = sorted({name.parts[0] for name in names if len(name.parts) > 1})
    splits = [top for top in tops if split_of(top)]
    others = [top for top in tops if not split_of(top)]
    if others and ("train" in map(split_of, splits) or len(splits) > 1):
        raise DataError(
            f"{as_text(root)}: {as_text(others[0])}/ lies beside {', '.join(f'{split}/' for split in splits)} and is "
            f"no split; rename it ({SPELLINGS}) or move it away; classes={as_text(root)} takes every folder as a class"
        )
    if not splits and len(others) > 1 and all(map(_resembles_split, others)):
        raise DataError(
            f"{as_text(root)}: {', '.join(f'{as_text(top)}/' for top in others[:3])} look like splits; name them so "
            f"({SPELLINGS}), or write folder={as_text(root)} to read every image as one set"
        )
    if others:
        _refuse_inner_splits(root, names)
        return ()
    for split in SPLIT_ORDER:
        if len(spellings := [top for top in splits if split_of(top) == split]) > 1:
            raise DataError(f"{as_text(root)}: the same split twice: {', '.join(spellings)}; keep one")
    return tuple(splits)


def read_split_lists(root: Path, keys: Mapping[str, str]) -> dict[str, str]:
    """``{image: split}`` from ``train.txt``, ``val.txt`` and so on; empty where there are no such lists.

    A text file of another name that lists images is refused where there are split lists.

    Args:
        root: the folder of the lists.
        keys: what a line may say of an image -> the image.

    Raises:
        DataError: for a line that names no image, an image in two lists, the same split twice, or a list whose name is
            not understood.
    """
    texts = sorted(path for path in root.iterdir() if path.suffix.lower() == ".txt" and path.is_file())
    known = [path for path in texts if split_of(path.stem)]
    if not known:
        return {}
    for path in texts:
        if path not in known and path.name.lower() != "classes.txt" and _lists_images(path, keys):
            raise DataError(
                f"{as_text(path)}: lists images beside {known[0].name}, and its name is no split; rename it "
                f"({SPELLINGS}) or move it away"
            )
    result: dict[str, str] = {}
    source: dict[str, Path] = {}
    for path in known:
        split = SPLITS[path.stem.lower()]
        if (other := source.setdefault(split, path)) != path:
            raise DataError(f"{as_text(root)}: the same split twice: {other.name}, {path.name}; keep one")
        lines = read_lines(path)
        found = [(number, line, listed(line, keys)) for number, line in lines]
        if unknown := [(number, line) for number, line, image in found if image is None]:
            number, line = unknown[0]
            raise DataError(
                f"{as_text(path)}: {len(unknown)} of {len(lines)} names have no image, the first: {line} "
                f"(line {number})"
            )
        for _, line, image in found:
            assert image is not None
            if result.setdefault(image, split) != split:
                raise DataError(f"{as_text(root)}: '{line}' is in both {source[result[image]].name} and {path.name}")
    return result


def listed(line: str, keys: Mapping[str, str]) -> str | None:
    """The image that a line of a list names: as written, in composed Unicode, or followed by a number or a mask."""
    texts = [line, line.removeprefix("./"), line.replace("\\", "/")]
    if match := _WITH_MORE.fullmatch(line):
        texts.append(match[1])
    for text in texts:
        for form in (text, unicodedata.normalize("NFC", text)):
            if form in keys:
                return keys[form]
    return None


def image_keys(names: Sequence[PurePosixPath], folders: Sequence[str] = ()) -> dict[str, str]:
    """What a line of a list may say of each image: its path, without ending, or the same from one of the folders on.

    A short form that fits two images is left out.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for name in names:
        full = name.as_posix()
        starts = [0, *(place + 1 for place, part in enumerate(name.parts[:-1]) if part in folders)]
        for start in starts:
            path = PurePosixPath(*name.parts[start:])
            for text in {path.as_posix(), path.with_suffix("").as_posix()}:
                found[text].add(full)
                found[unicodedata.normalize("NFC", text)].add(full)
    return {text: next(iter(images)) for text, images in found.items() if len(images) == 1}


def _lists_images(path: Path, keys: Mapping[str, str]) -> bool:
    try:
        lines = read_lines(path)
    except DataError:
        return False
    return bool(lines) and listed(lines[0][1], keys) is not None


def _resembles_split(name: str) -> bool:
    words = re.split(r"[^a-z]+", name.lower())
    return any(word in SPLITS for word in words)


def _refuse_inner_splits(root: Path, names: Sequence[PurePosixPath]) -> None:
    """Refuse folders such as ``cat/train`` beside ``cat/test``: the layout says nothing about them."""
    inside: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name in names:
        for depth, part in enumerate(name.parts[1:-1], 1):
            if split_of(part):
                inside[name.parts[:depth]].add(part)
    for parent, splits in sorted(inside.items()):
        if len({split_of(split) for split in splits}) > 1:
            where = as_text(PurePosixPath(*parent).as_posix())
            raise DataError(
                f"{as_text(root)}: {where}/ holds {', '.join(sorted(splits))}; put splits above everything else "
                f"(SPLIT/CLASS/image), or write folder={as_text(root)} to read every image as one set"
            )


def stray_note(names: Sequence[PurePosixPath], why: str) -> str:
    """Images that are left out as a phrase: how many, why, and the first."""
    return f"{len(names):,} image{'s' * (len(names) > 1)} {why} ({first_of(list(names))})"
