import json
from collections import Counter

import numpy as np
import pytest

from smalti.data.images.coco import read_annotations
from smalti.data.images.folders import open_images
from smalti.data.images.labelled import open_labelled
from smalti.errors import DataError


def small():
    """Two images, two categories with a gap, a crowd."""
    return {
        "images": [
            {"id": 9, "file_name": "b.jpg", "height": 20, "width": 30},
            {"id": 4, "file_name": "a.jpg", "height": 20, "width": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 90, "bbox": [1, 2, 3.5, 4], "area": 8.0, "iscrowd": 0,
             "segmentation": [[1, 2, 4, 2, 4, 6]]},
            {"id": 2, "image_id": 9, "category_id": 3, "bbox": [0, 0, 30, 20], "area": 50, "iscrowd": 1,
             "segmentation": {"size": [20, 30], "counts": [550, 50]}},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
    }  # fmt: skip


@pytest.fixture
def write_json(tmp_path):
    def write(tree, name="annotations/instances_train2017.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree))
        return path

    return write


def test_objects_have_corners_places_of_categories_and_their_outline_as_it_is(write_json):
    found = read_annotations(write_json(small()))
    assert found.classes == ("car", "toothbrush") and found.category_ids == (3, 90)
    first, crowd = found.images["b.jpg"].objects
    assert first.box == (1, 2, 4.5, 6) and first.label == 1 and not first.is_crowd and first.area == 8
    assert first.outline == [[1, 2, 4, 2, 4, 6]]
    assert crowd.is_crowd and crowd.label == 0 and crowd.outline == {"size": [20, 30], "counts": [550, 50]}
    assert found.images["a.jpg"].objects == () and (found.images["a.jpg"].height, found.images["a.jpg"].width) == (
        20,
        30,
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda tree: tree.pop("images"), "no list 'images'; COCO's format needs"),
        (lambda tree: tree["annotations"][1].update(category_id=12), "annotation 2 is of category 12, which the file"),
        (lambda tree: tree["annotations"][0].update(image_id=5), "annotation 1 is of image 5, which the file doesn't"),
        (lambda tree: tree["annotations"][0].pop("bbox"), "annotation 1 lacks 'bbox'"),
        (
            lambda tree: tree["annotations"][0].update(bbox=[1, 2, -3, 4]),
            r"annotation 1 can't be used: a box of \[1, 2,",
        ),
        (lambda tree: tree["annotations"][0].update(bbox=[1, 2, 3]), "annotation 1 can't be used"),
        (lambda tree: tree["images"][0].pop("width"), "'images' lacks 'width'"),
        (lambda tree: tree["images"][0].update(id=4), "two images have the same id or file name"),
        (lambda tree: tree["images"][0].update(file_name="a.jpg"), "two images have the same id or file name"),
        (lambda tree: tree["categories"][0].update(id=3), "two categories have the same id"),
        (lambda tree: tree["categories"].append("cat"), "'categories' can't be used"),
        (lambda tree: tree["annotations"].append(None), "can't be used"),
    ],
)
def test_a_file_that_contradicts_itself_is_one_line(write_json, change, line):
    tree = small()
    change(tree)
    path = write_json(tree)
    with pytest.raises(DataError, match=line) as caught:
        read_annotations(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_no_json_is_one_line(tmp_path):
    path = tmp_path / "instances_val.json"
    path.write_text('{"images": [')
    with pytest.raises(DataError, match=r"instances_val.json: can't be read as a JSON file"):
        read_annotations(path)
    with pytest.raises(DataError, match="can't be read"):
        read_annotations(tmp_path / "none.json")


@pytest.mark.parametrize("folder", ["images/train2017", "train2017", "coco/images/train2017"])
def test_images_in_a_folder_of_their_own_are_listed_without_reading_the_file(write, tmp_path, folder):
    write(f"{folder}/b.jpg"), write(f"{folder}/a.jpg")
    path = tmp_path / "annotations/instances_train2017.json"
    path.parent.mkdir()
    path.write_text("never read")
    (tmp_path / "annotations/instances_val2017.json").write_text("no images of val here")
    found = open_images(tmp_path)
    assert found.describe() == "coco: 2 images (train 2)"
    assert {sample.annotations for sample in found.samples} == {path}


def test_images_in_one_folder_are_told_apart_by_the_files(write, write_json, tmp_path):
    for name in "abc":
        write(f"images/{name}.jpg")
    train, val = small(), small()
    val["images"] = [{"id": 9, "file_name": "c.jpg", "height": 20, "width": 30}]
    paths = [write_json(tree, f"annotations/instances_{name}.json") for name, tree in (("train", train), ("val", val))]
    found = open_images(tmp_path)
    assert found.describe() == "coco: 3 images (train 2, val 1)"
    assert [(s.path.name, s.annotations) for s in found.samples] == [
        ("a.jpg", paths[0]), ("b.jpg", paths[0]), ("c.jpg", paths[1])
    ]  # fmt: skip
    assert found.training().paths == (tmp_path / "images/a.jpg", tmp_path / "images/b.jpg")
    (tmp_path / "images/a.jpg").unlink()
    with pytest.raises(DataError, match=r"instances_train.json: 1 of 2 images don't exist, the first: .*a.jpg"):
        open_images(tmp_path)


def test_one_file_without_a_split_is_all_there_is_and_two_of_a_split_are_refused(write, write_json, tmp_path):
    write("images/a.jpg"), write("images/b.jpg")
    write_json(small(), "annotations/instances_default.json")
    assert open_images(tmp_path).describe() == "coco: 2 images"
    write_json(small(), "annotations/instances_train.json")
    with pytest.raises(DataError, match="default and train aren't distinguished as train, val and test"):
        open_images(tmp_path)
    (tmp_path / "annotations/instances_default.json").unlink()
    write_json(small(), "annotations/instances_train2014.json")
    with pytest.raises(DataError, match="train and train2014 aren't distinguished"):
        open_images(tmp_path)


def test_objects_elsewhere_leave_a_folder_a_folder(write, write_json, tmp_path):
    write("pictures/a.jpg"), write("pictures/b.jpg")
    write_json(small(), "annotations/instances_default.json")
    assert open_images(tmp_path).layout == "folder"
    with pytest.raises(DataError, match=r"layout 'coco' needs images/train2017 or .*; it has: annotations, pictures"):
        open_images(f"coco={tmp_path}")


def test_real_coco_is_read_whole(shared):
    images = open_images(shared / "coco-tiny")
    assert images.describe() == "coco: 38 images (train 32, val 6)"
    expected = {"train": (288, 4), "val": (136, 1)}
    for split, (num_objects, num_crowds) in expected.items():
        part = images.subset(split)
        (path,) = {sample.annotations for sample in part.samples}
        found = read_annotations(path)
        assert len(found.classes) == 80 and found.category_ids[11] == 13 and found.classes[79] == "toothbrush"
        assert set(found.images) == {sample.path.name for sample in part.samples}
        objects = [(image, thing) for image in found.images.values() for thing in image.objects]
        assert len(objects) == num_objects and sum(thing.is_crowd for _, thing in objects) == num_crowds
        assert Counter(type(thing.outline) for _, thing in objects) == {
            list: num_objects - num_crowds, dict: num_crowds
        }  # fmt: skip
        raw = json.loads(path.read_text())
        theirs = sorted((a["image_id"], a["category_id"], *a["bbox"], a["area"]) for a in raw["annotations"])
        ours = sorted(
            (
                image.id,
                found.category_ids[t.label],
                t.box[0],
                t.box[1],
                t.box[2] - t.box[0],
                t.box[3] - t.box[1],
                t.area,
            )
            for image, t in objects
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-9)
        for image, thing in objects:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 <= x1 <= image.width + 1 and 0 <= y0 <= y1 <= image.height + 1


def boxed(write, write_json, change):
    """Three images of 60x40 pixels with two objects each, in COCO's folders, after a change of the file."""
    tree = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 40} for i in range(3)],
        "annotations": [
            {"id": 2 * i + k, "image_id": i, "category_id": k, "bbox": [5 + 20 * k, 5, 15, 20], "iscrowd": 0,
             "segmentation": [[5 + 20 * k, 5, 20 + 20 * k, 5, 20 + 20 * k, 25, 5 + 20 * k, 25]]}
            for i in range(3) for k in range(2)
        ],
        "categories": [{"id": k, "name": f"c{k}"} for k in range(2)],
    }  # fmt: skip
    change(tree)
    for split in ("train", "val"):
        write_json(tree, f"annotations/instances_{split}.json")
        for i in range(3):
            write(f"images/{split}/{i}.jpg", np.zeros((40, 60, 3), np.uint8))


def as_corners(tree, outlines=True):
    for item in tree["annotations"]:
        x, y, width, height = item["bbox"]
        item["bbox"] = [x, y, x + width, y + height]
        if not outlines:
            del item["segmentation"]


def as_fractions_of_corners(tree):
    for item in tree["annotations"]:
        item["bbox"] = [0.4, 0.3, 0.9, 0.8]


def as_fractions(tree):
    for item in tree["annotations"]:
        x, y, width, height = item["bbox"]
        item["bbox"] = [x / 60, y / 40, width / 60, height / 40]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (as_fractions_of_corners, "boxes lie in 0..1, as fractions of the image"),
        (as_fractions, r"all 6 boxes lie in 0..1, as fractions of the image; boxes are left, top, width and height"),
        (as_corners, r"boxes look like corners .x0, y0, x1, y1.: read as left, top, width and height, 3 of 6 reach"),
        (lambda tree: as_corners(tree, outlines=False), "boxes look like corners"),
        (lambda tree: tree["categories"][1].update(name="c0"), "categories 0, 1 are both called 'c0'; rename or merge"),
        (lambda tree: tree["annotations"][0].update(bbox=[0, 0, 1e999, 1]), "annotation 0"),
        (lambda tree: tree["annotations"][0].update(image_id=float("inf")), "annotation 0"),
    ],
    ids=[
        "corners as fractions",
        "fractions",
        "corners",
        "corners without outlines",
        "names",
        "infinite",
        "infinite id",
    ],
)
def test_boxes_that_are_read_in_another_way_than_meant_are_refused(write, write_json, tmp_path, change, line):
    boxed(write, write_json, change)
    with pytest.raises(DataError, match=line):
        open_labelled(f"coco={tmp_path}", need="boxes")


def test_boxes_as_they_should_be_are_read_also_when_a_few_reach_over_the_border(write, write_json, tmp_path):
    boxed(write, write_json, lambda tree: tree["annotations"][0].update(bbox=[50, 30, 30, 30]))
    with pytest.warns(UserWarning, match="1 boxes reach over the border of their image; clipped"):
        assert len(open_labelled(f"coco={tmp_path}", need="boxes").train) == 3


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../x.jpg"])
def test_files_outside_of_the_folder_of_images_are_refused(write, write_json, tmp_path, name):
    tree = small()
    tree["images"][0]["file_name"] = name
    write_json(tree, "annotations/instances_train.json")
    write("images/a.jpg")
    with pytest.raises(DataError, match=f"the image '{name}' lies outside of"):
        open_images(f"coco={tmp_path}")


def test_roboflow_s_export_has_splits_and_boxes(write, write_json, tmp_path):
    for split in ("train", "valid"):
        tree = small()
        write_json(tree, f"{split}/_annotations.coco.json")
        for image in tree["images"]:
            write(f"{split}/{image['file_name']}", np.zeros((20, 30, 3), np.uint8))
    data = open_labelled(tmp_path, need="boxes")
    assert data.note == "learned from train (2), evaluated on val (2)" and data.classes == ("car", "toothbrush")
    assert open_images(tmp_path).layout == "coco"
