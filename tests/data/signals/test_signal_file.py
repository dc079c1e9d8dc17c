"""Signals in a temporary file: the same values, small when pickled, gone when they are no longer needed."""

import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from signal_files import noise, save
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_file import SignalFile
from smalti.data.signals.signal_set import open_signals
from smalti.errors import DataError


def test_signals_are_read_back_as_they_were_written():
    file = SignalFile()
    arrays = [noise(3, channels=2, seed=1).astype(np.float32), noise(1, seed=2).astype(np.float32)]
    stored = [file.append(array) for array in arrays]
    for one, array in zip(stored, arrays, strict=True):
        assert one.shape == array.shape
        assert_array_equal(one[:, 5:50], array[:, 5:50])
        assert_array_equal(np.asarray(one), array)


def test_a_copy_for_a_worker_is_small_and_reads_the_same(tmp_path):
    save(tmp_path / "a.npz", noise(600))
    signals = open_signals(tmp_path, SignalConfig())
    content = pickle.dumps(signals)
    assert len(content) < 10_000 < 4 * signals.recordings[0].signal.shape[1]
    copy = pickle.loads(content)
    assert_array_equal(copy.read(7), signals.read(7))
    path = signals.recordings[0].signal._file.path
    del copy
    gc.collect()
    assert path.exists()  # a copy does not remove it


def test_the_file_goes_with_the_last_signal():
    file = SignalFile()
    path, stored = file.path, file.append(noise(1))
    assert stored[0, :5].all() and path.stat().st_size == 400
    del file
    gc.collect()
    assert path.exists()
    del stored
    gc.collect()
    assert not path.exists()


def test_a_window_can_be_written_to(tmp_path):
    save(tmp_path / "a.npz", noise(30))
    window = open_signals(tmp_path, SignalConfig()).read(0)
    window[:] = 0
    assert open_signals(tmp_path, SignalConfig()).read(0).any()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line():
    file = SignalFile()
    path, file.path = file.path, Path("/dev/full")
    with pytest.raises(DataError, match=r"prepared signals can't be written \(No space left on device\); set TMPDIR"):
        file.append(noise(200))
    file.path = path
