import re
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from smalti.data.images.folders import ImageSample, open_images
from smalti.data.images.image_set import read_class_names
from smalti.data.images.labelled import open_labelled
from smalti.data.images.masks import check_headers, eval_mask, read_mask
from smalti.data.images.pixels import PixelConfig
from smalti.errors import ConfigError, DataError

NUMBERS = np.array([[0, 1, 2], [255, 2, 1]], np.uint8)


def scene(write, root, numbers, names="sky\nsea\nland\n"):
    write("images/a.png", np.zeros((*numbers.shape[:2], 3), np.uint8))
    write("images/b.png", np.zeros((*numbers.shape[:2], 3), np.uint8))
    for stem in "ab":
        write(f"masks/{stem}.png", numbers)
    (root / "classes.txt").write_text(names)


def black_and_white(write, root, values=(0, 255), names="background\nobject\n"):
    scene(write, root, np.resize(np.array(values, np.uint8), (2, 3)), names)


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_grey_palette_and_16_bit_masks_give_their_numbers(write, tmp_path, mode):
    if mode == "P":
        picture = Image.fromarray(NUMBERS).convert("P")
        picture.putdata(NUMBERS.ravel().tolist())
        picture.putpalette([200, 7, 7] * 256)
    else:
        picture = NUMBERS.astype(np.uint16) if mode == "I;16" else NUMBERS
    scene(write, tmp_path, NUMBERS)
    write("masks/a.png", picture)
    mask = read_mask(open_images(tmp_path).samples[0], 3)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, NUMBERS)


def test_one_bit_masks_are_zero_and_one(write, tmp_path):
    scene(write, tmp_path, NUMBERS)
    write("masks/a.png", np.array([[True, False, True], [False, False, True]]))
    np.testing.assert_array_equal(read_mask(open_images(tmp_path).samples[0], 2), [[1, 0, 1], [0, 0, 1]])


def test_over_255_classes_no_value_is_ignored(write, tmp_path):
    scene(write, tmp_path, NUMBERS)
    write("masks/a.png", np.array([[0, 255, 256], [299, 1, 2]], np.uint16))
    mask = read_mask(open_images(tmp_path).samples[0], 300)
    assert mask.dtype == np.int64 and mask[0].tolist() == [0, 255, 256]


def test_instances_are_one_and_the_rest_zero(write, tmp_path):
    image = write("a.png", np.zeros((2, 3), np.uint8))
    instances = write("i.png", np.array([[0, 700, 3], [1, 0, 0]], np.uint16))
    mask = read_mask(ImageSample(image, instances=instances), 2)
    np.testing.assert_array_equal(mask, [[0, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize(
    ("mask", "line"),
    [
        (np.zeros((2, 3, 3), np.uint8), "a.png: a mask of mode RGB, it needs one number a pixel"),
        (np.array([[0, 1, 7], [9, 2, 1]], np.uint8), r"holds the value 7, but classes.txt names 3 classes \(0..2; 255"),
        (np.zeros((3, 3), np.uint8), "a.png: 3x3 pixels, its image a.png has 3x2; they must be the same"),
    ],
)
def test_masks_that_dont_fit_are_one_line(write, tmp_path, mask, line):
    scene(write, tmp_path, NUMBERS)
    write("masks/a.png", mask)
    with pytest.raises(DataError, match=line):
        read_mask(open_images(tmp_path).samples[0], 3)


def test_a_broken_mask_is_one_line(write, tmp_path):
    scene(write, tmp_path, NUMBERS)
    path = tmp_path / "masks/a.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=re.escape(f"{path}: can't be read as a mask (")):
        read_mask(open_images(tmp_path).samples[0], 3)


def test_masks_of_0_and_255_are_warned_of_once_since_one_class_would_be_all_there_is(write, tmp_path):
    black_and_white(write, tmp_path)
    line = (
        "masks hold only 0 and 255, and 255 is ignored, so nothing but 'background' counts; save the other class as 1"
    )
    with pytest.warns(UserWarning, match=line) as caught:
        open_labelled(tmp_path, need="masks")
    assert len(caught) == 1


@pytest.mark.parametrize("values", [(0,), (0, 1), (0, 1, 255)])
def test_masks_that_hold_classes_are_not_warned_of(write, tmp_path, values):
    black_and_white(write, tmp_path, values)
    open_labelled(tmp_path, need="masks")


def test_a_broken_mask_is_told_when_it_is_read_not_before(write, tmp_path):
    black_and_white(write, tmp_path)
    (tmp_path / "masks/a.png").write_bytes(b"no image")
    data = open_labelled(tmp_path, need="masks")
    with pytest.raises(DataError, match=r"a.png: can't be read as a mask"):
        for sample in (*data.train.samples, *data.test.samples):
            read_mask(sample, 2)


@given(height=st.integers(1, 60), width=st.integers(1, 60), size=st.integers(1, 80))
def test_masks_are_resized_by_torchs_nearest(height, width, size):
    mask = np.random.default_rng(height).integers(0, 256, (height, width), dtype=np.uint8)
    theirs = F.interpolate(torch.from_numpy(mask)[None, None], size=(size, size), mode="nearest")[0, 0]
    np.testing.assert_array_equal(eval_mask(mask, size), theirs.numpy())


def test_e6_nearest_takes_these_pixels():
    assert eval_mask(np.array([[0, 1], [2, 3]]), 3).tolist() == [[0, 0, 1], [0, 0, 1], [2, 2, 3]]
    numbers = np.arange(16).reshape(4, 4)
    assert eval_mask(numbers, 3).tolist() == numbers[:3, :3].tolist()


def test_real_masks_fit_their_classes(shared):
    for name, classes in (("ccp-clothing-parsing", 59), ("dsb2018-nuclei", 2)):
        data = open_labelled(shared / name, need="masks")
        assert len(data.classes) == classes and data.test.splits == ("val",)
        for sample in data.test.samples[:10]:
            assert read_mask(sample, classes).max() < classes


def test_masks_of_another_size_are_found_by_their_headers(write, tmp_path):
    for name, shape in (("a", (24, 32)), ("b", (24, 31))):
        write(f"images/{name}.png")
        write(f"masks/{name}.png", np.zeros(shape, np.uint8))
    (tmp_path / "classes.txt").write_text("sky\n")
    with pytest.raises(DataError, match=r"masks/b\.png: 31x24 pixels, its image b\.png has 32x24"):
        check_headers(open_images(tmp_path))


def test_a_mask_of_too_many_pixels_is_refused_before_it_is_decoded(write, tmp_path):
    write("images/a.png")
    write("masks/a.png", np.zeros((24, 32), np.uint8))
    (tmp_path / "classes.txt").write_text("sky\n")
    (sample,) = open_images(tmp_path).with_pixels(PixelConfig(max_pixels=767)).samples
    with pytest.raises(DataError, match=r"masks/a\.png: 32x24 pixels, more than max_pixels=767"):
        read_mask(sample, 1)


def grey_png(numbers, bits):
    """A grey PNG of 1, 2 or 4 bits, as optimisers write maps of classes; Pillow writes none of 2 and 4."""
    height, width = numbers.shape
    per_byte = 8 // bits
    padded = np.pad(numbers, ((0, 0), (0, -width % per_byte))).reshape(height, -1, per_byte)
    shifts = bits * np.arange(per_byte - 1, -1, -1)
    rows = (padded << shifts).sum(2).astype(np.uint8)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_masks_of_few_bits_give_the_numbers_that_are_stored(write, tmp_path, bits):
    numbers = np.random.default_rng(0).integers(0, 2**bits, (24, 31), dtype=np.uint8)
    image = write("x.png", np.zeros((24, 31, 3), np.uint8))
    mask = tmp_path / "mask.png"
    mask.write_bytes(grey_png(numbers, bits))
    np.testing.assert_array_equal(read_mask(ImageSample(image, mask=mask), 16), numbers)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize(
    ("shape", "orientation", "line"),
    [
        ((24, 24), 6, "EXIF orientation 6, its mask m.png has none, and it can't be known whether the mask"),
        ((24, 32), 3, "EXIF orientation 3, its mask m.png has none"),
        (
            (24, 32),
            6,
            "32x24 pixels, its image x.jpg has 24x32; they must be the same .the image is turned by",
        ),
    ],
    ids=["square", "upside down", "stored"],
)
def test_a_turned_image_with_a_mask_that_is_not_is_refused(write, shape, orientation, line):
    image = write("x.jpg", np.zeros((*shape, 3), np.uint8), exif=exif(orientation))
    mask = write("m.png", np.zeros(shape, np.uint8))
    with pytest.raises(DataError, match=line):
        read_mask(ImageSample(image, mask=mask), 1)


def test_a_mask_as_the_image_is_shown_or_with_the_same_orientation_is_read(write):
    image = write("x.jpg", np.zeros((24, 32, 3), np.uint8), exif=exif(6))
    shown = write("shown.png", np.zeros((32, 24), np.uint8))
    assert read_mask(ImageSample(image, mask=shown), 1).shape == (32, 24)
    numbers = np.zeros((24, 32), np.uint8)
    numbers[0] = 1
    turned = write("turned.png", numbers, exif=exif(6))
    assert read_mask(ImageSample(image, mask=turned), 2)[:, -1].tolist() == [1] * 32


def test_a_mask_saved_as_jpeg_is_refused(write):
    image, mask = write("x.png", np.zeros((24, 32, 3), np.uint8)), write("m.jpg", np.zeros((24, 32), np.uint8))
    with pytest.raises(DataError, match=r"m.jpg: a mask saved as JPEG, which changes its values; save masks as PNG"):
        read_mask(ImageSample(image, mask=mask), 1)


@pytest.fixture
def scenes(write, tmp_path):
    for number in range(5):
        write(f"images/{number}.png")
        write(f"masks/{number}.png", np.array([[0, 1, 7], [255, 0, 1]], np.uint8).repeat(12, 0).repeat(11, 1)[:, :32])
    (tmp_path / "classes.txt").write_text("sky\nsea\nvoid\n")
    return tmp_path


def values(data):
    return np.unique(read_mask(data.train.samples[0], len(data.classes))).tolist()


def test_values_can_be_ignored_by_number_and_by_name(scenes):
    with pytest.raises(DataError, match=r"holds the value 7, but classes.txt names 3"):
        values(open_labelled(scenes, need="masks"))
    assert values(open_labelled(scenes, need="masks", ignore=[7])) == [0, 1, 255]
    assert values(open_labelled(scenes, need="masks", ignore=[7, "sea"])) == [0, 255]
    with pytest.raises(ConfigError, match=r"eval.ignore: no class 'see'; there are: sky, sea, void"):
        open_labelled(scenes, need="masks", ignore=["see"])


def test_a_map_of_values_names_classes_and_refuses_other_values(scenes):
    assert values(open_labelled(scenes, need="masks", mask_values={0: 1, 1: "sky", 7: 2, 255: "void"})) == [0, 1, 2]
    with pytest.raises(DataError, match=r"holds the value 7, which no mask of masks has .2 values named; 255 ig"):
        values(open_labelled(scenes, need="masks", mask_values={0: 0, 1: 1}))
    with pytest.raises(ConfigError, match=r"values are 0..255, not 300"):
        open_labelled(scenes, need="masks", mask_values={300: 0})


def test_without_class_names_the_values_of_the_first_masks_are_named(scenes):
    (scenes / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"no classes.txt; .*values in the first masks: 0, 1, 7, 255"):
        open_labelled(scenes, need="masks")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("sky\nsea\n\n\n", ("sky", "sea")),
        ("# label:color_rgb:parts:actions\nsky:0,0,0::\nsea:9,9,9::\n", ("sky", "sea")),
        ("sky\n\nsea\n", "line 2 is blank; every value needs a name"),
        ("\nsky\nsea\n", "line 1 is blank"),
        ("# names\nsky\nsea\n", "line 1 begins with #, and comments are not read"),
    ],
)
def test_names_of_classes_keep_their_lines(tmp_path, text, names):
    (tmp_path / "classes.txt").write_text(text)
    if isinstance(names, tuple):
        assert read_class_names(tmp_path) == names
    else:
        with pytest.raises(DataError, match=names):
            read_class_names(tmp_path)


def test_masks_need_names_and_hint_at_class_folders(write, tmp_path):
    scene(write, tmp_path, np.zeros((4, 5), np.uint8))
    assert open_labelled(tmp_path, need="masks").classes == ("sky", "sea", "land")
    (tmp_path / "objects").mkdir()
    with pytest.raises(DataError, match=f"this needs class folders .*; there are some in {tmp_path / 'objects'}"):
        open_labelled(tmp_path, need="labels")
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"no classes.txt; it needs one class name a line, the first for value 0"):
        open_labelled(tmp_path, need="masks")
