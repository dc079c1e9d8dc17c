"""Overclustering: projection and k-means equal scikit-learn's, and theory's scores come out."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from smalti.errors import DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocols.overclustering import (
    ClusteringRecipe,
    choose_clusters,
    choose_recipe,
    cluster,
    fit_projection,
    overclustering,
)

E11 = np.array([[0, 0], [0, 0.1], [0.1, 0], [0, 0.05], [5, 5], [5, 5.1], [5.1, 5], [10, 0]])
"""Three groups of the dense-evaluation spec's example: four, three and one."""


def groups(assigned):
    """Sets of places that lie together."""
    return {frozenset(np.flatnonzero(assigned == k).tolist()) for k in np.unique(assigned)}


@pytest.mark.parametrize("seed", range(5))
def test_e11_three_groups_are_found(seed):
    mean, basis = fit_projection([torch.tensor(E11)[None].float()], 50)
    points = ((torch.tensor(E11) - mean) @ basis).float().numpy()
    found = cluster(points, 3, seed, restarts=5)
    assert groups(found) == {frozenset({0, 1, 2, 3}), frozenset({4, 5, 6}), frozenset({7})}


@given(seed=st.integers(0, 1000), n=st.integers(8, 60), dims=st.integers(1, 6), offset=st.floats(-1000, 1000))
def test_projection_is_scikit_learns_standard_scaler_and_pca(seed, n, dims, offset):
    tokens = np.random.default_rng(seed).normal(size=(n, 6)) * [1, 2, 5, 0.1, 1, 3] + offset
    tokens = tokens.astype(np.float32)
    batches = [torch.from_numpy(part)[None] for part in np.array_split(tokens, 3)]
    mean, basis = fit_projection(iter(batches), dims)
    ours = ((torch.from_numpy(tokens).double() - mean) @ basis).numpy()
    theirs = PCA(dims, svd_solver="full").fit_transform(StandardScaler().fit_transform(tokens.astype(np.float64)))
    # axes are free in their sign
    np.testing.assert_allclose(ours * np.sign((ours * theirs).sum(0)), theirs, atol=1e-5)


def test_standardisation_takes_the_population_and_leaves_constants_alone():
    tokens = torch.tensor([[1.0, 7.3], [3.0, 7.3]])  # population sigma 1, sample sigma 1.41
    mean, basis = fit_projection([tokens[None]], 2)
    projected = (tokens.double() - mean) @ basis
    assert sorted(projected.abs().flatten().tolist()) == pytest.approx([0, 0, 1, 1], abs=1e-6)


def test_kmeans_with_few_points_is_scikit_learns():
    points = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    oracle = KMeans(5, n_init=3, max_iter=50, tol=0, random_state=7, init="random").fit(points)
    assert np.array_equal(cluster(points, 5, 7, iters=50, restarts=3, init="random"), oracle.labels_)


def test_kmeans_is_fitted_on_256_points_a_cluster_and_assigns_all(monkeypatch):
    fitted = []
    fit = KMeans.fit
    monkeypatch.setattr(KMeans, "fit", lambda self, x: (fitted.append(len(x)), fit(self, x))[1])
    points = np.random.default_rng(0).normal(size=(700, 2)).astype(np.float32)
    assert len(cluster(points, 2, 0)) == 700 and len(cluster(points, 3, 0)) == 700
    assert fitted == [512, 700]


def test_fewer_different_points_than_clusters_is_no_failure():
    found = cluster(np.ones((20, 3), dtype=np.float32), 4, 0)
    assert found.shape == (20,) and len(np.unique(found)) == 1


def test_numbers_of_clusters_that_fit():
    assert choose_clusters((), 21, 500 * 39) == ([21, 300, 500], [])
    assert choose_clusters((), 21, 500 * 39 - 1) == ([21, 300], [500])
    assert choose_clusters((), 21, 20) == ([], [21, 300, 500])
    assert choose_clusters((), 300, 400) == ([300], [500])  # as many as classes: no more is asked for
    assert choose_clusters((8, 4, 9), 21, 8) == ([4, 8], [9])


def test_presets_are_what_their_sources_say(tiny, scenes, features_of):
    features = features_of(tiny, scenes, "masks")
    assert choose_recipe(features, EvalConfig()) == ClusteringRecipe(32, 32, 3, 1, 20, "k-means++", "skip")
    assert choose_recipe(features, EvalConfig(preset="paper")) == ClusteringRecipe(
        448, 100, 5, 5, 100, "random", "zero"
    )
    assert choose_recipe(features, EvalConfig(preset="full")) == ClusteringRecipe(
        448, 100, 5, 5, 100, "k-means++", "skip"
    )
    changed = EvalConfig(
        preset="paper", image_size=64, own={"overclustering": {"repeats": 2, "mask_size": 50, "absent": "skip"}}
    )
    assert choose_recipe(features, changed) == ClusteringRecipe(64, 50, 2, 5, 100, "random", "skip")


def test_e18_a_perfect_encoder_gets_all_of_it(perfect, scenes, features_of):
    scores = overclustering(
        features_of(perfect, scenes, "masks"), EvalConfig(own={"overclustering": {"clusters": (3, 6)}})
    )
    assert list(scores.metrics) == [
        "miou_k6",
        "pixel_accuracy_k6",
        "miou_k6_iou",
        "pixel_accuracy_k6_iou",
        "miou_k3",
        "pixel_accuracy_k3",
    ]
    assert set(scores.metrics.values()) == {1.0}
    assert scores.per_class["iou"] == {"ground": 1.0, "leaf": 1.0, "stone": 1.0}
    assert scores.settings["clusters_used"] == {"6": [3, 3, 3], "3": [3, 3, 3]}  # there are but three tokens
    assert np.array_equal(np.diag(np.diag(scores.confusion)), scores.confusion)
    assert sorted(scores.predictions) == list(range(6))


def test_e18_a_constant_encoder_gets_the_majority_class(constant, scenes, features_of):
    scores = overclustering(
        features_of(constant, scenes, "masks"), EvalConfig(own={"overclustering": {"clusters": (4,), "mask_size": 32}})
    )
    share = scores.confusion.sum(1).max() / scores.confusion.sum()
    assert scores.confusion.sum(1).argmax() == 0
    assert scores.metrics["pixel_accuracy_k4"] == pytest.approx(share)
    assert scores.metrics["miou_k4"] == pytest.approx(share / 3)  # the other two have IoU 0


def test_order_of_judged_images_batch_size_and_cache_do_not_matter(tiny, scenes, features_of):
    whole = overclustering(
        features_of(tiny, scenes, "masks"), EvalConfig(own={"overclustering": {"clusters": (3, 12)}})
    )
    turned = features_of(tiny, scenes, "masks", batch_size=4, cache_mib=0)
    order = [3, 0, 5, 1, 4, 2]
    samples = turned.data.test.samples
    shuffled = dataclasses.replace(turned.data.test, samples=tuple(samples[i] for i in order))
    turned.data = dataclasses.replace(turned.data, test=shuffled)
    assert not turned.tokens("test", 32).is_kept
    again = overclustering(turned, EvalConfig(own={"overclustering": {"clusters": (3, 12)}}))
    assert again.metrics == pytest.approx(whole.metrics, abs=2e-3)
    assert np.array_equal(again.predictions[0], whole.predictions[3])


def test_scores_are_means_over_clusterings_with_seeds_of_their_own(tiny, scenes, features_of):
    features = features_of(tiny, scenes, "masks")
    both = overclustering(features, EvalConfig(seed=4, own={"overclustering": {"clusters": (12,), "repeats": 2}}))
    one, other = (
        overclustering(features, EvalConfig(seed=seed, own={"overclustering": {"clusters": (12,), "repeats": 1}}))
        for seed in (4, 5)
    )
    assert one.metrics["miou_k12"] != other.metrics["miou_k12"]
    assert both.metrics["miou_k12"] == pytest.approx((one.metrics["miou_k12"] + other.metrics["miou_k12"]) / 2)
    assert both.settings["scores_of_repeats"]["miou_k12"] == [one.metrics["miou_k12"], other.metrics["miou_k12"]]
    assert both.tallies["miou_k12"].part.shape == (6, 2, 3)


def test_too_few_patches_are_said(tiny, scenes, features_of):
    scores = overclustering(features_of(tiny, scenes, "masks"), EvalConfig(own={"overclustering": {"repeats": 1}}))
    assert scores.settings["clusters"] == [3] and scores.settings["clusters_left_out"] == [300, 500]
    assert scores.settings["clusters_note"] == "skipped, since there are only 96 patches"
    assert next(iter(scores.metrics)) == "miou_k3"
    with pytest.raises(DataError, match=r"6 val images have 96 patches, too few for 97 clusters"):
        overclustering(features_of(tiny, scenes, "masks"), EvalConfig(own={"overclustering": {"clusters": (97,)}}))


def test_nothing_is_written_to_warnings(constant, scenes, features_of):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        overclustering(features_of(constant, scenes, "masks"), EvalConfig(own={"overclustering": {"repeats": 1}}))


def test_unreadable_images_are_left_out(tiny, scenes, tmp_path, features_of):
    for name in ("masks", "train.txt", "val.txt", "classes.txt"):
        (tmp_path / name).symlink_to(scenes / name)
    (tmp_path / "images").mkdir()
    for image in (scenes / "images").iterdir():
        (tmp_path / "images" / image.name).write_bytes(image.read_bytes()[: 60 if image.name == "val2.png" else None])
    scores = overclustering(features_of(tiny, tmp_path, "masks"), EvalConfig(own={"overclustering": {"repeats": 1}}))
    assert scores.settings["num_patches"] == 5 * 16
    assert scores.tallies["miou_k3"].whole[2].sum() == 0
    for number in range(6):
        (tmp_path / "images" / f"val{number}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 6 val images can be read"):
        overclustering(features_of(tiny, tmp_path, "masks"), EvalConfig(own={"overclustering": {"repeats": 1}}))
