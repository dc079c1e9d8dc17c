"""Curves of orders: a predictor that knows the truth gives the numbers of the closed form."""

import math

import numpy as np
import pytest
import torch

from smalti.errors import ShapeError
from smalti.methods.prefix import Prediction
from smalti.ranking.curves import (
    NOISE_FLOOR,
    area,
    compare_curves,
    conclude_curves,
    evaluate_orders,
    prefix_counts,
)


class Exact:
    """The best linear guess in a world of N tokens that are one normal vector, of one value each."""

    def __init__(self, covariance: torch.Tensor) -> None:
        self.covariance = covariance.double()

    def predict(self, tokens, seen):
        mean, variance = torch.zeros_like(tokens), torch.ones_like(tokens)
        for row in range(len(tokens)):
            s = seen[row]
            if not s.any():
                variance[row, :, 0] = self.covariance.diagonal().float()
                continue
            among, to = self.covariance[s][:, s], self.covariance[~s][:, s]
            weights = to @ torch.linalg.inv(among)
            mean[row, ~s, 0] = (weights @ tokens[row, s, 0].double()).float()
            variance[row, ~s, 0] = (self.covariance.diagonal()[~s] - (weights * to).sum(1)).float()
        return Prediction(mean, variance.log())


def hub_world(num: int = 16) -> torch.Tensor:
    """Patch 5 tells half of the others by 0.9; the rest are alone."""
    covariance = torch.eye(num)
    load = torch.zeros(num)
    load[5] = 1.0
    load[[0, 1, 2, 3, 8, 9, 10]] = 0.9
    shared = load[:, None] * load
    return torch.where(covariance.bool(), covariance, shared)


@pytest.fixture(scope="module")
def curves():
    torch.manual_seed(0)
    covariance = hub_world()
    tokens = (torch.randn(400, 16) @ torch.linalg.cholesky(covariance).T)[..., None]
    hub_first = torch.tensor([5, *[n for n in range(15, -1, -1) if n != 5]]).expand(400, -1)
    alone_first = torch.tensor([4, 6, 7, 11, 12, 13, 14, 15, 0, 1, 2, 3, 8, 9, 10, 5]).expand(400, -1)
    random = [torch.rand(400, 16).argsort(1) for _ in range(3)]
    told = []
    found = evaluate_orders(
        Exact(covariance),
        tokens,
        {"collapse": [hub_first], "random": random, "alone_first": [alone_first]},
        progress=lambda what, done, total: told.append((done, total)),
    )
    assert told[-1] == (5, 5)
    return found


def test_points_lie_dense_where_it_matters():
    assert prefix_counts(64).tolist() == [*range(0, 17, 2), 22, 28, 34, 40, 46, 52, 58, 64]
    assert prefix_counts(256).size == 17 and prefix_counts(256)[8] == 64
    assert prefix_counts(4).tolist() == [0, 1, 2, 3, 4] and prefix_counts(3)[-1] == 3


def test_area_is_cut_where_it_ends():
    shares = np.array([0.0, 0.2, 0.6, 1.0])
    line = (1 - shares)[None]
    assert area(shares, line, 1.0)[0] == pytest.approx(0.5)
    assert area(shares, line, 0.25)[0] == pytest.approx(0.25 - 0.25**2 / 2)
    assert area(shares, line, 0.2)[0] == pytest.approx(0.18)


def test_what_is_left_is_the_closed_form(curves):
    curve = curves["collapse"]
    assert curve.error[0] == pytest.approx(1, abs=0.02) and curve.error[-1] == 0
    # after the hub: seven tokens keep 1 - 0.81, eight are as they were
    after_one = (7 * (1 - 0.81) + 8) / 16
    assert curve.counts[1] == 1 and curve.error[1] == pytest.approx(after_one, abs=0.02)
    entropy = curve.entropy[0].mean(0)
    nats = [0.5 * math.log1p(v / NOISE_FLOOR) for v in (0.19, 1.0)]
    assert entropy[0] == pytest.approx(nats[1], rel=1e-5)
    assert entropy[1] == pytest.approx((7 * nats[0] + 8 * nats[1]) / 16, rel=1e-5) and entropy[-1] == 0


def test_the_hub_first_is_better_than_chance_with_a_clear_interval(curves):
    found = compare_curves(curves)
    one = found["collapse"]["auc_q"]
    assert one.low < one.value < one.high and one.difference_high < 0 and one.value < found["random"]["auc_q"].value
    assert one.difference == pytest.approx(one.value - found["random"]["auc_q"].value)
    assert found["alone_first"]["auc_q"].difference_low > 0 and math.isnan(found["random"]["auc_q"].difference)
    said = conclude_curves(found)
    assert said[0].startswith("collapse's first quarter is more informative than random") and len(said) == 1
    doubted = conclude_curves(found, at_start=1.38)
    assert doubted[0].startswith("under-trained predictor: with no patch seen, it leaves 1.38") and doubted[1:] == said
    assert curves["random"].spread_of_draws() > 0 and math.isnan(curves["collapse"].spread_of_draws())


def test_an_order_equals_itself(curves):
    same = compare_curves({"random": curves["random"], "collapse": curves["random"]})["collapse"]["auc_q"]
    assert same.difference == same.difference_low == same.difference_high == 0
    assert "does not differ from" in conclude_curves({"random": {"auc_q": same}, "collapse": {"auc_q": same}})[0]


def test_orders_that_do_not_fit():
    predictor, tokens = Exact(hub_world()), torch.randn(3, 16, 1)
    with pytest.raises(ShapeError, match="1 image: at least 2 are needed"):
        evaluate_orders(predictor, tokens[:1], {"random": [torch.arange(16)[None]]})
    with pytest.raises(ShapeError, match=r"orders 'random' of shape \(3, 9\); \(3, 16\) is needed for these tokens"):
        evaluate_orders(predictor, tokens, {"random": [torch.arange(9).expand(3, -1)]})
