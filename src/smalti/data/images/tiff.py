"""TIFF files of any number of channels: several samples a pixel, or one channel a page.

OpenCV decodes TIFFs of up to four samples. Others, multispectral and microscope images, are passed to it in a
form it can: a page of N samples is a grey image N times as wide, once the directory says so, whatever its compression.
"""

import struct
import zlib
from dataclasses import dataclass

import cv2
import numpy as np

from smalti.data.images.opencv import imdecode
from smalti.errors import DataError

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 16: 8}  # BYTE, ASCII, SHORT, LONG, LONG8: the kinds that the tags below use
_LETTERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 254, 256, 257, 258, 259, 262, 266
_STRIPS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR, _PREDICTOR = 273, 274, 277, 278, 279, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _EXTRA, _FORMAT = 322, 323, 324, 325, 338, 339
_KEPT = (_HEIGHT, _COMPRESSION, _FILL_ORDER, _ROWS, _TILE_HEIGHT)
_DEFLATE = (8, 32946)
_AT_ONCE = 2**20  # bytes: a strip of some kB may hold gigabytes
_MAX_PAGES, _MAX_ENTRIES = 4096, 4096


@dataclass(frozen=True)
class Page:
    """One image directory: ``tags`` number -> values."""

    tags: dict[int, tuple[int, ...]]

    @property
    def samples(self) -> int:
        """Samples a pixel."""
        return self.first(_SAMPLES, 1)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.first(_HEIGHT, 0), self.first(_WIDTH, 0)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Where its strips or tiles begin."""
        return self.tags.get(_STRIPS) or self.tags.get(_TILES) or ()

    @property
    def bits(self) -> int:
        """Bits a sample, of the first one."""
        return self.first(_BITS, 1)

    @property
    def is_turned(self) -> bool:
        """Whether its orientation exchanges height and width."""
        return self.first(_ORIENTATION, 1) >= 5

    @property
    def is_colour(self) -> bool:
        """Whether the samples are RGB, CMYK, YCbCr or palette colours, not channels of their own."""
        return self.first(_PHOTOMETRIC, 1) not in (0, 1)

    @property
    def is_lab(self) -> bool:
        """Whether its colours are lightness and two opponents, which decoders turn into RGB in their own ways."""
        return self.first(_PHOTOMETRIC, 1) in (8, 9, 10)

    @property
    def has_alpha(self) -> bool:
        """Whether the last sample says that it is an opacity."""
        return any(kind in (1, 2) for kind in self.tags.get(_EXTRA, ()))

    def first(self, tag: int, default: int) -> int:
        """First value of a tag."""
        return (self.tags.get(tag) or (default,))[0]


class Tiff:
    """Directories of a TIFF (classic or BigTIFF, either byte order), pages of reduced size left out."""

    def __init__(self, data: bytes):
        try:
            self.order = {b"II": "<", b"MM": ">"}[data[:2]]
            self.big = self._unpack(data, "H", 2) == 43
            self.pages = self._read_pages(data)
        except (KeyError, struct.error, IndexError, OverflowError):
            raise DataError("not a readable TIFF, or cut short") from None
        self.data = data
        if not self.pages or not all(0 not in page.size and page.chunks for page in self.pages):
            raise DataError("a TIFF without an image")
        self._check_length()

    @property
    def channels(self) -> int:
        """Samples of all pages together."""
        return sum(page.samples for page in self.pages)

    def describe(self) -> str:
        """Where the channels come from, for errors."""
        pages = f" ({len(self.pages)} pages)" if len(self.pages) > 1 else ""
        return f"{self.channels} channels{pages}"

    def read_channels(self) -> np.ndarray:
        """All samples of all pages: ``(H, W, channels)`` in the file's order and sample type."""
        if len({page.size for page in self.pages}) > 1:
            raise DataError("pages of different sizes, which can't be channels of one image")
        try:
            return np.concatenate([self._read_page(page) for page in self.pages], axis=2)
        except (cv2.error, struct.error, OverflowError):
            raise DataError("a damaged TIFF: its header says impossible things") from None

    def _unpack(self, data: bytes, letter: str, offset: int) -> int:
        return struct.unpack_from(self.order + letter, data, offset)[0]

    def _read_pages(self, data: bytes) -> list[Page]:
        count_letter, offset_letter, entry_size = ("Q", "Q", 20) if self.big else ("H", "I", 12)
        value_size = 8 if self.big else 4
        offset = self._unpack(data, offset_letter, 8 if self.big else 4)
        pages: list[Page] = []
        seen: set[int] = set()
        while offset and len(pages) < _MAX_PAGES:
            num_entries = self._unpack(data, count_letter, offset)
            if offset in seen or num_entries > _MAX_ENTRIES:
                raise DataError("a damaged TIFF: its directories lead back to one another, or are too long")
            seen.add(offset)
            start = offset + struct.calcsize("<" + count_letter)
            tags: dict[int, tuple[int, ...]] = {}
            for place in range(start, start + num_entries * entry_size, entry_size):
                tag, kind = self._unpack(data, "H", place), self._unpack(data, "H", place + 2)
                count = self._unpack(data, offset_letter, place + 4)
                if kind not in _LETTERS:
                    continue
                where = place + 4 + value_size
                if count * _SIZES[kind] > value_size:
                    where = self._unpack(data, offset_letter, where)
                if where + count * _SIZES[kind] > len(data):
                    raise IndexError
                tags.setdefault(tag, struct.unpack_from(f"{self.order}{count}{_LETTERS[kind]}", data, where))
            page = Page(tags)
            if not pages or not page.first(_SUBFILE, 0) & 1:  # bit 0: a smaller copy of another page
                pages.append(page)
            offset = self._unpack(data, offset_letter, start + num_entries * entry_size)
        return pages

    def _check_length(self) -> None:
        """Refuse a file that ends before its last strip does."""
        for page in self.pages:
            sizes = page.tags.get(_STRIP_BYTES) or page.tags.get(_TILE_BYTES) or ()
            end = max((a + b for a, b in zip(page.chunks, sizes, strict=False)), default=0)
            if end > len(self.data):
                raise DataError(f"cut short: {len(self.data)} bytes, its pixels end at byte {end}")

    def check_sums(self) -> None:
        """Refuse deflated strips whose checksum is wrong, of which OpenCV gives what it has; they are inflated for it.

        Raises:
            DataError: for the first of them.
        """
        for page in self.pages:
            if page.first(_COMPRESSION, 1) not in _DEFLATE:
                continue
            sizes = page.tags.get(_STRIP_BYTES) or page.tags.get(_TILE_BYTES) or ()
            for start, size in zip(page.chunks, sizes, strict=False):
                stream = zlib.decompressobj()
                try:
                    stream.decompress(self.data[start : start + size], _AT_ONCE)
                    while stream.unconsumed_tail:
                        stream.decompress(stream.unconsumed_tail, _AT_ONCE)
                except zlib.error:
                    raise DataError(f"a damaged TIFF: the checksum of its strip at byte {start} is wrong") from None

    def _read_page(self, page: Page) -> np.ndarray:
        samples, (height, width) = page.samples, page.size
        if len({*page.tags.get(_BITS, (1,))}) > 1:
            raise DataError("channels of different bit depths")
        separate = samples > 1 and page.first(_PLANAR, 1) == 2
        if not separate:
            return self._read_wide(page, slice(None), samples).reshape(height, width, samples)
        per_plane = len(page.chunks) // samples
        planes = [self._read_wide(page, slice(i * per_plane, (i + 1) * per_plane), 1) for i in range(samples)]
        return np.stack(planes, axis=2)

    def _read_wide(self, page: Page, strips: slice, samples: int) -> np.ndarray:
        """Pixels as one grey image ``(H, W * samples)``, with the predictor undone here: it steps by samples."""
        predictor = page.first(_PREDICTOR, 1)
        if predictor not in (1, 2):
            raise DataError(f"TIFF predictor {predictor}, which is not read for {page.samples} channels; save without")
        tags = {tag: page.tags[tag] for tag in _KEPT if tag in page.tags}
        tags |= {_WIDTH: (page.size[1] * samples,), _SAMPLES: (1,), _PHOTOMETRIC: (1,)}
        tags |= {_BITS: (page.bits,), _FORMAT: (page.first(_FORMAT, 1),)}
        tags |= {
            tag: page.tags[tag][strips] for tag in (_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES) if tag in page.tags
        }
        if _TILE_WIDTH in page.tags:
            tags[_TILE_WIDTH] = (page.first(_TILE_WIDTH, 0) * samples,)
        wide = imdecode(bytes(self._with_directory(tags)), cv2.IMREAD_UNCHANGED)
        if wide is None or wide.shape != (page.size[0], page.size[1] * samples):
            raise DataError(
                f"a TIFF of {page.samples} channels of {page.bits} bits that OpenCV can't decode; "
                "save it as 8 or 16 bit"
            )
        if predictor == 2:
            width = page.first(_TILE_WIDTH, page.size[1])
            for x in range(0, page.size[1], width):
                tile = wide[:, x * samples : (x + width) * samples].reshape(page.size[0], -1, samples)
                wide[:, x * samples : (x + width) * samples] = np.cumsum(tile, axis=1, dtype=wide.dtype).reshape(
                    page.size[0], -1
                )
        return wide

    def _with_directory(self, tags: dict[int, tuple[int, ...]]) -> bytes:
        """The same bytes with another, single directory at their end."""
        letter, size = ("Q", 8) if self.big else ("I", 4)
        head = self.data + b"\0" * (-len(self.data) % 8)
        values, entries, at = b"", b"", len(head)
        for tag, numbers in sorted(tags.items()):
            packed = struct.pack(f"{self.order}{len(numbers)}{letter}", *numbers)
            entries += struct.pack(f"{self.order}HH{letter}", tag, 16 if self.big else 4, len(numbers))
            if len(packed) <= size:
                entries += packed.ljust(size, b"\0")
            else:
                entries += struct.pack(self.order + letter, at + len(values))
                values += packed
        directory = struct.pack(self.order + ("Q" if self.big else "H"), len(tags)) + entries
        directory += struct.pack(self.order + letter, 0)
        pointer = struct.pack(self.order + letter, at + len(values))
        place = 8 if self.big else 4
        return head[:place] + pointer + head[place + size :] + values + directory
