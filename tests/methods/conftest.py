"""What tests of methods share."""

from pathlib import Path

import cv2
import numpy as np
import pytest


@pytest.fixture(scope="session")
def graded_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images, 48x48 pixels, that are dark above and bright below: rows can be told, columns can't."""
    folder = tmp_path_factory.mktemp("graded")
    rng = np.random.default_rng(0)
    for number in range(16):
        shade = np.linspace(20, 220, 48)[:, None, None] + rng.integers(-15, 16, 3)
        image = np.clip(shade + rng.normal(0, 5, (48, 48, 3)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number:02d}.png"), image)
    return folder
