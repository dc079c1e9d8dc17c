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
    if iterations == 0:
        return log_q.exp()
    return (log_q - _column_offsets(log_q, 1.0, iterations, max(len(log_q), 1))).softmax(1)


@torch.no_grad()
def sinkhorn_offsets(
    logits: Float[Tensor, "M K"], temp: float, iterations: int = 3, chunk: int = 4096
) -> Float[Tensor, " K"]:
    """What :func:`sinkhorn` takes from each prototype: its assignments are ``softmax(logits / temp - offsets)``.

    After a round, what was taken from the tokens is a factor that their softmax undoes; only what was taken from the
    prototypes remains. So the assignments need not be held at once, and look like centred ones (DINO's centre / temp).

    Args:
        logits: as for :func:`sinkhorn`, any float type.
        temp: above 0.
        iterations: rounds, at least 1.
        chunk: tokens looked at together; it bounds the memory beside ``logits`` and changes only rounding.

    Returns:
        ``(K,)`` float32 (float64 for such logits). Where no process has a token it means nothing.

    Raises:
        ConfigError: for a temperature or a number of rounds that can't be used.
    """
    if temp <= 0 or iterations < 1:
        raise ConfigError(f"Sinkhorn offsets with temp={temp} and {iterations} rounds; temp > 0 and 1 are needed")
    return _column_offsets(logits, temp, iterations, chunk)


def _column_offsets(logits: Float[Tensor, "M K"], temp: float, iterations: int, chunk: int) -> Float[Tensor, " K"]:
    offsets = torch.zeros_like(at_least_float32(logits[:0].sum(0)))
    for number in range(iterations):
        own = torch.full_like(offsets, float("-inf"))
        for part in torch.split(logits, chunk):
            log_q = at_least_float32(part) / temp
            if number:
                log_q = log_q - (log_q - offsets).logsumexp(1, keepdim=True)
            own = torch.logaddexp(own, log_q.logsumexp(0))
        most = max_over_processes(own)
        offsets = most + sum_over_processes((own - most).exp()).log()
    return offsets
