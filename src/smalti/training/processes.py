"""Start, signal and stop several training processes on one machine.

They listen on the loopback interface only, so they can't be reached from outside the machine.
"""

import contextlib
import importlib
import logging
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed

from smalti.errors import Interrupted, SmaltiError, exit_code, machine_error
from smalti.streams import protect_streams, warn_in_one_line
from smalti.training.interrupt import SIGNALS, blocked_signals, end_at_once, handled_signals
from smalti.training.launch import PATIENCE, share_threads

HOST = "127.0.0.1"
STOPPED = {exit_code(number): number for number in SIGNALS if number != getattr(signal, "SIGHUP", None)}
"""Exit codes of a process that stopped on a signal after writing its checkpoint -> the signal."""
_CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
"""In errors of gloo, which has no class of errors of its own."""
_GRACE_S = 30.0  # for the other processes to exit once the first has stopped after its checkpoint


class ProcessFailed(SmaltiError, RuntimeError):
    """One of several training processes failed; its own message says why."""


def launch(function: Callable[..., Any], arguments: tuple[Any, ...], processes: int) -> None:
    """Run ``function(*arguments)`` in several processes of this machine, as torchrun would, and wait for all.

    Stop signals are forwarded; a second one kills all processes.

    Raises:
        SmaltiError: if one of them failed, after printing its own message.
        Interrupted: if they were stopped by a signal.
    """
    torch_processes: Any = importlib.import_module("torch.multiprocessing")  # its names aren't typed
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    multiprocessing.resource_tracker.ensure_running()  # otherwise signals would be unblocked while it starts
    with blocked_signals():
        context = torch_processes.start_processes(
            _process,
            (processes, port, os.getpid(), function, arguments),
            nprocs=processes,
            join=False,
            start_method="spawn",
        )
        with passed_on(context.pids()) as asked:
            try:
                _wait(context)
            except torch_processes.ProcessExitedException as error:
                _explain(error, processes, asked)


def _explain(error: Any, processes: int, asked: list[int]) -> None:
    """Raise the error that corresponds to the exit of the first process."""
    code = error.exit_code
    if code in STOPPED:
        raise Interrupted(asked[0] if asked else STOPPED[code]) from None
    if code == 2:  # a user's mistake: the process has printed the message
        raise SystemExit(2) from None
    reason = f"was ended by signal {-code}" if code < 0 else f"stopped with exit code {code}"
    memory = " (out of memory?)" if code == -signal.SIGKILL else ""
    raise ProcessFailed(f"process {error.error_index} of {processes} {reason}{memory}") from None


@contextlib.contextmanager
def passed_on(pids: list[int]) -> Iterator[list[int]]:
    """Within the block, the first signal to stop is forwarded to the started processes; a second one kills them and
    ends this process.

    Yields:
        List of forwarded signals: empty or one.
    """
    asked: list[int] = []

    def pass_on(number: int) -> None:
        asked.append(number)
        _send(pids, number)

    def kill(number: int) -> None:
        _send(pids, signal.SIGKILL)
        end_at_once(number)

    with handled_signals(pass_on, kill):
        yield asked


def run_process(command: list[str], environment: dict[str, str]) -> tuple[int, int]:
    """Run a command and wait for its end; signals are forwarded to it.

    Returns:
        Its exit code, negative if a signal ended it; and the forwarded signal, else 0.
    """
    process = subprocess.Popen(command, env=environment)
    with passed_on([process.pid]) as asked:
        code = process.wait()
    return code, asked[0] if asked else 0


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _wait(context: Any) -> None:
    """Wait until all processes have ended; if one fails, kill the others, which would wait for it forever."""
    while True:
        multiprocessing.connection.wait(list(context.sentinels))
        failed = [process.exitcode for process in context.processes if process.exitcode]
        if failed and failed[0] not in STOPPED:
            for process in context.processes:
                process.kill()
        if context.join(timeout=0, grace_period=_GRACE_S):
            return


def end_with(parent: int) -> None:
    """End this process when its parent ends: a killed parent can't stop its children, which would keep writing while
    the run is resumed.

    Args:
        parent: process id of the parent, passed by it, since it may have ended before it could be queried.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_with_launcher() -> None:
    """Under torchrun, end this process when the agent that started it ends; its processes would outlive it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid())


def lost_process(error: BaseException) -> str:
    """The message of a failed exchange between processes, if another one ended or can't be reached; empty for any other
    error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, torch.distributed.DistError):
        return lines[0]
    is_closed = isinstance(error, RuntimeError) and any(word in str(error) for word in _CLOSED)
    return lines[0].rpartition("] ")[2] if is_closed else ""  # behind gloo's source file and line


def _process(
    rank: int, processes: int, port: int, parent: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    end_with(parent)
    protect_streams()
    warn_in_one_line()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
    }
    share_threads(processes)
    try:
        _meet(rank, processes, port)
        function(*arguments)
    except Exception as error:
        line = str(error) if isinstance(error, SmaltiError) else machine_error(error)
        if line is None:
            raise
        print(f"smalti: {line}", file=sys.stderr, flush=True)
        os._exit(2)  # immediately: a clean exit would wait for the others, which wait in a collective
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _meet(rank: int, processes: int, port: int) -> None:
    """Join the process group over the loopback interface; by default, torch listens on all interfaces."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, _loopback())
    listening = None
    if rank == 0:
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((HOST, port))
        server.listen()
        listening = server.detach()  # the store closes it
    stores: Any = torch.distributed  # TCPStore isn't typed
    store = stores.TCPStore(HOST, port, processes, is_master=rank == 0, master_listen_fd=listening, timeout=PATIENCE)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=PATIENCE)


def _loopback() -> str:
    """Name of the loopback interface: lo on Linux, lo0 on macOS."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name in ("lo", "lo0")), "lo")
