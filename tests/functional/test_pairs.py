"""Pairs of patches and the targets on them, against their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from smalti.errors import ConfigError, ShapeError
from smalti.functional.offgrid import PatchSampler, grid_boxes, offgrid_boxes, scaled_boxes
from smalti.functional.pairs import (
    gather_pairs,
    offset_floor,
    offset_units,
    r_squared,
    relative_angles,
    relative_offsets,
    relative_sizes,
    select_pairs,
    turn_offsets,
)
from smalti.functional.positions import sincos_at, sincos_positions
from smalti.functional.random import fork_keys

KEY = torch.arange(1)


def all_pairs(num_patches: int) -> torch.Tensor:
    return select_pairs(KEY, num_patches, num_patches**2)


def dense(values: torch.Tensor) -> torch.Tensor:
    """``(B, N * N, C) -> (B, N, N, C)``."""
    side = int(values.shape[1] ** 0.5)
    return values.view(len(values), side, side, -1)


@given(n=st.integers(2, 12), fraction=st.floats(0.01, 1.0), seed=st.integers(0, 2**31))
def test_pairs_are_different_and_cover_what_they_should(n: int, fraction: float, seed: int) -> None:
    count = max(1, int(fraction * n * n))
    pairs = select_pairs(torch.arange(3) + seed, n, count)
    assert pairs.shape == (3, count, 2)
    assert pairs.min() >= 0 and pairs.max() < n
    for one in pairs.tolist():
        assert len({tuple(pair) for pair in one}) == count


def test_pairs_are_uniform_and_repeat_only_with_replacement() -> None:
    keys = torch.arange(4000)
    for replacement in (False, True):
        pairs = select_pairs(keys, 3, 4, replacement=replacement)
        counts = torch.bincount((pairs[..., 0] * 3 + pairs[..., 1]).flatten(), minlength=9).float()
        assert_close(counts, torch.full((9,), 4000 * 4 / 9), rtol=0.08, atol=0)
    assert select_pairs(keys[:1], 3, 50, replacement=True).shape == (1, 50, 2)


def test_more_pairs_than_there_are_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_pairs=17: 4 patches have 1..16 different pairs"):
        select_pairs(KEY, 4, 17)


def test_all_images_share_the_pairs() -> None:
    values, pairs = torch.randn(3, 5, 2), select_pairs(KEY, 5, 7)
    own, other = gather_pairs(values, pairs)
    for k, (i, j) in enumerate(pairs[0].tolist()):
        assert torch.equal(own[:, k], values[:, i]) and torch.equal(other[:, k], values[:, j])


def test_offsets_of_two_patches_by_hand() -> None:  # known answer: x first, j as seen from i
    boxes = torch.tensor([[[0.0, 8, 16, 24], [32, 0, 48, 16]]])
    pairs = torch.tensor([[[0, 1], [1, 0], [0, 0]]])
    for normalize, x, y in (("patch", 2.0, -0.5), ("image", 32 / 64, -8 / 80)):
        units = offset_units(boxes, pairs, normalize, (80, 64))
        offsets = relative_offsets(boxes, pairs, units)
        assert_close(offsets, torch.tensor([[[x, y], [-x, -y], [0, 0]]]))


def test_offsets_are_antisymmetric_and_add_up_exactly() -> None:
    boxes = offgrid_boxes(torch.arange(4), 20, (224, 224), (16, 16))
    pairs = all_pairs(20)
    table = dense(relative_offsets(boxes, pairs, offset_units(boxes, pairs, "patch", (224, 224))))
    assert torch.equal(table, -table.transpose(1, 2))
    assert table.diagonal(dim1=1, dim2=2).abs().max() == 0
    assert torch.equal(table[:, 1, 2] + table[:, 2, 3], table[:, 1, 3])
    assert table.dtype == torch.float32 and table.abs().max() <= 13


def test_targets_of_boxes_of_several_sizes_keep_their_laws() -> None:
    boxes = scaled_boxes(torch.arange(4), 20, (64, 64), (4, 16))
    pairs, side = all_pairs(20), boxes[..., 2:] - boxes[..., :2]
    offsets = dense(relative_offsets(boxes, pairs, offset_units(boxes, pairs, "patch", (64, 64))))
    pixels = offsets * side[:, :, None]  # Delta_ij * w_i = -Delta_ji * w_j
    assert_close(pixels, -pixels.transpose(1, 2), rtol=0, atol=1e-4)
    ratio, log = dense(relative_sizes(boxes, pairs, log=False)), dense(relative_sizes(boxes, pairs))
    assert_close(ratio * ratio.transpose(1, 2), torch.ones_like(ratio))
    assert_close(log, -log.transpose(1, 2), rtol=0, atol=1e-6)
    assert_close(ratio.diagonal(dim1=1, dim2=2), torch.ones(4, 2, 20))
    fractions = offsets - offsets.trunc()
    assert (fractions.abs() > 1e-3).float().mean() > 0.5  # the released code's table of whole numbers loses these


@pytest.mark.parametrize(
    ("size", "side", "on_grid", "floor", "with_diagonal"),
    [
        (32, 4, False, 8.750, 8.61),
        (224, 16, False, 28.438, 28.29),
        (32, 4, True, 10.667, 10.50),
        (224, 16, True, 32.667, 32.50),
    ],
)  # known answers
def test_floors_are_what_a_constant_pays(
    size: int, side: int, on_grid: bool, floor: float, with_diagonal: float
) -> None:
    n = (size // side) ** 2
    assert_close(offset_floor(size, side, n, on_grid=on_grid, diagonal=False), floor, rtol=0, atol=1e-3)
    assert_close(offset_floor(size, side, n, on_grid=on_grid), with_diagonal, rtol=0, atol=5e-3)
    keys = torch.arange(10 if on_grid else 1200 if n < 100 else 600)
    images = torch.zeros(1, 1, size, size).expand(len(keys), -1, -1, -1)
    boxes = PatchSampler((side, side), "grid" if on_grid else "offgrid").boxes(keys, images)
    pairs = all_pairs(n)
    mean = torch.stack(  # in parts: all pairs of all images take memory
        [
            relative_offsets(some, pairs, offset_units(some, pairs, "patch", (size, size))).square().mean((0, 1))
            for some in boxes.split(10)
        ]
    ).mean(0)
    assert_close(mean, torch.full((2,), with_diagonal), rtol=0.01, atol=0)


def test_r_squared_of_the_truth_of_the_mean_and_of_a_channel_without_spread() -> None:
    target = torch.randn(4, 50, 2)
    assert_close(r_squared(target, target), torch.ones(2))
    assert_close(r_squared(target.mean((0, 1)).expand_as(target), target), torch.zeros(2), rtol=0, atol=1e-6)
    assert r_squared(target, torch.zeros_like(target)).isnan().all()


def test_angles_and_turned_offsets() -> None:
    angles = torch.tensor([[0.0, torch.pi / 2]])
    pairs = torch.tensor([[[0, 1], [1, 0]]])
    assert_close(relative_angles(angles, pairs), torch.tensor([[[0.0, 1], [0, -1]]]), rtol=0, atol=1e-6)
    turned = turn_offsets(torch.tensor([[[1.0, 0]]]), torch.tensor([[torch.pi / 2]]))
    assert_close(turned, torch.tensor([[[0.0, 1]]]), rtol=0, atol=1e-6)  # from x to y
    assert_close(turn_offsets(turned, torch.tensor([[-torch.pi / 2]])), torch.tensor([[[1.0, 0]]]), rtol=0, atol=1e-6)


def test_codes_of_places_are_those_of_the_grid() -> None:
    boxes = grid_boxes((24, 32), (8, 8))
    cells = (boxes[:, :2] + boxes[:, 2:]) / 2 / 8 - 0.5
    assert torch.equal(sincos_at(cells, 24), sincos_positions(24, (3, 4)))
    with pytest.raises(ShapeError, match="a multiple of 4 is needed"):
        sincos_at(cells, 6)


def test_keys_of_a_second_view_are_others() -> None:
    keys = torch.arange(100)
    assert torch.equal(fork_keys(keys, 0), keys)
    assert len({*fork_keys(keys, 1).tolist(), *fork_keys(keys, 2).tolist(), *keys.tolist()}) == 300
