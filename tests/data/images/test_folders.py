import os
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from smalti.data.images.folders import LeftOut, open_images
from smalti.data.images.image_set import PlainSamples
from smalti.data.images.labelled import open_labelled
from smalti.data.images.pixels import PixelConfig
from smalti.errors import ConfigError, DataError


def names(images):
    return [path.relative_to(images.root).as_posix() for path in images.paths]


def test_a_folder_is_read_recursively_sorted_and_without_hidden_files(write, tmp_path):
    for name in [
        "b.PNG",
        "a/z.jpg",
        "a/deep/er/x.TIFF",
        "a-b.webp",
        "c.Bmp",
        ".hidden.png",
        ".trash/y.png",
        "a/._z.jpg",
    ]:
        write(name)
    (tmp_path / "notes.txt").write_text("no image")
    images = open_images(tmp_path)
    assert images.layout == "folder"
    assert names(images) == ["a-b.webp", "a/deep/er/x.TIFF", "a/z.jpg", "b.PNG", "c.Bmp"]
    assert images.classes is None and images.splits == () and len(images.training()) == 5
    assert images.describe() == "folder: 5 images"


def test_links_are_followed_but_loops_end_and_folders_keep_their_own_names(write, tmp_path):
    write("real/one.png")
    write("real/sub/two.png")
    (tmp_path / "all").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    elsewhere = tmp_path.parent / f"{tmp_path.name}_elsewhere"
    elsewhere.mkdir()
    os.link(tmp_path / "real/one.png", elsewhere / "three.png")
    (tmp_path / "linked").symlink_to(elsewhere)
    assert names(open_images(f"folder={tmp_path}")) == ["linked/three.png", "real/one.png", "real/sub/two.png"]


def test_class_folders_are_detected_and_sorted(write, tmp_path):
    for name in ["cat/2.jpg", "cat/1.jpg", "ant/9.png"]:
        write(name)
    images = open_images(tmp_path)
    assert (images.layout, images.classes, images.splits) == ("classes", ("ant", "cat"), ())
    assert [(sample.path.name, sample.label) for sample in images.samples] == [("9.png", 0), ("1.jpg", 1), ("2.jpg", 1)]


def test_class_folders_with_splits_call_validation_val(write, tmp_path):
    for name in ["train/cat/1.jpg", "train/ant/2.jpg", "validation/cat/3.jpg", "test/ant/4.jpg"]:
        write(name)
    images = open_images(tmp_path)
    assert images.describe() == "classes: 4 images (train 2, val 1, test 1), 2 classes"
    assert images.subset("validation").paths == images.subset("val").paths == (tmp_path / "validation/cat/3.jpg",)
    assert names(images.training()) == ["train/ant/2.jpg", "train/cat/1.jpg"]
    with pytest.raises(DataError, match="no split 'extra'; it has: train, val, test"):
        images.subset("extra")


@pytest.mark.parametrize(
    "files",
    [
        ["one.png", "two.png"],
        ["only/1.png", "only/2.png"],
        ["a/1.png", "b/2.png", "3.png"],
        ["a/1.png", "b/c/2.png"],
        ["train/1.png", "val/2.png"],
        ["day/a/1.png", "night/b/2.png"],
        ["train/a/1.png", "val/a/2.png"],
    ],
    ids=" ".join,
)
def test_folders_that_tell_no_class_stay_a_plain_folder(write, tmp_path, files):
    for name in files:
        write(name)
    assert open_images(tmp_path).layout == "folder"


def test_a_reader_can_be_forced(write, tmp_path):
    write("a/1.png")
    write("b/2.png")
    assert open_images(f"folder={tmp_path}").classes is None
    assert open_images(tmp_path, layout="folder").layout == "folder"
    assert open_images(f"classes={tmp_path}").classes == ("a", "b")
    assert open_images(Path(f"classes={tmp_path}")).classes == ("a", "b")


def test_a_path_with_an_equals_sign_is_a_path(write, tmp_path, monkeypatch):
    write("lr=3/1.png")
    assert len(open_images(str(tmp_path / "lr=3"))) == 1
    monkeypatch.chdir(tmp_path)
    assert len(open_images("lr=3")) == 1


def test_an_unknown_reader_names_the_nearest_and_all(tmp_path):
    with pytest.raises(ConfigError, match="--data has no reader 'foldr'; did you mean 'folder'"):
        open_images(f"foldr={tmp_path}")
    with pytest.raises(
        ConfigError, match="no reader 'imagenet'; it has: ade20k, ade20k-151, cityscapes, classes, coco, "
    ):
        open_images(f"imagenet={tmp_path}")


def test_a_list_keeps_its_order_and_finds_files_beside_itself_or_anywhere(write, tmp_path):
    write("b.png"), write("sub/a.png")
    listing = tmp_path / "sub" / "list.txt"
    listing.write_bytes(f"\ufeff../b.png\r\n\r\n  a.png\n{tmp_path / 'b.png'}\n".encode())
    images = open_images(listing)
    assert images.layout == "list"
    assert [path.resolve() for path in images.paths] == [tmp_path / "b.png", tmp_path / "sub/a.png", tmp_path / "b.png"]


def test_a_list_with_missing_files_names_the_first_and_counts(write, tmp_path):
    write("a.png")
    (tmp_path / "l.txt").write_text("a.png\nx.png\ny.png\n")
    with pytest.raises(DataError, match=r"2 of 3 files don't exist, the first: .*x.png \(line 2\)"):
        open_images(tmp_path / "l.txt")
    (tmp_path / "l.txt").write_text("\n")
    with pytest.raises(DataError, match="an empty list"):
        open_images(tmp_path / "l.txt")


def scene(write, tmp_path, stems=("a", "b", "c", "d"), masks="masks"):
    for stem in stems:
        write(f"images/{stem}.jpg")
        write(f"{masks}/{stem}.png", np.zeros((24, 32), np.uint8))
    (tmp_path / "classes.txt").write_text("sky\nsea\n")


def test_masks_are_found_by_stem_and_splits_by_name_with_or_without_ending(write, tmp_path):
    scene(write, tmp_path)
    write("objects/train/x/1.png"), write("masks_preview/a.png")
    (tmp_path / "train.txt").write_text("a\nb.jpg\n")
    (tmp_path / "val.txt").write_text("images/c.jpg\n")
    with pytest.warns(LeftOut, match=r"left out: 1 image in no split \(images/d.jpg\)"):
        images = open_images(tmp_path)
    assert images.describe() == "masks: 4 images (train 2, val 1, in no split 1), 2 classes"
    assert images.account().endswith(
        "; left out: 1 image in no split (images/d.jpg); "
        "not read: 2 images outside of images/ and masks/ (the first: masks_preview/a.png)"
    )
    first = images.samples[0]
    assert (first.path, first.mask) == (tmp_path / "images/a.jpg", tmp_path / "masks/a.png")
    assert [sample.split for sample in images.samples] == ["train", "train", "val", None]
    assert names(images.training()) == ["images/a.jpg", "images/b.jpg"]


def test_instances_serve_as_masks_where_there_are_none(write, tmp_path):
    scene(write, tmp_path, masks="instances")
    (tmp_path / "classes.txt").unlink()
    images = open_images(tmp_path)
    assert images.classes == ("background", "object")
    assert images.samples[0].mask is None and images.samples[0].instances == tmp_path / "instances/a.png"


def test_masks_win_over_instances(write, tmp_path):
    scene(write, tmp_path)
    write("instances/a.png", np.zeros((24, 32), np.uint16))
    sample = open_images(tmp_path).samples[0]
    assert sample.mask == tmp_path / "masks/a.png" and sample.instances == tmp_path / "instances/a.png"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda p: (p / "val.txt").write_text("c\nq\nr.png\n"),
            r"val.txt: 2 of 3 names have no image, the first: q \(line 2\)",
        ),
        (lambda p: (p / "val.txt").write_text("a\n"), "'a' is in both train.txt and val.txt"),
        (lambda p: (p / "validation.txt").write_text("c\n"), "the same split twice: val.txt, validation.txt"),
        (lambda p: (p / "images/a.jpg").rename(p / "images/b.png"), "b.jpg and b.png have the same stem"),
        (lambda p: (p / "classes.txt").write_text("sky\nsky\n"), "class 'sky' is listed more than once"),
    ],
)
def test_masks_that_dont_fit_are_one_line(write, tmp_path, change, line):
    scene(write, tmp_path)
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "val.txt").write_text("c\n")
    change(tmp_path)
    with pytest.raises(DataError, match=line):
        open_images(tmp_path)


def test_an_image_without_mask_stops_an_evaluation_only_if_a_split_names_it(write, tmp_path):
    scene(write, tmp_path)
    (tmp_path / "masks/d.png").unlink()
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "val.txt").write_text("c\n")
    with pytest.warns(LeftOut, match="in no split"):
        assert len(open_images(tmp_path)) == 4
    with pytest.warns(LeftOut):
        assert len(open_labelled(tmp_path, need="masks").test) == 1
    (tmp_path / "val.txt").write_text("c\nd\n")
    assert len(open_images(tmp_path).training()) == 2
    with pytest.raises(DataError, match=r"1 of 2 images have no mask, the first: d.jpg; add masks, or list"):
        open_labelled(tmp_path, need="masks")


def test_a_home_that_is_not_there_is_one_line():
    for data in ("~nobody-here/images", "folder=~nobody-here/images"):
        with pytest.raises(DataError, match="~nobody-here/images: no such file or folder"):
            open_images(data)


def test_missing_and_empty_places_are_one_line(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'no'}: no such file or folder")):
        open_images(tmp_path / "no")
    os.mkfifo(tmp_path / "pipe.csv")
    for named in ("", "table=", "list="):
        with pytest.raises(DataError, match=r"pipe\.csv: is neither a file nor a folder"):
            open_images(f"{named}{tmp_path / 'pipe.csv'}")
    with pytest.raises(DataError, match=r"no images found .*jpg, jpeg, png, webp, bmp, tif, tiff, in any case"):
        open_images(tmp_path)
    (tmp_path / "x.bin").write_text("x")
    with pytest.raises(DataError, match=r"a file; give a folder of images, an archive \(\.tar, \.zip\), a \.txt list"):
        open_images(tmp_path / "x.bin")
    with pytest.raises(DataError, match="layout 'list' needs a text file with one path a line, this is a folder"):
        open_images(f"list={tmp_path}")
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="layout 'masks' needs the folders images/ and masks/"):
        open_images(f"masks={tmp_path}")


def test_forced_classes_say_which_image_lies_elsewhere(write, tmp_path):
    write("a/1.png"), write("b/deep/2.png")
    with pytest.raises(
        DataError, match=r"1 of 2 images don't lie where .* b/deep/2.png beside a/1.png; .*CLASS/image or SPLIT"
    ):
        open_images(f"classes={tmp_path}")


def test_the_images_that_lie_elsewhere_are_the_fewer_ones(write, tmp_path):
    for name in ("2019/a/1.png", "2019/b/2.png", "2020/a/3.png", "2020/4.png"):
        write(name)
    with pytest.raises(DataError, match=r"1 of 4 images don't lie where the others do, such as 2020/4.png beside 2019"):
        open_labelled(tmp_path, need="labels")


@pytest.mark.parametrize(
    "stray", ["overview.png", "cat/@eaDir/0.png/thumb.jpg", "cat/thumbs/0.png", "__MACOSX/cat/0.png"]
)
def test_a_stray_picture_does_not_change_the_layout(write, tmp_path, stray):
    for number in range(5):
        write(f"cat/{number}.png"), write(f"dog/{number}.png")
    write(stray)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOut)
        images = open_images(tmp_path)
    assert images.describe() == "classes: 10 images, 2 classes"
    assert stray.split("/")[0] in images.account() or "thumbs" in images.account()


def test_a_class_called_thumbs_stays_one(write, tmp_path):
    write("thumbs/1.png"), write("fists/1.png")
    assert open_images(tmp_path).classes == ("fists", "thumbs")


def test_class_folders_with_words_of_splits_and_masks_are_classes(write, tmp_path):
    folders = ("bus", "dog", "label", "mask", "test", "test_tube", "train_station")
    for folder in folders:
        write(f"{folder}/1.png"), write(f"{folder}/2.png")
    with pytest.warns(LeftOut, match="no split: test/ is read as a class"):
        images = open_images(tmp_path)
    assert images.layout == "classes" and images.classes == folders


def test_an_archive_s_outer_folder_is_looked_through(write, tmp_path):
    for name in ("set/set/train/a/1.png", "set/set/train/b/2.png", "set/set/test/a/3.png"):
        write(name)
    images = open_images(tmp_path)
    assert images.describe() == "classes: 3 images (train 2, test 1), 2 classes" and images.root.name == "set"


def test_a_picture_above_a_packed_set_changes_nothing(write, tmp_path):
    write("README.png"), write("docs/logo.png")
    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            for number in range(26):
                write(f"images/{split}/{kind}/{number}.png", np.zeros((1, 1), np.uint8))
    images = open_images(tmp_path)
    assert images.describe() == "classes: 104 images (train 52, test 52), 2 classes"
    assert images.not_read == ("2 images beside images/ (the first: README.png)",)


def test_system_folders_of_a_packed_set_are_counted_once(write, tmp_path):
    for name in ("set/a/1.png", "set/b/2.png", "set/__MACOSX/1.png", "__MACOSX/2.png"):
        write(name)
    assert open_images(tmp_path).not_read == ("2 folders of previews or system files (the first: __MACOSX)",)


def test_tables_beside_images_are_pointed_out(write, tmp_path):
    write("1.png"), (tmp_path / "train.csv").write_text("path,label\n1.png,a\n")
    assert open_images(tmp_path).not_read == ("1 table, which table=FILE reads (train.csv)",)


def test_why_there_are_no_labels_is_not_said_where_masks_are_needed(write, tmp_path):
    write("only/1.png"), write("only/2.png")
    with pytest.raises(DataError, match="there is only one class folder"):
        open_labelled(tmp_path, need="labels")
    with pytest.raises(DataError, match=r"classes.txt\)$"):
        open_labelled(tmp_path, need="masks")


def test_nested_class_folders_need_a_depth(write, tmp_path):
    for name in ("animal/cat/1.png", "animal/dog/2.png", "plant/fern/3.png"):
        write(name)
    with pytest.raises(DataError, match=r"folders are nested 2 deep .animal/cat.; say which name the class: class_d"):
        open_labelled(tmp_path, need="labels")
    assert open_images(tmp_path, class_depth=1).classes == ("animal", "plant")
    assert open_images(tmp_path, class_depth=2).classes == ("animal/cat", "animal/dog", "plant/fern")
    assert open_images(tmp_path, class_depth="deepest").classes == ("cat", "dog", "fern")


def test_class_names_that_differ_in_unicode_form_alone_are_refused(write, tmp_path):
    write("e\u0301t\u00e9/1.png"), write("\u00e9t\u00e9/2.png")
    with pytest.raises(DataError, match="two class folders are both called 'été', in different Unicode forms"):
        open_images(tmp_path)


def test_class_names_are_printable(write, tmp_path):
    for folder in (b"caf\xe9", b"two\nlines", b"plain"):
        path = tmp_path / os.fsdecode(folder)
        path.mkdir()
        shutil.copy(write("x.png"), path / "1.png")
    (tmp_path / "x.png").unlink()
    assert open_images(tmp_path).classes == ("caf\\xe9", "plain", "two\\nlines")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_one_line(write, tmp_path):
    write("a/1.png")
    (tmp_path / "a").chmod(0)
    try:
        with pytest.raises(DataError, match=r"a: can't be read .Permission denied"):
            open_images(tmp_path)
    finally:
        (tmp_path / "a").chmod(0o755)


@given(st.lists(st.text("abAB-_0/", min_size=1, max_size=8), min_size=1, max_size=6, unique=True))
def test_order_is_that_of_relative_paths(tmp_path_factory, stems):
    root = tmp_path_factory.mktemp("tree")
    content = Image.new("L", (1, 1))
    for stem in stems:
        path = root / f"{stem.strip('/') or 'x'}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        content.save(path)
    found = names(open_images(f"folder={root}"))
    assert found == sorted(found) and len(set(found)) == len(list(root.rglob("*.png")))


def test_real_folders_are_recognised(shared):
    assert open_images(shared / "clothing-small").describe() == (
        "classes: 3,781 images (train 3,068, val 341, test 372), 10 classes"
    )
    assert open_images(shared / "ccp-clothing-parsing").describe() == (
        "masks: 1,004 images (train 704, val 100, test 200), 59 classes"
    )
    assert open_images(shared / "dsb2018-nuclei").describe() == (
        "masks: 440 images (train 300, val 60, test 80), 2 classes"
    )
    assert open_images(shared / "bccd-coco").describe() == "coco: 364 images (train 205, val 87, test 72)"


def test_samples_in_arrays_are_those_of_objects(write, tmp_path):
    for name in ("train/a/0.png", "train/b/ä.png", "val/a/1.png", "val/b/2.png", "train/a/3.png"):
        write(name)
    images = open_images(tmp_path)
    objects = replace(images, samples=tuple(images.samples))
    assert isinstance(images.samples, PlainSamples) and images == objects and hash(images.samples)
    for one, other in ((images, objects), (images.subset("train"), objects.subset("train"))):
        assert one.names == other.names and one.paths == other.paths and one.groups == other.groups == ()
        assert one.labels.tolist() == other.labels.tolist() and one.splits == other.splits
        assert one.fingerprint() == other.fingerprint() and one.account() == other.account()
        sources = one.source(3), other.source(3)
        assert [sources[0].path(i) for i in range(len(one))] == [sources[1].path(i) for i in range(len(one))]
    pixels = PixelConfig(scale=(0, 9))
    assert images.with_pixels(pixels) == objects.with_pixels(pixels) != images
    assert images.samples[1:4] == objects.samples[1:4] and images.samples[-1] == objects.samples[-1]
