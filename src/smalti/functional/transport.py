"""Assignments of tokens to prototypes under which all prototypes are used alike."""

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.errors import ConfigError
from smalti.functional.precision import at_least_float32
from smalti.functional.processes import max_over_processes, sum_over_processes


@torch.no_grad()
def sinkhorn(
    logits: Float[Tensor, "M K"], temp: float, iterations: int = 3, softmax_first: bool = False
) -> Float[Tensor, "M K"]:
    """Soft assignments by Sinkhorn and Knopp's iteration, over the tokens of all processes.

    Each round divides by the sum of each prototype over all tokens, then by the sum of each token over all prototypes.
    The usual factors 1/K and 1/M cancel and are left out; everything is computed in logarithms, so that no
    temperature overflows. All processes must call it, each with as many tokens as it has, also none.

    Args:
        logits: ``(M, K)`` similarities of this process's tokens to the prototypes, any float type.
        temp: above 0, what they are divided by.
        iterations: rounds, at least 0.
        softmax_first: start from the softmax (LOCA), not from the exponential (SwAV, iBOT, DINOv2). The two end alike
            after many rounds, but not after three.

    Returns:
        ``(M, K)`` float32 (float64 for such logits), without gradient; after at least one round rows sum to 1.

    Raises:
        ConfigError: for a temperature or a number of rounds that can't be used.

    Source: Cuturi, arXiv:1306.0895v1; Caron et al., SwAV, arXiv:2006.09882v5, Sec. 3.1 and App. A.
    """
    if temp <= 0 or iterations < 0:
        raise ConfigError(f"Sinkhorn with temp={temp} and {iterations} rounds; temp > 0 and at least 0 are needed")
    log_q = at_least_float32(logits) / temp
    if softmax_first:
        log_q = log_q.log_softmax(1)
    for _ in range(iterations):
        log_q = log_q - _log_column_sums(log_q)
        log_q = log_q.log_softmax(1)
    return log_q.exp()


def _log_column_sums(log_q: Float[Tensor, "M K"]) -> Float[Tensor, " K"]:
    """Logarithm of each prototype's sum over the tokens of all processes."""
    own = log_q.amax(0) if len(log_q) else log_q.new_full(log_q.shape[1:], float("-inf"))
    most = max_over_processes(own)
    return most + sum_over_processes((log_q - most).exp().sum(0)).log()
