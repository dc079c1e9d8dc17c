"""Files and members of archives are read in one way: a member has the path ``ARCHIVE/NAME``.

An archive that was opened once is known to its process, and to the data workers that this process forks. Elsewhere it
is opened at the first read of a member.
"""

import abc
import io
import os
from pathlib import Path

from smalti.data.archives.names import Names


class Archive(abc.ABC):
    """Files packed into others, read at random and never unpacked. Reading is safe in threads and after a fork."""

    root: Path
    """What the user named: a file, a folder of shards, or a pattern."""
    names: Names
    """Its members, sorted by their bytes."""
    container: str
    """What it is, such as ``3 tar shards``."""
    left_out: tuple[str, ...] = ()
    """Members that are not read, and why: a phrase each."""
    labels: Names | None = None
    """Label of each member, empty if it has none; None: no member has one."""
    has_folders: bool = True
    """Whether the folders in the names are those of the data."""

    @abc.abstractmethod
    def read(self, place: int) -> bytes:
        """Content of a member.

        Raises:
            DataError: if it is damaged.
            RunError: if the archive is no longer what it was when it was opened.
        """

    @abc.abstractmethod
    def num_bytes(self, place: int) -> int:
        """Length of a member as it is stored; -1 if it isn't known."""


_opened: dict[str, Archive] = {}


def remember(archive: Archive) -> None:
    """Make the members of an archive readable by their paths, instead of those it had before."""
    _opened[os.fspath(archive.root)] = archive


def archive_at(root: Path) -> Archive | None:
    """The opened archive with this root."""
    return _opened.get(os.fspath(root))


def _member(path: Path) -> tuple[Archive, int] | None:
    text = os.fspath(path)
    for root, archive in _opened.items():
        if text.startswith(root) and text[len(root) : len(root) + 1] == "/":
            place = archive.names.find(text[len(root) + 1 :])
            if place is not None:
                return archive, place
    return None


def _find(path: Path) -> tuple[Archive, int] | None:
    """The same, after opening the archive that the path leads into, as in a data worker that was not forked."""
    if (found := _member(path)) is not None or path.exists():
        return found
    from smalti.data.archives.opening import open_archive  # it imports this module

    for parent in path.parents:
        if (archive := open_archive(parent)) is not None:
            remember(archive)
            return _member(path)
        if parent.is_dir():
            break
    return None


def read_bytes(path: Path) -> bytes:
    """Content of a file or of a member of an archive.

    Raises:
        OSError: if there is none, or it can't be read.
        DataError, RunError: as :meth:`Archive.read`.
    """
    if (found := _member(path)) is None:
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if (found := _find(path)) is None:
                raise
    archive, place = found
    return archive.read(place)


def open_binary(path: Path) -> io.BufferedReader | io.BytesIO:
    """A file, or a member of an archive, open for reading.

    Raises:
        OSError, DataError, RunError: as :func:`read_bytes`.
    """
    if _member(path) is None and path.is_file():
        return path.open("rb")
    return io.BytesIO(read_bytes(path))


def is_file(path: Path) -> bool:
    """Whether there is a file or a member of an archive."""
    return _member(path) is not None or path.is_file()


def num_bytes(path: Path) -> int:
    """Length of a file or a member of an archive; -1 if there is none, or it isn't known."""
    if (found := _member(path)) is not None:
        return found[0].num_bytes(found[1])
    return path.stat().st_size if path.exists() else -1


def files_in(root: Path, ending: str) -> list[Path]:
    """The files that lie in a folder, or outermost in an archive, and end so, in any case; sorted."""
    if (archive := archive_at(root)) is not None:
        if ending.encode() not in archive.names.text.lower():
            return []
        return [root / name for name in archive.names if "/" not in name and name.lower().endswith(ending)]
    with os.scandir(root) as listing:
        return sorted(root / entry.name for entry in listing if entry.name.lower().endswith(ending) and entry.is_file())
