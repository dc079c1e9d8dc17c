"""The command ``smalti`` as a person types it: here, where everything is imported already, or in its own process."""

import contextlib
import io
import subprocess
import sys
import warnings

import jaxtyping

from smalti.cli.main import run

Done = subprocess.CompletedProcess[str]
DEFAULT_IGNORED = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""What Python itself shows only to developers; pytest's filters would make errors of all warnings."""


def smalti(*words: object, code: int = 0) -> Done:
    """Run the command here, hold it to an exit code, and return what it printed."""
    out, err = io.StringIO(), io.StringIO()
    arguments, left = [str(word) for word in words], 0
    jaxtyping.config.update("jaxtyping_disable", True)  # as a user's run; typer hands None to flags, too
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("default")
            for category in DEFAULT_IGNORED:
                warnings.simplefilter("ignore", category)
            run(arguments)
    except SystemExit as end:
        left = end.code if isinstance(end.code, int) else int(bool(end.code))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert left == code, err.getvalue() + out.getvalue()
    return subprocess.CompletedProcess(arguments, left, out.getvalue(), err.getvalue())


def smalti_process(*words: object, code: int = 0) -> Done:
    """Run the command in a process of its own: for what a process does at its start and its end."""
    command = [sys.executable, "-m", "smalti", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr + done.stdout
    return done
