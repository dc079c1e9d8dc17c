"""Orders of patches: by hand, against scipy, and the published orders' known curve."""

import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from smalti.errors import ConfigError, ShapeError
from smalti.functional.graphs import ranks_of
from smalti.functional.orders import (
    area_under,
    border_in,
    centre_out,
    fixed_random,
    halton,
    image_dependence,
    knee,
    neighbour_correlation,
    random_orders,
    rank_correlation,
    raster,
    spiral,
    static_order,
    top_overlap,
)

GEOMETRIC = [raster, centre_out, border_in, spiral, halton]


@pytest.mark.parametrize("order", GEOMETRIC)
@given(height=st.integers(1, 9), width=st.integers(1, 9))
def test_every_order_has_each_patch_once(order, height: int, width: int) -> None:  # type: ignore[no-untyped-def]
    assert order((height, width)).sort().values.tolist() == list(range(height * width))


def test_geometry_by_hand() -> None:
    assert centre_out((3, 3)).tolist() == [4, 1, 3, 5, 7, 0, 2, 6, 8]
    assert border_in((3, 3)).tolist() == [0, 2, 6, 8, 1, 3, 5, 7, 4]
    assert spiral((3, 3)).tolist() == [4, 3, 6, 7, 8, 5, 2, 1, 0]
    assert spiral((2, 3)).tolist() == [3, 4, 5, 2, 1, 0]
    # Halton 2, 3: (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), (5/8, 7/9), (3/8, 2/9) ...
    assert halton((2, 2)).tolist() == [2, 1, 0, 3]
    assert halton((4, 3))[:4].tolist() == [2 * 3 + 1, 1 * 3 + 2, 3 * 3 + 0, 0 * 3 + 1]


@given(height=st.integers(1, 8), width=st.integers(1, 8))
def test_a_spiral_only_steps_to_neighbours_and_ends_in_the_corner(height: int, width: int) -> None:
    path = spiral((height, width))
    rows, columns = path // width, path % width
    assert ((rows.diff().abs() + columns.diff().abs()) == 1).all()
    assert path[-1] == 0


def test_halton_covers_more_evenly_than_chance() -> None:
    def nearest(order: Tensor) -> float:
        places = torch.stack([order[:56] // 16, order[:56] % 16], 1).double()
        return float((torch.cdist(places, places) + 99 * torch.eye(56)).min(1).values.mean())

    chance = torch.tensor([nearest(fixed_random(256, seed)) for seed in range(50)])
    assert nearest(halton((16, 16))) > chance.mean() + 4 * chance.std()


def test_random_orders_are_an_images_own() -> None:
    keys = torch.arange(40)
    orders = random_orders(keys, 16)
    assert torch.equal(orders[7:9], random_orders(keys[7:9], 16))
    assert orders.sort(1).values.eq(torch.arange(16)).all()
    assert abs(image_dependence(random_orders(torch.arange(400), 16))["static_correlation"]) < 0.05
    assert torch.equal(fixed_random(9, 3), fixed_random(9, 3)) and not torch.equal(fixed_random(9), fixed_random(9, 3))


def test_what_orders_share() -> None:
    same = fixed_random(20).expand(5, 20)
    assert image_dependence(same) == pytest.approx({"static_correlation": 1.0, "position_variance_ratio": 1.0})
    assert torch.equal(static_order(same), same[0])
    orders = random_orders(torch.arange(300), 20)
    shares = image_dependence(orders)
    assert_close(shares["position_variance_ratio"], 1 / 300, atol=2e-3, rtol=0)
    ranks = ranks_of(orders).double()
    others = torch.stack([ranks[torch.arange(300) != i].mean(0) for i in range(300)])
    expected = [scipy.stats.pearsonr(ranks[i], others[i]).statistic for i in range(300)]
    assert_close(shares["static_correlation"], sum(expected) / 300, atol=1e-12, rtol=0)
    found = rank_correlation(orders[:9], orders[1:10])
    by_scipy = [scipy.stats.spearmanr(ranks[i], ranks[i + 1]).statistic for i in range(9)]
    assert_close(found, torch.tensor(by_scipy, dtype=torch.float64))
    assert_close(rank_correlation(orders[0], orders[0].flip(0)), torch.tensor(-1.0, dtype=torch.float64))
    assert top_overlap(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 3, 0, 2]), 2) == 0.5
    assert_close(float(top_overlap(orders[:150], orders[150:], 5).mean()), 0.25, atol=0.05, rtol=0)
    assert float(neighbour_correlation(raster((5, 4)), (5, 4))) > 0.7
    assert float(neighbour_correlation(orders, (5, 4)).mean().abs()) < 0.1


def test_curves() -> None:
    rates = torch.arange(99) / 100
    area, normalised = area_under(torch.full((99,), 0.5), rates)
    assert_close(area, 0.98 * 0.5, rtol=1e-6, atol=0)
    assert_close(normalised, 0.5, rtol=1e-6, atol=0)
    x = torch.linspace(0, 1, 101)
    assert_close(knee(1 - x**4, x), (1 / 4) ** (1 / 3), atol=0.01, rtol=0)  # where the slope of -x^4 is -1
    assert math.isnan(knee(torch.ones(5), torch.arange(5.0)))


def test_wrong_input() -> None:
    with pytest.raises(ShapeError, match="grid of 0x3"):
        raster((0, 3))
    with pytest.raises(ShapeError, match=r"orders of shape \(1, 4\)"):
        image_dependence(torch.arange(4)[None])
    with pytest.raises(ConfigError, match=r"k=5: it must lie in 1\.\.4"):
        top_overlap(torch.arange(4), torch.arange(4), 5)
    with pytest.raises(ShapeError, match="9 patches for a grid of 2x4"):
        neighbour_correlation(torch.arange(9), (2, 4))
    with pytest.raises(ConfigError, match="at least two ascending rates"):
        area_under(torch.ones(3), torch.tensor([0.0, 0.5, 0.5]))
