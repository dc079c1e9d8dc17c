"""Supervised pretraining: its loss by hand, classes from folders, mixing, and learning through any pooling."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import smalti
from smalti.config import merge, read_yaml
from smalti.data.images.folders import open_images
from smalti.data.loader import TrainLoader
from smalti.data.views import Views
from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.methods.supervised import Supervised, SupervisedConfig, class_loss
from smalti.models.build import build_encoder
from smalti.models.loading import latest_checkpoint
from smalti.runs import train as runs
from smalti.runs.baseline import evaluate

TINY: dict[str, Any] = {
    "encoder": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "data": {"image_size": 32},
    "batch_size": 4,
    "steps": 6,
    "optim": {"lr": 2e-3, "warmup_ratio": 0.0},
    "drop_path": 0.0,
}


def build(pool: str = "auto", **config: Any) -> Supervised:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "seed": 0}
    encoder = build_encoder("vit_tiny_patch16_224", **shape)  # type: ignore[arg-type]
    encoder.set_pool(pool, fresh=True)
    return Supervised(encoder, SupervisedConfig(**{"num_classes": 3, **config})).train()


def views_of(method: Supervised, folder: Path, count: int = 4) -> Views:
    return next(iter(TrainLoader(open_images(folder), method.make_views(32), batch_size=count, seed=0)))


def test_the_loss_is_that_of_smoothed_labels_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    labels, share = torch.tensor([0, 2]), 0.3
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        probs = np.exp(row) / np.exp(row).sum()
        target = [share / 3 + (1 - share) * (k == label) for k in range(3)]
        total -= sum(t * np.log(p) for t, p in zip(target, probs, strict=True))
    assert class_loss(logits, labels, share).item() == pytest.approx(total / 2)
    assert torch.autograd.gradcheck(lambda x: class_loss(x, labels, share), logits.requires_grad_())


def test_equal_scores_cost_log_k() -> None:
    assert class_loss(torch.zeros(5, 7), torch.arange(5), 0.1).item() == pytest.approx(np.log(7))


def test_labels_are_those_of_the_folders_in_every_batch(class_folders: Path) -> None:
    method = build()
    images = open_images(class_folders).subset("train")
    for views, _ in zip(TrainLoader(images, method.make_views(32), batch_size=5, seed=3), range(4), strict=False):
        assert views.labels is not None
        assert views.labels.tolist() == [images.samples[place].label for place in views.index]
        blue_is_brighter = views.global_crops[:, 2].float().mean((1, 2)) > views.global_crops[:, 0].float().mean((1, 2))
        assert blue_is_brighter.tolist() == [label == 0 for label in views.labels.tolist()]


@pytest.mark.parametrize("pool", ["cls", "avg", "prr"])
def test_patches_of_the_last_block_are_taught_as_the_pooling_says(pool: str, class_folders: Path) -> None:
    method = build(pool, color_jitter=0.0)
    views = views_of(method, class_folders)
    seen = []
    method.encoder.vit.norm.register_forward_hook(
        lambda module, inputs, tokens: (tokens.retain_grad(), seen.append(tokens))[1]
    )
    method(views, 0.5)["class"].backward()
    patches = seen[0].grad[:, 1:]  # of what the pooling is given
    if pool == "cls":
        assert torch.equal(patches, torch.zeros_like(patches))
    elif pool == "avg":
        assert_close(patches, patches[:, :1].expand_as(patches), rtol=0, atol=0)
    else:
        norms = patches.norm(dim=-1)
        assert (norms > 0).all() and (norms.std(1) > 1e-3 * norms.mean(1)).all()


def test_mixing_shares_classes_as_it_shares_pixels(class_folders: Path) -> None:
    method = build(mixup=0.8, label_smoothing=0.0)
    views = views_of(method, class_folders)
    images, labels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    mixed, targets = method.mixed(images, labels, views.keys)
    again, _ = method.mixed(images, labels, views.keys)
    assert torch.equal(mixed, again) and (np.random.get_state()[1] == before).all()  # noqa: NPY002
    share = (mixed[0, 0, 0, 0].item() - 3) / -3  # x = s * 0 + (1 - s) * 3
    assert 0 < share < 1
    assert_close(targets[1], torch.tensor([0.0, share, 1 - share]))
    assert_close(targets.sum(1), torch.ones(4))
    assert not torch.equal(mixed, method.mixed(images, labels, views.keys + 1)[0])
    plain = build(label_smoothing=0.0)
    assert method.eval()(views, 0.5)["class"] == plain.eval()(views, 0.5)["class"]  # nothing is mixed when it is judged
    with pytest.raises(ConfigError, match="micro_batch=3: mixup and cutmix mix pairs"):
        method.mixed(images[:3], labels[:3], views.keys[:3])


def test_cutmix_pastes_a_part(class_folders: Path) -> None:
    method = build(cutmix=1.0, label_smoothing=0.0)
    images, labels = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 16, 16), torch.tensor([0, 1])
    for key in range(20):
        mixed, targets = method.mixed(images, labels, torch.tensor([key, key]))
        assert set(mixed.unique().tolist()) <= {0.0, 1.0}
        assert targets[0, 1].item() == pytest.approx(mixed[0, 0].mean().item())
    assert method(views_of(method, class_folders), 0.5)["class"].isfinite()


def test_a_run_takes_the_classes_from_the_folders_and_learns_them(class_folders: Path, tmp_path: Path) -> None:
    settings = merge(TINY, {"steps": 60, "pool": "prr", "method": {"color_jitter": 0.0}})
    run = smalti.train("supervised", class_folders, tmp_path / "run", overrides=settings, quiet=True)
    config = read_yaml(run / "config.yaml")
    assert config["method"]["num_classes"] == 2 and config["pool"] == "prr"
    encoder = smalti.load(run)
    config = EvalConfig(protocols=("knn",), baseline=False, own={"knn": {"k": 3}})
    [result] = evaluate(encoder, "run", str(class_folders), config)
    assert result.metrics["top1"] == 1.0 and result.settings["pool"] == "prr"


def test_a_resumed_run_goes_on_to_the_bit(class_folders: Path, tmp_path: Path) -> None:
    more = merge(TINY, {"method": {"mixup": 0.8, "cutmix": 1.0}, "pool": "map", "checkpoint": {"every": 3}})
    whole = smalti.train("supervised", class_folders, tmp_path / "whole", overrides=more, quiet=True)
    expected = smalti.load(whole).vit.state_dict()
    last = latest_checkpoint(whole)
    assert last is not None
    last.rename(tmp_path / "aside")
    again = smalti.load(runs.resume(whole, quiet=True)).vit.state_dict()
    assert all(torch.equal(again[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"num_classes": 1}, "has 2 classes, but method.num_classes=1; leave it out"),
        ({"label_smoothing": 1.0}, "method.label_smoothing=1.0: less than 1 is needed"),
        ({"mixup": -1.0}, "method.mixup=-1.0: at least 0 is needed"),
    ],
)
def test_mistakes_are_one_line_each(more: dict[str, Any], line: str, class_folders: Path, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=line):
        smalti.train("supervised", class_folders, tmp_path / "run", overrides={**TINY, "method": more}, quiet=True)
    assert not (tmp_path / "run").exists()


def test_an_odd_batch_is_not_mixed(class_folders: Path, tmp_path: Path) -> None:
    settings = merge(TINY, {"method": {"mixup": 0.8}, "batch_size": 3})
    with pytest.raises(ConfigError, match="micro_batch=3: mixup and cutmix mix pairs of images; make it even"):
        smalti.train("supervised", class_folders, tmp_path / "run", overrides=settings, quiet=True)
    assert not (tmp_path / "run").exists()


def test_images_without_classes_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has layout 'folder', but supervised needs class folders"):
        smalti.train("supervised", photos, tmp_path / "run", overrides=TINY, quiet=True)
    assert not (tmp_path / "run").exists()
