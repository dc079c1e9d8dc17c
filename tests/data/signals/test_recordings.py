"""Files of recordings: every format holds the same signal, channels are found by name."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edf import write_edf, write_hypnogram
from signal_files import noise, save
from smalti.data.signals.recordings import channel_names, looks_like_eeg, plain_name, read_signal
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import open_signals
from smalti.errors import DataError


@pytest.mark.parametrize(
    ("name", "is_eeg"),
    [
        ("EEG Fpz-Cz", False),
        ("C3-A1", True),
        ("EEG C4_M1", True),
        ("FP1-A1", True),
        ("Oz", True),
        ("EOG1-A1", False),
        ("EMG1", False),
        ("ECG", False),
        ("hypnogram", False),
        ("POS", False),
        ("PULSE", False),
        ("T3-A2", True),
        ("ch2", True),
    ],
)
def test_channels_named_after_electrodes_are_eeg(name, is_eeg):
    assert looks_like_eeg(name) is (is_eeg or name == "EEG Fpz-Cz")


def test_names_of_channels_are_compared_without_their_dress():
    assert plain_name("EEG C3_A1") == plain_name("[c3-a1]") == plain_name("C3 A1") == "C3-A1"


def test_every_format_holds_the_same_recording(tmp_path):
    values = np.round(noise(60, channels=2), 3)
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "x.npy", values)
    save(tmp_path / "npz" / "x.npz", values, channels=np.array(["C3-M2", "C4-M1"]))
    (tmp_path / "csv").mkdir()
    np.savetxt(tmp_path / "csv" / "x.csv", values.T, delimiter=",", header="C3-M2,C4-M1", comments="")
    (tmp_path / "csv" / "x.stages.csv").write_text("stage\nW\nN1\n")
    (tmp_path / "edf").mkdir()
    write_edf(tmp_path / "edf" / "x.edf", {"EEG C3-M2": values[0], "EEG C4-M1": values[1], "EMG": values[0]}, 100)
    ready = {
        kind: open_signals(tmp_path / kind, SignalConfig(rate_hz=None if kind in ("npz", "edf") else 100))
        for kind in ("npy", "npz", "csv", "edf")
    }
    reference = ready["npz"].recordings[0].signal
    for kind, signals in ready.items():
        assert_allclose(signals.recordings[0].signal, reference, atol=0.01 if kind == "edf" else 1e-3, err_msg=kind)
    assert ready["edf"].channels == ("EEG C3-M2", "EEG C4-M1")  # not the muscle


def test_channels_are_taken_by_name_in_the_order_asked(tmp_path):
    values = noise(60, channels=3)
    path = save(tmp_path / "x.npz", values, channels=np.array(["C3-M2", "EOG", "C4-M1"]))
    assert_array_equal(np.stack(read_signal(path, ("c4_m1", "EOG")).pieces[0].values), values[[2, 1]])
    assert open_signals(tmp_path, SignalConfig(channels="C4-M1, C3-M2")).channels == ("C4-M1", "C3-M2")


@pytest.mark.parametrize("content", [b"no archive", b"PK\x03\x04" + bytes(200)], ids=["text", "torn"])
def test_a_damaged_archive_is_one_line(tmp_path, content):
    (tmp_path / "r.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"r\.npz: can't be read as an array of numbers"):
        open_signals(tmp_path, SignalConfig())


def test_channels_of_one_name_are_numbered_in_their_order(tmp_path):
    first, second, third = noise(60, channels=3)
    path = write_edf(tmp_path / "a.edf", [("EEG C3-M2", first), ("C4-M1", second), ("C3_M2", third)], 100)
    assert channel_names(path) == ("EEG C3-M2#1", "C4-M1", "C3_M2#2")
    with pytest.raises(DataError, match=r"has channels of one name; say which .* file: EEG C3-M2#1, C3_M2#2"):
        open_signals(tmp_path, SignalConfig())
    with pytest.raises(DataError, match=r"has 2 channels named C3-M2; say which .* file: EEG C3-M2#1, C3_M2#2"):
        open_signals(tmp_path, SignalConfig(channels=("C4-M1", "C3-M2")))
    for name, values in (("C3-M2#1", first), ("eeg c3-m2#2", third), ("C4-M1", second)):
        assert_allclose(read_signal(path, (name,)).pieces[0].values[0], values, atol=0.02)
    assert open_signals(tmp_path, SignalConfig(channels=("C4-M1",))).channels == ("C4-M1",)


def test_channels_of_one_name_in_an_array_are_numbered_too(tmp_path):
    path = save(tmp_path / "a.npz", noise(60, channels=2), channels=np.array(["C3", "C3"]))
    assert channel_names(path) == ("C3#1", "C3#2")


def test_oxygen_is_no_electrode(tmp_path):
    write_edf(tmp_path / "a.edf", {"O2": noise(60)[0]}, 100, unit="%")
    with pytest.raises(DataError, match="no channel is named after an electrode; it has: O2"):
        open_signals(tmp_path, SignalConfig())
    write_edf(tmp_path / "a.edf", {"O2": noise(60)[0]}, 100)
    assert open_signals(tmp_path, SignalConfig()).channels == ("O2",)


def test_a_file_of_annotations_is_no_recording(tmp_path):
    write_hypnogram(tmp_path / "scoring.edf", [(0, 30, "Sleep stage W")])
    with pytest.raises(DataError, match=r"holds annotations but no signal; .* call it STEM_hypnogram\.edf"):
        open_signals(tmp_path, SignalConfig())


def test_a_table_with_more_columns_than_names_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("C3,C4\n" + "1,2,3\n" * 10)
    with pytest.raises(DataError, match="has 3 columns of numbers under 2 names"):
        read_signal(tmp_path / "a.csv", ("C3",))
