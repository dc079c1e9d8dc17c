"""Labelled scenes whose pixels tell their class, and encoders about which theory says what they must score."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from smalti.data.images.labelled import open_labelled
from smalti.evaluation.evaluate import open_unlabelled
from smalti.evaluation.features import Features
from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder
from smalti.models.pooling import PatchFeatures

STEP = 40
"""Grey value of class k is k * STEP."""


def tiny_encoder(cls: type[Encoder] = Encoder, **arguments) -> Encoder:
    """A real ViT, 32 pixels, 4x4 patches, one block; or a double of it."""
    built = build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, seed=0, **arguments)
    built.set_normalization((0.5,), (0.5,))
    if cls is Encoder:
        return built
    return cls(built.vit, built.name, built.model_args, mean=(0.0,), std=(1.0,))


class PerfectEncoder(Encoder):
    """Each patch's token is the share of its pixels that each class has, read from the grey value."""

    def encode(self, images):
        num_classes = 5
        if images.dtype == torch.uint8:
            images = self.normalize(images)
        label = (images.mean(1) * 255 / STEP).round().long().clamp(0, num_classes - 1)
        shares = nn.functional.one_hot(label, num_classes).movedim(-1, 1).float()
        tokens = nn.functional.avg_pool2d(shares, self.patch_size).flatten(2).mT
        tokens = nn.functional.pad(tokens, (0, self.embed_dim - num_classes))
        return PatchFeatures(tokens, tokens.mean(1, keepdim=True), self.check_size(*images.shape[-2:]))


class ConstantEncoder(Encoder):
    """Says the same about every patch of every image."""

    def encode(self, images):
        grid = self.check_size(*images.shape[-2:])
        tokens = torch.full((len(images), grid[0] * grid[1], self.embed_dim), 0.3)
        return PatchFeatures(tokens, tokens[:, :1], grid)


def write_image(path: Path, grey: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), grey)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images to train and 6 to judge on, 32x32 pixels, each 8x8 patch of one of three classes; a few void pixels."""
    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    names: dict[str, list[str]] = {"train": [], "val": []}
    for split, count in (("train", 16), ("val", 6)):
        for number in range(count):
            name = f"{split}{number}"
            mask = np.kron(rng.choice(3, (4, 4), p=(0.5, 0.3, 0.2)), np.ones((8, 8))).astype(np.uint8)
            write_image(root / "images" / f"{name}.png", mask * STEP)
            mask[:2, :2] = 255
            write_image(root / "masks" / f"{name}.png", mask)
            names[split].append(name)
    for split, listed in names.items():
        (root / f"{split}.txt").write_text("\n".join(listed))
    (root / "classes.txt").write_text("ground\nleaf\nstone\n")
    return root


@pytest.fixture(scope="session")
def greys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of five grey values with noise, 32x32 pixels; the first class has as many images as all others."""
    root = tmp_path_factory.mktemp("greys")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in range(5):
            for number in range(count * (4 if label == 0 else 1)):
                noise = rng.integers(-15, 16, (32, 32))
                grey = np.clip(label * STEP + noise, 0, 255).astype(np.uint8)
                write_image(root / split / f"grey{label}" / f"{number}.png", grey)
    return root


def write_shapes(root: Path, counts: dict[str, int], side: int = 64, seed: int = 0) -> Path:
    """COCO's format: bright rectangles (id 3) and less bright diamonds (id 8) on dark noise, one or two an image.

    Ids are in no order, one image of each split has no object, and one object of each split is a crowd.
    """
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        images, annotations = [], []
        for number in rng.permutation(count).tolist():
            name = f"{split}{number}.png"
            grey = rng.integers(0, 60, (side, side), dtype=np.uint8)
            images.append({"id": 100 + number, "file_name": name, "height": side, "width": side})
            for half in range(0 if number == 0 else int(rng.integers(1, 3))):  # one in each half, so that none overlap
                width, height = (int(value) for value in rng.integers(side // 4, side // 2 - 2, 2))
                x0 = half * side // 2 + int(rng.integers(side // 2 - width))
                y0 = int(rng.integers(side - height))
                is_rectangle = bool(rng.random() < 0.5)
                x1, y1 = x0 + width, y0 + height
                corners = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
                if not is_rectangle:
                    x, y = (x0 + x1) // 2, (y0 + y1) // 2
                    corners = [[x, y0], [x1, y], [x, y1], [x0, y]]
                cv2.fillPoly(grey, [np.array(corners)], 240 if is_rectangle else 150)
                annotations.append(
                    {
                        "id": 1000 - len(annotations),
                        "image_id": 100 + number,
                        "category_id": 3 if is_rectangle else 8,
                        "bbox": [x0, y0, width, height],
                        "area": width * height if is_rectangle else width * height / 2,
                        "iscrowd": 0,
                        "segmentation": [[value for corner in corners for value in corner]],
                    }
                )
            write_image(root / "images" / name, grey)
        mask = np.zeros((side, side), int)
        mask[:2, :2] = 1
        flips = np.flatnonzero(np.diff(np.r_[0, mask.T.ravel(), 0]))
        crowd = {"size": [side, side], "counts": np.diff(np.r_[0, flips, side * side]).tolist()}
        first = {"id": 1, "image_id": 100, "category_id": 3, "bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 1}
        annotations.append({**first, "segmentation": crowd})
        categories = [{"id": 8, "name": "diamond"}, {"id": 3, "name": "rectangle"}]
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images to train and 5 to judge on of :func:`write_shapes`, 64x64 pixels."""
    return write_shapes(tmp_path_factory.mktemp("shapes"), {"train": 12, "val": 5})


@pytest.fixture
def tiny() -> Encoder:
    """A real ViT with random weights."""
    return tiny_encoder()


@pytest.fixture
def perfect() -> Encoder:
    """See :class:`PerfectEncoder`."""
    return tiny_encoder(PerfectEncoder)


@pytest.fixture
def constant() -> Encoder:
    """See :class:`ConstantEncoder`."""
    return tiny_encoder(ConstantEncoder)


@pytest.fixture
def features_of() -> Callable[..., Features]:
    """Features of an encoder in eval mode on labelled data."""

    def make(encoder: Encoder, data: Path, need: str, **settings) -> Features:
        labelled = open_unlabelled(str(data)) if need == "images" else open_labelled(data, need=need)
        return Features(encoder.eval(), labelled, **settings)

    return make
