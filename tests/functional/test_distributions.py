"""Distances of clouds of features: against torchmetrics, scipy, scikit-learn, closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.testing import assert_close
from torchmetrics.image.fid import FrechetInceptionDistance

from smalti.errors import ConfigError, DataError, ShapeError
from smalti.functional.distributions import (
    Gaussian,
    as_counts,
    bootstrap_error,
    classifier_score,
    fit_gaussian,
    frechet_between,
    frechet_distance,
    kernel_distance,
    resamples,
    subset_kernel_distance,
    within_manifold,
)


def cloud(seed, count, dim=6, shift=0.0):
    """Correlated vectors, away from the origin."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=g, dtype=torch.float64)
    return (torch.randn(count, dim, generator=g, dtype=torch.float64) @ mix + 2 + shift).float()


class Identity(nn.Module):
    """Features that are their own."""

    num_features = 6

    def forward(self, x):
        return x.flatten(1)


def test_frechet_distance_is_torchmetrics_with_features_that_are_their_own():
    a, b = cloud(0, 200), cloud(1, 300, shift=0.5)
    metric = FrechetInceptionDistance(feature=Identity(), normalize=True, input_img_size=(6, 1, 1))
    metric.set_dtype(torch.float64)
    metric.update(a.double().view(-1, 6, 1, 1), real=True)
    metric.update(b.double().view(-1, 6, 1, 1), real=False)
    assert_close(frechet_distance(a, b), metric.compute().item(), rtol=1e-6, atol=0)


def test_frechet_distance_is_scipy_s_matrix_root():
    a, b = fit_gaussian(cloud(0, 50)), fit_gaussian(cloud(1, 70))
    root = sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = float((a.mean - b.mean).square().sum()) + np.trace((a.covariance + b.covariance).numpy() - 2 * root)
    assert_close(frechet_between(a, b), float(expected), rtol=1e-9, atol=0)


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(0, 4), st.floats(0, 4)), min_size=1, max_size=5)
)
def test_closed_form_of_gaussians_that_share_their_axes(axes):
    m, n, s, t = (torch.tensor(column, dtype=torch.float64) for column in zip(*axes, strict=True))
    turn = torch.linalg.qr(torch.randn(len(m), len(m), generator=torch.Generator().manual_seed(1)).double()).Q
    a, b = (Gaussian(turn @ mean, turn @ (std**2).diag() @ turn.mT) for mean, std in ((m, s), (n, t)))
    expected = float((m - n).square().sum() + (s - t).square().sum())
    assert_close(frechet_between(a, b), expected, rtol=1e-6, atol=1e-6)


def test_scalar_gaussians_by_hand():
    a = Gaussian(torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double())
    b = Gaussian(torch.tensor([4.0]).double(), torch.tensor([[9.0]]).double())
    assert_close(frechet_between(a, b), 9 + (2 - 3) ** 2.0)


@pytest.mark.parametrize("count", [4, 40])
def test_a_cloud_is_at_no_distance_from_itself_even_with_fewer_vectors_than_dimensions(count):
    a = cloud(0, count)
    assert frechet_distance(a, a.flip(0)) < 1e-9
    assert within_manifold(a, a.clone(), 2).all()


@settings(deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(8, 40), m=st.integers(8, 40))
def test_distances_are_symmetric_and_turning_or_shifting_both_changes_nothing(seed, n, m):
    a, b = cloud(seed, n).double(), cloud(seed + 1, m).double()
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)).double()).Q
    assert_close(frechet_distance(a, b), frechet_distance(b, a), rtol=1e-9, atol=1e-9)
    assert_close(kernel_distance(a, b), kernel_distance(b, a), rtol=1e-9, atol=1e-9)
    assert_close(frechet_distance(a @ turn + 3, b @ turn + 3), frechet_distance(a, b), rtol=1e-8, atol=1e-8)
    assert_close(kernel_distance(a @ turn, b @ turn), kernel_distance(a, b), rtol=1e-9, atol=1e-9)
    assert torch.equal(within_manifold(a @ turn + 3, b @ turn + 3, 3), within_manifold(a, b, 3))


def plain_mmd(a, b):
    """Eq. (3) of Gretton et al. by loops."""

    def kernel(x, y):
        return (float(x.double() @ y.double()) / len(x) + 1) ** 3

    within = [
        sum(kernel(x, y) for i, x in enumerate(c) for j, y in enumerate(c) if i != j) / (len(c) * (len(c) - 1))
        for c in (a, b)
    ]
    return within[0] + within[1] - 2 * sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))


def test_kernel_distance_is_the_formula():
    a, b = cloud(0, 9), cloud(1, 13)
    assert_close(float(kernel_distance(a, b)), plain_mmd(a, b), rtol=1e-10, atol=0)


def test_kernel_distance_by_hand():
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    # k(1,2) = 27; k(0,1) = 1; across: k(1,0) + k(1,1) + k(2,0) + k(2,1) = 1 + 8 + 1 + 27
    assert float(kernel_distance(a, b)) == 27 + 1 - 2 * 37 / 4


def test_kernel_distance_of_one_law_is_zero_on_average_whatever_the_count():
    found = torch.cat(
        [kernel_distance(*torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(s))) for s in range(300)]
    )
    assert abs(float(found.mean())) < 3 * float(found.std()) / math.sqrt(300)
    assert float(found.std()) > 0


def test_counted_vectors_are_repeated_vectors_never_compared_with_themselves():
    a, b = cloud(0, 5), cloud(1, 4)
    places = torch.tensor([[0, 0, 3, 4, 2], [1, 2, 3, 4, 0]])
    found = kernel_distance(a, b, as_counts(places))
    pairs = [(i, j) for i in places[0].tolist() for j in places[0].tolist() if i != j]
    inside = sum((float(a[i].double() @ a[j].double()) / 6 + 1) ** 3 for i, j in pairs) / len(pairs)
    others = sum(
        (float(x.double() @ y.double()) / 6 + 1) ** 3 for i, x in enumerate(b) for j, y in enumerate(b) if i != j
    )
    across = sum((float(a[i].double() @ y.double()) / 6 + 1) ** 3 for i in places[0].tolist() for y in b)
    assert_close(float(found[0]), inside + others / 12 - 2 * across / 20, rtol=1e-10, atol=0)
    assert_close(found[1], kernel_distance(a, b)[0])


def test_subsets_average_to_the_whole():
    a, b = cloud(0, 60), cloud(1, 60)
    found = subset_kernel_distance(a, b, 30, 400, torch.Generator().manual_seed(0))
    whole = float(kernel_distance(a, b))
    assert found.shape == (400,) and abs(float(found.mean()) - whole) < 4 * float(found.std()) / 20
    assert_close(float(subset_kernel_distance(a, b, 60, 1)), whole)  # all of them are one subset


@settings(deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 50), m=st.integers(8, 50), k=st.integers(1, 6))
def test_manifold_is_that_of_scikit_learn_s_neighbours(seed, n, m, k):
    a, b = cloud(seed, n, shift=1.0).double(), cloud(seed + 1, m).double()
    radii = NearestNeighbors(n_neighbors=k).fit(b.numpy()).kneighbors()[0][:, -1]  # without themselves
    expected = (torch.cdist(a, b).numpy() <= radii[None]).any(1)
    assert within_manifold(a, b, k).tolist() == expected.tolist()


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    near_one_half = torch.tensor([[0.5], [1.5], [0.2], [30.0]])
    assert within_manifold(near_one_half, real, 1).tolist() == [True, True, True, False]
    # Balls about 0.5, 1.5, 0.2 reach 0.3, 1.0, 0.3; that about 30 reaches 1.5
    assert within_manifold(real, near_one_half, 1).tolist() == [True, True, True, True, True]
    assert within_manifold(real, near_one_half[:3], 1).tolist() == [True, True, True, False, False]


def test_equal_vectors_have_balls_of_no_radius_and_still_hold_themselves():
    real = torch.tensor([[1.0, 2.0]]).repeat(7, 1)
    assert within_manifold(torch.tensor([[1.0, 2.0], [1.0, 2.1]]), real).tolist() == [True, False]


def test_classifier_score_is_one_for_a_classifier_without_opinion_and_the_classes_for_a_sure_one():
    assert_close(classifier_score(torch.full((20, 4), 0.25)), 1.0)
    assert_close(classifier_score(torch.eye(4).repeat(5, 1)), 4.0)
    assert_close(classifier_score(torch.eye(4)[:1].repeat(5, 1)), 1.0)  # sure, and always of the same
    p = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double().softmax(1)
    expected = math.exp((p * (p / p.mean(0)).log()).sum(1).mean())
    assert_close(classifier_score(p), expected, rtol=1e-12, atol=0)


def test_bootstrap_error_of_a_mean_is_the_known_one_and_a_seed_repeats_it():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    places = resamples(400, 400, seed=3)
    error = bootstrap_error(lambda drawn: float(values[drawn].mean()), places)
    assert_close(error, float(values.std()) / 20, rtol=0.15, atol=0)
    assert torch.equal(places, resamples(400, 400, seed=3)) and not torch.equal(places, resamples(400, 400, seed=4))
    assert torch.equal(as_counts(places).sum(1), torch.full((400,), 400))


def test_what_has_no_distance():
    with pytest.raises(DataError, match="1 vectors; at least 2 are needed for a covariance"):
        fit_gaussian(torch.ones(1, 3))
    with pytest.raises(DataError, match="features are not finite"):
        fit_gaussian(torch.full((3, 2), math.nan))
    for distance in (frechet_distance, kernel_distance, within_manifold):
        with pytest.raises(ShapeError, match="features of 3 and 4 dimensions; equal numbers are needed"):
            distance(torch.randn(9, 3), torch.randn(9, 4))
    with pytest.raises(DataError, match="9 and 1 vectors"):
        kernel_distance(torch.ones(9, 3), torch.ones(1, 3))
    with pytest.raises(ConfigError, match=r"k=5: 5 vectors have 1\.\.4 neighbours"):
        within_manifold(torch.ones(2, 3), torch.ones(5, 3))
    with pytest.raises(ConfigError, match=r"subset_size=10: 2\.\.9"):
        subset_kernel_distance(torch.ones(9, 3), torch.ones(9, 3), 10)
    with pytest.raises(DataError, match="sum to 1"):
        classifier_score(torch.ones(3, 2))
    with pytest.raises(ConfigError, match="5 resamples are too few"):
        resamples(10, 5, 0)
