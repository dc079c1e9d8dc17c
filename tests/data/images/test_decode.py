import io
import re
import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smalti.data.images.decode import ImageFacts, decode_image, image_size, inspect_image, read_image
from smalti.data.images.headers import stored_size
from smalti.data.images.pixels import PixelConfig
from smalti.errors import DataError

COLOR = np.tile(np.array([200, 20, 10], np.uint8), (8, 12, 1))
GREY_OF_COLOR = round(0.299 * 200 + 0.587 * 20 + 0.114 * 10)
NOISE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)

FIVE = np.random.default_rng(1).integers(0, 256, (9, 11, 5), dtype=np.uint8)
STARTS = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBP", b"BM", b"II*\0", b"MM\0+"]


def encoded(content, kind, **options):
    picture = Image.fromarray(content) if isinstance(content, np.ndarray) else content
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def tiff(content, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, content, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_every_lossless_format_and_mode_gives_pillows_rgb(kind, mode):
    if (kind, mode) in {("BMP", "LA"), ("WEBP", "1"), ("WEBP", "P"), ("WEBP", "L"), ("WEBP", "LA")}:
        pytest.skip(f"there is no {kind} of mode {mode}")
    picture = Image.fromarray(NOISE).convert(mode)
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode_image(encoded(picture, kind, **options))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.asarray(picture.convert("RGB")))


def test_transparent_palette_pngs_keep_their_colours():
    picture = Image.fromarray(NOISE).convert("P")
    image = decode_image(encoded(picture, "PNG", transparency=3))
    np.testing.assert_array_equal(image, np.asarray(picture.convert("RGB")))


def test_jpegs_are_as_pillow_decodes_them_to_two_levels():
    data = encoded(NOISE, "JPEG", quality=90)
    theirs = np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(decode_image(data).astype(int) - theirs).max() <= 2


def test_colour_becomes_one_channel_by_luminance_and_grey_three_by_repeating():
    assert decode_image(encoded(COLOR, "PNG"), 1)[0, 0].tolist() == [GREY_OF_COLOR]
    grey = np.full((5, 6), 77, np.uint8)
    assert decode_image(encoded(grey, "PNG"), 3)[0, 0].tolist() == [77, 77, 77]
    assert decode_image(encoded(grey, "JPEG"), 3).shape == (5, 6, 3)
    assert decode_image(encoded(grey, "PNG"), 1).shape == (5, 6, 1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_floats_in_zero_to_one(kind):
    values = np.array([[0, 1, 255, 256, 65535]], np.uint16)
    image = decode_image(encoded(values, kind), 1)
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image[..., 0], values.astype(np.float32) / np.float32(65535))


def test_sixteen_bit_colour_keeps_its_depth():
    values = np.array([[[65535, 1000, 7]]], np.uint16)
    data = cv2.imencode(".png", values[:, :, ::-1])[1].tobytes()
    np.testing.assert_allclose(decode_image(data)[0, 0], values[0, 0] / 65535, rtol=1e-6)


def test_float_tiffs_must_lie_in_zero_to_one():
    values = np.array([[0.0, 0.25, 1.0]], np.float32)
    np.testing.assert_array_equal(decode_image(encoded(values, "TIFF"), 1)[..., 0], values)
    with pytest.raises(DataError, match=r"float pixels from 0 to 4000; they must lie in 0\.\.1"):
        decode_image(encoded(values * 4000, "TIFF"), 1)
    with pytest.raises(DataError, match="float pixels from nan"):
        decode_image(encoded(values * np.nan, "TIFF"), 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    path = tmp_path / f"turned.{kind.lower()}"
    path.write_bytes(encoded(COLOR, kind, exif=exif))
    assert read_image(path).shape == (12, 8, 3)
    assert image_size(path) == (12, 8)


@pytest.mark.parametrize(
    ("data", "channels", "found"),
    [
        (lambda: tiff(np.zeros((8, 9, 5), np.uint8), photometric="minisblack", planarconfig="contig"), 3, "5 channels"),
        (lambda: tiff(np.zeros((6, 8, 9), np.uint8), photometric="minisblack"), 3, r"6 channels \(6 pages\)"),
        (lambda: encoded(COLOR, "PNG"), 5, "3 channels"),
        (lambda: encoded(COLOR[..., 0], "PNG"), 2, "1 channel"),
    ],
)
def test_another_number_of_channels_names_both_numbers_and_the_setting(data, channels, found):
    with pytest.raises(DataError, match=f"{found}, but data.channels={channels}; set data.channels={found[0]}"):
        decode_image(data(), channels)


def test_four_channels_are_read_where_four_are_asked_for():
    four = np.concatenate([COLOR, np.full((8, 12, 1), 99, np.uint8)], axis=2)
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode_image(encoded(four, kind), 4), four)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@given(share=st.floats(0.0, 0.995))
@settings(max_examples=25)
def test_files_cut_anywhere_are_refused(kind, share):
    data = encoded(NOISE, kind)
    with pytest.raises(DataError, match=r"cut short|empty|not an image|checksum"):
        decode_image(data[: int(share * len(data))])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_cut_files_leave_nothing_on_stderr(kind, capfd):
    data = encoded(NOISE, kind)
    for share in (0.01, 0.3, 0.6, 0.99):
        with pytest.raises(DataError):
            decode_image(data[: int(share * len(data))])
    assert capfd.readouterr().err == ""


def test_a_progressive_jpeg_is_complete_only_with_its_last_scan():
    data = encoded(NOISE, "JPEG", progressive=True)
    assert decode_image(data).shape == NOISE.shape
    with pytest.raises(DataError, match="a JPEG cut short after"):
        decode_image(data[:-40])


def test_a_cut_jpeg_is_seen_in_spite_of_its_thumbnail():
    thumbnail = encoded(NOISE[:8, :8], "JPEG")
    data = encoded(NOISE, "JPEG")
    with_thumbnail = data[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + data[2:]
    np.testing.assert_array_equal(decode_image(with_thumbnail), decode_image(data))
    with pytest.raises(DataError, match="cut short"):
        decode_image(with_thumbnail[:-500])


def test_what_a_camera_appends_to_a_jpeg_does_no_harm():
    film = b"\xff\xda\x00\x04" + np.random.default_rng(3).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    data = encoded(NOISE, "JPEG")
    np.testing.assert_array_equal(decode_image(data + film), decode_image(data))


def test_a_png_with_one_wrong_bit_is_refused():
    data = bytearray(encoded(NOISE, "PNG"))
    data[len(data) // 2] ^= 4
    with pytest.raises(DataError, match="a damaged PNG: the checksum of its IDAT chunk is wrong"):
        decode_image(bytes(data))


def test_a_comment_with_a_wrong_checksum_is_forgiven():
    data = encoded(COLOR, "PNG")
    chunk = struct.pack(">I", 2) + b"tEXthi" + struct.pack(">I", zlib.crc32(b"tEXthi") ^ 1)
    np.testing.assert_array_equal(decode_image(data[:33] + chunk + data[33:]), COLOR)


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "half.jpg"
    with pytest.raises(DataError, match=re.escape(f"{path}: can't be read as an image (No such file")):
        read_image(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=re.escape(f"{path}: an empty file")):
        read_image(path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=re.escape(f"{path}: can't be decoded")):
        read_image(path)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3000, 3000)])
def test_tiny_and_huge_images_are_read(size):
    height, width = size
    assert decode_image(encoded(np.zeros((height, width, 3), np.uint8), "PNG")).shape == (height, width, 3)


@given(start=st.sampled_from(STARTS), data=st.binary(max_size=200))
def test_bytes_at_random_are_one_clear_error(start, data):
    with pytest.raises(DataError):
        decode_image(start + data)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "five channels"])
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=40)
def test_files_with_wrong_bytes_give_an_image_or_one_clear_error(kind, places):
    channels = 5 if kind == "five channels" else 3
    data = bytearray(
        tiff(FIVE, photometric="minisblack", planarconfig="contig") if channels == 5 else encoded(NOISE, kind)
    )
    for share, value in places:
        data[int(share**3 * len(data))] = value  # most of them in the header
    try:
        assert decode_image(bytes(data), channels).shape[2] == channels
    except DataError:
        pass


def test_facts_tell_format_by_content_and_depth_by_sample():
    assert inspect_image(encoded(COLOR, "JPEG"))[0] == ImageFacts(8, 12, 3, 8, "jpeg")
    deep, values = inspect_image(encoded(np.arange(20, dtype=np.uint16).reshape(4, 5) * 200, "PNG"))
    assert deep == ImageFacts(4, 5, 1, 16, "png", (0, 3800), "uint16") and values.max() == 3800
    five = tiff(np.zeros((8, 9, 5), np.uint16), photometric="minisblack", planarconfig="contig")
    assert inspect_image(five)[0] == ImageFacts(8, 9, 5, 16, "tiff", (0, 0), "uint16", is_picture=False)
    assert inspect_image(encoded(Image.fromarray(COLOR).convert("RGBA"), "TIFF"))[0] == ImageFacts(8, 12, 4, 8, "tiff")


def test_a_turned_jpeg_is_inspected_as_it_is_read():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(COLOR, "JPEG", exif=exif)
    facts, pixels = inspect_image(data)
    assert (facts.height, facts.width) == (12, 8) and np.array_equal(pixels, decode_image(data))


def with_size(data: bytes, kind: str, height: int, width: int) -> bytes:
    """The same file with a header that says another size."""
    changed = bytearray(data)
    if kind == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        changed[place : place + 4] = struct.pack(">HH", height, width)
    elif kind == "PNG":
        changed[16:24] = struct.pack(">II", width, height)
        changed[29:33] = struct.pack(">I", zlib.crc32(changed[12:29]))
    elif kind == "BMP":
        changed[18:26] = struct.pack("<ii", width, height)
    elif kind == "WEBP":
        bits = (width - 1) | (height - 1) << 14 | int.from_bytes(data[21:25], "little") & 0xF0000000
        changed[21:25] = bits.to_bytes(4, "little")
    return bytes(changed)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
def test_an_image_of_too_many_pixels_is_refused_by_its_header(kind):
    data = encoded(COLOR, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert stored_size(data) == (8, 12)
    side = 16000 if kind == "WEBP" else 30000
    huge = with_size(data, kind, side, side)
    assert stored_size(huge) == (side, side)
    if kind == "BMP":  # its pixels would be missing
        huge += b"\0" * 100
        with pytest.raises(DataError, match="a BMP cut short"):
            decode_image(huge)
        return
    tracemalloc.start()
    with pytest.raises(DataError, match=f"{side}x{side} pixels, more than data.max_pixels=178956970"):
        decode_image(huge)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": Image.Exif()}])
def test_headers_say_the_size_of_every_kind_of_webp(options):
    data = encoded(NOISE, "WEBP", **options)
    assert stored_size(data) == NOISE.shape[:2]


def test_the_limit_counts_pages_and_channels_and_is_a_setting():
    five = tiff(FIVE, photometric="minisblack", planarconfig="contig")  # 99 pixels of five channels: 123.75
    assert decode_image(five, 5, PixelConfig(max_pixels=124)).shape == FIVE.shape
    with pytest.raises(DataError, match=r"11x9 pixels, more than data.max_pixels=123"):
        decode_image(five, 5, PixelConfig(max_pixels=123))
    with pytest.raises(DataError, match=r"12x8 pixels, more than data\.max_pixels=95"):
        decode_image(encoded(Image.fromarray(COLOR), "GIF"), 3, PixelConfig(max_pixels=95))
    with pytest.raises(DataError, match=r"12x8 pixels, more than data\.max_pixels=95"):
        inspect_image(encoded(COLOR, "PNG"), 95)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_a_scale_says_which_values_become_0_and_1(dtype):
    values = np.array([[0, 25, 50], [75, 100, 110]]).astype(dtype)
    image = decode_image(tiff(values), 1, PixelConfig(scale=(0, 100)))
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[..., 0], [[0, 0.25, 0.5], [0.75, 1, 1]], atol=1e-6)


def test_a_scale_may_have_a_range_for_each_channel():
    image = decode_image(encoded(COLOR, "PNG"), 3, PixelConfig(scale=((0, 200), (0, 40), (0, 100))))
    np.testing.assert_allclose(image[0, 0], [1, 0.5, 0.1], atol=1e-6)
    with pytest.raises(DataError, match=r"data\.scale has 2 ranges, the image has 3 channels"):
        decode_image(encoded(COLOR, "PNG"), 3, PixelConfig(scale=((0, 200), (0, 40))))


def test_values_outside_of_their_range_are_refused_with_the_setting_that_says_what_they_mean():
    for values in (np.full((2, 3), -5, np.int16), np.full((2, 3), 300, np.float32)):
        with pytest.raises(DataError, match=r"data\.scale=\[LOW,HIGH\] says which values become 0 and 1"):
            decode_image(tiff(values), 1)
    with pytest.raises(DataError, match="not finite"):
        decode_image(tiff(np.array([[0, np.nan]], np.float32)), 1, PixelConfig(scale=(0, 1)))
