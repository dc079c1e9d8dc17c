"""Where the members of tar and zip files lie: found once, and kept beside these files or in the cache folder."""

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smalti.data.archives.names import Names
from smalti.data.images.decode import ENDINGS
from smalti.errors import ConfigError, DataError
from smalti.files import write_atomically
from smalti.reading import reading

INDEX_FILE = ".smalti_index"
"""Index of the archives in a folder."""
CACHE = "SMALTI_CACHE"
"""Environment variable: folder for what can be made again."""
BLOCK = 512
"""Bytes of a tar header."""
_FORMAT = 1
_TEXTS = re.compile(r"(classes|.*(train|val|dev|test).*)\.txt", re.IGNORECASE)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_MOST_LABEL = 256  # bytes of a .cls member


@dataclass(frozen=True)
class Entries:
    """Members of one tar or zip file that are read: images, and lists of splits and classes; n of them, in the file's
    order."""

    names: Names
    offset: np.ndarray
    """``(n,)`` int64: where the content of each begins."""
    size: np.ndarray
    """``(n,)`` int64: bytes in the file."""
    check: np.ndarray
    """``(n,)`` uint32: of tar the header's checksum, of zip the content's."""
    method: np.ndarray
    """``(n,)`` uint8: compression as zip numbers it; 0: none."""
    labels: Names
    """Content of the member of the same name with the ending ``.cls``; empty without it."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many members are not read though they may be images, by reason."""

    def __len__(self) -> int:
        return len(self.names)

    def fits(self, num_bytes: int) -> bool:
        """Whether all members lie within a file of this length, as those of an undamaged index do."""
        ends = self.offset + self.size
        return bool((self.offset >= 0).all() and (self.size >= 0).all() and (ends <= num_bytes).all())


_Row = tuple[str, int, int, int, int]


def _entries(rows: Sequence[_Row], labels: Mapping[str, str], left_out: Mapping[str, int]) -> Entries:
    numbers = np.array([row[1:] for row in rows], np.int64).reshape(-1, 4)
    names = [row[0] for row in rows]
    return Entries(
        Names(names),
        numbers[:, 0],
        numbers[:, 1],
        numbers[:, 2].astype(np.uint32),
        numbers[:, 3].astype(np.uint8),
        Names(labels.get(key_of(name), "") for name in names),
        left_out,
    )


def key_of(name: str) -> str:
    """What the members of one sample have in common in webdataset's layout: the name up to the first dot of its last
    part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _clean(raw: str, left_out: Counter[str]) -> str:
    """A member's name without ``./``; empty for hidden files and for paths that lead out of the archive."""
    parts = [part for part in raw.split("/") if part not in ("", ".")]
    if ".." in parts:
        left_out["with '..' in their paths"] += 1
        return ""
    return "" if any(part.startswith(".") for part in parts) else "/".join(parts)


def _is_read(name: str) -> bool:
    return name.rpartition(".")[2].lower() in ENDINGS or bool(_TEXTS.fullmatch(name.rpartition("/")[2]))


def index_tar(path: Path | str, file: io.BufferedIOBase) -> Entries:
    """Members of an uncompressed tar file.

    Args:
        path: for errors.
        file: its content, seekable.

    Raises:
        DataError: if it isn't one, is cut short, or is damaged.
    """
    rows: list[_Row] = []
    labels: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    links: list[tuple[str, str]] = []
    with reading(path, "a tar file", advice="it must be complete and not compressed"):
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # they would take 1 kB each
                name = _clean(member.name, left_out)
                if member.islnk() or member.issym():
                    if name and _is_read(name):
                        links.append((name, _clean(member.linkname, Counter()) if member.islnk() else ""))
                elif not name or not member.isreg() or member.issparse():
                    continue
                elif _is_read(name):
                    rows.append((name, member.offset_data, member.size, member.chksum, 0))
                elif name.endswith(".cls") and member.size <= _MOST_LABEL:
                    stream = tar.extractfile(member)
                    assert stream is not None
                    labels[key_of(name)] = stream.read().decode(errors="replace").strip()
            end = tar.offset
        file.seek(end)
        block = file.read(BLOCK)
        if block != bytes(BLOCK):
            what = "cut short" if len(block) < BLOCK else "damaged: no header"
            raise DataError(f"{path}: a tar file that is {what} at byte {end}; copy or make it again")
    known = {row[0]: row for row in rows} if links else {}
    for name, target in links:
        if target in known:
            rows.append((name, *known[target][1:]))
        else:
            left_out["that are links"] += 1
    return _entries(rows, labels, left_out)


def index_zip(path: Path | str, file: io.BufferedIOBase) -> Entries:
    """Members of a zip file.

    Args:
        path: for errors.
        file: its content, seekable.

    Raises:
        DataError: if it isn't one, is cut short, or has members that are encrypted or compressed in a rare way.
    """
    rows: list[_Row] = []
    left_out: Counter[str] = Counter()
    with reading(path, "a zip file"), zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            name = _clean(member.filename.replace("\\", "/"), left_out)
            if not name or member.is_dir() or not _is_read(name):
                continue
            if member.flag_bits & 1:
                raise DataError(f"{path}: {name} is encrypted; unpack it, and give the folder")
            if member.compress_type not in _METHODS:
                raise DataError(
                    f"{path}: {name} is compressed by method {member.compress_type}; stored and deflated members "
                    "are read: pack it again, or give the folder"
                )
            rows.append((name, member.header_offset, member.compress_size, member.CRC, member.compress_type))
    return _entries(rows, {}, left_out)


def index_files(paths: Sequence[Path]) -> list[Entries]:
    """Members of each tar or zip file; those that were indexed before and did not change are not read again.

    Raises:
        DataError: for the first that can't be read.
    """
    result: dict[Path, Entries] = {}
    for folder in dict.fromkeys(path.parent for path in paths):
        inside = [path for path in paths if path.parent == folder]
        known = _load(folder)
        stamps = {path: _stamp(path) for path in inside}
        fresh: dict[str, tuple[list[Any], Entries]] = {}
        for path in inside:
            if path.name in known and known[path.name][0] == stamps[path] and known[path.name][1].fits(stamps[path][0]):
                result[path] = known[path.name][1]
                continue
            with reading(path, "an archive"), path.open("rb") as file:
                result[path] = INDEXERS[path.suffix.lower()](path, file)
            fresh[path.name] = (stamps[path], result[path])
        if fresh:
            _save(folder, {name: one for name, one in known.items() if (folder / name).exists()} | fresh)
    return [result[path] for path in paths]


INDEXERS = {".tar": index_tar, ".zip": index_zip}
"""Ending of a file, in lower case -> what finds its members."""


def _stamp(path: Path) -> list[Any]:
    with reading(path, "an archive"):
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]


def cache_folder() -> Path:
    """Folder for what can be made again: ``SMALTI_CACHE``, else ``smalti`` in the user's own."""
    if named := os.environ.get(CACHE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "smalti"


def _index_paths(folder: Path) -> tuple[Path, Path]:
    """Where the index of a folder may lie: in it, or in the cache folder if nothing can be written there."""
    digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return folder / INDEX_FILE, cache_folder() / "indices" / f"{digest}.npz"


def _load(folder: Path) -> dict[str, tuple[list[Any], Entries]]:
    """``{file: (its size and time, its members)}``; empty without an index, or if it can't be read."""
    for path in _index_paths(folder):
        with contextlib.suppress(DataError):
            if path.is_file():
                with reading(path, "an index"):
                    return unpack(path.read_bytes())
    return {}


def _save(folder: Path, found: Mapping[str, tuple[list[Any], Entries]]) -> None:
    for path in _index_paths(folder):
        with contextlib.suppress(ConfigError):
            write_atomically(path, pack(found))
            return


def pack(found: Mapping[str, tuple[list[Any], Entries]]) -> bytes:
    """An index as the bytes of a file."""
    every = [entries for _, entries in found.values()]
    files = [
        {"name": name, "stamp": stamp, "count": len(entries), "left_out": dict(entries.left_out)}
        for name, (stamp, entries) in found.items()
    ]
    arrays = {name: _joined(getattr(one, name) for one in every) for name in ("offset", "size", "check", "method")}
    for name in ("names", "labels"):
        texts = [getattr(one, name) for one in every]
        arrays[f"{name}_text"] = np.frombuffer(b"".join(text.text for text in texts), np.uint8)
        arrays[f"{name}_length"] = _joined(np.diff(text.ends, prepend=0) for text in texts)
    content = io.BytesIO()
    about = json.dumps({"format": _FORMAT, "files": files}).encode()
    np.savez(content, **{"about": np.frombuffer(about, np.uint8), **arrays})  # type: ignore[arg-type]
    return content.getvalue()


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    found = list(parts)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def unpack(content: bytes) -> dict[str, tuple[list[Any], Entries]]:
    """The reverse of :func:`pack`."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes())
        if about["format"] != _FORMAT:
            return {}
        columns = {name: arrays[name] for name in ("offset", "size", "check", "method")}
        texts = {name: (arrays[f"{name}_text"].tobytes(), arrays[f"{name}_length"]) for name in ("names", "labels")}
    result: dict[str, tuple[list[Any], Entries]] = {}
    total, first = sum(one["count"] for one in about["files"]), 0
    if {len(column) for column in (*columns.values(), *(lengths for _, lengths in texts.values()))} - {total}:
        raise DataError("its columns differ in length")
    starts = {name: np.concatenate([[0], np.cumsum(lengths)]) for name, (_, lengths) in texts.items()}
    for one in about["files"]:
        last = first + one["count"]
        names, labels = (
            Names(text[starts[name][first] : starts[name][last]], np.cumsum(lengths[first:last], dtype=np.int64))
            for name, (text, lengths) in texts.items()
        )
        part = {name: column[first:last] for name, column in columns.items()}
        result[one["name"]] = (one["stamp"], Entries(names, **part, labels=labels, left_out=one["left_out"]))
        first = last
    return result
