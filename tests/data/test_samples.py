import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.data import samples
from smalti.data.images.folders import open_images, read_image
from smalti.data.images.labelled import open_labelled, read_mask
from smalti.data.samples import CLASSES, draw_object, draw_scene, write_samples
from smalti.errors import DataError, MissingExtraError

pytest.importorskip("skimage", reason="the photographs come with scikit-image (extra samples)")


@given(seed=st.integers(0, 2**31), index=st.integers(0, 2**31), size=st.sampled_from([32, 96, 150]))
@settings(max_examples=20, deadline=None)
def test_masks_instances_and_boxes_say_the_same(seed, index, size):
    scene = draw_scene(seed, index, size)
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    assert scene.instances.dtype == np.uint16 and scene.mask.dtype == np.uint8
    np.testing.assert_array_equal(scene.mask > 0, scene.instances > 0)
    assert scene.instances.max() == len(scene.labels) == len(scene.boxes) <= 4
    for number, (label, (x0, y0, x1, y1)) in enumerate(zip(scene.labels, scene.boxes.astype(int), strict=True), 1):
        inside = scene.instances == number
        assert (scene.mask[inside] == label).all() and 1 <= label < len(CLASSES)
        assert inside.sum() == inside[y0:y1, x0:x1].sum() > 0
        edges = inside[y0, x0:x1], inside[y1 - 1, x0:x1], inside[y0:y1, x0], inside[y0:y1, x1 - 1]
        assert all(edge.any() for edge in edges)  # tight


def test_scenes_depend_on_seed_and_index_alone():
    first = draw_scene(3, 5)
    draw_scene(4, 6)
    again = draw_scene(3, 5)
    assert all(np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))
    assert not np.array_equal(first.image, draw_scene(3, 6).image)
    assert not np.array_equal(first.image, draw_scene(4, 5).image)


def test_every_class_occurs_about_alike_and_scenes_hold_background_too():
    scenes = [draw_scene(0, i, 48) for i in range(150)]
    counts = np.bincount(np.concatenate([scene.labels for scene in scenes]), minlength=len(CLASSES))
    assert counts[0] == 0 and counts[1:].min() > 0.5 * counts[1:].mean()
    assert 0.08 < np.mean([scene.mask > 0 for scene in scenes]) < 0.3


@pytest.mark.parametrize("label", range(1, len(CLASSES)))
def test_an_object_scene_shows_its_class_on_any_background(label):
    scenes = [draw_object(0, i, label, 64) for i in range(6)]
    assert all(scene.labels.tolist() == [label] for scene in scenes)
    backgrounds = [scene.image[scene.mask == 0].mean(axis=0) for scene in scenes]
    assert np.std(backgrounds, axis=0).max() > 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    calls = []
    out = write_samples(
        tmp_path_factory.mktemp("samples") / "scenes",
        num_train=6,
        num_val=3,
        num_objects_train=2,
        num_objects_val=1,
        size=48,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[0] == (1, 30) and calls[-1] == (30, 30)
    return out


def test_the_folder_is_a_users_layout(folder):
    images = open_images(folder)
    assert images.describe() == "masks: 9 images (train 6, val 3), 8 classes"
    assert len(images.training()) == 6
    data = open_labelled(folder, need="masks")
    assert data.classes == CLASSES
    scene = draw_scene(0, 2, 48)
    sample = data.train.samples[2]
    np.testing.assert_array_equal(read_mask(sample, len(CLASSES)), scene.mask)
    assert np.abs(read_image(sample.path).astype(int) - scene.image).mean() < 8  # a JPEG
    assert [path.name for path in folder.parent.iterdir()] == ["scenes"]  # no draft left


def test_the_objects_are_class_folders(folder):
    data = open_labelled(folder / "objects", need="labels")
    assert data.classes == tuple(sorted(CLASSES[1:]))
    assert (len(data.train), len(data.test)) == (14, 7)


def test_coco_boxes_and_outlines_are_those_of_the_scenes(folder):
    coco = json.loads((folder / "annotations/instances_val.json").read_text())
    assert [category["name"] for category in coco["categories"]] == list(CLASSES[1:])
    assert [image["file_name"] for image in coco["images"]] == [f"val_{i:06d}.jpg" for i in range(3)]
    assert len({item["id"] for item in coco["annotations"]}) == len(coco["annotations"])
    for image in coco["images"]:
        scene = draw_scene(0, samples._VAL_FIRST + image["id"] - 1, 48)
        items = [item for item in coco["annotations"] if item["image_id"] == image["id"]]
        assert [item["category_id"] for item in items] == scene.labels.tolist()
        for number, (item, (x0, y0, x1, y1)) in enumerate(zip(items, scene.boxes.tolist(), strict=True), 1):
            assert item["bbox"] == [x0, y0, x1 - x0, y1 - y0]
            counts = item["segmentation"]["counts"]
            values = np.arange(len(counts)) % 2 == 1
            outline = np.repeat(values, counts).reshape(48, 48).T
            np.testing.assert_array_equal(outline, scene.instances == number)
            assert item["area"] == outline.sum()


def test_val_scenes_stay_whatever_the_number_of_train_scenes(folder, tmp_path):
    out = write_samples(tmp_path / "x", num_train=1, num_val=1, num_objects_train=0, num_objects_val=0, size=48)
    name = "masks/val_000000.png"
    assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="not empty; choose a new folder for the samples"):
        write_samples(tmp_path)
    with pytest.raises(DataError, match=r"mine.txt: a file; choose a new folder"):
        write_samples(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(samples, "_write", full)
    with pytest.raises(DataError, match=r"samples can't be written \(No space left on device\)"):
        write_samples(tmp_path / "out", num_train=1, num_val=1)
    assert list(tmp_path.iterdir()) == []


def test_too_few_scenes_are_one_line(tmp_path):
    with pytest.raises(DataError, match="0 and 5 scenes of 96 px; at least one of each"):
        write_samples(tmp_path / "out", num_train=0, num_val=5)


def test_without_scikit_image_the_extra_is_named(monkeypatch):
    samples._photograph.cache_clear()
    monkeypatch.setattr(samples.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "smalti\[samples\]"'):
        draw_scene(0, 0)


def test_drawing_imports_no_heavy_package():
    """scikit-image's files are read as files."""
    draw_object(0, 0, 1)
    assert "skimage.data" not in sys.modules
