"""One writer per folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smalti.errors import RunError
from smalti.runs.lock import locked

HOLD = """
import os, sys, time
from pathlib import Path
from smalti.runs.lock import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:  # a data worker, which says that it is running: the hooks of the fork lie behind it
        print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_with_the_first_one_named(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run"),
        pytest.raises(RunError, match=rf"run: process {os.getpid()} on .* is writing here; wait until it ends"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass


def test_kill_minus_nine_gives_the_lock_back_although_a_worker_lives_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=f"process {process.pid} on"), locked(tmp_path):
            pass
        process.kill()
        process.wait()
        os.killpg(process.pid, 0)  # the worker is still there
        with locked(tmp_path):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        time.sleep(0.1)


def test_a_file_system_without_locks_gives_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    def flock(handle: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        pass
    assert "this file system has no locks; don't let two processes write here" in capsys.readouterr().err
