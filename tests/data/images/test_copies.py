import cv2
import numpy as np
import pytest

from smalti.data.images.copies import find_copies
from smalti.data.images.folders import open_images
from smalti.data.images.pixels import NO_PIXELS
from smalti.data.images.scan import scan_files


@pytest.fixture
def scanned(write, tmp_path):
    """Scanned images: six of their own in a, and in b one of these as it is, one saved again, two broken, one own."""
    rng = np.random.default_rng(0)
    pictures = [cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (160, 120)) for _ in range(7)]
    for number, picture in enumerate(pictures[:6]):
        write(f"a/{number}.png", picture)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/1.png").write_bytes((tmp_path / "a/1.png").read_bytes())
    write("b/2.jpg", cv2.resize(pictures[2], (80, 60), interpolation=cv2.INTER_AREA), quality=60)
    (tmp_path / "b/3.png").write_bytes(b"")
    (tmp_path / "b/4.png").write_bytes(b"")
    write("b/5.png", pictures[6])
    return {name: list(scan_files(open_images(tmp_path / name).paths, NO_PIXELS.max_pixels)) for name in "ab"}


def names(pairs):
    return [
        (one.relative_to(one.parents[1]).as_posix(), two.relative_to(two.parents[1]).as_posix()) for one, two in pairs
    ]


def test_identical_files_and_near_duplicates_of_training_images_are_told_apart(scanned):
    copies = find_copies(scanned["b"], scanned["a"], of="val", others="training")
    assert copies.count == 5 and copies.is_leak
    assert names(copies.identical) == [("b/1.png", "a/1.png")]
    assert names(copies.near) == [("b/2.jpg", "a/2.png")]
    assert not find_copies(scanned["b"][4:], scanned["a"], of="val", others="training").is_leak
    assert find_copies([], scanned["a"], of="val", others="training").count == 0


def test_images_that_repeat_earlier_ones_are_no_leak(scanned):
    copies = find_copies([*scanned["a"], *scanned["b"]], of="training", others="training")
    assert names(copies.identical) == [("b/1.png", "a/1.png")]  # and not the two empty files
    assert names(copies.near) == [("b/2.jpg", "a/2.png")]
    assert not copies.is_leak
