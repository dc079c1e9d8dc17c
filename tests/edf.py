"""EDF, EDF+ and BDF files as small as they can be, written by hand: 256 bytes of header and as many for each signal.

Source: Kemp & Olivan, "European data format 'plus'", Clin. Neurophysiol. 114, 2003.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

_RANGE_UV = 1000.0
_TEXT_BYTES = 120
"""For annotations in each record."""

Stages = Sequence[tuple[float, float, str]]
"""Onset and duration in seconds, text."""


def write_edf(
    path: Path,
    signals: Mapping[str, np.ndarray] | Sequence[tuple[str, np.ndarray]],
    rate_hz: int | Sequence[int],
    *,
    stages: Stages = (),
    onsets: Sequence[float] | None = None,
    counted: int | None = None,
    start: str = "01.01.0000.00.00",
    limits_uv: tuple[float, float] = (-_RANGE_UV, _RANGE_UV),
    unit: str = "uV",
) -> Path:
    """Microvolts, whole seconds of them, in records of one second.

    Args:
        path: ends in ``.bdf`` for 24 bits a sample.
        signals: names and values; pairs where a name comes twice.
        rate_hz: of all signals, or of each.
        stages: as annotations, in the first record after the one before them.
        onsets: seconds of each record; makes the file EDF+D.
        counted: records by the header; None: those there are.
        start: date and time as in the header, ``dd.mm.yyhh.mm.ss``.
        limits_uv: physical limits in the header.
        unit: of all signals.
    """
    pairs = list(signals.items()) if isinstance(signals, Mapping) else list(signals)
    rates = [rate_hz] * len(pairs) if isinstance(rate_hz, int) else list(rate_hz)
    width = 3 if path.suffix.lower() == ".bdf" else 2
    top = 2 ** (8 * width - 1) - 1
    digital = [np.rint(np.clip(values, -_RANGE_UV, _RANGE_UV) / _RANGE_UV * top).astype("<i4") for _, values in pairs]
    seconds = len(digital[0]) // rates[0]
    is_plus = bool(stages) or onsets is not None
    names = [name for name, _ in pairs] + ["EDF Annotations"] * is_plus
    samples = rates + [_TEXT_BYTES // width] * is_plus
    reserved = "" if not is_plus else "EDF+C" if onsets is None else "EDF+D"
    waiting, content = list(stages), b""
    for second in range(seconds):
        for values, rate in zip(digital, rates, strict=True):
            part = np.ascontiguousarray(values[second * rate : (second + 1) * rate])
            content += part.view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
        if is_plus:
            text = f"+{second if onsets is None else onsets[second]:g}\x14\x14\x00".encode()
            if waiting:
                text += _annotation(*waiting.pop(0))
            content += text.ljust(_TEXT_BYTES, b"\x00")
    header = _header(names, samples, seconds if counted is None else counted, reserved, start, limits_uv, unit, top)
    path.write_bytes((b"\xffBIOSEMI" + header[8:] if width == 3 else header) + content)
    return path


def write_hypnogram(path: Path, stages: Stages, start: str = "01.01.0000.00.00") -> Path:
    """EDF+ annotations alone."""
    text = b"+0\x14\x14\x00" + b"".join(_annotation(*one) for one in stages)
    words = len(text) // 2 + 1
    header = _header(["EDF Annotations"], [words], 1, "EDF+C", start, (-1, 1), "", 32767)
    path.write_bytes(header + text.ljust(2 * words, b"\x00"))
    return path


def _annotation(onset: float, duration: float, text: str) -> bytes:
    return f"+{onset:g}\x15{duration:g}\x14{text}\x14\x00".encode()


def _header(
    names: Sequence[str],
    samples: Sequence[int],
    records: int,
    reserved: str,
    start: str,
    limits: tuple[float, float],
    unit: str,
    top: int,
) -> bytes:
    def cells(*values: tuple[object, int]) -> bytes:
        return b"".join(str(value).ljust(width)[:width].encode() for value, width in values)

    count = len(names)
    first = cells(("0", 8), ("X X X X", 80), ("Startdate 01-JAN-2000 X X X", 80), (start, 16))
    first += cells((256 * (count + 1), 8), (reserved, 44), (records, 8), (1, 8), (count, 4))
    rows: list[list[tuple[object, int]]] = [
        [(name, 16) for name in names],
        [("", 80)] * count,
        [(unit, 8)] * count,
        [(limits[0], 8)] * count,
        [(limits[1], 8)] * count,
        [(-top, 8)] * count,
        [(top, 8)] * count,
        [("", 80)] * count,
        [(number, 8) for number in samples],
        [("", 32)] * count,
    ]
    return first + b"".join(cells(*row) for row in rows)
