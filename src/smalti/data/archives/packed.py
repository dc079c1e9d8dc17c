"""Images in tar and zip files: one file, or shards of one data set."""

import operator
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from smalti.data.archives.members import Archive
from smalti.data.archives.names import Names
from smalti.data.archives.packed_index import BLOCK, Entries, index_files
from smalti.data.archives.remote import CachedRanges, Remote
from smalti.data.images.image_set import SPLITS, as_text
from smalti.errors import DataError, RunError

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_INFLATE = -15  # raw deflate, as zip has it
_MOST_INFLATED = 2**26
"""Bytes that a compressed member may become beside 20 times its own: some kB can hold gigabytes."""
_MOST_EXTRA = 64  # bytes of a member's extra fields, of nearly all writers
Fetch = Callable[[int, int, int, int], bytes]
"""Number of a file, place of a member in it, first byte and number of bytes -> these bytes."""


class PackedFiles(Archive):
    """Members of tar and zip files, found by an index."""

    def __init__(
        self, root: Path, files: Sequence[Path], entries: Sequence[Entries], fetch: Fetch | None = None
    ) -> None:
        """
        Args:
            root: what the user named.
            files: tar and zip files.
            entries: members of each.
            fetch: reads from files of other machines; None: from this one.

        Raises:
            DataError: if nothing is in them, a file holds a name twice, or only some files are named as splits.
        """
        self.root, self.files = root, tuple(files)
        kinds = sorted({file.suffix.lower()[1:] for file in files})
        self.container = f"a {kinds[0]} file" if len(files) == 1 else f"{len(files):,} {' and '.join(kinds)} shards"
        self._fetch = fetch or self._read_range
        sizes = [len(one) for one in entries]
        names = self._names(entries)
        order: np.ndarray | slice = slice(None)
        if not _are_rising(names):
            coded = [os.fsencode(name) for name in names]
            order = np.array(sorted(range(len(coded)), key=coded.__getitem__), np.int64)
            names = [names[place] for place in order]
        self.names = Names(names)
        self._file = np.repeat(np.arange(len(files), dtype=np.int32), sizes)[order]
        self._member = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])[order]
        self._offset, self._size, self._check, self._method = (
            np.concatenate([getattr(one, column) for one in entries])[order]
            for column in ("offset", "size", "check", "method")
        )
        if any(len(one.labels.text) for one in entries):
            labels = [label for one in entries for label in one.labels]
            self.labels = Names(labels if isinstance(order, slice) else [labels[place] for place in order])
        left_out = sum((Counter(one.left_out) for one in entries), Counter())
        self.left_out = tuple(f"{count:,} members {why}" for why, count in sorted(left_out.items()))

    def _names(self, entries: Sequence[Entries]) -> list[str]:
        """Names of all members: with the split of their shard, or with the shard where shards repeat names."""
        splits = _splits_of(self.root, self.files)
        names: list[str] = []
        for file, one in zip(self.files, entries, strict=True):
            own = list(one.names)
            if split := splits.get(file):
                own = [
                    name if SPLITS.get(name.partition("/")[0].lower()) == split else f"{split}/{name}" for name in own
                ]
            names += own
        if _are_rising(names):  # as Smalti writes them
            return names
        for file, one in zip(self.files, entries, strict=True):
            if len(repeated := Counter(one.names)) < len(one):
                name, count = repeated.most_common(1)[0]
                raise DataError(f"{as_text(file)}: holds {as_text(name)} {count} times; make it again with names once")
        if len(set(names)) < len(names):
            self.has_folders = False
            files = [file.stem for file in self.files]
            if len(set(files)) < len(files):
                raise DataError(f"{as_text(self.root)}: shards of one name hold members of one name; rename the shards")
            return [f"{file}/{name}" for file, one in zip(files, entries, strict=True) for name in one.names]
        return names

    def num_bytes(self, place: int) -> int:
        return int(self._size[place])

    def read(self, place: int) -> bytes:
        number, member = int(self._file[place]), int(self._member[place])
        offset, size = int(self._offset[place]), int(self._size[place])
        if self.files[number].suffix.lower() != ".tar":
            return self._read_zipped(place, number, member, offset, size)
        block = self._fetch(number, member, offset - BLOCK, BLOCK + size)
        if len(block) < BLOCK + size or _stored_checksum(block) != int(self._check[place]):
            raise _changed(self.files[number])
        return block[BLOCK:]

    def _read_zipped(self, place: int, number: int, member: int, offset: int, size: int) -> bytes:
        likely = _LOCAL_HEADER.size + len(os.fsencode(self.names[place])) + _MOST_EXTRA
        block = self._fetch(number, member, offset, likely + size)
        if len(block) < _LOCAL_HEADER.size or block[:4] != b"PK\3\4":
            raise _changed(self.files[number])
        _, len_name, len_extra = _LOCAL_HEADER.unpack_from(block)
        start = _LOCAL_HEADER.size + len_name + len_extra
        content = block[start : start + size]
        if len(content) < size:  # a long header
            content = self._fetch(number, -1, offset + start, size)
        if len(content) < size:
            raise _changed(self.files[number])
        try:
            data = self._inflated(place, content) if self._method[place] == zipfile.ZIP_DEFLATED else content
        except zlib.error:
            data = b""
        if zlib.crc32(data) != int(self._check[place]):
            raise DataError(f"{self.root / self.names[place]}: damaged: its checksum is wrong")
        return data

    def _inflated(self, place: int, content: bytes) -> bytes:
        stream, most = zlib.decompressobj(_INFLATE), _MOST_INFLATED + 20 * len(content)
        data = stream.decompress(content, most)
        if not stream.eof and len(data) >= most:
            raise DataError(f"{self.root / self.names[place]}: {len(content)} bytes that become more than {most}")
        return data

    def _read_range(self, number: int, member: int, start: int, size: int) -> bytes:
        """Bytes of a file; fewer at its end."""
        file = self.files[number]
        try:
            with file.open("rb", buffering=0) as stream:
                stream.seek(start)
                return stream.read(size)
        except OSError as error:
            raise RunError(f"{as_text(file)}: can't be read ({error.strerror or error})") from None


def open_packed(root: Path, files: Sequence[Path]) -> PackedFiles:
    """Tar and zip files as one archive.

    Raises:
        DataError: if one can't be read, or nothing is in them.
    """
    return PackedFiles(root, files, index_files(files))


def open_remote(root: Path, url: str) -> PackedFiles:
    """Tar and zip files on other machines as one archive.

    Raises:
        DataError: if they can't be reached or read.
        MissingExtraError: without the package that connects to them.
    """
    remote = Remote(url)
    entries = remote.index()
    return PackedFiles(root, remote.paths, entries, CachedRanges(remote, [len(one) for one in entries]).fetch)


def _are_rising(names: list[str]) -> bool:
    """Whether names are sorted by their bytes, and different; False for names that aren't ASCII."""
    return all(map(operator.lt, names, names[1:])) and "".join(names).isascii()


def _stored_checksum(header: bytes) -> int:
    try:
        return int(tarfile.nti(header[148:156]))  # type: ignore[attr-defined]
    except tarfile.TarError:
        return -1


def _changed(file: Path) -> RunError:
    return RunError(f"{as_text(file)}: has changed since it was opened; start or resume again")


def _splits_of(root: Path, files: Sequence[Path]) -> dict[Path, str]:
    """The split of each shard by its name, such as ``train-000000.tar``; empty if their names hold no splits, or all of
    them the same.

    Raises:
        DataError: if only some do, or a name holds two.
    """
    found = {
        file: sorted({SPLITS[word] for word in re.findall("[a-z]+", file.stem.lower()) if word in SPLITS})
        for file in files
    }
    if len({split for splits in found.values() for split in splits}) + (not all(found.values())) < 2:
        return {}
    if odd := [file for file, splits in found.items() if len(splits) != 1]:
        named = next(file for file, splits in found.items() if splits)
        raise DataError(
            f"{as_text(root)}: {as_text(named.name)} is named as a split, and {as_text(odd[0].name)} "
            f"{'as several' if found[odd[0]] else 'is not'}; name the shards that belong together with a pattern, such "
            f"as shards='{as_text(named.parent)}/train-*.tar'"
        )
    return {file: splits[0] for file, splits in found.items()}
