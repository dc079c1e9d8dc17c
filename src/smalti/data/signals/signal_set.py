"""Sets of signals: recordings cut into windows, such as nights of EEG in epochs of 30 s.

A window is an image of one row: ``(1, T, C)`` here, ``(C, 1, T)`` in a batch, so that encoder, loop and checkpoints are
those of images. Prepared recordings lie in a temporary file and are read by window. Recordings are split by subject.
Letters: C channels, T samples of a window.
"""

import contextlib
import functools
import math
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from smalti.data.dataset import Kind, names_fingerprint
from smalti.data.images.decode import ENDINGS as IMAGE_ENDINGS
from smalti.data.images.image_set import SPLIT_ORDER, SPLITS
from smalti.data.signals import edf, sound
from smalti.data.signals.hypnograms import STAGES, UNDEFINED
from smalti.data.signals.preparation import Recording, prepare_recording
from smalti.data.signals.recording_list import TABLE, RecordingList, has_labels, list_recordings
from smalti.data.signals.recordings import ARRAYS, common_channels, plain_name
from smalti.data.signals.signal_config import LabelSource, SignalConfig
from smalti.data.signals.signal_file import SignalFile
from smalti.errors import ConfigError, DataError

READER = "signals"
"""As in ``--data signals=PATH``."""
Target = Literal["stages", "classes"]
"""What a protocol predicts: sleep stages, or the user's classes."""


@dataclass(frozen=True)
class SignalSet:
    """Windows of recordings, one after the other, in an order that is the same on every machine."""

    root: Path
    recordings: tuple[Recording, ...] = field(repr=False)
    channels: tuple[str, ...]
    config: SignalConfig
    layout: str = READER
    left_out: tuple[str, ...] = ()
    """What lies there and isn't read, for :meth:`describe`."""
    classes: tuple[str, ...] | None = None
    """Classes of windows, apart from sleep stages; None without class labels."""
    target: Target = "stages"
    """What :attr:`targets` are."""

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
        """Subjects, sorted."""
        return tuple(sorted({recording.subject for recording in self.recordings}))

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that hold recordings, in the order train, val, test."""
        found = {recording.split for recording in self.recordings}
        return tuple(split for split in SPLIT_ORDER if split in found)

    @property
    def label_note(self) -> str:
        """What the targets are, one line."""
        if self.target == "stages":
            return f"{', '.join(STAGES)}; S3 and S4 are N3; a window has the stage of most of its time"
        return f"{', '.join(self.classes or ())}; a window has the class of most of its time"

    @functools.cached_property
    def stages(self) -> np.ndarray:
        """``(windows,)`` stage of each window, :data:`UNDEFINED` if there is none."""
        return self._of_windows([recording.stages for recording in self.recordings])

    @functools.cached_property
    def window_classes(self) -> np.ndarray:
        """``(windows,)`` place of each window's class in :attr:`classes`, :data:`UNDEFINED` if there is none."""
        return self._of_windows([recording.labels for recording in self.recordings])

    @property
    def targets(self) -> np.ndarray:
        """``(windows,)`` stages or classes."""
        return self.stages if self.target == "stages" else self.window_classes

    def _of_windows(self, values: Sequence[np.ndarray | None]) -> np.ndarray:
        """Values of the recordings one after the other, UNDEFINED where there are none."""
        counts = np.diff(self._ends, prepend=0)
        parts = [np.full(n, UNDEFINED) if one is None else one for n, one in zip(counts, values, strict=True)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    @property
    def kind(self) -> Kind:
        """``signals``."""
        return "signals"

    @property
    def labels(self) -> np.ndarray | None:
        """``(windows,)`` class of each window; None unless every window has one."""
        found = self.window_classes
        return found if self.classes is not None and (found != UNDEFINED).all() else None

    @property
    def groups(self) -> tuple[str, ...]:
        """Subject of each recording, if classes are predicted and some have several; else empty: results are resampled
        by recording."""
        has_several = self.target == "classes" and len(self.subjects) < len(self.recordings)
        return tuple(recording.subject for recording in self.recordings) if has_several else ()

    def training(self) -> "SignalSet":
        """The train split if there are splits, else all.

        Raises:
            DataError: if there are splits, but none is for training.
        """
        return self.subset("train") if self.splits else self

    def source(self, channels: int) -> "SignalSet":
        """The windows for the training loader."""
        return self

    def fingerprint(self) -> str:
        """Changes with the names, the order and the lengths of the recordings."""
        return names_fingerprint(f"{one.name} {one.signal.shape[1]}" for one in self.recordings)

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
        return np.array(cut.T, order="C")[None]  # a copy: what is mapped into memory can't be written to

    def is_scored(self, recording: Recording) -> bool:
        """Whether a recording has targets."""
        found = recording.stages if self.target == "stages" else recording.labels
        return found is not None and bool((found != UNDEFINED).any())

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
        """One line for the log: recordings, subjects, splits, windows, channels, rates, gaps, stages."""
        counts = Counter(recording.split for recording in self.recordings)
        splits = ", ".join(f"{split} {counts[split]:,}" for split in self.splits)
        rates = sorted({rate for recording in self.recordings for rate in recording.rates_hz})
        recorded_h = sum(recording.recorded_s for recording in self.recordings) / 3600
        gapped = [recording for recording in self.recordings if recording.gaps_s]
        gaps_s = sum(recording.gaps_s for recording in gapped)
        has_stages = any(recording.hypnogram is not None for recording in self.recordings)
        return "; ".join(
            [
                f"{self.layout}: {_counted(len(self.recordings), 'recording')} of "
                f"{_counted(len(self.subjects), 'subject')}"
                f"{f' ({splits})' if splits else ''}",
                f"{_counted(len(self), 'window')} of {self.config.window_s:g} s at {self.config.resample_hz:g} Hz, "
                f"from {recorded_h:.1f} h recorded at {', '.join(f'{rate:g}' for rate in rates)} Hz",
                f"channels {', '.join(self.channels)}",
                *([f"{len(gapped):,} with gaps ({gaps_s:g} s in all)"] if gapped else []),
                *([] if self.classes is not None and not has_stages else [self._stage_sources()]),
                *([self._class_counts()] if self.classes is not None else []),
            ]
        )

    def account(self) -> str:
        """:meth:`describe`, and what was left out."""
        return "; ".join([self.describe(), *([f"left out: {', '.join(self.left_out)}"] if self.left_out else [])])

    def _class_counts(self) -> str:
        """Classes with their numbers of windows."""
        counts = self.count_classes()
        without = len(self) - sum(counts.values())
        named = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        return f"classes {named}{f'; {without:,} windows without a class' if without else ''}"

    def count_classes(self) -> dict[str, int]:
        """Windows of each class."""
        return {name: int((self.window_classes == place).sum()) for place, name in enumerate(self.classes or ())}

    def _stage_sources(self) -> str:
        """How many recordings have stages, and where these are from."""
        beside = sum(one.hypnogram not in (None, one.path) for one in self.recordings)
        inside = sum(one.hypnogram == one.path for one in self.recordings)
        parts = [f"{beside:,} from hypnogram files"] * bool(beside) + [f"{inside:,} from the files"] * bool(inside)
        without = len(self.recordings) - beside - inside
        scored = int((self.stages != UNDEFINED).sum())
        if not parts:
            return "no stages"
        rest = f", {without:,} without" if without else ""
        return f"stages of {' and '.join(parts)}{rest}, {_counted(scored, 'scored window')}"


def is_signals(data: str | Path) -> bool:
    """Whether a path holds signals: it is named ``signals=PATH``, has a recordings.csv, or EDF files, arrays or sound
    come before any image when its folders are walked in order."""
    path, forced = _split_name(data)
    if forced or not path.is_dir():
        return forced
    if (path / TABLE).is_file():
        return True
    recordings = {ending.removeprefix(".") for ending in (*edf.ENDINGS, *ARRAYS, *sound.ENDINGS)}
    waiting = [os.fspath(path)]
    while waiting:
        endings, folders = set[str](), list[str]()
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as listing:
            for entry in listing:
                if entry.is_dir():
                    if not entry.is_symlink():
                        folders.append(entry.path)
                    continue
                ending = entry.name.rpartition(".")[2].lower()
                if ending in IMAGE_ENDINGS:
                    return False  # before a million others are listed
                endings.add(ending)
        if endings & recordings:
            return True
        waiting += sorted(folders, reverse=True)
    return False


def target_of(data: str | Path, config: SignalConfig | None = None) -> Target:
    """What is predicted of recordings unless a protocol is named: their classes if they have class labels, else sleep
    stages."""
    return "classes" if has_labels(_split_name(data)[0], config.labels if config else None) else "stages"


def as_read(known: Mapping[str, Any], data: str | Path, labels: LabelSource | None = None) -> dict[str, Any]:
    """Training settings for evaluating on recordings: all of them for class labels; for sleep stages all but the
    window, which is one stage long there.

    Args:
        known: ``data.signal`` of the training run.
        data: recordings to evaluate on.
        labels: ``eval.signal.labels``, if it is set.
    """
    config = SignalConfig(labels=labels or known.get("labels"))
    kept = target_of(data, config) == "classes"
    return {name: value for name, value in known.items() if kept or name != "window_s"}


def open_signals(data: str | Path, config: SignalConfig) -> SignalSet:
    """The recordings at a path, read, filtered, resampled and scaled; kept while files and settings stay as they are.

    Args:
        data: a folder of recordings (EDF, BDF, npy, npz, WAV, FLAC, csv, txt) with stages beside them, with a
            ``labels.csv`` (file, start_s, end_s, label), or with a ``recordings.csv`` (columns file, and subject,
            split, rate_hz, stages, label where they are known); ``signals=PATH`` says so.
        config: how they are read.

    Raises:
        DataError: if the path is missing, holds no recordings, or one of them can't be used; one line.
        ConfigError: for settings that don't fit together.
        MissingExtraError: for sound without soundfile.
    """
    root, listing = list_signals(data, config)
    stamps = tuple(
        (path, (stat := path.stat()).st_size, stat.st_mtime_ns)
        for one in listing.recordings
        for path in (one.path, one.hypnogram)
        if path is not None
    )
    return _opened(root, listing, config, stamps)


def list_signals(data: str | Path, config: SignalConfig) -> tuple[Path, RecordingList]:
    """The folder of recordings and what it holds, before any of them is read.

    Args:
        data: as for :func:`open_signals`.
        config: how recordings will be read.

    Raises:
        ConfigError, DataError: as :func:`open_signals`, for what can be seen from names and tables.
    """
    root, _ = _split_name(data)
    if not root.exists():
        raise DataError(f"{root}: no such file or folder")
    if not root.is_dir():
        raise DataError(f"{root}: a file; give the folder of the recordings")
    if not math.isclose(config.window_s * config.resample_hz, config.window, rel_tol=1e-9):
        raise ConfigError(
            f"data.signal.window_s={config.window_s:g} at {config.resample_hz:g} Hz is no whole number of samples "
            f"({config.window_s * config.resample_hz:g}); stages would drift against windows"
        )
    listing = list_recordings(root, config.labels)
    _refuse_sound_as_eeg(listing, config)
    return root, listing


@functools.lru_cache(maxsize=2)
def _opened(root: Path, listing: RecordingList, config: SignalConfig, stamps: tuple[Any, ...]) -> SignalSet:
    channels = config.channels or common_channels([one.path for one in listing.recordings])
    names = [plain_name(channel) for channel in channels]
    if len(set(names)) < len(names):
        raise ConfigError(f"data.signal.channels={', '.join(channels)}: names a channel twice")
    file, recordings = SignalFile(), list[Recording]()
    for one in listing.recordings:
        prepared = prepare_recording(root, one, channels, config, listing.classes or ())
        assert isinstance(prepared.signal, np.ndarray)
        recordings.append(replace(prepared, signal=file.append(prepared.signal)))
    _warn_of_faults(recordings)
    without = [recording.name for recording in recordings if recording.split is None]
    if without and len(without) < len(recordings):
        warnings.warn(
            f"{root}: {len(without)} of {len(recordings)} recordings have no split while others do, so they are left "
            f"out; the first: {without[0]}",
            stacklevel=2,
        )
    return SignalSet(
        root, tuple(recordings), tuple(channels), config, left_out=listing.left_out, classes=listing.classes
    )


def _refuse_sound_as_eeg(listing: RecordingList, config: SignalConfig) -> None:
    """The default band is that of EEG, of which sound has next to nothing."""
    default = SignalConfig()
    heard = next((one.path for one in listing.recordings if one.path.suffix.lower() in sound.ENDINGS), None)
    if heard is not None and (config.resample_hz, config.high_hz) == (default.resample_hz, default.high_hz):
        raise ConfigError(
            f"{heard}: is sound, but {config.low_hz:g} to {config.high_hz:g} Hz at {config.resample_hz:g} Hz are kept, "
            "as for EEG; set data.signal.resample_hz, low_hz, high_hz and window_s, such as "
            "data.signal.resample_hz=16000 data.signal.low_hz=50 data.signal.high_hz=7000 data.signal.window_s=1"
        )


def _warn_of_faults(recordings: Sequence[Recording]) -> None:
    """One warning for each kind of fault, about the first recording that has it."""
    found = defaultdict[str, list[str]](list)
    for recording in recordings:
        for kind, text in recording.faults:
            found[kind].append(text)
    for texts in found.values():
        more = f" (the same in {_counted(len(texts) - 1, 'more recording')})" if len(texts) > 1 else ""
        warnings.warn(f"{texts[0]}{more}", stacklevel=3)


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def _split_name(data: str | Path) -> tuple[Path, bool]:
    """``signals=PATH`` apart, and whether it was written; a path that exists is a path."""
    path = Path(data).expanduser()
    match = None if path.exists() else re.fullmatch(rf"{READER}=(.*)", str(data), re.DOTALL)
    return (Path(match[1]).expanduser(), True) if match else (path, False)
