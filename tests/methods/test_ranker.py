"""The distilled ranker: its target, what it is compared with, and whether it learns an order that can be seen."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from smalti.data.images.folders import open_images
from smalti.data.loader import TrainLoader
from smalti.data.order_files import TrainingOrders, write_orders
from smalti.errors import ConfigError, DataError
from smalti.functional.graphs import descending, ranks_of
from smalti.functional.orders import random_orders, rank_correlation
from smalti.functional.patches import patchify
from smalti.methods.ranker import DistilledRanker, RankerConfig, standardise
from smalti.models.build import build_encoder

GRID = (4, 4)


def build(**config: Any) -> DistilledRanker:
    torch.manual_seed(0)
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, seed=0
    )
    return DistilledRanker(encoder, RankerConfig(**config)).train()


def bright_patches(folder: Path, num: int) -> torch.Tensor:
    """Write images whose patches have random brightness; their orders, the brightest first, for both flip states."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    orders = []
    for number in range(num):
        levels = rng.permutation(16).reshape(4, 4) * 15 + 10
        pixels = np.kron(levels, np.ones((8, 8))).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(folder / f"{number:03d}.png")
        orders += [(-levels.ravel()).argsort(), (-levels[:, ::-1].ravel()).argsort()]
    return torch.from_numpy(np.stack(orders))


def write(path: Path, folder: Path, orders: torch.Tensor) -> Path:
    names = [name for name in open_images(folder).names for _ in range(2)]
    write_orders(
        path,
        images=names,
        splits=[None] * len(names),
        flips=[False, True] * (len(names) // 2),
        orders={"collapse": orders},
        grid=GRID,
        image_size=32,
        root=str(folder),
        source="a test",
    )
    return path


def test_targets_have_mean_zero_and_variance_one_and_the_first_patch_has_the_largest() -> None:
    orders = random_orders(torch.arange(5), 49)
    targets = standardise(ranks_of(orders).float())
    assert_close(targets.mean(1), torch.zeros(5), atol=1e-6, rtol=0)
    assert_close(targets.square().mean(1), torch.ones(5))
    assert (targets.argmax(1) == orders[:, 0]).all()
    assert_close(standardise(torch.zeros(2, 1)), torch.zeros(2, 1))  # one patch


def test_the_loss_is_the_error_of_the_standardised_ranks(tmp_path: Path) -> None:
    file = write(tmp_path / "o.parquet", tmp_path / "images", bright_patches(tmp_path / "images", 6))
    images = open_images(tmp_path / "images")
    method = build(orders=str(file))
    method.bind(images, 32)
    views = next(iter(TrainLoader(images, method.make_views(32), batch_size=6, seed=0)))
    loss = method(views, 0.0)["rank"]
    pixels = views.global_crops.float()
    expected = 0.0
    scores = method.scores(method.encoder.normalize(views.global_crops)).detach()
    for image, score in zip(pixels, scores, strict=True):
        brightness = patchify(image[None], (8, 8))[0].mean(1)  # flips included: the order is of the view itself
        ranks = ranks_of(brightness.argsort(descending=True)).double()
        target = (7.5 - ranks) / ranks.std(correction=0)
        expected += float((score.double() - target).square().mean()) / 6
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_the_static_order_is_the_mean_rank_over_images_and_flips(tmp_path: Path) -> None:
    orders = bright_patches(tmp_path / "images", 5)
    source = TrainingOrders("collapse", str(write(tmp_path / "o.parquet", tmp_path / "images", orders)))
    source.bind(open_images(tmp_path / "images"), GRID, flips=True)
    assert_close(source.mean_ranks(GRID), ranks_of(orders).float().mean(0))
    source.bind(open_images(tmp_path / "images"), GRID, flips=False)
    assert_close(source.mean_ranks(GRID), ranks_of(orders[::2]).float().mean(0))


def test_one_order_for_all_images_is_what_the_static_order_knows(photos: Path) -> None:
    method = build(order="halton")
    views = next(iter(TrainLoader(open_images(photos), method.make_views(32), batch_size=4, seed=0)))
    method(views, 0.0)
    assert float(method.observations["static_error"]) == pytest.approx(0, abs=1e-6)
    assert float(method.observations["static_spearman"]) == pytest.approx(1)


def test_an_order_that_can_be_seen_is_learned_and_holds_for_other_images(tmp_path: Path) -> None:
    orders = bright_patches(tmp_path / "images", 80)
    file = write(tmp_path / "o.parquet", tmp_path / "images", orders)
    images = open_images(tmp_path / "images")
    few = images.__class__(images.root, images.layout, images.samples[:64], None)
    method = build(orders=str(file))
    method.bind(few, 32)
    optimizer = torch.optim.AdamW(method.parameters(), 2e-3)
    loader = iter(TrainLoader(few, method.make_views(32), batch_size=32, seed=0))
    for _ in range(120):
        loss = method(next(loader), 0.0)["rank"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = torch.stack([torch.from_numpy(sample.read(3)).permute(2, 0, 1) for sample in images.samples[64:]])
    with torch.no_grad():
        found = descending(method.eval().scores(method.encoder.normalize(held_out)))
    assert float(rank_correlation(found, orders[128::2]).mean()) > 0.8
    assert abs(float(method.observations["static_spearman"])) < 0.5


def test_the_reference_is_the_mean_rank_of_each_position() -> None:
    reference = build(order="halton").reference({"loss/rank": 0.4, "static_error": 0.8})
    assert reference is not None and reference.has_learned and reference.gain == pytest.approx(0.5)
    assert "the mean rank of each patch position" in reference.sentence
    assert build(order="halton").reference({"loss/rank": 0.4}) is None


def test_mistakes_are_one_line_each(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method.order=collapse .*method.orders=FILE"):
        build()
    with pytest.raises(ConfigError, match=r"method.order=random: a ranker can learn nothing from it"):
        build(order="random")
    file = write(tmp_path / "o.parquet", tmp_path / "images", bright_patches(tmp_path / "images", 3))
    (tmp_path / "others").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "others" / "x.png")
    with pytest.raises(DataError, match="has orders of 0 of the 1 images"):
        build(orders=str(file)).bind(open_images(tmp_path / "others"), 32)
