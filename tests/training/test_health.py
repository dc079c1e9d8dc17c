"""The finite check and the numbers that tell collapse."""

import math

import pytest
import torch
from torch.testing import assert_close

from smalti.models.build import build_encoder
from smalti.models.pooling import PatchFeatures
from smalti.training.health import Health, feature_health


def test_means_and_the_first_bad_step_of_each_term() -> None:
    health = Health()
    for step in range(1, 6):
        bad = math.nan if step >= 3 else 1.0
        losses = {"a": torch.tensor(float(step)), "b": torch.tensor(bad)}
        health.observe(step, losses, torch.tensor(math.inf if step >= 4 else 2.0), {"watched": torch.tensor(math.nan)})
    reading = health.read(5, [torch.ones(2)])
    assert reading.means["loss/a"] == 3.0
    assert reading.bad == {"loss/b": 3, "grad_norm": 4}
    assert health.read(5, []).bad == {}, "a reading starts afresh"


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
def test_weights_that_are_not_finite_or_whose_squares_overflow_are_bad(value: float) -> None:
    health = Health()
    health.observe(7, {"a": torch.tensor(1.0)}, torch.tensor(1.0), {})
    weights = [torch.ones(3), torch.tensor([1.0, value]), torch.tensor([2**62])]
    assert health.read(7, weights).bad == {"weights": 7}


def test_tokens_that_overflow_give_nan_instead_of_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=3, seed=0)
    patches = torch.full((4, 64, 24), math.inf)
    monkeypatch.setattr(encoder, "encode", lambda _: PatchFeatures(patches, patches[:, :0], (8, 8)))
    assert all(math.isnan(value) for value in feature_health(encoder, torch.randn(4, 3, 32, 32)).values())


def test_a_constant_encoder_has_rank_one_and_a_wide_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=3, seed=0).train()
    images = torch.randn(4, 3, 32, 32)

    def answer(patches: torch.Tensor):
        monkeypatch.setattr(encoder, "encode", lambda _: PatchFeatures(patches, patches[:, :0], (8, 8)))
        return feature_health(encoder, images)

    constant = answer(torch.ones(4, 64, 24))
    assert constant["feature_std"] == 0
    line = answer(torch.randn(4, 64, 1) * torch.ones(24))
    assert line["effective_rank"] < 1.1  # float32 leaves a little in the other directions
    basis = torch.eye(24)[torch.arange(240) % 24].view(1, 240, 24)
    spread = answer(basis)
    assert_close(spread["effective_rank"], 23.0, rtol=0.01, atol=0)  # 24 equal directions less the mean
    assert encoder.training


def test_eigenvalues_are_those_of_float32_also_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=3, seed=0)
    patches = torch.randn(4, 64, 24)
    monkeypatch.setattr(encoder, "encode", lambda _: PatchFeatures(patches, patches[:, :0], (8, 8)))
    looked_at: list[torch.Tensor] = []
    eigvalsh = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda x: looked_at.append(x) or eigvalsh(x))
    outside = feature_health(encoder, torch.randn(4, 3, 32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        inside = feature_health(encoder, torch.randn(4, 3, 32, 32))
    assert looked_at[1].dtype == torch.float32, "a GPU has no eigenvalues in bf16"
    assert inside == outside
