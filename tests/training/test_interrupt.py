"""Signals that ask for an end: noted once, at once the second time, and left to whoever handles them already."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from smalti.training import interrupt as module
from smalti.training.interrupt import SIGNALS, Interrupt, StopRequested, blocked_signals, handled_signals


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """As in a process of its own: a shell starts what runs in the background with SIGINT ignored."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_handlers_are_put_back(number: int) -> None:
    asked = Interrupt()
    before = signal.getsignal(number)
    with handled_signals(asked.ask, None):
        assert asked.agreed() == 0
        asked.check("images", 1, 2)
        os.kill(os.getpid(), number)
        assert asked.agreed() == number
        with pytest.raises(StopRequested):
            asked.check("images", 2, 2)
    assert signal.getsignal(number) is before


def test_a_burst_is_one_request_and_a_later_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPEAT_S", 0.2)
    asked: list[int] = []
    ended: list[int] = []
    with handled_signals(asked.append, ended.append):
        os.kill(os.getpid(), signal.SIGTERM)  # as GNU timeout does: to the process, and to its group
        os.kill(os.getpid(), signal.SIGTERM)
        assert (asked, ended) == ([signal.SIGTERM], [])
        time.sleep(0.25)
        os.kill(os.getpid(), signal.SIGINT)
    assert (asked, ended) == ([signal.SIGTERM], [signal.SIGINT])


def test_a_signal_that_somebody_handles_or_ignores_is_left_alone() -> None:
    asked: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with handled_signals(asked.append, None):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_handled() -> None:
    seen: list[bool] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with handled_signals(lambda number: None, None):
            seen.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


def test_a_blocked_signal_waits_until_it_is_handled() -> None:
    asked: list[int] = []
    with blocked_signals():
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # other threads of the test run block nothing
        assert not asked
        with handled_signals(asked.append, None):
            assert asked == [signal.SIGUSR1]
