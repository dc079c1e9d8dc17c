import numpy as np
from PIL import Image

from smalti.data.folders import open_images
from smalti.data.scan import scan_images


def test_a_scan_tells_sizes_channels_depths_formats_and_damage(write, tmp_path):
    write("mine/a.png", np.zeros((20, 30, 3), np.uint8))
    write("mine/b.jpg", np.zeros((40, 30), np.uint8))
    write("mine/c.png", np.zeros((60, 90), np.uint16))
    write("mine/d.png", Image.new("RGBA", (30, 30)))
    broken = write("mine/e.png")
    broken.write_bytes(broken.read_bytes()[:200])
    (tmp_path / "mine/f.jpg").write_bytes(b"")
    (tmp_path / "mine/g.tif").write_bytes((tmp_path / "mine/a.png").read_bytes())
    write("other/x.png")
    (tmp_path / "other/y.png").write_bytes((tmp_path / "mine/b.jpg").read_bytes())
    calls = []
    mine, other = open_images(tmp_path / "mine"), open_images(tmp_path / "other")
    report = scan_images(mine, against=other, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 9) for i in range(1, 10)]
    assert report.count == 7 and report.total_bytes == sum(path.stat().st_size for path in mine.paths)
    assert report.height == (20, 30, 60) and report.width == (30, 30, 90)
    assert report.channels == {3: 2, 1: 2, 4: 1} and report.bit_depths == {8: 4, 16: 1}
    assert report.formats == {"png": 4, "jpeg": 1}  # g.tif is a PNG in truth
    assert [(skipped.path.name, skipped.reason) for skipped in report.unreadable] == [
        ("e.png", "a PNG cut short after 200 bytes"),
        ("f.jpg", "an empty file"),
    ]
    assert [[path.name for path in group] for group in report.duplicates] == [["a.png", "g.tif"]]
    assert [(a.name, b.name) for a, b in report.shared] == [("b.jpg", "y.png")]
    text = report.lines()
    assert "size         height 20 to 60 (median 30), width 30 to 90 (median 30) px" in text
    assert "duplicates   1 (same bytes as an earlier image)" in text
    assert f"shared       1 with {tmp_path / 'other'}" in text


def test_a_set_of_one_broken_file_is_still_reported(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    report = scan_images(open_images(tmp_path))
    assert report.lines() == [
        "images       1 (0.0 MiB)",
        "unreadable   1",
        f"  {tmp_path / 'a.png'}: an empty file",
        "duplicates   0 (same bytes as an earlier image)",
    ]
