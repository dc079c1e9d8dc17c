"""k-NN: known answers, scikit-learn, and encoders whose score theory knows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch.testing import assert_close

from smalti.errors import ConfigError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocols import knn as module
from smalti.evaluation.protocols.knn import knn, nearest, vote


def test_e13_votes_of_three_neighbours():
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 2])
    sims, indices = nearest(torch.tensor([[0.8, 0.6]]), train, 3)
    assert indices.tolist() == [[1, 0, 2]]
    assert_close(sims, torch.tensor([[0.96, 0.8, 0.6]]))
    assert vote(sims[:, :1], labels[indices[:, :1]], 3).argmax().item() == 1
    assert_close(vote(sims, labels[indices], 3), torch.tensor([[0.091826, 0.908174, 0.0]]), atol=1e-6, rtol=0)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 12))
def test_shares_equal_scikit_learns(seed, k):
    g = torch.Generator().manual_seed(seed)
    train, test = torch.randn(30, 6, generator=g), torch.randn(9, 6, generator=g)
    labels = torch.cat([torch.arange(4), torch.randint(0, 4, (26,), generator=g)])
    oracle = KNeighborsClassifier(k, weights=lambda dist: np.exp((1 - dist) / 0.07), algorithm="brute", metric="cosine")
    oracle.fit(train.numpy(), labels.numpy())
    sims, indices = nearest(test, train, k)
    expected = torch.from_numpy(oracle.predict_proba(test.numpy())).float()
    assert_close(vote(sims, labels[indices], 4), expected, atol=1e-4, rtol=0)


def test_length_of_features_does_not_matter():
    g = torch.Generator().manual_seed(0)
    train, test = torch.randn(20, 6, generator=g), torch.randn(9, 6, generator=g)
    lengths = torch.rand(20, 1, generator=g) + 0.1
    assert torch.equal(nearest(test, train, 5)[1], nearest(7 * test, lengths * train, 5)[1])


def test_chunks_give_the_same_neighbours(monkeypatch):
    g = torch.Generator().manual_seed(0)
    train, test = torch.randn(20, 6, generator=g), torch.randn(9, 6, generator=g)
    whole = nearest(test, train, 5)
    monkeypatch.setattr(module, "_CHUNK", 41)  # two queries at a time
    assert torch.equal(nearest(test, train, 5)[1], whole[1])


def test_e18_a_perfect_encoder_finds_every_class(perfect, greys, features_of):
    scores = knn(features_of(perfect, greys, "labels"), EvalConfig(own={"knn": {"k": 4}}))
    assert scores.metrics["top1"] == scores.metrics["balanced_top1"] == scores.metrics["top5"] == 1.0
    assert scores.per_class["recall"] == {f"grey{label}": 1.0 for label in range(5)}
    assert next(iter(scores.metrics)) == "top1"


def test_e18_a_constant_encoder_gets_the_most_frequent_class(constant, greys, features_of):
    scores = knn(features_of(constant, greys, "labels"), EvalConfig(own={"knn": {"k": 32}}))
    assert scores.metrics["top1"] == 0.5  # half of the images are of the first class
    assert scores.metrics["balanced_top1"] == pytest.approx(1 / 5)


def test_k_beyond_the_training_set_takes_all_and_says_so(constant, greys, features_of):
    scores = knn(features_of(constant, greys, "labels"), EvalConfig(own={"knn": {"k": 1000}}))
    assert scores.settings["k"] == 32 and scores.settings["k_wanted"] == 1000
    assert "all training images vote" in scores.settings["k_note"]


def test_other_k_are_reported_where_there_are_enough_images(perfect, greys, features_of):
    scores = knn(features_of(perfect, greys, "labels"), EvalConfig(own={"knn": {"k": 4}}))
    assert set(scores.metrics) == {"top1", "balanced_top1", "top5", "top1_k10", "top1_k20"}  # not k100: 32 images


def test_pool_takes_the_encoders_own_unless_told(tiny, greys, features_of):
    features = features_of(tiny, greys, "labels")
    assert knn(features, EvalConfig()).settings["pool"] == "auto"
    level = features.image_level("train", 32)
    images = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    assert_close(level.pool("auto"), level.pool("cls"))
    assert level.pool("avg").shape == (32, tiny.embed_dim) and not torch.equal(level.pool("avg"), level.pool("cls"))
    tiny.set_pool("avg")
    assert knn(features_of(tiny, greys, "labels"), EvalConfig()).settings["pool"] == "avg"
    assert tiny.image_features(images).shape == (1, tiny.embed_dim)


def test_pool_cls_needs_a_class_token(greys, features_of):
    from smalti.models.build import build_encoder

    bare = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, seed=0, class_token=False, global_pool="avg"
    )
    with pytest.raises(ConfigError, match="pool=cls needs a class token"):
        knn(features_of(bare, greys, "labels"), EvalConfig(pool="cls"))


def test_prr_pools_each_image_alone_and_map_needs_training(tiny, greys, features_of):
    features = features_of(tiny, greys, "labels", batch_size=5)
    level = features.image_level("test", 32, "prr")
    encoded = [found for found, _ in features.encode(features.data.test, 32, "crop", 7, "images")]
    assert_close(level.pool("prr"), torch.cat([tiny.pooled(found, "prr") for found in encoded]))
    assert knn(features, EvalConfig(pool="prr")).settings["pool"] == "prr"
    with pytest.raises(ConfigError, match="pool=map has parameters"):
        knn(features, EvalConfig(pool="map"))
    tiny.set_pool("map", fresh=True)
    assert knn(features_of(tiny, greys, "labels"), EvalConfig()).settings["pool"] == "map"
