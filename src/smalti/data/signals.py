"""Sets of signals: recordings made ready for an encoder and cut into windows, such as nights of EEG in epochs of 30 s.

A window is an image of one row: ``(1, T, C)`` here, ``(C, 1, T)`` in a batch, so that encoder, loop and checkpoints are
those of images. Recordings are filtered and scaled whole, never window by window, and split by subject.
Letters: C channels, T samples of a window.
"""

import csv
import functools
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float
from pydantic import BeforeValidator, Field, PositiveFloat
from scipy import signal as dsp

from smalti.config import settings
from smalti.data.image_set import SPLIT_ORDER, SPLITS, read_lines
from smalti.data.images import ENDINGS as IMAGE_ENDINGS
from smalti.data.loader import epoch_order
from smalti.data.recordings import (
    ENDINGS,
    STAGES,
    TEXT,
    UNDEFINED,
    Scoring,
    channel_names,
    find_hypnogram,
    is_hypnogram,
    looks_like_eeg,
    plain_name,
    read_scoring,
    read_signal,
    subject_of,
    table_rows,
)
from smalti.data.views import SampleViews
from smalti.errors import ConfigError, DataError, ShapeError

TABLE = "recordings.csv"
READER = "signals"
"""As in ``--data signals=PATH``."""
_COLUMNS = ("file", "subject", "split", "rate_hz", "stages")
_LEAST_BAND_HZ = 0.45
"""Highest frequency that is kept, as a share of the sampling rate."""
_SHARES = {"test": 0.2, "val": 0.1}
_MAD_OF_NORMAL = 0.6744897501960817
"""Median absolute deviation of a standard normal variable."""
_FILTER_ORDER = 4
_LABELS_S = (5.0, 10.0, 20.0, 30.0)

Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda v: tuple(map(str.strip, v.split(","))) if isinstance(v, str) else v)
]


@settings
class SignalConfig:
    """How recordings are read and made ready; what an encoder was trained with must be kept for it."""

    channels: Names = ()
    """Channels by name, in this order; empty: those named after electrodes of the 10-20 system that all recordings
    have."""
    rate_hz: PositiveFloat | None = None
    """Sampling rate of files that don't say theirs (arrays, text); None: ``rate_hz`` of recordings.csv, or how long the
    stages beside them last."""
    resample_hz: PositiveFloat = 100.0
    """Sampling rate that the encoder sees."""
    low_hz: Annotated[float, Field(ge=0)] = 0.3
    """Lowest frequency that is kept; 0 keeps all."""
    high_hz: PositiveFloat = 35.0
    """Highest frequency that is kept, at most 0.45 of a recording's own rate."""
    clip: PositiveFloat = 20.0
    """Largest value after scaling, in robust standard deviations."""
    window_s: PositiveFloat = 30.0
    """Seconds of a window: what gets one stage."""
    stage_s: PositiveFloat | None = None
    """Seconds of a label in files that don't say; None: 30, or for text files what fits the recording, else 5."""

    @property
    def window(self) -> int:
        """Samples of a window."""
        return round(self.window_s * self.resample_hz)


@dataclass(frozen=True)
class Recording:
    """One recording, made ready."""

    name: str
    """Its file, relative to the set."""
    path: Path
    subject: str
    split: str | None
    signal: np.ndarray = field(repr=False)
    """``(C, samples)`` float32, whole windows only."""
    stages: np.ndarray | None = field(repr=False)
    """``(windows,)`` places in :data:`STAGES` or :data:`UNDEFINED`; None where nobody scored it."""


@dataclass(frozen=True)
class SignalSet:
    """Windows of recordings, one after the other, in an order that is the same on every machine."""

    root: Path
    recordings: tuple[Recording, ...] = field(repr=False)
    channels: tuple[str, ...]
    config: SignalConfig
    layout: str = READER

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.recordings else 0

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """``(recordings,)``: windows up to and with each recording."""
        return np.cumsum([recording.signal.shape[1] // self.config.window for recording in self.recordings])

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files of the recordings."""
        return tuple(recording.path for recording in self.recordings)

    @property
    def names(self) -> tuple[str, ...]:
        """Files of the recordings, relative to the set."""
        return tuple(recording.name for recording in self.recordings)

    @property
    def subjects(self) -> tuple[str, ...]:
        """Who was recorded, sorted."""
        return tuple(sorted({recording.subject for recording in self.recordings}))

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that hold recordings, in the order train, val, test."""
        found = {recording.split for recording in self.recordings}
        return tuple(split for split in SPLIT_ORDER if split in found)

    @property
    def label_note(self) -> str:
        """What the stages are, one line."""
        return f"{', '.join(STAGES)}; S3 and S4 are N3; a window has the stage of most of its time"

    @functools.cached_property
    def stages(self) -> np.ndarray:
        """``(windows,)`` stage of each window, :data:`UNDEFINED` where there is none."""
        ends = np.concatenate([[0], self._ends])
        parts = [
            np.full(ends[i + 1] - ends[i], UNDEFINED) if recording.stages is None else recording.stages
            for i, recording in enumerate(self.recordings)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def locate(self, index: int) -> tuple[int, int]:
        """The place of a window: which recording, and which window of it."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)

    def path(self, index: int) -> Path:
        """The file that a window is from."""
        return self.recordings[self.locate(index)[0]].path

    def read(self, index: int) -> Float[np.ndarray, "1 T C"]:
        """A window as an image of one row, float32."""
        number, window = self.locate(index)
        samples = self.config.window
        cut = self.recordings[number].signal[:, window * samples : (window + 1) * samples]
        return np.ascontiguousarray(cut.T)[None]

    def subset(self, split: str) -> "SignalSet":
        """The recordings of one split.

        Raises:
            DataError: if there is no such split, naming those there are.
        """
        name = SPLITS.get(split, split)
        if name not in self.splits:
            there = f"it has: {', '.join(self.splits)}" if self.splits else "it has no splits"
            raise DataError(f"{self.root}: no split '{split}'; {there}")
        return replace(self, recordings=tuple(one for one in self.recordings if one.split == name))

    def of_subjects(self, subjects: Iterable[str]) -> "SignalSet":
        """The recordings of some subjects."""
        chosen = set(subjects)
        return replace(self, recordings=tuple(one for one in self.recordings if one.subject in chosen))

    def describe(self) -> str:
        """One line for the log: recordings, subjects, windows, channels, splits."""
        counts = Counter(recording.split for recording in self.recordings)
        splits = ", ".join(f"{split} {counts[split]:,}" for split in self.splits)
        return (
            f"{self.layout}: {len(self.recordings):,} recordings of {len(self.subjects):,} subjects"
            f"{f' ({splits})' if splits else ''}, {len(self):,} windows of {self.config.window_s:g} s at "
            f"{self.config.resample_hz:g} Hz, channels {', '.join(self.channels)}"
        )

    def account(self) -> str:
        """What was read, as of an :class:`~smalti.data.image_set.ImageSet`."""
        return self.describe()


@dataclass(frozen=True)
class LabelledSignals:
    """Recordings to learn from and others, of other subjects, to be judged on."""

    train: SignalSet
    test: SignalSet
    note: str
    """How the two came about, one line for logs and results."""
    classes: tuple[str, ...] = STAGES
    drawn: bool = False
    """Whether ``train`` is a draw from the training subjects."""
    split: str = "test"
    """The evaluated split by its own name."""

    @property
    def evaluated(self) -> str:
        """What the evaluated windows are called, such as ``test windows``."""
        return f"{self.split} windows"


def is_signals(data: str | Path) -> bool:
    """Whether a path holds signals: it is named ``signals=PATH``, has a recordings.csv, or EDF files or arrays come
    before any image when its folders are walked in order."""
    path, forced = _split_name(data)
    if forced or not path.is_dir():
        return forced
    if (path / TABLE).is_file():
        return True
    for _, folders, files in os.walk(path):
        folders.sort()
        endings = {file.rpartition(".")[2].lower() for file in files}
        if endings & set(IMAGE_ENDINGS):
            return False
        if {f".{ending}" for ending in endings} & {".edf", ".bdf", ".npy", ".npz"}:
            return True
    return False


def open_signals(data: str | Path, config: SignalConfig) -> SignalSet:
    """The recordings at a path, read, filtered, resampled and scaled; kept while files and settings stay as they are.

    Args:
        data: a folder of recordings (EDF, BDF, npy, npz, csv, txt) with stages beside them, or with a
            ``recordings.csv`` (columns file, and subject, split, rate_hz, stages where they are known);
            ``signals=PATH`` says so.
        config: how they are read.

    Raises:
        DataError: if the path is missing, holds no recordings, or one of them can't be used; one line.
        ConfigError: for settings that don't fit together.
        MissingExtraError: for EDF files without the package mne.
    """
    root, _ = _split_name(data)
    if not root.exists():
        raise DataError(f"{root}: no such file or folder")
    if not root.is_dir():
        raise DataError(f"{root}: a file; give the folder of the recordings")
    if not math.isclose(config.window_s * config.resample_hz, config.window, rel_tol=1e-9):
        raise ConfigError(
            f"signal.window_s={config.window_s:g} at {config.resample_hz:g} Hz is no whole number of samples "
            f"({config.window_s * config.resample_hz:g}); stages would drift against windows"
        )
    rows = _table(root) if (root / TABLE).is_file() else _found(root)
    stamps = tuple(
        (path, (stat := path.stat()).st_size, stat.st_mtime_ns)
        for row in rows
        for path in (row["path"], row["stages"])
        if path is not None
    )
    return _opened(root, tuple(tuple(row.items()) for row in rows), config, stamps)


@functools.lru_cache(maxsize=2)
def _opened(root: Path, rows: tuple[Any, ...], config: SignalConfig, stamps: tuple[Any, ...]) -> SignalSet:
    known = [dict(row) for row in rows]
    channels = config.channels or _common_channels([row["path"] for row in known])
    recordings = tuple(_prepared(root, row, channels, config) for row in known)
    names = [plain_name(channel) for channel in channels]
    if len(set(names)) < len(names):
        raise ConfigError(f"signal.channels={', '.join(channels)}: names a channel twice")
    without = [recording.name for recording in recordings if recording.split is None]
    if without and len(without) < len(recordings):
        warnings.warn(
            f"{root}: {len(without)} of {len(recordings)} recordings have no split while others do, so they are left "
            f"out; the first: {without[0]}",
            stacklevel=2,
        )
    return SignalSet(root, recordings, tuple(channels), config)


def training_signals(signals: SignalSet) -> SignalSet:
    """What pretraining reads: the train split where there are splits, else all.

    Raises:
        DataError: if there are splits, but none is for training.
    """
    if not signals.splits:
        return signals
    return signals.subset("train")


def open_labelled_signals(
    data: str | Path, config: SignalConfig, *, split: str | None = None, seed: int = 0
) -> LabelledSignals:
    """Scored recordings in two parts, by subject.

    Args:
        data: as for :func:`open_signals`.
        config: how they are read.
        split: what to judge on; None takes test, else val, else a fifth of the subjects, chosen by the seed.
        seed: of that choice.

    Raises:
        DataError: if no recording has stages, or there are too few subjects; and as :func:`open_signals`.
    """
    signals = open_signals(data, config)
    scored = replace(
        signals,
        recordings=tuple(r for r in signals.recordings if r.stages is not None and (r.stages != UNDEFINED).any()),
    )
    if not scored.recordings:
        raise DataError(
            f"{signals.root}: no recording has sleep stages; they stand in STEM.stages.csv, Hypnogram_STEM.txt, "
            "STEM-Hypnogram.edf or in the EDF+ file itself"
        )
    _refuse_doubtful_subjects(scored)
    missing = len(signals.recordings) - len(scored.recordings)
    rest = f"; {missing} recordings without stages are left out" if missing else ""
    if scored.splits:
        judged = split or next((name for name in ("test", "val") if name in scored.splits), "test")
        train, test = scored.subset("train"), scored.subset(judged)
        note = f"train ({len(train.recordings)} recordings) and {judged} ({len(test.recordings)}){rest}"
        if both := set(train.subjects) & set(test.subjects):
            raise DataError(
                f"{signals.root}: subject {min(both)} is in train and in {judged}; a split is by subject; "
                f"if these are two people, say so in {TABLE} (columns file, subject, split)"
            )
        return LabelledSignals(train, test, note, split=judged)
    parts = split_subjects(scored.subjects, seed)
    judged = SPLITS.get(split or "test", split or "test")
    if judged not in parts or not parts[judged] or not parts["train"]:
        raise DataError(
            f"{signals.root}: {len(scored.subjects)} scored subjects can't be split into train and {judged} by subject"
        )
    counts = ", ".join(f"{name} {len(names)}" for name, names in parts.items())
    note = f"no splits found: subjects split by seed {seed} ({counts}), judged on {judged}{rest}"
    return LabelledSignals(scored.of_subjects(parts["train"]), scored.of_subjects(parts[judged]), note, split=judged)


def _refuse_doubtful_subjects(signals: SignalSet) -> None:
    """Files of one name in several folders: one person, or several? A split by subject must know."""
    places: dict[str, set[Path]] = {}
    for recording in signals.recordings:
        if recording.subject == recording.path.stem:  # nobody said who it is
            places.setdefault(recording.subject, set()).add(recording.path.parent)
    for subject, folders in sorted(places.items()):
        if len(folders) > 1:
            raise DataError(
                f"{signals.root}: {subject} lies in {len(folders)} folders, {min(folders).name} and others; is that "
                f"one person? Name subjects in {TABLE} (columns file, subject), or folders sub-NAME"
            )


def split_subjects(subjects: Sequence[str], seed: int) -> dict[str, tuple[str, ...]]:
    """Subjects for train, val and test, 70, 10 and 20 in a hundred; of few, one at least is for test and for train."""
    order = [subjects[i] for i in epoch_order(seed, 0, len(subjects))]
    num_test = min(max(1, round(_SHARES["test"] * len(order))), len(order) - 1)
    num_val = min(round(_SHARES["val"] * len(order)), len(order) - num_test - 1)
    train = order[num_test + num_val :]
    return {"train": tuple(train), "val": tuple(order[num_test : num_test + num_val]), "test": tuple(order[:num_test])}


def draw_subjects(signals: SignalSet, share: float, seed: int) -> SignalSet:
    """The recordings of a share of the subjects, one subject at least; smaller shares of one seed are parts of larger.

    Raises:
        ConfigError: if the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"{share:g} of the subjects: a share above 0 and at most 1 is needed")
    subjects = signals.subjects
    order = epoch_order(seed, 1, len(subjects))
    return signals.of_subjects(subjects[i] for i in order[: max(1, round(share * len(subjects)))])


class SignalViews:
    """Makes the views of a window: channels dropped, amplitude changed; nothing moves in time."""

    def __init__(self, channel_dropout: float = 0.1, amplitude: tuple[float, float] = (0.8, 1.2), count: int = 1):
        """
        Args:
            channel_dropout: chance that a channel is zero, in [0, 1); one channel at least stays.
            amplitude: smallest and largest factor, one draw for all channels.
            count: views of a window.

        Raises:
            ConfigError: for numbers outside their range.
        """
        if not 0 <= channel_dropout < 1:
            raise ConfigError(f"channel_dropout={channel_dropout:g}: a share in 0..1 (1 excluded) is needed")
        if not 0 < amplitude[0] <= amplitude[1]:
            raise ConfigError(f"amplitude={list(amplitude)}: 0 < smallest <= largest is needed")
        self.channel_dropout, self.amplitude, self.count = channel_dropout, amplitude, count

    @property
    def num_views(self) -> int:
        """Views of a window."""
        return self.count

    def __call__(self, image: Float[np.ndarray, "1 T C"], rng: np.random.Generator) -> SampleViews:
        """The views of one window.

        Args:
            image: from :meth:`SignalSet.read`.
            rng: source of all randomness.
        """
        _, samples, channels = image.shape
        crops = np.empty((self.count, *image.shape), np.float32)
        low, high = self.amplitude
        for view in crops:
            factor = low + (high - low) * rng.random()
            is_kept = np.greater_equal(rng.random(channels), self.channel_dropout)
            if not is_kept.any():
                is_kept[int(rng.random() * channels)] = True
            view[:] = image * (factor * is_kept).astype(np.float32)
        boxes = np.tile(np.array([0, 0, samples, 1], np.float32), (self.count, 1))
        return SampleViews((crops,), boxes, np.zeros(self.count, bool), (1, samples))


def prepare(
    values: Float[np.ndarray, "C S"], rate_hz: float, config: SignalConfig, where: str = "signal"
) -> Float[np.ndarray, "C R"]:
    """A whole recording ready for windows: band-pass without phase, resampled, robustly scaled, clipped; float32.

    Scaled by median and 1.4826 median absolute deviations of each channel; by the standard deviation where more than
    half of a channel is one value.

    Args:
        values: as recorded, any unit.
        rate_hz: of ``values``.
        config: band, rate and limit.
        where: what to name in errors.

    Raises:
        DataError: if a value is not finite, a channel is flat, or the rate leaves nothing of the band.
    """
    if not np.isfinite(values).all():
        channel, sample = np.argwhere(~np.isfinite(values))[0]
        count = int((~np.isfinite(values)).sum())
        raise DataError(
            f"{where}: {count} values are not finite, the first at {sample / rate_hz:.2f} s of channel {channel + 1}; "
            "cut them out or fill them"
        )
    high = min(config.high_hz, _LEAST_BAND_HZ * rate_hz, _LEAST_BAND_HZ * config.resample_hz)
    if high <= config.low_hz:
        raise DataError(f"{where}: {rate_hz:g} Hz leaves nothing between {config.low_hz:g} and {high:g} Hz")
    kind = ("bandpass", [config.low_hz, high]) if config.low_hz else ("lowpass", high)
    sections = dsp.butter(_FILTER_ORDER, kind[1], kind[0], fs=rate_hz, output="sos")
    try:
        filtered = dsp.sosfiltfilt(sections, values - np.median(values, axis=1, keepdims=True), axis=1)
    except ValueError as error:  # fewer samples than the filter looks back
        raise DataError(f"{where}: {values.shape[1]} samples are too few to be filtered ({error})") from None
    ratio = Fraction(config.resample_hz / rate_hz).limit_denominator(1000)
    if ratio != 1:
        filtered = dsp.resample_poly(filtered, ratio.numerator, ratio.denominator, axis=1)
    centred = filtered - np.median(filtered, axis=1, keepdims=True)
    robust = np.median(np.abs(centred), axis=1, keepdims=True) / _MAD_OF_NORMAL
    least: np.ndarray = 1e-9 * np.ptp(np.asarray(values), axis=1, keepdims=True)
    scale: np.ndarray = np.where(robust > least, robust, centred.std(axis=1, keepdims=True))
    is_flat: np.ndarray = (scale <= least)[:, 0]
    if is_flat.any():
        raise DataError(f"{where}: channel {int(is_flat.argmax()) + 1} is flat; choose others with signal.channels")
    return np.clip(centred / scale, -config.clip, config.clip).astype(np.float32)


def _prepared(root: Path, row: Mapping[str, Any], channels: Sequence[str], config: SignalConfig) -> Recording:
    """A recording, read and made ready."""
    path: Path = row["path"]
    raw = read_signal(path, channels)
    scoring = raw.scoring
    if row["stages"] is not None:
        known = raw.rate_hz or row["rate_hz"] or config.rate_hz
        seconds = raw.values.shape[1] / known if known else None
        scoring = read_scoring(row["stages"], config.stage_s or _label_seconds(row["stages"], seconds))
    rate_hz = _rate(path, raw.values.shape[1], raw.rate_hz, row["rate_hz"], scoring, config)
    seconds = raw.values.shape[1] / rate_hz
    if seconds + 1e-9 < config.window_s:
        raise DataError(f"{path}: lasts {seconds:.1f} s at {rate_hz:g} Hz, a window is {config.window_s:g} s")
    if scoring is not None and scoring.end_s < seconds / 2:
        warnings.warn(
            f"{path}: lasts {seconds:.0f} s, its stages {scoring.end_s:.0f} s; if labels are further apart than was "
            "assumed, set data.signal.stage_s",
            stacklevel=2,
        )
    signal = prepare(raw.values, rate_hz, config, str(path))
    count = signal.shape[1] // config.window
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
    return Recording(
        name,
        path,
        row["subject"] or subject_of(path),
        row["split"],
        np.ascontiguousarray(signal[:, : count * config.window]),
        None if scoring is None else scoring.windows(count, config.window_s),
    )


def _label_seconds(hypnogram: Path, seconds: float | None) -> float:
    """Seconds of a label in a file that does not say: 30; in a text 5, 10, 20 or 30, as it fits the recording."""
    if hypnogram.suffix.lower() != ".txt":
        return 30.0
    if seconds is None:
        if any(re.fullmatch(r"-?\d+|\[.*\]", line) is None for _, line in read_lines(hypnogram)):
            raise DataError(
                f"{hypnogram}: neither how long its labels last nor the recording's sampling rate is known; give "
                "data.signal.rate_hz or data.signal.stage_s"
            )
        return _LABELS_S[0]  # DREAMS's numbers
    fits = seconds / max(read_scoring(hypnogram, 1.0).end_s, 1.0)
    return next((length for length in _LABELS_S if math.isclose(fits, length, rel_tol=0.05)), _LABELS_S[0])


def _rate(
    path: Path,
    samples: int,
    own: float | None,
    listed: float | None,
    scoring: Scoring | None,
    config: SignalConfig,
) -> float:
    """The sampling rate of a recording, from whoever knows it; who contradict one another are refused."""
    for known in (own, listed):
        if known is not None and not (math.isfinite(known) and known > 0):
            raise DataError(f"{path}: a sampling rate of {known:g} Hz; a finite one above 0 is needed")
    rate = own or listed or config.rate_hz
    if own and listed and not math.isclose(own, listed, rel_tol=1e-3):
        raise DataError(f"{path}: says {own:g} Hz, {TABLE} says {listed:g} Hz")
    if own and config.rate_hz and not math.isclose(own, config.rate_hz, rel_tol=1e-3):
        raise DataError(f"{path}: says {own:g} Hz, signal.rate_hz={config.rate_hz:g}; leave it out for such files")
    if scoring is None or not scoring.end_s:
        if rate is None:
            raise DataError(
                f"{path}: does not say its sampling rate; give data.signal.rate_hz=HZ, or rate_hz in {TABLE}"
            )
        return rate
    fits = samples / scoring.end_s
    if rate is None:
        if not math.isclose(fits, round(fits), abs_tol=1e-6):
            raise DataError(
                f"{path}: does not say its sampling rate, and its stages don't fit one; give signal.rate_hz"
            )
        return float(round(fits))
    if scoring.scored_end_s > samples / rate + config.window_s + 1e-6:
        raise DataError(
            f"{path}: lasts {samples / rate:.0f} s at {rate:g} Hz, its stages {scoring.scored_end_s:.0f} s; "
            f"a rate of {samples / scoring.scored_end_s:g} Hz would fit"
        )
    return rate


def _common_channels(paths: Sequence[Path]) -> tuple[str, ...]:
    """Channels that look like EEG and that all files have, in the order of the first.

    Raises:
        DataError: if there is none.
    """
    names = channel_names(paths[0])
    common = [name for name in names if looks_like_eeg(name)]
    for path in paths[1:]:
        have = {plain_name(name) for name in channel_names(path)}
        left = [name for name in common if plain_name(name) in have]
        if not left:
            raise DataError(
                f"{path}: has none of the channels {', '.join(common) or names} of {paths[0].name}; it has: "
                f"{', '.join(channel_names(path))}; name what to read with data.signal.channels=A,B"
            )
        common = left
    if not common:
        raise DataError(
            f"{paths[0]}: no channel is named after an electrode; it has: {', '.join(names)}; name what to read with "
            "data.signal.channels=A,B"
        )
    return tuple(common)


def _found(root: Path) -> list[dict[str, Any]]:
    """Recordings below a folder; of one that lies there in several formats, the richest."""
    best: dict[Path, Path] = {}
    for path in sorted(root.rglob("*")):
        ending = path.suffix.lower()
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or ending not in ENDINGS or is_hypnogram(path) or not path.is_file():
            continue
        key = path.with_suffix("")
        if key not in best or ENDINGS.index(ending) < ENDINGS.index(best[key].suffix.lower()):
            best[key] = path
    # a text beside no stages and among richer files is a readme or a licence
    chosen = [p for p in best.values() if p.suffix.lower() not in TEXT or find_hypnogram(p) is not None]
    if not chosen:
        raise DataError(f"{root}: no recordings found (looked in all its folders for {', '.join(ENDINGS)})")
    return [
        {"path": path, "subject": "", "split": _split_of(path, root), "rate_hz": None, "stages": find_hypnogram(path)}
        for path in sorted(chosen)
    ]


def _split_of(path: Path, root: Path) -> str | None:
    """The split that the first folder names."""
    parts = path.relative_to(root).parts
    return SPLITS.get(parts[0]) if len(parts) > 1 else None


def _table(root: Path) -> list[dict[str, Any]]:
    """Recordings as ``recordings.csv`` lists them.

    Raises:
        DataError: if it can't be read, or a file that it names is missing.
    """
    table = root / TABLE
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = table_rows(table, reader)
            columns = [str(name).strip() for name in reader.fieldnames or ()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: can't be read ({error})") from None
    unknown = [name for name in columns if name not in _COLUMNS]
    if "file" not in columns or unknown:
        raise DataError(
            f"{table}: has the columns {', '.join(columns)}; file is needed, {', '.join(_COLUMNS)} are known"
        )
    if not rows:
        raise DataError(f"{table}: lists no recordings")
    result: list[dict[str, Any]] = []
    for number, row in enumerate(rows, 2):
        path, stages = root / row["file"], row.get("stages")
        for one in (path, *([root / stages] if stages else [])):
            if not one.is_file():
                raise DataError(f"{table}: line {number}: {one}: no such file")
        if path.suffix.lower() not in ENDINGS:
            raise DataError(f"{path}: not a recording that can be read; {', '.join(ENDINGS)} are known")
        split = row.get("split") or None
        if split is not None and split not in SPLITS:
            raise DataError(f"{table}: line {number}: split '{split}'; train, val or test is needed")
        try:
            rate_hz = float(row["rate_hz"]) if row.get("rate_hz") else None
        except ValueError:
            raise DataError(f"{table}: line {number}: rate_hz '{row['rate_hz']}' is no number") from None
        result.append(
            {
                "path": path,
                "subject": row.get("subject", ""),
                "split": SPLITS[split] if split else None,
                "rate_hz": rate_hz,
                "stages": root / stages if stages else find_hypnogram(path),
            }
        )
    return result


def _split_name(data: str | Path) -> tuple[Path, bool]:
    """``signals=PATH`` apart, and whether it was written; a path that exists is a path."""
    path = Path(data).expanduser()
    match = None if path.exists() else re.fullmatch(rf"{READER}=(.*)", str(data), re.DOTALL)
    return (Path(match[1]).expanduser(), True) if match else (path, False)


def as_read(known: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of training for reading recordings elsewhere: all but the window, since a stage has its own."""
    return {name: value for name, value in known.items() if name != "window_s"}


def check_window(config: SignalConfig, patch: int) -> None:
    """Refuse a window that patches don't divide.

    Raises:
        ShapeError: naming both, in samples.
    """
    if config.window % patch:
        raise ShapeError(
            f"windows are {config.window} samples ({config.window_s:g} s at {config.resample_hz:g} Hz), which patches "
            f"of {patch} samples don't divide; choose another encoder.patch_size or data.signal.window_s"
        )
