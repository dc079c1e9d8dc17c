"""Patches, masks, positions and per-sample random numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.testing import assert_close

from smalti.errors import ConfigError, ShapeError
from smalti.functional.masking import cross_mask, random_mask, restore_order
from smalti.functional.patches import patchify, standardize_patches, unpatchify
from smalti.functional.positions import sincos_positions
from smalti.functional.random import place_keys, sample_beta, sample_normal, sample_uniform, step_key
from smalti.functional.transfer import move


@given(b=st.integers(1, 3), c=st.integers(1, 4), h=st.integers(1, 4), w=st.integers(1, 4), p=st.integers(1, 5))
def test_patches_go_back_to_the_image(b: int, c: int, h: int, w: int, p: int) -> None:
    images = torch.randn(b, c, h * p, w * (p + 1))
    assert_close(unpatchify(patchify(images, (p, p + 1)), (p, p + 1), (h, w)), images)


def test_patches_are_in_raster_order_and_ordered_as_a_convolution() -> None:
    images = torch.arange(2 * 4 * 4.0).view(1, 2, 4, 4)
    patches = patchify(images, (2, 2))
    assert_close(patches[0, 1], torch.tensor([2.0, 3, 6, 7, 18, 19, 22, 23]))
    kernel = torch.randn(5, 2, 2, 2)
    by_convolution = torch.nn.functional.conv2d(images, kernel, stride=2).flatten(2).transpose(1, 2)
    assert_close(patches @ kernel.flatten(1).T, by_convolution)


def test_a_patch_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ShapeError, match="5x4 pixels, which a patch of 2x2 does not divide"):
        patchify(torch.zeros(1, 1, 5, 4), (2, 2))
    with pytest.raises(ShapeError, match="don't make a 2x2 grid"):
        unpatchify(torch.zeros(1, 3, 4), (2, 2), (2, 2))


def test_standardised_patches_use_the_unbiased_variance() -> None:
    patches = torch.tensor([[[1.0, 2, 3, 6]]])
    expected = (patches - 3) / math.sqrt(14 / 3 + 1e-6)
    assert_close(standardize_patches(patches), expected)


@given(b=st.integers(1, 4), n=st.integers(2, 64), share=st.floats(0.01, 1.0), seed=st.integers(0, 2**31))
def test_visible_tokens_return_to_their_places(b: int, n: int, share: float, seed: int) -> None:
    num_keep = max(1, int(n * share))
    tokens = torch.randn(b, n, 3)
    noise = sample_uniform(torch.arange(b) + seed, n)
    ids_keep, mask, ids_restore = random_mask(noise, num_keep)
    kept = tokens.gather(1, ids_keep[..., None].expand(-1, -1, 3))
    restored = restore_order(kept, torch.zeros(b, n - num_keep, 3), ids_restore)
    assert_close(restored, tokens * ~mask[..., None])
    assert mask.sum(1).tolist() == [n - num_keep] * b


def test_masking_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves 0 of 4"):
        random_mask(torch.rand(2, 4), 0)


@given(grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), share=st.floats(0, 1), seed=st.integers(0, 2**40))
def test_crosses_hide_as_many_patches_as_asked(grid: tuple[int, int], share: float, seed: int) -> None:
    num_patches = grid[0] * grid[1]
    counts = torch.tensor([int(share * num_patches), num_patches, 0, 1])
    mask = cross_mask(torch.arange(4) + seed, counts, grid)
    assert torch.equal(mask.sum(1), counts)


@given(seed=st.integers(0, 2**40), crosses=st.integers(1, 4))
def test_whole_crosses_are_whole_rows_and_columns(seed: int, crosses: int) -> None:  # known answer: 27, 52, 75, 96
    count = crosses * (28 - crosses)
    mask = cross_mask(torch.tensor([seed]), torch.tensor([count]), (14, 14))[0].view(14, 14)
    assert mask.all(0).sum().item() == mask.all(1).sum().item() == crosses
    assert torch.equal(mask, mask.all(0)[None] | mask.all(1)[:, None])


def test_the_last_cross_is_cut_to_a_plus_about_its_centre() -> None:
    for seed in range(20):
        mask = cross_mask(torch.tensor([seed]), torch.tensor([9]), (14, 14))[0].view(14, 14)
        row, column = mask.sum(1).argmax(), mask.sum(0).argmax()
        y, x = mask.nonzero().T
        assert ((y == row) | (x == column)).all()
        dist = (y - row).abs() + (x - column).abs()
        near = [d for d in (1, 2) if min(row, 13 - row, column, 13 - column) >= d]
        assert all((dist == d).sum().item() == 4 for d in near)
    assert len({tuple(cross_mask(torch.tensor([s]), torch.tensor([3]), (5, 5))[0].tolist()) for s in range(30)}) > 20


def test_every_patch_is_the_centre_of_a_first_cross_equally_often() -> None:
    keys = torch.arange(9000)
    single = cross_mask(keys, torch.ones(9000, dtype=torch.int64), (3, 3))
    shares = single.float().mean(0)
    assert (shares - 1 / 9).abs().max().item() < 0.015  # 4.5 standard errors


def test_order_statistics_have_the_beta_law() -> None:
    draws = sample_beta(torch.arange(40_000), 2, 5)
    assert draws.mean().item() == pytest.approx(2 / 7, abs=0.004)
    assert draws.std().item() == pytest.approx(math.sqrt(10 / 392), abs=0.003)
    assert (draws < 0.3).float().mean().item() == pytest.approx(0.579825, abs=0.012)  # 1 - 0.7^6 - 6 * 0.3 * 0.7^5


def test_sincos_positions_by_hand() -> None:
    table = sincos_positions(8, (2, 3))
    column, row = 2, 1
    expected = [math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100)]
    expected += [math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)]
    assert_close(table[row * 3 + column], torch.tensor(expected))
    with pytest.raises(ShapeError, match="a multiple of 4 is needed"):
        sincos_positions(6, (2, 2))


def test_a_sample_s_numbers_do_not_depend_on_its_batch() -> None:
    keys = torch.tensor([5, 2**62, -3, 0])
    together = sample_uniform(keys, 100)
    alone = torch.cat([sample_uniform(key[None], 100) for key in keys])
    assert torch.equal(together, alone)
    assert torch.equal(together[:, :10], sample_uniform(keys, 10))
    assert not torch.equal(together, sample_uniform(keys, 100, stream=1))


def test_a_sample_s_numbers_are_uniform_and_independent() -> None:
    values = sample_uniform(torch.arange(2000), 50)
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, 20, 0, 1)
    chi_square = ((counts - 5000) ** 2 / 5000).sum()
    assert chi_square < 43.8  # 99.9 % of chi-square with 19 degrees of freedom
    for a, b in ((values[:, 0], values[:, 1]), (values[:-1, 0], values[1:, 0])):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.075  # 3.3 standard errors


def test_normal_numbers_follow_the_normal_law_and_their_keys() -> None:
    draws = sample_normal(torch.arange(500), 400)
    assert draws.dtype == torch.float32 and draws.isfinite().all()
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 0.01
    assert torch.equal(draws[7:8], sample_normal(torch.tensor([7]), 400))
    assert abs(torch.corrcoef(draws[:2])[0, 1].item()) < 0.2


@given(progress=st.floats(0, 1))
def test_a_step_s_key_is_the_bits_of_its_progress(progress: float) -> None:
    assert torch.equal(step_key(progress), torch.tensor([progress], dtype=torch.float64).view(torch.int64))


def test_what_is_on_the_device_already_is_moved_as_it_is() -> None:
    x = torch.rand(3)
    assert move(x, torch.device("cpu")) is x


def test_every_place_of_every_sample_has_a_key_of_its_own() -> None:
    keys = place_keys(torch.arange(100), 64)
    assert keys.unique().numel() == 6400
    assert torch.equal(keys[3:4, :5], place_keys(torch.tensor([3]), 5))
