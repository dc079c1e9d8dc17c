"""Data workers: what they need, how they fail in one line, and who may end them."""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from smalti.data import workers as module
from smalti.data.crops import MultiCrop, ViewSpec
from smalti.data.loader import TrainLoader
from smalti.data.workers import check_workers, default_workers, load_items, needed_mib, shared_memory_mib
from smalti.errors import ConfigError, RunError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
VIEWS = MultiCrop([ViewSpec(count=2, size=16), ViewSpec(count=3, size=8)])


class Items(Dataset[int]):
    """Numbers; some of them take an action first."""

    def __init__(self, at=-1, act=None):
        self.at, self.act = at, act

    def __getitem__(self, place):
        if place == self.at:
            self.act()
        return place


def kill_own_process(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(MultiCrop):
    __call__ = kill_own_process


def test_a_killed_worker_is_one_line(coordinate_images):
    loader = TrainLoader(coordinate_images, Deadly(VIEWS.specs), batch_size=4, seed=7, num_workers=1)
    with pytest.raises(RunError, match=r"a data worker was killed .*lower data\.num_workers or free memory"):
        next(iter(loader))
    with pytest.raises(RunError, match="a data worker was killed"):
        list(load_items(Items(2, kill_own_process), range(4), 1))


class Tensors(Dataset[torch.Tensor]):
    def __getitem__(self, place):
        return torch.full((1000,), float(place))


def test_a_worker_that_is_killed_while_its_batches_wait_is_one_line():
    """Fetching one of them meets a closed connection, before torch notices that the worker is gone."""
    before = {child.pid for child in multiprocessing.active_children()}
    items = load_items(Tensors(), range(100), 1)
    next(items)
    (worker,) = (child for child in multiprocessing.active_children() if child.pid not in before)
    worker.kill()
    with pytest.raises(RunError, match=r"a data worker was killed .*lower data\.num_workers or free memory"):
        list(items)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_closed_connection_to_a_worker_is_a_killed_worker(monkeypatch, error):
    def fetch(*_):
        raise error

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_next_data", fetch)
    with pytest.raises(RunError, match=r"a data worker was killed \((Connection reset by peer|EOFError)\); lower"):
        next(load_items(Items(), range(4), 1))


def hang():
    time.sleep(60)


def test_workers_that_hang_are_given_up(monkeypatch):
    monkeypatch.setattr(module, "WORKER_TIMEOUT_S", 1)
    with pytest.raises(RunError, match=r"returned no batch .*timed out after 1 seconds.*set data.num_workers=0"):
        list(load_items(Items(1, hang), range(3), 1))


def ask_for_an_end():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.kill(os.getpid(), number)
    time.sleep(0.2)


def test_signals_to_the_whole_group_leave_workers_at_work_until_their_main_process_ends_them():
    assert list(load_items(Items(1, ask_for_an_end), range(4), 1)) == [0, 1, 2, 3]
    began = time.monotonic()
    items = load_items(Items(), itertools.count(), 2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    del items
    assert time.monotonic() - began < 20


class Unblocked(Dataset[int]):
    """How many threads of the worker take SIGTERM."""

    def __getitem__(self, place):
        masks = [
            status.read_text().split("SigBlk:\t")[1].split()[0] for status in Path("/proc/self/task").glob("*/status")
        ]
        return sum(not int(mask, 16) >> (signal.SIGTERM - 1) & 1 for mask in masks)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_only_the_thread_that_waits_for_the_signal_takes_it(monkeypatch):
    def start_a_thread(_):  # as torch's pool does, before our code runs in the worker
        threading.Thread(target=time.sleep, args=(10,), daemon=True).start()

    monkeypatch.setattr(torch, "set_num_threads", start_a_thread)
    assert max(load_items(Unblocked(), range(3), 1)) <= 1
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def fail():
    raise ValueError("a bug")


def test_a_bug_in_a_worker_keeps_its_traceback():
    with pytest.raises(ValueError, match=r"a bug"):
        list(load_items(Items(1, fail), range(3), 1))


def test_shared_memory_that_is_too_small_is_known_before_the_start(monkeypatch):
    sample = VIEWS(np.zeros((40, 40, 3), np.uint8), np.random.default_rng(0))
    mib = (2 * 16**2 + 3 * 8**2) * 3 * 64 * 4 * 3 / 2**20
    assert needed_mib(sample, 64, 4) == pytest.approx(mib)
    assert shared_memory_mib() is None or shared_memory_mib() > 0
    monkeypatch.setattr(module, "shared_memory_mib", lambda: mib / 2)
    with pytest.raises(ConfigError, match=r"data.num_workers=4: batches need \d+ MiB .*set data.num_workers=2"):
        check_workers(sample, 64, 4)
    check_workers(sample, 64, 2)
    check_workers(sample, 64, 0)
    with pytest.raises(ConfigError, match=r"set data\.num_workers=1"):
        check_workers(sample, 64, 2, processes=2)


def test_too_few_open_files_are_known_before_the_start(monkeypatch):
    sample = VIEWS(np.zeros((40, 40, 3), np.uint8), np.random.default_rng(0))
    monkeypatch.setattr(module, "_open_files_limit", lambda: 40)
    with pytest.raises(ConfigError, match=r"data.num_workers=4: 48 open files are needed, 40 are allowed; raise"):
        check_workers(sample, 1, 4)
    check_workers(sample, 1, 2)


def test_a_run_on_a_cpu_starts_no_workers():
    assert default_workers("cpu") == 0
    assert 1 <= default_workers("cuda") <= 8
