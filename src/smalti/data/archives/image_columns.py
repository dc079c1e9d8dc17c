"""Images in columns of bytes: Parquet files, and data sets of Hugging Face on disk.

Arrow files are mapped into memory, and a row is read by itself. A row of a Parquet file is read with its row group.
"""

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smalti.data.archives.members import Archive
from smalti.data.archives.names import Names
from smalti.data.images.image_set import as_text
from smalti.errors import DataError, RunError
from smalti.reading import read_mapping, reading, shorten

_NAMED = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "content")
"""Columns of bytes that are images, the likeliest first; of Hugging Face's images any name will do."""
_KEPT_BYTES = 2**28
"""Row groups that a process keeps, in bytes."""
COLUMNS = ("label", "split", "group")
"""Columns that say something about an image, beside its content and its ``path``."""


@dataclass(frozen=True)
class _Part:
    """One file: its column of images, its number of rows, and the split it belongs to."""

    path: Path
    column: str
    rows: int
    split: str | None


class ImageColumns(Archive):
    """Rows of Parquet or Arrow files; members are named by the column ``path``, else by their number."""

    def __init__(self, root: Path, parts: Sequence[_Part], container: str) -> None:
        """
        Args:
            root: what the user named.
            parts: files of one kind.
            container: what they are.

        Raises:
            DataError: if a file can't be read.
        """
        self.root, self.container, self.parts = root, container, tuple(parts)
        self._first = np.concatenate([[0], np.cumsum([part.rows for part in parts])])
        self._groups: OrderedDict[tuple[int, int], pa.Array] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._stamps = [_stamp(part.path) for part in parts]
        self._meta: dict[int, pq.FileMetaData] = {}
        self._mapped: dict[int, pa.ChunkedArray] = {}
        self.rows = [row for part in parts for row in _facts(part)]
        self.row_names = _row_names(self.rows)
        coded = [os.fsencode(name) for name in self.row_names]
        self._row = np.array(sorted(range(len(coded)), key=coded.__getitem__), np.int64)
        self.names = Names(self.row_names).take(self._row)

    def num_bytes(self, place: int) -> int:
        return -1  # not known without reading it

    def read(self, place: int) -> bytes:
        row = int(self._row[place])
        number = int(np.searchsorted(self._first, row, side="right")) - 1
        part, inside = self.parts[number], row - int(self._first[number])
        try:
            if _stamp(part.path) != self._stamps[number]:  # a mapped file that was cut would end the process
                raise RunError(f"{as_text(part.path)}: has changed since it was opened; start or resume again")
            value = self._value(number, part, inside).as_py()
        except pa.ArrowException as error:
            raise DataError(f"{self.root / self.names[place]}: damaged ({shorten(str(error))})") from None
        except OSError as error:
            why = shorten(str(error))
            raise RunError(f"{as_text(part.path)}: can't be read any more ({why}); start or resume again") from None
        if isinstance(value, dict):
            value = value["bytes"]
        if value is None:
            raise DataError(
                f"{self.root / self.names[place]}: holds no bytes; write the images into the file (save_to_disk does)"
            )
        return bytes(value)

    def _value(self, number: int, part: _Part, row: int) -> Any:
        if part.path.suffix == ".arrow":
            if number not in self._mapped:
                self._mapped[number] = _map(part.path).column(part.column)
            one = self._mapped[number].slice(row, 1)
            one.validate(full=True)  # mapped files were not checked: an offset may lead out of the file
            return one[0]
        if os.getpid() != self._process:  # forked, perhaps while a thread held the lock
            self._process, self._lock, self._groups = os.getpid(), threading.Lock(), OrderedDict()
        with self._lock:
            if number not in self._meta:
                self._meta[number] = pq.read_metadata(part.path)
            meta, group = self._meta[number], 0
            while row >= meta.row_group(group).num_rows:
                row -= meta.row_group(group).num_rows
                group += 1
            key = (number, group)
            if key not in self._groups:
                # without threads: those of the pool don't exist in a forked worker
                with pq.ParquetFile(part.path, metadata=meta) as file:
                    table = file.read_row_group(group, columns=[part.column], use_threads=False)
                self._groups[key] = table.column(part.column)
                while len(self._groups) > 1 and sum(one.nbytes for one in self._groups.values()) > _KEPT_BYTES:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key][row]


def open_parquet(root: Path, files: Sequence[Path]) -> ImageColumns | None:
    """Parquet files with a column of images; None if the first has none.

    Raises:
        DataError: if one can't be read, has several such columns, or only others have one.
    """
    parts: list[_Part] = []
    for path in files:
        with reading(path, "Parquet"):
            schema, rows = pq.read_schema(path), pq.read_metadata(path).num_rows
        column = _image_column(path, schema)
        if column is None:
            if not parts:
                return None
            raise DataError(f"{as_text(path)}: has no column of images, and {as_text(parts[0].path.name)} has one")
        parts.append(_Part(path, column, rows, None))
    splits = _named_splits([part.path for part in parts])
    parts = [_Part(part.path, part.column, part.rows, splits.get(part.path)) for part in parts]
    return ImageColumns(root, parts, _counted(len(parts), "Parquet file"))


def open_hf(root: Path) -> ImageColumns | None:
    """A data set of Hugging Face in a folder: of ``save_to_disk``, of the library's cache, or Parquet files of the hub;
    None if the folder is none.

    Raises:
        DataError: if it is one that can't be read, or has no column of images.
    """
    if (root / "dataset_dict.json").is_file():
        splits = read_mapping(root / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) and _is_plain(name) for name in splits):
            raise DataError(f"{as_text(root)}/dataset_dict.json: names no splits")
        files = [(path, name) for name in splits for path in _arrow_files(root / name)]
    elif (root / "dataset_info.json").is_file() and any(root.glob("*.arrow")):
        files = [(path, None) for path in _arrow_files(root)]
        if not (root / "state.json").is_file():
            named = _named_splits([path for path, _ in files])
            files = [(path, named.get(path)) for path, _ in files]
    else:
        found = sorted({*root.glob("*.parquet"), *root.glob("data/*.parquet"), *root.glob("*/*.parquet")})
        return open_parquet(root, found) if found else None
    parts = []
    for path, split in files:
        table = _map(path)
        column = _image_column(path, table.schema)
        if column is None:
            names = shorten(", ".join(table.schema.names))
            raise DataError(f"{as_text(path)}: has no column of images; it has: {as_text(names)}")
        parts.append(_Part(path, column, table.num_rows, split))
    return ImageColumns(root, parts, "a Hugging Face data set")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def is_hf(folder: Path) -> bool:
    """Whether a folder is one that ``save_to_disk`` wrote."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


def _arrow_files(folder: Path) -> list[Path]:
    if (folder / "state.json").is_file():
        with reading(folder / "state.json", "a data set's state"):
            names = [one["filename"] for one in read_mapping(folder / "state.json")["_data_files"]]
            if not all(isinstance(name, str) and _is_plain(name) for name in names):
                raise DataError(f"{as_text(folder)}/state.json: names files outside of its folder")
        return [folder / name for name in names]
    return sorted(folder.glob("*.arrow"))


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name


def _map(path: Path) -> pa.Table:
    """An Arrow file, stream or with random access, without reading its content."""
    with reading(path, "an Arrow file"):
        source = pa.memory_map(os.fspath(path))
        if source.read(6) == b"ARROW1":
            return pa.ipc.open_file(source).read_all()
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()


def _image_column(path: Path, schema: pa.Schema) -> str | None:
    def is_bytes(kind: pa.DataType) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def is_image(field: pa.Field) -> bool:
        kind = field.type
        if pa.types.is_struct(kind):
            inside = {part.name: part.type for part in kind}
            return "path" in inside and "bytes" in inside and is_bytes(inside["bytes"])
        return is_bytes(kind) and field.name.lower() in _NAMED

    found = [field.name for field in schema if is_image(field)]
    if len(found) > 1 and not (known := [name for name in _NAMED if name in found]):
        raise DataError(f"{as_text(path)}: has several columns of images ({as_text(', '.join(found))}); keep one")
    return None if not found else found[0] if len(found) == 1 else known[0]


def _class_names(schema: pa.Schema) -> Mapping[str, list[str]]:
    """Names of the classes of each column, as Hugging Face's metadata have them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        labels = {name: one for name, one in features.items() if one.get("_type") == "ClassLabel"}
        return {name: [str(label) for label in one["names"]] for name, one in labels.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _facts(part: _Part) -> Iterator[dict[str, str]]:
    """What is known of each row of a file: ``path``, and of ``label split group`` what there is."""
    with reading(part.path, "a table of images"):
        is_arrow = part.path.suffix == ".arrow"
        schema = _map(part.path).schema if is_arrow else pq.read_schema(part.path)
        classes = _class_names(schema)
        label = "label" if "label" in schema.names or len(classes) != 1 else next(iter(classes))
        columns = {name: label if name == "label" else name for name in COLUMNS}
        wanted = {name: column for name, column in columns.items() if column in schema.names}
        struct = pa.types.is_struct(schema.field(part.column).type)
        paths = f"{part.column}.path" if struct else "path" if "path" in schema.names else None
        if is_arrow:
            table = _map(part.path)
            inside = {name: table.column(column) for name, column in wanted.items()}
            if paths is not None:
                inside["path"] = table.column("path") if not struct else _field(table.column(part.column), "path")
            for column in inside.values():
                column.validate(full=True)
        else:
            names = [*wanted.values(), *([paths] if paths else [])]
            with pq.ParquetFile(part.path) as file:
                table = file.read(columns=names, use_threads=False)
            inside = {name: table.column(column) for name, column in wanted.items()}
            if paths is not None:
                inside["path"] = _field(table.column(part.column), "path") if struct else table.column("path")
        texts = {name: _texts(part.path, name, column, classes.get(label)) for name, column in inside.items()}
    for row in range(part.rows):
        facts = {name: values[row] for name, values in texts.items()}
        yield facts | ({"split": part.split} if part.split else {})


def _field(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    chunks = [chunk.field(name) for chunk in column.chunks]
    return pa.chunked_array(chunks, type=column.type.field(name).type)


def _texts(path: Path, name: str, column: pa.ChunkedArray, classes: list[str] | None) -> list[str]:
    values = column.to_pylist()
    if wrong := [value for value in values if value is not None and not isinstance(value, (str, int))]:
        raise DataError(f"{as_text(path)}: column {name} holds {wrong[0]!r:.60}; text or whole numbers are needed")
    if name != "label" or classes is None:
        return ["" if value is None else str(value) for value in values]
    named = {place: label for place, label in enumerate(classes)}
    return [named.get(value, "") if isinstance(value, int) else value or "" for value in values]


def _row_names(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Members are called as their files were, if all these names are there, plain and different; else by number."""
    names = [row.get("path", "") for row in rows]
    is_plain = all(name and not name.startswith("/") and ".." not in name.split("/") for name in names)
    if is_plain and len(set(names)) == len(names):
        return names
    return [f"{number:07d}" for number in range(len(rows))]


def _named_splits(files: Sequence[Path]) -> dict[Path, str]:
    """Splits by the names of files, such as ``train-00000-of-00002.parquet``; empty if these hold none."""
    from smalti.data.images.image_set import SPLITS

    found = {path: [word for word in re.findall("[a-z]+", path.stem.lower()) if word in SPLITS] for path in files}
    return {path: splits[0] for path, splits in found.items()} if all(map(len, found.values())) else {}


def _counted(count: int, what: str) -> str:
    return f"a {what}" if count == 1 else f"{count:,} {what}s"
