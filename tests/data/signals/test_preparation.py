"""Recordings made ready: filter, scale, resampling, gaps, and windows at their times."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from edf import write_edf, write_hypnogram
from signal_files import noise, save, tone_of, tones
from smalti.data.signals.hypnograms import STAGES
from smalti.data.signals.preparation import Recording, condition_channel, prepare_recording
from smalti.data.signals.recording_list import ListedRecording
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import open_signals
from smalti.errors import DataError


def ready(values: np.ndarray, rate_hz: float, config: SignalConfig | None = None) -> np.ndarray:
    return condition_channel([(0.0, values)], rate_hz, config or SignalConfig())[0]


def prepared(path: Path, hypnogram: Path | None = None, channel: str = "C3-M2", **settings: object) -> Recording:
    config = dataclasses.replace(SignalConfig(), **settings)
    return prepare_recording(path.parent, ListedRecording(path, "s", None, None, hypnogram), [channel], config)


def tones_and_stages(recording: Recording) -> list[tuple[str, str]]:
    """Of each window the stage that its tone has, and the stage that it was given."""
    assert recording.stages is not None
    windows = recording.signal[0].reshape(len(recording.stages), -1)
    names = ["?" if stage < 0 else STAGES[stage] for stage in recording.stages]
    return [(tone_of(window), name) for window, name in zip(windows, names, strict=True)]


def power_at(signal: np.ndarray, frequency_hz: float, rate_hz: float) -> float:
    """Amplitude of a sine in a signal."""
    t = np.arange(len(signal)) / rate_hz
    return float(2 * abs((signal * np.exp(-2j * np.pi * frequency_hz * t)).mean()))


def test_a_band_pass_keeps_its_band_and_drops_the_rest_without_shifting_it():
    t = np.arange(60 * 200) / 200
    values = sum(np.sin(2 * np.pi * hz * t) for hz in (0.05, 10.0, 60.0)) * 50 + 1000
    kept = ready(values, 200.0, SignalConfig(clip=1000.0))[1000:5000]  # ends left out
    assert len(ready(values, 200.0)) == 6000
    amplitude = power_at(kept, 10.0, 100.0)
    assert power_at(kept, 0.05, 100.0) < 0.01 * amplitude
    assert power_at(kept, 40.0, 100.0) < 0.02 * amplitude  # 60 Hz would fold to 40
    phase = np.angle((kept * np.exp(-2j * np.pi * 10 * (np.arange(4000) + 1000) / 100)).mean())
    assert abs(phase + np.pi / 2) < 0.02  # a sine still


def test_scaling_is_robust_and_clips():
    values = noise(120)[0]
    values[6000] = 1e7
    scaled = ready(values, 100.0)
    assert scaled.dtype == np.float32 and np.abs(scaled).max() == 20.0
    deviation = np.median(np.abs(scaled - np.median(scaled))) / 0.6745
    assert abs(deviation - 1) < 0.01 and abs(np.median(scaled)) < 1e-4


@given(gain=st.floats(1e-6, 1e3), offset=st.floats(-1e3, 1e3))
def test_unit_and_offset_of_a_recording_do_not_matter(gain, offset):
    values = noise(31)[0]
    assert_allclose(ready(values * gain + offset * gain, 100.0), ready(values, 100.0), atol=1e-3)


def test_a_slower_recording_keeps_less_of_the_band():
    kept = ready(noise(60, 50)[0], 50.0)
    assert kept.shape == (6000,)
    spectrum = np.abs(np.fft.rfft(kept)) ** 2
    assert spectrum[(30 * 60) :].sum() < 0.01 * spectrum.sum()  # above 30 Hz


def test_a_rate_that_divides_nothing_lets_no_time_drift():
    rate_hz = 199.9871
    t = np.arange(int(1200 * rate_hz)) / rate_hz
    pulse = np.exp(-(((t - 1190) / 0.1) ** 2)) * 1000 + np.random.default_rng(0).normal(0, 1, len(t))
    kept = ready(pulse, rate_hz, SignalConfig(clip=1e6))
    assert abs(kept.argmax() / 100 - 1190) < 0.02
    with pytest.raises(DataError, match=r"1e\+06 Hz can't be resampled to 0.002 Hz without a drift in time"):
        ready(noise(1, 1000)[0], 1e6, SignalConfig(resample_hz=0.002, low_hz=0, high_hz=0.0005))


def test_a_recording_with_a_gap_is_cut_there_and_keeps_its_times(tmp_path):
    values = tones([("W", 70), ("N3", 120), ("W", 60)])
    onsets = [*range(70), *range(300, 480), *range(480, 550)][: len(values) // 100]  # 230 s are not recorded
    stages = [(0, 90, "Sleep stage W"), (300, 120, "Sleep stage N3"), (420, 60, "Sleep stage W")]
    path = write_edf(tmp_path / "a.edf", {"C3-M2": values}, 100, stages=stages, onsets=onsets)
    recording = prepared(path)
    assert tones_and_stages(recording) == [("W", "W")] * 2 + [("N3", "N3")] * 4 + [("W", "W")] * 2
    assert_array_equal(recording.starts_s, [0, 30, 300, 330, 360, 390, 420, 450])
    assert (recording.recorded_s, recording.gaps_s) == (250, 230)
    whole = {"onsets": list(range(250)), "stages": [(0, 70, "W"), (70, 120, "N3"), (190, 60, "W")]}
    assert len(prepared(write_edf(tmp_path / "b.edf", {"C3-M2": values}, 100, **whole)).starts_s) == 8  # as one piece


def test_what_lies_before_a_gap_does_not_leak_behind_it(tmp_path):
    values = np.concatenate([noise(60)[0], noise(60, seed=1)[0]])
    onsets = [*range(60), *range(100, 160)]
    louder = np.concatenate([values[:5900], values[5900:6000] + 900, values[6000:]])
    first = prepared(write_edf(tmp_path / "a.edf", {"C3-M2": values}, 100, onsets=onsets))
    second = prepared(write_edf(tmp_path / "b.edf", {"C3-M2": louder}, 100, onsets=onsets))
    assert np.abs(first.signal[0, 3000:6000] - second.signal[0, 3000:6000]).max() > 1
    behind = first.signal[0, 6000:], second.signal[0, 6000:]
    assert np.corrcoef(*behind)[0, 1] > 1 - 1e-6  # the scale alone is shared


def test_pieces_shorter_than_a_window_are_left_out(tmp_path):
    onsets = [*range(40), *range(100, 120), *range(200, 260)]
    path = write_edf(tmp_path / "a.edf", {"C3-M2": noise(120)[0]}, 100, onsets=onsets)
    assert_array_equal(prepared(path).starts_s, [0, 200, 230])
    short = write_edf(tmp_path / "b.edf", {"C3-M2": noise(40)[0]}, 100, onsets=[*range(20), *range(50, 70)])
    with pytest.raises(DataError, match=r"lasts 20\.0 s at 100 Hz without a gap, a window is 30 s"):
        prepared(short)


def test_a_hypnogram_that_starts_later_gives_its_stages_later(tmp_path):
    values = tones([("W", 180), ("N2", 120)])
    path = write_edf(tmp_path / "n.edf", {"C3-M2": values}, 100, start="31.12.1923.58.00")
    stages = [(0, 60, "Sleep stage W"), (60, 120, "Sleep stage N2")]
    later = write_hypnogram(tmp_path / "n_hypnogram.edf", stages, start="01.01.2000.00.00")
    assert tones_and_stages(prepared(path, later)) == [("W", "?")] * 4 + [("W", "W")] * 2 + [("N2", "N2")] * 4
    odd = write_hypnogram(tmp_path / "odd_hypnogram.edf", stages, start="01.01.2000.00.10")
    assert_array_equal(prepared(path, odd).starts_s, 10 + 30 * np.arange(9))  # windows lie on the labels
    undated = write_hypnogram(tmp_path / "u_hypnogram.edf", stages, start="01.01.8500.00.00")
    assert tones_and_stages(prepared(path, undated))[:2] == [("W", "W")] * 2
    far = write_hypnogram(tmp_path / "far_hypnogram.edf", stages, start="02.01.2000.00.00")
    with pytest.raises(DataError, match=r"its hypnogram lies outside \(it starts 2020-01-02 00:00:00, the recording"):
        prepared(path, far)


def test_a_file_shorter_than_its_header_is_read_with_its_stages_in_place(tmp_path):
    values = tones([("W", 60), ("N3", 90)])
    hypnogram = tmp_path / "a_hypnogram.txt"
    hypnogram.write_text("W\n" * 2 + "N3\n" * 10)  # of the 360 s that the header counts
    write_edf(tmp_path / "a.edf", {"C3-M2": values}, 100, counted=360)
    with pytest.warns(UserWarning, match=r"a\.edf: ends 210 s before its header says; the 150 s that it holds are"):
        signals = open_signals(tmp_path, SignalConfig())
    assert tones_and_stages(signals.recordings[0]) == [("W", "W")] * 2 + [("N3", "N3")] * 3
    write_edf(tmp_path / "a.edf", {"C3-M2": values}, 100, counted=120)
    hypnogram.write_text("W\n" * 2 + "N3\n" * 2)
    with pytest.warns(UserWarning, match="holds 30 s more than its header says; they are left out"):
        signals = open_signals(tmp_path, SignalConfig())
    assert tones_and_stages(signals.recordings[0]) == [("W", "W")] * 2 + [("N3", "N3")] * 2


def test_of_a_file_that_was_never_closed_labels_need_their_length(tmp_path):
    write_edf(tmp_path / "a.edf", {"C3-M2": tones([("W", 60), ("N3", 60)])}, 100, counted=-1)
    (tmp_path / "a_hypnogram.txt").write_text("W\n" * 2 + "N3\n" * 4)  # fits 20 s, but may be of 180 s
    with pytest.raises(DataError, match=r"neither how long its 6 labels last nor how long the recording is; give"):
        open_signals(tmp_path, SignalConfig())
    with pytest.warns(UserWarning, match=r"does not count its records \(-1\); the 120 s that it holds are read"):
        signals = open_signals(tmp_path, SignalConfig(stage_s=30))
    assert tones_and_stages(signals.recordings[0]) == [("W", "W")] * 2 + [("N3", "N3")] * 2


def test_channels_of_different_rates_keep_one_time(tmp_path):
    parts = [("W", 60), ("N1", 30), ("N3", 60)]
    channels = {"C3-M2": tones(parts, 100), "C4-M1": tones(parts, 256, seed=1), "O1-M2": tones(parts, 64, seed=2)}
    write_edf(tmp_path / "a.edf", channels, [100, 256, 64])
    signals = open_signals(tmp_path, SignalConfig())
    assert signals.recordings[0].rates_hz == (100, 256, 64) and signals.recordings[0].signal.shape == (3, 15_000)
    for channel in signals.recordings[0].signal:
        assert [tone_of(channel[i * 3000 : (i + 1) * 3000]) for i in range(5)] == ["W", "W", "N1", "N3", "N3"]
    assert "recorded at 64, 100, 256 Hz" in signals.describe()


def test_no_polarity_and_no_limits_are_read_as_the_header_has_them(tmp_path):
    values = noise(60)[0]
    upright = prepared(write_edf(tmp_path / "a.edf", {"C3-M2": values}, 100))
    inverted = prepared(write_edf(tmp_path / "b.edf", {"C3-M2": values}, 100, limits_uv=(1000, -1000)))
    assert_allclose(inverted.signal, -upright.signal, atol=1e-4)
    raw = prepared(write_edf(tmp_path / "c.edf", {"C3-M2": values}, 100, limits_uv=(0, 0)))
    assert_allclose(raw.signal, upright.signal, atol=1e-4)
    assert raw.faults[0][1].endswith("has no usable limits for C3-M2; samples are read as they are stored")


def test_clipped_channels_are_reported_once_with_their_number(tmp_path):
    for name in ("a", "b", "c"):
        write_edf(tmp_path / f"{name}.edf", {"C3-M2": noise(60, seed=ord(name))[0] * (1 if name == "b" else 40)}, 100)
    with pytest.warns(UserWarning, match=r"a\.edf: a hundredth or more of C3-M2 .* \(the same in 1 more recording\)"):
        assert len(open_signals(tmp_path, SignalConfig())) == 6


def test_a_flat_channel_is_named(tmp_path):
    path = write_edf(tmp_path / "a.edf", {"C3-M2": noise(60)[0], "C4-M1": np.zeros(6000)}, 100)
    with pytest.raises(DataError, match=r"a\.edf: channel C4-M1 is flat; choose others with data\.signal\.channels"):
        open_signals(tmp_path, SignalConfig())
    assert len(prepared(path).starts_s) == 2


def test_a_rate_beside_the_file_must_be_the_files(tmp_path):
    path = save(tmp_path / "a.npz", noise(60), channels=np.array(["C3-M2"]))
    with pytest.raises(DataError, match=r"says 100 Hz, data\.signal\.rate_hz=200; leave it out for such files"):
        prepared(path, rate_hz=200)
