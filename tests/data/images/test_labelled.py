import itertools
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from smalti.data.dataset import Labelled
from smalti.data.images.folders import ImageSample, ImageSet, open_images
from smalti.data.images.labelled import (
    draw_training,
    eval_batches,
    eval_image,
    open_labelled,
)
from smalti.errors import ConfigError, DataError


def class_folders(write, counts, split=""):
    for name, count in counts.items():
        for i in range(count):
            write(f"{split}/{name}/{i}.png" if split else f"{name}/{i}.png")


def test_evaluated_on_val_else_test_by_default(write, tmp_path):
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


def test_what_is_needed_and_what_came_stand_in_one_line(write, tmp_path):
    write("flat/1.png")
    with pytest.raises(DataError, match=r"has layout 'folder', but this needs class folders \(CLASS/image or SPLIT"):
        open_labelled(tmp_path / "flat", need="labels")
    with pytest.raises(DataError, match=r"has layout 'folder', but this needs masks \(images/ with masks/"):
        open_labelled(tmp_path / "flat", need="masks")


@given(total=st.integers(1, 60), seed=st.integers(0, 5), share=st.floats(0.01, 0.99), larger=st.floats(0.01, 0.99))
def test_draws_of_training_images_are_seeded_and_smaller_ones_are_parts_of_larger(total, seed, share, larger):
    samples = tuple(ImageSample(Path(f"{i}.png"), label=0) for i in range(total))
    everything = ImageSet(Path(), "classes", samples, ("a",))
    data = Labelled(everything, everything, ("a",), "all")
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
    with pytest.raises(ConfigError, match=r"eval.train_size=1.5: give a fraction below 1, or a whole number of images"):
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


@pytest.mark.parametrize("shape", [(1, 12_000), (12_000, 1)])
def test_a_strip_is_cropped_before_it_is_enlarged(write, shape):
    strip = np.zeros((*shape, 3), np.uint8)
    strip.reshape(-1, 3)[5_900:6_100] = 250  # its middle
    path = write("strip.png", strip)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (eval_image(path, 224, 3, "crop") == 250).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024, "MiB"
