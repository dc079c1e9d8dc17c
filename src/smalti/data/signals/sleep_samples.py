"""Synthetic nights of EEG whose every stage is known: for tests, demonstrations and comparisons, not a model of sleep.

A night is a walk through the five stages. Each stage has its mixture of band powers on a 1/f background; N2 has
spindles and K-complexes, N3 slow waves, REM sawteeth and eye movements, W alpha and eye movements. Powers wander
slowly, subjects differ in all of it, and artefacts (muscle bursts, popping electrodes) come anywhere. A night depends
on (seed, number) alone.

Source: the textbook signs of the AASM's stages (Iber et al., 2007); every number is ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from smalti.data.loader import sample_key
from smalti.data.signals.hypnograms import STAGES
from smalti.data.signals.sample_files import SampleRecording, write_recordings

RATE_HZ, EPOCH_S = 100.0, 30.0
CHANNELS = ("C3-M2", "O1-M2", "F3-M2", "C4-M1", "O2-M1", "F4-M1")
"""Names of channels, used in this order."""
_BANDS = {"delta": (0.5, 2.5), "theta": (4.0, 7.5), "alpha": (8.0, 12.0), "sigma": (12.0, 15.0), "beta": (18.0, 30.0)}
_POWERS = {  # microvolts of each band in each stage
    "W": {"delta": 6.0, "theta": 5.0, "alpha": 18.0, "sigma": 4.0, "beta": 7.0},
    "N1": {"delta": 9.0, "theta": 10.0, "alpha": 7.0, "sigma": 3.0, "beta": 4.0},
    "N2": {"delta": 17.0, "theta": 9.0, "alpha": 5.0, "sigma": 4.0, "beta": 2.5},
    "N3": {"delta": 42.0, "theta": 9.0, "alpha": 4.0, "sigma": 3.5, "beta": 2.0},
    "REM": {"delta": 9.0, "theta": 11.0, "alpha": 6.0, "sigma": 3.0, "beta": 4.0},
}
_BACKGROUND_UV = 8.0
_GAIN = {"C3": 1.0, "C4": 1.0, "F3": 1.05, "F4": 1.05, "O1": 0.85, "O2": 0.85}
_EVENTS = {  # how often a minute: spindle, K-complex, slow wave, sawteeth, eye movement
    "W": {"eye": 6.0},
    "N1": {"eye": 1.0},
    "N2": {"spindle": 5.0, "complex": 2.0},
    "N3": {"spindle": 1.5, "slow": 12.0},
    "REM": {"teeth": 3.0, "eye": 5.0},
}
_ARTEFACTS = {"muscle": 0.25, "pop": 0.15}
_NEXT = {  # where a stage leads when it ends
    "W": {"N1": 0.85, "N2": 0.1, "REM": 0.05},
    "N1": {"N2": 0.7, "W": 0.2, "REM": 0.1},
    "N2": {"N3": 0.4, "REM": 0.3, "N1": 0.15, "W": 0.15},
    "N3": {"N2": 0.85, "W": 0.1, "N1": 0.05},
    "REM": {"N2": 0.5, "W": 0.25, "N1": 0.25},
}
_DWELL = {"W": 3.0, "N1": 2.5, "N2": 5.0, "N3": 4.5, "REM": 4.5}
_VAL_FIRST = 10**9  # nights of test: the same ones whatever the number of training nights


@dataclass(frozen=True)
class Night:
    """A recording and everything there is to know about it."""

    signal: np.ndarray
    """``(C, epochs * 3000)`` float32 microvolts at 100 Hz."""
    stages: np.ndarray
    """``(epochs,)`` place of each epoch's stage in :data:`STAGES`."""
    events: tuple[tuple[str, float], ...]
    """Kind and second of each spindle, K-complex, artefact and so on, in time order."""


def draw_night(seed: int, number: int, epochs: int, num_channels: int = 1) -> Night:
    """A night of so many epochs of 30 s.

    Args:
        seed: of everything.
        number: of the night; each is of a subject of its own.
        epochs: 1 or more.
        num_channels: 1..6 of :data:`CHANNELS`, which see the same brain with other gains and noise.
    """
    rng = np.random.Generator(np.random.Philox(key=sample_key(seed, 2, number)))
    subject = _Subject(rng)
    stages = _walk(rng, epochs)
    per_epoch = int(EPOCH_S * RATE_HZ)
    samples = epochs * per_epoch
    shared = np.zeros(samples)
    for band, (low, high) in _BANDS.items():
        power = np.array([_POWERS[STAGES[stage]][band] for stage in stages]) * subject.bands[band]
        power = power * np.exp(rng.normal(0, 0.15, epochs))
        envelope = _ramps(power, per_epoch) * np.exp(0.3 * _noise(rng, samples, 0.01, 0.08))
        shift = subject.alpha_shift if band == "alpha" else 0.0
        shared += envelope * _noise(rng, samples, low + shift, high + shift)
    events = _add_events(rng, shared, stages, subject)
    signal = np.empty((num_channels, samples), np.float32)
    for channel in range(num_channels):
        own = _BACKGROUND_UV * subject.background * _background(rng, samples, subject.slope)
        signal[channel] = subject.gain * (_GAIN[CHANNELS[channel][:2]] * shared + own)
    return Night(signal, stages, events)


def write_nights(
    out: Path,
    *,
    num_train: int,
    num_test: int,
    epochs: int,
    num_channels: int = 1,
    seed: int = 0,
) -> Path:
    """Write nights as ``night_00000.npz`` and a ``recordings.csv`` with subjects and splits.

    Raises:
        DataError: if ``out`` holds something already.
        ConfigError: if it can't be written.
    """
    return write_recordings(out, _all(num_train, num_test, epochs, num_channels, seed))


def _all(num_train: int, num_test: int, epochs: int, num_channels: int, seed: int) -> Iterator[SampleRecording]:
    for split, count, first in (("train", num_train, 0), ("test", num_test, _VAL_FIRST)):
        for number in range(count):
            night = draw_night(seed, first + number, epochs, num_channels)
            arrays = {
                "signal": night.signal,
                "rate_hz": RATE_HZ,
                "channels": np.array(CHANNELS[:num_channels]),
                "stages": np.array([STAGES[stage] for stage in night.stages]),
                "stage_s": EPOCH_S,
            }
            yield SampleRecording(f"{split}_{number:05d}", split, arrays)


class _Subject:
    """How one brain, and one amplifier, differs from the next."""

    def __init__(self, rng: np.random.Generator):
        self.gain = float(np.exp(rng.normal(0, 0.3)))
        self.bands = {band: float(np.exp(rng.normal(0, 0.25))) for band in _BANDS}
        self.alpha_shift = float(rng.normal(0, 0.7))
        self.spindle_hz = float(rng.normal(13.2, 0.6))
        self.slope = float(rng.uniform(0.8, 1.4))
        self.background = float(np.exp(rng.normal(0, 0.2)))


def _walk(rng: np.random.Generator, epochs: int) -> np.ndarray:
    """``(epochs,)`` stages: each lasts a geometric time, then leads to another; begins anywhere."""
    stages: list[int] = []
    stage = STAGES[int(rng.integers(len(STAGES)))]
    while len(stages) < epochs:
        stages += [STAGES.index(stage)] * int(rng.geometric(1 / _DWELL[stage]))
        names, chances = zip(*_NEXT[stage].items(), strict=True)
        stage = names[int(np.searchsorted(np.cumsum(chances), rng.random(), side="right").clip(max=len(names) - 1))]
    return np.array(stages[:epochs], dtype=np.int64)


def _noise(rng: np.random.Generator, samples: int, low: float, high: float) -> Float[np.ndarray, " S"]:
    """Gaussian noise of a band in Hz, of standard deviation 1."""
    spectrum = np.fft.rfft(rng.normal(size=samples))
    frequency = np.fft.rfftfreq(samples, 1 / RATE_HZ)
    centre, half = (low + high) / 2, (high - low) / 2
    spectrum *= np.exp(-0.5 * ((frequency - centre) / half) ** 4)
    noise = np.fft.irfft(spectrum, samples)
    return noise / max(float(noise.std()), 1e-12)


def _background(rng: np.random.Generator, samples: int, slope: float) -> Float[np.ndarray, " S"]:
    """Noise whose power falls with frequency to the power of ``-slope``, from 0.3 Hz on; standard deviation 1."""
    spectrum = np.fft.rfft(rng.normal(size=samples))
    frequency = np.fft.rfftfreq(samples, 1 / RATE_HZ)
    spectrum *= np.maximum(frequency, 0.3) ** (-slope / 2)
    noise = np.fft.irfft(spectrum, samples)
    return noise / noise.std()


def _ramps(values: np.ndarray, per_epoch: int) -> Float[np.ndarray, " S"]:
    """A number an epoch, going over to the next within about two seconds around the border."""
    steps = np.repeat(values, per_epoch)
    width = int(2 * RATE_HZ)
    padded = np.pad(steps, width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")[: len(steps)]


def _add_events(
    rng: np.random.Generator, signal: np.ndarray, stages: np.ndarray, subject: _Subject
) -> tuple[tuple[str, float], ...]:
    """Put events into a signal, in place; a K-complex is often followed by a spindle."""
    events: list[tuple[str, float]] = []
    for epoch, stage in enumerate(stages):
        for kind, rate in {**_EVENTS[STAGES[stage]], **_ARTEFACTS}.items():
            for _ in range(int(rng.poisson(rate * EPOCH_S / 60))):
                events.append((kind, (epoch + rng.random()) * EPOCH_S))
    for kind, second in tuple(events):
        if kind == "complex" and rng.random() < 0.5:
            events.append(("spindle", second + 1.1))
    events = sorted((kind, second) for kind, second in events if second * RATE_HZ < len(signal))
    for kind, second in events:
        shape = _shape(rng, kind, subject)
        start = int(second * RATE_HZ)
        part = signal[start : start + len(shape)]
        part += shape[: len(part)]
    return tuple(sorted(events, key=lambda event: event[1]))


def _shape(rng: np.random.Generator, kind: str, subject: _Subject) -> Float[np.ndarray, " S"]:
    """One event in microvolts."""
    size = float(np.exp(rng.normal(0, 0.2)))
    if kind == "spindle":
        t = _seconds(rng.uniform(0.6, 1.4))
        return 22 * size * np.hanning(len(t)) * np.sin(2 * np.pi * subject.spindle_hz * t + rng.uniform(0, 2 * np.pi))
    if kind == "complex":  # sharp and negative, then slow and positive
        t = _seconds(1.2)
        return size * (-110 * np.exp(-(((t - 0.3) / 0.09) ** 2)) + 70 * np.exp(-(((t - 0.7) / 0.2) ** 2)))
    if kind == "slow":
        t = _seconds(rng.uniform(0.8, 1.6))
        return -75 * size * np.sin(2 * np.pi * (t / t[-1]) ** 1.3) * np.hanning(len(t))
    if kind == "teeth":  # rise slowly, fall at once, three a second
        t = _seconds(rng.uniform(1.5, 3.0))
        return 26 * size * (2 * (2.8 * t % 1) - 1) * np.hanning(len(t))
    if kind == "eye":  # a step that decays
        t = _seconds(1.0)
        return rng.choice([-1, 1]) * 45 * size * np.exp(-t / 0.3) * (1 - np.exp(-t / 0.05))
    if kind == "muscle":
        t = _seconds(rng.uniform(1.0, 4.0))
        return 30 * size * np.hanning(len(t)) * _noise(rng, len(t), 20.0, 45.0)
    assert kind == "pop", kind
    t = _seconds(2.0)
    return rng.choice([-1, 1]) * 250 * size * np.exp(-t / 0.4)


def _seconds(duration: float) -> Float[np.ndarray, " S"]:
    return np.arange(int(duration * RATE_HZ)) / RATE_HZ
