"""A discrete diffusion process: cosine schedule, respacing, and interpolated variance.

Letters: T steps of the full process, S steps that are kept, M tokens, D their dimensions. A token x at step t is
``sqrt(a_t) x + sqrt(1 - a_t) noise`` with ``a`` = alpha bar; t runs from 0, nearly clean, to S - 1, nearly noise.

Sources: Ho et al., DDPM, arXiv:2006.11239v2 (noising, posterior); Nichol & Dhariwal, arXiv:2102.09672v1 (cosine
schedule Eq. 17, interpolated variance Eq. 15, respacing Sec. 3.3); Li et al., MAR, arXiv:2406.11838v3, App. B.

diffusers' ``DDPMScheduler`` has the same schedule, respaced steps and variances (tested for equality), but draws its
own
noise: no temperature, no noise per token, and none shared by two halves of a batch.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import ConfigError

MAX_BETA = 0.999


class Process(NamedTuple):
    """Tables of a process, one entry per step, length S; float64, since 1 - alpha bar is small at first."""

    steps: Tensor
    """``(S,)`` int64: index among the T steps, the input of a network."""
    alpha_bar: Tensor
    """Alpha bar: fraction of the variance from the clean token, descending."""
    before: Tensor
    """Alpha bar of the previous step; 1 for the first."""
    beta: Tensor
    """``1 - alpha_bar / before``."""
    log_beta: Tensor
    """Upper bound of the log variance of a denoising step."""
    log_posterior: Tensor
    """Lower bound: the log variance of the posterior given the clean token; at the first step, where the variance is 0,
    that of the second."""

    def to(self, device: torch.device) -> "Process":
        """The same tables on a device."""
        return Process(*(table.to(device) for table in self))


def cosine_alpha_bar(num_steps: int) -> Float[Tensor, " T"]:
    """Alpha bar of the cosine schedule, each beta at most 0.999.

    Raises:
        ConfigError: for fewer than two steps.
    """
    if num_steps < 2:
        raise ConfigError(f"{num_steps} diffusion steps; at least 2 are needed")
    edges = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    curve = torch.cos((edges + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - (1 - curve[1:] / curve[:-1]).clamp(max=MAX_BETA)).cumprod(0)


def respaced_steps(num_steps: int, num_kept: int) -> Int[Tensor, " S"]:
    """``num_kept`` of T steps, evenly spaced, including the first and the last.

    Raises:
        ConfigError: if ``num_kept`` isn't in 2..T.
    """
    if not 2 <= num_kept <= num_steps:
        raise ConfigError(f"{num_kept} of {num_steps} diffusion steps; 2..{num_steps} are needed")
    return torch.linspace(0, num_steps - 1, num_kept, dtype=torch.float64).round().long()


def make_process(num_steps: int, num_kept: int | None = None) -> Process:
    """The cosine process of T steps, or of the kept ones with betas recomputed for them."""
    steps = respaced_steps(num_steps, num_steps if num_kept is None else num_kept)
    alpha_bar = cosine_alpha_bar(num_steps)[steps]
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    posterior = beta * (1 - before) / (1 - alpha_bar)
    return Process(steps, alpha_bar, before, beta, beta.log(), torch.cat([posterior[1:2], posterior[1:]]).log())


def add_noise(
    clean: Float[Tensor, "M D"], noise: Float[Tensor, "M D"], process: Process, t: Int[Tensor, " M"]
) -> Float[Tensor, "M D"]:
    """Noisy tokens at step t, from clean tokens and noise."""
    alpha_bar = process.alpha_bar[t, None]
    return alpha_bar.sqrt().to(clean) * clean + (1 - alpha_bar).sqrt().to(clean) * noise


def remove_noise(
    noisy: Float[Tensor, "M D"], noise: Float[Tensor, "M D"], process: Process, t: Int[Tensor, " M"]
) -> Float[Tensor, "M D"]:
    """Clean tokens, the inverse of :func:`add_noise`; not clipped."""
    alpha_bar = process.alpha_bar[t, None]
    return (noisy - (1 - alpha_bar).sqrt().to(noisy) * noise) / alpha_bar.sqrt().to(noisy)


def posterior_mean(
    clean: Float[Tensor, "M D"], noisy: Float[Tensor, "M D"], process: Process, t: Int[Tensor, " M"]
) -> Float[Tensor, "M D"]:
    """Mean of a token at step t - 1, given the clean token and that at t: DDPM, Eq. 7."""
    alpha_bar, before, beta = (table[t, None] for table in (process.alpha_bar, process.before, process.beta))
    of_clean = before.sqrt() * beta / (1 - alpha_bar)
    of_noisy = (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar)
    return of_clean.to(clean) * clean + of_noisy.to(noisy) * noisy


def interpolated_log_variance(
    fraction: Float[Tensor, "M D"], process: Process, t: Int[Tensor, " M"]
) -> Float[Tensor, "M D"]:
    """Log variance of a denoising step, between the posterior's (fraction -1) and log beta (fraction 1)."""
    low, high = (table[t, None].to(fraction) for table in (process.log_posterior, process.log_beta))
    upper = (fraction + 1) / 2
    return upper * high + (1 - upper) * low


def gaussian_kl(
    mean: Float[Tensor, "M D"],
    log_variance: Float[Tensor, "M D"],
    other_mean: Float[Tensor, "M D"],
    other_log_variance: Float[Tensor, "M D"],
) -> Float[Tensor, "M D"]:
    """KL divergence between two Gaussians, per dimension, in nats."""
    gap = log_variance - other_log_variance
    return 0.5 * (gap.exp() - 1 - gap + (mean - other_mean).square() * (-other_log_variance).exp())


def bound_term(
    clean: Float[Tensor, "M D"],
    noisy: Float[Tensor, "M D"],
    predicted_noise: Float[Tensor, "M D"],
    fraction: Float[Tensor, "M D"],
    process: Process,
    t: Int[Tensor, " M"],
) -> Float[Tensor, " M"]:
    """Term of the variational bound at step t, in bits per dimension; it only trains the variance.

    The KL divergence between the posterior and the predicted denoising step, whose mean is detached. At the first step,
    the code length of the clean token: of a density, since tokens have no discrete levels (pixels: bins of 1/255),
    which differs by a constant.

    Args:
        clean: clean tokens.
        noisy: the same tokens at step t.
        predicted_noise: noise predicted by a network.
        fraction: predicted position between the bounds of the log variance, about -1..1.
        process: process on the tokens' device.
        t: steps.
    """
    mean = posterior_mean(remove_noise(noisy, predicted_noise.detach(), process, t), noisy, process, t)
    log_variance = interpolated_log_variance(fraction, process, t)
    true_mean, true_log = (
        posterior_mean(clean, noisy, process, t),
        process.log_posterior[t, None].to(noisy).expand_as(noisy),
    )
    divergence = gaussian_kl(true_mean, true_log, mean, log_variance)
    length = 0.5 * (math.log(2 * math.pi) + log_variance + (clean - mean).square() * (-log_variance).exp())
    return torch.where(t[:, None] == 0, length, divergence).mean(-1) / math.log(2)


def step_back(
    noisy: Float[Tensor, "M D"],
    predicted_noise: Float[Tensor, "M D"],
    fraction: Float[Tensor, "M D"],
    fresh: Float[Tensor, "M D"],
    process: Process,
    t: int,
    temperature: float = 1.0,
    clip: float | None = None,
) -> Float[Tensor, "M D"]:
    """Tokens at step t - 1 by ancestral sampling; no noise is added at the first step.

    Args:
        noisy: tokens at step t.
        predicted_noise: noise predicted by a network.
        fraction: predicted position between the bounds of the log variance.
        fresh: standard normal numbers.
        process: process on the tokens' device.
        t: the step, the same for all.
        temperature: factor on the added noise.
        clip: largest absolute value of an estimated clean token; None: no limit. The estimate amplifies errors of the
            noise by ``alpha_bar ** -0.5``, 20,000 times at step 999 of 1000.
    """
    steps = torch.full((len(noisy),), t, device=noisy.device)
    clean = remove_noise(noisy, predicted_noise, process, steps)
    mean = posterior_mean(clean if clip is None else clean.clamp(-clip, clip), noisy, process, steps)
    if t == 0:
        return mean
    return mean + temperature * (0.5 * interpolated_log_variance(fraction, process, steps)).exp() * fresh
