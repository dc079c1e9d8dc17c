"""Masks of blocks, dealt out over a batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalti.functional.masking import block_mask, stratified_counts
from smalti.functional.random import sample_uniform


def by_plain_loops(key: int, count: int, grid: tuple[int, int], smallest: float, largest: int | None) -> torch.Tensor:
    """The sampler of BEiT and its heirs, rectangle by rectangle, from the same numbers."""
    height, width = grid
    mask, left, misses = torch.zeros(grid, dtype=torch.bool), count, 0
    stream, draws = 0, []
    while left > 0 and misses < 10:
        if not draws:
            numbers = sample_uniform(torch.tensor([key]), 64, stream)[0].double().tolist()
            draws = [numbers[i : i + 4] for i in range(0, 64, 4)]
            stream += 1
        size, shape, y, x = draws.pop(0)
        most = left if largest is None else min(left, largest)
        area = smallest + size * (most - smallest)
        ratio = math.exp(math.log(0.3) + (1 - shape) * (math.log(1 / 0.3) - math.log(0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        misses += 1
        if h < height and w < width:
            top, start = int(y * (height - h + 1)), int(x * (width - w + 1))
            box = torch.zeros(grid, dtype=torch.bool)
            box[top : top + h, start : start + w] = True
            new = int((box & ~mask).sum())
            if 0 < new <= left:
                mask |= box
                left, misses = left - new, 0
    return mask.flatten()


@given(
    seed=st.integers(0, 2**40),
    height=st.integers(3, 14),
    width=st.integers(3, 14),
    share=st.floats(0, 1),
    smallest=st.sampled_from([1.0, 4.0, 9.0]),
    capped=st.booleans(),
)
def test_blocks_are_those_of_the_sampler_by_plain_loops(
    seed: int, height: int, width: int, share: float, smallest: float, capped: bool
) -> None:
    grid, largest = (height, width), height * width // 2 if capped else None
    keys = torch.arange(seed, seed + 3)
    counts = torch.tensor([0, int(share * height * width), int(height * width / 3)])
    masks = block_mask(keys, counts, grid, smallest=smallest, largest=largest)
    for key, count, mask in zip(keys.tolist(), counts.tolist(), masks, strict=True):
        assert torch.equal(mask, by_plain_loops(key, count, grid, smallest, largest))
        assert mask.sum() <= count


def test_most_of_the_count_is_reached_alike_on_both_sides() -> None:
    counts = torch.full((4000,), 59)  # 30 % of 14 x 14
    masks = block_mask(torch.arange(4000), counts, (14, 14), smallest=4, largest=98)
    assert masks.sum(1).double().mean() > 0.9 * 59
    frequency = masks.double().mean(0).reshape(14, 14)
    assert frequency.min() > 0
    for mirrored in (frequency.flip(0), frequency.flip(1), frequency.T):
        assert (frequency - mirrored).abs().max() < 6 * math.sqrt(0.25 * 2 / 4000)  # six deviations


def test_blocks_are_no_scattered_patches() -> None:
    masks = block_mask(torch.arange(200), torch.full((200,), 59), (14, 14), smallest=4).reshape(-1, 14, 14)
    alike = (masks[:, :, 1:] == masks[:, :, :-1]).double().mean()
    assert alike > 0.75  # 0.58 for independent patches


@given(m=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_as_many_views_as_are_asked_for_are_masked_one_from_each_stratum(m: int, share: float, seed: int) -> None:
    num_masked, noise = int(m * share), torch.rand(m, 2, generator=torch.Generator().manual_seed(seed))
    counts = stratified_counts(noise, num_masked, (0.1, 0.5), 196)
    edges = torch.linspace(0.1, 0.5, num_masked + 1, dtype=torch.float64) * 196
    reached = counts[counts > 0].sort().values
    assert len(reached) == num_masked
    for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), reached.tolist(), strict=True):
        assert math.floor(low - 1e-9) <= count <= high
    others = stratified_counts(noise, m - num_masked, (0.1, 0.5), 196, from_end=True)
    assert ((counts > 0) ^ (others > 0)).all()  # each view in one of both


@pytest.mark.parametrize("num_masked", [0, 4])
def test_which_views_are_masked_is_random(num_masked: int) -> None:
    noise = torch.rand(500, 8, 2, generator=torch.Generator().manual_seed(0))
    masked = torch.stack([stratified_counts(one, num_masked, (0.1, 0.5), 196) > 0 for one in noise])
    assert (masked.double().mean(0) - num_masked / 8).abs().max() < 0.08
