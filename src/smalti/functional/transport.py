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


@torch.no_grad()
def sinkhorn_offsets(
    logits: Float[Tensor, "M K"], temp: float, iterations: int = 3, chunk: int | None = None
) -> Float[Tensor, " K"]:
    """What :func:`sinkhorn` takes from each prototype: its assignments are ``softmax(logits / temp - offsets)``.

    After a round, what was taken from the tokens is a factor that their softmax undoes; only what was taken from the
    prototypes remains. So the assignments need not be held, and look like centred ones (DINO's centre / temp). A round
    is one pass over the logits: exponentials below each token's largest and two products with a vector, several times
    faster than in logarithms. The price: a prototype that lies more than 87 temperatures (float32) below the best one
    of every token underflows, and stays unused where :func:`sinkhorn` fills it; for unit prototypes and tokens that
    asks for a temperature below 0.023.

    Args:
        logits: as for :func:`sinkhorn`, any float type.
        temp: above 0.
        iterations: rounds, at least 1.
        chunk: tokens looked at together; it bounds the memory beside ``logits`` and changes only rounding. None: as
            many as make 2**26 logits.

    Returns:
        ``(K,)`` float32 (float64 for such logits), finite. Where no process has a token it means nothing.

    Raises:
        ConfigError: for a temperature or a number of rounds that can't be used.
    """
    if temp <= 0 or iterations < 1:
        raise ConfigError(f"Sinkhorn offsets with temp={temp} and {iterations} rounds; temp > 0 and 1 are needed")
    rows = chunk or max(1, (1 << 26) // logits.shape[1])
    factors = torch.ones_like(at_least_float32(logits[:1].sum(0)))
    tiny = torch.finfo(factors.dtype).tiny
    own_top = logits.amax(1).amax(0, keepdim=True) if len(logits) else logits.new_full((1,), float("-inf"))
    top = at_least_float32(max_over_processes(own_top)) / temp
    with torch.autocast(logits.device.type, enabled=False):  # half precision products would be too coarse
        for number in range(iterations):
            sums = torch.zeros_like(factors)
            for part in torch.split(logits, rows):
                scaled = at_least_float32(part) / temp
                most = scaled.amax(1, keepdim=True)
                q = (scaled - most).exp_()
                token = 1 / (q @ factors).clamp(min=tiny) if number else (most[:, 0] - top).exp()
                sums += token @ q
            factors = 1 / sum_over_processes(sums).clamp(min=tiny)
    return -factors.log()
