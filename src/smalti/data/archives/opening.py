"""Which files and folders are archives of images."""

import glob
import os
import re
from pathlib import Path

from smalti.data.archives.image_columns import open_hf, open_parquet
from smalti.data.archives.members import Archive
from smalti.data.archives.packed import open_packed, open_remote
from smalti.data.archives.packed_index import INDEXERS
from smalti.data.archives.remote import as_url
from smalti.data.images.image_set import as_text
from smalti.errors import DataError

PACKED = tuple(INDEXERS)
"""Endings of archives with images as members, in lower case."""
PARQUET = ".parquet"
_COMPRESSED = re.compile(r".+\.(tar\.\w+|tgz|tbz2?|txz|7z|rar)", re.IGNORECASE)


def open_archive(path: Path) -> Archive | None:
    """The archive at a path: a tar, zip or Parquet file with images, a pattern that names several, the address of a tar
    or zip file or of several, or a data set of Hugging Face in a folder; None if it is none.

    Raises:
        DataError: for an archive that can't be read.
    """
    if path.is_dir():
        return open_hf(path)
    if (url := as_url(path)) is not None:
        # of paths of members as well: these are none
        return open_remote(path, url) if path.suffix.lower() in (*PACKED, PARQUET) else None
    files = files_at(path)
    if not files:
        return None
    if all(file.suffix.lower() == PARQUET for file in files):
        return open_parquet(path, files)
    if wrong := [file for file in files if _COMPRESSED.fullmatch(file.name)]:
        raise DataError(
            f"{as_text(wrong[0])}: a compressed archive, in which images can't be read at random; unpack it, or "
            "decompress it to .tar"
        )
    return open_packed(path, files)


def files_at(path: Path) -> list[Path]:
    """The archives that a path names, sorted; empty if there are none."""
    if path.is_file():
        return [path] if path.suffix.lower() in (*PACKED, PARQUET) or _COMPRESSED.fullmatch(path.name) else []
    text = os.fspath(path)
    if not glob.has_magic(text) or path.exists():
        return []
    found = map(Path, glob.glob(text))  # noqa: PTH207 (a pattern may be absolute)
    known = sorted(one for one in found if one.suffix.lower() in (*PACKED, PARQUET) and one.is_file())
    if len({one.suffix.lower() == PARQUET for one in known}) > 1:
        raise DataError(f"{as_text(path)}: names Parquet files and others; name files of one kind, such as *.tar")
    return known


def shards_in(folder: Path) -> Path | None:
    """The pattern that names the tar files in a folder; None if it holds none."""
    pattern = Path(glob.escape(os.fspath(folder))) / "*.tar"
    return pattern if files_at(pattern) else None
