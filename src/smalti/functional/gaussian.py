"""Exact evaluation of patch orders for Gaussian tokens with known covariance.

The remaining entropy of all tokens given the first k of an order is then a determinant and needs no experiment.
Letters: N tokens of d values each, C their covariance ``(N d, N d)``, token-major. Everything is float64.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import ConfigError, ShapeError

NOISE_FLOOR = 0.01
"""nu: noise floor, a variance relative to a token's, below which a token counts as known."""


def remaining_entropy(
    covariance: Float[Tensor, "M M"], order: Int[Tensor, " N"], noise_floor: float = NOISE_FLOOR
) -> Float[Tensor, " K"]:
    """H_c of every prefix: ``sum_n 1/2 ln det(I + C_n|S / nu)`` for S the first 0, 1, ..., N tokens.

    Eq. (8) of Guo et al., arXiv:2511.22281v2, with a noise floor: seen tokens, whose entropy would be minus infinity,
    count 0.

    Args:
        covariance: ``(N d, N d)``.
        order: all N tokens, the first one first.
        noise_floor: nu.

    Returns:
        ``(N + 1,)`` in nats, never increasing.

    Raises:
        ShapeError: if the order's length does not divide the covariance.
    """
    dim = _token_dim(covariance, order)
    return torch.stack([_entropies(left, dim, noise_floor).sum() for left in _conditioned(covariance, order, dim)])


def remaining_variance(covariance: Float[Tensor, "M M"], order: Int[Tensor, " N"]) -> Float[Tensor, " K"]:
    """Fraction of the variance unexplained by the first 0, 1, ..., N tokens, ``(N + 1,)``; from 1 to 0."""
    dim = _token_dim(covariance, order)
    left = torch.stack([left.diagonal().sum() for left in _conditioned(covariance, order, dim)])
    return left / left[0]


def chain_entropy(covariance: Float[Tensor, "M M"], order: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """Eq. (1) of the paper: each token's entropy given all that come before it, summed. By the chain rule this is the
    joint entropy, so it is the same for every order and can't compare orders."""
    dim = _token_dim(covariance, order)
    total = torch.zeros((), dtype=torch.float64)
    for left, token in zip(_conditioned(covariance, order, dim), order.tolist(), strict=False):
        own = left[token * dim : (token + 1) * dim, token * dim : (token + 1) * dim]
        total = total + 0.5 * torch.logdet(2 * math.pi * math.e * own)
    return total


def greedy_order(
    covariance: Float[Tensor, "M M"], dim: int = 1, noise_floor: float | None = NOISE_FLOOR
) -> Int[Tensor, " N"]:
    """The greedy order: at each step the token that leaves the least entropy or variance, by exact conditioning.

    Args:
        covariance: ``(N d, N d)``.
        dim: d.
        noise_floor: nu of the entropy; None: use variance.
    """
    num = len(covariance) // dim
    left, order = covariance.double(), list[int]()
    for _ in range(num):
        best, best_left, best_value = -1, left, math.inf
        for token in range(num):
            if token in order:
                continue
            after = _condition(left, token, dim)
            value = after.diagonal().sum() if noise_floor is None else _entropies(after, dim, noise_floor).sum()
            if float(value) < best_value - 1e-12:
                best, best_left, best_value = token, after, float(value)
        order.append(best)
        left = best_left
    return torch.tensor(order)


def area_under_prefix(curve: Float[Tensor, " K"], fraction: float = 1.0) -> float:
    """Area under a curve over the first 0, 1, ..., N tokens, up to a fraction of them, divided by its first value and
    the range: 1 for a constant curve. AUC_full with fraction 1, AUC_q with a quarter.

    Raises:
        ConfigError: if the fraction is less than one token or more than all.
    """
    last = math.floor(fraction * (len(curve) - 1))
    if not 1 <= last <= len(curve) - 1:
        raise ConfigError(
            f"fraction={fraction:g} of {len(curve) - 1} tokens; at least one token and at most all are needed"
        )
    return float(torch.trapezoid(curve[: last + 1].double()) / last / curve[0])


def pairwise_r_squared(covariance: Float[Tensor, "M M"], dim: int = 1) -> Float[Tensor, "N N"]:
    """``A[n, j]``: fraction of token n's variance explained by token j alone; 0 on the diagonal. A dependency graph
    without training."""
    num = len(covariance) // dim
    blocks = covariance.double().view(num, dim, num, dim).permute(0, 2, 1, 3)  # (N, N, d, d)
    own = blocks.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    explained = torch.einsum("njab,jbc,njac->nj", blocks, torch.linalg.inv(own), blocks)
    fractions = explained / own.diagonal(dim1=1, dim2=2).sum(-1)[:, None]
    return fractions.clamp(0, 1).fill_diagonal_(0)


def smooth_world(side: int = 8) -> Float[Tensor, "N N"]:
    """A stationary field on a grid: ``exp(-d^2 / 8) + 0.02 I``; tokens only differ by their distance to the border."""
    return torch.exp(-_squared_distances(side) / 8) + 0.02 * torch.eye(side**2, dtype=torch.float64)


def hub_world(num: int = 64, num_hubs: int = 4, seed: int = 0) -> Float[Tensor, "N N"]:
    """Tokens 0..num_hubs-1 are independent; each other token is a Dirichlet(0.3) mixture of them plus noise of variance
    0.15; scaled to unit variances."""
    rng = np.random.default_rng(seed)
    mixes = np.concatenate([np.eye(num_hubs), rng.dirichlet(np.full(num_hubs, 0.3), num - num_hubs)])
    noise = np.concatenate([np.zeros(num_hubs), np.full(num - num_hubs, 0.15)])
    covariance = mixes @ mixes.T + np.diag(noise) + 1e-3 * np.eye(num)
    scale = 1 / np.sqrt(np.diag(covariance))
    return torch.from_numpy(covariance * scale[:, None] * scale)


def mixed_world(side: int = 8) -> Float[Tensor, "N N"]:
    """A field with a long correlation length (3 cells) within 2.5 cells of the centre and a short one (0.7) outside, by
    Gibbs' kernel, plus 0.02 I."""
    cells = _cells(side)
    inside = (cells - (side - 1) / 2).square().sum(-1).sqrt() <= 2.5
    lengths = torch.where(inside, 3.0, 0.7).double()
    mean = (lengths[:, None] ** 2 + lengths**2) / 2
    kernel = lengths[:, None] * lengths / mean * torch.exp(-_squared_distances(side) / (2 * mean))
    return kernel + 0.02 * torch.eye(side**2, dtype=torch.float64)


def _cells(side: int) -> Tensor:
    axis = torch.arange(side, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


def _squared_distances(side: int) -> Tensor:
    cells = _cells(side)
    return (cells[:, None] - cells).square().sum(-1)


def _token_dim(covariance: Tensor, order: Tensor) -> int:
    if covariance.ndim != 2 or len(covariance) != covariance.shape[1] or not len(order) or len(covariance) % len(order):
        raise ShapeError(
            f"covariance of shape {tuple(covariance.shape)} for an order of {len(order)} tokens; (N d, N d) is needed"
        )
    return len(covariance) // len(order)


def _conditioned(covariance: Tensor, order: Tensor, dim: int) -> list[Tensor]:
    """Conditional covariance given the first 0, 1, ..., N tokens."""
    left = [covariance.double()]
    for token in order.tolist():
        left.append(_condition(left[-1], token, dim))
    return left


def _condition(covariance: Tensor, token: int, dim: int) -> Tensor:
    """The covariance conditioned on one more token, whose rows become 0."""
    own = slice(token * dim, (token + 1) * dim)
    columns = covariance[:, own]
    after = covariance - columns @ torch.linalg.solve(covariance[own, own], columns.mT)
    after[own], after[:, own] = 0.0, 0.0
    return after


def _entropies(covariance: Tensor, dim: int, noise_floor: float) -> Tensor:
    """``(N,)`` entropy of each token above the noise floor."""
    num = len(covariance) // dim
    own = covariance.view(num, dim, num, dim).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (N, d, d)
    return 0.5 * torch.logdet(torch.eye(dim, dtype=torch.float64) + own / noise_floor)
