"""Sets of signals: windows in order, splits by subject, what was read in one line, and what is refused."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from edf import write_edf
from signal_files import noise, save
from smalti.data.loader import TrainLoader
from smalti.data.signals.labelled_signals import draw_subjects, open_labelled_signals, split_subjects
from smalti.data.signals.recordings import read_signal
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import is_signals, open_signals
from smalti.data.signals.signal_views import SignalViews
from smalti.errors import ConfigError, DataError

SHARED = Path(os.environ.get("SMALTI_SHARED", Path(__file__).parents[2].parent / "shared"))
DREAMS = SHARED / "data" / "dreams-sleep-eeg"


def test_windows_come_in_order_and_the_rest_is_left_out(tmp_path):
    save(tmp_path / "b.npz", noise(95, seed=1), ["W", "N2", "?"])
    save(tmp_path / "a.npz", noise(65), ["N1", "REM"])
    signals = open_signals(tmp_path, SignalConfig())
    assert (signals.names, len(signals), signals.channels) == (("a.npz", "b.npz"), 5, ("ch1",))
    assert_array_equal(signals.stages, [1, 4, 0, 2, -1])
    assert signals.read(2).shape == (1, 3000, 1) and signals.read(2).dtype == np.float32
    assert_array_equal(signals.read(3)[0, :, 0], signals.recordings[1].signal[0, 3000:6000])
    assert signals.path(4) == tmp_path / "b.npz"
    assert "5 windows of 30 s at 100 Hz" in signals.describe()


def test_a_set_is_read_again_when_a_file_changes(tmp_path):
    save(tmp_path / "a.npz", noise(65))
    first = open_signals(tmp_path, SignalConfig())
    assert open_signals(tmp_path, SignalConfig()) is first
    save(tmp_path / "a.npz", noise(95))
    assert len(open_signals(tmp_path, SignalConfig())) == 3


def test_subjects_never_cross_a_split():
    subjects = tuple(f"s{i}" for i in range(30))
    parts = split_subjects(subjects, 3)
    assert {name: len(part) for name, part in parts.items()} == {"train": 21, "val": 3, "test": 6}
    assert sorted(name for part in parts.values() for name in part) == sorted(subjects)
    assert split_subjects(subjects, 3) == parts != split_subjects(subjects, 4)
    assert {name: len(part) for name, part in split_subjects(("a", "b"), 0).items()} == {
        "train": 1,
        "val": 0,
        "test": 1,
    }


@given(seed=st.integers(0, 99), small=st.floats(0.01, 1), large=st.floats(0.01, 1))
def test_a_smaller_share_of_subjects_is_part_of_a_larger_one(tmp_path_factory, seed, small, large):
    signals = _many(tmp_path_factory)
    small, large = sorted((small, large))
    part, whole = (set(draw_subjects(signals, share, seed).subjects) for share in (small, large))
    assert part <= whole and len(part) == max(1, round(10 * small))


_KEPT: list = []


def _many(factory):
    if not _KEPT:
        folder = factory.mktemp("many")
        for i in range(10):
            save(folder / f"s{i}.npz", noise(30, seed=i), ["W"])
        _KEPT.append(open_signals(folder, SignalConfig()))
    return _KEPT[0]


def test_a_loader_started_later_gives_the_same_windows(tmp_path):
    save(tmp_path / "a.npz", noise(200))
    signals = open_signals(tmp_path, SignalConfig())
    all_of_them = iter(TrainLoader(signals, SignalViews(), batch_size=2, seed=5))
    batches = [next(all_of_them) for _ in range(4)]
    later = next(iter(TrainLoader(signals, SignalViews(), batch_size=2, seed=5, start_step=3)))
    assert batches[3].crops[0].shape == (2, 1, 1, 3000)
    assert (later.crops[0] == batches[3].crops[0]).all() and (later.keys == batches[3].keys).all()


def test_folders_of_signals_are_told_from_folders_of_images(tmp_path):
    save(tmp_path / "signals" / "a.npz", noise(30))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    assert is_signals(tmp_path / "signals") and not is_signals(tmp_path / "images")
    assert is_signals(f"signals={tmp_path}") and not is_signals(tmp_path / "missing")


def test_what_can_not_be_used_is_said_in_one_line(tmp_path):
    def refused(match: str, name: str = "x.npz", config: SignalConfig | None = None, **arrays: object) -> None:
        folder = tmp_path / f"case{len(list(tmp_path.iterdir()))}"
        save(folder / name, **{"values": noise(60), **arrays})  # type: ignore[arg-type]
        with pytest.raises(DataError, match=match) as error:
            open_labelled_signals(folder, config or SignalConfig())
        assert "\n" not in str(error.value)

    broken = noise(60)
    broken[0, 1234] = np.nan
    refused("channel ch1: 1 values are not finite, the first at 12.34 s", values=broken)
    refused("lasts 29.0 s at 100 Hz, a window is 30 s", values=noise(29))
    refused("channel ch1 is flat", values=np.zeros((1, 6000)))
    refused("no recording has sleep stages")
    refused("no recording has sleep stages", stages=["?", "?"])
    refused("can't be split by subject into train and test", stages=["W", "W"])
    refused("has no channel C4; it has: ch1", config=SignalConfig(channels=("C4",)))
    refused("says 100 Hz, eval.signal.rate_hz=200", config=SignalConfig(rate_hz=200))
    refused("its stages 120 s; do they belong", stages=["W"] * 4, stage_s=30.0)
    refused("'nap', which is no sleep stage", stages=["nap", "W"])
    refused("1 Hz leaves nothing between", values=noise(60), rate_hz=1.0, config=SignalConfig(low_hz=0.5))
    refused("has 2 names for 1 channels", channels=np.array(["a", "b"]))


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        open_signals(tmp_path / "nothing", SignalConfig())
    with pytest.raises(DataError, match="no recordings found"):
        open_signals(tmp_path, SignalConfig())
    np.save(tmp_path / "x.npy", np.array([object()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="can't be read as an array of numbers"):
        open_signals(tmp_path, SignalConfig(rate_hz=100))
    np.save(tmp_path / "x.npy", noise(60))
    with pytest.raises(DataError, match="does not say its sampling rate"):
        open_signals(tmp_path, SignalConfig())
    (tmp_path / "recordings.csv").write_text("file\ny.npy\n")
    with pytest.raises(DataError, match=r"y\.npy: no such file"):
        open_signals(tmp_path, SignalConfig())
    (tmp_path / "recordings.csv").write_text("path\nx.npy\n")
    with pytest.raises(DataError, match="file is needed"):
        open_signals(tmp_path, SignalConfig())
    (tmp_path / "recordings.csv").unlink()
    (tmp_path / "x.npy").unlink()
    (tmp_path / "x.edf").write_bytes(b"not an EDF file")
    with pytest.raises(DataError, match=r"x\.edf: can't be read as EDF"):
        open_signals(tmp_path, SignalConfig())


def test_a_subject_on_both_sides_is_refused(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / f"{name}.npz", noise(60), ["W", "W"])
    (tmp_path / "recordings.csv").write_text("file,subject,split\na.npz,anna,train\nb.npz,anna,test\n")
    with pytest.raises(DataError, match="subject anna is in train and in test"):
        open_labelled_signals(tmp_path, SignalConfig())


def test_files_of_one_name_in_several_folders_may_be_one_person(tmp_path):
    for person in ("p1", "p2", "p3"):
        for night in ("night1", "night2"):
            save(tmp_path / "a" / person / f"{night}.npz", noise(60), ["W", "N2"])
            save(tmp_path / "b" / f"sub-{person}" / f"{night}.npz", noise(60), ["W", "N2"])
    with pytest.raises(DataError, match=r"night1 lies in 3 folders, p1 and others; is that one person\? Name subjects"):
        open_labelled_signals(tmp_path / "a", SignalConfig())
    known = open_labelled_signals(tmp_path / "b", SignalConfig())
    assert {*known.train.subjects, *known.test.subjects} <= {"sub-p1", "sub-p2", "sub-p3"}
    assert not set(known.train.subjects) & set(known.test.subjects)


def test_recordings_without_a_split_among_others_are_named(tmp_path):
    for number in range(3):
        save(tmp_path / f"r{number}.npz", noise(60), ["W", "N2"])
    (tmp_path / "recordings.csv").write_text("file,split\nr0.npz,train\nr1.npz,test\nr2.npz,\n")
    with pytest.warns(UserWarning, match=r"1 of 3 recordings have no split .* the first: r2\.npz"):
        open_signals(tmp_path, SignalConfig())


def test_windows_are_whole_samples(tmp_path):
    save(tmp_path / "r.npz", noise(60))
    with pytest.raises(ConfigError, match=r"window_s=0\.335 at 66\.667 Hz is no whole number of samples"):
        open_signals(tmp_path, SignalConfig(window_s=0.335, resample_hz=66.667, high_hz=20))


@pytest.mark.skipif(not DREAMS.is_dir(), reason=f"no {DREAMS}: the DREAMS excerpts are not in the repository")
def test_dreams_is_read_from_text_and_edf_without_its_hypnogram_channel():
    signals = open_signals(DREAMS, SignalConfig(codes="dreams"))
    assert signals.names == ("excerpt1.txt", "excerpt3.edf") and signals.channels == ("C3-A1",)
    assert [recording.signal.shape for recording in signals.recordings] == [(1, 180_000), (1, 180_000)]
    counts = [np.bincount(recording.stages, minlength=5).tolist() for recording in signals.recordings]
    assert [sum(count) for count in counts] == [60, 60] and [count[4] for count in counts] == [0, 0]  # no REM
    text, edf = (
        read_signal(DREAMS / f"excerpt3.{ending}", ("C3-A1",)).pieces[0].values[0] for ending in ("txt", "edf")
    )
    assert np.corrcoef(text, edf)[0, 1] > 0.999 and math.isclose(len(text), 90_000)


def test_one_line_says_what_was_read(tmp_path):
    stages = [(0, 60, "Sleep stage W"), (100, 60, "Sleep stage N2")]
    write_edf(tmp_path / "a.edf", {"C3-M2": noise(120)[0]}, 100, stages=stages, onsets=[*range(60), *range(100, 160)])
    write_edf(tmp_path / "b.edf", {"C3-M2": noise(120, 256)[0]}, 256)
    write_edf(tmp_path / "c.edf", {"C3-M2": noise(240)[0]}, 100)
    (tmp_path / "c_hypnogram.txt").write_text("W\n" * 6 + "?\n" * 2)
    assert open_signals(tmp_path, SignalConfig()).describe() == (
        "signals: 3 recordings of 3 subjects; 16 windows of 30 s at 100 Hz, from 0.1 h recorded at 100, 256 Hz; "
        "channels C3-M2; 1 with gaps (40 s in all); stages of 1 from hypnogram files and 1 from the files, 1 without, "
        "10 scored windows"
    )


def test_settings_are_called_as_the_command_that_reads_calls_them(tmp_path):
    save(tmp_path / "a.npz", noise(60), ["0", "1"])
    with pytest.raises(DataError, match=r"data\.signal\.codes=aasm"):
        open_signals(tmp_path, SignalConfig())
    with pytest.raises(DataError, match=r"eval\.signal\.codes=aasm"):
        open_labelled_signals(tmp_path, SignalConfig())
