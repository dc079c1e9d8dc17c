"""DIET: its loss and gradient by hand, one class per image, what is trained, and refusals."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import smalti
from smalti.config import merge, read_yaml
from smalti.data.images.folders import open_images
from smalti.data.loader import TrainLoader
from smalti.errors import ConfigError, DataError
from smalti.methods.diet import DIET, DIETConfig, index_loss
from smalti.models.build import build_encoder
from smalti.runs import train as runs

Z = torch.tensor([[3.0, 4], [0, 2]], dtype=torch.float64)
W = torch.tensor([[1.0, 0], [0, 1], [1, 0]], dtype=torch.float64)
INDEX = torch.tensor([1, 0])
TINY: dict[str, Any] = {
    "init": "random:vit_tiny_patch16_224",
    "data": {"image_size": 32},
    "batch_size": 4,
    "steps": 3,
    "optim": {"lr": 1e-3, "warmup_ratio": 0.0},
    "log": {"every": 1},
}


def loss_of(z: torch.Tensor, w: torch.Tensor, smoothing: float) -> torch.Tensor:
    return index_loss(F.normalize(z, dim=-1), w, INDEX, smoothing)[0]


def tiny(embed_dim: int = 24, **config: Any) -> DIET:
    torch.manual_seed(0)
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=embed_dim, depth=2, num_heads=3, seed=0
    )
    return DIET(encoder, DIETConfig(**{"num_images": 24, **config})).train()


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return smalti.load(run / "checkpoints" / f"step_{step:08d}", quiet=True).state_dict()


# Loss


@pytest.mark.parametrize(("smoothing", "loss"), [(0.0, 1.260631), (0.2, 1.240631), (0.8, 1.180631)])
def test_the_loss_is_that_by_hand(smoothing: float, loss: float) -> None:
    logits = index_loss(F.normalize(Z, dim=-1), W, INDEX, smoothing)[1]
    assert_close(logits, torch.tensor([[0.6, 0.8, 0.6], [0, 1, 0]], dtype=torch.float64))
    assert loss_of(Z, W, smoothing).item() == pytest.approx(loss, abs=1e-6)


def test_the_gradients_are_those_by_hand() -> None:
    z, w = Z.clone().requires_grad_(), W.clone().requires_grad_()
    loss_of(z, w, 0.2).backward()
    assert z.grad is not None and w.grad is not None
    assert_close(z.grad, torch.tensor([[0.0546, -0.0410], [-0.1274, 0]], dtype=torch.float64), rtol=0, atol=6e-5)
    by_hand = torch.tensor([[0.0731, -0.2299], [-0.1463, 0.0597], [0.0731, 0.1701]], dtype=torch.float64)
    assert_close(w.grad, by_hand, rtol=0, atol=6e-5)
    assert_close((z.grad * Z).sum(1), torch.zeros(2, dtype=torch.float64))


def test_zero_rows_cost_log_n_for_any_smoothing() -> None:
    for smoothing in (0.0, 0.2, 0.8):
        assert loss_of(Z, torch.zeros_like(W), smoothing).item() == pytest.approx(math.log(3))


@pytest.mark.parametrize(("smoothing", "floor", "gap"), [(0.2, 1.880, 8.29), (0.3, 2.681, 7.76), (0.8, 6.021, 5.53)])
def test_the_floor_is_reached_at_a_gap_of_logits(smoothing: float, floor: float, gap: float) -> None:
    number = 1000
    best = math.log((1 - smoothing + smoothing / number) / (smoothing / number))
    assert best == pytest.approx(gap, abs=0.005)
    row = torch.zeros(number, 1, dtype=torch.float64)
    row[7] = best
    loss = index_loss(torch.ones(1, 1, dtype=torch.float64), row, torch.tensor([7]), smoothing)[0]
    assert loss.item() == pytest.approx(floor, abs=5e-4)


def test_the_method_classifies_the_pooled_vector_by_index(photos: Path) -> None:
    for normalize in (True, False):
        method = tiny(normalize=normalize)
        views = next(iter(TrainLoader(open_images(photos), method.make_views(32), batch_size=4, seed=0)))
        z = method.encoder.image_features(method.encoder.normalize(views.global_crops))
        z = z / z.norm(dim=1, keepdim=True) if normalize else z
        expected = F.cross_entropy(z @ method.head.weight.T, views.index, label_smoothing=0.2)
        assert_close(method(views, 0.5)["index"], expected)
    assert method.head.bias is None


def test_an_image_in_place_of_an_unreadable_one_keeps_its_own_index(photos: Path, tmp_path: Path) -> None:
    for source in sorted(photos.iterdir())[:4]:
        (tmp_path / source.name).write_bytes(source.read_bytes())
    broken = sorted(tmp_path.iterdir())[1]
    broken.write_bytes(b"")
    views = next(iter(TrainLoader(open_images(tmp_path), tiny().make_views(32), batch_size=4, seed=0)))
    assert len(views.skipped) == 1 and 1 not in views.index.tolist()
    assert sorted(set(views.index.tolist())) == [0, 2, 3]


def test_only_rows_of_w_have_the_larger_rate() -> None:
    method = tiny(head_lr_scale=7.0)
    scales = {id(p): group for group in method.param_groups() for p in group["params"]}
    head = scales[id(method.head.weight)]
    assert (head["lr_scale"], head["weight_decay_scale"]) == (7.0, 1.0)
    assert all(scales[id(p)]["lr_scale"] == 1.0 for p in method.encoder.parameters() if p.requires_grad)


# Runs


@pytest.mark.parametrize("frozen", [0.0, 0.4])
def test_a_run_from_weights_trains_the_last_two_blocks_and_one_row_per_image(
    frozen: float, photos: Path, tmp_path: Path
) -> None:
    tree = merge(TINY, {"optim": {"freeze_encoder_ratio": frozen}, "checkpoint": {"every": 3}})
    run = smalti.train("diet", photos, tmp_path / "run", overrides=tree, quiet=True)
    config = read_yaml(run / "config.yaml")
    assert (config["method"]["num_images"], config["adapt"]) == (24, "last:2")
    before, after = weights(run, 0), weights(run, 3)
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert {key.split(".")[2] for key in changed if ".blocks." in key} == {"10", "11"}
    assert all(key.startswith(("vit.blocks.", "vit.norm.")) for key in changed)


def test_training_the_head_alone_leaves_the_encoder_as_it_was(photos: Path, tmp_path: Path) -> None:
    tree = merge(TINY, {"optim": {"freeze_encoder_ratio": 1.0}, "checkpoint": {"every": 3}})
    run = smalti.train("diet", photos, tmp_path / "run", overrides=tree, quiet=True)
    before, after = weights(run, 0), weights(run, 3)
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_run_with_other_images_is_not_resumed(photos: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for source in sorted(photos.iterdir())[:6]:
        (images / source.name).write_bytes(source.read_bytes())
    run = smalti.train("diet", images, tmp_path / "run", overrides=merge(TINY, {"steps": 1}), quiet=True)
    (images / "00.jpg").rename(images / "zz.jpg")
    with pytest.raises(DataError, match=r"was trained on 6 images, but .* now has 6 or other ones"):
        runs.resume(run, quiet=True)


# Refusals


def test_what_can_not_be_used_is_refused(photos: Path) -> None:
    with pytest.raises(ConfigError, match="num_images=None: diet needs at least 2 images"):
        tiny(num_images=None)
    with pytest.raises(ConfigError, match=r"a row of 24 weights for each of 9000000 images, 3\.2 GiB in training"):
        tiny(num_images=9_000_000)
    with pytest.raises(DataError, match=r"has 24 training images, but method.num_images=7; leave it out"):
        tiny(num_images=7).bind(open_images(photos), 32)


def test_views_are_one_crop_with_the_released_jitter() -> None:
    (spec,) = tiny().make_views(32).specs
    assert (spec.count, spec.size, spec.scale, spec.flip_prob, spec.blur_prob) == (1, 32, (0.08, 1.0), 0.5, 0.0)
    assert spec.color is not None and (spec.color.jitter_prob, spec.color.gray_prob) == (0.3, 0.2)
    sample = tiny().make_views(32)(np.zeros((40, 50, 3), dtype=np.uint8), np.random.default_rng(0))
    assert sample.crops[0].shape == (1, 32, 32, 3)
