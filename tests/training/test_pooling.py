"""Pooling in a run: what it trains, keeps and hands on; a run without it is what it was."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from test_methods import batch, build
from torch.testing import assert_close

import smalti
from smalti.config import read_yaml
from smalti.data.loader import TrainLoader
from smalti.errors import ConfigError
from smalti.exporters.timm import export_timm
from smalti.layers.pooling import PRRConfig
from smalti.methods.base import get_method, method_names
from smalti.runs import train as runs
from training.test_loop import Killed, same, train, weights

NORMS = {"pre_norm": True, "post_norm": True}


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("pool", "prr"), [("prr", None), ("prr", NORMS), ("map", None)])
def test_dino_learns_through_the_pooling_with_a_teacher_that_has_it(
    pool: str, prr: dict[str, Any] | None, photos: Path, tmp_path: Path
) -> None:
    run = train(tmp_path / "run", photos, "dino", pool=pool, prr=prr)
    cls = train(tmp_path / "cls", photos, "dino", pool="cls")
    held = weights(run)
    names = [name for name in held if "attn_pool" in name]
    assert bool(names) == (pool == "map" or prr is not None)
    assert {name.split(".")[0] for name in names} == ({"student", "teacher"} if names else set())
    for name in names:
        assert name.replace("teacher.module", "student") in held
    encoder, other = smalti.load(run), smalti.load(cls)
    assert encoder.pool == pool and other.pool == "cls"
    features = encoder.encode(images())
    assert not torch.allclose(features.patches, other.encode(images()).patches)  # another loss, other weights
    assert not torch.allclose(encoder.pooled(features), features.prefix[:, 0], atol=1e-3)
    if prr is None:
        folder = export_timm(encoder, tmp_path / "timm").path
        plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert plain.global_pool == pool
        assert_close(plain(images()), encoder.image_features(images()))
        assert_close(smalti.load(folder / "model.safetensors").image_features(images()), plain(images()))
    else:
        with pytest.raises(ConfigError, match="timm's PRR pooling has"):
            export_timm(encoder, tmp_path / "timm")
        encoder.set_pool("auto")
        assert export_timm(encoder, tmp_path / "timm").difference == 0


@pytest.mark.parametrize("pool", [{"pool": "map"}, {"pool": "prr", "prr": NORMS}])
def test_a_stopped_run_goes_on_to_the_bit(
    pool: dict[str, Any], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", photos, "dino", **pool)
    loader = TrainLoader.__iter__

    def stopping(self: Any) -> Any:
        for number, views in enumerate(loader(self)):
            if number == 5:
                raise Killed
            yield views

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainLoader, "__iter__", stopping)
        train(tmp_path / "part", photos, "dino", **pool)
    part = runs.resume(tmp_path / "part", quiet=True)
    assert same(weights(whole), weights(part))
    assert read_yaml(part / "config.yaml")["pool"] == pool["pool"]


@pytest.mark.parametrize("name", [name for name in method_names() if get_method(name).pools_images])
@pytest.mark.parametrize(("pool", "prr"), [("prr", PRRConfig(**NORMS)), ("map", None)])
def test_every_parameter_of_a_pooling_is_trained_by_methods_that_read_it(
    name: str, pool: str, prr: PRRConfig | None, photos: Path
) -> None:
    method = build(name, pool=pool, prr=prr)
    torch.stack(list(method(batch(method, photos), 0.5).values())).sum().backward()
    names = {key for key, _ in method.named_parameters() if "attn_pool" in key}
    grouped = {id(parameter) for group in method.param_groups() for parameter in group["params"]}
    trained = {key: p for key, p in method.named_parameters() if key in names and p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert {id(p) for p in trained.values()} <= grouped
    if "teacher" in method.networks():
        assert len(names) == 2 * len(trained)  # the teacher's own


def test_prr_in_a_method_that_learns_from_patches_changes_the_export_and_not_the_training(
    photos: Path, tmp_path: Path
) -> None:
    plain, pooled = train(tmp_path / "plain", photos), train(tmp_path / "prr", photos, pool="prr")
    assert same(weights(plain), weights(pooled))
    one, other = smalti.load(plain).image_features(images()), smalti.load(pooled).image_features(images())
    assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"pool": "map"}, "pool=map: the loss of mae uses patch tokens only"),
        ({"pool": "prr", "prr": {"pre_norm": True}}, "pool=prr: the loss of mae uses patch tokens only"),
        ({"prr": {"num_heads": 2}}, r"prr\.\* is about pool=prr, and pool=auto"),
        ({"pool": "prr", "prr": {"num_heads": 5}}, "PRR with 5 heads on tokens of width 24"),
        ({"pool": "prr", "prr": {"heads": 3}}, "prr has no field 'heads'"),
        ({"pool": "token"}, "pool='token': input should be 'auto', 'cls', 'avg', 'map' or 'prr'"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    more: dict[str, Any], line: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=line):
        train(tmp_path / "run", photos, **more)
    assert not (tmp_path / "run").exists()


def test_weights_with_one_pooling_may_be_trained_on_with_another(photos: Path, tmp_path: Path) -> None:
    first = train(tmp_path / "first", photos, "dino", pool="map")
    kept = {"init": str(first), "encoder": None, "steps": 1}
    again = train(tmp_path / "again", photos, "dino", **kept, pool="map", optim={"lr": 0.0, "freeze_encoder_ratio": 0})
    assert torch.equal(smalti.load(again).vit.attn_pool.latent, smalti.load(first).vit.attn_pool.latent)
    assert smalti.load(train(tmp_path / "prr", photos, "dino", **kept, pool="prr")).pool == "prr"
    with pytest.raises(ConfigError, match="pool=prr has parameters"):
        smalti.load(first).set_pool("prr", PRRConfig(post_norm=True))
