import numpy as np
import pytest

from data.images.test_decode import COLOR, NOISE, encoded, tiff
from smalti.data.images.decode import decode_image
from smalti.errors import DataError


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "deflate"},
        {"compression": "deflate", "predictor": True},
        {"tile": (16, 32), "compression": "deflate"},
        {"tile": (16, 32), "compression": "deflate", "predictor": True},
        {"bigtiff": True},
        {"byteorder": ">"},
        {"rowsperstrip": 7},
    ],
    ids=str,
)
def test_five_channel_tiffs_come_out_as_they_went_in(dtype, planar, options):
    if dtype == np.float32 and "predictor" in options:
        pytest.importorskip("imagecodecs")
    rng = np.random.default_rng(1)
    pixels = (
        rng.random((40, 70, 5), np.float32) if dtype == np.float32 else rng.integers(0, 256, (40, 70, 5)).astype(dtype)
    )
    stored = pixels if planar == "contig" else np.moveaxis(pixels, -1, 0).copy()
    data = tiff(stored, photometric="minisblack", planarconfig=planar, **options)
    expected = pixels.astype(np.float32) / 65535 if dtype == np.uint16 else pixels
    np.testing.assert_allclose(decode_image(data, 5), expected, rtol=1e-6)
    for share in (0.2, 0.9):
        with pytest.raises(DataError, match="cut short"):
            decode_image(data[: int(share * len(data))], 5)


def test_a_compression_that_needs_imagecodecs_names_the_extra(monkeypatch):
    pytest.importorskip("imagecodecs")
    pixels = np.random.default_rng(3).integers(0, 256, (20, 30, 5)).astype(np.uint8)
    data = tiff(pixels, photometric="minisblack", planarconfig="contig", compression="lzw")
    np.testing.assert_array_equal(decode_image(data, 5), pixels)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"5 channels with LZW compression; install smalti\[tiff\] to read it"):
        decode_image(data, 5)


def test_pages_of_a_tiff_are_channels():
    pages = np.random.default_rng(2).integers(0, 65536, (6, 8, 12)).astype(np.uint16)
    image = decode_image(tiff(pages, photometric="minisblack"), 6)
    np.testing.assert_allclose(image, np.moveaxis(pages, 0, -1) / 65535, rtol=1e-6)


def test_a_tiff_whose_directory_leads_to_itself_is_refused():
    data = bytearray(encoded(COLOR, "TIFF"))
    first = int.from_bytes(data[4:8], "little")
    entries = int.from_bytes(data[first : first + 2], "little")
    place = first + 2 + 12 * entries
    data[place : place + 4] = data[4:8]
    with pytest.raises(DataError, match="its directories lead back to one another"):
        decode_image(bytes(data))


def test_a_deflated_tiff_with_a_flipped_bit_is_refused():
    data = bytearray(encoded(NOISE, "TIFF", compression="tiff_adobe_deflate"))
    assert decode_image(bytes(data)).shape == NOISE.shape
    data[len(data) // 2] ^= 4
    with pytest.raises(DataError, match="a damaged TIFF: the checksum of its strip at byte"):
        decode_image(bytes(data))


def test_a_tiff_of_lab_colours_is_refused():
    with pytest.raises(DataError, match="Lab colours"):
        decode_image(tiff(COLOR, photometric="cielab"))
