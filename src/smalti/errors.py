"""Smalti's exceptions, and one-line messages for errors of the machine.

A user's mistake raises one of these, with one line that says what came, what is needed and what to do; the command
line prints that line and exits with 2, also for a full disk, a missing permission or a killed worker
(:func:`machine_error`). Any other exception is a bug in Smalti and keeps its traceback.
"""

import errno
import signal


def one_line(text: str) -> str:
    """A text with control characters, line breaks and invalid characters escaped; file names may contain all of them.

    Example:
        >>> one_line("a\\nb")
        'a\\\\nb'
    """
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


class SmaltiError(Exception):
    """Base class of Smalti's errors; the message is one line for the user."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(SmaltiError, ValueError):
    """An invalid setting, recipe, plan or command-line value."""


class ShapeError(SmaltiError, ValueError):
    """Images, tokens or boxes of an unsupported shape."""


class DataError(SmaltiError, ValueError):
    """Images, masks, labels or folders that are missing, unreadable or inconsistent."""


class WeightsError(SmaltiError, ValueError):
    """A checkpoint that is missing, damaged, unsafe to load or of another architecture."""


class RunError(SmaltiError, RuntimeError):
    """A run that can't continue: a non-finite loss for the third time, a full disk, a damaged run directory."""


class MissingExtraError(SmaltiError, ImportError):
    """An optional dependency that isn't installed; the message names the extra and the command to install it."""


class Interrupted(SystemExit):
    """The work was stopped by a signal; finished parts are kept. If not caught, the process exits with the code of
    :func:`exit_code`."""

    def __init__(self, number: int, line: str = "") -> None:
        """
        Args:
            number: signal number.
            line: message for the user: what is kept, and how to resume.
        """
        super().__init__(exit_code(number))
        self.number, self.line = number, line

    def __str__(self) -> str:
        return self.line


def exit_code(number: int) -> int:
    """Exit code of a process that a signal ends: 130 for Ctrl-C, 138 (on Linux) for SIGUSR1, by which a scheduler asks
    to run it again, 143 for SIGTERM and SIGHUP."""
    return 128 + (signal.SIGTERM if number == getattr(signal, "SIGHUP", None) else number)


def machine_error(error: BaseException) -> str | None:
    """One-line message for an error of the machine: files, disks, shared memory, killed workers.

    Returns:
        The message; None for any other error.
    """
    text = (str(error).strip().splitlines() or [""])[
        -1
    ].strip()  # the last line: a worker's message is below its traceback
    if isinstance(error, OSError):
        name = error.filename if isinstance(error.filename, str) else ""
        what = f"{name}: {error.strerror}" if name and error.strerror else text or type(error).__name__
        return f"{what}{_HINTS.get(error.errno or 0, '')}"
    if not isinstance(error, RuntimeError):
        return None
    if "shared memory" in text and "worker" in text:
        return "a data worker ran out of shared memory; lower data.num_workers, or enlarge /dev/shm"
    if "Too many open files" in text or "ancdata" in text:
        return f"too many open files{_HINTS[errno.EMFILE]}"
    if "DataLoader timed out" in text:
        return f"the data workers returned no batch ({text}); check the disk, or set data.num_workers=0"
    if "home directory" in text:
        return "a path starts with ~ and the name of an unknown user; write the full path"
    if "DataLoader worker (pid" in text:
        return f"a data worker was killed ({text}); lower data.num_workers or free memory"
    return None


_HINTS = {
    errno.ENOSPC: "; free some space",
    errno.EDQUOT: "; free some space",
    errno.EMFILE: "; raise the limit (ulimit -n 4096), or lower data.num_workers",
    errno.ENFILE: "; the machine has too many open files",
}
