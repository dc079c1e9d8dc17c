"""Signals of recordings as they lie on disk: EDF, arrays, sound and text.

Nothing is filtered or resampled here; see :mod:`smalti.data.signals.preparation`.
Letters: C channels, S samples of one channel.
"""

import datetime
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smalti.data.signals import edf, sound
from smalti.data.signals.hypnograms import STAGES as STAGES
from smalti.data.signals.hypnograms import Codes, Labels, Scoring, parse_stages, stages_of
from smalti.errors import DataError

ARRAYS, TEXT = (".npz", ".npy"), (".csv", ".txt")
ENDINGS = (*edf.ENDINGS, *ARRAYS, *sound.ENDINGS, *TEXT)
"""Endings of recordings, the richer format first: it is taken where a recording lies there in several."""
_ELECTRODE = re.compile(r"(FP|AF|FT|FC|CP|TP|PO|F|C|T|P|O)(\d{1,2}|Z)(-.*)?")
_NO_VOLTS = ("%", "percent")
"""Units of a channel ``O2`` that is oxygen, not an electrode."""


@dataclass(frozen=True)
class Piece:
    """A part of a recording without a gap."""

    start_s: float
    """Seconds from the first sample of the recording."""
    values: tuple[np.ndarray, ...]
    """``(S,)`` float64 of each channel, in the file's unit; channels of other rates have other lengths."""


@dataclass(frozen=True)
class RawSignal:
    """Data of the selected channels in a file."""

    pieces: tuple[Piece, ...]
    """In the order of time."""
    rates_hz: tuple[float, ...] | None
    """Samples a second of each channel; None if the file doesn't say."""
    scoring: Scoring | Labels | None
    """Stages inside the file."""
    start: datetime.datetime | None = None
    """When the first sample was recorded; None if the file doesn't say."""
    missing_s: float | None = 0.0
    """Seconds at the end that the header counts and the file doesn't hold; None if the header doesn't count."""
    faults: tuple[tuple[str, str], ...] = ()
    """Kinds of what is doubtful about the file, each with a line for a warning."""


def plain_name(channel: str) -> str:
    """A channel's name as names are compared: ``EEG C3_A1``, ``[c3-a1]`` and ``C3-A1`` are one."""
    name = re.sub(r"[_/: ]+", "-", channel.strip().strip("[]").strip().upper())
    return re.sub(r"^(EEG-)+", "", name)


def looks_like_eeg(channel: str) -> bool:
    """Whether a name begins with an electrode of the 10-20 system, such as C3-M2 or Fpz-Cz, or was never given."""
    return bool(_ELECTRODE.fullmatch(plain_name(channel)) or re.fullmatch(r"CH\d+", plain_name(channel)))


def common_channels(paths: Sequence[Path]) -> tuple[str, ...]:
    """Channels that look like EEG and that all files have, in the order of the first; all that they have if they are
    sound, or arrays in which no channel is named after an electrode.

    Raises:
        DataError: if there is none, or a file has two of one name.
    """
    names = channel_names(paths[0])
    common = [name for name in _eeg_channels(paths[0]) if looks_like_eeg(name)]
    if not common and all(path.suffix.lower() in (*ARRAYS, *sound.ENDINGS) for path in paths):
        common = list(names)
    for path in paths[1:]:
        have = {plain_name(name) for name in _eeg_channels(path)}
        left = [name for name in common if plain_name(name) in have]
        if not left:
            raise DataError(
                f"{path}: has none of the channels {', '.join(common or names)} of {paths[0].name}; it has: "
                f"{', '.join(channel_names(path))}; name what to read with data.signal.channels=A,B"
            )
        common = left
    if not common:
        raise DataError(
            f"{paths[0]}: no channel is named after an electrode; it has: {', '.join(names)}; name what to read with "
            "data.signal.channels=A,B"
        )
    return tuple(common)


def channel_names(path: Path) -> tuple[str, ...]:
    """Names of the channels in a file, all different: ``C3-M2#1`` and ``C3-M2#2`` are two that the file calls C3-M2;
    ``ch1``, ``ch2``, ... where it has none.

    Raises:
        DataError: if the file can't be read.
    """
    if path.suffix.lower() in edf.ENDINGS:
        labels = tuple(channel.label for channel in edf.open_edf(path).channels)
        if not labels:
            raise DataError(
                f"{path}: holds annotations but no signal; if it is the hypnogram of STEM{path.suffix}, call it "
                f"STEM_hypnogram{path.suffix}"
            )
        return _numbered(labels)
    if path.suffix.lower() in sound.ENDINGS:
        return tuple(f"ch{i + 1}" for i in range(sound.open_sound(path).num_channels))
    if path.suffix.lower() in ARRAYS:
        array = _read_array(path)
        return _numbered(array.names or tuple(f"ch{i + 1}" for i in range(len(array.values))))
    return _numbered(_text_header(path)[0])


def read_signal(
    path: Path,
    channels: Sequence[str],
    codes: Codes | None = None,
    stage_s: float | None = None,
    *,
    with_stages: bool = True,
) -> RawSignal:
    """The selected channels of a file, in that order.

    Args:
        path: EDF or BDF, ``.npy`` (``(C, S)`` or ``(S,)``), ``.npz`` (``signal``, and ``rate_hz``, ``channels``,
            ``stages``, ``stage_s`` where they are known), WAV or FLAC, or ``.csv`` or ``.txt`` with a column a channel.
        channels: names, compared by :func:`plain_name`.
        codes: what bare numbers of stages mean in an ``.npz``; see :data:`~smalti.data.signals.hypnograms.CODES`.
        stage_s: seconds of a label where the file doesn't say.
        with_stages: False leaves out the stages inside the file.

    Raises:
        DataError: if the file can't be read, or lacks a channel or has two of its name; the text lists those it has.
    """
    names = channel_names(path)
    known = {plain_name(name): place for place, name in enumerate(names)}
    for channel in channels:
        if plain_name(channel) not in known:
            same = [name for name in names if plain_name(name).rpartition("#")[0] == plain_name(channel)]
            if same:
                raise DataError(
                    f"{path}: has {len(same)} channels named {channel}; say which with data.signal.channels, in their "
                    f"order in the file: {', '.join(same)}"
                )
            missing = [one for one in channels if plain_name(one) not in known]
            raise DataError(f"{path}: has no channel {', '.join(missing)}; it has: {', '.join(names)}")
    places = [known[plain_name(channel)] for channel in channels]
    if path.suffix.lower() in edf.ENDINGS:
        return _read_edf(path, places, stage_s, with_stages)
    if path.suffix.lower() in sound.ENDINGS:
        rate_hz = sound.open_sound(path).rate_hz
        return RawSignal((Piece(0.0, sound.read_sound(path, places)),), (rate_hz,) * len(places), None)
    if path.suffix.lower() in ARRAYS:
        array = _read_array(path)
        rates_hz = None if array.rate_hz is None else (array.rate_hz,) * len(places)
        stages = None if array.stages is None or not with_stages else parse_stages(path, array.stages, codes)
        labels = None if stages is None else Labels(path, stages, array.stage_s or stage_s)
        return RawSignal(
            (Piece(0.0, tuple(array.values[place].astype(np.float64) for place in places)),), rates_hz, labels
        )
    _, delimiter, skipped = _text_header(path)
    try:
        table = np.loadtxt(path, delimiter=delimiter, skiprows=skipped, ndmin=2, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a table of numbers ({error})") from None
    if table.shape[1] != len(names):
        raise DataError(f"{path}: has {table.shape[1]} columns of numbers under {len(names)} names")
    return RawSignal((Piece(0.0, tuple(table.T[places])),), None, None)


def _numbered(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Names with ``#1``, ``#2`` behind those that are compared as equal."""
    counts, seen = Counter(map(plain_name, labels)), Counter[str]()
    names = []
    for label in labels:
        seen[plain_name(label)] += 1
        names.append(f"{label}#{seen[plain_name(label)]}" if counts[plain_name(label)] > 1 else label)
    return tuple(names)


def _eeg_channels(path: Path) -> tuple[str, ...]:
    """Names of channels that may be of an electrode.

    Raises:
        DataError: if two that look like EEG have one name.
    """
    names = channel_names(path)
    if path.suffix.lower() in edf.ENDINGS:
        units = [channel.unit for channel in edf.open_edf(path).channels]
        names = tuple(name for name, unit in zip(names, units, strict=True) if unit.lower() not in _NO_VOLTS)
    doubled = [name for name in names if "#" in name and looks_like_eeg(re.sub(r"#\d+$", "", name))]
    if doubled:
        raise DataError(
            f"{path}: has channels of one name; say which to read with data.signal.channels, in their order in the "
            f"file: {', '.join(doubled)}"
        )
    return names


def _read_edf(path: Path, places: Sequence[int], stage_s: float | None, with_stages: bool) -> RawSignal:
    header = edf.open_edf(path)
    timeline = edf.read_timeline(header)
    channels = tuple(header.channels[place] for place in places)
    values = edf.read_channels(header, channels)
    first_s = float(timeline.onsets[0])
    pieces = [
        Piece(
            float(timeline.onsets[first]) - first_s,
            tuple(
                one[first * channel.samples : (first + count) * channel.samples]
                for one, channel in zip(values, channels, strict=True)
            ),
        )
        for first, count in timeline.pieces(header.record_s, max(channel.rate_hz for channel in channels))
    ]
    scoring = stages_of(path, timeline.annotations, stage_s) if with_stages else None
    counted = header.counted_records
    clipped = [channel.label for channel, one in zip(channels, values, strict=True) if edf.is_clipped(channel, one)]
    return RawSignal(
        tuple(pieces),
        tuple(channel.rate_hz for channel in channels),
        None if scoring is None else scoring.shifted(-first_s),
        None if header.start is None else header.start + datetime.timedelta(seconds=first_s),
        None if counted is None else (counted - header.num_records) * header.record_s,
        _faults(header, channels, clipped),
    )


def _faults(
    header: edf.EdfFile, channels: Sequence[edf.EdfChannel], clipped: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    read_s = header.num_records * header.record_s
    faults = []
    if header.counted_records is None:
        faults.append(("open", f"its header does not count its records (-1); the {read_s:g} s that it holds are read"))
    elif header.counted_records > header.held_records:
        missing_s = (header.counted_records - header.held_records) * header.record_s
        faults.append(
            ("short", f"ends {missing_s:g} s before its header says; the {read_s:g} s that it holds are read")
        )
    elif header.held_records > header.counted_records:
        more_s = (header.held_records - header.counted_records) * header.record_s
        faults.append(("long", f"holds {more_s:g} s more than its header says; they are left out"))
    if raw := [channel.label for channel in channels if not channel.is_calibrated]:
        faults.append(("raw", f"has no usable limits for {', '.join(raw)}; samples are read as they are stored"))
    if clipped:
        faults.append(
            ("clipped", f"a hundredth or more of {', '.join(clipped)} is at the limits of the converter (clipped)")
        )
    return tuple((kind, f"{header.path}: {text}") for kind, text in faults)


@dataclass(frozen=True)
class _Array:
    """What an array file holds; whatever isn't there is empty or None."""

    values: np.ndarray
    """``(C, S)`` of any type of numbers; of an npy file mapped into memory."""
    names: tuple[str, ...] = ()
    rate_hz: float | None = None
    stages: list[tuple[int, str]] | None = None
    """Number of each label from 1, and its text."""
    stage_s: float | None = None


def _read_array(path: Path) -> _Array:
    names: tuple[str, ...] = ()
    rate_hz, stages, stage_s = None, None, None
    try:
        if path.suffix.lower() == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
                if "signal" not in loaded:
                    raise DataError(f"{path}: has no array 'signal'; it has: {', '.join(loaded.files)}")
                values = loaded["signal"]
                names = tuple(map(str, loaded["channels"].ravel())) if "channels" in loaded else ()
                rate_hz = float(loaded["rate_hz"]) if "rate_hz" in loaded else None
                if "stages" in loaded:
                    stages = [(number, str(stage)) for number, stage in enumerate(loaded["stages"].ravel(), 1)]
                    stage_s = float(loaded["stage_s"]) if "stage_s" in loaded else None
        else:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
    except DataError:
        raise
    except Exception as error:  # a damaged archive raises many kinds
        raise DataError(f"{path}: can't be read as an array of numbers ({_first_line(error)})") from None
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "iuf":
        raise DataError(f"{path}: holds {values.dtype} of shape {values.shape}; numbers (channels, samples) are needed")
    if names and len(names) != len(values):
        raise DataError(f"{path}: has {len(names)} names for {len(values)} channels")
    if stage_s is not None and not 0 < stage_s < np.inf:
        raise DataError(f"{path}: has stage_s={stage_s:g}; seconds above 0 are needed")
    return _Array(values, names, rate_hz, stages, stage_s)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
