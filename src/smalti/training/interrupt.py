"""Signals that stop a run: it finishes its step, writes a checkpoint and prints how to resume.

SIGTERM, SIGUSR1 and SIGHUP come from schedulers (SLURM's preemption and ``--signal=USR1@120``, spot machines, a closed
terminal), SIGINT from Ctrl-C. Of several training processes each may get the signal, or only one; all stop after the
same step. A second signal, more than a second after the first, ends the process at once.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from smalti.errors import exit_code

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
REPEAT_S = 1.0
"""Signals within this time after the first are the same request: schedulers signal a process and its group."""


class StopRequested(Exception):
    """Raised between parts of long work other than training steps, such as an evaluation, to stop it early."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        """Signal number."""


class Interrupt:
    """Whether a signal to stop this run was received."""

    def __init__(self) -> None:
        self.number = 0
        self._group: Any = None
        self._pending: tuple[Any, Tensor] | None = None

    def synchronize(self, timeout: timedelta) -> None:
        """Make all processes stop after the same step; called by each of them. ``timeout``: of their communication."""
        self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    def ask(self, number: int) -> None:
        """Record a signal; only the first counts."""
        self.number = self.number or number

    def check(self, *_: object) -> None:
        """Progress callback that stops long-running work between its parts; arguments are ignored.

        Raises:
            StopRequested: if a signal was received.
        """
        if self.number:
            raise StopRequested(self.number)

    def agreed(self) -> int:
        """The signal for which all processes stop now, else 0; all processes call this once per step.

        With several processes, each sends its signal at one step and reads those of the others at the next. No process
        waits, since the exchange runs during the step, on the CPU.
        """
        if self._group is None:
            return self.number
        received = 0
        if self._pending is not None:
            work, sent = self._pending
            work.wait()
            received = int(sent)
        sent = torch.tensor(self.number)
        work = torch.distributed.all_reduce(sent, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = work, sent
        return received

    def finish(self) -> None:
        """Wait for the last exchange, so that no process exits while another is still sending."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None


@contextlib.contextmanager
def handled_signals(ask: Callable[[int], None], at_once: Callable[[int], None] | None) -> Iterator[None]:
    """Within the block, the first signal of :data:`SIGNALS` calls ``ask``, and one that comes :data:`REPEAT_S` later
    calls ``at_once``. Both receive its number.

    Signals already handled or ignored (by a host program, nohup) stay so. Outside the main thread no signal is
    handled, since Python doesn't allow it there. Blocked signals are unblocked.

    Args:
        ask: records the signal; runs between two instructions of the main thread.
        at_once: ends the process; None: further signals are ignored, for example because a launcher handles them.
    """
    first: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not first:
            first.append(now)
            ask(number)
        elif at_once is not None and now - first[0] > REPEAT_S:
            at_once(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number, handler in before.items() if handler in defaults]
    for number in ours:
        signal.signal(number, handle)
    _unblock()
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def end_at_once(number: int) -> None:
    """End this process silently; files being written keep their temporary names."""
    os._exit(exit_code(number))


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Within the block, signals are blocked; a process started in it unblocks them by :func:`handled_signals`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unblock() -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
