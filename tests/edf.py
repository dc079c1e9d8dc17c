"""EDF and EDF+ files as small as they can be, written by hand: the format is 256 bytes of heading and as many a signal.

Source: Kemp & Olivan, "European data format 'plus'", Clin. Neurophysiol. 114, 2003.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

_RANGE_UV = 1000.0


def write_edf(path: Path, signals: Mapping[str, np.ndarray], rate_hz: int) -> Path:
    """Microvolts, whole seconds of them, in records of one second."""
    seconds = len(next(iter(signals.values()))) // rate_hz
    digital = {
        name: np.rint(np.clip(values, -_RANGE_UV, _RANGE_UV) / _RANGE_UV * 32767).astype("<i2")
        for name, values in signals.items()
    }
    records = [values[s * rate_hz : (s + 1) * rate_hz].tobytes() for s in range(seconds) for values in digital.values()]
    heading = _heading(len(signals), seconds, 1, "", list(signals), rate_hz)
    path.write_bytes(heading + b"".join(records))
    return path


def write_hypnogram(path: Path, stages: Sequence[tuple[float, float, str]]) -> Path:
    """EDF+ annotations alone: (onset, duration, text) in seconds."""
    text = b"+0\x14\x14\x00" + b"".join(f"+{o:g}\x15{d:g}\x14{name}\x14".encode() + b"\x00" for o, d, name in stages)
    words = len(text) // 2 + 1
    heading = _heading(1, 1, 1, "EDF+C", ["EDF Annotations"], words)
    path.write_bytes(heading + text.ljust(2 * words, b"\x00"))
    return path


def _heading(count: int, records: int, duration_s: int, reserved: str, names: Sequence[str], samples: int) -> bytes:
    def cells(*values: tuple[object, int]) -> bytes:
        return b"".join(str(value).ljust(width)[:width].encode() for value, width in values)

    first = cells(
        (0, 8), ("X X X X", 80), ("Startdate 01-JAN-2000 X X X", 80), ("01.01.00", 8), ("00.00.00", 8)
    ) + cells((256 * (count + 1), 8), (reserved, 44), (records, 8), (duration_s, 8), (count, 4))
    rows: list[list[tuple[object, int]]] = [
        [(name, 16) for name in names],
        [("", 80)] * count,
        [("uV", 8)] * count,
        [(-_RANGE_UV, 8)] * count,
        [(_RANGE_UV, 8)] * count,
        [(-32767, 8)] * count,
        [(32767, 8)] * count,
        [("", 80)] * count,
        [(samples, 8)] * count,
        [("", 32)] * count,
    ]
    return first + b"".join(cells(*row) for row in rows)
