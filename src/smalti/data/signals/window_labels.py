"""Class labels of recordings: of parts of them from ``labels.csv``, or of whole ones from a table or their folders.

Times are seconds from the first sample. Time that no row covers has no class. What could be read
in two ways is refused.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smalti.data.images.splits import SPELLINGS, split_of
from smalti.data.signals.hypnograms import Scoring, table_rows
from smalti.errors import DataError

LABELS = "labels.csv"
_COLUMNS = ("file", "start_s", "end_s", "label")
_ROUNDING_S = 1e-6


class LabelledPart(NamedTuple):
    """A class from one second of a recording to another."""

    start_s: float
    end_s: float
    """Infinite: to the end."""
    label: str


def whole(label: str) -> tuple[LabelledPart, ...]:
    """The label of a whole recording."""
    return (LabelledPart(0.0, math.inf, label),)


def read_labels(root: Path) -> dict[Path, tuple[LabelledPart, ...]]:
    """Labelled parts of each recording that ``labels.csv`` names, in the order of time.

    Raises:
        DataError: if a row can't be used, or two of them give one second two classes.
    """
    table = root / LABELS
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = table_rows(table, reader)
            columns = [str(name).strip() for name in reader.fieldnames or ()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table}: can't be read ({error})") from None
    if sorted(columns) != sorted(_COLUMNS):
        raise DataError(
            f"{table}: has the columns {', '.join(columns)}; {', '.join(_COLUMNS)} are needed, no others (the label of "
            "a whole recording stands in recordings.csv, column label)"
        )
    if not rows:
        raise DataError(f"{table}: labels nothing")
    parts = defaultdict[Path, list[LabelledPart]](list)
    for number, row in enumerate(rows, 2):
        parts[root / row["file"]].append(_part(f"{table}: line {number}", row))
    return {path: _in_order(table, path, found) for path, found in parts.items()}


def _part(where: str, row: Mapping[str, str]) -> LabelledPart:
    try:
        start_s, end_s = float(row["start_s"]), float(row["end_s"])
    except ValueError:
        raise DataError(f"{where}: start_s '{row['start_s']}' and end_s '{row['end_s']}' must be seconds") from None
    if not 0 <= start_s < end_s < math.inf:
        raise DataError(f"{where}: from {start_s:g} to {end_s:g} s; 0 <= start_s < end_s is needed")
    if not row["label"]:
        raise DataError(f"{where}: has no label; leave the line out, time without a line has no class")
    return LabelledPart(start_s, end_s, row["label"])


def _in_order(table: Path, path: Path, parts: Iterable[LabelledPart]) -> tuple[LabelledPart, ...]:
    ordered = sorted(parts)
    latest = ordered[0]
    for part in ordered[1:]:
        if part.start_s < latest.end_s - _ROUNDING_S and part.label != latest.label:
            raise DataError(
                f"{table}: {path.name} is both {latest.label} and {part.label} from {part.start_s:g} s on; one class "
                "at a time is needed"
            )
        latest = max(latest, part, key=lambda one: one.end_s)
    return tuple(ordered)


def folder_label(root: Path, recording: Path) -> tuple[tuple[LabelledPart, ...], str | None]:
    """The label of a recording in ``CLASS/FILE`` or ``SPLIT/CLASS/FILE``, and its split.

    Raises:
        DataError: if it lies elsewhere.
    """
    folders = recording.relative_to(root).parts[:-1]
    split = split_of(folders[0]) if folders else None
    if len(folders) != 1 + (split is not None):
        raise DataError(
            f"{recording}: CLASS/FILE or SPLIT/CLASS/FILE is needed for data.signal.labels=folders, with a split "
            f"called {SPELLINGS}"
        )
    return whole(folders[-1]), split


def class_names(root: Path, labels: Iterable[str]) -> tuple[str, ...]:
    """The classes, in the order of their names; whole numbers in theirs.

    Raises:
        DataError: if two differ only by case or blanks.
    """
    names = set(labels)
    folded: dict[str, str] = {}
    for name in sorted(names):
        other = folded.setdefault("".join(name.casefold().split()), name)
        if other != name:
            raise DataError(f"{root}: has the classes '{other}' and '{name}'; are they one? Spell them alike")
    return tuple(sorted(names, key=int) if all(map(_is_whole, names)) else sorted(names))


def scoring_of(
    path: Path, parts: Sequence[LabelledPart], classes: Sequence[str], lasts_s: float, window_s: float
) -> Scoring:
    """Labelled parts as a scoring, whose stages are places in ``classes``.

    Args:
        path: of the recording.
        parts: in the order of time.
        classes: names of the classes.
        lasts_s: length of the recording, gaps included.
        window_s: length of a window, by which a part may end too late.

    Raises:
        DataError: if a part begins or ends after the recording.
    """
    for part in parts:
        if part.start_s >= lasts_s or (part.end_s < math.inf and part.end_s > lasts_s + window_s):
            raise DataError(
                f"{path}: lasts {lasts_s:g} s, but is labelled '{part.label}' from {part.start_s:g} to {part.end_s:g} "
                "s; start_s and end_s are seconds from its first sample"
            )
    starts, ends = (np.array(times) for times in ([one.start_s for one in parts], [one.end_s for one in parts]))
    places = np.array([classes.index(part.label) for part in parts], np.int64)
    return Scoring(starts, ends - starts, places, num_classes=len(classes))


def _is_whole(name: str) -> bool:
    return name.isascii() and name.isdigit()
