import math

import pytest
import torch
from torch.testing import assert_close

from smalti.errors import ConfigError
from smalti.layers.mixture_head import MixtureHead, mixture_log_likelihood


def make(**settings: float) -> MixtureHead:
    torch.manual_seed(0)
    return MixtureHead(**{"token_dim": 2, "condition_dim": 4, "width": 16, "depth": 2, **settings})


def test_the_likelihood_of_a_hand_made_mixture() -> None:
    """0.25 N(0, 1) + 0.75 N(2, 0.5^2) at 1, in one dimension."""
    found = mixture_log_likelihood(
        torch.tensor([[1.0]]),
        torch.tensor([[0.25, 0.75]]).log(),
        torch.tensor([[[0.0], [2.0]]]),
        torch.tensor([[[1.0], [0.5]]]),
    )
    density = (0.25 * math.exp(-0.5) + 0.75 * math.exp(-2.0) / 0.5) / math.sqrt(2 * math.pi)
    assert found.item() == pytest.approx(math.log(density))


def test_the_likelihood_equals_torch_s() -> None:
    torch.manual_seed(1)
    tokens, logits, means, stds = torch.randn(5, 3), torch.randn(5, 4), torch.randn(5, 4, 3), torch.rand(5, 4, 3) + 0.1
    parts = torch.distributions.Independent(torch.distributions.Normal(means, stds), 1)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logits), parts)
    assert_close(mixture_log_likelihood(tokens, logits, means, stds), mixture.log_prob(tokens))


def test_a_density_sums_to_one() -> None:
    head = make(token_dim=1)
    grid = torch.linspace(-40, 40, 20001)[:, None]
    density = head.log_likelihood(grid, torch.randn(1, 4).expand(len(grid), -1)).exp()
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1, abs=1e-3)


def test_the_loss_is_nats_a_dimension() -> None:
    head, tokens, condition = make(), torch.randn(3, 2), torch.randn(3, 4)
    loss = head(tokens, condition, torch.arange(3))["likelihood"]
    assert_close(loss, -head.log_likelihood(tokens, condition) / 2)


def test_samples_follow_the_mixture() -> None:
    head, condition = make(token_dim=1), torch.randn(1, 4).expand(20000, -1)
    logits, means, stds = (part[0] for part in head.mixture(condition[:1]))
    weights = logits.softmax(0)
    mean = (weights[:, None] * means).sum(0)
    second = (weights[:, None] * (means.square() + stds.square())).sum(0)
    drawn = head.sample(condition, torch.arange(20000))
    assert_close(drawn.mean(0), mean, atol=0.03, rtol=0)
    assert_close(drawn.square().mean(0), second, atol=0.1, rtol=0.05)
    assert_close(drawn[5:8], head.sample(condition[5:8], torch.arange(5, 8)))


def test_guidance_and_empty_mixtures_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs method.head=diffusion"):
        make().sample(torch.randn(2, 4), torch.arange(2), null_condition=torch.randn(2, 4), guidance=2.0)
    with pytest.raises(ConfigError, match="mixture of 0 components"):
        make(num_components=0)
