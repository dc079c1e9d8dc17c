"""Which split an image belongs to: from the folders on its path, or from lists such as ``train.txt``.

A name that could be a split and is not understood is an error: images that are labelled test must not be trained on.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

from smalti.data.archives.members import files_in
from smalti.data.images.image_files import first_of
from smalti.data.images.image_set import SPLIT_ORDER, SPLITS, as_text, read_lines
from smalti.errors import DataError

_WITH_MORE = re.compile(r"(.+?)[\s,;]+(?:-?\d+|\S+\.(?:png|tiff?|bmp|jpe?g|webp))")
"""A line of a list with an image, and its class's number or its mask."""
SPELLINGS = "train or training; val, valid, validation or dev; test or testing"


def split_of(name: str) -> str | None:
    """``train``, ``val`` or ``test`` by the name of a folder, a list or a cell; None for any other name."""
    return SPLITS.get(name.lower())


def folder_splits(root: Path, names: Sequence[PurePosixPath], has_masks: bool = False) -> tuple[str, ...]:
    """The folders right below ``root`` that are splits, as spelt; empty if the folders are no splits.

    One folder called ``test`` beside class folders is a class.

    Args:
        root: for messages.
        names: of all images, relative to ``root``.
        has_masks: whether there are masks among them, which no message may propose to read as images.

    Raises:
        DataError: if some folders are splits and others are not, names only resemble splits, a split is there twice,
            or splits lie inside of other folders.
    """
    tops = sorted({name.parts[0] for name in names if len(name.parts) > 1})
    splits = [top for top in tops if split_of(top)]
    others = [top for top in tops if not split_of(top)]
    is_nested = any(len(name.parts) > 2 and split_of(name.parts[0]) for name in names)
    if others and ("train" in map(split_of, splits) or len(splits) > 1 or is_nested):
        is_flat = all(len(name.parts) == 2 for name in names if len(name.parts) > 1)
        as_classes = f"; classes={as_text(root)} takes every folder as a class" * is_flat
        raise DataError(
            f"{as_text(root)}: {as_text(others[0])}/ lies beside {', '.join(f'{split}/' for split in splits)} and is "
            f"no split; rename it ({SPELLINGS}) or move it away" + (as_classes + _as_one_set(root)) * (not has_masks)
        )
    resembling = {top: found for top in tops if (found := resembled_splits(top))}
    is_mostly = len(set().union(*resembling.values())) > 1 and 2 * len(resembling) >= len(tops)
    if others and len(tops) > 1 and (is_mostly or len(resembling) == len(tops)):
        raise DataError(
            f"{as_text(root)}: {', '.join(f'{as_text(top)}/' for top in [*resembling][:3])} look like splits; name "
            f"them so ({SPELLINGS})" + _as_one_set(root) * (not has_masks)
        )
    if others:
        _refuse_inner_splits(root, names, has_masks)
        return ()
    for split in SPLIT_ORDER:
        if len(spellings := [top for top in splits if split_of(top) == split]) > 1:
            raise DataError(f"{as_text(root)}: the same split twice: {', '.join(spellings)}; keep one")
    return tuple(splits)


def read_split_lists(root: Path, keys: Mapping[str, str], partial: bool = False) -> dict[str, str]:
    """``{image: split}`` from ``train.txt``, ``val.txt`` and so on; empty if there are no such lists.

    A text file of another name that lists images is refused where there are split lists, or its name resembles one.

    Args:
        root: the folder of the lists.
        keys: what a line may say of an image -> the image.
        partial: pass over lines that name no image.

    Raises:
        DataError: for a line that names no image, an image in two lists, the same split twice, or a list whose name is
            not understood.
    """
    texts = text_files(root)
    known = [path for path in texts if split_of(path.stem)]
    for path in texts:
        if path in known or path.name.lower() == "classes.txt" or not (known or resembled_splits(path.stem)):
            continue
        if lists_images(path, keys):
            raise DataError(
                f"{as_text(path)}: lists images{f' beside {known[0].name}' if known else ''}, and its name is no "
                f"split; rename it ({SPELLINGS}) or move it away"
            )
    result: dict[str, str] = {}
    source: dict[str, Path] = {}
    for path in known:
        split = SPLITS[path.stem.lower()]
        if (other := source.setdefault(split, path)) != path:
            raise DataError(f"{as_text(root)}: the same split twice: {other.name}, {path.name}; keep one")
        lines = read_lines(path)
        found = [(number, line, listed(line, keys)) for number, line in lines]
        if not partial and (unknown := [(number, line) for number, line, image in found if image is None]):
            number, line = unknown[0]
            raise DataError(
                f"{as_text(path)}: {len(unknown)} of {len(lines)} names have no image, the first: {line} "
                f"(line {number}); write paths relative to {as_text(root)}, or move the list away if it is none"
            )
        for _, line, image in found:
            if image is not None and result.setdefault(image, split) != split:
                raise DataError(f"{as_text(root)}: '{line}' is in both {source[result[image]].name} and {path.name}")
    return result


def check_same_splits(root: Path, by_folder: Mapping[str, str | None], lists: Mapping[str, str]) -> None:
    """Refuse an image that is of one split by its folder and of another by a list.

    Args:
        root: for messages.
        by_folder: image -> split.
        lists: image -> split.
    """
    if wrong := [name for name, split in lists.items() if (by_folder.get(name) or split) != split]:
        raise DataError(
            f"{as_text(root)}: {as_text(wrong[0])} lies in the folder of one split and is in the list of another; "
            "keep the lists or the folders"
        )


def listed(line: str, keys: Mapping[str, str]) -> str | None:
    """The image that a line of a list names: as written, in composed Unicode, or followed by a number or a mask.

    Folders of another machine may stand before its path, as long as one of its own folders is left.
    """
    texts = [line, line.removeprefix("./"), line.replace("\\", "/")]
    if match := _WITH_MORE.fullmatch(line):
        texts.append(match[1])
    forms = [form for text in texts for form in (text, unicodedata.normalize("NFC", text))]
    for form in forms:
        if form in keys:
            return keys[form]
    shorter = (form.split("/", place)[-1] for form in forms for place in range(1, form.count("/")))
    return next((keys[form] for form in shorter if form in keys), None)


def image_keys(names: Sequence[PurePosixPath], folders: Collection[str] = ()) -> dict[str, str]:
    """What a line of a list may say of each image: its path, without ending, or the same from one of the folders on.

    A short form that fits two images is left out.
    """
    result: dict[str, str] = {}
    ambiguous: set[str] = set()
    for name in names:
        full, parts, ending = name.as_posix(), name.parts, name.suffix
        starts = [0, *(place + 1 for place, part in enumerate(parts[:-1]) if part in folders)]
        for start in starts:
            path = "/".join(parts[start:])
            for text in (path, path.removesuffix(ending)):
                for form in {text, unicodedata.normalize("NFC", text)}:
                    if result.setdefault(form, full) != full:
                        ambiguous.add(form)
    return {text: image for text, image in result.items() if text not in ambiguous}


def text_files(root: Path) -> list[Path]:
    """The text files that lie in a folder, or outermost in an archive; sorted."""
    return [path for path in files_in(root, ".txt") if path.suffix]


def lists_images(path: Path, keys: Mapping[str, str]) -> bool:
    """Whether the first line of a text file names an image."""
    try:
        lines = read_lines(path)
    except DataError:
        return False
    return bool(lines) and listed(lines[0][1], keys) is not None


def resembled_splits(name: str) -> set[str]:
    """The splits among the words of a name, such as ``train`` of ``train_images`` and of ``trainA``."""
    return {split for word in words(name) if (split := split_of(word))}


def words(name: str) -> list[str]:
    """The words of a name: they end at other signs than letters, and before a capital."""
    return re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)


def _as_one_set(root: Path) -> str:
    return f"; folder={as_text(root)} reads every image as one set"


def _refuse_inner_splits(root: Path, names: Sequence[PurePosixPath], has_masks: bool) -> None:
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
                f"(SPLIT/CLASS/image)" + _as_one_set(root) * (not has_masks)
            )


def stray_note(names: Sequence[PurePosixPath], why: str) -> str:
    """Images that are left out as a phrase: how many, why, and the first."""
    return f"{len(names):,} image{'s' * (len(names) > 1)} {why} ({first_of(names)})"
