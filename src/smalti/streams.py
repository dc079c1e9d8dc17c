"""Standard output and standard error that may be lost: the work and its files matter more than what is printed.

A closed terminal, a full disk behind ``2>``, or a reader such as ``head`` that has left must not end a training run.
:func:`protect_streams` puts streams in place that drop what can't be written, and remember it.
"""

import errno
import io
import os
import sys
import warnings
from typing import Any

_READER_GONE = (errno.EPIPE, errno.EBADF, errno.EIO)  # nobody reads any more: no error of ours


class _Kept(io.RawIOBase):
    """A file descriptor whose write errors are kept instead of raised."""

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
    """Replace the process's own standard output and error by streams that can be lost; those of a host program, and of
    a test that captures them, stay as they are. File names that are no text are printed with escapes.

    Descriptors 0 to 2 that are closed are opened on the null device: else the next file that is opened, a checkpoint
    say, would get what is printed.
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
        buffer = io.BufferedWriter(_Kept(handle))
        kept = io.TextIOWrapper(buffer, encoding=encoding, errors="backslashreplace", line_buffering=handle == 2)
        setattr(sys, name, kept)


def lost_output() -> OSError | None:
    """What kept standard output from being written, if what was printed is missing from a file; None where it arrived,
    or where its reader has left."""
    stream = sys.stdout
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    if not isinstance(raw, _Kept):
        return None
    stream.flush()
    return None if raw.error is None or raw.error.errno in _READER_GONE else raw.error


def warn_in_one_line() -> None:
    """Each warning as one line, once, without its place in the code.

    What a data set leaves out stands in the line about that data set; glyphs that matplotlib lacks are drawn by the
    browser."""
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        is_known = category.__name__ == "LeftOut" or str(message).startswith("Glyph ")
        if str(message) not in shown and not is_known:
            shown.add(str(message))
            print(f"smalti: warning: {message}", file=sys.stderr)

    warnings.showwarning = show
