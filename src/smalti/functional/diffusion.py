"""A diffusion process in discrete steps: cosine schedule, respacing, and a variance between its two bounds.

Letters: T steps of the whole process, S steps that are kept, M tokens, D their dimensions. A token x at step t is
``sqrt(a_t) x + sqrt(1 - a_t) noise`` with ``a`` = alpha bar; t runs from 0, nearly clean, to S - 1, nearly noise.

Sources: Ho et al., DDPM, arXiv:2006.11239v2 (noising, posterior); Nichol & Dhariwal, arXiv:2102.09672v1 (cosine
schedule Eq. 17, interpolated variance Eq. 15, respacing Sec. 3.3); Li et al., MAR, arXiv:2406.11838v3, App. B.

diffusers' ``DDPMScheduler`` has the same schedule, respaced steps and variances (a test holds ours against them), but
draws its noise itself: no temperature, no noise by token, none that two halves of a batch share.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import ConfigError

MAX_BETA = 0.999


class Process(NamedTuple):
    """What a process is at each of its steps: tables of length S in float64, for 1 - alpha bar is small at first."""

    steps: Tensor
    """``(S,)`` int64: which of the T steps it is, what a network is told."""
    alpha_bar: Tensor
    """Share of the clean token's variance, falling."""
    before: Tensor
    """Alpha bar of the step before; 1 at the first."""
    beta: Tensor
    """``1 - alpha_bar / before``."""
    log_beta: Tensor
    """The larger bound of the log variance of a step back."""
    log_posterior: Tensor
    """The smaller: of the posterior given the clean token. At the first step, where that is 0, the second's."""

    def to(self, device: torch.device) -> "Process":
        """The same tables on a device."""
        return Process(*(table.to(device) for table in self))


def cosine_alpha_bar(num_steps: int) -> Float[Tensor, " T"]:
    """Alpha bar of the cosine schedule, each beta at most 0.999.

    Raises:
        ConfigError: for fewer than two steps.
    """
    if num_steps < 2:
        raise ConfigError(f"a diffusion of {num_steps} steps; at least 2 are needed")
    edges = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    curve = torch.cos((edges + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - (1 - curve[1:] / curve[:-1]).clamp(max=MAX_BETA)).cumprod(0)


def respaced_steps(num_steps: int, num_kept: int) -> Int[Tensor, " S"]:
    """``num_kept`` of T steps at equal distances, the first and the last among them.

    Raises:
        ConfigError: unless 2 to T are kept.
    """
    if not 2 <= num_kept <= num_steps:
        raise ConfigError(f"{num_kept} of {num_steps} diffusion steps; 2..{num_steps} are needed")
    return torch.linspace(0, num_steps - 1, num_kept, dtype=torch.float64).round().long()


def make_process(num_steps: int, num_kept: int | None = None) -> Process:
    """The cosine process of T steps, or of as many of them as are kept, with betas that lead from one to the next."""
    steps = respaced_steps(num_steps, num_steps if num_kept is None else num_kept)
    alpha_bar = cosine_alpha_bar(num_steps)[steps]
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    posterior = beta * (1 - before) / (1 - alpha_bar)
    return Process(steps, alpha_bar, before, beta, beta.log(), torch.cat([posterior[1:2], posterior[1:]]).log())


def add_noise(
    clean: Float[Tensor, "M D"], noise: Float[Tensor, "M D"], process: Process, t: Int[Tensor, " M"]
) -> Float[Tensor, "M D"]:
    """Clean tokens as they are at step t."""
    alpha_bar = process.alpha_bar[t, None]
    return alpha_bar.sqrt().to(clean) * clean + (1 - alpha_bar).sqrt().to(clean) * noise


def remove_noise(
    noisy: Float[Tensor, "M D"], noise: Float[Tensor, "M D"], process: Process, t: Int[Tensor, " M"]
) -> Float[Tensor, "M D"]:
    """The inverse of :func:`add_noise`: clean tokens, not clipped."""
    alpha_bar = process.alpha_bar[t, None]
    return (noisy - (1 - alpha_bar).sqrt().to(noisy) * noise) / alpha_bar.sqrt().to(noisy)


def posterior_mean(
    clean: Float[Tensor, "M D"], noisy: Float[Tensor, "M D"], process: Process, t: Int[Tensor, " M"]
) -> Float[Tensor, "M D"]:
    """Mean of a token one step before t, given it clean and at t: DDPM, Eq. 7."""
    alpha_bar, before, beta = (table[t, None] for table in (process.alpha_bar, process.before, process.beta))
    of_clean = before.sqrt() * beta / (1 - alpha_bar)
    of_noisy = (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar)
    return of_clean.to(clean) * clean + of_noisy.to(noisy) * noisy


def interpolated_log_variance(
    fraction: Float[Tensor, "M D"], process: Process, t: Int[Tensor, " M"]
) -> Float[Tensor, "M D"]:
    """Log variance of a step back, between the posterior's (fraction -1) and log beta (fraction 1)."""
    low, high = (table[t, None].to(fraction) for table in (process.log_posterior, process.log_beta))
    share = (fraction + 1) / 2
    return share * high + (1 - share) * low


def gaussian_kl(
    mean: Float[Tensor, "M D"],
    log_variance: Float[Tensor, "M D"],
    other_mean: Float[Tensor, "M D"],
    other_log_variance: Float[Tensor, "M D"],
) -> Float[Tensor, "M D"]:
    """Divergence of one Gaussian from another, by dimension, in nats."""
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
    """The variational bound's term of step t, in bits a dimension; what it trains is the variance alone.

    The divergence of the posterior from the step back that a network predicts, whose mean is detached here. At the
    first step it is the code length of the clean token. Tokens have no levels, so the length is that of a density,
    where pixels have bins of 1/255; a constant apart, which no gradient sees.

    Args:
        clean: tokens.
        noisy: the same at step t.
        predicted_noise: a network's.
        fraction: its place between the bounds of the variance, in about -1..1.
        process: on the tokens' device.
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
    """Tokens one step before t: ancestral sampling; nothing is added at the first step.

    Args:
        noisy: tokens at step t.
        predicted_noise: a network's.
        fraction: its place between the bounds of the variance.
        fresh: standard normal numbers.
        process: on the tokens' device.
        t: the step, the same for all.
        temperature: what the added noise is multiplied by.
        clip: largest absolute value of an estimated clean token; None: none. At the last steps an error of the noise
            stands in that estimate ``alpha_bar ** -0.5`` times as large, 20,000 times at step 999 of 1000.
    """
    steps = torch.full((len(noisy),), t, device=noisy.device)
    clean = remove_noise(noisy, predicted_noise, process, steps)
    mean = posterior_mean(clean if clip is None else clean.clamp(-clip, clip), noisy, process, steps)
    if t == 0:
        return mean
    return mean + temperature * (0.5 * interpolated_log_variance(fraction, process, steps)).exp() * fresh
