"""What is said of orders: closed forms, plain loops, scipy, and the published orders' own numbers."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial import cKDTree

from smalti.errors import ShapeError
from smalti.functional.graphs import ranks_of
from smalti.functional.orders import raster
from smalti.ranking.diagnostics import (
    agreement,
    conclude,
    describe_orders,
    kendall,
    mirror,
    nearest_distance,
    num_top,
    overlap_with_others,
)

# Guo et al., arXiv:2511.22281v2, Fig. 5, decoded: the first 56 of the mean order, on the 16x16 grid
PUBLISHED = torch.tensor(
    [
        int(place)
        for place in (
            "106 243 111 23 12 15 147 115 80 148 53 236 162 232 249 206 178 18 3 224 154 254 50 134 7 66 131 122 167 "
            "181 225 89 2 104 253 45 82 248 150 88 19 107 219 244 155 22 169 63 168 159 105 40 108 44 92 144"
        ).split()
    ]
)


def random_orders(images: int, num: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(images, num, generator=torch.Generator().manual_seed(seed)).argsort(1)


def test_kendall_and_spearman_are_scipys():
    first, second = random_orders(5, 12), random_orders(5, 12, 1)
    ranks = [ranks_of(order).numpy() for order in (first, second)]
    expected = [stats.kendalltau(a, b).statistic for a, b in zip(*ranks, strict=True)]
    assert kendall(first, second).tolist() == pytest.approx(expected, abs=1e-12)
    found = agreement(first, second)
    rhos = [stats.spearmanr(a, b).statistic for a, b in zip(*ranks, strict=True)]
    assert found["spearman"] == pytest.approx(np.mean(rhos)) and found["spearman_sd"] == pytest.approx(np.std(rhos))
    sets = [({*a[:3].tolist()}, {*b[:3].tolist()}) for a, b in zip(first, second, strict=True)]
    assert num_top(12) == 3 and found["jaccard"] == pytest.approx(np.mean([len(a & b) / len(a | b) for a, b in sets]))
    ranks = [np.argsort(each.numpy(), axis=1).astype(float) for each in (first, second)]
    left = [each - each.mean(0) for each in ranks]
    residual = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*left, strict=True)])
    assert found["spearman_residual"] == pytest.approx(residual)
    assert agreement(first, first)["spearman_residual"] == pytest.approx(1)
    assert agreement(first, first)["jaccard"] == agreement(first, first)["kendall"] == 1
    assert agreement(first, first.flip(1))["kendall"] == -1


def test_the_published_static_top_lies_as_random_sets_do():
    assert nearest_distance(PUBLISHED, (16, 16)).item() == pytest.approx(1.283, abs=5e-4)
    found = describe_orders(random_orders(3, 256), (16, 16))
    assert num_top(256) == 56
    assert found["nearest_distance_random"] == pytest.approx(1.308, abs=0.01)
    assert found["nearest_distance_random_sd"] == pytest.approx(0.060, abs=0.008)


def test_the_nearest_other_patch_in_plain_words():
    sets = random_orders(4, 30)[:, :7]
    places = np.stack([sets // 6, sets % 6], axis=-1)
    expected = [cKDTree(points).query(points, k=2)[0][:, 1].mean() for points in places]
    assert nearest_distance(sets, (5, 6)).tolist() == pytest.approx(expected)
    with pytest.raises(ShapeError, match="at least 2 patches are needed"):
        nearest_distance(sets[:, :1], (5, 6))


def test_overlap_leaves_an_image_itself_out():
    orders = random_orders(6, 20)
    for row in range(6):
        others = torch.cat([orders[:row], orders[row + 1 :]])
        static = ranks_of(others).double().mean(0).argsort(stable=True)
        share = len({*orders[row, :4].tolist()} & {*static[:4].tolist()}) / 4
        assert overlap_with_others(orders, 4)[row].item() == pytest.approx(share)


def test_one_order_for_all_images_and_orders_that_have_nothing_in_common():
    same = raster((4, 5)).expand(7, -1)
    found = describe_orders(same, (4, 5), mirrored=same)
    assert found["position_variance_ratio"] == pytest.approx(1) and found["static_correlation"] == pytest.approx(1)
    assert found["top_overlap"] == 1 and found["neighbour_correlation"] > 0.7 and 0.8 < found["flip_agreement"] < 1
    chance = describe_orders(random_orders(200, 256), (16, 16))
    assert chance["position_variance_ratio"] == pytest.approx(1 / 200, rel=0.25)
    assert abs(chance["static_correlation"]) < 0.02 and abs(chance["neighbour_correlation"]) < 0.02
    assert chance["top_overlap"] == pytest.approx(num_top(256) / 256, abs=0.02)
    lone = describe_orders(random_orders(1, 16), (4, 4))
    assert math.isnan(lone["position_variance_ratio"]) and math.isfinite(lone["neighbour_correlation"])


def test_an_order_that_follows_content_is_mirrored_with_it():
    orders = random_orders(5, 12)
    assert mirror(torch.arange(6), (2, 3)).tolist() == [2, 1, 0, 5, 4, 3]
    assert torch.equal(mirror(mirror(orders, (3, 4)), (3, 4)), orders)
    found = describe_orders(orders, (3, 4), mirrored=mirror(orders, (3, 4)))
    assert found["flip_agreement"] == pytest.approx(1)


def test_the_spread_of_scores_is_told_of_their_mean():
    scores = torch.tensor([[0.2, 0.3, 0.25, 0.25]])
    found = describe_orders(random_orders(1, 4), (2, 2), scores=10 * scores, degenerate=0)
    assert found["score_spread"] == pytest.approx(4 * 0.1) and found["num_degenerate"] == 0
    signed = describe_orders(random_orders(1, 4), (2, 2), scores=scores - 0.25)
    assert "score_spread" not in signed


def test_what_is_said():
    plain = {"position_variance_ratio": 0.95, "score_spread": 0.01, "num_degenerate": 2.0}
    said = conclude(
        {
            "collapse": plain,
            "coverage": {"position_variance_ratio": 0.3},
            "attention": {"position_variance_ratio": 0.8},
            "raster": plain,
        },
        {("collapse", "in_strength"): {"spearman": 0.99}},
        {"collapse": {"spearman": 0.4, "spearman_residual": 0.1}},
        9,
    )
    assert said[0].startswith("degenerate graph: ") and "2 of 9 images" in said[1]
    assert said[2].startswith("static order: position alone explains 0.95") and len(said) == 7
    assert said[3].startswith("coverage is image-specific") and said[4].startswith("attention is mixed")
    assert "PageRank adds nothing to its first step" in said[5]
    assert "correlation 0.40; 0.10 with the mean order of each run subtracted: not above 0.6" in said[6]
    assert conclude(
        {"collapse": {"position_variance_ratio": math.nan}},
        {},
        {"collapse": {"spearman": 0.9, "spearman_residual": math.nan}},
        1,
    ) == ["collapse of the other run has rank correlation 0.90: above 0.6, the order is reproduced."]
