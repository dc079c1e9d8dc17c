"""CoMAE against what its paper fixes and against closed forms; nothing may leak from a target into its own row."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.functional.random import sample_normal
from smalti.layers.rotary_blocks import RotaryBlocks
from smalti.layers.tokens import PatchTokenSource
from smalti.methods.comae import (
    CoMAE,
    CoMAEConfig,
    CrossReconstructor,
    contrast,
    corrupt,
    mask_entropy,
    select_weights,
    signal_ratio,
)
from smalti.training.optim import OptimConfig, apply_schedules, build_optimizer

SMALL: dict[str, Any] = {
    "encoder_dim": 16,
    "encoder_depth": 2,
    "encoder_num_heads": 2,
    "decoder_dim": 16,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}


def comae(grid: int = 3, seed: int = 0, **config: object) -> CoMAE:
    torch.manual_seed(seed)
    return CoMAE(PatchTokenSource(2 * grid, 1, 2), CoMAEConfig(**{**SMALL, **config}))


def batch(count: int = 4, side: int = 6, seed: int = 0) -> Views:
    generator = torch.Generator().manual_seed(seed)
    return Views(
        crops=(torch.rand(count, 1, side, side, generator=generator),),
        boxes=torch.zeros(count, 4),
        flips=torch.zeros(count, dtype=torch.bool),
        source_size=torch.full((count, 2), side),
        index=torch.arange(count),
        keys=torch.arange(count) + 100 * seed,
    )


@pytest.mark.parametrize("readout", ["removed", "cross"])
def test_nothing_of_a_target_reaches_its_own_row(readout: str) -> None:
    method = comae(readout=readout)
    tokens = torch.randn(1, 9, 4, requires_grad=True)
    targets = torch.arange(9)[None]
    rows = method.selector(tokens, targets)
    for n in range(9):
        (grad,) = torch.autograd.grad(rows[0, n].sum(), tokens, retain_graph=True)
        assert torch.equal(grad[0, n], torch.zeros(4)), n
        assert (grad[0].abs().sum(-1) > 0).sum() == 8, n
    changed = tokens.detach().clone()
    changed[0, 3] += 5
    again = method.selector(changed, targets)
    assert torch.equal(again[0, 3], rows[0, 3])
    assert not any(torch.equal(again[0, n], rows[0, n]) for n in range(9) if n != 3)


@pytest.mark.parametrize("readout", ["removed", "cross"])
def test_nothing_of_a_target_reaches_its_own_reconstruction(readout: str) -> None:
    method = comae(readout=readout)
    tokens = torch.randn(2, 9, 4, requires_grad=True)
    keys = torch.arange(2)
    selection = method.select(tokens, keys)
    seen: list[torch.Tensor] = []
    handle = method.reconstructor.register_forward_hook(lambda _, inputs, output: seen.append(output))
    method.reconstruction(tokens, selection, keys)
    handle.remove()
    for place, n in enumerate(selection.targets[0].tolist()):
        (grad,) = torch.autograd.grad(seen[0][0, place].sum(), tokens, retain_graph=True)
        assert torch.equal(grad[0, n], torch.zeros(4)) and torch.equal(grad[1], torch.zeros(9, 4))
        assert (grad[0].abs().sum(-1) > 0).sum() == 8


def test_all_reconstructions_in_one_pass_are_those_of_one_target_at_a_time() -> None:
    method = comae(readout="cross", num_targets=9).eval()
    network, sigma = method.reconstructor, method.config.sigma
    assert isinstance(network, CrossReconstructor)
    generator = torch.Generator().manual_seed(0)
    tokens, noise = (torch.randn(2, 9, 4, generator=generator) for _ in range(2))
    targets = torch.stack([torch.randperm(9, generator=generator) for _ in range(2)])
    weights = torch.rand(2, 9, 9, generator=generator)
    made = network(tokens, noise, signal_ratio(weights, sigma), targets)
    for b in range(2):
        for t, n in enumerate(targets[b].tolist()):
            others = [j for j in range(9) if j != n]
            corrupted = corrupt(tokens[b], weights[b, t], noise[b], sigma)
            keys = (network.embed(corrupted) + network.places)[others]  # the target is not among them
            query = (network.tgt_token + network.targets[n])[None]
            for block in network.blocks:
                q = block.query(block.norm(query)).view(1, 2, 8).transpose(0, 1)
                k, v = (part.view(8, 2, 8).transpose(0, 1) for part in block.key_value(keys).chunk(2, -1))
                read = torch.nn.functional.scaled_dot_product_attention(q, k, v)
                query = query + block.out(read.transpose(0, 1).flatten(1))
                query = query + block.mlp(block.mlp_norm(query))
            assert_close(made[b, t], network.head(network.norm(query))[0], atol=1e-5, rtol=1e-4)


def test_one_pass_gives_the_rows_of_one_target_at_a_time() -> None:
    method = comae(readout="cross").eval()
    tokens = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    every = torch.arange(9).expand(2, -1)
    whole = method.selector(tokens, every)
    for n in range(9):
        assert_close(method.selector(tokens, every[:, n : n + 1])[:, 0], whole[:, n])


def test_selections_are_priced_after_the_budget_has_fallen() -> None:
    method = comae(budget=0.0, budget_ramp=(0.5, 1.0), budget_weight=1.0)
    views = batch(3)
    mean = method.select(method.tokens.encode(views.global_crops), views.keys).weights.sum(-1) / 8
    for progress, budget in ((0.0, 1.0), (0.5, 1.0), (0.75, 0.5), (1.0, 0.0)):
        assert_close(method(views, progress)["budget"], 4 * (mean - budget).clamp(min=0).mean())
    with pytest.raises(ConfigError, match=r"budget_ramp=\[0.8, 0.4\]: the first number must not exceed the second"):
        comae(budget_ramp=(0.8, 0.4))


@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.3, 0.5])
def test_the_share_of_signal_and_its_slope(sigma: float) -> None:
    weights = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    alpha = signal_ratio(weights, sigma)
    assert_close(alpha[2], torch.tensor(1.0, dtype=torch.float64))
    assert_close(alpha[0], torch.tensor(math.exp(-1 / (2 * sigma**2)), dtype=torch.float64))
    (slope,) = torch.autograd.grad(alpha.sum(), weights)
    assert_close(slope, (alpha * (1 - weights) / sigma**2).detach())
    assert torch.autograd.gradcheck(lambda w: signal_ratio(w, sigma), (weights,))


@pytest.mark.parametrize(
    ("sigma", "at_zero", "at_half"),
    [(0.1, 2e-22, 3.7e-6), (0.2, 3.7e-6, 0.044), (0.3, 0.0039, 0.25), (0.5, 0.135, 0.61)],
)
def test_the_share_of_signal_at_known_places(sigma: float, at_zero: float, at_half: float) -> None:
    alpha = signal_ratio(torch.tensor([0.0, 0.5], dtype=torch.float64), sigma)
    assert alpha.tolist() == pytest.approx([at_zero, at_half], rel=0.05)


def test_what_is_selected_whole_comes_through_clean_and_what_is_not_is_noise() -> None:
    tokens, noise = torch.randn(5, 4), torch.randn(5, 4)
    assert_close(corrupt(tokens, torch.ones(5), noise, 0.3), tokens)
    alpha = math.exp(-1 / 0.18)
    assert_close(corrupt(tokens, torch.zeros(5), noise, 0.3), alpha * tokens + (1 - alpha) * noise)


def test_activations_land_in_zero_to_one() -> None:
    logits = torch.linspace(-20, 20, 81)
    for kind, expected in (
        ("half", (1 + torch.tanh(logits)) / 2),
        ("relu", torch.tanh(logits.clamp(min=0))),
        ("abs", torch.tanh(logits).abs()),
    ):
        weights = select_weights(logits, kind)
        assert_close(weights, expected, atol=1e-6, rtol=0)
        assert 0 <= float(weights.min()) and float(weights.max()) <= 1


def test_contrast_at_known_places() -> None:
    log_temperature = torch.tensor(0.1).log()
    same = torch.rand(9).expand(1, 6, 9)
    assert_close(contrast(same, log_temperature, 0.05), torch.tensor(math.log(6)))
    apart = torch.eye(6)[None]
    assert_close(
        contrast(apart, log_temperature, 0.05), torch.tensor(math.log(1 + 5 * math.exp(-10))), rtol=1e-3, atol=0
    )
    rows = torch.rand(2, 6, 9)
    scaled = rows * torch.rand(2, 6, 1).add(0.1)
    assert_close(contrast(rows, log_temperature, 0.05), contrast(scaled, log_temperature, 0.05))
    groups = torch.stack([contrast(rows[i : i + 1], log_temperature, 0.05) for i in range(2)])
    assert_close(contrast(rows, log_temperature, 0.05), groups.mean())


def test_a_temperature_below_the_floor_has_no_effect() -> None:
    rows = torch.rand(1, 6, 9)
    low = torch.tensor(1e-4).log().requires_grad_()
    loss = contrast(rows, low, 0.05)
    assert_close(loss, contrast(rows, torch.tensor(0.05).log(), 0.0))
    (grad,) = torch.autograd.grad(loss, low)
    assert float(grad) == 0
    high = torch.tensor(0.2).log().requires_grad_()
    (grad,) = torch.autograd.grad(contrast(rows, high, 0.05), high)
    assert float(grad) > 0


def test_entropy_of_selections_at_known_places() -> None:
    raw, effective = mask_entropy(torch.full((3, 8), 0.5))
    assert float(raw) == pytest.approx(8 * 0.5 * math.log(2)) and float(effective) == pytest.approx(8)
    raw, effective = mask_entropy(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    assert float(raw) == 0 and float(effective) == pytest.approx(2)


@pytest.mark.parametrize("readout", ["removed", "cross"])
def test_graphs_depend_on_neither_chunks_nor_batch(readout: str) -> None:
    method = comae(readout=readout).train()
    images = batch(5).global_crops
    whole = method.dependency(images)
    assert method.selector.training  # left as it was
    assert whole.shape == (5, 9, 9) and whole.dtype == torch.float32
    assert torch.equal(whole.diagonal(dim1=1, dim2=2), torch.zeros(5, 9))
    assert 0 <= float(whole.min()) and float(whole.max()) <= 1
    assert torch.equal(whole, method.dependency(images))
    for chunk in (1, 2, 4, 100):
        assert_close(method.dependency(images, chunk), whole, atol=2e-6, rtol=0)
    assert_close(method.dependency(images[2:3]), whole[2:3], atol=2e-6, rtol=0)


def test_one_step_is_a_plain_loop_over_images_and_targets() -> None:
    method = comae(num_targets=3)
    views = batch(2)
    losses = method(views, 0.0)
    tokens = method.tokens.encode(views.global_crops)
    errors, logs, means = [], [], []
    for b in range(2):
        key = views.keys[b : b + 1]
        drawn = method.select(tokens[b : b + 1], key).targets[0].tolist()
        assert len(set(drawn)) == 3
        noise = sample_normal(key, 3 * 8 * 4, 1).view(3, 8, 4)
        rows = []
        for place, n in enumerate(drawn):
            row = method.selector(tokens[b : b + 1], torch.tensor([[n]]))[0, 0]
            others = [j for j in range(9) if j != n]
            mixed = torch.stack(
                [
                    signal_ratio(row[j], 0.3) * tokens[b, j] + (1 - signal_ratio(row[j], 0.3)) * noise[place, i]
                    for i, j in enumerate(others)
                ]
            )
            made = method.reconstructor(mixed[None, None], torch.tensor([[n]]))[0, 0]
            errors.append((made - tokens[b, n]).abs().sum())
            means.append(row.sum() / 8)
            rows.append(row)
        for i in range(3):
            likeness = torch.stack([torch.cosine_similarity(rows[i], rows[j], dim=0) for j in range(3)])
            logs.append(-torch.log_softmax(likeness / 0.1, 0)[i])
    assert_close(losses["reconstruction"], torch.stack(errors).mean(), rtol=1e-5, atol=1e-6)
    assert_close(losses["contrast"], 0.01 * torch.stack(logs).mean(), rtol=1e-5, atol=1e-7)
    budget = torch.stack([(mean - 0.15).clamp(min=0) for mean in means]).mean()
    assert_close(losses["budget"], 0.25 * 4 * budget, rtol=1e-5, atol=1e-6)


def test_terms_of_no_weight_are_left_out() -> None:
    assert set(comae(contrast_weight=0.0, budget_weight=0.0)(batch(), 0.0)) == {"reconstruction"}
    image, whole = (comae(contrast_over=over)(batch(), 0.0)["contrast"].item() for over in ("image", "batch"))
    assert whole > image  # more rows to be told apart


def test_alternation_moves_one_network_at_a_time_and_the_temperature_with_the_selector() -> None:
    method = comae()
    optimizer = build_optimizer(method.param_groups(), OptimConfig(lr=1e-2, weight_decay=0.1))
    apply_schedules(optimizer, OptimConfig(lr=1e-2, weight_decay=0.1), peak=1e-2, progress=0.5)
    for step in range(4):
        before = {key: value.clone() for key, value in method.state_dict().items()}
        sum(method(batch(seed=step), 0.5).values()).backward()
        method.after_backward(0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(0.5)
        moved = {key for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
        moved.discard("steps_made")
        part = ("selector.", "log_temperature") if step % 2 == 0 else ("reconstructor.",)
        assert moved and all(key.startswith(part) for key in moved), step
        assert ("log_temperature" in moved) == (step % 2 == 0)
    assert int(method.steps_made) == 4


def test_alternation_continues_with_loaded_weights() -> None:
    method, resumed = comae(), comae()
    method.after_step(0.0)
    resumed.load_state_dict(method.state_dict())
    sum(resumed(batch(), 0.5).values()).backward()
    resumed.after_backward(0.5)
    assert all(parameter.grad is None for parameter in resumed.selector.parameters()), "an odd step"
    assert any(parameter.grad is not None for parameter in resumed.reconstructor.parameters())


def test_tables_of_places_are_not_decayed() -> None:
    method = comae()
    plain = {id(p) for group in method.param_groups() if not group["weight_decay_scale"] for p in group["params"]}
    assert id(method.selector.targets) in plain and id(method.reconstructor.targets) in plain
    assert id(method.selector.embed.weight) not in plain


def test_targets_are_drawn_evenly() -> None:
    method = comae(num_targets=2)
    views = batch(900)
    targets = method.select(method.tokens.encode(views.global_crops), views.keys).targets
    counts = torch.bincount(targets.flatten(), minlength=9).numpy()
    assert stats.chisquare(counts).pvalue > 1e-3


def test_rotary_blocks_know_places_and_not_the_sequence() -> None:
    torch.manual_seed(0)
    blocks = RotaryBlocks(16, 2, 2, (6, 6))
    sequence, places = torch.randn(1, 5, 16), torch.tensor([[0, 1, 6, 7]])
    assert (blocks(sequence, places) - blocks(sequence, places * 2)).abs().max() > 1e-3
    swapped = blocks(sequence[:, [0, 2, 1, 3, 4]], places[:, [1, 0, 2, 3]])
    assert_close(swapped[:, [0, 2, 1, 3, 4]], blocks(sequence, places), atol=1e-5, rtol=0)


def test_rotation_is_the_paper_s_on_both_axes() -> None:
    blocks = RotaryBlocks(8, 1, 1, (3, 4))
    sin, cos = blocks.turns.chunk(2, -1)
    for place in range(12):
        row, column = divmod(place, 4)
        angles = [row, row / 100, column, column / 100]  # 10000 ** -(0 / 2), 10000 ** -(1 / 2)
        assert_close(sin[place], torch.tensor(angles).repeat_interleave(2).sin(), atol=1e-6, rtol=0)
        assert_close(cos[place], torch.tensor(angles).repeat_interleave(2).cos(), atol=1e-6, rtol=0)


def test_it_says_what_its_graphs_lack() -> None:
    method = comae(num_diagnosed=8)
    with torch.no_grad():  # nothing but the bias is heard: the same graph for all images
        method.selector.head.weight.zero_()
        method.selector.head.bias.copy_(torch.linspace(-2, 2, 9))
    views = batch(8)
    early, late = method.diagnose(views, 0.1), method.diagnose(views, 0.9)
    assert not early.warnings and late.numbers["position_variance_ratio"] == pytest.approx(1)
    assert (
        list(late.warnings) == ["static order"]
        and "1.00 of the variance of ranks over 8 images" in late.warnings["static order"]
    )
    with torch.no_grad():
        method.selector.head.bias.zero_()
    flat = method.diagnose(views, 0.9)
    assert flat.numbers["score_spread"] < 1e-6 and list(flat.warnings) == ["degenerate graph"]
    assert not method.diagnose(batch(1), 0.9).numbers
    assert not comae(num_diagnosed=0).diagnose(views, 0.9).numbers


def test_it_learns_who_can_tell_a_target_apart(tmp_path: Path) -> None:
    """Patches come in equal pairs: each must select its twin."""
    method = comae(grid=2, alternate=False, num_targets=4, budget=0.3, contrast_weight=0.0)
    optim = OptimConfig(lr=3e-3, weight_decay=0.0)
    optimizer = build_optimizer(method.param_groups(), optim)
    rng = np.random.default_rng(0)
    for step in range(250):
        values = rng.normal(size=(64, 2, 2, 2))
        pairs = np.concatenate([np.concatenate([values[:, 0], values[:, 1]], 2)] * 2, 1)  # 0 = 2, 1 = 3
        pixels = torch.from_numpy(0.5 + 0.25 * pairs).float()[:, None]
        views = replace(batch(64, 4), crops=(pixels,), keys=torch.arange(64) + 64 * step)
        apply_schedules(optimizer, optim, peak=3e-3, progress=0.1)
        sum(method(views, 0.1).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    graph = method.dependency(views.global_crops).mean(0)
    assert graph.argmax(1).tolist() == [2, 3, 0, 1]
    assert float(graph[[0, 1, 2, 3], [2, 3, 0, 1]].min()) > 0.7


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sigma": 0.0}, "sigma=0.0: more than 0 is needed"),
        ({"budget": 1.5}, "CoMAEConfig.budget=1.5: at most 1 is needed"),
        ({"num_targets": 0}, "method.num_targets=0: at least 1"),
        ({"encoder_num_heads": 3}, "a multiple of 4 times the heads"),
        ({"contrast_weight": -1.0}, "contrast_weight=-1.0: at least 0 is needed"),
    ],
)
def test_settings_that_make_no_sense(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        comae(**config)
    with pytest.raises(ConfigError, match="comae needs at least 2 tokens"):
        comae(grid=1)
