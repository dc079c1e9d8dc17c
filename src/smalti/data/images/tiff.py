"""TIFF files of any number of channels: several samples a pixel, or one channel a page.

OpenCV decodes TIFFs of up to four samples. Others, such as multispectral and microscope images, are read with tifffile.
"""

import contextlib
import importlib.util
import io
import logging
import zlib
from collections.abc import Iterator

import numpy as np
import tifffile

from smalti.errors import DataError

_DEFLATE = (8, 32946)
_BUILT_IN = (1, *_DEFLATE, 32773)
"""Compressions that tifffile decodes without imagecodecs: none, deflate, PackBits."""
_AT_ONCE = 2**20  # bytes: a strip of some kB may hold gigabytes
_MAX_PAGES = 4096
_ORIENTATION = 274
_LAB = (8, 9, 10)
_ALPHA = (1, 2)


class Tiff:
    """Header of a TIFF (classic or BigTIFF, either byte order); pages of reduced size are left out.

    Args:
        data: content of the file.

    Raises:
        DataError: if it isn't a TIFF, has no image, or is cut short.
    """

    def __init__(self, data: bytes) -> None:
        self._length = len(data)
        try:
            with _silent():
                self._file = tifffile.TiffFile(io.BytesIO(data))
                self._pages = [page for page in self._all_pages() if not page.is_reduced]
        except DataError:
            raise
        except Exception as error:  # tifffile raises whatever a damaged header leads to
            raise DataError("not a readable TIFF, or cut short") from error
        if not self._pages or not all(map(_is_image, self._pages)):
            raise DataError("a TIFF without an image")
        self._check_length()

    def _all_pages(self) -> Iterator[tifffile.TiffPage]:
        pages, seen = self._file.pages, set[int]()
        for number in range(_MAX_PAGES):
            try:
                page = pages[number]
            except IndexError:
                return
            assert isinstance(page, tifffile.TiffPage), page
            if page.offset in seen:
                raise DataError("a damaged TIFF: its directories lead back to one another")
            seen.add(page.offset)
            yield page

    @property
    def channels(self) -> int:
        """Samples of a pixel, of all pages together."""
        return sum(page.samplesperpixel for page in self._pages)

    @property
    def num_pages(self) -> int:
        """Number of pages of full size."""
        return len(self._pages)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """``(height, width)`` of each page as stored."""
        return tuple((page.imagelength, page.imagewidth) for page in self._pages)

    @property
    def samples(self) -> tuple[int, ...]:
        """Samples per pixel of each page."""
        return tuple(page.samplesperpixel for page in self._pages)

    @property
    def bits(self) -> int:
        """Bits per sample of the first page."""
        bits = self._pages[0].bitspersample
        return bits if isinstance(bits, int) else max(bits)

    @property
    def size(self) -> tuple[int, int]:
        """``(height, width)`` of the first page, its orientation applied."""
        height, width = self.sizes[0]
        is_turned = self._pages[0].tags.valueof(_ORIENTATION, 1) >= 5
        return (width, height) if is_turned else (height, width)

    @property
    def is_colour(self) -> bool:
        """Whether the samples are RGB, CMYK, YCbCr or palette colours, not channels of their own."""
        return self._pages[0].photometric not in (0, 1)

    @property
    def is_lab(self) -> bool:
        """Whether its colours are CIELAB, which decoders convert to RGB in different ways."""
        return self._pages[0].photometric in _LAB

    @property
    def is_picture(self) -> bool:
        """Whether it is one page of grey or colour, whose channels can be converted."""
        page = self._pages[0]
        has_alpha = any(kind in _ALPHA for kind in page.extrasamples)
        is_known = self.is_colour or page.samplesperpixel == 1 or (page.samplesperpixel == 2 and has_alpha)
        return len(self._pages) == 1 and is_known and page.samplesperpixel <= 4

    def describe(self) -> str:
        """Number of channels and pages, for errors."""
        pages = f" ({len(self._pages)} pages)" if len(self._pages) > 1 else ""
        return f"{self.channels} channels{pages}"

    def read_channels(self) -> np.ndarray:
        """All samples of all pages: ``(H, W, channels)`` in the file's order and sample type.

        Raises:
            DataError: for pages of different sizes, a compression that needs imagecodecs, or damaged data.
        """
        if len(set(self.sizes)) > 1:
            raise DataError("pages of different sizes, which can't be channels of one image")
        return np.concatenate([self._read_page(page) for page in self._pages], axis=2)

    def _read_page(self, page: tifffile.TiffPage) -> np.ndarray:
        if not isinstance(page.bitspersample, int):
            raise DataError("channels of different bit depths")
        needs_codecs = page.compression not in _BUILT_IN or page.predictor not in (1, 2)
        if needs_codecs and importlib.util.find_spec("imagecodecs") is None:
            raise DataError(
                f"a TIFF of {page.samplesperpixel} channels with {_coding(page)}; install "
                "smalti[tiff] to read it, or save it uncompressed or deflated"
            )
        try:
            with _silent():
                pixels = page.asarray(maxworkers=1)
        except Exception as error:  # whatever damaged data lead to
            raise DataError(f"a damaged TIFF: {str(error) or type(error).__name__}".splitlines()[0]) from error
        if pixels.dtype.kind not in "uif" or pixels.size != page.imagelength * page.imagewidth * page.samplesperpixel:
            raise DataError(f"a TIFF with pixels of type {pixels.dtype}, which are not read; save it as 8 or 16 bit")
        if page.axes == "SYX":
            pixels = np.moveaxis(pixels, 0, 2)
        pixels = pixels.reshape(page.imagelength, page.imagewidth, page.samplesperpixel)
        return np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))

    def _check_length(self) -> None:
        """Refuse a file that ends before its last strip does."""
        for page in self._pages:
            end = max((a + b for a, b in zip(page.dataoffsets, page.databytecounts, strict=False)), default=0)
            if end > self._length:
                raise DataError(f"cut short: {self._length} bytes, its pixels end at byte {end}")

    def check_sums(self, data: bytes) -> None:
        """Refuse deflated strips whose checksum is wrong: OpenCV returns what it could decode.

        Args:
            data: content of the file.

        Raises:
            DataError: for the first of them.
        """
        for page in self._pages:
            if page.compression not in _DEFLATE:
                continue
            for start, size in zip(page.dataoffsets, page.databytecounts, strict=False):
                stream = zlib.decompressobj()
                try:
                    stream.decompress(data[start : start + size], _AT_ONCE)
                    while stream.unconsumed_tail:
                        stream.decompress(stream.unconsumed_tail, _AT_ONCE)
                except zlib.error:
                    raise DataError(f"a damaged TIFF: the checksum of its strip at byte {start} is wrong") from None


def _is_image(page: tifffile.TiffPage) -> bool:
    """Whether the numbers of a header are those of an image; a damaged one may hold anything."""
    numbers = (page.imagelength, page.imagewidth, page.samplesperpixel)
    places = (page.dataoffsets, page.databytecounts)
    return (
        all(isinstance(number, int) and number > 0 for number in numbers)
        and all(isinstance(place, int) and place >= 0 for each in places for place in each)
        and bool(page.dataoffsets)
    )


def _coding(page: tifffile.TiffPage) -> str:
    """Compression and predictor, for errors."""
    predictor = "" if page.predictor in (1, 2) else f" and predictor {int(page.predictor)}"
    return f"{getattr(page.compression, 'name', page.compression)} compression{predictor}"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """tifffile logs what it finds wrong; errors and checks here report it."""
    logger = logging.getLogger("tifffile")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled
