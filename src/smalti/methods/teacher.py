"""Exponential moving averages of a network: teachers of self-distillation, and averaged weights."""

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from smalti.errors import ConfigError
from smalti.functional.processes import own_part
from smalti.functional.schedules import half_cosine

M = TypeVar("M", bound=nn.Module)


class Teacher(nn.Module, Generic[M]):
    """A copy of a student without gradients, always in eval mode, updated by :meth:`update`.

    Args:
        student: copied with its weights; its own parameters keep their gradients.
    """

    module: M

    def __init__(self, student: M) -> None:
        super().__init__()
        self.module = copy.deepcopy(student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Teacher[M]":
        """Stays in eval mode for any ``mode``: no stochastic depth in targets."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """The student's forward pass with the teacher's weights, without gradients."""
        return self.module(*inputs)

    @torch.no_grad()
    def update(self, student: M, momentum: float) -> None:
        """``teacher <- momentum * teacher + (1 - momentum) * student``, fused over all tensors; buffers are copied."""
        torch._foreach_lerp_(_values(self.module), _values(student), 1 - momentum)
        for own, other in zip(self.module.buffers(), student.buffers(), strict=True):
            own.copy_(other)


class Average(Teacher[M]):
    """Exponential moving average of a student's weights, for evaluation and export.

    Step n (from 0) has momentum ``n / (n + 10)``, at most ``ceiling``: the average covers about the last tenth of the
    steps so far, and the random initial weights are forgotten in a run of any length.

    Args:
        student: as in :class:`Teacher`.
        ceiling: highest momentum, in [0, 1).

    Raises:
        ConfigError: for a ceiling outside [0, 1).
    """

    num_steps: torch.Tensor

    def __init__(self, student: M, ceiling: float) -> None:
        super().__init__(student)
        if not 0 <= ceiling < 1:
            raise ConfigError(f"method.ema={ceiling}: it must lie in [0, 1)")
        self.ceiling = ceiling
        self.register_buffer("num_steps", torch.zeros(()))

    @torch.no_grad()
    def follow(self, student: M) -> None:
        """Update the average with the student's weights after a step."""
        weight = 1 - (self.num_steps / (self.num_steps + 10)).clamp(max=self.ceiling)  # stays on the device
        own = _values(self.module)
        gap = torch._foreach_sub(_values(student), own)
        torch._foreach_mul_(gap, weight)
        torch._foreach_add_(own, list(gap))
        for mine, other in zip(self.module.buffers(), student.buffers(), strict=True):
            mine.copy_(other)
        self.num_steps += 1


def _values(module: nn.Module) -> list[torch.Tensor]:
    """A module's parameters without gradient; of sharded ones this process's part: both networks are cut alike."""
    return [own_part(parameter.detach()) for parameter in module.parameters()]


def cosine_momentum(start: float, progress: float, end: float = 1.0) -> float:
    """Teacher momentum: ``start`` at progress 0, ``end`` at 1, along half a cosine.

    Raises:
        ConfigError: if ``start`` is not in [0, 1].

    Source: Grill et al., BYOL, arXiv:2006.07733v3, Sec. 3.1 (tau); Caron et al., DINO, arXiv:2104.14294v2, Sec. 3.1.
    """
    if not 0 <= start <= 1:
        raise ConfigError(f"method.momentum={start}: it must lie in 0..1")
    return half_cosine(start, end, progress)
