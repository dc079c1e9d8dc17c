"""The machine's errors in one line, and exit codes of signals."""

import errno
import signal

import pytest

from smalti.errors import Interrupted, exit_code, machine_error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device; free some space"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n 4096"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "a data worker was killed"),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                "are out of shared memory. Please try to raise your shared memory limit."
            ),
            "enlarge /dev/shm",
        ),
        (RuntimeError("received 0 items of ancdata"), "too many open files"),
        (RuntimeError("DataLoader timed out after 900 seconds"), "returned no batch"),
        (OSError("Caught OSError in DataLoader worker process 0.\nTraceback:\n  File\nOSError: gone"), "OSError: gone"),
        (RuntimeError("Could not determine home directory."), "a path starts with ~ and the name of an unknown user"),
    ],
)
def test_an_error_of_the_machine_is_one_line(error: Exception, line: str) -> None:
    told = machine_error(error)
    assert told is not None and line in told and "\n" not in told


@pytest.mark.parametrize(
    "error",
    [
        ValueError("No space left on device"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\nRuntimeError: a bug"),
    ],
)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert machine_error(error) is None


def test_exit_codes_are_those_that_shells_give() -> None:
    assert exit_code(signal.SIGINT) == 130
    assert {exit_code(number) for number in (signal.SIGTERM, signal.SIGHUP)} == {143}
    assert exit_code(signal.SIGUSR1) == 128 + signal.SIGUSR1
    assert Interrupted(signal.SIGTERM, "resume").code == 143
