"""Size of an image from the bytes of its file, before anything is decoded: 30 bytes can decode to gigabytes."""

import struct
from collections.abc import Iterator

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SIZES_OF_JPEG = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of a frame; the others are tables


def stored_size(data: bytes) -> tuple[int, int] | None:
    """Height and width that the header of a JPEG, PNG, WebP or BMP says, before EXIF turns it; None if it says none."""
    try:
        if data[:2] == b"\xff\xd8":
            frames = (place for marker, place in jpeg_segments(data) if marker in _SIZES_OF_JPEG)
            height, width = struct.unpack_from(">HH", data, next(frames) + 5)
            return height, width
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            width, height = struct.unpack_from(">II", data, 16)
            return height, width
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_size(data)
        if data[:2] == b"BM":
            if int.from_bytes(data[14:18], "little") == 12:  # OS/2's first header
                width, height = struct.unpack_from("<HH", data, 18)
            else:
                width, height = struct.unpack_from("<ii", data, 18)
            return abs(height), abs(width)
    except (struct.error, StopIteration):  # cut short, or without a frame
        pass
    return None


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of each segment of a JPEG, up to its first scan or whatever is none."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in (0xFF, 0x01):  # filling
            place += 1 if marker == 0xFF else 2
            continue
        yield marker, place
        if marker in (0xD9, 0xDA):
            return
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[27:30], "little"), 1 + int.from_bytes(data[24:27], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    return None
