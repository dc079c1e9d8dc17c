"""Recordings on disk become windows with stages: formats, filters, splits, and what is refused."""

import importlib.util
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from edf import write_edf, write_hypnogram
from smalti.data import recordings
from smalti.data.loader import TrainLoader
from smalti.data.recordings import Scoring, looks_like_eeg, plain_name, read_scoring, read_signal
from smalti.data.signals import (
    SignalConfig,
    SignalViews,
    draw_subjects,
    is_signals,
    open_labelled_signals,
    open_signals,
    prepare,
    split_subjects,
    training_signals,
)
from smalti.errors import ConfigError, DataError, MissingExtraError

SHARED = Path(os.environ.get("SMALTI_SHARED", Path(__file__).parents[2].parent / "shared"))
DREAMS = SHARED / "data" / "dreams-sleep-eeg"


def noise(seconds: float, rate_hz: float = 100, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 20, (channels, int(seconds * rate_hz)))


def save(path: Path, values: np.ndarray, stages: list[str] | None = None, **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    given = {"stages": np.array(stages)} if stages is not None else {}
    np.savez(path, signal=values, **{"rate_hz": 100.0, **given, **more})
    return path


def power_at(signal: np.ndarray, frequency_hz: float, rate_hz: float) -> float:
    """Amplitude of a sine in a signal."""
    t = np.arange(len(signal)) / rate_hz
    return float(2 * abs((signal * np.exp(-2j * np.pi * frequency_hz * t)).mean()))


def test_each_window_gets_the_stage_of_most_of_its_time():
    scoring = Scoring(np.arange(18) * 5.0, np.full(18, 5.0), np.array([0] * 4 + [1] * 2 + [2] * 3 + [3] * 3 + [-1] * 6))
    # four of W; three of N2 and three of N3, a tie that goes to N2; nothing scored
    assert_array_equal(scoring.windows(3, 30.0), [0, 2, -1])


def test_a_window_that_is_mostly_unscored_has_no_stage():
    assert_array_equal(Scoring(np.array([0.0]), np.array([14.0]), np.array([2])).windows(2, 30.0), [-1, -1])
    assert_array_equal(Scoring(np.array([0.0]), np.array([16.0]), np.array([2])).windows(2, 30.0), [2, -1])


def test_a_band_pass_keeps_its_band_and_drops_the_rest_without_shifting_it():
    t = np.arange(60 * 200) / 200
    values = np.stack([np.sin(2 * np.pi * hz * t) for hz in (0.05, 10.0, 60.0)]).sum(0, keepdims=True) * 50 + 1000
    ready = prepare(values, 200.0, SignalConfig(clip=1000.0))[0][1000:5000]  # ends left out
    assert len(prepare(values, 200.0, SignalConfig())[0]) == 6000
    amplitude = power_at(ready, 10.0, 100.0)
    assert power_at(ready, 0.05, 100.0) < 0.01 * amplitude
    assert power_at(ready, 40.0, 100.0) < 0.02 * amplitude  # 60 Hz would fold to 40
    phase = np.angle((ready * np.exp(-2j * np.pi * 10 * (np.arange(4000) + 1000) / 100)).mean())
    assert abs(phase + np.pi / 2) < 0.02  # a sine still


def test_scaling_is_robust_and_clips():
    values = noise(120)
    values[0, 6000] = 1e7
    ready = prepare(values, 100.0, SignalConfig())
    assert ready.dtype == np.float32 and np.abs(ready).max() == 20.0
    deviation = np.median(np.abs(ready - np.median(ready))) / 0.6745
    assert abs(deviation - 1) < 0.01 and abs(np.median(ready)) < 1e-4


@given(gain=st.floats(1e-6, 1e3), offset=st.floats(-1e3, 1e3))
def test_unit_and_offset_of_a_recording_do_not_matter(gain, offset):
    values = noise(31)
    assert_allclose(
        prepare(values * gain + offset * gain, 100.0, SignalConfig()), prepare(values, 100.0, SignalConfig()), atol=1e-3
    )


def test_a_slower_recording_keeps_less_of_the_band():
    ready = prepare(noise(60, 50), 50.0, SignalConfig())
    assert ready.shape == (1, 6000)
    spectrum = np.abs(np.fft.rfft(ready[0])) ** 2
    assert spectrum[(30 * 60) :].sum() < 0.01 * spectrum.sum()  # above 30 Hz


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
    assert_array_equal(read_signal(path, ("c4_m1", "EOG")).values, values[[2, 1]])
    assert open_signals(tmp_path, SignalConfig(channels="C4-M1, C3-M2")).channels == ("C4-M1", "C3-M2")


def test_stages_in_edf_annotations_and_tables(tmp_path):
    stages = [(0, 30, "Sleep stage W"), (30, 30, "Sleep stage 4"), (60, 30, "Sleep stage R"), (90, 30, "Sleep stage ?")]
    scoring = read_scoring(write_hypnogram(tmp_path / "x-Hypnogram.edf", [*stages, (5, 0, "Lights off")]), 30.0)
    assert_array_equal(scoring.windows(4, 30.0), [0, 3, 4, -1])
    (tmp_path / "x.stages.csv").write_text("onset_s,duration_s,stage\n0,30,W\n30,60,N2\n")
    assert_array_equal(read_scoring(tmp_path / "x.stages.csv", 30.0).windows(3, 30.0), [0, 2, 2])
    (tmp_path / "y.txt").write_text("[Hypnogram]\n" + "5\n4\n3\n2\n1\n0\n-1\n")
    assert_array_equal(read_scoring(tmp_path / "y.txt", 5.0).windows(7, 5.0), [0, 4, 1, 2, 3, 3, -1])


def test_labels_of_a_text_are_as_long_as_fits_the_recording(tmp_path):
    np.save(tmp_path / "a.npy", noise(300))
    (tmp_path / "a_hypnogram.txt").write_text("W\nN1\nN2\nN2\nN3\nREM\nREM\nW\nW\nN1\n")
    assert_array_equal(open_signals(tmp_path, SignalConfig(rate_hz=100)).stages, [0, 1, 2, 2, 3, 4, 4, 0, 0, 1])
    with pytest.warns(UserWarning, match="lasts 300 s, its stages 50 s"):
        open_signals(tmp_path, SignalConfig(rate_hz=100, stage_s=5))


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
    assert training_signals(signals).names == ("a.npy", "b.npy")


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


def test_views_drop_channels_and_scale_but_never_shift():
    window = np.random.default_rng(0).normal(size=(1, 400, 4)).astype(np.float32)
    views = SignalViews(channel_dropout=0.5, amplitude=(0.8, 1.2))
    dropped = 0
    for seed in range(200):
        crop = views(window, np.random.default_rng(seed)).crops[0][0]
        factors = (crop * window.astype(float)).sum((0, 1)) / (window.astype(float) ** 2).sum((0, 1))
        assert_allclose(crop, window * factors, atol=1e-5)  # each channel is itself times a number
        kept = factors[factors > 0]
        assert len(kept) >= 1 and kept.min() == pytest.approx(kept.max()) and 0.8 <= kept[0] <= 1.2
        dropped += 4 - len(kept)
    assert abs(dropped / 800 - 0.48) < 0.06


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
    refused("1 values are not finite, the first at 12.34 s of channel 1", values=broken)
    refused("lasts 29.0 s at 100 Hz, a window is 30 s", values=noise(29))
    refused("channel 1 is flat", values=np.zeros((1, 6000)))
    refused("no recording has sleep stages")
    refused("no recording has sleep stages", stages=["?", "?"])
    refused("can't be split into train and test by subject", stages=["W", "W"])
    refused("has no channel C4; it has: ch1", config=SignalConfig(channels=("C4",)))
    refused("says 100 Hz, signal.rate_hz=200", config=SignalConfig(rate_hz=200))
    refused("its stages 120 s; a rate of 50 Hz would fit", stages=["W"] * 4)
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


def test_neither_rate_nor_length_of_labels_is_refused(tmp_path):
    np.save(tmp_path / "r1.npy", noise(600))
    (tmp_path / "r1_hypnogram.txt").write_text("W\nN2\n" * 10)
    with pytest.raises(DataError, match=r"give data\.signal\.rate_hz or data\.signal\.stage_s"):
        open_signals(tmp_path, SignalConfig())
    assert len(open_signals(tmp_path, SignalConfig(stage_s=30))) == 20
    assert len(open_signals(tmp_path, SignalConfig(rate_hz=100))) == 20


def test_windows_are_whole_samples(tmp_path):
    save(tmp_path / "r.npz", noise(60))
    with pytest.raises(ConfigError, match=r"window_s=0\.335 at 66\.667 Hz is no whole number of samples"):
        open_signals(tmp_path, SignalConfig(window_s=0.335, resample_hz=66.667, high_hz=20))


def test_an_undefined_label_may_run_past_the_end(tmp_path):
    save(tmp_path / "r.npz", noise(600))
    table = tmp_path / "r.stages.csv"
    table.write_text("onset_s,duration_s,stage\n0,570,N2\n570,6900,?\n")
    assert open_signals(tmp_path, SignalConfig()).stages.tolist() == [2] * 19 + [-1]
    table.write_text("onset_s,duration_s,stage\n0,570,N2\n570,6900,W\n")
    with pytest.raises(DataError, match="lasts 600 s at 100 Hz, its stages 7470 s"):
        open_signals(tmp_path, SignalConfig())


@pytest.mark.parametrize("content", [b"no archive", b"PK\x03\x04" + bytes(200)], ids=["text", "torn"])
def test_a_damaged_archive_is_one_line(tmp_path, content):
    (tmp_path / "r.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"r\.npz: can't be read as an array of numbers"):
        open_signals(tmp_path, SignalConfig())


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


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    write_edf(tmp_path / "x.edf", {"C3-M2": noise(60)[0]}, 100)
    found = importlib.util.find_spec
    monkeypatch.setattr(recordings.importlib.util, "find_spec", lambda name: None if name == "mne" else found(name))
    with pytest.raises(MissingExtraError, match=r'pip install "smalti\[eeg\]"'):
        open_signals(tmp_path, SignalConfig())


def test_views_refuse_numbers_outside_their_range():
    with pytest.raises(ConfigError, match="channel_dropout=1"):
        SignalViews(channel_dropout=1.0)
    with pytest.raises(ConfigError, match=r"amplitude=\[1.2, 0.8\]"):
        SignalViews(amplitude=(1.2, 0.8))


@pytest.mark.skipif(not DREAMS.is_dir(), reason=f"no {DREAMS}: the DREAMS excerpts are not in the repository")
def test_dreams_is_read_from_text_and_edf_without_its_hypnogram_channel():
    signals = open_signals(DREAMS, SignalConfig())
    assert signals.names == ("excerpt1.txt", "excerpt3.edf") and signals.channels == ("C3-A1",)
    assert [recording.signal.shape for recording in signals.recordings] == [(1, 180_000), (1, 180_000)]
    counts = [np.bincount(recording.stages, minlength=5).tolist() for recording in signals.recordings]
    assert [sum(count) for count in counts] == [60, 60] and [count[4] for count in counts] == [0, 0]  # no REM
    text, edf = (read_signal(DREAMS / f"excerpt3.{ending}", ("C3-A1",)).values[0] for ending in ("txt", "edf"))
    assert np.corrcoef(text, edf)[0, 1] > 0.999 and math.isclose(len(text), 90_000)
