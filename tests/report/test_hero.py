"""The picture for a README."""

import cv2
import numpy as np
import pytest

from smalti.errors import ConfigError
from smalti.report.hero import hero_figure


def test_the_hero_is_a_picture_of_three_columns(encoder, tmp_path):
    images = list(np.random.default_rng(0).integers(0, 256, (2, 80, 70, 3), dtype=np.uint8))
    path = hero_figure(encoder, images, tmp_path / "hero.png")
    height, width = cv2.imread(str(path)).shape[:2]
    assert width > height > 300
    with pytest.raises(ConfigError, match="can't be written"):
        hero_figure(encoder, images, tmp_path / "hero.png" / "below.png")
