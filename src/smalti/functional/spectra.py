"""Effective dimensionality of a set of vectors.

Letters: n vectors, D dimensions.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Sums over n vectors, float64 on the CPU."""

    count: int
    total: Tensor
    """``(D,)`` sum of the vectors."""
    square: Tensor
    """``(D, D)`` sum of their outer products."""

    @property
    def mean(self) -> Float[Tensor, " D"]:
        """Mean of the vectors."""
        return self.total / self.count

    @property
    def covariance(self) -> Float[Tensor, "D D"]:
        """Population covariance."""
        return self.square / self.count - self.mean[:, None] * self.mean

    def plus(self, other: "Moments") -> "Moments":
        """Moments of the union of both sets."""
        return Moments(self.count + other.count, self.total + other.total, self.square + other.square)


def sum_moments(batches: Iterable[Float[Tensor, "... D"]]) -> Moments:
    """Moments in one pass; batching only affects rounding."""
    moments = Moments(0, torch.zeros(1), torch.zeros(1))
    for batch in batches:
        vectors = batch.reshape(-1, batch.shape[-1]).cpu().double()  # float64: the mean may be far from 0
        moments = moments.plus(Moments(len(vectors), vectors.sum(0), vectors.T @ vectors))
    return moments


def singular_values(moments: Moments, centred: bool) -> Float[Tensor, " D"]:
    """Singular values of the ``(n, D)`` matrix of the vectors, optionally centred; ascending."""
    gram = moments.covariance * moments.count if centred else moments.square
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()


def singular_values_of(vectors: Float[Tensor, "*sets n D"]) -> Float[Tensor, "*sets r"]:
    """Singular values of matrices of few vectors or few dimensions, ``r = min(n, D)``; float64, ascending.

    Args:
        vectors: ``(*sets, n, D)``, centred by the caller if that is wanted.
    """
    wide = vectors.double()
    gram = wide @ wide.mT if wide.shape[-2] <= wide.shape[-1] else wide.mT @ wide
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()


def effective_rank(values: Float[Tensor, " D"]) -> float:
    """Exponential of the entropy of the normalised singular values, 1..D; 1 if all are 0.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007, Def. 1.
    """
    fractions = values / values.sum().clamp(min=1e-12)
    return float(torch.special.entr(fractions).sum().exp())


def rankme(values: Float[Tensor, " D"], eps: float = 1e-7) -> float:
    """The effective rank with ``eps`` added to each normalised singular value.

    Args:
        values: singular values of vectors that aren't centred.
        eps: the published value.

    Source: Garrido et al., RankMe, arXiv:2210.02885v3.
    """
    fractions = values / values.sum().clamp(min=1e-12) + eps
    return float(torch.special.entr(fractions).sum().exp())
