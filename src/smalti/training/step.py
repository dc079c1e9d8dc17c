"""One training step; the loop, the doctor and the contract tests all call it."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from smalti.data.views import Views
from smalti.layers.stochastic_depth import StepPart, part_of_step
from smalti.methods.base import Method
from smalti.training.optim import OptimConfig, apply_schedules, clip_gradients, freeze

Model = Callable[[Views, float], dict[str, Tensor]]


@runtime_checkable
class Engine(Protocol):
    """The part of ``accelerate.Accelerator`` that a step uses."""

    sync_gradients: bool
    """Whether the current micro-batch is the last of its step."""

    def accumulate(self, *models: Any) -> AbstractContextManager[Any]:
        """Wraps forward, backward and update of one micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch."""

    def unscale_gradients(self) -> None:
        """Divide gradients by the loss scale, if there is one."""


@dataclass
class PlainEngine:
    """An :class:`Engine` for one process and one micro-batch per step, without Accelerate's global state."""

    sync_gradients: bool = True

    def accumulate(self, *models: Any) -> AbstractContextManager[Any]:
        """Nothing to wrap."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Torch's own."""
        torch.autograd.backward(loss)

    def unscale_gradients(self) -> None:
        """Nothing to do: bf16 and float32 losses are not scaled."""


class Whole(NamedTuple):
    """What a process knows of the whole step, of which it computes a part."""

    key: int
    """Random key, the same in all processes."""
    batch_size: int
    """Images, over all processes and micro-batches."""
    rank: int
    """Number of this process."""
    world: int
    """Number of processes."""

    def part(self, number: int, count: int) -> StepPart:
        """The micro-batch of that number, of ``count`` images; see :class:`smalti.data.loader.TrainLoader`."""
        return StepPart(self.key, self.batch_size, (number * self.world + self.rank) * count, count)


class StepResult(NamedTuple):
    """What a step computed; tensors stay on the device."""

    lr: float
    """Learning rate before the groups' scales."""
    weight_decay: float
    """Weight decay before the groups' scales."""
    losses: dict[str, Tensor]
    """Loss term -> mean over the micro-batches of this process."""
    observations: dict[str, Tensor]
    """Scalars to log, averaged over the micro-batches."""
    grad_norm: Tensor
    """Norm of all gradients before clipping."""
    views: Views
    """The last micro-batch."""


def training_step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[Views],
    config: OptimConfig,
    *,
    peak: float,
    progress: float,
    model: Model | None = None,
    update: Any = None,
    engine: Engine | None = None,
    whole: Whole | None = None,
) -> StepResult:
    """One training step: schedules, forward and backward passes, clipping, optimiser step, and the method's update.

    Args:
        method: in train mode, on the device of the micro-batches.
        optimizer: over the method's parameter groups.
        micro_batches: one or more, on the device; gradients are accumulated over them.
        config: schedules, clipping, freezing.
        peak: learning rate at the end of warm-up.
        progress: progress of training before this step, in [0, 1].
        model: called in place of ``method``: the method wrapped for autocast and several processes.
        update: stepped in place of ``optimizer``: the wrapped optimiser.
        engine: backward and accumulation; None: one process without accumulation.
        whole: the whole step, from which stochastic depth draws; None: it draws from each batch with torch's generator.
    """
    model, update, engine = model or method, update or optimizer, engine or PlainEngine()
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    encoders = [parameter for encoder in method.networks().values() for parameter in encoder.parameters()]
    lr, decay = apply_schedules(optimizer, config, peak=peak, progress=progress)
    parts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for number, views in enumerate(micro_batches):
        part = None if whole is None else whole.part(number, views.batch_size)
        with engine.accumulate(model):
            with part_of_step(part):
                losses = model(views, progress)  # call the wrapped module: DDP needs it
            engine.backward(torch.stack(list(losses.values())).sum())
            if engine.sync_gradients:
                engine.unscale_gradients()
                method.after_backward(progress)
                freeze(encoders, config, progress)
                grad_norm = clip_gradients(parameters, config)
            update.step()
            update.zero_grad(set_to_none=True)
        parts.append((losses, method.observations))
    method.after_step(progress)
    losses, observations = (_mean([part[which] for part in parts]) for which in (0, 1))
    return StepResult(lr, decay, losses, observations, grad_norm, views)


@torch.no_grad()
def _mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each scalar over the micro-batches of a step."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.stack([part[name].detach().float() for part in parts]).mean() for name in parts[0]}
