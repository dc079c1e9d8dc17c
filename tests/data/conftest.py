"""Small image files of every kind, and the shared real data where there is any."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smalti.data.images.folders import ImageSet, open_images

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write an image below ``tmp_path``; a noise image unless an array or picture is given."""

    def write_image(name: str, content: np.ndarray | Image.Image | None = None, **options: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            seed = sum(name.encode())
            content = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        picture = Image.fromarray(content) if isinstance(content, np.ndarray) else content
        picture.save(path, **options)
        return path

    return write_image


@pytest.fixture
def coordinate_images(write: Write, tmp_path: Path) -> ImageSet:
    """Images that say where each pixel is: red 4 x, green 4 y, blue the image's number."""
    for number, (height, width) in enumerate([(40, 60), (60, 40), (50, 50), (30, 62), (61, 33)]):
        y, x = np.mgrid[:height, :width]
        write(f"places/{number}.png", np.stack([4 * x, 4 * y, np.full_like(x, 50 * number)], axis=2).astype(np.uint8))
    return open_images(tmp_path / "places")


@pytest.fixture
def shared() -> Path:
    """The shared real data; tests that need it are skipped where it isn't."""
    path = Path(os.environ.get("SMALTI_SHARED", Path(__file__).parents[2].parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no shared data at {path}; set SMALTI_SHARED to its folder")
    return path / "data"
