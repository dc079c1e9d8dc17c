"""Files and folders that are whole or not there, after a kill or a power failure, too.

What is written goes to a temporary name beside its place (:data:`WRITING`), is synced to the disk, and is renamed. A
kill can leave temporary names behind; a folder that holds nothing else counts as empty (:func:`is_free`).
"""

import contextlib
import glob
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from smalti.errors import ConfigError

WRITING = ".writing_"
"""Start of the names under which files and folders are written."""
LOCK_FILE = ".lock"
"""Held by the process that writes into a folder (:mod:`smalti.runs.lock`)."""
_ABANDONED_S = 3600.0
"""Age from which a temporary name outside of a locked folder is taken for what a kill left."""
_LONGEST = 180  # of a name inside a temporary name; file systems take 255 bytes


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes to a temporary name in the same folder, sync, then rename: whole file or none.

    What of a file's name is no text stands in it as ``\\udcXX``. The permissions are those that the umask leaves.

    Raises:
        ConfigError: if ``path`` is a folder or its parent can't be written, naming the reason.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    with written_beside(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """An empty file under a temporary name that becomes ``path`` at the end; nothing stays behind after an error.

    Raises:
        ConfigError: if it can't be written, naming the reason.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.open("xb").close()
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:  # also what pyarrow raises
        raise ConfigError(f"{path}: can't be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def folder_beside(path: Path, durable: bool = True) -> Iterator[Path]:
    """A folder under a temporary name that becomes ``path`` at the end; nothing stays behind after an error.

    Args:
        path: not there yet, or free (:func:`is_free`).
        durable: sync every file; needless where the files can be made again.

    Raises:
        OSError: if it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f"{glob.escape(temporary_name(path).stem)}.*"):
        _remove_abandoned(old)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        if durable:
            sync_folder(temporary)
        if path.is_dir() and is_free(path):
            shutil.rmtree(path)
        temporary.replace(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that no other process takes."""
    name = os.fsdecode(os.fsencode(path.name)[:_LONGEST])
    return path.with_name(f"{WRITING}{name}.{secrets.token_hex(4)}")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; a folder that can't be synced is left to the file
    system.

    Raises:
        OSError: if a file can't be written, as on a full disk.
    """
    is_folder = path.is_dir()
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not is_folder:  # network file systems sync no folders
            raise
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Sync a folder with all that is in it, and give its files the permissions that the umask leaves: some writers make
    theirs private."""
    mode = folder.stat().st_mode & 0o666
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(mode)
        sync(path)
    sync(folder)


def first_held(folder: Path) -> Path | None:
    """What a folder holds, the first by name, beside what a kill left (temporary names, a lock); None: nothing."""
    return next((path for path in sorted(folder.iterdir()) if not _is_leftover(path)), None)


def is_free(folder: Path) -> bool:
    """Whether a folder is not there, or holds nothing but what a kill left."""
    return not folder.exists() or (folder.is_dir() and first_held(folder) is None)


def remove_leftovers(folder: Path, abandoned: bool = False) -> None:
    """Remove temporary names that a kill left in a folder.

    Args:
        folder: may be missing.
        abandoned: only those that are an hour old: other processes may write into the folder now.
    """
    if folder.is_dir():
        for path in folder.glob(f"{WRITING}*"):
            if abandoned:
                _remove_abandoned(path)
            else:
                _remove(path)


def check_writable(path: Path) -> None:
    """Find out before the work whether a file can be written after it; nothing is made.

    Raises:
        ConfigError: if it can't.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file")
    check_folder(path.parent, path)


def check_folder(folder: Path, named: Path | None = None) -> None:
    """Find out before the work whether files can be written into a folder, which need not exist; nothing is made.

    Args:
        folder: where.
        named: what errors name; None: the folder.

    Raises:
        ConfigError: if they can't.
    """
    try:
        existing = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
        temporary = temporary_name(existing / "smalti")
        temporary.open("xb").close()
        temporary.unlink()
    except OSError as error:
        raise ConfigError(f"{named or folder}: can't be written ({error.strerror or error})") from error


def set_aside(path: Path, error: Exception) -> None:
    """Give a damaged file another name and say so: it must not end the work, nor be lost.

    Args:
        path: the file; ``damaged_NAME`` beside it is replaced.
        error: what is wrong with it.
    """
    kept = path.with_name(f"damaged_{path.name}")
    if kept.exists():
        _remove(kept)
    path.replace(kept)
    reason = " ".join(f"{type(error).__name__}: {error}".split()[:40])
    warnings.warn(f"{path}: is damaged and kept as {kept.name}; a new one is begun ({reason})", stacklevel=2)


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(WRITING) or path.name == LOCK_FILE


def _remove_abandoned(path: Path) -> None:
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > _ABANDONED_S:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
