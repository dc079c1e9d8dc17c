"""Sets of signals: recordings cut into windows, such as nights of EEG in epochs of 30 s.

A window is an image of one row: ``(1, T, C)`` here, ``(C, 1, T)`` in a batch, so that encoder, loop and checkpoints are
those of images. Recordings are split by subject.
Letters: C channels, T samples of a window.
"""

import functools
import math
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from smalti.data.dataset import Kind, Labelled, names_fingerprint
from smalti.data.images.decode import ENDINGS as IMAGE_ENDINGS
from smalti.data.images.image_set import SPLIT_ORDER, SPLITS
from smalti.data.loader import epoch_order
from smalti.data.signals.hypnograms import STAGES, UNDEFINED
from smalti.data.signals.preparation import Recording, prepare_recording
from smalti.data.signals.recording_list import TABLE, RecordingList, list_recordings
from smalti.data.signals.recordings import common_channels, plain_name
from smalti.data.signals.signal_config import SignalConfig
from smalti.errors import ConfigError, DataError

READER = "signals"
"""As in ``--data signals=PATH``."""
_SHARES = {"test": 0.2, "val": 0.1}


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
        """What the stages are, one line."""
        return f"{', '.join(STAGES)}; S3 and S4 are N3; a window has the stage of most of its time"

    @functools.cached_property
    def stages(self) -> np.ndarray:
        """``(windows,)`` stage of each window, :data:`UNDEFINED` if there is none."""
        ends = np.concatenate([[0], self._ends])
        parts = [
            np.full(ends[i + 1] - ends[i], UNDEFINED) if recording.stages is None else recording.stages
            for i, recording in enumerate(self.recordings)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    @property
    def kind(self) -> Kind:
        """``signals``."""
        return "signals"

    @property
    def classes(self) -> None:
        """None: windows have sleep stages, no class labels."""

    @property
    def labels(self) -> None:
        """None: windows have sleep stages, no class labels."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Empty: results are resampled by recording."""
        return ()

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
        """One line for the log: recordings, subjects, splits, windows, channels, rates, gaps, stages."""
        counts = Counter(recording.split for recording in self.recordings)
        splits = ", ".join(f"{split} {counts[split]:,}" for split in self.splits)
        rates = sorted({rate for recording in self.recordings for rate in recording.rates_hz})
        recorded_h = sum(recording.recorded_s for recording in self.recordings) / 3600
        gapped = [recording for recording in self.recordings if recording.gaps_s]
        gaps_s = sum(recording.gaps_s for recording in gapped)
        return "; ".join(
            [
                f"{self.layout}: {_counted(len(self.recordings), 'recording')} of "
                f"{_counted(len(self.subjects), 'subject')}"
                f"{f' ({splits})' if splits else ''}",
                f"{_counted(len(self), 'window')} of {self.config.window_s:g} s at {self.config.resample_hz:g} Hz, "
                f"from {recorded_h:.1f} h recorded at {', '.join(f'{rate:g}' for rate in rates)} Hz",
                f"channels {', '.join(self.channels)}",
                *([f"{len(gapped):,} with gaps ({gaps_s:g} s in all)"] if gapped else []),
                self._stage_sources(),
            ]
        )

    def account(self) -> str:
        """:meth:`describe`, and what was left out."""
        return "; ".join([self.describe(), *([f"left out: {', '.join(self.left_out)}"] if self.left_out else [])])

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
    listing = list_recordings(root)
    stamps = tuple(
        (path, (stat := path.stat()).st_size, stat.st_mtime_ns)
        for one in listing.recordings
        for path in (one.path, one.hypnogram)
        if path is not None
    )
    return _opened(root, listing, config, stamps)


@functools.lru_cache(maxsize=2)
def _opened(root: Path, listing: RecordingList, config: SignalConfig, stamps: tuple[Any, ...]) -> SignalSet:
    channels = config.channels or common_channels([one.path for one in listing.recordings])
    names = [plain_name(channel) for channel in channels]
    if len(set(names)) < len(names):
        raise ConfigError(f"data.signal.channels={', '.join(channels)}: names a channel twice")
    recordings = tuple(prepare_recording(root, one, channels, config) for one in listing.recordings)
    _warn_of_faults(recordings)
    without = [recording.name for recording in recordings if recording.split is None]
    if without and len(without) < len(recordings):
        warnings.warn(
            f"{root}: {len(without)} of {len(recordings)} recordings have no split while others do, so they are left "
            f"out; the first: {without[0]}",
            stacklevel=2,
        )
    return SignalSet(root, recordings, tuple(channels), config, left_out=listing.left_out)


def _warn_of_faults(recordings: Sequence[Recording]) -> None:
    """One warning for each kind of fault, about the first recording that has it."""
    found = defaultdict[str, list[str]](list)
    for recording in recordings:
        for kind, text in recording.faults:
            found[kind].append(text)
    for texts in found.values():
        more = f" (the same in {_counted(len(texts) - 1, 'more recording')})" if len(texts) > 1 else ""
        warnings.warn(f"{texts[0]}{more}", stacklevel=3)


def open_labelled_signals(
    data: str | Path, config: SignalConfig, *, split: str | None = None, seed: int = 0
) -> Labelled[SignalSet]:
    """Scored recordings in two parts, by subject.

    Args:
        data: as for :func:`open_signals`.
        config: how they are read.
        split: split to evaluate on; None: test, else val, else a random 20 % of the subjects (seeded).
        seed: of that choice.

    Raises:
        DataError: if no recording has stages, or there are too few subjects; and as :func:`open_signals`.
    """
    try:
        signals = open_signals(data, config)
    except (ConfigError, DataError) as error:  # their settings are those of training
        raise type(error)(str(error).replace("data.signal.", "eval.signal.")) from None
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
        evaluated = split or next((name for name in ("test", "val") if name in scored.splits), "test")
        train, test = scored.subset("train"), scored.subset(evaluated)
        note = f"train ({len(train.recordings)} recordings) and {evaluated} ({len(test.recordings)}){rest}"
        if both := set(train.subjects) & set(test.subjects):
            raise DataError(
                f"{signals.root}: subject {min(both)} is in train and in {evaluated}; a split is by subject; "
                f"if these are two people, say so in {TABLE} (columns file, subject, split)"
            )
        return Labelled(train, test, STAGES, note, split=evaluated)
    parts = split_subjects(scored.subjects, seed)
    evaluated = SPLITS.get(split or "test", split or "test")
    if evaluated not in parts or not parts[evaluated] or not parts["train"]:
        raise DataError(
            f"{signals.root}: {len(scored.subjects)} scored subjects can't be split by subject into train and "
            f"{evaluated}"
        )
    counts = ", ".join(f"{name} {len(names)}" for name, names in parts.items())
    note = f"no splits found: subjects split by seed {seed} ({counts}), evaluated on {evaluated}{rest}"
    return Labelled(
        scored.of_subjects(parts["train"]), scored.of_subjects(parts[evaluated]), STAGES, note, split=evaluated
    )


def _refuse_doubtful_subjects(signals: SignalSet) -> None:
    """Files of one name in several folders: one person, or several? A split by subject must know."""
    places: dict[str, set[Path]] = {}
    for recording in signals.recordings:
        if recording.subject == recording.path.stem:  # the subject is unknown
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
    """The recordings of a fraction of the subjects, at least one; for a seed, smaller fractions are subsets of larger.

    Raises:
        ConfigError: if the fraction is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"{share:g} of the subjects: a fraction above 0 and at most 1 is needed")
    subjects = signals.subjects
    order = epoch_order(seed, 1, len(subjects))
    return signals.of_subjects(subjects[i] for i in order[: max(1, round(share * len(subjects)))])


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def _split_name(data: str | Path) -> tuple[Path, bool]:
    """``signals=PATH`` apart, and whether it was written; a path that exists is a path."""
    path = Path(data).expanduser()
    match = None if path.exists() else re.fullmatch(rf"{READER}=(.*)", str(data), re.DOTALL)
    return (Path(match[1]).expanduser(), True) if match else (path, False)
