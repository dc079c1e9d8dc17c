"""Values of images: settings of a scale, and ranges found in a sample."""

import numpy as np
import pytest

from smalti.config import build
from smalti.data.images.pixels import NO_PIXELS, PixelConfig, trained_pixels
from smalti.data.images.value_range import percentile_ranges, to_unit
from smalti.errors import ConfigError, DataError


def test_percentiles_leave_out_the_outermost_values_of_each_channel():
    ramp = np.arange(1000, dtype=np.uint16)
    images = [np.stack([ramp, 4 * ramp], axis=1)[None] for _ in range(20)]
    (low, high), (low4, high4) = percentile_ranges(images)
    assert low == pytest.approx(5, abs=2) and high == pytest.approx(994, abs=2)
    assert (low4, high4) == pytest.approx((4 * low, 4 * high), abs=20)
    assert to_unit(images[0], ((low, high), (low4, high4))).min() == 0


def test_a_channel_without_a_range_is_refused():
    with pytest.raises(DataError, match="a channel has the same value nearly everywhere"):
        percentile_ranges([np.zeros((4, 5, 1), np.int16)])
    with pytest.raises(DataError, match="no image to find the range of values in"):
        percentile_ranges([])


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        ([4095, 0], "must be below"),
        ([0, float("nan")], "finite"),
        ("wide", "scale"),
        ([[0, 1], [1, 1]], "must be below"),
    ],
)
def test_a_scale_that_is_no_range_is_refused(scale, words):
    with pytest.raises(ConfigError, match=f"scale.*{words}|{words}"):
        build(PixelConfig, {"scale": scale})


def test_a_runs_settings_say_how_its_images_are_decoded():
    assert trained_pixels({"data": {"scale": [0, 4095], "path": "x"}}) == PixelConfig(scale=(0, 4095))
    assert trained_pixels({}) == trained_pixels({"data": None}) == NO_PIXELS
    with pytest.raises(ConfigError, match="percentiles is for training"):
        trained_pixels({"data": {"scale": "percentiles"}})
