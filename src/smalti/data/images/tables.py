"""Images named by a file: a list of paths, perhaps with labels, or a table of path, label, split and group."""

import csv
import json
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smalti.data.images.image_set import ImageSample, ImageSet, as_text, expand_home, read_lines
from smalti.data.images.splits import SPELLINGS, split_of
from smalti.errors import DataError
from smalti.reading import check_columns, shorten

TABLES = (".csv", ".jsonl", ".parquet")
"""Endings of the tables that are read, in lower case."""
COLUMNS = ("path", "label", "split", "group")

Row = dict[str, str]


def read_list(path: Path) -> ImageSet:
    """A text file with one path a line, relative to it or absolute; or with a path and a label, parted by a comma, a
    tab or the last blank.

    Raises:
        DataError: if it is empty, or names files that don't exist.
    """
    lines = read_lines(path)
    if not lines:
        raise DataError(f"{as_text(path)}: an empty list; it needs one image path a line")
    plain = [(number, _find(path, line)) for number, line in lines]
    missing = [(number, entry) for number, entry in plain if not _is_file(entry)]
    if not missing:
        return ImageSet(path, "list", tuple(ImageSample(entry) for _, entry in plain), None)
    rows = [(number, _labelled(line)) for number, line in lines]
    if all(row and _is_file(_find(path, row["path"])) for _, row in rows):
        return rows_as_set(path, "list", [(number, row) for number, row in rows if row])
    number, entry = missing[0]
    raise DataError(
        f"{as_text(path)}: {len(missing)} of {len(lines)} files don't exist, the first: {shorten(as_text(entry))} "
        f"(line {number})"
    )


def read_table(path: Path) -> ImageSet:
    """CSV, JSONL or Parquet with the column ``path`` (relative to the table, or absolute), and ``label``, ``split`` and
    ``group`` where they are known. Other columns are not read.

    A row without a split is left out where others have one; a label is needed in every row or in none. Labels that are
    all whole numbers are sorted by value, others by name.

    Raises:
        DataError: if the table can't be read, lacks the column, names files that don't exist or unknown splits, or has
            an image with two labels or in two splits.
    """
    if path.suffix.lower() not in TABLES:
        raise DataError(f"{as_text(path)}: no table that can be read; save it as {', '.join(TABLES)}")
    rows, others = _READ[path.suffix.lower()](path)
    if not rows:
        raise DataError(f"{as_text(path)}: a table without rows; it needs one image a row")
    missing = [(number, row["path"]) for number, row in rows if not _is_file(_find(path, row["path"]))]
    if missing:
        number, name = missing[0]
        raise DataError(
            f"{as_text(path)}: {len(missing)} of {len(rows)} files don't exist, the first: {shorten(name)} "
            f"(row {number}); paths are relative to the table"
        )
    images = rows_as_set(path, "table", rows)
    notes = (f"column{'s' * (len(others) > 1)} {', '.join(map(as_text, others[:5]))}",) if others else ()
    return replace(images, not_read=notes)


def sorted_labels(labels: Collection[str]) -> list[str]:
    """Names of classes in their order: by value if all are whole numbers, else by name."""
    return sorted(labels, key=int) if all(map(_is_whole, labels)) else sorted(labels)


def _labelled(line: str) -> Row | None:
    for sign in (",", "\t", " "):
        before, found, label = line.rpartition(sign)
        if found and before.strip() and label.strip():
            return {"path": before.strip(), "label": label.strip()}
    return None


def rows_as_set(
    path: Path, layout: str, rows: Sequence[tuple[int, Row]], files: Sequence[Path] | None = None
) -> ImageSet:
    """Images by the rows of a table.

    Args:
        path: the table, or what it is part of.
        layout: name of the reader.
        rows: number in the table and cells of each row.
        files: image of each row, if it is in the table itself; some rows may have no label then.

    Raises:
        DataError: as :func:`read_table`.
    """
    labels = {row["label"] for _, row in rows if row.get("label")}
    if labels and files is None and (unlabelled := [number for number, row in rows if not row.get("label")]):
        raise DataError(
            f"{as_text(path)}: {len(unlabelled)} of {len(rows)} rows have no label, the first: row {unlabelled[0]}; "
            "every row needs one, or none"
        )
    classes = sorted_labels(labels)
    number_of = {name: place for place, name in enumerate(classes)}
    splits = {row["split"] for _, row in rows if row.get("split")}
    if unknown := sorted(name for name in splits if split_of(name) is None):
        raise DataError(f"{as_text(path)}: '{as_text(unknown[0])}' is no split; known are {SPELLINGS}")
    images = files or [_find(path, row["path"]) for _, row in rows]
    kept = [(image, row) for image, (_, row) in zip(images, rows, strict=True) if row.get("split") or not splits]
    samples = tuple(
        ImageSample(
            image,
            label=number_of[row["label"]] if row.get("label") else None,
            split=split_of(row["split"]) if row.get("split") else None,
            group=row.get("group") or None,
        )
        for image, row in kept
    )
    left = len(rows) - len(kept)
    notes: tuple[str, ...] = (f"{left:,} row{'s' * (left > 1)} without a split",) if left else ()
    first: dict[Path, ImageSample] = {}
    for sample in samples:
        other = first.setdefault(sample.path, sample)
        if (other.label, other.split) != (sample.label, sample.split):
            what = "labels" if other.label != sample.label else "splits"
            raise DataError(f"{as_text(path)}: {as_text(sample.path)} has two {what}; an image needs one row")
    if repeated := len(samples) - len(first):
        notes += (f"{repeated:,} row{'s' * (repeated > 1)} that repeat{'s' * (repeated == 1)} an image",)
    return ImageSet(path, layout, tuple(first.values()), tuple(map(as_text, classes)) or None, left_out=notes)


def _read_csv(path: Path) -> tuple[list[tuple[int, Row]], list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            others = _check_columns(path, reader.fieldnames or ())
            rows = []
            for number, row in enumerate(reader, 2):
                if None in row:
                    raise DataError(f"{as_text(path)}: row {number} has more cells than the first row")
                rows.append((number, {name: (row.get(name) or "").strip() for name in COLUMNS}))
    except OSError as error:
        raise DataError(f"{as_text(path)}: can't be read ({error.strerror or error})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{as_text(path)}: not a CSV table in UTF-8 ({error})") from None
    return rows, others


def _read_jsonl(path: Path) -> tuple[list[tuple[int, Row]], list[str]]:
    rows: list[tuple[int, Row]] = []
    others: dict[str, None] = {}
    for number, line in read_lines(path):
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{as_text(path)}: line {number} is not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            raise DataError(
                f"{as_text(path)}: line {number} needs an object with 'path', such as " + '{"path": "a.jpg"}'
            )
        rows.append((number, {name: _cell(path, number, row.get(name)) for name in COLUMNS}))
        others |= dict.fromkeys(name for name in row if name not in COLUMNS)
    return rows, list(others)


def _read_parquet(path: Path) -> tuple[list[tuple[int, Row]], list[str]]:
    try:
        names = pq.read_schema(path).names
        others = _check_columns(path, names)
        table = pq.read_table(path, columns=[name for name in COLUMNS if name in names]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{as_text(path)}: can't be read as Parquet ({str(error).splitlines()[0]})") from None
    return [
        (number, {name: _cell(path, number, row.get(name)) for name in COLUMNS}) for number, row in enumerate(table, 1)
    ], others


def _check_columns(path: Path, names: Sequence[str]) -> list[str]:
    """The columns that are not read.

    Raises:
        DataError: if there is no column ``path``, or two of one that is read.
    """
    if "path" not in names:
        raise DataError(
            f"{as_text(path)}: has no column 'path'; it has: {shorten(', '.join(map(as_text, names))) or 'none'}. "
            f"Columns that are read: {', '.join(COLUMNS)}"
        )
    check_columns(path, (name for name in names if name in COLUMNS))
    return [name for name in names if name not in COLUMNS]


def _cell(path: Path, number: int, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{as_text(path)}: row {number} holds {value!r:.60}; cells need text or whole numbers")
    return str(value).strip()


def _is_whole(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdigit() and len(text) < 19


def _find(table: Path, name: str) -> Path:
    """The file of that name: as written, else in the other Unicode form; names from a Mac are often decomposed."""
    path = table.parent / expand_home(name)
    forms = (table.parent / expand_home(unicodedata.normalize(form, name)) for form in ("NFC", "NFD"))
    return path if _is_file(path) else next((other for other in forms if _is_file(other)), path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a null character
        return False


_READ = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
