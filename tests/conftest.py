"""What all tests share: no network, small images, one thread unless OMP_NUM_THREADS is set, real data if at hand."""

import gc
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import cv2
import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch

from typecheck import check_once

jaxtyping.jaxtyped = check_once  # before the first import of smalti

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# noisy machines miss deadlines; CI tries the same examples every time, people's runs look for new ones
hypothesis.settings.register_profile("smalti", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("smalti")


def pytest_collection_finish() -> None:
    """Leave modules and tests out of garbage collections: walking over them takes half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; tests that ask for it are skipped without it."""
    folder = Path(os.environ.get("SMALTI_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the shared data at {folder} (SMALTI_SHARED)")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 small JPEG images, 48x40 pixels, smooth random colours."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(24):
        small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number:02d}.jpg"), cv2.resize(small, (48, 40), interpolation=cv2.INTER_CUBIC))
    return folder


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with splits: red and blue images, 32x32 pixels, 12 to train and 6 to judge on."""
    folder = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(1)
    for split, count in (("train", 6), ("val", 3)):
        for label, channel in (("blue", 0), ("red", 2)):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                image = rng.integers(0, 90, (32, 32, 3), dtype=np.uint8)
                image[..., channel] += 150
                cv2.imwrite(str(folder / split / label / f"{number}.png"), image)
    return folder


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several training processes start in a moment; see ``forked.py``."""
    from forked import fork

    fork(monkeypatch)
