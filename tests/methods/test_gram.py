"""Gram anchoring: its loss by hand, its anchor, and runs of the methods that have it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

import smalti
from smalti.config import merge
from smalti.data.images.folders import open_images
from smalti.data.loader import TrainLoader
from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.methods.base import EncoderMethod, get_method
from smalti.methods.gram import GramAnchor, gram_loss
from smalti.models.build import build_encoder
from smalti.models.weights import read_tensors
from smalti.runs import train as runs

X = torch.tensor([[1.0, 0], [3, 4]], dtype=torch.float64)
Y = torch.tensor([[0.0, 2], [5, 0]], dtype=torch.float64)
SMALL: dict[str, Any] = {"num_prototypes": 16, "hidden_dim": 32, "bottleneck_dim": 8, "num_local_views": 1}
METHODS = ("dino", "ibot", "dinov2")


def tiny(name: str, weight: float, pretrained: bool = True) -> EncoderMethod:
    torch.manual_seed(0)
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, seed=0
    )
    encoder.pretrained = pretrained
    cls: Any = get_method(name)
    return cls(encoder, cls.Config(**SMALL, gram_weight=weight)).train()


def batch(method: EncoderMethod, photos: Path) -> Views:
    return next(iter(TrainLoader(open_images(photos), method.make_views(32), batch_size=4, seed=0)))


# Loss


def test_the_loss_is_that_by_hand() -> None:
    assert gram_loss(X, Y).item() == pytest.approx(0.18)  # cosines 0.6 and 0: 2 * 0.36 / 4
    x = torch.tensor([[1.0, 0], [-0.6, 0.8], [0, 1]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0], [-1, 0], [0, -1]], dtype=torch.float64)
    assert gram_loss(x, y).item() == pytest.approx(0.177778, abs=1e-6)


def test_the_gradient_is_that_by_hand_and_orthogonal_to_the_tokens() -> None:
    x, y = X.clone().requires_grad_(), Y.clone()
    gram_loss(x, y).backward()
    assert x.grad is not None
    assert_close(x.grad, torch.tensor([[0, 0.48], [0.0768, -0.0576]], dtype=torch.float64))
    assert_close((x.grad * X).sum(1), torch.zeros(2, dtype=torch.float64))
    assert gradcheck(lambda tokens: gram_loss(tokens, y), X.clone().requires_grad_())


def test_pairs_are_those_of_one_crop() -> None:
    one, other = torch.stack([X, Y]), torch.stack([Y, X])
    assert gram_loss(one, other).item() == pytest.approx(0.18)
    joined = gram_loss(one.flatten(0, 1), other.flatten(0, 1))  # of the whole batch
    assert joined.item() == pytest.approx(0.10)


def test_equal_directions_cost_nothing() -> None:
    assert gram_loss(X, X).item() == 0
    assert gram_loss(X, X * torch.tensor([[7.0], [0.1]], dtype=torch.float64)).item() == pytest.approx(0, abs=1e-15)


def test_the_loss_is_float32_under_autocast() -> None:
    one, other = torch.randn(2, 3, 8, 24, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gram_loss(one, other)
    assert torch.equal(found, gram_loss(one, other))


# Methods


@pytest.mark.parametrize("name", METHODS)
def test_without_a_weight_nothing_is_added(name: str, photos: Path) -> None:
    method = tiny(name, 0.0)
    assert not any("gram" in key for key in method.state_dict())
    losses = method(batch(method, photos), 0.5)
    assert "gram" not in losses and "gram_distance" not in method.observations


@pytest.mark.parametrize("name", METHODS)
def test_the_term_is_that_of_the_student_s_patches_and_the_start(name: str, photos: Path) -> None:
    method = tiny(name, 0.5)
    views = batch(method, photos)
    anchor = method.gram
    assert isinstance(anchor, GramAnchor) and "gram" not in method.networks()
    if name == "dino":  # nothing is masked
        assert method(views, 0.5)["gram"].item() == pytest.approx(0, abs=1e-12)
    else:
        assert method(views, 0.5)["gram"].item() > 1e-6  # of masked patches, too
    encoder = method.networks()["student"]
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    losses, plain = method(views, 0.5), tiny(name, 0.0)
    if name == "dino":
        student = encoder.encode(encoder.normalize(views.global_crops)).patches
        expected = 0.5 * gram_loss(student, anchor(views.global_crops))
        assert_close(losses["gram"], expected)
        assert_close(method.observations["gram_distance"].square(), 2 * expected.detach())
    plain.load_state_dict({key: value for key, value in method.state_dict().items() if not key.startswith("gram.")})
    for term, value in plain(views, 0.5).items():
        assert_close(losses[term], value, rtol=1e-4, atol=1e-5)  # the other terms stay
    losses["gram"].backward()
    assert all(parameter.grad is None for parameter in anchor.parameters())
    assert any(p.grad is not None and p.grad.any() for p in encoder.parameters())


def test_tokens_of_unmasked_crops_are_those_of_the_encoder(photos: Path) -> None:
    method: Any = tiny("ibot", 1.0)
    method.config = type(method.config)(**SMALL, gram_weight=1.0, mask_sample_prob=0.0)
    views, encoder = batch(method, photos), method.student.encoder
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    expected = gram_loss(encoder.encode(encoder.normalize(views.global_crops)).patches, method.gram(views.global_crops))
    assert_close(method(views, 0.5)["gram"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_random_weights_are_no_anchor(name: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gram_weight keeps the similarities of trained weights; name these with"):
        tiny(name, 2.0, pretrained=False)
    with pytest.raises(ConfigError, match="gram_weight keeps the similarities"):
        small = {"encoder": {"name": "vit_tiny_patch16_224", "patch_size": 8}, "data": {"image_size": 32}}
        tree = merge(small, {"method": {**SMALL, "gram_weight": 2.0}})
        smalti.train(name, photos, tmp_path / "run", overrides=tree, quiet=True)
    assert not (tmp_path / "run").exists()


def test_intertwined_has_no_anchor() -> None:
    with pytest.raises(ConfigError, match="gram_weight: intertwined changes what positions mean"):
        tiny("intertwined", 2.0)


def test_a_run_resumes_bit_for_bit_without_the_file_it_began_from(photos: Path, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    smalti.export(build_encoder("vit_tiny_patch16_224", **shape, seed=0).eval(), tmp_path / "start")
    tree = {
        "init": str(tmp_path / "start" / "model.safetensors"),
        "method": {**SMALL, "gram_weight": 2.0},
        "data": {"image_size": 32},
        "batch_size": 4,
        "steps": 4,
        "optim": {"lr": 1e-3, "warmup_ratio": 0.0, "freeze_encoder_ratio": 0.0},
        "checkpoint": {"every": 2, "keep": 3},
    }
    run = smalti.train("dino", photos, tmp_path / "run", overrides=tree, quiet=True)
    last = run / "checkpoints" / "step_00000004"
    whole = read_tensors(last / "weights.safetensors")
    first = read_tensors(run / "checkpoints" / "step_00000000" / "weights.safetensors")
    kept = [key for key in whole if key.startswith("gram.")]
    assert kept and all(torch.equal(whole[key], first[key]) for key in kept)
    for path in sorted(last.iterdir()):
        path.unlink()
    last.rmdir()
    for path in (tmp_path / "start").iterdir():
        path.unlink()
    runs.resume(run, quiet=True)
    again = read_tensors(last / "weights.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
    assert smalti.load(run, quiet=True).depth == 2
