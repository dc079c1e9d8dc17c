import re

import numpy as np
import pytest
from PIL import Image

from smalti.data.images.folders import open_images
from smalti.data.images.mask_values import count_values


@pytest.fixture
def masked(write, tmp_path):
    """Write images with the given masks, 24x32, and classes.txt; open them."""

    def make(masks, classes="background\ncell\n"):
        for number, mask in enumerate(masks):
            write(f"images/{number}.jpg")
            write(f"masks/{number}.png", mask)
        if classes:
            (tmp_path / "classes.txt").write_text(classes)
        return open_images(tmp_path)

    return make


def mask(*values):
    """Columns of 8 pixels of each value, in rows of 32."""
    return np.repeat(np.array(values, np.uint8), 32 // len(values))[None].repeat(24, 0)


def test_values_are_counted_with_the_names_of_their_classes(masked):
    found = count_values(masked([mask(0, 1), mask(0, 255), mask(0, 0, 1, 1)]))
    assert found.masks == found.looked_at == 3 and found.problems == []
    assert found.pixels == {0: 1152, 1: 768, 255: 384}
    assert found.names == {0: "background", 1: "cell", 255: "(ignored)"}


def test_a_sample_of_many_masks_is_looked_at(masked):
    found = count_values(masked([mask(0, 1)] * 9), most=4)
    assert (found.masks, found.looked_at) == (9, 4) and found.pixels == {0: 1536, 1: 1536}


@pytest.mark.parametrize(
    ("masks", "classes", "problem"),
    [
        ([mask(0, 1, 7, 9)], "background\ncell\n", "masks hold the values 7, 9, but classes.txt names 2 classes"),
        (
            [mask(0, 255)],
            "background\ncell\n",
            "only 0 and 255, and 255 is ignored; .* eval.mask_values={0: 0, 255: 1}",
        ),
        ([mask(0, 1)], "", "masks hold the values 0, 1, but there is no classes.txt to name them"),
        ([mask(0, 1), Image.new("RGB", (32, 24))], "a\nb\n", "1 of 2 masks can't be used, .*1.png: a mask of mode RGB"),
        ([np.zeros((5, 5), np.uint8)], "a\nb\n", "1 of 1 masks can't be used, the first: .*: 5x5 pixels, its image"),
    ],
    ids=["unknown", "black and white", "no classes", "colours", "size"],
)
def test_what_an_evaluation_would_refuse_or_misread_is_a_problem(masked, masks, classes, problem):
    (found,) = count_values(masked(masks, classes)).problems
    assert re.search(problem, found)


def test_instances_are_counted_as_one_class(write, tmp_path):
    write("images/0.jpg")
    write("instances/0.png", mask(0, 3, 9, 250).astype(np.uint16))
    found = count_values(open_images(tmp_path))
    assert found.pixels == {0: 192, 1: 576} and found.names == {0: "background", 1: "object"}


def test_values_of_a_known_data_set_have_the_names_of_its_classes(write, tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    write("VOCdevkit/VOC2012/JPEGImages/2007_000001.jpg")
    write("VOCdevkit/VOC2012/SegmentationClass/2007_000001.png", mask(0, 15, 99, 255))
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_000001\n")
    found = count_values(open_images(root))
    assert found.names == {0: "background", 15: "person", 255: "(ignored)"}
    assert found.problems == ["masks hold the values 99, which no mask of voc has"]


def test_images_without_masks_have_no_values(write, tmp_path):
    write("a.png")
    assert count_values(open_images(tmp_path)) is None
