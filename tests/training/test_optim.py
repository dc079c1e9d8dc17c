"""Schedules by hand, clipping both ways, fused AdamW equal to the plain one."""

import math

import pytest
import torch
from torch.testing import assert_close

from smalti.config import build
from smalti.errors import ConfigError
from smalti.training.optim import (
    OptimConfig,
    apply_schedules,
    build_optimizer,
    clip_gradients,
    learning_rate,
    peak_lr,
    weight_decay,
)


def test_the_rate_scales_with_the_images_of_a_step() -> None:
    assert_close(peak_lr(OptimConfig(base_lr=1.5e-4), 4096), 2.4e-3)
    assert peak_lr(OptimConfig(base_lr=1.5e-4, lr=1e-2), 4096) == 1e-2


def test_warm_up_is_linear_and_the_rest_a_half_cosine() -> None:
    config = OptimConfig(warmup_ratio=0.2, min_lr=0.1)
    assert_close(
        [learning_rate(config, peak=1.0, progress=p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)], [0.0, 0.5, 1.0, 0.55, 0.1]
    )


def test_weight_decay_grows_along_a_half_cosine() -> None:  # half-way between 0.04 and 0.4
    config = OptimConfig(weight_decay=0.04, weight_decay_end=0.4)
    assert_close([weight_decay(config, p) for p in (0.0, 0.5, 1.0)], [0.04, 0.22, 0.4])
    assert weight_decay(OptimConfig(weight_decay=0.3), 0.7) == 0.3


def test_schedules_reach_every_group_with_its_scale() -> None:
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr_scale": 1.0, "weight_decay_scale": 1.0},
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr_scale": 0.5, "weight_decay_scale": 0.0},
    ]
    config = OptimConfig(warmup_ratio=0.0, weight_decay=0.1)
    optimizer = build_optimizer(groups, config)
    apply_schedules(optimizer, config, peak=2.0, progress=0.0)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(2.0, 0.1), (1.0, 0.0)]


def test_the_optimiser_is_adamw_by_definition() -> None:
    parameter = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    config = OptimConfig(betas=(0.9, 0.99), weight_decay=0.1, warmup_ratio=0.0)
    optimizer = build_optimizer([{"params": [parameter], "lr_scale": 1.0, "weight_decay_scale": 1.0}], config)
    x, m, v = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for number in range(1, 4):
        gradient = [0.5 * number, -1.0]
        parameter.grad = torch.tensor([gradient])
        apply_schedules(optimizer, config, peak=0.01, progress=0.0)
        optimizer.step()
        for i in range(2):
            x[i] *= 1 - 0.01 * 0.1
            m[i] = 0.9 * m[i] + 0.1 * gradient[i]
            v[i] = 0.99 * v[i] + 0.01 * gradient[i] ** 2
            x[i] -= 0.01 * (m[i] / (1 - 0.9**number)) / (math.sqrt(v[i] / (1 - 0.99**number)) + 1e-8)
    assert_close(parameter.detach(), torch.tensor([x]), rtol=1e-5, atol=1e-6)


def test_clipping_holds_for_all_gradients_or_for_each() -> None:
    def gradients() -> list[torch.Tensor]:
        parameters = [torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)]
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
        return parameters

    both = gradients()
    assert_close(clip_gradients(both, OptimConfig(clip_norm=1.0)).item(), 5.0)
    assert_close(torch.cat([p.grad for p in both]), torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
    each = gradients()
    clip_gradients(each, OptimConfig(clip_norm=3.5, clip="tensor"))
    assert_close(torch.cat([p.grad for p in each]), torch.tensor([3.0, 3.5]), rtol=1e-5, atol=0)
    none = gradients()
    assert clip_gradients(none, OptimConfig(clip_norm=None)).item() == 5.0
    assert none[1].grad.item() == 4.0


def test_mistakes_are_one_line_each() -> None:
    for wrong in ({"warmup_ratio": 2}, {"lr": -1}, {"betas": [2, 0.9]}, {"eps": 0}):
        said = "input should be|at (most|least) . is needed|(less|more) than . is needed"
        with pytest.raises(ConfigError, match=f"optim: {next(iter(wrong))}.*: ({said})"):
            build(OptimConfig, wrong, "optim")
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        build_optimizer([{"params": []}], OptimConfig())


def test_a_constant_rate_stays_at_its_peak_after_the_warm_up() -> None:
    config = OptimConfig(warmup_ratio=0.2, after_warmup="constant", min_lr=0.0)
    rates = [learning_rate(config, peak=3.0, progress=progress) for progress in (0.0, 0.1, 0.2, 0.5, 1.0)]
    assert rates == pytest.approx([0.0, 1.5, 3.0, 3.0, 3.0])
