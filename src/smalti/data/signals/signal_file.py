"""Prepared signals in a temporary file, read where they are needed: a set takes disk space, not memory."""

import functools
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from smalti.errors import DataError


class SignalFile:
    """A temporary file of signals, one after the other; removed when nothing refers to it any more.

    It lies in the system's temporary folder (``TMPDIR``). A copy in a data worker only reads it.
    """

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="smalti-signals-", suffix=".f32")
        os.close(handle)
        self.path = Path(name)
        self._size = 0  # values written
        weakref.finalize(self, _remove, self.path, os.getpid())

    def append(self, signal: Float[np.ndarray, "C R"]) -> "StoredSignal":
        """Write a signal behind the others.

        Raises:
            DataError: if there is no space for it.
        """
        try:
            with self.path.open("ab") as file:
                file.write(np.ascontiguousarray(signal, np.float32).data)
        except OSError as error:
            raise DataError(
                f"{self.path}: prepared signals can't be written ({error.strerror or error}); set TMPDIR to a folder "
                "with more space"
            ) from None
        first, self._size = self._size, self._size + signal.size
        return StoredSignal(self, first, signal.shape)

    @functools.cached_property
    def values(self) -> Float[np.ndarray, " _"]:
        """All values, mapped into memory; read this after the last :meth:`append`."""
        return np.asarray(np.memmap(self.path, np.float32, "r"))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_size": self._size}  # a worker maps the file itself


class StoredSignal:
    """A signal in a :class:`SignalFile`; indexing reads."""

    def __init__(self, file: SignalFile, first: int, shape: tuple[int, ...]) -> None:
        """
        Args:
            file: where it lies.
            first: place of its first value.
            shape: ``(C, R)``.
        """
        self._file, self._first, self.shape = file, first, shape

    def __getitem__(self, index: Any) -> np.ndarray:
        channels, samples = self.shape
        return self._file.values[self._first : self._first + channels * samples].reshape(channels, samples)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype)


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked worker
        path.unlink(missing_ok=True)
