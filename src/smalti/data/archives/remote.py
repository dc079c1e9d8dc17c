"""Shards on other machines, through fsspec, with a cache of bounded size on this one.

An image is fetched by itself, once: into a sparse file of its shard's length. When the cache is full, what is in it
stays, and the rest is fetched again in each epoch: epochs read all images once, so replacing some would gain nothing.
"""

import contextlib
import glob
import hashlib
import io
import mmap
import os
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from smalti.data.archives.packed_index import INDEX_FILE, INDEXERS, Entries, cache_folder, pack, unpack
from smalti.data.images.image_set import as_text
from smalti.errors import ConfigError, DataError, MissingExtraError, RunError, SmaltiError
from smalti.files import write_atomically
from smalti.reading import reading, reason

LIMIT = "SMALTI_CACHE_GIB"
"""Environment variable: most that is kept of remote images, in GiB."""
_DEFAULT_GIB = 20.0
_RESERVE = 2**30
"""Bytes of the disk that stay free."""
_MEASURED_EVERY = 2**25
"""Bytes that a process writes between two looks at the size of the cache."""
_PAUSES_S = (0.5, 2.0, 8.0)
"""Before each further attempt at a connection."""
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)", re.DOTALL)
_KEPT = ("data", "checks")


def as_url(path: Path) -> str | None:
    """The address that a path was made of, such as ``s3://bucket/x.tar``; None for paths of this machine."""
    match = _URL.fullmatch(os.fspath(path))
    if match is None or match[1] not in fsspec.available_protocols() or path.exists():
        return None
    return f"{match[1]}://{match[2]}"


class Remote:
    """Files behind addresses, read by ranges."""

    def __init__(self, url: str) -> None:
        """
        Args:
            url: an address of a tar or zip file, or a pattern of several.

        Raises:
            DataError: if nothing is there, or it can't be reached.
            MissingExtraError: if the package for this kind of address isn't installed.
        """
        self.url, self._process = url, os.getpid()
        self._fs, base = _connect(url)
        self.kind = url.partition("://")[0]
        try:
            self.files: list[str] = sorted(self._fs.glob(base)) if glob.has_magic(base) else [base]
            self.files = [one for one in self.files if Path(one).suffix.lower() in INDEXERS]
            infos = [self._fs.info(one) for one in self.files]
        except Exception as error:  # each file system has its own
            raise DataError(f"{as_text(url)}: can't be reached ({reason(error)})") from error
        if not self.files:
            raise DataError(f"{as_text(url)}: names no tar or zip file; only these are read from other machines")
        self.sizes = [int(info.get("size") or 0) for info in infos]
        self.stamps: list[list[Any]] = [[size, _version(info)] for size, info in zip(self.sizes, infos, strict=True)]

    @property
    def paths(self) -> list[Path]:
        """The files as paths, for names and errors."""
        return [Path(self._named(file)) for file in self.files]

    def _named(self, file: str) -> str:
        return file if "://" in file else f"{self.kind}://{file.lstrip('/')}"

    def read(self, number: int, start: int, size: int) -> bytes:
        """A range of a file.

        Raises:
            RunError: if it can't be reached after several attempts.
        """
        if os.getpid() != self._process:  # connections don't survive a fork
            self._process, self._fs = os.getpid(), _connect(self.url)[0]
        for pause in (*_PAUSES_S, None):
            try:
                content: bytes = self._fs.cat_file(self.files[number], start=start, end=start + size)
                # servers without ranges send all of it
                return content[start : start + size] if len(content) > size else content
            except Exception as error:
                if pause is None or isinstance(error, FileNotFoundError):
                    path = as_text(self.paths[number])
                    raise RunError(f"{path}: can't be reached ({reason(error)}); start or resume later") from error
            time.sleep(pause)
        raise AssertionError

    def index(self) -> list[Entries]:
        """Members of each file: from the index in the cache folder, the one beside the files, or their content.

        Raises:
            DataError: if a file can't be read.
        """
        digest = hashlib.sha256(self.url.encode(errors="surrogateescape")).hexdigest()[:16]
        kept = cache_folder() / "indices" / f"{digest}.npz"
        known: dict[str, tuple[list[Any], Entries]] = {}
        with contextlib.suppress(DataError):
            if kept.is_file():
                with reading(kept, "an index"):
                    known = unpack(kept.read_bytes())
        beside: dict[str, dict[str, tuple[list[Any], Entries]]] = {}
        found: dict[str, tuple[list[Any], Entries]] = {}
        for file, stamp in zip(self.files, self.stamps, strict=True):
            if file in known and known[file][0] == stamp and known[file][1].fits(stamp[0]):
                found[file] = known[file]
                continue
            folder, _, name = file.rpartition("/")
            if folder not in beside:
                beside[folder] = self._index_beside(folder)
            if (
                name in beside[folder]
                and beside[folder][name][0][0] == stamp[0]
                and beside[folder][name][1].fits(stamp[0])
            ):
                found[file] = (stamp, beside[folder][name][1])
                continue
            with reading(file, "an archive"), self._fs.open(file, "rb") as stream:
                buffered = io.BufferedReader(stream)
                found[file] = (stamp, INDEXERS[Path(file).suffix.lower()](self._named(file), buffered))
        if any(known.get(file) is not one for file, one in found.items()):
            with contextlib.suppress(ConfigError):
                write_atomically(kept, pack(found))
        return [entries for _, entries in found.values()]

    def _index_beside(self, folder: str) -> dict[str, tuple[list[Any], Entries]]:
        try:
            return unpack(self._fs.cat_file(f"{folder}/{INDEX_FILE}"))
        except Exception:  # there is none, or it is damaged
            return {}


class CachedRanges:
    """Ranges of remote files, of which those that begin a member are kept. Processes may share the cache."""

    def __init__(self, remote: Remote, counts: Sequence[int]) -> None:
        """
        Args:
            remote: where they come from.
            counts: number of members of each file.
        """
        self.remote = remote
        self._limit = _limit_bytes()
        self._home = cache_folder() / "images"
        digests = [
            hashlib.sha256(f"{file}\n{stamp}".encode(errors="surrogateescape")).hexdigest()[:24]
            for file, stamp in zip(remote.files, remote.stamps, strict=True)
        ]
        self._folders = [self._home / digest for digest in digests]
        self._counts = [max(1, count) for count in counts]
        self._checks: dict[int, np.ndarray] = {}
        self._used, self._written, self._is_full = 0, 0, self._limit <= 0
        if not self._is_full:
            self._make_room()

    def fetch(self, number: int, member: int, start: int, size: int) -> bytes:
        """A range of a file that holds a member.

        Args:
            number: of the file.
            member: place of the member in its file; -1: not to be kept.
            start: first byte.
            size: number of bytes.

        Raises:
            RunError: if it isn't kept and can't be reached.
        """
        checks = self._opened(number)
        if checks is not None and member >= 0 and checks[member]:
            with contextlib.suppress(OSError), (self._folders[number] / "data").open("rb", buffering=0) as file:
                file.seek(start)
                content = file.read(size)
                if len(content) == size and _check(content) == checks[member]:
                    return content
        content = self.remote.read(number, start, size)
        if checks is not None and member >= 0 and not self._is_full and len(content) == size:
            self._keep(number, member, start, content, checks)
        return content

    def _opened(self, number: int) -> np.ndarray | None:
        """``(n,)`` uint32 checksums of the members of a file that are kept, 0 for others; None without a cache."""
        if number not in self._checks:
            if self._limit <= 0:
                return None
            try:
                folder = self._folders[number]
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / "checks").open("ab") as file:
                    file.truncate(4 * self._counts[number])
                with (folder / "checks").open("r+b") as file:
                    self._checks[number] = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint32)
            except OSError as error:
                self._stop(reason(error))
                return None
        return self._checks[number]

    def _keep(self, number: int, member: int, start: int, content: bytes, checks: np.ndarray) -> None:
        if self._written >= _MEASURED_EVERY:
            self._used, self._written = _used_bytes(self._home), 0
        if self._used + self._written + len(content) > self._limit:
            self._is_full = True
            return
        try:
            if shutil.disk_usage(self._home).free < _RESERVE + len(content):
                raise OSError(28, "No space left on device")
            path = self._folders[number] / "data"
            with contextlib.suppress(FileExistsError):
                path.open("xb").close()
            with path.open("r+b", buffering=0) as file:
                file.seek(start)
                file.write(content)
            checks[member] = _check(content)
            self._written += len(content)
        except OSError as error:
            self._stop(reason(error))

    def _stop(self, why: str) -> None:
        self._is_full = True
        warnings.warn(
            f"{self._home}: no more images are kept ({why}); they are read from {self.remote.url} each time",
            stacklevel=2,
        )

    def _make_room(self) -> None:
        """Remove what is kept of other data sets, the longest unused first, if this one would not fit beside it."""
        own = set(self._folders)
        with contextlib.suppress(OSError):
            others = sorted(
                (path for path in self._home.iterdir() if path not in own), key=lambda one: one.stat().st_mtime
            )
            needed = min(self._limit, sum(self.remote.sizes))
            for other in others:
                if _used_bytes(self._home) + needed <= self._limit:
                    break
                shutil.rmtree(other, ignore_errors=True)
            for folder in own:
                if folder.exists():
                    os.utime(folder)
        self._used = _used_bytes(self._home)


def _check(content: bytes) -> int:
    return zlib.crc32(content) or 1


def _used_bytes(folder: Path) -> int:
    total = 0
    for name in _KEPT:
        for path in folder.glob(f"*/{name}"):
            with contextlib.suppress(OSError):
                total += path.stat().st_blocks * 512
    return total


def _limit_bytes() -> int:
    text = os.environ.get(LIMIT, "")
    try:
        return int(float(text or _DEFAULT_GIB) * 2**30)
    except (ValueError, OverflowError):
        raise ConfigError(f"{LIMIT}={text}: a number of GiB is needed, such as 50; 0 keeps nothing") from None


def _connect(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise MissingExtraError(
            f'{as_text(url)}: needs another package ({reason(error)}); for http: pip install "smalti[remote]"'
        ) from None
    except SmaltiError:
        raise
    except Exception as error:
        raise DataError(f"{as_text(url)}: can't be reached ({reason(error)})") from error


def _version(info: dict[str, Any]) -> str:
    """What changes with a file's content, if the server sends such a value."""
    for name in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "last_modified", "updated", "created"):
        if info.get(name):
            return str(info[name])
    return ""
