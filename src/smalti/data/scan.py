"""What is in a folder of images, before a run is spent on it: sizes, channels, damage, duplicates, leakage."""

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from smalti.data.folders import ImageSet
from smalti.data.images import ImageFacts, inspect_image
from smalti.data.views import Skipped
from smalti.errors import DataError
from smalti.reading import reading
from smalti.threads import usable_cores

_CHUNK = 1024
_SHOWN = 3
_FULL = 0.5  # part of the range of 16 bits below which a scale is proposed


@dataclass(frozen=True)
class ScanReport:
    """Facts about an image set; all files were decoded."""

    count: int
    """Images that were looked at, unreadable ones included."""
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
    duplicates: tuple[tuple[Path, ...], ...]
    """Groups of files with the same bytes."""
    shared: tuple[tuple[Path, Path], ...]
    """Files with the same bytes as one of the set compared with, and which."""
    against: Path | None = None

    @property
    def scale_hint(self) -> str:
        """What to set for values that fill a small part of their range, or leave it; empty where none do."""
        for kind, (low, high) in self.values.items():
            if kind == "uint16" and high < _FULL * 65535:
                bits = max(1, math.ceil(math.log2(high + 1)))
                return f"values reach {high:g} of 65535; data.scale=[0,{2**bits - 1}] spreads them ({bits} bits)"
            if kind != "uint16" and not (low >= 0 and high <= 1):
                needed = f"data.scale=[{low:g},{high:g}] or data.scale=percentiles"
                return f"values from {low:g} to {high:g} ({kind}); they need {needed}"
        return ""

    def lines(self) -> list[str]:
        """The report as text, a fact a line."""
        result = [f"images       {self.count:,} ({self.total_bytes / 2**20:,.1f} MiB)"]
        if self.count > len(self.unreadable):
            result += [
                f"size         height {_range(self.height)}, width {_range(self.width)} px",
                f"channels     {_counts(self.channels)}",
                f"bit depth    {_counts(self.bit_depths)}",
                f"format       {_counts(self.formats)}",
                *(f"values       {low:g} to {high:g} in {kind} files" for kind, (low, high) in self.values.items()),
            ]
        result.append(f"unreadable   {len(self.unreadable):,}")
        result += _some([f"{path}: {reason}" for path, reason in self.unreadable])
        extra = sum(len(group) - 1 for group in self.duplicates)
        result.append(f"duplicates   {extra:,} (same bytes as an earlier image)")
        result += _some([" = ".join(str(path) for path in group) for group in self.duplicates])
        if self.against is not None:
            result.append(f"shared       {len(self.shared):,} with {self.against}")
            result += _some([f"{mine} = {other}" for mine, other in self.shared])
        return result


def scan_images(
    images: ImageSet,
    *,
    against: ImageSet | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ScanReport:
    """Read every image once and say what there is.

    Args:
        images: what to look at.
        against: a second set, such as the one to evaluate on; images in both are reported.
        progress: called with (files read, files in all).
    """
    total = len(images) + (len(against) if against is not None else 0)
    done = 0
    found: list[_Found] = []
    others: dict[bytes, Path] = {}
    for file in _look_at(images.paths, images.pixels.max_pixels):
        found.append(file)
        done += 1
        if progress is not None:
            progress(done, total)
    for file in _look_at(against.paths if against is not None else (), None):
        if file.digest:
            others.setdefault(file.digest, file.path)
        done += 1
        if progress is not None:
            progress(done, total)
    groups: dict[bytes, list[Path]] = {}
    for file in found:
        if file.digest:
            groups.setdefault(file.digest, []).append(file.path)
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
        duplicates=tuple(tuple(group) for group in groups.values() if len(group) > 1),
        shared=tuple((path, others[key]) for key, group in groups.items() if key in others for path in group),
        against=against.root if against is not None else None,
    )


class _Found(NamedTuple):
    path: Path
    digest: bytes
    num_bytes: int
    facts: ImageFacts | str | None
    """A text says why the file can't be read; None where it wasn't decoded."""


def _look_at(paths: Sequence[Path], max_pixels: int | None) -> Iterator[_Found]:
    """Facts of each file, in order; decoding runs in threads, since OpenCV lets go of Python's lock. None: don't."""
    with ThreadPoolExecutor(max_workers=usable_cores()) as threads:
        for first in range(0, len(paths), _CHUNK):
            yield from threads.map(lambda path: _look_at_one(path, max_pixels), paths[first : first + _CHUNK])


def _look_at_one(path: Path, max_pixels: int | None) -> _Found:
    try:
        data = path.read_bytes()
    except OSError as error:
        return _Found(path, b"", 0, f"can't be read ({error.strerror or error})")
    digest = hashlib.sha256(data).digest() if data else b""  # empty files are no duplicates of one another
    if max_pixels is None:
        return _Found(path, digest, len(data), None)
    try:
        with reading(path, "an image"):
            return _Found(path, digest, len(data), inspect_image(data, max_pixels))
    except DataError as error:
        return _Found(path, digest, len(data), str(error).removeprefix(f"{path}: "))


def _values(facts: Sequence[ImageFacts]) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for fact in facts:
        if fact.values is not None:
            low, high = found.get(fact.kind, fact.values)
            found[fact.kind] = (min(low, fact.values[0]), max(high, fact.values[1]))
    return found


def _spread(values: Sequence[int]) -> tuple[int, float, int]:
    return (min(values), float(statistics.median(values)), max(values)) if values else (0, 0.0, 0)


def _range(spread: tuple[int, float, int]) -> str:
    low, median, high = spread
    return f"{low}" if low == high else f"{low} to {high} (median {median:g})"


def _counts(counts: dict[int, int] | dict[str, int]) -> str:
    return ", ".join(f"{value}: {count:,}" for value, count in counts.items())


def _some(texts: Sequence[str]) -> list[str]:
    more = [f"  ... and {len(texts) - _SHOWN:,} more"] if len(texts) > _SHOWN else []
    return [f"  {text}" for text in texts[:_SHOWN]] + more
