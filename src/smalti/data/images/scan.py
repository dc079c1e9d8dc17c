"""What image files hold, all of them read and decoded once: sizes, channels, values, damage."""

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smalti.data.archives.members import read_bytes
from smalti.data.images.decode import ImageFacts, inspect_image
from smalti.data.images.near_duplicates import reduce_picture
from smalti.data.views import Skipped
from smalti.errors import DataError
from smalti.reading import reading
from smalti.threads import usable_cores

_CHUNK = 1024
_FULL = 0.5  # part of the range of 16 bits below which a scale is proposed


class ScannedImage(NamedTuple):
    """An image file that was read."""

    path: Path
    digest: bytes
    """SHA-256 of its bytes; empty if there are none."""
    num_bytes: int
    facts: ImageFacts | str
    """A text says why the file can't be read."""
    picture: np.ndarray | None
    """``(16, 16, 3)`` uint8, see :func:`~smalti.data.images.near_duplicates.reduce_picture`."""


@dataclass(frozen=True)
class ScanReport:
    """Facts about image files; all were decoded."""

    count: int
    """Number of scanned images, including unreadable ones."""
    total_bytes: int
    height: tuple[int, float, int]
    """Smallest, median, largest, in pixels; zeros if no image can be read."""
    width: tuple[int, float, int]
    channels: dict[int, int]
    """``{channels: images}``, the most frequent first; also below."""
    bit_depths: dict[int, int]
    values: dict[str, tuple[float, float]]
    """Type of the values -> smallest and largest one, of files that aren't 8 bits unsigned."""
    formats: dict[str, int]
    """By content, whatever the file's ending."""
    unreadable: tuple[Skipped, ...]
    set_channels: int
    """``data.channels`` as it is set."""
    wrong_channels: tuple[Skipped, ...]
    """Images that it does not read, and their channels."""
    best_channels: int
    """The ``data.channels`` that reads the most images; the one that is set, where it reads as many."""

    @property
    def scale_hint(self) -> str:
        """Suggested setting for values that use a small part of their range, or exceed it; empty if none do."""
        for kind, (low, high) in self.values.items():
            if kind == "uint16" and high < _FULL * 65535:
                bits = max(1, math.ceil(math.log2(high + 1)))
                return f"values reach {high:g} of 65535; data.scale=[0,{2**bits - 1}] spreads them ({bits} bits)"
            if kind != "uint16" and not (low >= 0 and high <= 1):
                needed = f"data.scale=[{low:g},{high:g}] or data.scale=percentiles"
                return f"values from {low:g} to {high:g} ({kind}); they need {needed}"
        return ""


def scan_files(paths: Sequence[Path], max_pixels: int) -> Iterator[ScannedImage]:
    """Read each file once, in order; decoding runs in threads, since OpenCV lets go of Python's lock."""
    with ThreadPoolExecutor(max_workers=usable_cores()) as threads:
        for first in range(0, len(paths), _CHUNK):
            yield from threads.map(lambda path: _scan_file(path, max_pixels), paths[first : first + _CHUNK])


def summarise(found: Sequence[ScannedImage], channels: int = 3) -> ScanReport:
    """What the files hold, counted; ``channels`` is the ``data.channels`` that would read them."""
    facts = [file.facts for file in found if isinstance(file.facts, ImageFacts)]
    return ScanReport(
        count=len(found),
        total_bytes=sum(file.num_bytes for file in found),
        height=_spread([fact.height for fact in facts]),
        width=_spread([fact.width for fact in facts]),
        channels=dict(Counter(fact.channels for fact in facts).most_common()),
        bit_depths=dict(Counter(fact.bits for fact in facts).most_common()),
        values=_values(facts),
        formats=dict(Counter(fact.format for fact in facts).most_common()),
        unreadable=tuple(Skipped(file.path, file.facts) for file in found if isinstance(file.facts, str)),
        set_channels=channels,
        wrong_channels=tuple(
            Skipped(file.path, f"{file.facts.channels} channel{'s' * (file.facts.channels > 1)}")
            for file in found
            if isinstance(file.facts, ImageFacts) and not _is_read(file.facts, channels)
        ),
        best_channels=_best_channels(facts, channels),
    )


def _scan_file(path: Path, max_pixels: int) -> ScannedImage:
    try:
        data = read_bytes(path)
    except OSError as error:
        return ScannedImage(path, b"", 0, f"can't be read ({error.strerror or error})", None)
    except DataError as error:
        return ScannedImage(path, b"", 0, str(error).removeprefix(f"{path}: "), None)
    digest = hashlib.sha256(data).digest() if data else b""  # empty files are no copies of one another
    try:
        with reading(path, "an image"):
            facts, image = inspect_image(data, max_pixels)
            if facts.values is not None and not all(map(math.isfinite, facts.values)):
                raise DataError("pixels that are not finite")
            return ScannedImage(path, digest, len(data), facts, reduce_picture(image))
    except DataError as error:
        return ScannedImage(path, digest, len(data), str(error).removeprefix(f"{path}: "), None)


def _best_channels(facts: Sequence[ImageFacts], channels: int) -> int:
    candidates = [channels, 3, *sorted({fact.channels for fact in facts})]
    return max(candidates, key=lambda channels: sum(_is_read(fact, channels) for fact in facts))


def _is_read(fact: ImageFacts, channels: int) -> bool:
    return fact.channels == channels or (fact.is_picture and channels in (1, 3))


def _values(facts: Sequence[ImageFacts]) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for fact in facts:
        if fact.values is not None:
            low, high = found.get(fact.kind, fact.values)
            found[fact.kind] = (min(low, fact.values[0]), max(high, fact.values[1]))
    return found


def _spread(values: Sequence[int]) -> tuple[int, float, int]:
    return (min(values), float(statistics.median(values)), max(values)) if values else (0, 0.0, 0)
