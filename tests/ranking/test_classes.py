"""Orders class by class: what they say of classes whose orders are known."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from smalti.ranking.classes import conclude_classes, orders_by_class
from smalti.ranking.rank import RankConfig, rank, ranking_content


def random_orders(count, num, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.permutation(num) for _ in range(count)]))


@given(seed=st.integers(0, 200), num=st.integers(2, 12))
def test_correlations_are_the_means_over_all_pairs(seed, num):
    orders, labels = random_orders(9, num, seed), [0, 1, 0, 2, 1, 0, None, 1, 2]
    found = orders_by_class(orders, labels, ("a", "b", "c", "nothing"))
    ranks = orders.argsort(1).numpy()
    assert [one.name for one in found] == ["a", "b", "c"]
    for number, one in enumerate(found):
        own = [row for row, label in enumerate(labels) if label == number]
        others = [row for row, label in enumerate(labels) if label not in (number, None)]
        same = [spearmanr(ranks[i], ranks[j])[0] for i, j in itertools.combinations(own, 2)]
        other = [spearmanr(ranks[i], ranks[j])[0] for i in own for j in others]
        assert one.num_images == len(own)
        assert one.same_class == pytest.approx(np.mean(same), abs=1e-9)
        assert one.other_classes == pytest.approx(np.mean(other), abs=1e-9)
        assert one.mean_rank.numpy() == pytest.approx(ranks[own].mean(0))
        assert one.static_ratio == pytest.approx(ranks[own].mean(0).var() / ranks[0].var())


def test_an_order_of_the_class_is_static_within_it_and_differs_across_classes():
    first = torch.arange(16)
    orders = torch.stack([first, first, first, first.flip(0), first.flip(0)])
    a, b = orders_by_class(orders, [0, 0, 0, 1, 1], ("a", "b"))
    for one in (a, b):
        assert (one.static_ratio, one.same_class, one.other_classes) == pytest.approx((1, 1, -1))
    assert conclude_classes({"collapse": (a, b)}) == [
        "collapse: two images of a class have rank correlation 1.00, images of different classes -1.00 (2 classes)."
    ]


def test_fewer_than_two_classes_with_two_images_say_nothing():
    orders = random_orders(4, 9)
    assert orders_by_class(orders, [None] * 4, ("a",)) == ()
    assert orders_by_class(orders, [0, 0, 0, 0], ("a",)) == ()
    assert orders_by_class(orders, [0, 0, 0, 1], ("a", "b")) == ()
    assert [one.name for one in orders_by_class(orders, [0, 1, 1, 0], ("a", "b"))] == ["a", "b"]
    assert orders_by_class(torch.zeros(4, 1, dtype=torch.int64), [0, 1, 1, 0], ("a", "b")) == ()


def test_images_in_class_folders_are_described_class_by_class(pictures, tmp_path):
    ranking = rank("random:vit_tiny_patch16_224", str(pictures), tmp_path / "o.parquet", RankConfig(image_size=32))
    assert list(ranking.by_class) == ["attention", "variance"]
    assert [(one.name, one.num_images) for one in ranking.by_class["variance"]] == [("a", 4), ("b", 4)]
    assert any(sentence.startswith("variance: two images of a class") for sentence in ranking.sentences)
    written = ranking_content(ranking)
    assert len(written["classes"]["attention"][0]["mean_rank"]) == 4 and "static_ratio" in written["units"]
    (flat := tmp_path / "flat").mkdir()
    for number, path in enumerate(sorted(pictures.rglob("[0-9].png"))):
        (flat / f"{number}.png").symlink_to(path)
    without = rank("random:vit_tiny_patch16_224", str(flat), tmp_path / "f.parquet", RankConfig(image_size=32))
    assert without.by_class == {} and not any("class" in sentence for sentence in without.sentences)
