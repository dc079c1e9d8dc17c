"""Pictures saved again are found, others are not; figures on real data are in docs/data.md."""

import cv2
import numpy as np
import pytest

from smalti.data.images.near_duplicates import find_near, reduce_picture


def photo(seed: int, height: int = 120, width: int = 160) -> np.ndarray:
    """A smooth random picture with some noise."""
    rng = np.random.default_rng(seed)
    smooth = cv2.resize(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8), (width, height)).astype(float)
    return (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)


def encoded(image: np.ndarray, ending: str, *options: int) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(ending, image, options)[1], cv2.IMREAD_UNCHANGED)


CHANGES = {
    "half": lambda image: cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "square": lambda image: cv2.resize(image, (224, 224), interpolation=cv2.INTER_LINEAR),
    "JPEG": lambda image: encoded(image, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 50),
    "WebP": lambda image: encoded(image, ".webp", cv2.IMWRITE_WEBP_QUALITY, 50),
    "alpha": lambda image: np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_picture_saved_again_is_found_among_others(name):
    pictures = np.stack([reduce_picture(photo(seed)) for seed in range(40)])
    changed = np.stack([reduce_picture(CHANGES[name](photo(seed))) for seed in range(30, 50)])
    found = find_near(changed, pictures)
    assert found.tolist() == [*range(30, 40), *[-1] * 10]  # the last ten are pictures of their own


def test_each_picture_is_compared_with_those_before_it():
    pictures = np.stack([reduce_picture(photo(seed)) for seed in (0, 1, 0, 2, 1)])
    assert find_near(pictures).tolist() == [-1, -1, 0, -1, 1]
    assert find_near(pictures[:0]).tolist() == find_near(pictures[:0], pictures).tolist() == []


def test_the_same_shape_with_another_print_is_another_picture():
    shirts = np.full((2, 200, 200, 3), 230, np.uint8)
    for shirt, seed in zip(shirts, (0, 1), strict=True):
        cv2.rectangle(shirt, (40, 30), (160, 190), (60, 40, 30), -1)
        shirt[80:150, 70:130] = photo(seed, 70, 60)
    first, second = map(reduce_picture, shirts)
    assert find_near(np.stack([first, second])).tolist() == [-1, -1]


def test_the_most_similar_of_many_candidates_is_taken():
    rng = np.random.default_rng(0)
    one = reduce_picture(photo(0))
    near = np.clip(one + rng.normal(0, 3, (50, *one.shape)), 0, 255).astype(np.uint8)
    near[41] = one
    assert find_near(one[None], near).tolist() == [41]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((40, 50), np.uint8),
        np.full((40, 50, 3), 200, np.uint8),
        np.full((40, 50), np.nan),
        np.random.default_rng(0).integers(100, 103, (40, 50, 3)).astype(np.uint8),
    ],
    ids=["black", "flat", "nan", "noise"],
)
def test_flat_pictures_are_not_compared(image):
    assert reduce_picture(image) is None


@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_images_of_more_than_8_bits_are_stretched_to_their_own_range(kind):
    grey = cv2.cvtColor(photo(0), cv2.COLOR_BGR2GRAY).astype(int)
    low, high = (reduce_picture((grey * factor).astype(kind)) for factor in (1, 16))
    assert low.shape == (16, 16, 3) and np.ptp(low) == 255
    assert np.abs(low.astype(int) - high).max() <= 1


def test_channels_beyond_the_third_do_not_count():
    five = np.random.default_rng(0).integers(0, 256, (40, 50, 5), dtype=np.uint8)
    assert np.array_equal(reduce_picture(five), reduce_picture(five[..., :3].copy()))
