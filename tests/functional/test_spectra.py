"""Ranks of clouds of vectors: closed forms, and singular values that are numpy's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from smalti.functional.spectra import effective_rank, rankme, singular_values, sum_moments


@given(seed=st.integers(0, 1000), n=st.integers(2, 30), dims=st.integers(1, 8), centred=st.booleans())
def test_singular_values_are_numpys(seed, n, dims, centred):
    vectors = np.random.default_rng(seed).normal(size=(n, dims)) + 3
    moments = sum_moments(torch.from_numpy(part) for part in np.array_split(vectors, 3))
    matrix = vectors - vectors.mean(0) if centred else vectors
    expected = np.zeros(dims)
    found = np.linalg.svd(matrix, compute_uv=False)
    expected[: len(found)] = found
    assert_close(singular_values(moments, centred).flip(0).numpy(), expected, atol=1e-5, rtol=1e-6)


def test_moments_are_mean_and_population_covariance():
    vectors = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = sum_moments([vectors[:1], vectors[1:]])
    assert moments.count == 10
    assert_close(moments.mean, vectors.flatten(0, 1).mean(0))
    assert_close(moments.covariance, torch.cov(vectors.flatten(0, 1).T, correction=0))


@pytest.mark.parametrize("number", [1, 3, 8])
def test_equal_directions_fill_as_many_dimensions(number):
    values = torch.cat([torch.zeros(8 - number), torch.full((number,), 2.5)])
    assert effective_rank(values) == pytest.approx(number)
    assert rankme(values) == pytest.approx(number, rel=2e-5 * 8)


def test_ranks_of_two_directions_by_hand():
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(torch.tensor([1.0, 3.0])) == pytest.approx(math.exp(entropy))
    with_eps = -((0.75 + 0.1) * math.log(0.85) + (0.25 + 0.1) * math.log(0.35))
    assert rankme(torch.tensor([1.0, 3.0]), eps=0.1) == pytest.approx(math.exp(with_eps))


def test_nothing_fills_one_dimension():
    assert effective_rank(torch.zeros(4)) == 1.0
