import colorsys

import cv2
import numpy as np
import pytest
import torchvision.transforms as T
from PIL import Image
from torch.testing import assert_close

from smalti.data.color import ColorConfig, blur, color_map, recolor, solarize
from smalti.data.crops import MultiCrop, ViewSpec

LUMINANCE = np.array([0.299, 0.587, 0.114])


def noise(height=40, width=50, channels=3, dtype=np.uint8, seed=0):
    values = np.random.default_rng(seed).random((height, width, channels), np.float32)
    return values if dtype == np.float32 else (255 * values).astype(np.uint8)


def always(**strengths):
    return ColorConfig(
        **{"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "gray_prob": 0} | strengths, jitter_prob=1
    )


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_eight_bits_and_floats_are_recoloured_alike(channels):
    image = noise(channels=channels)
    specs = [ViewSpec(count=3, size=32, color=ColorConfig(jitter_prob=1), blur_prob=0.5, solarize_prob=0.5)]
    eight = MultiCrop(specs)(image, np.random.default_rng(5)).crops[0] / 255
    floats = MultiCrop(specs)((image / 255).astype(np.float32), np.random.default_rng(5)).crops[0]
    # not equal where a value lies on the border between solarised and not, so compare nearly all
    assert np.quantile(np.abs(eight - floats), 0.99) < 0.012


@pytest.mark.parametrize(("kind", "white"), [(np.uint8, 255), (np.float32, 1)])
def test_brightness_may_be_added(kind, white):
    config = ColorConfig(
        brightness=0.4, add_brightness=True, contrast=0, saturation=0, hue=0, jitter_prob=1, gray_prob=0
    )
    image, rng = np.full((2, 2, 3), 0.5 * white, kind), np.random.default_rng(0)
    values = np.array([recolor(image, config, rng)[0, 0] for _ in range(500)]) / white
    assert (values == values[:, :1]).all() and 0.09 < values.min() < 0.12 and 0.88 < values.max() < 0.91
    matrix = color_map(config, np.zeros(3), rng, white)
    np.testing.assert_array_equal(matrix[:, :3], np.eye(3))


def test_brightness_scales_and_contrast_turns_about_the_mean_grey():
    mean = np.array([90.0, 120.0, 60.0])
    rng = np.random.default_rng(0)
    for _ in range(20):
        matrix = color_map(always(brightness=0.4), mean, rng)
        factor = matrix[0, 0]
        assert 0.6 <= factor <= 1.4
        np.testing.assert_allclose(matrix, np.c_[factor * np.eye(3), np.zeros(3)], atol=1e-12)
        matrix = color_map(always(contrast=0.4), mean, rng)
        factor = matrix[0, 0]
        offset = np.full(3, (1 - factor) * (LUMINANCE @ mean))
        np.testing.assert_allclose(matrix, np.c_[factor * np.eye(3), offset], atol=1e-9)


def test_saturation_leaves_each_pixels_luminance_and_hue_the_grey_axis():
    rng = np.random.default_rng(0)
    for _ in range(20):
        saturation = color_map(always(saturation=0.9), np.zeros(3), rng)[:, :3]
        np.testing.assert_allclose(LUMINANCE @ saturation, LUMINANCE, atol=1e-12)
        hue = color_map(always(hue=0.5), np.zeros(3), rng)[:, :3]
        np.testing.assert_allclose(hue @ np.ones(3), np.ones(3), atol=1e-12)
        np.testing.assert_allclose(hue @ hue.T, np.eye(3), atol=1e-12)


def test_hue_turns_the_way_hsv_does():
    """A small turn of a soft colour moves its hue by the same fraction of the circle."""
    from smalti.data.color import _turn_hue

    np.testing.assert_allclose(_turn_hue(1 / 3) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    for turn in (-0.1, 0.05, 0.1):
        before, after = (
            colorsys.rgb_to_hsv(*color)[0] for color in ([0.6, 0.5, 0.5], _turn_hue(turn) @ [0.6, 0.5, 0.5])
        )
        assert abs((after - before - turn + 0.5) % 1 - 0.5) < 0.02


def test_grey_is_luminance_and_its_share_is_the_probability():
    config = ColorConfig(jitter_prob=0, gray_prob=0.2)
    rng = np.random.default_rng(0)
    maps = [color_map(config, np.zeros(3), rng) for _ in range(2000)]
    greys = [matrix for matrix in maps if matrix is not None]
    assert abs(len(greys) / 2000 - 0.2) < 0.03
    np.testing.assert_allclose(greys[0][:, :3], np.tile(LUMINANCE, (3, 1)))


def test_one_affine_map_is_torchvisions_chain_where_nothing_clips():
    """Without hue, whose law differs, and far from black and white."""
    image = (80 + noise(20, 20) // 4).astype(np.uint8)
    picture = Image.fromarray(image)
    order = [1, 0, 2]
    b, c, s = 1.1, 0.9, 1.2
    steps = [lambda x: T.functional.adjust_brightness(x, b), lambda x: T.functional.adjust_contrast(x, c)]
    steps.append(lambda x: T.functional.adjust_saturation(x, s))
    for step in order:
        picture = steps[step](picture)

    class Scripted(np.random.Generator):
        # jittered, not grey, the order (1, 0, 2, 3), then the four amounts
        values = iter([0.0, 0.9, 6.5 / 24, *(0.5 + 0.5 * x for x in (0.1 / 0.4, -0.1 / 0.4, 0.2 / 0.4, 0.0))])

        def random(self):
            return next(self.values)

    config = ColorConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0, jitter_prob=0.5, gray_prob=0.5)
    affine = color_map(config, image.reshape(-1, 3).mean(axis=0), Scripted(np.random.PCG64(0)))
    ours = cv2.transform(image, affine.astype(np.float32))
    assert np.abs(ours.astype(int) - np.asarray(picture)).max() <= 3  # each of their steps rounds


def test_one_channel_knows_no_saturation_hue_or_grey():
    affine = color_map(ColorConfig(jitter_prob=1, gray_prob=1), np.array([100.0]), np.random.default_rng(0))
    assert affine.shape == (1, 2)
    assert color_map(ColorConfig(jitter_prob=0, gray_prob=1), np.array([100.0]), np.random.default_rng(0)) is None


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_spreads_a_point_by_its_sigma(sigma):
    image = np.zeros((41, 41), np.float32)
    image[20, 20] = 1
    blurred = blur(image, sigma)
    x = np.arange(41) - 20
    assert blurred.sum() == pytest.approx(1, abs=1e-5)
    assert np.sqrt((blurred.sum(axis=0) * x**2).sum()) == pytest.approx(
        sigma, rel=0.08
    )  # a sampled Gaussian is a little narrower


def test_a_blur_too_small_to_see_is_skipped():
    image = noise()
    assert blur(image, 0.19) is image


def test_solarize_is_pillows():
    from PIL import ImageOps

    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(solarize(image), np.asarray(ImageOps.solarize(Image.fromarray(image), 128)))
    assert_close(solarize(np.float32([0.2, 0.9])), np.float32([0.2, 0.1]))
