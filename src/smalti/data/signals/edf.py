"""EDF, EDF+ and BDF files: channels at their own sampling rates, gaps between records, annotations.

The header is checked against the size of the file before anything is allocated.

Sources: Kemp et al., "A simple format for exchange of digitized polygraphic recordings", 1992; Kemp & Olivan, "European
data format 'plus' (EDF+)", 2003; BioSemi's BDF is the same with 24-bit samples.
"""

import datetime
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from smalti.errors import DataError

ENDINGS = (".edf", ".bdf")
_ANNOTATIONS = ("EDF Annotations", "BDF Annotations")
_BLOCK_BYTES = 1 << 24
"""Of the file in memory at a time."""
_UNKNOWN_START = datetime.datetime(1985, 1, 1)
"""What EDF+ files have whose start isn't known or was removed."""
_CLIPPED = 0.01
"""Fraction of samples at the limits of the converter from which on a channel is reported."""
_ROUNDING_S = 1e-3
"""Onsets of records are texts, often rounded to a millisecond."""
_LATEST_S = 1e10
"""Onset of a record, 300 years after the start, that no recording has."""
_DRIFT_S = 0.1
"""How far onsets may drift from the samples within a piece."""
_WIDTHS = {  # columns of the header in their order, bytes for each signal
    "label": 16,
    "transducer": 80,
    "unit": 8,
    "physical_min": 8,
    "physical_max": 8,
    "digital_min": 8,
    "digital_max": 8,
    "filters": 80,
    "samples": 8,
    "reserved": 32,
}
_TIMED_LIST = re.compile(rb"([+-]\d+(?:\.\d*)?)(?:\x15(\d+(?:\.\d*)?))?\x14(.*)", re.DOTALL)


@dataclass(frozen=True)
class EdfChannel:
    """One signal of a file."""

    label: str
    unit: str
    """As the file writes it, such as ``uV``; may be empty."""
    rate_hz: float
    samples: int
    """In one record."""
    first_byte: int
    """Within a record."""
    digital: tuple[int, int]
    """Limits of the converter."""
    gain: float
    offset: float
    """Value in the file's unit = ``gain * sample + offset``; gain is below 0 if the polarity is inverted."""
    is_calibrated: bool
    """False where the header has no usable limits; samples are then read as they are stored."""


@dataclass(frozen=True)
class EdfFile:
    """The header of a file, checked."""

    path: Path
    channels: tuple[EdfChannel, ...]
    """Without annotations."""
    start: datetime.datetime | None
    """When onset 0 is; None if the header has no valid date and time."""
    record_s: float
    num_records: int
    """Whole records to read: those the header counts, as far as the file holds them."""
    counted_records: int | None
    """Records by the header; None if it says -1, unknown."""
    held_records: int
    """Whole records in the file."""
    is_discontinuous: bool
    """EDF+D: there may be time between records."""
    first_record: int = field(repr=False)
    """Its byte."""
    record_bytes: int = field(repr=False)
    sample_bytes: int = field(repr=False)
    """2, of BDF 3."""
    annotation_bytes: tuple[tuple[int, int], ...] = field(repr=False)
    """Where annotations lie within a record: first byte and number of bytes."""


@dataclass(frozen=True)
class Timeline:
    """When records were recorded, and what was annotated; seconds from the start in the header."""

    onsets: np.ndarray
    """``(records,)``."""
    annotations: tuple[tuple[float, float | None, str], ...]
    """Onset, duration (None if the file has none) and text."""

    def pieces(self, record_s: float, fastest_hz: float) -> tuple[tuple[int, int], ...]:
        """First record and number of records of each part without a gap.

        Args:
            record_s: of a record.
            fastest_hz: highest sampling rate; half a sample, or a millisecond, is no gap. Clocks that drift so slowly
                are set right by a new part every tenth of a second.
        """
        allowed = max(_ROUNDING_S, 0.5 / fastest_hz)
        late_s = self.onsets - np.arange(len(self.onsets)) * record_s
        firsts = [0]
        for record in range(1, len(late_s)):
            is_gap = abs(late_s[record] - late_s[record - 1]) > allowed
            if is_gap or abs(late_s[record] - late_s[firsts[-1]]) > _DRIFT_S:
                firsts.append(record)
        return tuple(
            (first, following - first) for first, following in zip(firsts, [*firsts[1:], len(self.onsets)], strict=True)
        )


def open_edf(path: Path) -> EdfFile:
    """The header of an EDF, EDF+ or BDF file.

    Raises:
        DataError: if the file is missing or its header contradicts itself or the size of the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(256)
            if len(head) < 256 or not re.fullmatch(rb"0[ \0]{7}|\xffBIOSEMI", head[:8]):
                raise DataError(f"{path}: can't be read as EDF (it doesn't begin with the header of one)")
            num_signals = _whole(path, head[252:256], "number of signals")
            header_bytes = 256 * (num_signals + 1)
            if num_signals < 1 or header_bytes > size or _whole(path, head[184:192], "size of header") != header_bytes:
                raise DataError(
                    f"{path}: can't be read as EDF (a header of {_text(head[184:192])} bytes for {num_signals} signals "
                    f"in a file of {size:,} bytes)"
                )
            columns = _columns(file.read(256 * num_signals), num_signals)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from None
    return _checked(path, size, head, header_bytes, columns)


def _checked(path: Path, size: int, head: bytes, header_bytes: int, columns: dict[str, list[bytes]]) -> EdfFile:
    sample_bytes = 3 if head[:1] == b"\xff" else 2
    record_s = _number(head[244:252])
    samples = [_whole(path, text, "samples in a record") for text in columns["samples"]]
    labels = [_text(label) for label in columns["label"]]
    has_signals = any(label not in _ANNOTATIONS for label in labels)
    if min(samples) < 1 or not math.isfinite(record_s) or record_s < 0 or (has_signals and not record_s):
        raise DataError(
            f"{path}: can't be read as EDF (records of {_text(head[244:252])} s with {min(samples)} samples or more)"
        )
    record_bytes = sample_bytes * sum(samples)
    held = (size - header_bytes) // record_bytes
    counted = _whole(path, head[236:244], "number of records")
    if held < 1 or counted == 0 or counted < -1:
        raise DataError(f"{path}: holds {held:,} whole records of data, its header counts {counted:,}")
    channels, annotations, place = [], [], 0
    for number, (label, count) in enumerate(zip(labels, samples, strict=True)):
        if label in _ANNOTATIONS:
            annotations.append((place, sample_bytes * count))
        else:
            row = {name: cells[number] for name, cells in columns.items()}
            channels.append(_channel(label, count, place, record_s, row))
        place += sample_bytes * count
    return EdfFile(
        path,
        tuple(channels),
        _start(head[168:176], head[176:184]),
        record_s,
        held if counted < 0 else min(held, counted),
        None if counted < 0 else counted,
        held,
        _text(head[192:197])[3:] == "+D",
        header_bytes,
        record_bytes,
        sample_bytes,
        tuple(annotations),
    )


def _channel(label: str, samples: int, place: int, record_s: float, row: dict[str, bytes]) -> EdfChannel:
    low, high = _number(row["physical_min"]), _number(row["physical_max"])
    digital_low, digital_high = _number(row["digital_min"]), _number(row["digital_max"])
    gain = (high - low) / (digital_high - digital_low) if digital_high != digital_low else 0.0
    offset = low - gain * digital_low
    is_calibrated = math.isfinite(gain) and math.isfinite(offset) and gain != 0
    has_limits = math.isfinite(digital_low) and math.isfinite(digital_high)
    return EdfChannel(
        label,
        _text(row["unit"]),
        samples / record_s,
        samples,
        place,
        (int(digital_low), int(digital_high)) if has_limits else (0, 0),
        gain if is_calibrated else 1.0,
        offset if is_calibrated else 0.0,
        is_calibrated,
    )


def read_channels(edf: EdfFile, channels: tuple[EdfChannel, ...]) -> tuple[Float[np.ndarray, "_"], ...]:
    """All samples of some channels, records one after the other, in the file's units.

    Raises:
        DataError: if the file ends too early.
    """
    values = tuple(np.empty(edf.num_records * channel.samples) for channel in channels)
    for first, block in _blocks(edf):
        for channel, into in zip(channels, values, strict=True):
            width = channel.samples * edf.sample_bytes
            stored = _integers(block[:, channel.first_byte : channel.first_byte + width], edf.sample_bytes)
            begin = first * channel.samples
            into[begin : begin + len(stored)] = channel.gain * stored + channel.offset
    return values


def is_clipped(channel: EdfChannel, values: Float[np.ndarray, " S"]) -> bool:
    """Whether a hundredth or more of a channel's values are at the limits of the converter."""
    low, high = sorted(channel.gain * limit + channel.offset for limit in channel.digital)
    rounding = abs(channel.gain) / 2
    at_limits = np.count_nonzero((values <= low + rounding) | (values >= high - rounding))
    return channel.is_calibrated and int(at_limits) >= _CLIPPED * len(values)


def read_timeline(edf: EdfFile) -> Timeline:
    """Onsets of records and annotations.

    Raises:
        DataError: if an EDF+D file does not say when its records begin, or they overlap; or one begins centuries late.
    """
    evenly = np.arange(edf.num_records) * edf.record_s
    if not edf.annotation_bytes:
        if edf.is_discontinuous:
            raise DataError(f"{edf.path}: is EDF+D, but has no annotations that say when its records begin")
        return Timeline(evenly, ())
    onsets, annotations = np.full(edf.num_records, np.nan), list[tuple[float, float | None, str]]()
    for first, block in _blocks(edf):
        for record, content in enumerate(block, first):
            for number, (place, width) in enumerate(edf.annotation_bytes):
                lists = content[place : place + width].tobytes().split(b"\x00")
                for tal, match in enumerate(map(_TIMED_LIST.fullmatch, lists)):
                    if match is None:
                        continue
                    onset = float(match[1])
                    if number == tal == 0:
                        onsets[record] = onset
                    duration = float(match[2]) if match[2] else None
                    texts = [text.decode(errors="replace") for text in match[3].split(b"\x14") if text]
                    annotations += [(onset, duration, text) for text in texts]
    is_ordered = bool((np.diff(onsets) >= edf.record_s - _ROUNDING_S).all()) and not np.isnan(onsets).any()
    if not is_ordered and edf.is_discontinuous:
        wrong = int(np.flatnonzero(~(np.diff(onsets, prepend=-np.inf) >= edf.record_s - _ROUNDING_S))[0])
        raise DataError(
            f"{edf.path}: is EDF+D, but record {wrong + 1} of {edf.num_records} has no onset or begins before the one "
            "before it ends"
        )
    first_onset = 0.0 if np.isnan(onsets[0]) else float(onsets[0])
    onsets = onsets if is_ordered else first_onset + evenly
    if (late := np.flatnonzero(~(np.abs(onsets) < _LATEST_S))).size:
        raise DataError(
            f"{edf.path}: record {late[0] + 1} of {edf.num_records} begins {onsets[late[0]]:g} s after the start in "
            f"the header; fewer than {_LATEST_S:g} s are needed"
        )
    return Timeline(onsets, tuple(annotations))


def _blocks(edf: EdfFile) -> Iterator[tuple[int, UInt8[np.ndarray, "R bytes"]]]:
    """Number of the first record, and the bytes of some; they never fill more than a block where a record doesn't."""
    at_once = max(1, _BLOCK_BYTES // edf.record_bytes)
    try:
        with edf.path.open("rb") as file:
            file.seek(edf.first_record)
            for first in range(0, edf.num_records, at_once):
                count = min(at_once, edf.num_records - first)
                content = file.read(count * edf.record_bytes)
                if len(content) < count * edf.record_bytes:
                    raise DataError(f"{edf.path}: was cut short while it was read")
                yield first, np.frombuffer(content, np.uint8).reshape(count, edf.record_bytes)
    except OSError as error:
        raise DataError(f"{edf.path}: can't be read ({error.strerror or error})") from None


def _integers(stored: UInt8[np.ndarray, "R bytes"], sample_bytes: int) -> Int[np.ndarray, " S"]:
    """Samples of one channel: little-endian integers of 2 or 3 bytes."""
    if sample_bytes == 2:
        return np.ascontiguousarray(stored).view("<i2").ravel()
    parts = stored.reshape(-1, 3).astype(np.int32)
    return (parts[:, 0] | parts[:, 1] << 8 | parts[:, 2] << 16) << 8 >> 8  # the sign stands in the highest byte


def _columns(content: bytes, num_signals: int) -> dict[str, list[bytes]]:
    columns, place = {}, 0
    for name, width in _WIDTHS.items():
        columns[name] = [content[place + i * width : place + (i + 1) * width] for i in range(num_signals)]
        place += num_signals * width
    return columns


def _text(field: bytes) -> str:
    try:
        text = field.decode()
    except UnicodeDecodeError:
        text = field.decode("latin-1")
    return "".join(c for c in text.partition("\0")[0] if c.isprintable()).strip()


def _number(field: bytes) -> float:
    """NaN if the field holds none."""
    try:
        return float(_text(field).replace(",", "."))
    except ValueError:
        return math.nan


def _whole(path: Path, field: bytes, what: str) -> int:
    number = _number(field)
    if not math.isfinite(number) or number != int(number):
        raise DataError(f"{path}: can't be read as EDF (its {what} is '{_text(field)}')")
    return int(number)


def _start(date: bytes, time: bytes) -> datetime.datetime | None:
    found = re.fullmatch(r"(\d\d?)\D(\d\d?)\D(\d\d) (\d\d?)\D(\d\d?)\D(\d\d?)", f"{_text(date)} {_text(time)}")
    if found is None:
        return None
    day, month, year, hour, minute, second = map(int, found.groups())
    try:
        start = datetime.datetime(year + (1900 if year >= 85 else 2000), month, day, hour, minute, second)
    except ValueError:
        return None
    return None if start == _UNKNOWN_START else start
