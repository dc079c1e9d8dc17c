"""DINO against its definition."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

from masked_methods import tiny as tiny_masked
from smalti.config import read_yaml
from smalti.errors import ConfigError
from smalti.exporters.timm import export_timm
from smalti.functional.positions import Resampling
from smalti.layers.heads import Prototypes
from smalti.methods.base import Method
from smalti.methods.dino import DINO, DINOConfig, cross_view_entropy
from smalti.methods.dinov2 import DINOv2
from smalti.methods.ibot import IBOT
from smalti.methods.teacher import Teacher, cosine_momentum
from smalti.models.build import build_encoder, encoder_from_config
from smalti.models.loading import load
from smalti.runs.config import resolve
from smalti.runs.recipes import find_recipe


def tiny(**config: object) -> DINO:
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, seed=0
    )
    return DINO(encoder, DINOConfig(num_prototypes=16, hidden_dim=32, bottleneck_dim=8, **config))


def test_equal_logits_cost_log_k() -> None:
    zeros = torch.zeros(2, 3, 8)
    assert_close(cross_view_entropy(zeros, zeros, torch.zeros(8), 0.1, 0.04).item(), math.log(8), rtol=1e-6, atol=0)


def test_four_pairs_by_hand() -> None:  # known answer
    teacher = torch.tensor([[[0.8, 0.2]], [[0.3, 0.7]]]).log()
    student = torch.tensor([[[0.1, 0.0]], [[0.0, 0.2]], [[0.05, -0.05]]])
    pairs = {(1, 0): 1.013262, (0, 1): 1.726928, (0, 2): 0.513262, (1, 2): 1.013262}
    for (g, v), expected in pairs.items():
        term = -(teacher[g, 0].softmax(-1) * (student[v, 0] / 0.1).log_softmax(-1)).sum()
        assert_close(term.item(), expected, rtol=0, atol=1e-6)
    loss = cross_view_entropy(teacher, student, torch.zeros(2), 0.1, 1.0)
    assert_close(loss.item(), 1.066678, rtol=0, atol=1e-6)


def test_the_loss_is_the_papers_by_plain_loops() -> None:
    teacher, student, center = torch.randn(2, 3, 5), torch.randn(6, 3, 5), torch.randn(5)
    terms = [
        -(F.softmax((teacher[g, b] - center) / 0.05, -1) * F.log_softmax(student[v, b] / 0.1, -1)).sum()
        for g in range(2)
        for v in range(6)
        if g != v
        for b in range(3)
    ]
    assert_close(cross_view_entropy(teacher, student, center, 0.1, 0.05), torch.stack(terms).mean())


def test_the_loss_has_the_right_gradient() -> None:
    teacher, student = torch.randn(2, 2, 3, dtype=torch.float64), torch.randn(3, 2, 3, dtype=torch.float64)
    center = torch.zeros(3, dtype=torch.float64)
    student.requires_grad_()
    assert gradcheck(lambda s: cross_view_entropy(teacher, s, center, 0.5, 0.4), student)


def test_the_center_follows_the_teacher_s_mean() -> None:  # known answer: Eq. (4)
    dino = tiny()
    dino.center.copy_(torch.arange(16.0))
    dino._teacher_sum, dino._teacher_count = torch.full((16,), 6.0), 3
    dino.after_step(0.0)
    assert_close(dino.center, 0.9 * torch.arange(16.0) + 0.1 * 2)


def test_the_teacher_follows_the_student() -> None:
    student = torch.nn.Linear(2, 2)
    teacher = Teacher(student)
    before = teacher.module.weight.clone()
    with torch.no_grad():
        student.weight.add_(1)
    teacher.update(student, 0.9)
    assert_close(teacher.module.weight, before + 0.1)
    teacher.train()
    assert not teacher.module.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_momentum_goes_from_its_start_to_one() -> None:
    assert_close([cosine_momentum(0.996, p) for p in (0.0, 0.5, 1.0)], [0.996, 0.998, 1.0])
    with pytest.raises(ConfigError, match="must lie in 0"):
        cosine_momentum(1.5, 0.0)


def test_the_teacher_temperature_warms_up_linearly() -> None:
    dino = tiny(warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_ratio=0.3)
    assert_close([dino.teacher_temp(p) for p in (0.0, 0.15, 0.3, 1.0)], [0.04, 0.055, 0.07, 0.07])


def test_prototypes_have_unit_length_and_a_fixed_gain() -> None:
    prototypes = Prototypes(8, 16)
    unit = F.normalize(torch.randn(5, 8), dim=-1)
    assert_close(prototypes(unit), unit @ F.normalize(prototypes.weight, dim=-1).T)
    assert not prototypes.gain.requires_grad
    assert Prototypes(8, 16, train_gain=True).gain.requires_grad


def test_the_last_layer_stays_fixed_at_first() -> None:
    dino = tiny(freeze_last_layer_ratio=0.1)
    for parameter in dino.parameters():
        parameter.grad = torch.ones_like(parameter)
    dino.after_backward(0.2)
    assert dino.student.prototypes.weight.grad is not None
    dino.after_backward(0.05)
    assert dino.student.prototypes.weight.grad is None
    assert dino.student.head.mlp[0].weight.grad is not None


def test_views_are_two_global_and_some_local_ones_on_the_patch_grid() -> None:
    crops = tiny().make_views(32)
    assert [(spec.count, spec.size) for spec in crops.specs] == [(2, 32), (6, 16)]
    assert crops.specs[0].blur_prob == (1.0, 0.1)
    assert crops.specs[0].solarize_prob == (0.0, 0.2)
    vit = build_encoder("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=3)
    assert DINO(vit, DINOConfig(num_prototypes=4)).make_views(224).specs[1].size == 96
    assert [spec.count for spec in tiny(num_local_views=0).make_views(32).specs] == [2]


def test_narrow_networks_start_larger_and_colours_may_be_mild() -> None:
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, seed=0)
    config = DINOConfig(num_prototypes=16, linear_init="fan_in", position_init="sincos", color_strength=0.5)
    method = DINO(encoder, config)
    for name, weight in method.student.named_parameters():
        if name.endswith(("fc1.weight", "proj.weight", "mlp.0.weight")):
            assert_close(weight.std().item(), weight[0].numel() ** -0.5, rtol=0.05, atol=0, msg=name)
    tokens, _ = encoder.embed_patches(torch.randn(64, 3, 32, 32))
    positions = encoder.positions((4, 4))[0]
    assert_close(positions.square().mean().sqrt(), tokens.square().mean().sqrt(), rtol=0.05, atol=0)
    assert positions.requires_grad
    assert torch.equal(method.teacher.module.encoder.vit.pos_embed, encoder.vit.pos_embed)
    for spec in method.make_views(32).specs:
        color = spec.color
        strengths = (color.brightness, color.contrast, color.saturation, color.hue)
        assert strengths == (0.2, 0.2, 0.1, 0.05) and (color.jitter_prob, color.gray_prob) == (0.8, 0.2)
    with pytest.raises(ConfigError, match=r"color_strength=-1\.0: a factor of at least 0"):
        tiny(color_strength=-1.0).make_views(32)


def test_the_recipe_is_the_official_run_of_300_epochs() -> None:
    config = resolve(read_yaml(find_recipe("dino_vits16")))
    epoch = 1_281_167 // config.batch_size  # the last, smaller batch is left out
    assert config.steps == 300 * epoch and config.batch_size == 1024
    shares = (config.optim.warmup_ratio, config.method.warmup_teacher_temp_ratio, config.method.freeze_last_layer_ratio)
    assert [round(300 * share, 1) for share in shares] == [10, 30, 1]  # epochs
    method = config.method
    assert (method.teacher_temp, method.norm_last_layer, method.num_local_views) == (0.07, False, 8)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be above 0"):
        tiny(teacher_temp=0.0)
    with pytest.raises(ConfigError, match=r"momentum=.* is needed"):
        tiny(momentum=2.0)


def resampled(row: torch.Tensor, length: int) -> torch.Tensor:
    """A row of values at another length: cubic convolution (a = -0.75) at steps of ``m / (n + 0.1)``, tap by tap."""
    values = []
    for place in range(length):
        source = (place + 0.5) * len(row) / (length + 0.1) - 0.5
        taps = [math.floor(source) + shift for shift in (-1, 0, 1, 2)]
        dists = [abs(source - tap) for tap in taps]
        weights = [1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4) for d in dists]
        values.append(sum(w * row[min(max(tap, 0), len(row) - 1)] for w, tap in zip(weights, taps, strict=True)))
    return torch.stack(values)


@pytest.mark.parametrize("cls", [DINO, IBOT, DINOv2])
def test_positions_of_local_views_are_those_of_the_released_code(cls: type[Method]) -> None:  # bicubic, plain, + 0.1
    method = tiny() if cls is DINO else tiny_masked(cls)
    for network in (method.student, method.teacher.module):
        table = network.encoder.vit.pos_embed[0, 1:].unflatten(0, (4, 4)).detach()
        rows = torch.stack([resampled(column, 2) for column in table.unbind(1)], dim=1)
        cells = torch.stack([resampled(row, 2) for row in rows.unbind(0)])
        assert_close(network.encoder.positions((2, 2))[0][0], cells.flatten(0, 1), rtol=0, atol=1e-6)


def test_exports_and_rebuilt_encoders_resample_positions_alike(tmp_path: Path) -> None:
    encoder = tiny().student.encoder.eval()
    export_timm(encoder, tmp_path / "exported")
    images = torch.randn(1, 3, 16, 16)
    exported = load(tmp_path / "exported" / "model.safetensors", quiet=True)
    assert_close(exported.encode(images).patches, encoder.encode(images).patches, rtol=0, atol=1e-6)
    assert encoder_from_config(encoder.config()).pos_resampling == Resampling("bicubic", False, 0.1)


def test_a_pretrained_encoder_keeps_its_resampling() -> None:
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, seed=0
    )
    encoder.pretrained = True
    DINO(encoder, DINOConfig(num_prototypes=16))
    assert encoder.pos_resampling == Resampling("bicubic", True, 0.0)
