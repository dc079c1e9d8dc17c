"""CoMAE on Gaussian worlds, in which its loss has a closed form and only the graph is learned.

The best reconstruction of a Gaussian token from noisy others is linear, so the decoder is exact and the selections are
free parameters. The result shows what the paper's objective does, independent of any network (experiment E0 of the
protocol in docs/collapse.md).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.methods.comae import contrast, select_weights, signal_ratio

_VALUES = 16  # equal values per token, over which L1 is summed
_LEARNING_RATE, _START = 0.05, 0.05


class LearnedGraph(NamedTuple):
    """Result of :func:`learn_graph`."""

    weights: Tensor
    """``(N, N)`` float64, the graph A."""
    reconstruction: float
    """L_r at the end."""
    contrast: float
    """L_c at the end, unweighted."""
    temperature: float
    """tau at the end, without its floor."""


def learn_graph(
    covariance: Float[Tensor, "N N"],
    sigma: float = 0.3,
    budget: float | None = None,
    contrast_weight: float = 0.01,
    temperature_floor: float = 0.05,
    seed: int = 0,
    steps: int = 500,
) -> LearnedGraph:
    """Minimise CoMAE's objective over selections, by Adam at 0.05 from logits 0.05 N(0, 1).

    Args:
        covariance: covariance of scalar tokens.
        sigma: scale of the noise.
        budget: kappa, at weight 4; None: none, as in the paper.
        contrast_weight: weight of L_c.
        temperature_floor: lower limit of tau; 0: none.
        seed: seed of the logits.
        steps: steps of Adam.
    """
    known = covariance.float()
    num = len(known)
    off = 1 - torch.eye(num)
    logits = (_START * torch.randn(num, num, generator=torch.Generator().manual_seed(seed))).requires_grad_()
    log_temperature = torch.tensor(0.1).log().requires_grad_()
    optimizer = torch.optim.Adam([logits, log_temperature], _LEARNING_RATE)
    for _ in range(steps):
        weights = select_weights(logits, "half") * off
        left = _unexplained(known, signal_ratio(weights, sigma) * off)
        reconstruction = _VALUES * math.sqrt(2 / math.pi) * left.clamp(min=1e-9).sqrt().mean()
        told_apart = contrast(weights[None], log_temperature, temperature_floor)
        loss = reconstruction + contrast_weight * told_apart
        if budget is not None:
            loss = loss + 4 * (weights.sum(-1) / (num - 1) - budget).clamp(min=0).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    ended = (value.detach() for value in (reconstruction, told_apart, log_temperature.exp()))
    return LearnedGraph((select_weights(logits.detach(), "half") * off).double(), *(float(value) for value in ended))


def _unexplained(covariance: Tensor, alpha: Tensor) -> Tensor:
    """Unexplained variance of each token n when each other token j is seen as ``alpha_nj e_j + (1 - alpha_nj) noise``.

    ``alpha = 0`` leaves only noise, without information: this excludes a target from its own prediction.
    """
    mixed = alpha[:, :, None] * covariance * alpha[:, None, :] + torch.diag_embed((1 - alpha) ** 2)
    told = torch.linalg.solve_triangular(torch.linalg.cholesky(mixed), (alpha * covariance)[..., None], upper=False)
    return covariance.diagonal() - told[..., 0].square().sum(-1)
