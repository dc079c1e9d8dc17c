"""Decode image files to arrays: all formats and bit depths in the same way; damaged files are an error.

Decoding is OpenCV's, from the file's bytes. Some decoders return the upper half of a cut file without a word, so the
end of each file is looked at first.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from smalti.data.archives.members import open_binary, read_bytes
from smalti.data.images.headers import TIFF_STARTS, jpeg_segments, stored_size
from smalti.data.images.opencv import imdecode
from smalti.data.images.pixels import NO_PIXELS as NO_PIXELS
from smalti.data.images.pixels import PixelConfig as PixelConfig
from smalti.data.images.tiff import Tiff
from smalti.data.images.value_range import to_unit
from smalti.errors import DataError
from smalti.reading import reading

ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
"""Endings of the files that are read as images, in lower case; upper case is the same."""

PILLOW_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""Pillow's ways to say that a file is broken."""

_DECODE = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH  # alpha dropped, palette resolved, EXIF orientation applied
_RGB_FLAG = getattr(cv2, "IMREAD_COLOR_RGB", 0)  # since OpenCV 4.11
_DECODE_RGB = (_RGB_FLAG or cv2.IMREAD_COLOR) | cv2.IMREAD_ANYDEPTH
_JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # neither stuffing, nor restart, nor filling
_STARTS = {b"\xff\xd8": "jpeg", b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp"}


def read_image(path: Path, channels: int = 3, pixels: PixelConfig = NO_PIXELS) -> np.ndarray:
    """Pixels of an image file: ``(H, W, channels)``, RGB, uint8; float32 in 0..1 for 16-bit and float files, and for
    all where ``pixels`` has a scale.

    Grey becomes three channels by repeating, colour becomes one by luminance, alpha is dropped, palettes are resolved,
    EXIF orientation is applied. TIFFs of N samples a pixel, or of N grey pages, are read with ``channels=N``.

    Raises:
        DataError: if the file can't be read, is cut short or damaged, too large, or has another number of channels.
    """
    return _read(path, lambda data: decode_image(data, channels, pixels))


def read_values(path: Path, channels: int = 3, max_pixels: int = NO_PIXELS.max_pixels) -> np.ndarray:
    """Values of an image file as they are stored: ``(H, W, channels)`` in the file's own type.

    Raises:
        DataError: as :func:`read_image`.
    """
    return _read(path, lambda data: decode_values(data, channels, max_pixels))


def _read(path: Path, decode: Callable[[bytes], np.ndarray]) -> np.ndarray:
    with reading(path, "an image"):
        data = read_bytes(path)
        try:
            return decode(data)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None


def decode_image(data: bytes, channels: int = 3, pixels: PixelConfig = NO_PIXELS) -> np.ndarray:
    """The same as :func:`read_image` for the bytes of a file; errors don't name the file."""
    return to_unit(decode_values(data, channels, pixels.max_pixels), pixels.scale)


def decode_values(data: bytes, channels: int = 3, max_pixels: int = NO_PIXELS.max_pixels) -> np.ndarray:
    """``(H, W, channels)`` in the file's own type and values; integers that OpenCV has no colours for become float32.

    Raises:
        DataError: as :func:`decode_image`.
    """
    check_complete(data)
    _check_size(data, max_pixels)
    if data[:4] in TIFF_STARTS:
        image = _decode_tiff(data, channels)
    elif data[:2] == b"\xff\xd8" and channels == 3:
        image = _decode_bytes(data, _DECODE_RGB)  # its decoder repeats grey by itself, in three quarters of the time
    else:
        image = _decode_bytes(data, _DECODE if channels in (1, 3) else cv2.IMREAD_UNCHANGED)
    return _to_channels(image, channels)


def as_picture(image: np.ndarray) -> np.ndarray:
    """Any channels and depth as uint8 RGB; float images are stretched: microscopes leave most of the range unused."""
    if image.dtype != np.uint8:
        low, high = np.quantile(image, (0.002, 0.998))
        image = ((image - low) / max(high - low, 1e-6) * 255).clip(0, 255).astype(np.uint8)
    channels = image.shape[2]
    if channels == 2:
        return np.dstack([image, image[..., :1]])
    return np.repeat(image, 3, axis=2) if channels == 1 else np.ascontiguousarray(image[..., :3])


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file as :func:`read_image` gives it, from its header alone.

    Raises:
        DataError: if the header can't be read.
    """
    try:
        with open_binary(path) as file:
            is_tiff = file.read(4) in TIFF_STARTS
            file.seek(0)
            if is_tiff:
                return Tiff(file.read()).size
            with Image.open(file) as image:
                width, height = image.size
                is_turned = image.getexif().get(0x0112, 1) >= 5  # by 90 degrees
                return (width, height) if is_turned else (height, width)
    except PILLOW_ERRORS as error:
        raise DataError(f"{path}: can't be read ({error})") from None


class ImageFacts(NamedTuple):
    """What an image file holds."""

    height: int
    width: int
    channels: int
    """Samples a pixel, alpha included; of a TIFF, of all pages together."""
    bits: int
    """A sample."""
    format: str
    values: tuple[float, float] | None = None
    """Smallest and largest value, of files that aren't 8 bits unsigned."""
    kind: str = "uint8"
    """NumPy's name of the type of the values."""
    is_picture: bool = True
    """Whether ``data.channels=1`` and ``3`` read it, whatever its channels; other files need their own number."""


def inspect_image(data: bytes, max_pixels: int = NO_PIXELS.max_pixels) -> tuple[ImageFacts, np.ndarray]:
    """Facts about the bytes of an image file, and its pixels as they are: ``(H, W)`` or ``(H, W, C)``, any type.

    Raises:
        DataError: if it can't be read, without the file's name.
    """
    check_complete(data)
    if data[:4] in TIFF_STARTS:
        tiff = Tiff(data)
        image = decode_values(data, 3 if tiff.is_colour and tiff.num_pages == 1 else tiff.channels, max_pixels)
        facts = ImageFacts(image.shape[0], image.shape[1], tiff.channels, tiff.bits, "tiff")
        facts = facts._replace(is_picture=tiff.is_picture)
    else:
        _check_size(data, max_pixels)
        # of JPEG, which has no alpha, as it is read for training: turned by its EXIF orientation
        image = _decode_bytes(data, _DECODE if data[:2] == b"\xff\xd8" else cv2.IMREAD_UNCHANGED)
        kind = next((name for start, name in _STARTS.items() if data.startswith(start)), "other")
        channels = 1 if image.ndim == 2 else image.shape[2]
        facts = ImageFacts(image.shape[0], image.shape[1], channels, image.itemsize * 8, kind)
    if image.dtype != np.uint8:
        facts = facts._replace(values=(float(image.min()), float(image.max())), kind=image.dtype.name)
    return facts, image


def check_complete(data: bytes) -> None:
    """Refuse the bytes of an image file that is empty, cut short, or (PNG) damaged.

    Raises:
        DataError: saying what is missing, without the file's name.
    """
    if not data:
        raise DataError("an empty file")
    if data[:2] == b"\xff\xd8":
        if not _jpeg_is_complete(data):
            raise DataError(f"a JPEG cut short after {len(data)} bytes")
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        _check_png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        needed = 8 + int.from_bytes(data[4:8], "little")
        if len(data) < needed:
            raise DataError(f"a WebP cut short: {len(data)} of {needed} bytes")
    elif data[:2] == b"BM":
        _check_bmp(data)


def _jpeg_is_complete(data: bytes) -> bool:
    """Whether the image's own end marker is there: thumbnails inside and films appended have markers too."""
    *_, (marker, place) = (0, 0), *jpeg_segments(data)
    if marker != 0xDA:
        return False  # an end before any pixel
    place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    while match := _JPEG_MARKER.search(data, place):  # after a scan: its end, or tables and another scan
        if match[1] == b"\xd9":
            return True
        if match.end() + 2 > len(data):
            return False
        place = match.end() + struct.unpack_from(">H", data, match.end())[0]
    return False


def _check_size(data: bytes, max_pixels: int) -> None:
    """Refuse an image that is too large by its header.

    Raises:
        DataError: without the file's name.
    """
    if data[:4] in TIFF_STARTS:
        tiff = Tiff(data)
        sizes = [(*size, max(1.0, samples / 4)) for size, samples in zip(tiff.sizes, tiff.samples, strict=True)]
    else:
        sizes = [(*(stored_size(data) or _other_size(data)), 1.0)]
    count = sum(height * width * each for height, width, each in sizes)
    if count > max_pixels:
        height, width, _ = sizes[0]
        pages = f" on {len(sizes)} pages" if len(sizes) > 1 else ""
        raise DataError(
            f"{width}x{height} pixels{pages}, more than data.max_pixels={max_pixels}; make it smaller, "
            "or raise the limit (an image takes 3 bytes a pixel and more)"
        )


def _other_size(data: bytes) -> tuple[int, int]:
    """Height and width by Pillow, of what isn't named by its content: GIF, AVIF, JPEG 2000 and others."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except PILLOW_ERRORS:
        raise DataError("can't be decoded; it is damaged, or not an image") from None


def _check_png(data: bytes) -> None:
    place = 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        kind = data[place + 4 : place + 8]
        end = place + 12 + length
        if end > len(data):
            break
        is_critical = not kind[0] & 32
        if is_critical and zlib.crc32(memoryview(data)[place + 4 : end - 4]) != int.from_bytes(
            data[end - 4 : end], "big"
        ):
            raise DataError(f"a damaged PNG: the checksum of its {kind.decode('latin1')} chunk is wrong")
        if kind == b"IEND":
            return
        place = end
    raise DataError(f"a PNG cut short after {len(data)} bytes")


def _check_bmp(data: bytes) -> None:
    if len(data) < 34:
        raise DataError(f"a BMP cut short after {len(data)} bytes")
    offset, width, height, bits, compression = (
        *struct.unpack_from("<I", data, 10),
        *struct.unpack_from("<ii", data, 18),
        *struct.unpack_from("<H", data, 28),
        *struct.unpack_from("<I", data, 30),
    )
    if data[14] >= 40 and compression in (0, 3):  # rows of whole 4-byte words; packed ones tell no length
        needed = offset + (width * bits + 31) // 32 * 4 * abs(height)
        if len(data) < needed:
            raise DataError(f"a BMP cut short: {len(data)} of {needed} bytes")


def _decode_bytes(data: bytes, flags: int) -> np.ndarray:
    """OpenCV's decoding, channels in RGB order: ``(H, W)`` or ``(H, W, n)``."""
    image = imdecode(data, flags)
    if image is None:
        raise DataError("can't be decoded; it is damaged, or not an image")
    if image.ndim == 2 or (flags == _DECODE_RGB and _RGB_FLAG):
        return image
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)


def _decode_tiff(data: bytes, channels: int) -> np.ndarray:
    tiff = Tiff(data)
    tiff.check_sums(data)
    if tiff.channels == channels > 1 and (tiff.num_pages > 1 or not (tiff.is_colour and channels == 3)):
        return tiff.read_channels()
    if tiff.is_lab:
        raise DataError("a TIFF of Lab colours; save it as RGB")
    if not tiff.is_picture:
        raise DataError(_channels_line(tiff.describe(), tiff.channels, channels))
    return _decode_bytes(data, _DECODE)


def _to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """``(H, W)`` or ``(H, W, n)`` -> ``(H, W, channels)``."""
    found = 1 if image.ndim == 2 else image.shape[2]
    if found == channels:
        return image.reshape(*image.shape[:2], channels)
    if found == 1 and channels == 3:
        return cv2.merge([image] * 3)
    if found == 3 and channels == 1:
        known = image.dtype in (np.uint8, np.uint16, np.float32)
        return cv2.cvtColor(image if known else image.astype(np.float32), cv2.COLOR_RGB2GRAY)[:, :, None]
    raise DataError(_channels_line(f"{found} channel{'s' * (found > 1)}", found, channels))


def _channels_line(what: str, found: int, channels: int) -> str:
    return f"{what}, but data.channels={channels}; set data.channels={found} or convert the image"
