"""Stochastic depth computes kept samples only, and draws them from the whole step."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import DropPath
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import nn
from torch.testing import assert_close

from smalti.layers.stochastic_depth import (
    Kept,
    StepPart,
    StochasticDepth,
    choose_kept,
    draw_kept,
    part_of_step,
    run_kept,
    set_rates,
)

ROPE = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
KINDS = {
    "plain": (lambda: Block(12, 3, init_values=0.5), None),
    "post norm": (lambda: ResPostBlock(12, 3), None),
    "eva": (lambda: EvaBlock(12, 3, init_values=0.5, num_prefix_tokens=1), ROPE),
    "eva, positions of each sample": (
        lambda: EvaBlock(12, 3, num_prefix_tokens=1),
        torch.stack([ROPE * factor for factor in (1, 2, 3, 4)])[:, None],
    ),
    "eva, post norm": (lambda: EvaBlockPostNorm(12, 3, num_prefix_tokens=1), ROPE),
    "parallel": (lambda: ParallelScalingBlock(12, 3), None),
    "pairs": (lambda: ParallelThingsBlock(12, 3, num_parallel=2), None),
}


def no_mask(samples: torch.Tensor, ids: torch.Tensor) -> None:
    return None


def of(places: list[int], scale: float) -> Kept:
    return Kept(torch.tensor(places), scale)


class Mask(nn.Module):
    """DropPath with a given mask."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.new_zeros(len(x), 1, 1).index_fill(0, self.kept.ids, self.kept.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_drop_path_with_the_same_mask(kind: str) -> None:
    torch.manual_seed(0)
    make, rope = KINDS[kind]
    block: Any = make().double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    is_whole = kind in ("parallel", "pairs")  # blocks without two branches are dropped as a whole
    kept = (of([0, 2], 4 / 3), of([0, 2], 4 / 3) if is_whole else of([1, 2, 3], 4 / 3))
    x = torch.randn(4, 6, 12, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    options = {} if rope is None else {"rope": rope}

    def masked() -> torch.Tensor:
        if is_whole:
            return x + Mask(kept[0])(block(x) - x)
        block.drop_path1, block.drop_path2 = map(Mask, kept)
        return block(x, **options)

    found = []
    for out in (run_kept(block, x, kept, no_mask, rope), masked()):
        found.append([out, *torch.autograd.grad((out * torch.arange(12)).sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_attention_masks_are_those_of_the_kept_samples() -> None:
    torch.manual_seed(0)
    block: Any = Block(12, 3).double()
    x, is_key = torch.randn(4, 6, 12, dtype=torch.float64), torch.rand(4, 6) < 0.6
    is_key[:, 0] = True
    kept = (of([1, 3], 2.0), of([0], 2.0))
    ours = run_kept(block, x, kept, lambda samples, ids: is_key[ids][:, None, None])
    block.drop_path1, block.drop_path2 = map(Mask, kept)
    assert_close(ours, block(x, attn_mask=is_key[:, None, None]), rtol=1e-11, atol=1e-11)


def test_the_mean_over_all_subsets_is_the_whole_block() -> None:
    torch.manual_seed(0)
    block = Block(12, 3).double()
    x = torch.randn(6, 4, 12, dtype=torch.float64)
    block.mlp = nn.Identity()  # the second branch is not linear in the output of the first
    block.norm2 = nn.Identity()
    subsets = [of(list(subset), 2.0) for subset in itertools.combinations(range(6), 3)]
    everything = of(list(range(6)), 1.0)
    mean = torch.stack([run_kept(block, x, (one, everything), no_mask) for one in subsets]).mean(0)
    assert_close(mean, block(x), rtol=1e-12, atol=1e-12)


@given(count=st.integers(1, 300), drop_prob=st.floats(0.01, 0.95), key=st.integers(0, 2**62))
def test_a_fixed_number_is_kept_up_to_rounding(count: int, drop_prob: float, key: int) -> None:
    kept = int(choose_kept(key, count, drop_prob, 0).sum())
    assert count * (1 - drop_prob) - 1 < kept < count * (1 - drop_prob) + 1


@pytest.mark.parametrize(("count", "drop_prob"), [(1, 0.3), (5, 0.1), (16, 0.07)])
def test_each_sample_is_kept_with_probability_one_minus_the_rate_at_any_batch_size(
    count: int, drop_prob: float
) -> None:
    kept = torch.stack([choose_kept(key, count, drop_prob, 3) for key in range(4000)]).double()
    noise = (drop_prob * (1 - drop_prob) / 4000) ** 0.5
    assert (kept.mean(0) - (1 - drop_prob)).abs().max() < 4.5 * noise


def test_branches_steps_and_passes_draw_apart() -> None:
    draws = [choose_kept(key, 64, 0.5, stream) for key, stream in ((1, 0), (2, 0), (1, 1), (1, 1 << 20))]
    for one, other in itertools.combinations(draws, 2):
        assert 16 < int((one == other).sum()) < 48


@pytest.mark.parametrize("views", [1, 3])
def test_parts_of_a_step_draw_what_the_whole_step_draws(views: int) -> None:
    depth, device = StochasticDepth(0.4, 5), torch.device("cpu")

    def drawn(first: int, count: int) -> torch.Tensor:
        part = StepPart(11, 8, first, count)
        with part_of_step(part):
            both = [depth.draw(views * count, device) for _ in range(2)]  # as two forward passes in a step do
        factors = [torch.zeros(views * count).index_fill(0, one.ids, one.scale) for one in both]
        return torch.stack(factors).view(2, views, count)

    whole = drawn(0, 8)
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(torch.cat([drawn(first, 2) for first in (0, 2, 4, 6)], dim=2), whole)
    assert torch.equal(torch.cat([drawn(first, 1) for first in range(8)], dim=2), whole)  # some of one without any


def test_without_a_kept_sample_every_parameter_has_a_gradient_of_zero() -> None:
    block, x = Block(12, 3), torch.randn(3, 4, 12)
    nothing = of([0], 0.0)
    out = run_kept(block, x, (nothing, nothing), no_mask)
    assert torch.equal(out, x)
    out.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in block.parameters())


def test_rates_grow_and_replace_those_of_timm() -> None:
    blocks = nn.Sequential(*(Block(12, 3, drop_path=0.5) for _ in range(3)))
    set_rates(blocks, 0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])
    set_rates(blocks, 0.0)
    pairs = nn.Sequential(ParallelThingsBlock(12, 3, drop_path=0.5))
    set_rates(pairs, 0.0)
    assert not any(isinstance(module, (DropPath, StochasticDepth)) for module in [*blocks.modules(), *pairs.modules()])


def test_only_training_draws() -> None:
    blocks = nn.Sequential(Block(12, 3), Block(12, 3))
    set_rates(blocks, 0.5)
    x = torch.randn(4, 3, 12)
    assert draw_kept(blocks[0], x) is None  # the first has a rate of 0
    assert draw_kept(blocks[1], x) is not None
    blocks.eval()
    assert draw_kept(blocks[1], x) is None
    assert torch.equal(blocks[1].drop_path1(x), x)
