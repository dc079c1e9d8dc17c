"""Atomic writes: files and folders are complete or missing, even after a kill or a power failure.

Files are written under a temporary name in the same folder (:data:`WRITING`), synced to the disk, and renamed. A kill
can leave temporary files behind; a folder that holds nothing else counts as empty (:func:`is_free`).
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
"""Prefix of temporary names."""
LOCK_FILE = ".lock"
"""Lock of the process that writes into a folder (:mod:`smalti.runs.lock`)."""
_ABANDONED_S = 3600.0
"""Age from which a temporary file outside of a locked folder counts as left over from a kill."""
_LONGEST = 180  # of a name inside a temporary name; file systems allow 255 bytes


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes atomically: to a temporary name in the same folder, then sync and rename.

    Undecodable bytes of file names are written as ``\\udcXX``. File permissions follow the umask.

    Raises:
        ConfigError: if ``path`` is a folder or can't be written; names the reason.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    with written_beside(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Within the block, an empty temporary file, which is renamed to ``path`` at the end or removed after an error.

    Raises:
        ConfigError: if it can't be written; names the reason.
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
    """Within the block, a temporary folder, which is renamed to ``path`` at the end or removed after an error.

    Args:
        path: missing or free (:func:`is_free`).
        durable: sync every file; not needed if the files can be regenerated.

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
    """A temporary name in the folder of ``path`` that no other process uses."""
    name = os.fsdecode(os.fsencode(path.name)[:_LONGEST])
    return path.with_name(f"{WRITING}{name}.{secrets.token_hex(4)}")


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk; ignored for folders if the file system can't sync
    them.

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
    """Sync a folder and everything in it, and set file permissions by the umask, since some writers create private
    files."""
    mode = folder.stat().st_mode & 0o666
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(mode)
        sync(path)
    sync(folder)


def first_entry(folder: Path) -> Path | None:
    """The first entry of a folder by name, ignoring leftovers of a kill (temporary names, a lock); None if empty."""
    return next((path for path in sorted(folder.iterdir()) if not _is_leftover(path)), None)


def is_free(folder: Path) -> bool:
    """Whether a folder is missing, or holds nothing except leftovers of a kill."""
    return not folder.exists() or (folder.is_dir() and first_entry(folder) is None)


def remove_leftovers(folder: Path, abandoned: bool = False) -> None:
    """Remove temporary files that a kill left in a folder.

    Args:
        folder: may be missing.
        abandoned: only remove those older than an hour, since other processes may be writing into the folder.
    """
    if folder.is_dir():
        for path in folder.glob(f"{WRITING}*"):
            if abandoned:
                _remove_abandoned(path)
            else:
                _remove(path)


def check_writable(path: Path) -> None:
    """Check that a file can be written, before work starts; nothing is created.

    Raises:
        ConfigError: if it can't.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file")
    check_folder(path.parent, path)


def check_folder(folder: Path, named: Path | None = None) -> None:
    """Check that files can be written into a folder, which need not exist; nothing is created.

    Args:
        folder: the folder.
        named: path to name in errors; None: the folder.

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
    """Rename a damaged file and warn, so that it neither stops the work nor is lost.

    Args:
        path: the file; an existing ``damaged_NAME`` in its folder is replaced.
        error: what is wrong with it.
    """
    kept = path.with_name(f"damaged_{path.name}")
    if kept.exists():
        _remove(kept)
    path.replace(kept)
    reason = " ".join(f"{type(error).__name__}: {error}".split()[:40])
    warnings.warn(f"{path}: is damaged; renamed it to {kept.name} and started a new one ({reason})", stacklevel=2)


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


def unfinished_folder(file: Path) -> Path:
    """Where the parts of a file are kept until it is complete."""
    return file.with_name(f".{file.name}.unfinished")
