import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from smalti.data.images.folders import open_images
from smalti.data.images.pixels import NO_PIXELS
from smalti.data.images.scan import scan_files, summarise


def scan(folder):
    return list(scan_files(open_images(folder).paths, NO_PIXELS.max_pixels))


def test_a_scan_counts_sizes_channels_depths_formats_and_damage(write, tmp_path):
    write("a.png", np.zeros((20, 30, 3), np.uint8))
    write("b.jpg", np.zeros((40, 30), np.uint8))
    write("c.png", np.zeros((60, 90), np.uint16))
    write("d.png", Image.new("RGBA", (30, 30)))
    broken = write("e.png")
    broken.write_bytes(broken.read_bytes()[:200])
    (tmp_path / "f.jpg").write_bytes(b"")
    (tmp_path / "g.tif").write_bytes((tmp_path / "a.png").read_bytes())
    report = summarise(scan(tmp_path))
    assert report.count == 7
    assert report.total_bytes == sum(path.stat().st_size for path in open_images(tmp_path).paths)
    assert report.height == (20, 30, 60) and report.width == (30, 30, 90)
    assert report.channels == {3: 2, 1: 2, 4: 1} and report.bit_depths == {8: 4, 16: 1}
    assert report.formats == {"png": 4, "jpeg": 1}  # g.tif is a PNG in truth
    assert report.set_channels == report.best_channels == 3 and report.wrong_channels == ()
    assert [(skipped.path.name, skipped.reason) for skipped in report.unreadable] == [
        ("e.png", "a PNG cut short after 200 bytes"),
        ("f.jpg", "an empty file"),
    ]


def test_a_set_of_one_broken_file_is_still_summarised(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (one,) = scan(tmp_path)
    assert one.digest == b"" and one.picture is None
    report = summarise([one])
    assert report.count == len(report.unreadable) == 1 and report.height == (0, 0.0, 0)


def test_channels_that_no_setting_reads_together_are_named(write, tmp_path):
    write("a.png")
    for number in range(2):
        path = tmp_path / f"{number}.tif"
        tifffile.imwrite(path, np.zeros((8, 9, 5), np.uint8), photometric="minisblack", planarconfig="contig")
    found = scan(tmp_path)
    default, five = summarise(found), summarise(found, channels=5)
    assert default.best_channels == five.best_channels == 5
    assert [(path.name, why) for path, why in default.wrong_channels] == [
        ("0.tif", "5 channels"),
        ("1.tif", "5 channels"),
    ]
    assert [(path.name, why) for path, why in five.wrong_channels] == [("a.png", "3 channels")]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_with_numbers_that_are_not_finite_are_unreadable(tmp_path, value):
    cv2.imwrite(str(tmp_path / "a.tif"), np.full((6, 8), value, np.float32))
    report = summarise(scan(tmp_path))
    assert [reason for _, reason in report.unreadable] == ["pixels that are not finite"]
    assert report.values == {} and report.scale_hint == ""


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_values_outside_of_0_and_1_come_with_the_settings_that_read_them(tmp_path, dtype):
    cv2.imwrite(str(tmp_path / "a.tif"), (np.arange(48).reshape(6, 8) * 40 - 1000).astype(dtype))
    report = summarise(scan(tmp_path))
    assert report.unreadable == ()
    assert report.scale_hint.startswith(f"values from -1000 to 880 ({dtype}); they need data.scale=[-1000,880] or")
