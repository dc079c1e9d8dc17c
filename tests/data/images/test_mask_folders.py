"""Images with masks under every usual name: read as such, or refused; masks are never classes or training images."""

import re

import numpy as np
import pytest

from smalti.data.images.folders import LeftOut, open_images
from smalti.data.images.labelled import open_labelled
from smalti.errors import DataError

MASK = np.zeros((24, 32), np.uint8)
MASK[6:18, 8:24] = 1


def pairs(write, image, mask, count=6):
    for number in range(count):
        write(image.format(number))
        write(mask.format(number), MASK)


@pytest.mark.parametrize(
    ("image", "mask", "splits"),
    [
        ("images/{}.jpg", "labels/{}.png", ()),
        ("imgs/{}.jpg", "masks/{}.png", ()),
        ("Image/{}.png", "Mask/{}.png", ()),
        ("Images/{}.jpg", "Masks/{}.png", ()),
        ("JPEGImages/{}.jpg", "SegmentationClass/{}.png", ()),
        ("img_dir/train/{}.jpg", "ann_dir/train/{}.png", ("train",)),
        ("train/images/{}.jpg", "train/masks/{}.png", ("train",)),
        ("valid/images/{}.jpg", "valid/labels/{}_mask.png", ("val",)),
        ("images/{}_sat.jpg", "masks/{}_mask.png", ()),
        ("set/images/{}.jpg", "set/masks/{}.png", ()),
        ("{0}/images/{0}.png", "{0}/masks/other.png", ()),
        ("{}.png", "{}_mask.png", ()),
        ("scans/b ({}).png", "scans/b ({})_mask.png", ()),
        ("train/{}_sat.jpg", "train/{}_mask.png", ("train",)),
    ],
)
def test_usual_layouts_are_images_with_masks(write, tmp_path, image, mask, splits):
    pairs(write, image, mask)
    images = open_images(tmp_path)
    assert images.layout == "masks" and images.splits == splits and len(images) == 6
    assert all(sample.mask is not None and sample.label is None for sample in images.samples)
    assert not {sample.mask for sample in images.samples} & set(images.paths)


def test_several_masks_of_an_image_are_counted_and_never_trained_on(write, tmp_path):
    for number in range(3):
        write(f"{number}/images/{number}.png")
        write(f"{number}/masks/a{number}.png", MASK), write(f"{number}/masks/b{number}.png", MASK)
    with pytest.warns(LeftOut, match="6 masks, because they are several for an image"):
        images = open_images(tmp_path)
    assert [path.parent.name for path in images.training().paths] == ["images"] * 3
    with pytest.warns(LeftOut), pytest.raises(DataError, match="has layout 'masks', but this needs masks"):
        open_labelled(tmp_path, need="masks")


def test_masks_beside_images_of_classes_are_left_out(write, tmp_path):
    for kind in ("benign", "malignant"):
        pairs(write, f"{kind}/{{}}.png", f"{kind}/{{}}_mask.png", 3)
    with pytest.warns(LeftOut, match="6 images named as masks of others, beside class folders"):
        images = open_images(tmp_path)
    assert images.describe() == "classes: 6 images, 2 classes"


def test_two_folders_with_the_same_names_and_masks_in_one_are_refused(write, tmp_path):
    pairs(write, "photos/{}.png", "outlines/{}.png")
    with pytest.raises(DataError, match=r"photos/ and outlines/ hold files of the same names, and those in outlines/ "):
        open_images(tmp_path)
    assert open_images(f"classes={tmp_path}").classes == ("outlines", "photos")


@pytest.mark.parametrize(
    ("folders", "line"),
    [
        (("imagesTr", "labelsTr"), "imagesTr/ and labelsTr/ are named as images and masks; rename the folders to imag"),
        (("train_images", "train_masks"), "train_images/ and train_masks/ are named as images and masks"),
        (("Training_Input", "Training_GroundTruth"), "give Training_Input/ alone to train without masks"),
        (("train", "train_masks"), "train/ and train_masks/ are named as images and masks"),
        (("test", "trainannot", "train"), "test/ and trainannot/ are named as images and masks"),
        (("img", "masks_human"), "img/ and masks_human/ are named as images and masks"),
        (
            ("x/test/good", "x/ground_truth/bad", "x/train/good"),
            "test/ and ground_truth/ are named as images and masks",
        ),
        (("rgb", "semantic"), "rgb/ and semantic/ hold files of the same names, and those in semantic/ look like mas"),
        (("rgb", "semantic", "z_depth"), "rgb/ and semantic/ hold files of the same names, and those in semantic/"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_folders_of_masks_are_never_classes(write, tmp_path, folders, line):
    for number in range(3):
        for folder in folders:
            write(f"{folder}/{number}.png", MASK if folder == folders[1] else None)
    with pytest.raises(DataError, match=re.escape(line)):
        open_images(tmp_path)


def test_splits_of_masks_that_are_named_otherwise_are_refused_without_advice_to_read_masks(write, tmp_path):
    pairs(write, "stage1_train/{0}/images/{0}.png", "stage1_train/{0}/masks/{0}.png", 2)
    write("stage1_test/9/images/9.png")
    with pytest.raises(DataError, match=r"stage1_test/, stage1_train/ look like splits; name them so \(.*testing\)$"):
        open_images(tmp_path)


def test_images_with_masks_are_read_beside_many_more_in_class_folders(write, tmp_path):
    write("images/1.png"), write("masks/1.png", MASK)
    for number in range(60):
        write(f"objects/train/{'ab'[number % 2]}/{number}.png")
    images = open_images(tmp_path)
    assert images.layout == "masks" and len(images) == 1
    assert "60 images outside of images/ and masks/ (the first: objects/train/a/0.png)" in images.account()


def test_a_small_folder_with_masks_does_not_hide_other_images(write, tmp_path):
    write("old/img/1.png"), write("old/labels/1.png", MASK)
    for number in range(3):
        write(f"photos/{number}.png")
    with pytest.raises(
        DataError, match=r"old/img/ and old/labels/ look like .* but 3 images lie elsewhere, such as ph"
    ):
        open_images(tmp_path)
    assert (
        open_images(f"masks={tmp_path}")
        .account()
        .endswith("3 images outside of img/ and labels/ (the first: photos/0.png)")
    )


def test_test_images_without_masks_are_not_read(write, tmp_path):
    pairs(write, "train/{0}/images/{0}.png", "train/{0}/masks/{0}.png", 2)
    for number in range(3):
        write(f"test/{number}/images/{number}.png")
    assert open_images(tmp_path).describe() == "masks: 2 images (train 2)"


def test_a_folder_of_masks_without_images_in_it_is_no_layout(write, tmp_path):
    write("images/1.png"), (tmp_path / "masks").mkdir()
    assert open_images(tmp_path).describe() == "folder: 1 image"


def test_more_than_four_folders_with_numbered_files_are_classes(write, tmp_path):
    for folder in "abcde":
        for number in range(3):
            write(f"{folder}/{number}.png", MASK if folder == "a" else None)
    assert len(open_images(tmp_path).classes) == 5


def test_two_classes_with_numbered_files_are_classes(write, tmp_path):
    for number in range(6):
        write(f"cat/{number}.png"), write(f"dog/{number}.png")
    assert open_images(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ([("img/1.png", None), ("imgs/1.png", None), ("masks/1.png", MASK)], "imgs/ and img/ could both be the images"),
        ([("images/1.png", None), ("gt/9.png", MASK)], "none of the masks has the stem of an image, such as images/1"),
        ([("images/1.png", None), ("images/1.jpg", None), ("masks/1.png", MASK)], "1.jpg and 1.png have the same stem"),
        (
            [("train/images/1.png", None), ("train/masks/1.png", MASK), ("holdout/images/1.png", None)],
            "holdout/ lies beside train/ and is no split",
        ),
    ],
    ids=["two folders of images", "no pair", "same stem", "unknown split"],
)
def test_masks_that_can_t_be_paired_are_one_line(write, tmp_path, files, line):
    for name, content in files:
        write(name, content)
    with pytest.raises(DataError, match=re.escape(line)):
        open_images(tmp_path)


def test_a_list_that_contradicts_the_folder_of_a_split_is_refused(write, tmp_path):
    pairs(write, "images/train/{}.png", "masks/train/{}.png", 2)
    pairs(write, "images/test/{}.png", "masks/test/{}.png", 2)
    assert open_images(tmp_path).describe() == "masks: 4 images (train 2, test 2)"
    (tmp_path / "train.txt").write_text("train/0\ntest/1\n")
    with pytest.raises(DataError, match=r"images/test/1.png lies in the folder of one split and is in the list of ano"):
        open_images(tmp_path)


def test_masks_without_an_image_are_counted(write, tmp_path):
    pairs(write, "images/{}.png", "masks/{}.png", 3)
    write("masks/9.png", MASK)
    with pytest.warns(LeftOut, match=r"1 image of masks without an image \(masks/9.png\)"):
        assert len(open_images(tmp_path)) == 3
