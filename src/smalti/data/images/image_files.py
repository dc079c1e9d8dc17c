"""How images below a folder are found. Nothing is decoded here; order never depends on the file system."""

import functools
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, overload

from smalti.data.archives.members import Archive, archive_at
from smalti.data.images.decode import ENDINGS
from smalti.data.images.image_set import SPLITS, as_text
from smalti.errors import DataError

_NOT_DATA = {
    "@eadir",
    "#recycle",
    "@recycle",
    "$recycle.bin",
    "__macosx",
    "lost+found",
    "system volume information",
}
"""Folders that operating systems and storage devices add; in lower case."""
_PREVIEWS = {"thumb", "thumbs", "thumbnail", "thumbnails"}
"""Folders of smaller copies, where the images lie beside them; in lower case."""
_DOTTED = tuple(f".{ending}" for ending in ENDINGS)
_LISTS = {f"{split}.txt" for split in SPLITS}


class FoundNames(Sequence[PurePosixPath]):
    """Relative paths of images, sorted. What depends on their folders alone can be had without a path object each."""

    def __init__(self, texts: list[str]) -> None:
        """
        Args:
            texts: the paths, sorted.
        """
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, place: int) -> PurePosixPath: ...
    @overload
    def __getitem__(self, place: slice) -> "FoundNames": ...
    def __getitem__(self, place: int | slice) -> "PurePosixPath | FoundNames":
        return FoundNames(self.texts[place]) if isinstance(place, slice) else PurePosixPath(self.texts[place])

    def __iter__(self) -> Iterator[PurePosixPath]:
        return map(PurePosixPath, self.texts)

    @functools.cached_property
    def folder_of(self) -> list[str]:
        """Folder of each image; empty for those that lie outermost."""
        return [text.rpartition("/")[0] for text in self.texts]

    @functools.cached_property
    def counts(self) -> Counter[str]:
        """How many images lie right in each folder."""
        return Counter(self.folder_of)

    @functools.cached_property
    def one_each(self) -> list[PurePosixPath]:
        """The first image of each folder."""
        first = dict(zip(reversed(self.folder_of), reversed(self.texts), strict=True))
        return sorted(map(PurePosixPath, first.values()), key=str)

    def parted(self, is_inside: Callable[[int], bool]) -> tuple["FoundNames", "FoundNames"]:
        """The images at a depth, and the others.

        Args:
            is_inside: whether images below so many folders are at that depth.
        """
        inside = {folder for folder in self.counts if is_inside(folder.count("/") + 1 if folder else 0)}
        if len(inside) == len(self.counts):
            return self, FoundNames([])
        parts: tuple[list[str], list[str]] = ([], [])
        for text, folder in zip(self.texts, self.folder_of, strict=True):
            parts[folder not in inside].append(text)
        return FoundNames(parts[0]), FoundNames(parts[1])

    def without(self, others: Collection[PurePosixPath]) -> "FoundNames":
        """The images but some."""
        if not others:
            return self
        texts = set(map(str, others))
        return FoundNames([text for text in self.texts if text not in texts])


class Found(NamedTuple):
    """Images below a folder."""

    names: FoundNames
    """Relative paths, sorted."""
    skipped: list[str]
    """Skipped folders, relative and sorted: previews, and those added by file systems."""
    lists: list[str]
    """Text files whose names are those of splits, relative and sorted."""

    def inside(self, folder: str) -> "Found":
        """What lies in one of the outermost folders, relative to it."""
        start = f"{folder}/"
        names = FoundNames([text[len(start) :] for text in self.names.texts if text.startswith(start)])
        skipped, lists = (
            [path.removeprefix(start) for path in paths if path.startswith(start)]
            for paths in (self.skipped, self.lists)
        )
        return Found(names, skipped, lists)

    @property
    def not_read(self) -> tuple[str, ...]:
        """The skipped folders as a phrase; empty if there are none."""
        if not self.skipped:
            return ()
        count = len(self.skipped)
        return (f"{count:,} folder{'s' * (count > 1)} of previews or system files ({first_of(self.skipped)})",)


def find_images(root: Path) -> Found:
    """Images below a folder or in an opened archive; hidden files are left out, links followed, each folder is read
    once.

    Raises:
        DataError: if there is none, or a folder can't be read.
    """
    if (archive := archive_at(root)) is not None:
        return _find_members(archive)
    found: list[str] = []
    skipped: list[str] = []
    lists: list[str] = []
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
            known, others = len(found), []
            with os.scandir(folder) as listing:
                for entry in listing:  # not kept: a million entries of one folder would take hundreds of MB
                    name = entry.name
                    if name.startswith("."):
                        continue
                    if name.rpartition(".")[2].lower() in ENDINGS and _is(entry.is_file):
                        found.append(prefix + name)
                    else:
                        others.append(entry)
            for entry in sorted(others, key=lambda entry: entry.name, reverse=True):
                name = entry.name.lower()
                if name in _LISTS and _is(entry.is_file):
                    lists.append(prefix + entry.name)
                elif not _is(entry.is_dir):
                    continue
                elif name in _NOT_DATA or (name in _PREVIEWS and len(found) > known):
                    skipped.append(prefix + entry.name)
                else:
                    (links if entry.is_symlink() else waiting).append((entry.path, f"{prefix}{entry.name}/"))
    except OSError as error:
        raise DataError(f"{as_text(error.filename or root)}: can't be read ({error.strerror or error})") from None
    if not found:
        raise _nothing(root, "looked in all its folders for")
    found.sort()
    return Found(FoundNames(found), sorted(skipped), sorted(lists))


def has_images(root: Path) -> bool:
    """Whether there is an image below a folder; found without a walk through all of it, if there is one."""
    waiting = [os.fspath(root)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as listing:
                for entry in listing:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif entry.name.rpartition(".")[2].lower() in ENDINGS or (entry.is_symlink() and entry.is_dir()):
                        return True  # what a link leads to is not searched here
        except OSError:
            return True  # reported when it is read
    return False


def _nothing(root: Path, searched: str) -> DataError:
    return DataError(f"{as_text(root)}: no images found ({searched} {', '.join(ENDINGS)}, in any case)")


def _find_members(archive: Archive) -> Found:
    """The same for an archive, whose hidden members are left out already."""
    names = list(archive.names)
    images = [name for name in names if name.endswith(_DOTTED) or name.lower().endswith(_DOTTED)]
    if not images:
        raise _nothing(archive.root, "its members end in none of")
    found = FoundNames(images)
    folders = set(found.counts)
    skipped = {
        "/".join(parts[: depth + 1])
        for parts in (folder.split("/") for folder in folders)
        for depth, part in enumerate(parts)
        if part.lower() in _NOT_DATA or (part.lower() in _PREVIEWS and "/".join(parts[:depth]) in folders)
    }
    if skipped:
        starts = tuple(f"{folder}/" for folder in skipped)
        found = FoundNames([name for name in images if not name.startswith(starts)])
    texts = [name for name in names if name[-4:].lower() == ".txt"] if len(images) < len(names) else []
    lists = [name for name in texts if name.rpartition("/")[2].lower() in _LISTS]
    in_order = sorted(found.texts)  # as of a folder: by characters, not by bytes
    return Found(found if in_order == found.texts else FoundNames(in_order), sorted(skipped), sorted(lists))


def image_names(root: Path) -> FoundNames:
    """The names of :func:`find_images` alone."""
    return find_images(root).names


def first_of(names: Sequence[str] | Sequence[PurePosixPath]) -> str:
    """The first of some names, for the end of a phrase: ``x.png``, or ``the first: x.png`` of several."""
    return f"{'the first: ' * (len(names) > 1)}{as_text(str(names[0]))}"


def _is(question: Callable[[], bool]) -> bool:
    """The answer, no for a link that leads to itself."""
    try:
        return question()
    except OSError:
        return False
