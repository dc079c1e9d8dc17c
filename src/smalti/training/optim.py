"""Optimiser and schedules: AdamW, linear warm-up, cosine decay, and a weight decay schedule."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from smalti.config import settings
from smalti.errors import ConfigError
from smalti.functional.processes import own_part, sum_over_processes
from smalti.functional.schedules import half_cosine

Share = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


@settings
class OptimConfig:
    """AdamW and its schedules. A method's file overrides these defaults."""

    base_lr: NonNegativeFloat = 5e-4
    """Peak learning rate for a batch size of 256 (1024 with ``lr_scaling=sqrt``); scaled with the batch size."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """``linear``: ``base_lr * batch_size / 256``; ``sqrt``: ``base_lr * sqrt(batch_size / 1024)`` (DINOv2)."""
    lr: NonNegativeFloat | None = None
    """Peak learning rate without scaling; replaces ``base_lr``."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of training."""
    warmup_ratio: Share = 0.1
    """Fraction of the steps over which the learning rate grows linearly from 0."""
    after_warmup: Literal["cosine", "constant"] = "cosine"
    """Learning rate after warm-up: cosine decay to ``min_lr``, or constant."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """AdamW's betas."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay at the start of training; not applied to biases and one-dimensional parameters."""
    weight_decay_end: NonNegativeFloat | None = None
    """Weight decay at the end of training, with a cosine schedule; None: constant."""
    clip_norm: PositiveFloat | None = 3.0
    """Maximum gradient norm; None: no clipping."""
    clip: Literal["global", "tensor"] = "global"
    """``global``: clip the norm of all gradients together; ``tensor``: clip each tensor separately (as DINO does)."""
    freeze_encoder_ratio: Share = 0.0
    """Fraction of the steps, at the start, in which the encoder is frozen and only heads, prototypes and decoders are
    trained; for new heads on a pretrained encoder."""


def peak_lr(config: OptimConfig, images_per_step: int) -> float:
    """The highest learning rate of a run: ``lr``, or ``base_lr`` scaled with the images of a step.

    Source: Goyal et al., arXiv:1706.02677v2, Sec. 2.1 (linear scaling); Oquab et al., DINOv2, arXiv:2304.07193v2,
        released code (square root).
    """
    if config.lr is not None:
        return config.lr
    sqrt = config.lr_scaling == "sqrt"
    return config.base_lr * ((images_per_step / 1024) ** 0.5 if sqrt else images_per_step / 256)


def learning_rate(config: OptimConfig, *, peak: float, progress: float) -> float:
    """Learning rate at ``progress`` in [0, 1]: linear from 0 to ``peak``, then as ``after_warmup`` says."""
    if progress < config.warmup_ratio:
        return peak * progress / config.warmup_ratio
    if config.after_warmup == "constant":
        return peak
    decayed = (progress - config.warmup_ratio) / max(1 - config.warmup_ratio, 1e-12)
    return half_cosine(peak, config.min_lr, decayed)


def weight_decay(config: OptimConfig, progress: float) -> float:
    """Weight decay at ``progress``: constant, or half a cosine from ``weight_decay`` to ``weight_decay_end``."""
    end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
    return half_cosine(config.weight_decay, end, progress)


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over a method's parameter groups; the schedules set its rates before each step.

    Raises:
        ConfigError: if nothing is left to train.
    """
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ConfigError("no parameter is trainable; unfreeze a part of the method")
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True)


def apply_schedules(
    optimizer: torch.optim.Optimizer, config: OptimConfig, *, peak: float, progress: float
) -> tuple[float, float]:
    """Set the learning rate and weight decay of every group for this step; returns both before the groups' scales."""
    lr, decay = learning_rate(config, peak=peak, progress=progress), weight_decay(config, progress)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = decay * group["weight_decay_scale"]
    return lr, decay


def freeze(parameters: Iterable[Tensor], config: OptimConfig, progress: float) -> None:
    """Drop the gradients of an encoder's parameters in the first ``freeze_encoder_ratio`` of training.

    AdamW skips parameters without gradients: no decay, no moments, and their step count starts when the freeze ends.
    """
    if progress < config.freeze_encoder_ratio:
        for parameter in parameters:
            parameter.grad = None


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], config: OptimConfig) -> Tensor:
    """Clip gradients in place as ``config`` says; returns the norm before, over all of them, on the device."""
    whole = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradients = [own_part(gradient) for gradient in whole]
    norms = torch.stack(torch._foreach_norm(gradients))
    if whole and gradients[0] is not whole[0]:  # sharded: each process has a part of every gradient
        norms = sum_over_processes(norms.square()).sqrt()
    total = norms.norm()
    if config.clip_norm is not None:
        if config.clip == "global":
            torch._foreach_mul_(gradients, (config.clip_norm / (total + 1e-6)).clamp(max=1.0))
        else:
            scales = (config.clip_norm / (norms + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, list(scales.unbind()))
    return total
