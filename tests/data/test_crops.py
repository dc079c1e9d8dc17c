import pickle

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from smalti.config import build
from smalti.data.color import ColorConfig
from smalti.data.crops import CentreCrop, MultiCrop, ViewSpec, random_height_crop, random_resized_crop, resize
from smalti.errors import ConfigError

DINO = (
    ViewSpec(count=2, size=32, scale=(0.4, 1.0), color=ColorConfig(), blur_prob=(1.0, 0.1), solarize_prob=(0.0, 0.2)),
    ViewSpec(count=3, size=16, scale=(0.05, 0.4), color=ColorConfig(), blur_prob=0.5),
)


def noise(height=40, width=50, channels=3, dtype=np.uint8, seed=0):
    values = np.random.default_rng(seed).random((height, width, channels), np.float32)
    return values if dtype == np.float32 else (255 * values).astype(np.uint8)


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    low=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**32),
)
def test_crops_lie_inside_the_image(height, width, low, seed):
    top, left, h, w = random_resized_crop(np.random.default_rng(seed), height, width, (low, 1.0), (3 / 4, 4 / 3))
    assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h > 0 and w > 0


@pytest.mark.parametrize("size", [(375, 500), (100, 300), (64, 64)])
def test_crops_follow_torchvisions_law(size):
    height, width = size
    scale, aspect = (0.2, 1.0), (3 / 4, 4 / 3)
    rng = np.random.default_rng(0)
    ours = np.array([random_resized_crop(rng, height, width, scale, aspect) for _ in range(4000)], float)
    torch.manual_seed(0)
    blank = torch.empty(1, height, width)
    theirs = np.array([T.RandomResizedCrop.get_params(blank, list(scale), list(aspect)) for _ in range(4000)], float)
    spread = theirs.std(axis=0)
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), atol=0.08 * spread.max())
    np.testing.assert_allclose(ours.std(axis=0), spread, rtol=0.08)
    for share in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(
            np.quantile(ours, share, axis=0), np.quantile(theirs, share, axis=0), atol=0.035 * width
        )


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 1000), (0, 433, 100, 133)), ((1000, 100), (433, 0, 133, 100)), ((90, 100), (0, 0, 90, 100))],
)
def test_a_crop_that_never_fits_is_central_with_an_allowed_shape(size, expected):
    assert random_resized_crop(np.random.default_rng(0), *size, (4.0, 4.0), (3 / 4, 4 / 3)) == expected


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    low=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**32),
)
def test_crops_of_random_height_lie_inside_the_image(height, width, low, seed):
    top, left, h, w = random_height_crop(np.random.default_rng(seed), height, width, (low, 1.0), (0.75, 1.33))
    assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width
    assert low * height * width <= h * w <= height * width
    assert (h, w) == (height, width) or 0.75 * h - 0.5 <= w <= 1.33 * h + 0.5


def test_heights_of_square_crops_are_uniform_and_the_last_place_is_never_drawn():  # known answer, TensorFlow's kernel
    rng = np.random.default_rng(0)
    top, left, h, w = np.array([random_height_crop(rng, 100, 100, (0.25, 1.0), (1.0, 1.0)) for _ in range(20_000)]).T
    assert (h == w).all() and set(h) == set(range(50, 101))
    assert abs(h.mean() - 75) < 0.4  # of areas: 0.583; of torchvision's crops 0.625
    counts = np.bincount(h)[50:]
    assert counts.min() > 300 and counts.max() < 490  # 392 each
    for place in (top, left):
        assert (place[h == 100] == 0).all() and (place[h < 100] < (100 - h)[h < 100]).all()
        assert (place[h == 98] == 1).any()
    assert random_height_crop(rng, 20, 1000, (0.9, 1.0), (0.75, 1.33)) == (0, 0, 20, 1000)  # none fits


def test_views_have_the_asked_shapes_and_their_source():
    sample = MultiCrop(DINO)(noise(), np.random.default_rng(0))
    assert [crops.shape for crops in sample.crops] == [(2, 32, 32, 3), (3, 16, 16, 3)]
    assert sample.boxes.shape == (5, 4) and sample.boxes.dtype == np.float32 and sample.source_size == (40, 50)


@pytest.mark.parametrize("flip_prob", [0.0, 1.0, 0.5])
def test_boxes_and_flips_say_where_every_pixel_comes_from(coordinate_images, flip_prob):
    """The whole way: file -> decode -> crop -> flip -> resize -> batch; the pixels themselves say where they were."""
    from smalti.data.loader import TrainLoader

    specs = [
        ViewSpec(count=2, size=24, flip_prob=flip_prob),
        ViewSpec(count=3, size=12, scale=(0.1, 0.4), flip_prob=flip_prob),
    ]
    views = next(iter(TrainLoader(coordinate_images, MultiCrop(specs), batch_size=4, seed=1)))
    first = 0
    for crops in views.crops:
        size = crops.shape[-1]
        boxes, flips = views.boxes[first : first + len(crops)], views.flips[first : first + len(crops)]
        inner = torch.arange(size // 4, 3 * size // 4)  # away from borders, where bicubic interpolation bends
        for crop, (x0, y0, x1, y1), flip in zip(crops, boxes, flips, strict=True):
            red = (crop.flip(-1) if flip else crop)[0].float()
            share = (inner + 0.5) / size
            assert_close(red[size // 2, inner], 4 * (x0 + share * (x1 - x0) - 0.5), atol=1.5, rtol=0)
            assert_close(crop[1].float()[inner, size // 2], 4 * (y0 + share * (y1 - y0) - 0.5), atol=1.5, rtol=0)
        numbers = crops[:, 2].float().mean(dim=(1, 2)) / 50
        assert_close(numbers, views.index.repeat(len(crops) // 4).float(), atol=0.03, rtol=0)
        first += len(crops)
    assert views.flips.float().mean() == flip_prob or flip_prob == 0.5
    assert (views.boxes[:, 2:] <= views.source_size.flip(1).repeat(5, 1)).all()


def test_an_image_may_be_mirrored_before_it_is_cropped():
    image = noise()
    specs = [ViewSpec(count=3, size=16, flip_prob=0.0)]
    for seed in range(4):
        mirrored = MultiCrop(specs, flip_image_prob=1.0)(image, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        rng.random()  # the draw of the mirror
        plain = MultiCrop(specs)(np.ascontiguousarray(image[:, ::-1]), rng)
        np.testing.assert_array_equal(mirrored.crops[0], plain.crops[0])
        np.testing.assert_array_equal(mirrored.boxes, plain.boxes)
        assert not mirrored.flips.any()


def test_resizing_is_pillows_antialiased_bicubic():
    image = 80 + noise(60, 80) // 4  # far from 0 and 255, at which they clip between their two passes
    for crop, size in ((image, 30), (image[10:30, 5:25], 48), (image[:50, :40], 45)):
        theirs = np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC))
        assert np.abs(resize(crop, size).astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_any_number_of_channels_and_either_type_goes_through_every_step(channels, dtype):
    specs = [
        ViewSpec(count=2, size=20, color=ColorConfig(jitter_prob=1, gray_prob=0.5), blur_prob=1.0, solarize_prob=1.0)
    ]
    crops = MultiCrop(specs)(noise(channels=channels, dtype=dtype), np.random.default_rng(0)).crops[0]
    assert crops.shape == (2, 20, 20, channels) and crops.dtype == dtype
    assert crops.max() <= (255 if dtype == np.uint8 else 1) and crops.min() >= 0


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3000, 2)])
def test_images_smaller_than_a_view_are_enlarged(size):
    image = np.full((*size, 3), 77, np.uint8)
    crops = MultiCrop([ViewSpec(count=2, size=32)])(image, np.random.default_rng(0)).crops[0]
    assert crops.shape == (2, 32, 32, 3) and (crops == 77).all()


def test_blur_and_solarise_follow_each_views_own_probability():
    image = noise(64, 64)
    spec = ViewSpec(
        count=2, size=64, scale=(1, 1), aspect=(1, 1), flip_prob=0, solarize_prob=(0.0, 1.0), blur_prob=(1.0, 0.0)
    )
    first, second = MultiCrop([spec])(image, np.random.default_rng(0)).crops[0]
    assert (second == np.minimum(image, 255 - image)).all()
    assert first.std() < image.std()


def test_methods_can_draw_their_own_boxes():
    class Corner(MultiCrop):
        def draw_boxes(self, rng, height, width):
            return [(1, 2, 8, 16)] * self.num_views

    sample = pickle.loads(pickle.dumps(Corner.__base__(DINO)))(noise(), np.random.default_rng(0))
    assert len(sample.boxes) == 5
    sample = Corner(DINO)(noise(), np.random.default_rng(0))
    assert sample.boxes.tolist() == [[2, 1, 18, 9]] * 5


@pytest.mark.parametrize(
    ("specs", "line"),
    [
        ([], "no views"),
        ([ViewSpec(count=0)], "no views"),
        ([ViewSpec(scale=(0.5, 0.2))], r"scale=\(0.5, 0.2\) of a view; it needs 0 < smallest <= largest"),
        ([ViewSpec(aspect=(0.0, 1.0))], "aspect"),
        ([ViewSpec(blur_sigma=(-1.0, 1.0))], "blur_sigma"),
        ([ViewSpec(size=0)], "size 0"),
        ([ViewSpec(count=2, blur_prob=(0.1, 0.2, 0.3))], "blur_prob has 3 values for 2 views"),
    ],
)
def test_numbers_that_dont_fit_are_one_line(specs, line):
    with pytest.raises(ConfigError, match=line):
        MultiCrop(specs)


def test_specs_come_from_yaml_values():
    spec = build(ViewSpec, {"count": 2, "scale": [0.4, 1], "blur_prob": [1, 0.1], "color": {"hue": "1e-1"}})
    assert spec.blur_prob == (1.0, 0.1) and spec.color.hue == 0.1
    with pytest.raises(ConfigError, match="did you mean 'scale'"):
        build(ViewSpec, {"scales": [0.4, 1]})


def test_a_centre_crop_is_the_whole_central_square() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    plain, mirrored = (CentreCrop(32, prob)(image, np.random.default_rng(0)) for prob in (0.0, 1.0))
    assert np.array_equal(plain.crops[0][0], image[:, 8:40])
    assert np.array_equal(mirrored.crops[0][0], image[:, 8:40][:, ::-1])
    assert plain.boxes.tolist() == [[8, 0, 40, 32]] and not plain.flips[0] and mirrored.flips[0]
    assert CentreCrop(20)(image[:, :, :1], np.random.default_rng(0)).crops[0].shape == (1, 20, 20, 1)
