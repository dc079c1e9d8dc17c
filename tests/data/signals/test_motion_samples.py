"""Synthetic motion: activities differ in pace and strength, and a recording depends on its seed and number alone."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from smalti.data.signals.labelled_signals import open_labelled_signals
from smalti.data.signals.motion_samples import ACTIVITIES, CHANNELS, RATE_HZ, draw_motion, write_motion
from smalti.data.signals.signal_config import SignalConfig
from smalti.errors import DataError


def test_a_recording_depends_on_seed_and_number_alone():
    first, again, other = draw_motion(3, 5, 1), draw_motion(3, 5, 1), draw_motion(3, 6, 1)
    assert_array_equal(first.signal, again.signal)
    assert first.parts == again.parts and not np.array_equal(first.signal, other.signal)
    assert first.signal.shape == (len(CHANNELS), 60 * RATE_HZ) and first.signal.dtype == np.float32


def test_parts_follow_each_other_and_stronger_activities_move_more():
    strengths: dict[str, list[float]] = {}
    for number in range(8):
        motion = draw_motion(0, number, 5)
        ends = [0.0]
        for part in motion.parts:
            assert ends[-1] <= part.start_s < part.end_s <= 300
            ends.append(part.end_s)
            piece = motion.signal[:, round(part.start_s * RATE_HZ) : round(part.end_s * RATE_HZ)]
            strengths.setdefault(part.label, []).append(float(piece.std(axis=1).max()))
    assert set(strengths) == set(ACTIVITIES)
    medians = {name: np.median(values) for name, values in strengths.items()}
    assert medians["still"] < 0.5 * medians["cycle"] and medians["run"] > 2 * medians["walk"]


def test_written_recordings_are_read_with_their_classes(tmp_path):
    folder = write_motion(tmp_path / "motion", num_train=3, num_test=2, minutes=3)
    data = open_labelled_signals(folder, SignalConfig(window_s=10.0), target="classes")
    assert data.classes == ACTIVITIES
    assert len(data.train.recordings) == 3 and len(data.test.recordings) == 2
    with pytest.raises(DataError):
        write_motion(folder, num_train=1, num_test=1, minutes=1)
