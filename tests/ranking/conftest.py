"""What tests of ranking share: a ranker by brightness, and a folder to rank."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from brightness import Bright
from smalti.ranking.rankers import GraphRanker


@pytest.fixture
def bright() -> GraphRanker:
    """PageRank of brightness."""
    return GraphRanker(Bright(), 8, "a toy")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images, 48x32 pixels, in train and val folders of two classes; one file is damaged."""
    folder = tmp_path_factory.mktemp("ranked")
    rng = np.random.default_rng(0)
    for number in range(8):
        split = "train" if number < 6 else "val"
        path = folder / split / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = rng.permutation(24).reshape(4, 6) * 10 + 10
        grey = np.kron(cells, np.ones((8, 8))) + rng.normal(0, 1, (32, 48))
        cv2.imwrite(str(path), np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2))
    damaged = folder / "train" / "a" / "z.png"
    damaged.write_bytes((folder / "train" / "a" / "0.png").read_bytes()[:60])
    return folder
