"""Synthetic motion of people with an accelerometer, whose every activity is known: for tests and demonstrations.

A recording is a row of bouts, each of one activity, with unlabelled changes between them. Activities differ in their
pace, their strength and what a step looks like; people differ in all of it, and in how they wear the sensor. A
recording depends on (seed, number) alone.

No source: every number is ours. Numbers measured on them say nothing about people.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from smalti.data.loader import sample_key
from smalti.data.signals.sample_files import SampleRecording, write_recordings
from smalti.data.signals.window_labels import LabelledPart

RATE_HZ = 50.0
CHANNELS = ("x", "y", "z")
"""Axes of the sensor."""
ACTIVITIES = ("cycle", "run", "stairs", "still", "walk")
_STREAM = 3
_TEST_FIRST = 10**9  # recordings of test: the same ones whatever the number for training
_PACE_HZ = {"cycle": 1.2, "run": 2.8, "stairs": 1.5, "still": 0.25, "walk": 1.9}
_STRENGTH_G = {"cycle": 0.15, "run": 1.2, "stairs": 0.4, "still": 0.01, "walk": 0.35}
_STEP = {  # amplitude and phase of the harmonics of half the pace
    "cycle": ((2, 1.0, 0.0), (4, 0.1, 1.0)),
    "run": ((2, 1.0, 0.0), (4, 0.6, 0.4), (6, 0.4, 0.9), (8, 0.2, 1.3)),
    "stairs": ((1, 0.7, 0.3), (2, 1.0, 0.0), (3, 0.5, 1.1)),
    "still": ((2, 1.0, 0.0),),
    "walk": ((1, 0.2, 0.5), (2, 1.0, 0.0), (4, 0.5, 0.8)),
}
_ROAD_G = 0.12
"""Vibration of a bicycle."""
_NOISE_G = 0.02
_BOUT_S, _CHANGE_S = (20.0, 60.0), (2.0, 5.0)


@dataclass(frozen=True)
class Motion:
    """A recording and what is known of it."""

    signal: np.ndarray
    """``(3, S)`` float32, in units of gravity at 50 Hz."""
    parts: tuple[LabelledPart, ...]
    """Activities in the order of time."""


def draw_motion(seed: int, number: int, minutes: float) -> Motion:
    """A recording of one person.

    Args:
        seed: of everything.
        number: of the recording; each is of a person of their own.
        minutes: length.
    """
    rng = np.random.Generator(np.random.Philox(key=sample_key(seed, _STREAM, number)))
    samples = round(minutes * 60 * RATE_HZ)
    pace, strength = np.exp(rng.normal(0, 0.08)), np.exp(rng.normal(0, 0.25))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    body, parts = np.zeros((3, samples)), list[LabelledPart]()
    start, activity = 0, ""
    while start < samples:
        others = [name for name in ACTIVITIES if name != activity]
        activity = others[int(rng.integers(len(others)))]
        end = min(samples, start + round(rng.uniform(*_BOUT_S) * RATE_HZ))
        body[:, start:end] = strength * _bout(rng, activity, end - start, pace)
        parts.append(LabelledPart(start / RATE_HZ, end / RATE_HZ, activity))
        start = end + round(rng.uniform(*_CHANGE_S) * RATE_HZ)
    body[2] += 1  # gravity
    signal = turn @ body + rng.normal(0, _NOISE_G, body.shape)
    return Motion(signal.astype(np.float32), tuple(parts))


def write_motion(out: Path, *, num_train: int, num_test: int, minutes: float, seed: int = 0) -> Path:
    """Write recordings with their activities in ``labels.csv``, and ``recordings.csv`` with subjects and splits.

    Raises:
        DataError: if ``out`` holds something already.
        ConfigError: if it can't be written.
    """
    return write_recordings(out, _all(num_train, num_test, minutes, seed))


def _all(num_train: int, num_test: int, minutes: float, seed: int) -> Iterator[SampleRecording]:
    for split, count, first in (("train", num_train, 0), ("test", num_test, _TEST_FIRST)):
        for number in range(count):
            motion = draw_motion(seed, first + number, minutes)
            arrays = {"signal": motion.signal, "rate_hz": RATE_HZ, "channels": np.array(CHANNELS)}
            yield SampleRecording(f"{split}_{number:05d}", split, arrays, motion.parts)


def _bout(rng: np.random.Generator, activity: str, samples: int, pace: float) -> Float[np.ndarray, "3 S"]:
    """One activity along the body's axes: forwards, sideways, up."""
    hz = _PACE_HZ[activity] * pace * np.exp(rng.normal(0, 0.05))
    drift = np.cumsum(rng.normal(0, 0.02, samples)) / np.sqrt(RATE_HZ)  # no two steps last as long
    phase = np.pi * hz * np.arange(samples) / RATE_HZ + drift + rng.uniform(0, 2 * np.pi)
    up = sum(size * np.sin(order * phase + shift) for order, size, shift in _STEP[activity])
    forwards = 0.5 * np.sin(2 * phase + rng.uniform(0, 2 * np.pi))
    sideways = 0.4 * np.sin(phase + rng.uniform(0, 2 * np.pi))
    motion = _STRENGTH_G[activity] * np.exp(rng.normal(0, 0.15)) * np.stack([forwards, sideways, up])
    if activity == "cycle":
        motion += _ROAD_G * rng.normal(size=motion.shape)
    return motion
