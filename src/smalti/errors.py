"""Everything Smalti raises on purpose, as one small tree, and the machine's own errors in one line.

A user's mistake is one of these, with one line that says what came, what is needed and what to do; the command line
prints that line and exits with 2. So do a full disk, a missing permission or a killed worker (:func:`machine_trouble`).
Anything else that escapes is a bug of ours and keeps its traceback.
"""

import errno
import signal


def one_line(text: str) -> str:
    """A text with control characters, ends of lines and what is no text written out: names of files hold all of them.

    Example:
        >>> one_line("a\\nb")
        'a\\\\nb'
    """
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


class SmaltiError(Exception):
    """Base of all errors that Smalti raises on purpose; its text is one line for the user."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(SmaltiError, ValueError):
    """A setting, recipe, plan or command-line value that can't be used."""


class ShapeError(SmaltiError, ValueError):
    """Images, tokens or boxes of a size that the operation can't take."""


class DataError(SmaltiError, ValueError):
    """Images, masks, labels or folders that are missing, unreadable or don't fit together."""


class WeightsError(SmaltiError, ValueError):
    """A checkpoint that is missing, damaged, unsafe to load or of another architecture."""


class RunError(SmaltiError, RuntimeError):
    """A training run that can't go on: a non-finite loss for the third time, a full disk, a broken run directory."""


class MissingExtraError(SmaltiError, ImportError):
    """An optional dependency that isn't installed; the text names the extra and the command that installs it."""


class Interrupted(SystemExit):
    """A signal asked for the end of the work, and what was done is kept. Uncaught, it ends the process with exit code
    143, or 130 for Ctrl-C, as the signal itself would."""

    def __init__(self, number: int, line: str = "") -> None:
        """
        Args:
            number: of the signal.
            line: for the user: what is kept, and how to resume.
        """
        super().__init__(exit_code(number))
        self.number, self.line = number, line

    def __str__(self) -> str:
        return self.line


def exit_code(number: int) -> int:
    """Exit code of a process that a signal ends: 130 for Ctrl-C, 143 for SIGTERM, SIGUSR1 and SIGHUP."""
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def machine_trouble(error: BaseException) -> str | None:
    """One line for an error that comes from the machine: files, disks, memory shared by processes, killed workers.

    Returns:
        The line; None for any other error.
    """
    text = (str(error).strip().splitlines() or [""])[-1].strip()  # the last: a worker's comes below its traceback
    if isinstance(error, OSError):
        name = error.filename if isinstance(error.filename, str) else ""
        what = f"{name}: {error.strerror}" if name and error.strerror else text or type(error).__name__
        return f"{what}{_HINTS.get(error.errno or 0, '')}"
    if not isinstance(error, RuntimeError):
        return None
    if "shared memory" in text and "worker" in text:
        return "a data worker found no shared memory: /dev/shm is too small; lower data.num_workers, or enlarge it"
    if "Too many open files" in text or "ancdata" in text:
        return f"too many open files{_HINTS[errno.EMFILE]}"
    if "DataLoader timed out" in text:
        return f"the data workers gave no batch ({text}); the disk may hang; data.num_workers=0 reads without workers"
    if "home directory" in text:
        return "a path begins with ~ and the name of a user that this machine doesn't have; write the whole path"
    if "DataLoader worker (pid" in text:
        return f"a data worker was killed ({text}); lower data.num_workers or free memory"
    return None


_HINTS = {
    errno.ENOSPC: "; free some space",
    errno.EDQUOT: "; free some space",
    errno.EMFILE: "; raise the limit (ulimit -n 4096), or lower data.num_workers",
    errno.ENFILE: "; the machine has too many open files",
}
