"""One writer per folder: a lock that the kernel releases when its process ends for any reason."""

import contextlib
import errno
import functools
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from smalti.errors import RunError
from smalti.files import LOCK_FILE

_held: set[int] = set()
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created if needed.

    The lock is on the open file, not on its name, so a file left by a killed process locks nothing. On file systems
    without locks (some network file systems), a warning is printed and nothing is locked.

    Raises:
        RunError: if another process holds it.
        OSError: if the folder can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _close_after_fork()
    _held.add(handle)
    try:
        _lock(handle, folder, path)
        yield
    finally:
        _held.discard(handle)
        os.close(handle)


@functools.cache
def _close_after_fork() -> None:
    """A forked data worker must not hold the lock of a run that was killed."""

    def close() -> None:
        while _held:
            os.close(_held.pop())

    os.register_at_fork(after_in_child=close)


def _lock(handle: int, folder: Path, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.pread(handle, 200, 0).decode(errors="replace").strip()
        raise RunError(
            f"{folder}: {who or 'another process'} is writing here; wait until it ends, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"{path}: this file system has no locks; don't let two processes write here", file=sys.stderr)
        return
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
