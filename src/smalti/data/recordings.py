"""Recordings of signals as they lie on disk: EDF, arrays and text, and the sleep stages beside them.

Nothing is filtered or resampled here; see :mod:`smalti.data.signals`.
Letters: C channels, T samples, n labels.
"""

import csv
import importlib.util
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smalti.data.image_set import read_lines
from smalti.errors import DataError, MissingExtraError

STAGES = ("W", "N1", "N2", "N3", "REM")
"""Sleep stages of the AASM; stages 3 and 4 of Rechtschaffen and Kales are both N3."""
UNDEFINED = -1
"""Stage of what nobody scored, or scored as movement."""
EDF, ARRAYS, TEXT = (".edf", ".bdf"), (".npy", ".npz"), (".csv", ".txt")
ENDINGS = (*EDF, *ARRAYS, *TEXT)
"""Endings of recordings, the richer format first: it is taken where a recording lies there in several."""

_STAGE_NAMES = {"w": 0, "wake": 0, "1": 1, "n1": 1, "s1": 1, "2": 2, "n2": 2, "s2": 2, "3": 3, "n3": 3, "s3": 3}
_STAGE_NAMES |= {"4": 3, "n4": 3, "s4": 3, "r": 4, "rem": 4}
_STAGE_NAMES |= dict.fromkeys(("?", "m", "mt", "movement", "movement time", "undefined", "unscored", ""), UNDEFINED)
_DREAMS_CODES = {5: 0, 4: 4, 3: 1, 2: 2, 1: 3, 0: 3}
"""Whole numbers in text hypnograms, as the DREAMS databases have them."""
_HYPNOGRAM = re.compile(r"hypno|stages", re.IGNORECASE)
_ELECTRODE = re.compile(r"(FP|AF|FT|FC|CP|TP|PO|F|C|T|P|O)(\d{1,2}|Z)(-.*)?")
_BIDS = re.compile(r"sub-[A-Za-z0-9]+")
_SLEEP_EDF = re.compile(r"((?:SC|ST)\d{4})\w\d?-PSG", re.IGNORECASE)
"""Sleep-EDF Expanded: SC4012E0-PSG.edf is night 2 of subject 01, its stages are in SC4012E?-Hypnogram.edf."""


@dataclass(frozen=True)
class Scoring:
    """Who scored which stage from when to when; the rest is undefined."""

    onsets: np.ndarray
    """``(n,)`` seconds from the start of the recording."""
    durations: np.ndarray
    """``(n,)`` seconds."""
    stages: np.ndarray
    """``(n,)`` places in :data:`STAGES`, or :data:`UNDEFINED`."""

    @property
    def end_s(self) -> float:
        """Where the last label ends."""
        return float((self.onsets + self.durations).max(initial=0.0))

    @property
    def scored_end_s(self) -> float:
        """Where the last label ends that is a stage; files often close with a long undefined one."""
        is_stage = self.stages != UNDEFINED
        return float((self.onsets + self.durations)[is_stage].max(initial=0.0))

    def windows(self, count: int, window_s: float) -> np.ndarray:
        """``(count,)`` int64: the stage that covers most of each window; a tie goes to the first in :data:`STAGES`."""
        starts = np.arange(count) * window_s
        covered = np.zeros((count, len(STAGES)))
        for onset, duration, stage in zip(self.onsets, self.durations, self.stages, strict=True):
            if stage != UNDEFINED:
                shared = np.minimum(starts + window_s, onset + duration) - np.maximum(starts, onset)
                covered[:, stage] += shared.clip(0)
        covered = covered.round(6)
        undefined = window_s - covered.sum(1)
        return np.where(undefined > covered.max(1) + 1e-6, UNDEFINED, covered.argmax(1)).astype(np.int64)


@dataclass(frozen=True)
class RawSignal:
    """What a file holds of the channels that were asked for."""

    values: np.ndarray
    """``(C, T)`` float64, in the file's unit."""
    rate_hz: float | None
    """Samples a second; None where the file doesn't say."""
    scoring: Scoring | None
    """Stages inside the file."""


def is_hypnogram(path: Path) -> bool:
    """Whether a file's name says that it holds stages, not a signal."""
    return bool(_HYPNOGRAM.search(path.name))


def plain_name(channel: str) -> str:
    """A channel's name as names are compared: ``EEG C3_A1``, ``[c3-a1]`` and ``C3-A1`` are one."""
    name = re.sub(r"[_/: ]+", "-", channel.strip().strip("[]").strip().upper())
    return re.sub(r"^(EEG-)+", "", name)


def looks_like_eeg(channel: str) -> bool:
    """Whether a name begins with an electrode of the 10-20 system, such as C3-M2 or Fpz-Cz, or was never given."""
    return bool(_ELECTRODE.fullmatch(plain_name(channel)) or re.fullmatch(r"CH\d+", plain_name(channel)))


def channel_names(path: Path) -> tuple[str, ...]:
    """Names of the channels in a file; ``ch1``, ``ch2``, ... where it has none.

    Raises:
        DataError: if the file can't be read.
        MissingExtraError: for an EDF file without the package mne.
    """
    if path.suffix.lower() in EDF:
        return tuple(_open_edf(path, None).ch_names)
    if path.suffix.lower() in ARRAYS:
        values, names, _, _ = _read_array(path)
        return names or tuple(f"ch{i + 1}" for i in range(len(values)))
    return _text_header(path)[0]


def read_signal(path: Path, channels: Sequence[str]) -> RawSignal:
    """The channels of a file that are asked for, in that order.

    Args:
        path: EDF or BDF, ``.npy`` (``(C, T)`` or ``(T,)``), ``.npz`` (``signal``, and ``rate_hz``, ``channels``,
            ``stages``, ``stage_s`` where they are known), or ``.csv`` or ``.txt`` with a column a channel.
        channels: names, compared by :func:`plain_name`.

    Raises:
        DataError: if the file can't be read, or lacks a channel; the text lists those it has.
        MissingExtraError: for an EDF file without the package mne.
    """
    names = channel_names(path)
    known = {plain_name(name): place for place, name in reversed(tuple(enumerate(names)))}
    missing = [channel for channel in channels if plain_name(channel) not in known]
    if missing:
        raise DataError(f"{path}: has no channel {', '.join(missing)}; it has: {', '.join(names)}")
    places = [known[plain_name(channel)] for channel in channels]
    if path.suffix.lower() in EDF:
        wanted = [names[place] for place in places]
        raw = _open_edf(path, wanted)
        values = raw.get_data(picks=wanted)
        return RawSignal(values, float(raw.info["sfreq"]), _scoring_of(raw.annotations))
    if path.suffix.lower() in ARRAYS:
        values, _, rate_hz, scoring = _read_array(path)
        return RawSignal(values[places], rate_hz, scoring)
    _, delimiter, skipped = _text_header(path)
    try:
        table = np.loadtxt(path, delimiter=delimiter, skiprows=skipped, ndmin=2, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a table of numbers ({error})") from None
    return RawSignal(table.T[places], None, None)


def find_hypnogram(recording: Path) -> Path | None:
    """The file of stages beside a recording; None where there is none.

    Looked for: ``STEM.stages.csv``, ``STEM_hypnogram.EXT``, ``STEM-Hypnogram.EXT``, ``Hypnogram_STEM.EXT`` (DREAMS),
    EXT one of txt, csv, edf, and Sleep-EDF's own names.
    """
    stem, folder = recording.stem, recording.parent
    forms = ("{}.stages", "{}_stages", "{}_hypnogram", "{}-Hypnogram", "{}_Hypnogram", "Hypnogram_{}", "hypnogram_{}")
    for form in forms:
        for ending in (".csv", ".txt", ".edf"):
            path = folder / (form.format(stem) + ending)
            if path.is_file():
                return path
    if match := _SLEEP_EDF.fullmatch(stem):
        return next(iter(sorted(folder.glob(f"{match[1]}*-Hypnogram.edf"))), None)
    return None


def subject_of(recording: Path) -> str:
    """Who was recorded, as the path says: BIDS's ``sub-NAME`` in the file or a folder, Sleep-EDF's names, which hold
    subject and night; others are one each."""
    for part in (recording.stem, *(folder.name for folder in recording.parents)):
        if found := _BIDS.match(part):
            return found[0]
    match = _SLEEP_EDF.fullmatch(recording.stem)
    return match[1][:5].upper() if match else recording.stem


def read_scoring(path: Path, stage_s: float) -> Scoring:
    """Stages from a file: EDF+ annotations, a CSV table, or a text with a label a line.

    A CSV table has the columns ``stage`` and, where labels aren't ``stage_s`` apart, ``onset_s`` and ``duration_s``. A
    text has names of stages or DREAMS's numbers (5 wake, 4 REM, 3..0 stages 1 to 4), and may have a heading in
    brackets.

    Args:
        path: of the stages.
        stage_s: seconds of a label, where the file doesn't say.

    Raises:
        DataError: if the file can't be read or holds an unknown stage.
        MissingExtraError: for an EDF file without the package mne.
    """
    if path.suffix.lower() in EDF:
        mne = _mne()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                annotations = mne.read_annotations(path)
        except Exception as error:  # mne raises many kinds for a damaged file
            raise DataError(f"{path}: can't be read as EDF+ annotations ({_first_line(error)})") from None
        scoring = _scoring_of(annotations)
        if scoring is None:
            raise DataError(f"{path}: has no annotations of sleep stages")
        return scoring
    lines = read_lines(path)
    if path.suffix.lower() == ".csv" and lines and "stage" in [c.strip() for c in lines[0][1].split(",")]:
        return _scoring_table(path, stage_s)
    stages = [_stage(path, number, line) for number, line in lines if not re.fullmatch(r"\[.*\]", line)]
    if not stages:
        raise DataError(f"{path}: an empty hypnogram; it needs one stage a line")
    return _evenly(np.array(stages), stage_s)


def _evenly(stages: np.ndarray, stage_s: float) -> Scoring:
    return Scoring(np.arange(len(stages)) * stage_s, np.full(len(stages), stage_s), stages.astype(np.int64))


def _scoring_table(path: Path, stage_s: float) -> Scoring:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = table_rows(path, csv.DictReader(file))
    stages = np.array([_stage(path, number, row["stage"]) for number, row in enumerate(rows, 2)])
    if not len(stages):
        raise DataError(f"{path}: an empty hypnogram; it needs one stage a line")
    if "onset_s" not in rows[0]:
        return _evenly(stages, stage_s)
    try:
        onsets = np.array([float(row["onset_s"]) for row in rows])
        durations = np.array([float(row.get("duration_s") or stage_s) for row in rows])
    except ValueError as error:
        raise DataError(f"{path}: onset_s and duration_s must be seconds ({error})") from None
    return Scoring(onsets, durations, stages.astype(np.int64))


def table_rows(path: Path, reader: "csv.DictReader[str]") -> list[dict[str, str]]:
    """Rows of a table without blanks around cells.

    Raises:
        DataError: for a row with more cells than there are columns.
    """
    rows = []
    for number, row in enumerate(reader, 2):
        if None in row:
            raise DataError(f"{path}: line {number} has more cells than the {len(row) - 1} columns of the first line")
        rows.append({str(name).strip(): (value or "").strip() for name, value in row.items()})
    return rows


def _stage(path: Path, number: int, text: str) -> int:
    """A stage by its name, or by DREAMS's number in a text (negative numbers are undefined there)."""
    name = text.strip().lower()
    if path.suffix.lower() == ".txt" and re.fullmatch(r"-?\d+", name):
        if int(name) < 0 or int(name) in _DREAMS_CODES:
            return _DREAMS_CODES.get(int(name), UNDEFINED)
    elif name in _STAGE_NAMES:
        return _STAGE_NAMES[name]
    raise DataError(
        f"{path}: line {number} holds '{text}', which is no sleep stage; {', '.join(STAGES)} or ? are known"
    )


def _scoring_of(annotations: Any) -> Scoring | None:
    """The sleep stages among EDF+ annotations; None where there are none."""
    found = []
    for onset, duration, text in zip(annotations.onset, annotations.duration, annotations.description, strict=True):
        name = re.sub(r"^sleep[ _-]?stage[ _-]*|^stage[ _-]*", "", str(text).strip().lower())
        is_stage = name != str(text).strip().lower() or name in ("movement time", *(s.lower() for s in STAGES))
        if is_stage and name in _STAGE_NAMES:
            found.append((float(onset), float(duration), _STAGE_NAMES[name]))
    if not found:
        return None
    onsets, durations, stages = (np.array(column) for column in zip(*found, strict=True))
    return Scoring(onsets, durations, stages.astype(np.int64))


def _mne() -> Any:
    """The package, imported where an EDF file is met: it takes a second."""
    if importlib.util.find_spec("mne") is None:
        raise MissingExtraError('EDF files are read by mne: pip install "smalti[eeg]"')
    import mne

    return mne


def _open_edf(path: Path, channels: Sequence[str] | None) -> Any:
    """An mne ``Raw``; with ``channels`` those are read, else the heading alone."""
    mne = _mne()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # headings of real files are full of small sins
            read = mne.io.read_raw_bdf if path.suffix.lower() == ".bdf" else mne.io.read_raw_edf
            if channels is None:
                return read(path, preload=False, verbose="error")
            return read(path, preload=True, include=list(channels), verbose="error")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # mne raises many kinds for a damaged file
        raise DataError(f"{path}: can't be read as EDF ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _read_array(path: Path) -> tuple[np.ndarray, tuple[str, ...], float | None, Scoring | None]:
    """Values ``(C, T)``, names of channels, rate and stages; whatever isn't there is empty or None."""
    names: tuple[str, ...] = ()
    rate_hz, scoring = None, None
    try:
        if path.suffix.lower() == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
                if "signal" not in loaded:
                    raise DataError(f"{path}: has no array 'signal'; it has: {', '.join(loaded.files)}")
                values = loaded["signal"]
                names = tuple(map(str, loaded["channels"].ravel())) if "channels" in loaded else ()
                rate_hz = float(loaded["rate_hz"]) if "rate_hz" in loaded else None
                if "stages" in loaded:
                    stage_s = float(loaded["stage_s"]) if "stage_s" in loaded else 30.0
                    stages = [_stage(path, number, str(s)) for number, s in enumerate(loaded["stages"].ravel(), 1)]
                    scoring = _evenly(np.array(stages), stage_s)
        else:
            values = np.load(path, allow_pickle=False)
    except DataError:
        raise
    except Exception as error:  # a damaged archive raises many kinds
        raise DataError(f"{path}: can't be read as an array of numbers ({_first_line(error)})") from None
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "iuf":
        raise DataError(f"{path}: holds {values.dtype} of shape {values.shape}; numbers (channels, samples) are needed")
    if names and len(names) != len(values):
        raise DataError(f"{path}: has {len(names)} names for {len(values)} channels")
    return values.astype(np.float64), names, rate_hz, scoring


def _text_header(path: Path) -> tuple[tuple[str, ...], str | None, int]:
    """Names of the columns, what parts them (None: blanks), and how many lines come before the numbers."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as text ({error})") from None
    delimiter = next((sign for sign in ",;\t" if sign in first), None)
    cells = [cell.strip() for cell in first.split(delimiter)]
    try:
        [float(cell) for cell in cells]
    except ValueError:
        return tuple(cell.strip("[]") for cell in cells), delimiter, 1
    return tuple(f"ch{i + 1}" for i in range(len(cells))), delimiter, 0
