"""How images below a folder are found. Nothing is decoded here; order never depends on the file system."""

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

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
_LISTS = {f"{split}.txt" for split in SPLITS}


class Found(NamedTuple):
    """Images below a folder."""

    names: list[PurePosixPath]
    """Relative paths, sorted."""
    skipped: list[str]
    """Skipped folders, relative and sorted: previews, and those added by file systems."""
    lists: list[str]
    """Text files whose names are those of splits, relative and sorted."""

    def inside(self, folder: str) -> "Found":
        """What lies in one of the outermost folders, relative to it."""
        start = f"{folder}/"
        names = [
            PurePosixPath(*name.parts[1:]) for name in self.names if len(name.parts) > 1 and name.parts[0] == folder
        ]
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
            with os.scandir(folder) as listing:
                entries = sorted((e for e in listing if not e.name.startswith(".")), key=lambda e: e.name, reverse=True)
            images = {e.name for e in entries if e.name.rpartition(".")[2].lower() in ENDINGS and _is(e.is_file)}
            found += [prefix + name for name in images]
            lists += [prefix + e.name for e in entries if e.name.lower() in _LISTS and _is(e.is_file)]
            for entry in entries:
                if entry.name in images or not _is(entry.is_dir):
                    continue
                name = entry.name.lower()
                if name in _NOT_DATA or (name in _PREVIEWS and images):
                    skipped.append(prefix + entry.name)
                else:
                    (links if entry.is_symlink() else waiting).append((entry.path, f"{prefix}{entry.name}/"))
    except OSError as error:
        raise DataError(f"{as_text(error.filename or root)}: can't be read ({error.strerror or error})") from None
    if not found:
        raise _nothing(root, "looked in all its folders for")
    return Found([PurePosixPath(name) for name in sorted(found)], sorted(skipped), sorted(lists))


def has_images(root: Path) -> bool:
    """Whether there is an image below a folder, to which the walk leads before it has seen everything."""
    for _, _, files in os.walk(root):
        if any(name.rpartition(".")[2].lower() in ENDINGS and not name.startswith(".") for name in files):
            return True
    return False


def _nothing(root: Path, searched: str) -> DataError:
    return DataError(f"{as_text(root)}: no images found ({searched} {', '.join(ENDINGS)}, in any case)")


def _find_members(archive: Archive) -> Found:
    """The same for an archive, whose hidden members are left out already."""
    images = [name for name in archive.names if name.rpartition(".")[2].lower() in ENDINGS]
    if not images:
        raise _nothing(archive.root, "its members end in none of")
    folders = {name.rpartition("/")[0] for name in images}
    skipped = {
        "/".join(parts[: depth + 1])
        for parts in (folder.split("/") for folder in folders)
        for depth, part in enumerate(parts)
        if part.lower() in _NOT_DATA or (part.lower() in _PREVIEWS and "/".join(parts[:depth]) in folders)
    }
    if skipped:
        starts = tuple(f"{folder}/" for folder in skipped)
        images = [name for name in images if not name.startswith(starts)]
    lists = [name for name in archive.names if name.rpartition("/")[2].lower() in _LISTS]
    return Found([PurePosixPath(name) for name in sorted(images)], sorted(skipped), sorted(lists))


def image_names(root: Path) -> list[PurePosixPath]:
    """The names of :func:`find_images` alone."""
    return find_images(root).names


def first_of(names: list[str] | list[PurePosixPath]) -> str:
    """The first of some names, for the end of a phrase: ``x.png``, or ``the first: x.png`` of several."""
    return f"{'the first: ' * (len(names) > 1)}{as_text(str(names[0]))}"


def _is(question: Callable[[], bool]) -> bool:
    """The answer, no for a link that leads to itself."""
    try:
        return question()
    except OSError:
        return False
