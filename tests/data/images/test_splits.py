"""Splits by folders and by lists: understood or refused; what is labelled test is never trained on silently."""

import re

import numpy as np
import pytest

from smalti.data.images.folders import LeftOut, open_images
from smalti.errors import DataError


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (["train/a/1.png", "train/b/2.png", "holdout/a/3.png"], "holdout/ lies beside train/ and is no split; rename"),
        (["train/1.png", "test/2.png", "extra/3.png"], "extra/ lies beside test/, train/ and is no split"),
        (["train_images/1.png", "test_images/2.png"], "test_images/, train_images/ look like splits; name them so"),
        (["trainA/1.png", "trainB/2.png", "testA/3.png"], "testA/, trainA/, trainB/ look like splits; name them so"),
        (["seg_train/a/1.png", "seg_test/a/2.png", "seg_pred/3.png"], "seg_test/, seg_train/ look like splits; name"),
        (["train_images/1.png", "test/2.png"], "test/, train_images/ look like splits; name them so"),
        (["data/a/1.png", "test/a/2.png"], "data/ lies beside test/ and is no split; rename"),
        (["cat/train/1.png", "cat/test/2.png", "dog/train/3.png"], "cat/ holds test, train; put splits above"),
    ],
    ids=["unknown", "flat", "resembling", "letters", "most", "one resembling", "test alone", "inside classes"],
)
def test_folders_that_may_be_splits_are_not_guessed(write, tmp_path, files, line):
    for name in files:
        write(name)
    with pytest.raises(DataError, match=re.escape(line)):
        open_images(tmp_path)
    assert len(open_images(f"folder={tmp_path}")) == len(files)


def test_a_test_folder_that_is_read_as_any_other_is_said_to_be(write, tmp_path):
    for name in ("test/1.png", "holiday/2.png", "3.png", "4.png"):
        write(name)
    with pytest.warns(LeftOut, match="no split: test/ is read as any other folder"):
        assert "test/ is read as any other folder" in open_images(tmp_path).account()


def test_nested_folders_beside_a_split_are_not_proposed_as_classes(write, tmp_path):
    write("train/a/1.png"), write("extra/a/2.png")
    with pytest.raises(DataError, match=r"or move it away; folder=.* reads every image as one set$"):
        open_images(tmp_path)


def test_train_may_be_a_class_if_the_user_says_so(write, tmp_path):
    write("train/1.png"), write("bus/2.png")
    with pytest.raises(DataError, match=f"classes={re.escape(str(tmp_path))} takes every folder as a class"):
        open_images(tmp_path)
    with pytest.warns(LeftOut, match="no split: train/ is read as a class"):
        assert open_images(f"classes={tmp_path}").classes == ("bus", "train")


@pytest.mark.parametrize("names", [("Train", "valid", "testing"), ("training", "dev", "TEST")])
def test_every_spelling_of_a_split_is_known_and_test_is_not_trained_on(write, tmp_path, names):
    for name in names:
        write(f"{name}/1.png"), write(f"{name}/2.png")
    images = open_images(tmp_path)
    assert images.describe() == "folder: 6 images (train 2, val 2, test 2)"
    assert {path.parent.name for path in images.training().paths} == {names[0]}


@pytest.mark.parametrize("home", ["", "set"])
def test_lists_and_class_names_of_a_packed_set_are_read_in_both_places(write, tmp_path, home):
    for stem in "abcd":
        write(f"set/images/{stem}.png"), write(f"set/masks/{stem}.png", np.zeros((24, 32), np.uint8))
    for name, lines in {"train": "a\nb\n", "test": "c\nd\n", "classes": "ground\n"}.items():
        (tmp_path / home / f"{name}.txt").write_text(lines)
    assert open_images(tmp_path).describe() == "masks: 4 images (train 2, test 2), 1 classes"


def test_lists_beside_a_folder_of_classes_are_splits(write, tmp_path):
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
        write(f"food/images/{name}")
    (tmp_path / "food/meta").mkdir()
    (tmp_path / "food/meta/train.txt").write_text("cat/0\ndog/0\n")
    (tmp_path / "food/meta/test.txt").write_text("cat/1\ndog/1\n")
    with pytest.raises(DataError, match=r"images are listed in food/meta/test.txt, food/meta/train.txt, where lists"):
        open_images(tmp_path)
    for name in ("train.txt", "test.txt"):
        (tmp_path / "food/meta" / name).rename(tmp_path / "food" / name)
    assert open_images(tmp_path).describe() == "classes: 4 images (train 2, test 2), 2 classes"


def test_a_list_may_not_contradict_the_folders_of_splits(write, tmp_path):
    for name in ("train/1.png", "train/2.png", "test/1.png"):
        write(name)
    (tmp_path / "train.txt").write_text("1.png 0\n2.png 1\n")
    assert open_images(tmp_path).describe() == "folder: 3 images (train 2, test 1)"
    (tmp_path / "train.txt").unlink()
    (tmp_path / "test.txt").write_text("train/2.png\n")
    with pytest.raises(DataError, match=r"train/2.png lies in the folder of one split and is in the list of another"):
        open_images(tmp_path)


def test_lists_whose_names_resemble_splits_are_refused(write, tmp_path):
    write("a/1.png"), write("b/2.png")
    (tmp_path / "test_list.txt").write_text("a/1.png\n")
    with pytest.raises(DataError, match=r"test_list.txt: lists images, and its name is no split; rename it"):
        open_images(tmp_path)


def test_lists_may_have_the_folders_of_another_machine(write, tmp_path):
    for number in range(3):
        write(f"frames/{number}.png")
    (tmp_path / "train.txt").write_text("data/frames/0.png\n/home/me/frames/1.png\n")
    (tmp_path / "val.txt").write_text("data/frames/2.png\n")
    assert open_images(tmp_path).describe() == "folder: 3 images (train 2, val 1)"
    (tmp_path / "val.txt").write_text("elsewhere/2.png\n")
    with pytest.raises(DataError, match=r"1 of 1 names have no image, the first: elsewhere/2.png .line 1.; write path"):
        open_images(tmp_path)


def test_lists_beside_plain_images_are_splits(write, tmp_path):
    for number in range(4):
        write(f"photos/{number}.png")
    (tmp_path / "train.txt").write_text("photos/0.png\nphotos/1.png\n")
    (tmp_path / "valid.txt").write_text("photos/2.png\n")
    with pytest.warns(LeftOut, match=r"1 image in no list \(photos/3.png\)"):
        images = open_images(tmp_path)
    assert images.describe() == "folder: 4 images (train 2, val 1, in no split 1)"
    with pytest.warns(LeftOut, match="1 image in no list"):
        assert open_images(f"classes={tmp_path}").splits == ("train", "val")
    (tmp_path / "holdout.txt").write_text("photos/3.png\n")
    with pytest.raises(DataError, match=r"holdout.txt: lists images beside train.txt, and its name is no split"):
        open_images(tmp_path)


def test_the_same_split_under_two_names_is_refused(write, tmp_path):
    for name in ["train/a/1.png", "train/b/2.png", "val/a/3.png", "validation/a/4.png"]:
        write(name)
    with pytest.raises(DataError, match="the same split twice: val, validation; keep one"):
        open_images(tmp_path)


def test_splits_without_train_are_not_trained_on_by_accident(write, tmp_path):
    write("val/a/1.png"), write("test/b/2.png")
    with pytest.raises(DataError, match="splits val, test, but no train; to read every image, write folder="):
        open_images(tmp_path).training()
