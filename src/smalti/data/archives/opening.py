"""Which files and folders are archives of images."""

import glob
import os
import re
from pathlib import Path

from smalti.data.archives.members import Archive
from smalti.data.archives.packed import open_packed
from smalti.data.archives.packed_index import INDEXERS
from smalti.data.images.image_set import as_text
from smalti.errors import DataError

PACKED = tuple(INDEXERS)
"""Endings of archives with images as members, in lower case."""
_COMPRESSED = re.compile(r".+\.(tar\.\w+|tgz|tbz2?|txz|7z|rar)", re.IGNORECASE)


def open_archive(path: Path) -> Archive | None:
    """The archive at a path: a tar or zip file, or a pattern that names shards; None if it is none.

    Raises:
        DataError: for an archive that can't be read.
    """
    files = shards_at(path)
    if not files:
        return None
    if wrong := [file for file in files if _COMPRESSED.fullmatch(file.name)]:
        raise DataError(
            f"{as_text(wrong[0])}: a compressed archive, in which images can't be read at random; unpack it, or "
            "decompress it to .tar"
        )
    return open_packed(path, files)


def shards_at(path: Path) -> list[Path]:
    """The archives that a path names, sorted; empty if there are none."""
    if path.is_file():
        return [path] if path.suffix.lower() in PACKED or _COMPRESSED.fullmatch(path.name) else []
    text = os.fspath(path)
    if not glob.has_magic(text) or path.exists():
        return []
    found = map(Path, glob.glob(text))  # noqa: PTH207 (a pattern may be absolute)
    return sorted(one for one in found if one.suffix.lower() in PACKED and one.is_file())


def shards_in(folder: Path) -> Path | None:
    """The pattern that names the tar files in a folder; None if it holds none."""
    pattern = Path(glob.escape(os.fspath(folder))) / "*.tar"
    return pattern if shards_at(pattern) else None
