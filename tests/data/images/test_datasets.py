import json
import re

import numpy as np
import pytest
from PIL import Image

from smalti.data.images import datasets
from smalti.data.images.folders import open_images
from smalti.data.images.labelled import open_labelled, read_mask
from smalti.errors import DataError

SHAPE = (4, 6)


def grey(*values):
    """A mask with these values, and the first of them in the rest."""
    numbers = np.full(SHAPE, values[0], np.uint8)
    numbers.ravel()[: len(values)] = values
    return numbers


def palette(*values):
    picture = Image.fromarray(grey(*values)).convert("P")
    picture.putdata(grey(*values).ravel().tolist())
    picture.putpalette([7, 200, 90] * 256)
    return picture


@pytest.fixture
def photo(write):
    return lambda name: write(name, np.zeros((*SHAPE, 3), np.uint8))


@pytest.fixture
def write_list(tmp_path):
    def write(name, *lines):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))

    return write


def names(images):
    return {split: [path.stem for path in images.subset(split).paths] for split in images.splits}


def masks(images):
    """The first row of each mask as classes."""
    return {sample.path.stem: read_mask(sample, len(images.classes))[0].tolist() for sample in images.samples}


VOC_SPELLINGS = [("JPEGImages", "ImageSets/Segmentation"), ("images", "sets"), ("images", "ImageSets/Segmentation")]


def voc(photo, write, write_list, images="JPEGImages", lists="ImageSets/Segmentation", aug=True):
    for stem in ("2007_000001", "2007_000002", "2008_000003", "2009_000009"):
        photo(f"{images}/{stem}.jpg")
    write("SegmentationClass/2007_000001.png", palette(0, 20, 255))
    write("SegmentationClass/2008_000003.png", palette(3, 255, 0))
    write_list(f"{lists}/train.txt", "2007_000001")
    write_list(f"{lists}/val.txt", "2008_000003")
    write_list(f"{lists}/trainval.txt", "2007_000001", "2008_000003")
    if aug:
        write("SegmentationClassAug/2007_000001.png", grey(0, 19, 255))
        write("SegmentationClassAug/2007_000002.png", grey(1, 2, 3))
        write_list(
            f"{lists}/trainaug.txt", "2007_000001", "/JPEGImages/2007_000002.jpg /SegmentationClassAug/2007_000002.png"
        )


@pytest.mark.parametrize(("images", "lists"), VOC_SPELLINGS)
def test_voc_learns_from_trainaug_where_it_is_and_is_judged_on_val(photo, write, write_list, tmp_path, images, lists):
    voc(photo, write, write_list, images, lists)
    found = open_images(tmp_path)
    assert found.describe() == "voc: 3 images (train 2, val 1), 21 classes"
    assert found.classes[0] == "background" and found.classes[20] == "tvmonitor" and len(set(found.classes)) == 21
    assert names(found) == {"train": ["2007_000001", "2007_000002"], "val": ["2008_000003"]}
    rows = masks(found)
    assert rows["2007_000001"][:3] == [0, 19, 255], "from SegmentationClassAug"
    assert rows["2008_000003"][:3] == [3, 255, 0], "palette indices, from SegmentationClass"
    assert "train list: trainaug" in found.label_note and "255 is ignored" in found.label_note
    data = open_labelled(tmp_path, need="masks")
    assert data.note == "learned from train (2), evaluated on val (1)"


def test_voc_without_trainaug_learns_from_train(photo, write, write_list, tmp_path):
    voc(photo, write, write_list, aug=False)
    found = open_images(f"voc={tmp_path}")
    assert names(found) == {"train": ["2007_000001"], "val": ["2008_000003"]}
    assert masks(found)["2007_000001"][:3] == [0, 20, 255]
    assert "train list: train)" in found.label_note


@pytest.mark.parametrize("parent", ["VOCdevkit/VOC2012", "VOC2012", "VOCSegmentation"])
def test_voc_is_found_below_its_parents(photo, write, write_list, tmp_path, parent):
    voc(lambda name: photo(f"{parent}/{name}"), lambda name, x: write(f"{parent}/{name}", x),
        lambda name, *lines: write_list(f"{parent}/{name}", *lines))  # fmt: skip
    assert open_images(tmp_path).describe() == "voc: 3 images (train 2, val 1), 21 classes"


def test_folders_of_voc_without_its_lists_are_images_with_masks(photo, write, write_list, tmp_path):
    """As CVAT exports them: ImageSets/Segmentation/default.txt."""
    voc(photo, write, write_list, aug=False)
    for path in (tmp_path / "ImageSets/Segmentation").iterdir():
        path.unlink()
    write_list("ImageSets/Segmentation/default.txt", "")
    assert open_images(tmp_path).layout == "masks"


@pytest.mark.parametrize(
    ("gone", "line"),
    [
        ("JPEGImages", "layout 'voc' needs JPEGImages or images; it has: ImageSets, SegmentationClass"),
        ("ImageSets", "layout 'voc' needs ImageSets/Segmentation or sets; it has: JPEGImages, SegmentationClass"),
        ("SegmentationClass", "layout 'voc' needs SegmentationClass or SegmentationClassAug; it has: ImageSets, JPEG"),
    ],
)
def test_voc_names_the_folder_that_is_missing(photo, write, write_list, tmp_path, gone, line):
    voc(photo, write, write_list, aug=False)
    (tmp_path / gone).rename(tmp_path.parent / f"{tmp_path.name}_gone")
    with pytest.raises(DataError, match=re.escape(line)):
        open_images(f"voc={tmp_path}")


def test_voc_names_listed_images_and_masks_that_are_missing(photo, write, write_list, tmp_path):
    voc(photo, write, write_list, aug=False)
    write_list("ImageSets/Segmentation/val.txt", "2008_000003", "2009_000009")
    with pytest.raises(DataError, match=r"1 of 2 val images have no mask, the first: JPEGImages/2009_000009.jpg"):
        open_images(tmp_path)
    write_list("ImageSets/Segmentation/val.txt", "2008_000003", "2011_000011")
    line = r"val.txt: 1 of 2 names have no image in JPEGImages/, the first: 2011_000011 \(line 2\)"
    with pytest.raises(DataError, match=line):
        open_images(tmp_path)
    write_list("ImageSets/Segmentation/val.txt", "2008_000003", "2007_000001")
    with pytest.raises(DataError, match=r"image '2007_000001' is in both train.txt and val.txt"):
        open_images(tmp_path)


def test_voc_refuses_values_that_voc_does_not_have(photo, write, write_list, tmp_path):
    voc(photo, write, write_list, aug=False)
    write("SegmentationClass/2008_000003.png", grey(0, 21))
    with pytest.raises(DataError, match=r"2008_000003.png: holds the value 21, which no mask of voc has \(Pascal"):
        masks(open_images(tmp_path))
    write("SegmentationClass/2008_000003.png", np.zeros((*SHAPE, 3), np.uint8))
    with pytest.raises(DataError, match="a mask of mode RGB, it needs one number a pixel"):
        masks(open_images(tmp_path))
    write("SegmentationClass/2008_000003.png", np.zeros((5, 6), np.uint8))
    with pytest.raises(DataError, match=r"6x5 pixels, its image 2008_000003.jpg has 6x4; they must be the same"):
        masks(open_images(tmp_path))


def ade20k(photo, write, parent="", stems=("ADE_{}_00000001", "ADE_{}_00000002")):
    for split, name in (("train", "training"), ("val", "validation")):
        for stem in stems:
            photo(f"{parent}images/{name}/{stem.format(split)}.jpg")
            write(f"{parent}annotations/{name}/{stem.format(split)}.png", grey(0, 150, 1))


@pytest.mark.parametrize("parent", ["", "ADEChallengeData2016/"])
def test_e19_ade20k_has_150_classes_and_other_is_ignored(photo, write, tmp_path, parent):
    ade20k(photo, write, parent)
    found = open_images(tmp_path)
    assert found.describe() == "ade20k: 4 images (train 2, val 2), 150 classes"
    assert (found.classes[0], found.classes[149], len(set(found.classes))) == ("wall", "flag", 150)
    assert masks(found)["ADE_val_00000001"][:3] == [255, 149, 0]
    assert found.label_note == "ADE20K's 150 classes, values less 1; 0 (other) is 255, ignored"


def test_ade20k_with_151_classes_has_no_pixel_of_other(photo, write, tmp_path):
    ade20k(photo, write)
    found = open_images(f"ade20k-151={tmp_path}")
    assert found.describe() == "ade20k-151: 4 images (train 2, val 2), 151 classes"
    assert found.classes[:2] == ("other", "wall")
    assert masks(found)["ADE_train_00000002"][:3] == [255, 150, 1]
    assert "0 (other) is 255, ignored: with absent=zero its IoU of 0 counts" in found.label_note


def test_ade20k_refuses_values_over_150_and_counts_masks_without_an_image(photo, write, tmp_path):
    ade20k(photo, write)
    write("annotations/training/ADE_train_00000009.png", grey(1))
    with pytest.warns(
        UserWarning, match=r"1 of 3 train masks have no image and are left out, the first: annotations/t"
    ):
        found = open_images(tmp_path)
    assert len(found.subset("train")) == 2
    write("annotations/validation/ADE_val_00000001.png", grey(151))
    with pytest.raises(DataError, match="holds the value 151, which no mask of ade20k has"):
        read_mask(found.subset("val").samples[0], 150)
    write("annotations/validation/ADE_val_00000001.png", np.full(SHAPE, 300, np.uint16))
    with pytest.raises(DataError, match="holds the value 300, which no mask of ade20k has"):
        read_mask(found.subset("val").samples[0], 150)
    (tmp_path / "annotations/training/ADE_train_00000009.png").unlink()
    photo("images/validation/ADE_val_00000003.jpg")
    with pytest.raises(
        DataError, match=r"1 of 3 val images have no mask, the first: images/validation/ADE_val_00000003"
    ):
        open_images(f"ade20k={tmp_path}")


@pytest.mark.parametrize("gone", ["images/training", "annotations/validation"])
def test_ade20k_names_the_folder_that_is_missing(photo, write, tmp_path, gone):
    ade20k(photo, write)
    (tmp_path / gone).rename(tmp_path.parent / f"{tmp_path.name}_gone")
    with pytest.raises(DataError, match=f"layout 'ade20k' needs {gone}; it has: annotations, images"):
        open_images(tmp_path)


def test_data_of_ones_own_in_known_folders_is_told_what_it_is_taken_for(photo, write, tmp_path):
    ade20k(photo, write, stems=("street_{}",))
    with pytest.warns(UserWarning, match=r"read as ade20k by its folders, though its files have other names"):
        assert open_images(tmp_path).layout == "ade20k"


def cityscapes(photo, write):
    for split, city in (("train", "ulm"), ("train", "bochum"), ("val", "lindau")):
        stem = f"{city}_000001_000019"
        photo(f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png")
        write(f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", grey(7, 33, 26, 0, 255))
        write(f"gtFine/{split}/{city}/{stem}_gtFine_color.png", np.zeros((*SHAPE, 4), np.uint8))
        write(f"gtFine/{split}/{city}/{stem}_gtFine_instanceIds.png", np.full(SHAPE, 26001, np.uint16))
    photo("leftImg8bit/test/bonn/bonn_000001_000019_leftImg8bit.png")


def test_e19_cityscapes_scores_19_of_its_label_ids(photo, write, tmp_path):
    cityscapes(photo, write)
    found = open_images(tmp_path)
    assert found.describe() == "cityscapes: 3 images (train 2, val 1), 19 classes"
    assert (found.classes[0], found.classes[13], found.classes[18]) == ("road", "car", "bicycle")
    assert masks(found)["lindau_000001_000019_leftImg8bit"][:5] == [0, 18, 13, 255, 255]
    with pytest.raises(DataError, match="needs gtFine/train; it has: leftImg8bit"):
        (tmp_path / "gtFine").rename(tmp_path.parent / f"{tmp_path.name}_gone")
        open_images(f"cityscapes={tmp_path}")


CODE, README = "annotations/", "annotations/annotations/"


def coco(photo, write, images, masks, *values):
    for split, number in (("train2017", 1), ("train2017", 2), ("val2017", 3)):
        photo(f"{images.format(split)}/{number:012d}.jpg")
        write(f"{masks.format(split)}/{number:012d}.png", grey(*values))


def panoptic(write_list, name, extra=()):
    rows = [
        {"id": label_id, "name": str(label_id), "supercategory": group, "isthing": int(thing)}
        for thing, table in ((1, datasets._THINGS), (0, datasets._STUFF))
        for group, ids in [*table.items(), *extra]
        for label_id in ids
    ]
    write_list(name, json.dumps({"images": [], "annotations": [], "categories": rows}))


STUFF_SPELLINGS = [
    ("images/{}", CODE + "stuff_annotations/stuff_{}_pixelmaps"),
    ("coco/images/{}", README + "stuff_annotations/stuff_{}_pixelmaps"),
    ("{}", "annotations/stuff_{}_pixelmaps"),
]


@pytest.mark.parametrize(("images", "pixelmaps"), STUFF_SPELLINGS)
def test_e19_coco_stuff_has_15_groups_and_no_things(photo, write, tmp_path, images, pixelmaps):
    coco(photo, write, images, pixelmaps, 169, 183, 0, 92, 181, 96)
    for data in (tmp_path, f"coco-stuff={tmp_path}"):
        found = open_images(data)
        assert found.describe() == "coco-stuff: 3 images (train 2, val 1), 15 classes"
        assert masks(found)["000000000003"] == [6, 255, 255, 11, 14, 0]
    assert found.classes[6] == "plant" and list(found.classes) == sorted(found.classes)


def test_coco_stuff_refuses_masks_that_hold_things_since_their_values_are_others(photo, write, tmp_path):
    coco(photo, write, *STUFF_SPELLINGS[0], 0, 17)
    with pytest.raises(DataError, match="holds the value 17, which no mask of coco-stuff has"):
        masks(open_images(tmp_path))


def test_the_91_ids_of_stuff_are_in_15_groups_and_those_of_things_in_12():
    stuff = [label_id for ids in datasets._STUFF.values() for label_id in ids]
    things = [label_id for ids in datasets._THINGS.values() for label_id in ids]
    assert sorted(stuff) == list(range(92, 183)) and len(datasets._STUFF) == 15
    assert len(set(things)) == len(things) == 80 and len(datasets._THINGS) == 12
    assert list(datasets._THINGS) == sorted(datasets._THINGS) and list(datasets._STUFF) == sorted(datasets._STUFF)


@pytest.mark.parametrize(
    ("images", "maps", "table"),
    [
        ("images/{}", "annotations/{}", CODE + "panoptic_annotations/panoptic_val2017.json"),
        (
            "coco/images/{}",
            README + "panoptic_annotations/semantic_segmenations_{}",
            README + "panoptic_annotations/panoptic_val2017.json",
        ),
    ],
)
def test_e19_coco_things_has_12_groups_from_the_table(photo, write, write_list, tmp_path, images, maps, table):
    coco(photo, write, images, maps, 18, 92, 0, 200, 12, 1)
    panoptic(write_list, table)
    found = open_images(tmp_path)
    assert found.describe() == "coco-things: 3 images (train 2, val 1), 12 classes"
    assert (found.classes[1], found.classes[9]) == ("animal", "person")
    assert masks(found)["000000000001"] == [1, 255, 255, 255, 255, 9]
    assert "table of panoptic_val2017.json" in found.label_note


def test_coco_things_without_a_table_takes_cocos_and_another_table_is_heeded(photo, write, write_list, tmp_path):
    coco(photo, write, "images/{}", "annotations/{}", 18, 92, 0, 1)
    assert open_images(tmp_path).layout == "coco", "annotations/train2017 alone may be anything"
    found = open_images(f"coco-things={tmp_path}")
    assert masks(found)["000000000001"][:4] == [1, 255, 255, 9] and "COCO's own table" in found.label_note
    panoptic(write_list, "annotations/panoptic_val2017.json", extra=[("aardvarks", (240,))])
    assert open_images(f"coco-things={tmp_path}").classes[:2] == ("aardvarks", "accessory")
    write_list("annotations/panoptic_val2017.json", '{"categories": [{"id": 1}]}')
    with pytest.raises(DataError, match=r"panoptic_val2017.json: can't be read as a table of things"):
        open_images(f"coco-things={tmp_path}")
    write_list("annotations/panoptic_val2017.json", '{"categories":')
    with pytest.raises(DataError, match=r"panoptic_val2017.json: can't be read as a JSON file"):
        open_images(f"coco-things={tmp_path}")


def test_coco_stuff27_is_things_and_stuff_on_one_mask_of_ids_less_one(photo, write, tmp_path):
    coco(photo, write, "images/{}", "stuffthingmaps/{}", 17, 168, 0, 182, 255, 11)
    found = open_images(f"coco-stuff27={tmp_path}")
    assert len(found.classes) == 27 and found.classes[9] == "person" and found.classes[12] == "building"
    assert masks(found)["000000000001"] == [1, 12 + 6, 9, 255, 255, 255]
    assert open_images(tmp_path).layout == "coco-stuff27"


def test_coco_with_both_kinds_of_masks_asks_which(photo, write, write_list, tmp_path):
    coco(photo, write, *STUFF_SPELLINGS[0], 92)
    coco(photo, write, "images/{}", "annotations/{}", 1)
    panoptic(write_list, "annotations/panoptic_annotations/panoptic_val2017.json")
    assert open_images(tmp_path).describe() == "coco: 3 images (train 2, val 1)"
    with pytest.raises(DataError, match=f"has layout 'coco', .*; COCO's come as coco-stuff={tmp_path} or coco-things="):
        open_labelled(tmp_path, need="masks")


@pytest.mark.parametrize("gone", ["images", "annotations"])
def test_coco_stuff_names_the_folder_that_is_missing(photo, write, tmp_path, gone):
    coco(photo, write, *STUFF_SPELLINGS[0], 92)
    (tmp_path / gone).rename(tmp_path.parent / f"{tmp_path.name}_gone")
    needed = {
        "images": "images/train2017 or coco/images/train2017 or train2017",
        "annotations": "annotations/stuff_ann",
    }
    with pytest.raises(DataError, match=f"layout 'coco-stuff' needs {needed[gone]}"):
        open_images(f"coco-stuff={tmp_path}")


@pytest.mark.parametrize("name", list(datasets.READERS))
def test_every_reader_says_what_an_empty_folder_lacks(tmp_path, name):
    with pytest.raises(DataError, match=f"layout '{name}' needs .*; it has no folders"):
        open_images(f"{name}={tmp_path}")


def test_unlabelled_coco_pretrains_on_train2017_alone(photo, tmp_path):
    for name in ("train2017/1", "train2017/2", "val2017/3"):
        photo(f"{name}.jpg")
    found = open_images(tmp_path)
    assert found.describe() == "coco: 3 images (train 2, val 1)"
    assert [path.stem for path in found.training().paths] == ["1", "2"]
    assert {sample.annotations for sample in found.samples} == {None}


@pytest.mark.parametrize(
    ("reader", "value", "place"),
    [
        ("cityscapes", 26, 13),
        ("cityscapes", 0, 255),
        ("cityscapes", -1, 255),
        ("coco-stuff", 169, 6),
        ("coco-stuff", 183, 255),
        ("coco-stuff", 0, 255),
        ("coco-things", 18, 1),
        ("coco-things", 92, 255),
        ("ade20k", 0, 255),
        ("ade20k", 150, 149),
    ],
)
def test_known_values(photo, write, tmp_path, reader, value, place):
    ade20k(photo, write), cityscapes(photo, write)
    coco(photo, write, *STUFF_SPELLINGS[0], 0), coco(photo, write, "images/{}", "annotations/{}", 0)
    label_map = open_images(f"{reader}={tmp_path}").samples[0].label_map
    assert label_map.classes(np.array([[value]], np.int32)).tolist() == [[place]]
    if value >= 0:
        assert label_map.classes(np.array([[value]], np.uint8)).tolist() == [[place]]
