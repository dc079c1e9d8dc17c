"""Tiny seeded loss curves in ``tests/golden``: a change that means no numerical change leaves them where they are.

``SMALTI_WRITE_GOLDEN=1 pytest tests/contracts/test_golden.py`` writes them anew; say why in the commit.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_methods import NAMES, OF_RECORDED_TORCH, build, step

from smalti.data.views import collate
from smalti.training.optim import OptimConfig, apply_schedules, build_optimizer

FOLDER = Path(__file__).parents[1] / "golden"


def curve(name: str) -> list[float]:
    """Losses of six steps on noise, with a warm-up; no file and no library for images takes part."""
    method = build(name)
    config = OptimConfig(warmup_ratio=0.5)
    optimizer = build_optimizer(method.param_groups(), config)
    crops = method.make_views(32)
    losses = []
    for number in range(6):
        samples = []
        for place in range(4):
            rng = np.random.default_rng([number, place])
            noise = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            samples.append(crops(noise, rng))
        views = collate(samples)
        views.keys = torch.arange(4) + 10 * number
        views.labels = torch.arange(4)
        apply_schedules(optimizer, config, peak=1e-3, progress=number / 6)
        losses.append(step(method, views, optimizer, number / 6))
    return losses


@OF_RECORDED_TORCH
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_curve_is_where_it_was(name: str) -> None:
    path = FOLDER / f"{name}.json"
    losses = curve(name)
    if os.environ.get("SMALTI_WRITE_GOLDEN"):
        path.write_text(json.dumps([round(loss, 6) for loss in losses]) + "\n")
    assert losses == pytest.approx(json.loads(path.read_text()), rel=2e-4)
