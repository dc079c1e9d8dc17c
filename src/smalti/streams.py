"""Standard output and error streams whose failure doesn't stop the work.

A closed terminal, a full disk behind ``2>``, or a reader such as ``head`` that has exited must not end a training run.
:func:`protect_streams` installs streams that drop what can't be written, and record the error.
"""

import errno
import io
import os
import sys
import warnings
from typing import Any

_READER_GONE = (errno.EPIPE, errno.EBADF, errno.EIO)  # the reader has exited: not an error


class _Lossy(io.RawIOBase):
    """A file descriptor whose write errors are recorded instead of raised."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.handle

    def isatty(self) -> bool:
        return os.isatty(self.handle)

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        try:
            return os.write(self.handle, view)
        except OSError as error:
            self.error = error
            return len(view)


def protect_streams() -> None:
    """Replace the process's standard output and error by streams that don't raise; redirected streams of a host program
    or a test stay unchanged. Undecodable file names are printed with escapes.

    Closed descriptors 0 to 2 are opened on the null device; otherwise the next file that is opened, such as a
    checkpoint, would receive what is printed.
    """
    for handle in (0, 1, 2):
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for name, handle in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and stream is not getattr(sys, f"__{name}__"):
            continue
        encoding = "utf-8" if stream is None else stream.encoding
        if stream is not None:
            stream.flush()
        buffer = io.BufferedWriter(_Lossy(handle))
        kept = io.TextIOWrapper(buffer, encoding=encoding, errors="backslashreplace", line_buffering=handle == 2)
        setattr(sys, name, kept)


def lost_output() -> OSError | None:
    """The error that kept standard output from being written to a file; None if all was written, or if the reader has
    exited."""
    stream = sys.stdout
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    if not isinstance(raw, _Lossy):
        return None
    stream.flush()
    return None if raw.error is None or raw.error.errno in _READER_GONE else raw.error


def warn_in_one_line() -> None:
    """Show each warning once, in one line, without its location in the code.

    Warnings about skipped files are silenced, since the line about a data set lists them, and so are those about glyphs
    that matplotlib lacks, since the browser draws them."""
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        is_known = category.__name__ == "LeftOut" or str(message).startswith("Glyph ")
        if str(message) not in shown and not is_known:
            shown.add(str(message))
            print(f"smalti: warning: {message}", file=sys.stderr)

    warnings.showwarning = show
