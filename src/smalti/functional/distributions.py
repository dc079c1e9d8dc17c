"""How far two clouds of feature vectors are apart: what generated images are judged by.

None of these numbers means anything without its feature space, its numbers of images, and what two sets of real images
get. Everything is computed in float64. Letters: n and m vectors, D = E dimensions, C classes, K neighbours, R repeats.
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
"""Resamples behind a standard error, at least."""


class Gaussian(NamedTuple):
    """What the Fréchet distance keeps of a cloud."""

    mean: Tensor
    """``(D,)`` float64."""
    covariance: Tensor
    """``(D, D)`` float64."""


def fit_gaussian(features: Float[Tensor, "n D"]) -> Gaussian:
    """Mean and unbiased covariance.

    Raises:
        DataError: for fewer than two vectors, or one that isn't finite.
    """
    if len(features) < 2:
        raise DataError(f"{len(features)} vectors have no covariance; at least 2 are needed")
    mean = torch.stack([part.double().sum(0) for part in torch.split(features, _ROWS_AT_ONCE)]).sum(0) / len(features)
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for part in torch.split(features, _ROWS_AT_ONCE):
        centred = part.double() - mean
        products += centred.mT @ centred
    if not torch.isfinite(products).all():
        raise DataError("features are not finite; a distance of such clouds means nothing")
    return Gaussian(mean, products / (len(features) - 1))


def frechet_between(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians, ``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2)``, 0 or more.

    The last trace is the sum of the singular values of ``L_a^T L_b`` with ``S = L L^T``: no root of a matrix that may
    be singular is drawn, so fewer vectors than dimensions do no harm to the numerics (they do to the estimate).

    Raises:
        ShapeError: if they differ in dimensions.

    Source: Dowson and Landau, Journal of Multivariate Analysis 12, 1982; Heusel et al., arXiv:1706.08500v6, Eq. (6).
    Cost: D^3.
    """
    if a.mean.shape != b.mean.shape:
        raise ShapeError(f"features of {len(a.mean)} and {len(b.mean)} dimensions have no distance")
    cross = torch.linalg.svdvals(_factor(a.covariance).mT @ _factor(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def frechet_distance(a: Float[Tensor, "n D"], b: Float[Tensor, "m E"]) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two clouds.

    With Inception's pool features of ImageNet and 50,000 images this is FID, with any others it is not. Biased upwards,
    the more the fewer vectors there are: compare equal numbers, and never fewer than twice D.
    """
    return frechet_between(fit_gaussian(a), fit_gaussian(b))


def kernel_distance(
    a: Float[Tensor, "n D"],
    b: Float[Tensor, "m E"],
    counts_a: Int[Tensor, "R n"] | None = None,
    counts_b: Int[Tensor, "S m"] | None = None,
) -> Float[Tensor, " R"]:
    """Unbiased squared maximum mean discrepancy of two clouds, with the kernel ``(x . y / D + 1)^3``.

    Unlike the Fréchet distance its mean does not depend on the numbers of vectors; it may fall below 0.

    Args:
        a: one cloud.
        b: another.
        counts_a: how often each vector of ``a`` was drawn, a row a resample; None: each once. A vector drawn twice is
            never compared with itself, so that resampling does not add what the estimator avoids.
        counts_b: likewise.

    Returns:
        ``(R,)`` float64, 1 where no counts are given.

    Raises:
        DataError: for fewer than two vectors in a cloud.
        ShapeError: if they differ in dimensions.

    Source: Gretton et al., JMLR 13, 2012, Eq. (3); the kernel: Binkowski et al., KID, arXiv:1801.01401v5, Sec. 4.
    Cost: (n + m)^2 D, of which a block of rows is in memory at a time.
    """
    if min(len(a), len(b)) < 2:
        raise DataError(f"a kernel distance of {len(a)} and {len(b)} vectors; at least 2 of each are needed")
    if a.shape[1] != b.shape[1]:
        raise ShapeError(f"features of {a.shape[1]} and {b.shape[1]} dimensions have no distance")
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
    """The kernel distance of random subsets without repeats, as KID is published: mean and spread over these.

    Args:
        a: one cloud.
        b: another.
        subset_size: vectors of each cloud in a subset.
        num_subsets: R.
        generator: on the CPU; None takes torch's own.

    Raises:
        ConfigError: if a cloud has fewer vectors than a subset.
    """
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ConfigError(f"subsets of {subset_size}: from 2 to {min(len(a), len(b))} vectors can be drawn")

    def draw(cloud: Tensor) -> Tensor:
        return cloud[torch.randperm(len(cloud), generator=generator)[:subset_size].to(cloud.device)]

    return torch.cat([kernel_distance(draw(a), draw(b)) for _ in range(num_subsets)])


def within_manifold(queries: Float[Tensor, "n D"], cloud: Float[Tensor, "m E"], k: int = 5) -> Bool[Tensor, " n"]:
    """Which vectors lie in the cloud: no further from one of its vectors than that one's k-th neighbour in the cloud.

    Of generated queries and real images the mean is the precision (what looks real), the other way round the recall
    (what of the real ones is covered).

    Args:
        queries: vectors to ask about.
        cloud: the vectors that span the manifold.
        k: K; a vector is not its own neighbour.

    Raises:
        ConfigError: if the cloud has no k + 1 vectors.
        ShapeError: if they differ in dimensions.

    Source: Kynkäänniemi et al., arXiv:1904.06991v3, Eq. (1) and (2).
    Cost: (n + m) m D.
    """
    if queries.shape[1] != cloud.shape[1]:
        raise ShapeError(f"features of {queries.shape[1]} and {cloud.shape[1]} dimensions have no distance")
    if not 1 <= k < len(cloud):
        raise ConfigError(
            f"k={k} neighbours of {len(cloud)} vectors without themselves; choose a k in 1..{len(cloud) - 1}"
        )
    # Centred, so that squared lengths are small beside what float32 resolves; distances stay
    middle = cloud.double().mean(0)
    spread = (cloud.double() - middle).square().mean().sqrt().clamp(min=1e-30)
    queries, cloud = ((vectors.double() - middle) / spread for vectors in (queries, cloud))
    squares = cloud.square().sum(1, keepdim=True)
    # Nearest is what has the greatest x . y - |y|^2 / 2
    found = _search(cloud, torch.cat([cloud, -squares / 2], 1), k + 1)
    radii = torch.cat(
        [
            (part[:, None] - cloud[places]).square().sum(2).amax(1)
            for part, places in zip(torch.split(cloud, _ROWS_AT_ONCE), torch.split(found, _ROWS_AT_ONCE), strict=True)
        ]
    )  # squared; the greatest of k + 1, of which one is the vector itself
    # In some ball is what is in the one with the greatest radius^2 - |x - y|^2
    balls = torch.cat([cloud, (radii[:, None] - squares) / 2], 1)
    best = _search(queries, balls, 1)[:, 0]
    return (queries - cloud[best]).square().sum(1) <= radii[best] * (1 + 1e-12)


def classifier_score(probabilities: Float[Tensor, "n C"]) -> float:
    """``exp(mean KL(p(y|x) || p(y)))``, 1 to C: how sure a classifier is of each image, and how varied over all.

    With Inception's 1,000 classes this is the inception score; with any other classifier it is not. It never looks at
    a real image.

    Raises:
        DataError: if a row does not sum to 1, or there is none.

    Source: Salimans et al., arXiv:1606.03498v1, Sec. 4.
    """
    p = probabilities.double()
    if not len(p) or not torch.allclose(p.sum(1), p.new_ones(len(p)), atol=1e-4) or (p < 0).any():
        raise DataError("class probabilities that sum to 1 in each row are needed")
    p = p / p.sum(1, keepdim=True)
    # H(mean) - mean H, which is the mean divergence
    divergence = torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()
    return float(divergence.exp())


def resamples(count: int, repeats: int, seed: int) -> Int[Tensor, "R n"]:
    """Places drawn with replacement, a row a resample; a function of the seed.

    Raises:
        ConfigError: for fewer than 20 repeats, of which no standard error is taken.
    """
    if repeats < REPEATS:
        raise ConfigError(f"{repeats} resamples are too few for a standard error; at least {REPEATS} are needed")
    return torch.randint(count, (repeats, count), generator=torch.Generator().manual_seed(seed))


def as_counts(places: Int[Tensor, "R n"]) -> Int[Tensor, "R n"]:
    """How often each place was drawn in each resample."""
    return torch.zeros_like(places).scatter_add_(1, places, torch.ones_like(places))


def bootstrap_error(statistic: Callable[[Int[Tensor, " n"]], float], places: Int[Tensor, "R n"]) -> float:
    """Standard deviation of a statistic over resamples: its standard error.

    Args:
        statistic: takes the places of a resample.
        places: as :func:`resamples` draws them.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, Algorithm 6.1.
    """
    return float(torch.tensor([statistic(row) for row in places], dtype=torch.float64).std())


def _factor(covariance: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """L with ``L L^T`` the covariance, which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def _search(queries: Float[Tensor, "n D"], keys: Float[Tensor, "m E"], k: int) -> Int[Tensor, "n K"]:
    """Keys with the greatest inner product with the query that has a 1 appended."""
    return nearest(torch.cat([queries, torch.ones_like(queries[:, :1])], 1).float(), keys.float(), k)[1]


def _weights(counts: Int[Tensor, "R n"] | None, cloud: Float[Tensor, "n D"]) -> Float[Tensor, "R n"]:
    if counts is None:
        return torch.ones(1, len(cloud), dtype=torch.float64, device=cloud.device)
    return counts.to(cloud.device, torch.float64)


def _kernel_sum(
    a: Float[Tensor, "n D"], weights_a: Float[Tensor, "R n"], b: Float[Tensor, "m D"], weights_b: Float[Tensor, "S m"]
) -> Float[Tensor, " R"]:
    """Weighted sum of the kernel over all pairs, in one pass for all rows of weights; one row goes with any."""
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
