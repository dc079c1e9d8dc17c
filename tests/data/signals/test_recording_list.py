"""Which recordings a folder holds, with which hypnogram, subject and split."""

import unicodedata

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from edf import write_edf, write_hypnogram
from signal_files import noise, save
from smalti.data.signals.recording_list import find_hypnogram, list_recordings
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import open_signals
from smalti.errors import DataError


def test_sleep_edf_names_give_pairs_and_subjects(tmp_path):
    for night in (1, 2):
        write_edf(tmp_path / f"SC401{night}E0-PSG.edf", {"EEG Fpz-Cz": noise(60)[0]}, 100)
        write_hypnogram(tmp_path / f"SC401{night}EC-Hypnogram.edf", [(0, 60, "Sleep stage 2")])
    signals = open_signals(tmp_path, SignalConfig())
    assert signals.subjects == ("SC401",) and len(signals.recordings) == 2
    assert_array_equal(signals.stages, [2, 2, 2, 2])


def test_a_table_gives_subjects_splits_and_rates(tmp_path):
    for name in ("a", "b", "c"):
        np.save(tmp_path / f"{name}.npy", noise(60, 200))
    (tmp_path / "recordings.csv").write_text(
        "file,subject,split,rate_hz\na.npy,anna,train,200\nb.npy,anna,train,200\nc.npy,carl,test,200\n"
    )
    signals = open_signals(tmp_path, SignalConfig())
    assert signals.subjects == ("anna", "carl") and signals.splits == ("train", "test")
    assert signals.training().names == ("a.npy", "b.npy")


def test_rows_with_too_many_cells_and_impossible_rates_are_refused(tmp_path):
    save(tmp_path / "r.npz", noise(60))
    table = tmp_path / "recordings.csv"
    table.write_text("file,subject\nr.npz,s1,train\n")
    with pytest.raises(DataError, match=r"recordings\.csv: line 2 has more cells than the 2 columns"):
        open_signals(tmp_path, SignalConfig())
    for rate in ("nan", "-100", "0"):
        table.write_text(f"file,rate_hz\nr.npz,{rate}\n")
        with pytest.raises(DataError, match=f"a sampling rate of {rate} Hz"):
            open_signals(tmp_path, SignalConfig())
    table.unlink()
    save(tmp_path / "r.npz", noise(0.2))
    with pytest.raises(DataError, match="20 samples are too few to be filtered"):
        open_signals(tmp_path, SignalConfig(window_s=0.1))


@pytest.mark.parametrize(
    "name",
    ["n.stages.csv", "n_Hypnogram.TXT", "N-HYPNOGRAM.txt", "Hypnogram_n.txt", "n_stages.Txt", "hypnogram_N.CSV"],
)
def test_a_hypnogram_is_found_in_any_case(tmp_path, name):
    recording = write_edf(tmp_path / "n.EDF", {"C3-M2": noise(60)[0]}, 100)
    (tmp_path / name).write_text("stage\nW\nN2\n" if name.lower().endswith("csv") else "W\nN2\n")
    assert find_hypnogram(recording) == tmp_path / name
    assert open_signals(tmp_path, SignalConfig()).stages.tolist() == [0, 2]


def test_accents_of_either_form_are_one_name(tmp_path):
    recording = write_edf(tmp_path / unicodedata.normalize("NFC", "Nächt 1.edf"), {"C3-M2": noise(60)[0]}, 100)
    hypnogram = tmp_path / unicodedata.normalize("NFD", "nächt 1_hypnogram.txt")
    hypnogram.write_text("W\nN2\n")
    assert find_hypnogram(recording) == hypnogram


def test_two_hypnograms_of_one_recording_are_refused_unless_the_table_names_one(tmp_path):
    save(tmp_path / "n.npz", noise(60))
    for name, stage in (("n_hypnogram.txt", "W"), ("n.stages.csv", "N2")):
        (tmp_path / name).write_text("stage\n" * name.endswith("csv") + f"{stage}\n" * 2)
    with pytest.raises(DataError, match=r"has 2 hypnograms, n\.stages\.csv, n_hypnogram\.txt; keep one, or name it in"):
        open_signals(tmp_path, SignalConfig())
    (tmp_path / "recordings.csv").write_text("file,stages\nn.npz,n_hypnogram.txt\n")
    assert open_signals(tmp_path, SignalConfig()).stages.tolist() == [0, 0]
    save(tmp_path / "n.npz", noise(60), ["17", "18"])  # what the file itself says is not read then
    assert open_signals(tmp_path, SignalConfig()).stages.tolist() == [0, 0]


def test_what_is_not_read_is_said(tmp_path):
    save(tmp_path / "n.npz", noise(60), ["W", "N2"])
    np.save(tmp_path / "n.npy", noise(60))
    (tmp_path / "readme.txt").write_text("about this\n")
    (tmp_path / "other_hypnogram.txt").write_text("W\n")
    assert list_recordings(tmp_path).left_out == (
        "1 copy in another format (n.npy)",
        "1 text without a hypnogram (readme.txt)",
        "1 hypnogram of no recording here (other_hypnogram.txt)",
    )
    assert "left out: 1 copy in another format (n.npy), 1 text" in open_signals(tmp_path, SignalConfig()).account()


def test_a_recording_that_is_named_like_a_hypnogram_is_not_lost_silently(tmp_path):
    write_edf(tmp_path / "hypnosis.edf", {"C3-M2": noise(60)[0]}, 100)
    with pytest.raises(DataError, match=r"no recordings found .*; hypnosis\.edf is taken as a hypnogram, by its name"):
        list_recordings(tmp_path)
    write_edf(tmp_path / "n.edf", {"C3-M2": noise(60)[0]}, 100)
    assert list_recordings(tmp_path).left_out == ("1 hypnogram of no recording here (hypnosis.edf)",)


def test_one_recording_is_listed_once(tmp_path):
    save(tmp_path / "n.npz", noise(60))
    (tmp_path / "recordings.csv").write_text("file\nn.npz\nn.npz\n")
    with pytest.raises(DataError, match=r"recordings\.csv: lists n\.npz twice"):
        open_signals(tmp_path, SignalConfig())
    (tmp_path / "recordings.csv").unlink()
    save(tmp_path / "n.NPZ.npz", noise(60)).rename(tmp_path / "n.NPZ")
    with pytest.raises(DataError, match=r"n\.NPZ: n\.npz lies beside it; are they one recording"):
        open_signals(tmp_path, SignalConfig())
