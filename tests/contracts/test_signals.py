"""What a method that trains on signals owes, whatever its paper; the list comes from the registry."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_methods import NAMES, OF_RECORDED_TORCH, ONE_BY_ONE, SMALL, part_of, step
from torch.testing import assert_close

from smalti.data.views import Views, collate
from smalti.errors import ConfigError
from smalti.methods.base import Method, get_method
from smalti.models.build import build_encoder
from smalti.training.optim import OptimConfig, apply_schedules, build_optimizer

NAMES_OF_SIGNALS = [name for name in NAMES if get_method(name).takes_signals]
GOLDEN = Path(__file__).parents[1] / "golden" / "signals.json"
SAMPLES, CHANNELS, PATCH = 96, 2, 8


def build(name: str, **config: object) -> Method:
    """A method on windows of 12 patches, with its defaults for signals."""
    torch.manual_seed(0)
    cls = get_method(name)
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        img_size=(1, SAMPLES),
        in_chans=CHANNELS,
        patch_size=[1, PATCH],
        embed_dim=24,
        depth=2,
        num_heads=3,
        seed=0,
        mean=(0.0,),
        std=(1.0,),
    )
    own = {**cls.signal_defaults.get("method", {}), **SMALL.get(name, {}), **config}
    return cls(encoder, cls.Config(**own)).train()


def batch(method: Method, number: int = 0) -> Views:
    """Four windows of noise with slow waves."""
    views, samples = method.make_views(0), []
    for place in range(4):
        rng = np.random.default_rng([number, place])
        waves = np.sin(np.arange(SAMPLES) / rng.uniform(4, 12, (CHANNELS, 1)) + rng.uniform(0, 6, (CHANNELS, 1)))
        window = (waves + rng.normal(0, 0.1, waves.shape)).T[None].astype(np.float32)
        samples.append(views(window, rng))
    made = collate(samples)
    made.keys = torch.arange(4) + 10 * number
    return made


@pytest.mark.parametrize("name", NAMES_OF_SIGNALS)
def test_loss_terms_are_finite_explained_and_have_a_reference(name: str) -> None:
    method = build(name)
    with torch.no_grad():
        losses = method(batch(method), 0.5)
    assert losses and all(value.shape == () and math.isfinite(value.item()) for value in losses.values())
    assert set(method.observations) <= set(method.log_columns), "pages explain what a method logs"
    row = {f"loss/{term}": float(value) for term, value in losses.items()}
    row |= {key: float(value) for key, value in method.observations.items()}
    reference = method.reference(row)
    assert reference is not None and reference.constant > 0 and reference.gain < 0.3, reference


@pytest.mark.parametrize("name", NAMES_OF_SIGNALS)
def test_gradient_reaches_every_trained_parameter(name: str) -> None:
    method = build(name)
    torch.stack(list(method(batch(method), 0.5).values())).sum().backward()
    idle = [key for key, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


@pytest.mark.parametrize("name", NAMES_OF_SIGNALS)
def test_thirty_steps_on_one_batch_lower_the_loss(name: str) -> None:
    method = build(name)
    views, config = batch(method), OptimConfig(lr=2e-3, warmup_ratio=0.0)
    optimizer = build_optimizer(method.param_groups(), config)
    losses = []
    for _ in range(30):
        apply_schedules(optimizer, config, peak=2e-3, progress=0.5)
        losses.append(step(method, views, optimizer, 0.5))
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3


@pytest.mark.parametrize("name", NAMES_OF_SIGNALS)
def test_a_window_s_randomness_does_not_depend_on_its_batch(name: str) -> None:
    method = build(name, **ONE_BY_ONE.get(name, {}))
    assert method.couples_samples == ""
    views = batch(method)
    method.eval()
    whole, parts = method(views, 0.5), [method(part_of(views, rows), 0.5) for rows in (slice(0, 2), slice(2, 4))]
    for term, value in whole.items():
        assert_close(value, (parts[0][term] + parts[1][term]) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES_OF_SIGNALS)
def test_settings_of_images_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"method.crop_scale=.* applies to images, but the data are signals"):
        build(name, crop_scale=(0.5, 1.0))


@OF_RECORDED_TORCH
def test_the_loss_curves_are_where_they_were() -> None:
    """Six steps each; ``SMALTI_WRITE_GOLDEN=1`` writes them."""
    found = {}
    for name in NAMES_OF_SIGNALS:
        method, config = build(name), OptimConfig(warmup_ratio=0.5)
        optimizer = build_optimizer(method.param_groups(), config)
        found[name] = []
        for number in range(6):
            apply_schedules(optimizer, config, peak=1e-3, progress=number / 6)
            found[name].append(round(step(method, batch(method, number), optimizer, number / 6), 6))
    if os.environ.get("SMALTI_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    known = json.loads(GOLDEN.read_text())
    assert found.keys() == known.keys()
    for name, losses in found.items():
        assert losses == pytest.approx(known[name], rel=2e-4), name
