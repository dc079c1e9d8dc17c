"""Synthetic nights: every stage has its signs, and a night depends on its seed and number alone."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from smalti.data.signals.hypnograms import STAGES
from smalti.data.signals.labelled_signals import open_labelled_signals
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import open_signals
from smalti.data.signals.sleep_samples import CHANNELS, RATE_HZ, draw_night, write_nights
from smalti.errors import DataError


def band_power(signal: np.ndarray, low: float, high: float) -> float:
    spectrum = np.abs(np.fft.rfft(signal)) ** 2 / len(signal) ** 2
    frequency = np.fft.rfftfreq(len(signal), 1 / RATE_HZ)
    return float(spectrum[(frequency >= low) & (frequency < high)].sum())


@pytest.fixture(scope="module")
def powers() -> dict[tuple[str, str], float]:
    """Median over epochs of many nights of the share of power in a band, by stage."""
    bands = {"slow": (0.5, 3.0), "alpha": (8.0, 12.0), "fast": (15.0, 30.0)}
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(8):
        night = draw_night(0, number, 30)
        for epoch, stage in enumerate(night.stages):
            part = night.signal[0, epoch * 3000 : (epoch + 1) * 3000].astype(np.float64)
            whole = band_power(part, 0.3, 35.0)
            for band, edges in bands.items():
                found.setdefault((STAGES[stage], band), []).append(band_power(part, *edges) / whole)
    return {key: float(np.median(values)) for key, values in found.items()}


def test_all_stages_occur_with_their_bands(powers):
    assert {stage for stage, _ in powers} == set(STAGES)
    slow = [powers[stage, "slow"] for stage in ("W", "N2", "N3")]
    assert slow[0] < slow[1] < slow[2] and slow[2] > 0.7
    assert powers["W", "alpha"] == max(powers[stage, "alpha"] for stage in STAGES)
    assert powers["W", "fast"] > 2 * powers["N3", "fast"]


def test_a_night_depends_on_seed_and_number_alone():
    first, again, other = draw_night(3, 5, 4), draw_night(3, 5, 4), draw_night(3, 6, 4)
    assert_array_equal(first.signal, again.signal)
    assert first.events == again.events and not np.array_equal(first.signal, other.signal)


def test_events_belong_to_their_stages():
    kinds: dict[str, set[str]] = {}
    for number in range(8):
        night = draw_night(1, number, 20)
        for kind, second in night.events:
            kinds.setdefault(kind, set()).add(STAGES[night.stages[int(second // 30)]])
    assert kinds["complex"] == {"N2"} and kinds["slow"] == {"N3"} and kinds["teeth"] == {"REM"}
    assert kinds["muscle"] == set(STAGES)


def test_channels_see_one_brain_with_noise_of_their_own():
    night = draw_night(0, 1, 3, num_channels=len(CHANNELS))
    assert night.signal.shape == (6, 9000)
    correlation = np.corrcoef(night.signal)
    assert (correlation > 0.5).all() and correlation[~np.eye(6, dtype=bool)].max() < 0.99


def test_written_nights_are_read_with_their_splits(tmp_path):
    write_nights(tmp_path / "nights", num_train=3, num_test=2, epochs=2, num_channels=2, seed=1)
    signals = open_signals(tmp_path / "nights", SignalConfig())
    assert signals.channels == CHANNELS[:2] and len(signals) == 10 and len(signals.subjects) == 5
    labelled = open_labelled_signals(tmp_path / "nights", SignalConfig())
    assert (len(labelled.train), len(labelled.test)) == (6, 4)
    assert_array_equal(labelled.train.stages[:2], draw_night(1, 0, 2, 2).stages)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        write_nights(tmp_path, num_train=1, num_test=1, epochs=1)
