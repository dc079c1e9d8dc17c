"""Assignments of tokens to prototypes that use all prototypes equally (Sinkhorn-Knopp)."""

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
    """Soft assignments by Sinkhorn-Knopp iteration over the tokens of all processes.

    Each round divides by the sum of each prototype over all tokens, then by the sum of each token over all prototypes.
    The usual factors 1/K and 1/M cancel and are omitted; everything is computed in log space, so that no temperature
    overflows. All processes must call it, each with any number of tokens, including none.

    Args:
        logits: ``(M, K)`` similarities of this process's tokens to the prototypes, any float type.
        temp: temperature, above 0.
        iterations: number of rounds, at least 0.
        softmax_first: start from the softmax (LOCA), not from the exponential (SwAV, iBOT, DINOv2). Results are equal
            after many rounds, but not after three.

    Returns:
        ``(M, K)`` float32 (float64 for such logits), without gradient; after at least one round rows sum to 1.

    Raises:
        ConfigError: for an invalid temperature or number of rounds.

    Source: Cuturi, arXiv:1306.0895v1; Caron et al., SwAV, arXiv:2006.09882v5, Sec. 3.1 and App. A.
    """
    if temp <= 0 or iterations < 0:
        raise ConfigError(
            f"Sinkhorn-Knopp with temp={temp} and iterations={iterations}; temp > 0 and iterations >= 0 are needed"
        )
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
    """Offsets of the prototypes: the assignments of :func:`sinkhorn` are ``softmax(logits / temp - offsets)``.

    After a round, the factors of the tokens cancel in their softmax; only those of the prototypes remain. So
    assignments needn't be stored, and have the form of centered ones (DINO's center / temp). A round is one pass over
    the logits (exponentials relative to each token's maximum, and two products with a vector), several times faster
    than in log space. The drawback: a prototype more than 87 temperatures (float32) below the best one of every token
    underflows and stays unused, unlike in :func:`sinkhorn`; for unit prototypes and tokens, this needs a temperature
    below 0.023.

    Args:
        logits: as for :func:`sinkhorn`, any float type.
        temp: temperature, above 0.
        iterations: number of rounds, at least 1.
        chunk: tokens processed at a time; limits memory besides ``logits``, and only affects rounding. None: 2**26
            logits.

    Returns:
        ``(K,)`` float32 (float64 for such logits), finite; arbitrary if no process has tokens.

    Raises:
        ConfigError: for an invalid temperature or number of rounds.
    """
    if temp <= 0 or iterations < 1:
        raise ConfigError(
            f"Sinkhorn-Knopp offsets with temp={temp} and iterations={iterations}; temp > 0 and iterations >= 1 are "
            "needed"
        )
    rows = chunk or max(1, (1 << 26) // logits.shape[1])
    factors = torch.ones_like(at_least_float32(logits[:1].sum(0)))
    tiny = torch.finfo(factors.dtype).tiny
    own_top = logits.amax(1).amax(0, keepdim=True) if len(logits) else logits.new_full((1,), float("-inf"))
    top = at_least_float32(max_over_processes(own_top)) / temp
    with torch.autocast(logits.device.type, enabled=False):  # half-precision products are too coarse
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
