"""Health of a run: sums and finite checks that stay on the device and are read at intervals."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import get_total_norm

from smalti.models.encoder import Encoder, eval_mode

GRAD_NORM = "grad_norm"
WEIGHTS = "weights"


@dataclass(frozen=True)
class HealthReading:
    """Result of :meth:`Health.read`, over the steps since the last reading."""

    means: dict[str, float]
    """Name -> mean over steps and processes: loss terms, observations, ``grad_norm``."""
    bad: dict[str, int]
    """Name -> first step at which it was not finite, of loss terms, ``grad_norm`` and ``weights``; empty if all
    are finite."""


class Health:
    """Collects scalars of every step without waiting for the device."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._watched = 0
        self._sum: Tensor | None = None
        self._first_bad: Tensor | None = None
        self._steps = 0

    @torch.no_grad()
    def observe(
        self, step: int, losses: Mapping[str, Tensor], grad_norm: Tensor, observations: Mapping[str, Tensor]
    ) -> None:
        """Record a step, without copying to the host.

        Args:
            step: number of the step just completed, 1 for the first.
            losses: named loss terms, scalars on one device.
            grad_norm: scalar on the same device.
            observations: further scalars, averaged; they may be non-finite.
        """
        names = [*(f"loss/{name}" for name in losses), GRAD_NORM, *observations]
        values = torch.stack(
            [value.detach().float() for value in (*losses.values(), grad_norm, *observations.values())]
        )
        if self._sum is None or self._first_bad is None or names != self._names:
            self._names, self._watched, self._steps = names, len(losses) + 1, 0
            self._sum = torch.zeros_like(values)
            self._first_bad = torch.full((self._watched,), torch.iinfo(torch.int64).max, device=values.device)
        self._sum += values
        bad = ~torch.isfinite(values[: self._watched])
        self._first_bad = torch.where(bad, self._first_bad.clamp(max=step), self._first_bad)
        self._steps += 1

    @torch.no_grad()
    def read(self, step: int, weights: Iterable[Tensor]) -> HealthReading:
        """Means and the first non-finite step since the last call, over all processes; synchronises with the device.

        Weights count as non-finite if they or the sum of their squares are: a loss can stay finite for some steps
        after weights overflow.

        Args:
            step: completed steps.
            weights: all tensors of a checkpoint (this process's part of sharded ones), checked now; integer tensors
                are skipped.
        """
        if self._sum is None or self._first_bad is None:
            return HealthReading({}, {})
        never = torch.iinfo(torch.int64).max
        is_finite = torch.isfinite(get_total_norm([value for value in weights if value.is_floating_point()]))
        of_weights = torch.where(is_finite, never, step).to(self._first_bad)
        mean, first_bad = self._sum / self._steps, torch.cat([self._first_bad, of_weights[None]])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
            torch.distributed.all_reduce(first_bad, op=torch.distributed.ReduceOp.MIN)
        steps = dict(zip([*self._names[: self._watched], WEIGHTS], first_bad.tolist(), strict=True))
        reading = HealthReading(
            dict(zip(self._names, mean.tolist(), strict=True)),
            {name: step for name, step in steps.items() if step != never},
        )
        self._sum = self._first_bad = None
        return reading


@torch.no_grad()
def feature_health(encoder: Encoder, images: Float[Tensor, "B C H W"], max_tokens: int = 4096) -> dict[str, float]:
    """Spread of an encoder's patch tokens; values near zero indicate collapse.

    Args:
        encoder: in train or eval mode, which is restored.
        images: normalised images.
        max_tokens: number of tokens used, evenly spaced.

    Returns:
        ``feature_std``: standard deviation over tokens, mean over dimensions; ``effective_rank``: exponential of the
        entropy of the normalised singular values of the centred tokens, 1..D.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007, Def. 1; as RankMe, Garrido et al., arXiv:2210.02885v3.
    """
    with eval_mode(encoder):
        tokens = encoder.encode(images).patches.flatten(0, 1).float()
    # float32 even under autocast: GPUs have no half-precision eigenvalues, and a bf16 covariance is too coarse
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = tokens[:: max(1, len(tokens) // max_tokens)]
        if not torch.isfinite(tokens).all():  # weights that are about to overflow
            return {"feature_std": math.nan, "effective_rank": math.nan}
        centred = tokens - tokens.mean(0)
        values = torch.linalg.eigvalsh(centred.T @ centred / len(centred)).clamp(min=0).sqrt()
        shares = values / values.sum().clamp(min=1e-12)
        rank = torch.special.entr(shares).sum().exp()
    return {"feature_std": float(centred.square().mean(0).sqrt().mean()), "effective_rank": float(rank)}
