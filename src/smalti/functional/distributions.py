"""Distances between two sets of feature vectors, to evaluate generated images.

These numbers depend on the feature space and the number of images; compare them with those of two sets of real images.
All are computed in float64. Letters: n and m vectors, D = E dimensions, C classes, K neighbours, R repeats.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smalti.errors import ConfigError, DataError, ShapeError
from smalti.functional.neighbours import nearest

_ROWS_AT_ONCE = 1024
REPEATS = 20
"""Minimum number of resamples for a standard error."""


class Gaussian(NamedTuple):
    """Mean and covariance of a set, for the Fréchet distance."""

    mean: Tensor
    """``(D,)`` float64."""
    covariance: Tensor
    """``(D, D)`` float64, unbiased."""


def fit_gaussian(features: Float[Tensor, "n D"]) -> Gaussian:
    """Mean and unbiased covariance.

    Raises:
        DataError: for fewer than two vectors, or non-finite ones.
    """
    if len(features) < 2:
        raise DataError(f"{len(features)} vectors; at least 2 are needed for a covariance")
    mean = torch.stack([part.double().sum(0) for part in torch.split(features, _ROWS_AT_ONCE)]).sum(0) / len(features)
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for part in torch.split(features, _ROWS_AT_ONCE):
        centred = part.double() - mean
        products += centred.mT @ centred
    if not torch.isfinite(products).all():
        raise DataError("features are not finite, so they have no distance; check images and weights")
    return Gaussian(mean, products / (len(features) - 1))


def frechet_between(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians, ``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2)``, 0 or more.

    The last trace is the sum of the singular values of ``L_a^T L_b`` with ``S = L L^T``. This avoids the root of a
    matrix that may be singular, so it is numerically stable even for fewer vectors than dimensions (but then biased).

    Raises:
        ShapeError: if they differ in dimensions.

    Source: Dowson and Landau, Journal of Multivariate Analysis 12, 1982; Heusel et al., arXiv:1706.08500v6, Eq. (6).
    Cost: D^3.
    """
    if a.mean.shape != b.mean.shape:
        raise ShapeError(f"features of {len(a.mean)} and {len(b.mean)} dimensions; equal numbers are needed")
    cross = torch.linalg.svdvals(_factor(a.covariance).mT @ _factor(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def frechet_distance(a: Float[Tensor, "n D"], b: Float[Tensor, "m E"]) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets.

    This is FID only with Inception's pool features and 50,000 images. It is biased upwards, more so for fewer vectors:
    compare equal numbers of at least 2 D.
    """
    return frechet_between(fit_gaussian(a), fit_gaussian(b))


def kernel_distance(
    a: Float[Tensor, "n D"],
    b: Float[Tensor, "m E"],
    counts_a: Int[Tensor, "R n"] | None = None,
    counts_b: Int[Tensor, "S m"] | None = None,
) -> Float[Tensor, " R"]:
    """Unbiased squared maximum mean discrepancy of two sets, with the kernel ``(x . y / D + 1)^3``.

    Unlike the Fréchet distance, its mean does not depend on the numbers of vectors; it may be negative.

    Args:
        a: one set.
        b: another set.
        counts_a: how often each vector of ``a`` was drawn, one row per resample; None: each once. A vector drawn twice
            is never compared with itself, so that resampling doesn't add bias.
        counts_b: the same for ``b``.

    Returns:
        ``(R,)`` float64, with R = 1 without counts.

    Raises:
        DataError: for fewer than two vectors in a set.
        ShapeError: if they differ in dimensions.

    Source: Gretton et al., JMLR 13, 2012, Eq. (3); the kernel: Binkowski et al., KID, arXiv:1801.01401v5, Sec. 4.
    Cost: (n + m)^2 D, with one block of rows in memory at a time.
    """
    if min(len(a), len(b)) < 2:
        raise DataError(f"{len(a)} and {len(b)} vectors; at least 2 of each are needed for a kernel distance")
    if a.shape[1] != b.shape[1]:
        raise ShapeError(f"features of {a.shape[1]} and {b.shape[1]} dimensions; equal numbers are needed")
    weights_a, weights_b = _weights(counts_a, a), _weights(counts_b, b)
    across = _kernel_sum(a, weights_a, b, weights_b)
    mean_across = across / (weights_a.sum(1) * weights_b.sum(1))
    return _mean_within(a, weights_a) + _mean_within(b, weights_b) - 2 * mean_across


def subset_kernel_distance(
    a: Float[Tensor, "n D"],
    b: Float[Tensor, "m D"],
    subset_size: int = 1000,
    num_subsets: int = 100,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " R"]:
    """Kernel distances of random subsets without replacement, whose mean and standard deviation are published as KID.

    Args:
        a: one set.
        b: another set.
        subset_size: vectors of each set in a subset.
        num_subsets: R.
        generator: generator on the CPU; None: torch's own.

    Raises:
        ConfigError: if a set has fewer vectors than a subset.
    """
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ConfigError(f"subset_size={subset_size}: 2..{min(len(a), len(b))} is needed")

    def draw(cloud: Tensor) -> Tensor:
        return cloud[torch.randperm(len(cloud), generator=generator)[:subset_size].to(cloud.device)]

    return torch.cat([kernel_distance(draw(a), draw(b)) for _ in range(num_subsets)])


def within_manifold(queries: Float[Tensor, "n D"], cloud: Float[Tensor, "m E"], k: int = 5) -> Bool[Tensor, " n"]:
    """Which vectors lie in the manifold of a set: within the distance of a vector's k-th neighbour from that vector.

    For generated queries and a real set the mean is precision (generated images that look real), for real queries and a
    generated set recall (real images that are covered).

    Args:
        queries: vectors to test.
        cloud: the vectors that define the manifold.
        k: K; a vector is not its own neighbour.

    Raises:
        ConfigError: if the set has fewer than k + 1 vectors.
        ShapeError: if they differ in dimensions.

    Source: Kynkäänniemi et al., arXiv:1904.06991v3, Eq. (1) and (2).
    Cost: (n + m) m D.
    """
    if queries.shape[1] != cloud.shape[1]:
        raise ShapeError(f"features of {queries.shape[1]} and {cloud.shape[1]} dimensions; equal numbers are needed")
    if not 1 <= k < len(cloud):
        raise ConfigError(f"k={k}: {len(cloud)} vectors have 1..{len(cloud) - 1} neighbours; choose one of these")
    # Centring keeps squared norms small for float32; it doesn't change distances
    middle = cloud.double().mean(0)
    spread = (cloud.double() - middle).square().mean().sqrt().clamp(min=1e-30)
    queries, cloud = ((vectors.double() - middle) / spread for vectors in (queries, cloud))
    squares = cloud.square().sum(1, keepdim=True)
    # the nearest has the largest x . y - |y|^2 / 2
    found = _search(cloud, torch.cat([cloud, -squares / 2], 1), k + 1)
    radii = torch.cat(
        [
            (part[:, None] - cloud[places]).square().sum(2).amax(1)
            for part, places in zip(torch.split(cloud, _ROWS_AT_ONCE), torch.split(found, _ROWS_AT_ONCE), strict=True)
        ]
    )  # squared; the largest of k + 1, one of which is the vector itself
    # a query is in some ball if it is in the one with the largest radius^2 - |x - y|^2
    balls = torch.cat([cloud, (radii[:, None] - squares) / 2], 1)
    best = _search(queries, balls, 1)[:, 0]
    return (queries - cloud[best]).square().sum(1) <= radii[best] * (1 + 1e-12)


def classifier_score(probabilities: Float[Tensor, "n C"]) -> float:
    """``exp(mean KL(p(y|x) || p(y)))``, 1 to C: high if predictions are confident for each image and diverse over all.

    This is the inception score only with Inception as classifier. It doesn't use real images.

    Raises:
        DataError: if a row does not sum to 1, or there are no rows.

    Source: Salimans et al., arXiv:1606.03498v1, Sec. 4.
    """
    p = probabilities.double()
    if not len(p) or not torch.allclose(p.sum(1), p.new_ones(len(p)), atol=1e-4) or (p < 0).any():
        raise DataError("probabilities don't sum to 1 in each row, or are empty; class probabilities are needed")
    p = p / p.sum(1, keepdim=True)
    # H(mean) - mean H, which equals the mean KL divergence
    divergence = torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()
    return float(divergence.exp())


def resamples(count: int, repeats: int, seed: int) -> Int[Tensor, "R n"]:
    """Indices drawn with replacement, one row per resample; determined by the seed.

    Raises:
        ConfigError: for fewer than 20 repeats.
    """
    if repeats < REPEATS:
        raise ConfigError(f"{repeats} resamples are too few for a standard error; at least {REPEATS} are needed")
    return torch.randint(count, (repeats, count), generator=torch.Generator().manual_seed(seed))


def as_counts(places: Int[Tensor, "R n"]) -> Int[Tensor, "R n"]:
    """How often each index was drawn in each resample."""
    return torch.zeros_like(places).scatter_add_(1, places, torch.ones_like(places))


def bootstrap_error(statistic: Callable[[Int[Tensor, " n"]], float], places: Int[Tensor, "R n"]) -> float:
    """Bootstrap standard error: the standard deviation of a statistic over resamples.

    Args:
        statistic: function of the indices of a resample.
        places: indices from :func:`resamples`.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, Algorithm 6.1.
    """
    return float(torch.tensor([statistic(row) for row in places], dtype=torch.float64).std())


def _factor(covariance: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """L with ``L L^T`` equal to the covariance, which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def _search(queries: Float[Tensor, "n D"], keys: Float[Tensor, "m E"], k: int) -> Int[Tensor, "n K"]:
    """Keys with the largest inner product with the query extended by 1."""
    return nearest(torch.cat([queries, torch.ones_like(queries[:, :1])], 1).float(), keys.float(), k)[1]


def _weights(counts: Int[Tensor, "R n"] | None, cloud: Float[Tensor, "n D"]) -> Float[Tensor, "R n"]:
    if counts is None:
        return torch.ones(1, len(cloud), dtype=torch.float64, device=cloud.device)
    return counts.to(cloud.device, torch.float64)


def _kernel_sum(
    a: Float[Tensor, "n D"], weights_a: Float[Tensor, "R n"], b: Float[Tensor, "m D"], weights_b: Float[Tensor, "S m"]
) -> Float[Tensor, " R"]:
    """Weighted sum of the kernel over all pairs, in one pass for all rows of weights; a single row broadcasts."""
    total = torch.zeros(max(len(weights_a), len(weights_b)), dtype=torch.float64, device=a.device)
    keys = b.double()
    for part, weights in zip(torch.split(a, _ROWS_AT_ONCE), torch.split(weights_a, _ROWS_AT_ONCE, 1), strict=True):
        kernel = (part.double() @ keys.mT / a.shape[1] + 1) ** 3
        total += (weights * (weights_b @ kernel.mT)).sum(1)
    return total


def _mean_within(cloud: Float[Tensor, "n D"], weights: Float[Tensor, "R n"]) -> Float[Tensor, " R"]:
    """Mean of the kernel over pairs of different vectors."""
    own = ((cloud.double().square().sum(1) / cloud.shape[1] + 1) ** 3 * weights.square()).sum(1)
    pairs = weights.sum(1).square() - weights.square().sum(1)
    return (_kernel_sum(cloud, weights, cloud, weights) - own) / pairs
