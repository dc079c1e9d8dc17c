"""CViT: what is dropped and how much of it, positions that follow patches, orders looked up by image and flip state."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import smalti
from smalti.config import merge, read_yaml
from smalti.data.images.folders import open_images
from smalti.data.loader import TrainLoader
from smalti.data.order_files import write_orders
from smalti.data.views import Views
from smalti.errors import ConfigError, DataError, ShapeError
from smalti.exporters.timm import timm_model
from smalti.functional.orders import fixed_random, num_kept, random_orders
from smalti.functional.patches import patch_variance
from smalti.methods.cvit import CViT, CViTConfig, drop_rate
from smalti.methods.teacher import Average
from smalti.models.build import build_encoder
from smalti.models.loading import latest_checkpoint
from smalti.runs import train as runs

TINY: dict[str, Any] = {
    "encoder": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "data": {"image_size": 32},
    "batch_size": 4,
    "steps": 6,
    "optim": {"lr": 2e-3, "warmup_ratio": 0.0},
    "drop_path": 0.0,
}


def build(**config: Any) -> CViT:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "seed": 0}
    encoder = build_encoder("vit_tiny_patch16_224", **shape)  # type: ignore[arg-type]
    return CViT(encoder, CViTConfig(**{"num_classes": 2, "order": "random", **config})).train()


def views_of(method: CViT, folder: Path, count: int = 4) -> Views:
    images = open_images(folder).subset("train")
    return next(iter(TrainLoader(images, method.make_views(32), batch_size=count, seed=0)))


def orders_file(
    path: Path, folder: Path, flips: tuple[bool, ...] = (False, True), grid: tuple[int, int] = (4, 4)
) -> Path:
    """A file with a random order for each image of a set and each flip state."""
    images = open_images(folder)
    rows = [
        (name, sample.split, flip) for name, sample in zip(images.names, images.samples, strict=True) for flip in flips
    ]
    names, splits, states = zip(*rows, strict=True)
    orders = random_orders(torch.arange(len(rows)), grid[0] * grid[1])
    write_orders(
        path,
        images=names,
        splits=splits,
        flips=states,
        orders={"collapse": orders},
        grid=grid,
        image_size=32,
        root=str(folder),
        source="a test",
    )
    return path


@given(num=st.integers(1, 400), percent=st.integers(0, 99))
def test_what_is_kept_is_n_less_the_whole_patches_of_the_rate(num: int, percent: int) -> None:
    assert num_kept(num, percent / 100) == max(1, num - percent * num // 100)


def test_kept_patches_of_the_paper() -> None:
    assert [num_kept(256, rate) for rate in (0.0, 0.3, 0.5, 0.78, 0.99)] == [256, 180, 128, 57, 3]
    assert num_kept(100, 0.29) == 71 and num_kept(100, 0.58) == 42  # floats just below a whole number
    with pytest.raises(ConfigError, match="rate=1 of dropped"):
        num_kept(16, 1.0)


def test_rates_favour_low_ones_as_the_schedule_says() -> None:
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    rates = torch.tensor([drop_rate(float(u), 0.99) for u in uniform])
    assert rates.mean().item() == pytest.approx(0.99 * (1 - 2 / math.pi), abs=1e-4)  # 0.36
    assert (rates < 0.5).double().mean().item() == pytest.approx(2 / math.pi * math.acos(1 - 0.5 / 0.99), abs=1e-3)
    assert (rates > 0.78).double().mean().item() == pytest.approx(0.14, abs=0.005)
    assert drop_rate(0.0, 0.99) == 0 and drop_rate(1.0, 0.99) == pytest.approx(0.99)


def test_keeping_all_patches_is_a_plain_vit(class_folders: Path) -> None:
    method = build().eval()
    images = method.student.encoder.normalize(views_of(method, class_folders).global_crops)
    order = random_orders(torch.arange(4), 16)
    plain = method.student.head(timm_model(method.student.encoder)(images))
    assert_close(method.student(images, order), plain, rtol=0, atol=1e-5)
    assert_close(method.student(images), plain, rtol=0, atol=1e-5)


def test_the_order_of_kept_patches_in_the_sequence_does_not_matter(class_folders: Path) -> None:
    method = build().eval()
    images = method.student.encoder.normalize(views_of(method, class_folders).global_crops)
    kept = random_orders(torch.arange(4), 16)[:, :5]
    assert_close(method.student(images, kept), method.student(images, kept.flip(1)), rtol=0, atol=1e-5)


def test_positions_follow_patches(class_folders: Path) -> None:
    method = build().eval()
    encoder = method.student.encoder
    images = encoder.normalize(views_of(method, class_folders).global_crops)
    kept = random_orders(torch.arange(4), 16)[:, :5]
    pick = kept[..., None].expand(-1, -1, 24)
    tokens, grid = encoder.embed_patches(images)
    patch_pos, prefix_pos = encoder.positions(grid)  # type: ignore[misc]
    added = (tokens + patch_pos).gather(1, pick)  # embed all, add positions, then drop
    first = (encoder.vit.cls_token + prefix_pos).expand(4, -1, -1)
    expected = encoder.forward_tokens(torch.cat([first, added], dim=1))[:, 0]
    assert_close(encoder.image_features(images, kept), expected, rtol=0, atol=1e-5)
    wrong = torch.cat([first, tokens.gather(1, pick) + patch_pos[:, :5]], dim=1)  # positions of the first five
    assert (encoder.forward_tokens(wrong)[:, 0] - expected).abs().max() > 1e-3


def test_dropped_patches_are_not_seen(class_folders: Path) -> None:
    method = build(order="raster").eval()
    images = method.student.encoder.normalize(views_of(method, class_folders).global_crops)
    kept = torch.arange(16)[:8].expand(4, -1)  # the upper half
    changed = images.clone()
    changed[:, :, 16:] += 1
    assert torch.equal(method.student(images, kept), method.student(changed, kept))
    assert not torch.equal(method.student(images), method.student(changed))


def test_random_orders_are_new_at_each_step_and_fixed_ones_are_one(class_folders: Path) -> None:
    method = build()
    views = views_of(method, class_folders)
    first = method.orders_of(views, (4, 4))
    assert torch.equal(first, method.orders_of(views, (4, 4)))
    views.keys = views.keys + 1
    assert not torch.equal(first, method.orders_of(views, (4, 4)))
    assert len({tuple(row) for row in first.tolist()}) == 4
    fixed = build(order="fixed_random:2").orders_of(views, (4, 4))
    assert torch.equal(fixed, fixed_random(16, 2).expand(4, -1))


def test_variance_is_of_the_view_at_hand(class_folders: Path) -> None:
    method = build(order="variance")
    views = views_of(method, class_folders)
    order = method.orders_of(views, (4, 4))
    found = patch_variance(views.global_crops.float(), (8, 8)).gather(1, order)
    assert (found[:, 1:] <= found[:, :-1]).all()


def test_patch_variance_by_hand() -> None:
    image = torch.zeros(1, 2, 2, 4)
    image[0, 0, :, 2:] = torch.tensor([[0.0, 2.0], [2.0, 0.0]])  # two of eight values are 2: 1 - 0.5**2
    assert_close(patch_variance(image, (2, 2)), torch.tensor([[0.0, 0.75]]))


def test_orders_are_looked_up_by_image_and_flip_state(class_folders: Path, tmp_path: Path) -> None:
    path = orders_file(tmp_path / "orders.parquet", class_folders)
    method = build(order="collapse", orders=str(path))
    images = open_images(class_folders).subset("train")
    method.bind(images, 32)
    everything = {
        (name, flip): row
        for row, (name, flip) in enumerate((n, f) for n in open_images(class_folders).names for f in (False, True))
    }
    table = random_orders(torch.arange(len(everything)), 16)
    for views, _ in zip(TrainLoader(images, method.make_views(32), batch_size=4, seed=0), range(4), strict=False):
        rows = [everything[images.names[i], bool(f)] for i, f in zip(views.index, views.flips, strict=True)]
        assert torch.equal(method.orders_of(views, (4, 4)), table[rows])
    assert method.state_dict().keys() == build().state_dict().keys()


def test_one_rate_a_batch_from_its_keys(class_folders: Path) -> None:
    method = build()
    kept = set()
    for number, views in zip(
        range(12),
        TrainLoader(open_images(class_folders).subset("train"), method.make_views(32), batch_size=4, seed=0),
        strict=False,
    ):
        method(views, number / 12)
        kept.add(float(method.observations["kept"]))
    assert len(kept) > 4 and max(kept) <= 1 and min(kept) >= 1 / 16
    plain = build(max_rate=0.0)
    plain(views, 0.5)
    assert plain.observations["kept"] == 1


def test_average_of_weights_by_hand() -> None:
    student = torch.nn.Linear(1, 1, bias=False)
    average = Average(student, 0.6)
    expected = 0.0
    for step in range(30):
        with torch.no_grad():
            student.weight.fill_(float(step))
        average.follow(student)
        momentum = min(step / (step + 10), 0.6)
        expected = momentum * expected + (1 - momentum) * step
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)


def test_a_run_learns_from_few_patches_and_hands_on_its_head(class_folders: Path, tmp_path: Path) -> None:
    path = orders_file(tmp_path / "orders.parquet", class_folders)
    settings = merge(TINY, {"steps": 60, "method": {"order": "collapse", "orders": str(path)}})
    run = smalti.train("cvit", class_folders, tmp_path / "run", overrides=settings, quiet=True)
    config = read_yaml(run / "config.yaml")
    assert config["method"]["num_classes"] == 2 and config["method"]["orders"] == str(path)
    encoder = smalti.load(run)
    head = encoder.class_head
    assert head is not None and (head.order, head.orders) == ("collapse", str(path))
    assert head.classes == open_images(class_folders).classes
    student = smalti.load(run, network="student")
    assert student.class_head is not None and not torch.equal(student.class_head.weight, head.weight)
    test = open_images(class_folders)
    pixels = smalti.load_images(test.paths, 32, mode="centre")
    few = fixed_random(16)[:4].expand(len(test), -1)
    with torch.no_grad():
        vectors = encoder.image_features(encoder.normalize(pixels), few)
    guesses = (vectors @ head.weight.T + head.bias).argmax(1)
    assert (guesses == torch.tensor([sample.label for sample in test.samples])).float().mean() > 0.9


def test_a_supervised_run_hands_on_its_head_too(class_folders: Path, tmp_path: Path) -> None:
    run = smalti.train("supervised", class_folders, tmp_path / "run", overrides=TINY, quiet=True)
    head = smalti.load(run).class_head
    assert head is not None and head.weight.shape == (2, 24) and head.order == ""
    assert smalti.load("random:vit_tiny_patch16_224").class_head is None


def test_a_resumed_run_goes_on_to_the_bit(class_folders: Path, tmp_path: Path) -> None:
    more = merge(TINY, {"method": {"order": "random"}, "checkpoint": {"every": 3}})
    whole = smalti.train("cvit", class_folders, tmp_path / "whole", overrides=more, quiet=True)
    expected = smalti.load(whole).vit.state_dict()
    last = latest_checkpoint(whole)
    assert last is not None
    last.rename(tmp_path / "aside")
    again = smalti.load(runs.resume(whole, quiet=True)).vit.state_dict()
    assert all(torch.equal(again[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"order": "collapse"}, "method.order=collapse is found by a network: give its file as method.orders=FILE"),
        ({"order": "colapse"}, "there is no order 'colapse'"),
        ({"order": "collapse", "orders": "nowhere.parquet"}, "nowhere.parquet: is not a file"),
        ({"order": "random", "max_rate": 1.0}, "method.max_rate=1.0: less than 1 is needed"),
        ({"order": "random", "ema": 1.0}, "method.ema=1.0: less than 1 is needed"),
        ({"order": "random", "mixup": 0.8}, "method has no field 'mixup'"),
    ],
)
def test_mistakes_are_one_line_each(more: dict[str, Any], line: str, class_folders: Path, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=line):
        smalti.train("cvit", class_folders, tmp_path / "run", overrides={**TINY, "method": more}, quiet=True)
    assert not (tmp_path / "run").exists()


def test_orders_that_do_not_fit_are_refused_before_anything_is_written(
    class_folders: Path, photos: Path, tmp_path: Path
) -> None:
    cases = [
        (orders_file(tmp_path / "other.parquet", photos), DataError, "has orders of 0 of the"),
        (orders_file(tmp_path / "half.parquet", class_folders, flips=(False,)), DataError, "no orders of mirrored"),
        (orders_file(tmp_path / "grid.parquet", class_folders, grid=(8, 8)), ShapeError, "orders of 8x8 patches"),
    ]
    for path, kind, line in cases:
        more = {**TINY, "method": {"order": "collapse", "orders": str(path)}}
        with pytest.raises(kind, match=line):
            smalti.train("cvit", class_folders, tmp_path / "run", overrides=more, quiet=True)
    assert not (tmp_path / "run").exists()
    still = {**TINY, "steps": 1, "method": {"order": "collapse", "orders": str(cases[1][0]), "flip_prob": 0.0}}
    smalti.train("cvit", class_folders, tmp_path / "run", overrides=still, quiet=True)
