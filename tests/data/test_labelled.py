import itertools
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from smalti.data.folders import ImageSample, ImageSet, open_images
from smalti.data.labelled import (
    LabelledData,
    check_headers,
    draw_training,
    eval_batches,
    eval_image,
    eval_mask,
    open_labelled,
    read_mask,
)
from smalti.data.pixels import PixelConfig
from smalti.errors import ConfigError, DataError


def class_folders(write, counts, split=""):
    for name, count in counts.items():
        for i in range(count):
            write(f"{split}/{name}/{i}.png" if split else f"{name}/{i}.png")


def test_judged_on_val_else_test_unless_told(write, tmp_path):
    for split in ("train", "val", "test"):
        class_folders(write, {"a": 2, "b": 1}, split)
    data = open_labelled(tmp_path, need="labels")
    assert data.classes == ("a", "b") and data.note == "learned from train (3), evaluated on val (3)"
    assert {sample.split for sample in data.train.samples} == {"train"}
    assert open_labelled(tmp_path, split="test", need="labels").test.splits == ("test",)
    assert open_labelled(tmp_path, split="validation", need="labels").test.splits == ("val",)
    for file in (tmp_path / "val").rglob("*.png"):
        file.unlink()
    assert open_labelled(tmp_path, need="labels").test.splits == ("test",)
    with pytest.raises(DataError, match="no split 'val'; it has: train, test"):
        open_labelled(tmp_path, split="val", need="labels")
    with pytest.raises(DataError, match="split 'train' is what an evaluation learns from"):
        open_labelled(tmp_path, split="train", need="labels")


def test_without_splits_a_seeded_fifth_of_every_class_is_judged_on(write, tmp_path):
    class_folders(write, {"a": 20, "b": 10, "c": 2, "d": 1})
    data = open_labelled(tmp_path, need="labels", seed=3)
    assert data.note == "no splits found: a seeded 80/20 split, seed 3 (26 and 7 images)"
    counts = [sum(sample.label == label for sample in data.test.samples) for label in range(4)]
    assert counts == [4, 2, 1, 0]
    assert set(data.train.paths).isdisjoint(data.test.paths) and len(data.train) + len(data.test) == 33
    assert open_labelled(tmp_path, need="labels", seed=3).test == data.test
    assert open_labelled(tmp_path, need="labels", seed=4).test != data.test


def test_a_single_image_cant_be_split(write, tmp_path):
    class_folders(write, {"a": 1, "b": 1})
    with pytest.raises(DataError, match="2 images, too few to learn from some and evaluate others"):
        open_labelled(tmp_path, need="labels")


def test_classes_without_evaluated_images_are_allowed_and_without_training_images_refused(write, tmp_path):
    class_folders(write, {"a": 1, "b": 1, "d": 1}, "train")
    class_folders(write, {"a": 1}, "val")
    data = open_labelled(tmp_path, need="labels")
    assert data.classes == ("a", "b", "d") and data.missing == ("b", "d")
    class_folders(write, {"c": 1}, "val")
    line = r"val has images of c and train has none, so nothing can learn .* or take them out of val$"
    with pytest.raises(DataError, match=line):
        open_labelled(tmp_path, need="labels")
    (tmp_path / "train/c").mkdir()  # an empty folder teaches nothing
    class_folders(write, {"a": 1}, "test")
    with pytest.raises(DataError, match=r"or evaluate another split \(eval\.split=test\)$"):
        open_labelled(tmp_path, need="labels")
    assert open_labelled(tmp_path, need="labels", split="test").missing == ("b", "d")


def test_an_empty_class_folder_is_a_class(write, tmp_path):
    class_folders(write, {"a": 1, "b": 1}, "train")
    class_folders(write, {"a": 1}, "val")
    (tmp_path / "val/b").mkdir()
    assert open_labelled(tmp_path, need="labels").classes == ("a", "b")


def scene(write, root, numbers, names="sky\nsea\nland\n"):
    write("images/a.png", np.zeros((*numbers.shape[:2], 3), np.uint8))
    write("images/b.png", np.zeros((*numbers.shape[:2], 3), np.uint8))
    for stem in "ab":
        write(f"masks/{stem}.png", numbers)
    (root / "classes.txt").write_text(names)


def test_what_is_needed_and_what_came_stand_in_one_line(write, tmp_path):
    write("flat/1.png")
    with pytest.raises(DataError, match=r"found layout 'folder', this needs class folders \(CLASS/image or SPLIT"):
        open_labelled(tmp_path / "flat", need="labels")
    with pytest.raises(DataError, match=r"found layout 'folder', this needs masks \(images/ with masks/"):
        open_labelled(tmp_path / "flat", need="masks")


def test_masks_need_names_and_hint_at_class_folders(write, tmp_path):
    scene(write, tmp_path, np.zeros((4, 5), np.uint8))
    assert open_labelled(tmp_path, need="masks").classes == ("sky", "sea", "land")
    (tmp_path / "objects").mkdir()
    with pytest.raises(DataError, match=f"this needs class folders .*; there are some in {tmp_path / 'objects'}"):
        open_labelled(tmp_path, need="labels")
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"no classes.txt; it needs one class name a line, the first for value 0"):
        open_labelled(tmp_path, need="masks")


NUMBERS = np.array([[0, 1, 2], [255, 2, 1]], np.uint8)


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


def black_and_white(write, root, values=(0, 255), names="background\nobject\n"):
    scene(write, root, np.resize(np.array(values, np.uint8), (2, 3)), names)


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


@given(total=st.integers(1, 60), seed=st.integers(0, 5), share=st.floats(0.01, 0.99), larger=st.floats(0.01, 0.99))
def test_draws_of_training_images_are_seeded_and_smaller_ones_are_parts_of_larger(total, seed, share, larger):
    samples = tuple(ImageSample(Path(f"{i}.png"), label=0) for i in range(total))
    everything = ImageSet(Path(), "classes", samples, ("a",))
    data = LabelledData(everything, everything, ("a",), "all")
    share, larger = sorted((share, larger))
    drawn, more = draw_training(data, share, seed), draw_training(data, larger, seed)
    assert len(drawn.train) == max(1, round(share * total)) and drawn.drawn and not data.drawn
    assert set(drawn.train.samples) <= set(more.train.samples) and drawn.test is data.test
    assert [sample for sample in samples if sample in drawn.train.samples] == list(drawn.train.samples), "in order"
    assert drawn == draw_training(data, share, seed) == draw_training(data, len(drawn.train), seed)
    assert drawn.note == f"all; {len(drawn.train)} of the {total} training images drawn, seed {seed}"


def test_a_draw_takes_a_share_or_a_whole_number_that_is_there(write, tmp_path):
    class_folders(write, {"a": 8, "b": 8}, "train")
    class_folders(write, {"a": 1, "b": 1}, "val")
    data = open_labelled(tmp_path, need="labels")
    assert [len(draw_training(data, size, 0).train) for size in (1 / 8, 1 / 64, 16, 1)] == [2, 1, 16, 1]
    assert draw_training(data, 4, 0).train != draw_training(data, 4, 1).train
    with pytest.raises(DataError, match=r"16 training images, eval.train_size=17 asks for more"):
        draw_training(data, 17, 0)
    with pytest.raises(ConfigError, match=r"eval.train_size=1.5: give a share below 1, or a whole number of images"):
        draw_training(data, 1.5, 0)


@pytest.mark.parametrize("shape", [(300, 200), (180, 333), (64, 64), (500, 37)])
def test_images_for_knn_are_torchvisions_resize_and_crop(write, shape):
    path = write("x.png", np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    theirs = T.Compose([T.Resize(64, interpolation=T.InterpolationMode.BICUBIC), T.CenterCrop(56)])(Image.open(path))
    np.testing.assert_array_equal(eval_image(path, 56, 3, "crop"), np.asarray(theirs))


def test_images_for_segmentation_are_squashed_antialiased(write):
    path = write("x.png", np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8))
    theirs = Image.open(path).resize((48, 48), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(eval_image(path, 48, 3, "squash"), np.asarray(theirs))


@pytest.mark.parametrize("mode", ["crop", "squash"])
def test_sixteen_bit_images_are_resized_like_eight_bit_ones(write, mode):
    values = np.random.default_rng(0).integers(60, 200, (90, 140), dtype=np.uint8)
    eight, sixteen = write("e.png", values), write("s.png", values.astype(np.uint16) * 257)
    ours, theirs = eval_image(sixteen, 48, 1, mode), eval_image(eight, 48, 1, mode)
    assert ours.dtype == np.float32 and ours.shape == (48, 48, 1)
    assert np.abs(ours - theirs / 255).max() < 0.01


@given(height=st.integers(1, 60), width=st.integers(1, 60), size=st.integers(1, 80))
def test_masks_are_resized_by_torchs_nearest(height, width, size):
    mask = np.random.default_rng(height).integers(0, 256, (height, width), dtype=np.uint8)
    theirs = F.interpolate(torch.from_numpy(mask)[None, None], size=(size, size), mode="nearest")[0, 0]
    np.testing.assert_array_equal(eval_mask(mask, size), theirs.numpy())


def test_e6_nearest_takes_these_pixels():
    assert eval_mask(np.array([[0, 1], [2, 3]]), 3).tolist() == [[0, 0, 1], [0, 0, 1], [2, 2, 3]]
    numbers = np.arange(16).reshape(4, 4)
    assert eval_mask(numbers, 3).tolist() == numbers[:3, :3].tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_give_every_readable_image_once_in_order(write, tmp_path, num_workers):
    for i in range(7):
        write(f"{i}.png")
    write("5.png", np.full((9, 9), 65535, np.uint16))
    for i in (1, 2, 6):
        (tmp_path / f"{i}.png").write_bytes(b"")
    images = open_images(tmp_path)
    batches = list(eval_batches(images, 16, 3, "crop", batch_size=3, num_workers=num_workers))
    assert [places for _, places, _ in batches] == [[0], [3, 4, 5], []]
    assert [tuple(pixels.shape) for pixels, _, _ in batches] == [(1, 3, 16, 16), (3, 3, 16, 16), (0, 3, 16, 16)]
    assert [pixels.dtype for pixels, _, _ in batches] == [torch.uint8, torch.float32, torch.uint8]
    skipped = list(itertools.chain.from_iterable(left_out for _, _, left_out in batches))
    assert [path.name for path, _ in skipped] == ["1.png", "2.png", "6.png"]
    assert {reason for _, reason in skipped} == {"an empty file"}


def test_real_masks_fit_their_classes(shared):
    for name, classes in (("ccp-clothing-parsing", 59), ("dsb2018-nuclei", 2)):
        data = open_labelled(shared / name, need="masks")
        assert len(data.classes) == classes and data.test.splits == ("val",)
        for sample in data.test.samples[:10]:
            assert read_mask(sample, classes).max() < classes


@pytest.mark.parametrize("shape", [(1, 12_000), (12_000, 1)])
def test_a_strip_is_cropped_before_it_is_enlarged(write, shape):
    strip = np.zeros((*shape, 3), np.uint8)
    strip.reshape(-1, 3)[5_900:6_100] = 250  # its middle
    path = write("strip.png", strip)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (eval_image(path, 224, 3, "crop") == 250).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024, "MiB"


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
