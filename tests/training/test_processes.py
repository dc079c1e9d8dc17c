"""Processes that end together: with the one that started them, and when one of them fails."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from smalti.training.processes import lost_process, run_process

CHILD = (
    "import os, sys, time; from smalti.training.processes import end_with; end_with(int(sys.argv[1])); time.sleep(60)"
)
PARENT = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}, str(os.getpid())])
print(child.pid, flush=True)
os._exit(0)  # at once, before the child has imported anything
"""
STOPS = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(143)); time.sleep(60)"


def test_a_process_ends_with_its_parent_also_if_that_was_gone_before_it_looked() -> None:
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=True)
    child = int(done.stdout)
    deadline = time.monotonic() + 60
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_signal_is_passed_on_to_a_process_that_was_started() -> None:
    def send() -> None:
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=send).start()
    assert run_process([sys.executable, "-c", STOPS], dict(os.environ)) == (143, signal.SIGUSR1)


def test_a_process_that_ends_by_itself_gives_its_code() -> None:
    assert run_process([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ)) == (3, 0)
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_process([sys.executable, "-c", kill], dict(os.environ)) == (-9, 0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3"),
            "Connection closed by peer [127.0.0.1]:3",
        ),
        (torch.distributed.DistBackendError("NCCL error in: x.cpp:1\nremote process exited"), "NCCL error in: x.cpp:1"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ""),
        (ValueError("Connection closed by peer"), ""),
    ],
)
def test_an_error_shows_whether_another_process_is_gone(error: Exception, reason: str) -> None:
    assert lost_process(error) == reason
