import math

import pytest
import torch
from torch.testing import assert_close

from smalti.errors import ConfigError
from smalti.functional.diffusion import (
    add_noise,
    bound_term,
    cosine_alpha_bar,
    gaussian_kl,
    interpolated_log_variance,
    make_process,
    posterior_mean,
    remove_noise,
    respaced_steps,
    step_back,
)


def test_alpha_bar_falls_from_almost_one_to_almost_zero() -> None:
    alpha_bar = cosine_alpha_bar(1000)
    assert (alpha_bar.diff() < 0).all()
    assert 0.9999 < alpha_bar[0] < 1 and 0 < alpha_bar[-1] < 1e-6
    assert_close(
        alpha_bar[499].item(), math.cos(0.508 / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    )


def test_respaced_steps_hold_both_ends_and_are_evenly_spread() -> None:
    steps = respaced_steps(1000, 100)
    assert steps[0] == 0 and steps[-1] == 999 and len(steps) == 100
    assert set(steps.diff().tolist()) == {10, 11}
    assert respaced_steps(1000, 1000).tolist() == list(range(1000))


@pytest.mark.parametrize("kept", [1, 11])
def test_more_steps_than_there_are_or_only_one_is_refused(kept: int) -> None:
    with pytest.raises(ConfigError, match=rf"{kept} of 10 diffusion steps; 2\.\.10"):
        respaced_steps(10, kept)
    with pytest.raises(ConfigError, match="1 diffusion steps"):
        cosine_alpha_bar(1)


def test_a_respaced_process_leads_from_kept_step_to_kept_step() -> None:
    whole, some = make_process(1000), make_process(1000, 25)
    assert_close(some.alpha_bar, whole.alpha_bar[some.steps])
    assert_close((1 - some.beta).cumprod(0), some.alpha_bar)
    assert (some.log_posterior <= some.log_beta).all()


def test_removing_the_noise_is_the_inverse_of_adding_it() -> None:
    process, t = make_process(1000), torch.tensor([0, 500, 900])
    clean, noise = torch.randn(2, 3, 5, dtype=torch.float64)
    assert_close(remove_noise(add_noise(clean, noise, process, t), noise, process, t), clean)


def test_the_posterior_is_bayes_rule_of_two_gaussians() -> None:
    """p(before | clean) p(noisy | before), multiplied by hand."""
    process, t = make_process(1000, 50), torch.tensor([7])
    clean, noisy = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[-0.8]], dtype=torch.float64)
    before, beta = process.before[7].item(), process.beta[7].item()
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (math.sqrt(before) * 0.3 / (1 - before) + math.sqrt(1 - beta) * -0.8 / beta) / precision
    assert posterior_mean(clean, noisy, process, t).item() == pytest.approx(mean)
    assert process.log_posterior[7].exp().item() == pytest.approx(1 / precision)


def test_the_variance_lies_between_its_bounds() -> None:
    process, t = make_process(1000), torch.tensor([10, 10, 10])
    fraction = torch.tensor([[-1.0], [1.0], [0.0]], dtype=torch.float64)
    low, high = process.log_posterior[10].item(), process.log_beta[10].item()
    assert interpolated_log_variance(fraction, process, t).flatten().tolist() == pytest.approx(
        [low, high, (low + high) / 2]
    )


def test_divergence_equals_torch_s() -> None:
    a, b, c, d = torch.randn(4, 3, 2, dtype=torch.float64)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(a, (b / 2).exp()), normal(c, (d / 2).exp()))
    assert_close(gaussian_kl(a, b, c, d), expected)


def test_the_bound_is_zero_for_the_true_noise_and_variance_and_trains_the_variance_alone() -> None:
    process, t = make_process(1000), torch.tensor([3, 400])
    clean, noise = torch.randn(2, 2, 4, dtype=torch.float64)
    noisy = add_noise(clean, noise, process, t)
    low = torch.full_like(clean, -1.0)
    assert_close(
        bound_term(clean, noisy, noise, low, process, t), torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0
    )
    guess, fraction = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bound_term(clean, noisy, guess, fraction, process, t).sum().backward()
    assert guess.grad is None and (fraction.grad != 0).all()


def test_the_bound_s_gradient_is_right() -> None:
    process, t = make_process(1000), torch.tensor([0, 1, 600])
    clean, noise, guess = torch.randn(3, 3, 2, dtype=torch.float64)
    noisy = add_noise(clean, noise, process, t)
    fraction = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: bound_term(clean, noisy, guess, f, process, t), fraction)


def test_at_the_first_step_the_bound_is_a_code_length() -> None:
    process, t = make_process(1000), torch.tensor([0])
    clean, noise = torch.randn(2, 1, 1, dtype=torch.float64)
    noisy, fraction = add_noise(clean, noise, process, t), torch.ones(1, 1, dtype=torch.float64)
    normal = torch.distributions.Normal(clean, (process.log_beta[0] / 2).exp())  # the true noise gives the clean token
    expected = -normal.log_prob(clean).item() / math.log(2)
    assert bound_term(clean, noisy, noise, fraction, process, t).item() == pytest.approx(expected)


def test_ancestral_sampling_with_the_exact_noise_of_a_gaussian_returns_that_gaussian() -> None:
    """Tokens of variance v: the best noise estimate is linear, so the sampler's law is known."""
    process, generator = make_process(1000, 200), torch.Generator().manual_seed(0)
    v = 0.25
    x = torch.randn(20000, 1, dtype=torch.float64, generator=generator)
    for t in reversed(range(200)):
        alpha_bar = process.alpha_bar[t]
        guess = (1 - alpha_bar).sqrt() / (alpha_bar * v + 1 - alpha_bar) * x
        fresh = torch.randn(20000, 1, dtype=torch.float64, generator=generator)
        x = step_back(x, guess, torch.full_like(x, -1.0), fresh, process, t)
    assert x.var().item() == pytest.approx(v, rel=0.06) and abs(x.mean().item()) < 0.02


def test_temperature_scales_the_added_noise_and_the_first_step_adds_none() -> None:
    process = make_process(1000, 10)
    x, guess, fresh = torch.randn(3, 4, 2, dtype=torch.float64)
    low = torch.full_like(x, -1.0)
    cold, warm, hot = (step_back(x, guess, low, fresh, process, 5, temperature) for temperature in (0.0, 1.0, 2.0))
    assert_close(hot - cold, 2 * (warm - cold))
    assert_close(step_back(x, guess, low, fresh, process, 0), step_back(x, guess, low, 5 * fresh, process, 0))


def test_schedule_steps_and_a_step_back_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra gen)")
    scheduler = diffusers.DDPMScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(100)
    process = make_process(1000, 100)
    assert scheduler.timesteps.flip(0).tolist() == process.steps.tolist()
    assert_close(
        scheduler.alphas_cumprod.double(), make_process(1000).alpha_bar, rtol=1e-3, atol=1e-8
    )  # theirs: float32
    noisy, guess = torch.randn(2, 6, 3)
    fraction = torch.rand(6, 3) * 2 - 1
    for t in (1, 40, 98):
        step = int(process.steps[t])
        fresh = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))
        theirs = scheduler.step(
            torch.cat([guess, fraction], 1)[:, :, None],
            step,
            noisy[:, :, None],
            generator=torch.Generator().manual_seed(3),
        ).prev_sample[:, :, 0]
        ours = step_back(*(x.double() for x in (noisy, guess, fraction, fresh)), process, t)
        assert_close(ours.float(), theirs, rtol=1e-3, atol=1e-4)
