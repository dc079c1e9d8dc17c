"""Recordings for tests: noise in an npz, sines of a known stage."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

TONES_HZ = {"W": 10.0, "N1": 6.0, "N2": 13.0, "N3": 1.5, "REM": 4.0}
"""What :func:`tones` has in each stage."""


def noise(seconds: float, rate_hz: float = 100, channels: int = 1, seed: int = 0) -> np.ndarray:
    """``(channels, samples)`` of white noise, about 20 microvolts."""
    return np.random.default_rng(seed).normal(0, 20, (channels, int(seconds * rate_hz)))


def tones(parts: Sequence[tuple[str, int]], rate_hz: int = 100, seed: int = 0) -> np.ndarray:
    """``(samples,)`` of sines, 80 microvolts with a little noise: stage and whole seconds of each part."""
    rng = np.random.default_rng(seed)
    waves = []
    for stage, seconds in parts:
        t = np.arange(seconds * rate_hz) / rate_hz
        waves.append(80 * np.sin(2 * np.pi * TONES_HZ[stage] * t) + rng.normal(0, 2, len(t)))
    return np.concatenate(waves)


def tone_of(window: np.ndarray, rate_hz: float = 100) -> str:
    """The stage whose tone a window holds."""
    spectrum = np.abs(np.fft.rfft(window))
    frequency = np.fft.rfftfreq(len(window), 1 / rate_hz)[spectrum.argmax()]
    return min(TONES_HZ, key=lambda stage: abs(TONES_HZ[stage] - frequency))


def save(path: Path, values: np.ndarray, stages: list[str] | None = None, **more: object) -> Path:
    """An npz of 100 Hz unless ``more`` says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    given = {"stages": np.array(stages)} if stages is not None else {}
    np.savez(path, signal=values, **{"rate_hz": 100.0, **given, **more})
    return path
