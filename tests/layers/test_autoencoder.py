"""The convolutional autoencoder and its codes as tokens: shapes, the divergence, scale, draws by keys."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from smalti.errors import ConfigError, DataError, ShapeError
from smalti.layers.autoencoder import ConvAutoencoder, kl_to_standard_normal
from smalti.layers.tokens import CodeTokenSource, TokenConfig, build_tokens, draw_codes


def source(size: int = 16, patch_size: int = 4, dim: int = 6) -> CodeTokenSource:
    torch.manual_seed(0)
    return build_tokens(
        TokenConfig(kind="autoencoder", patch_size=patch_size, dim=dim, network={"width": 8, "num_blocks": 1}), size, 3
    )


def images(count: int = 24, size: int = 16) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=g)
    return (torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") * 255).byte()


@pytest.mark.parametrize(("patch_size", "size"), [(2, 6), (4, 16), (8, 24)])
def test_a_code_a_patch_and_back_to_the_size(patch_size: int, size: int) -> None:
    network = ConvAutoencoder(3, patch_size, 5, width=8)
    mean, log_variance = network.moments(torch.randn(2, 3, size, size))
    assert mean.shape == log_variance.shape == (2, 5, size // patch_size, size // patch_size)
    assert network.decode(mean).shape == (2, 3, size, size)


def test_the_divergence_is_torch_s_and_zero_for_a_standard_normal() -> None:
    mean, log_variance = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    expected = kl_divergence(
        Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros(()), torch.ones(())).expand((4, 5))
    )
    assert_close(kl_to_standard_normal(mean, log_variance), expected)
    assert not kl_to_standard_normal(torch.zeros(3), torch.zeros(3)).any()


def test_gradients_of_the_divergence() -> None:
    mean, log_variance = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    assert torch.autograd.gradcheck(kl_to_standard_normal, (mean, log_variance))


def test_drawn_tokens_have_unit_mean_variance_and_a_mean_of_zero() -> None:
    tokens = source()
    with torch.no_grad():  # posteriors that are not negligible
        tokens.network.down[-1].bias[6:] = -1.0
    tokens.fit([images()[:10], images()[10:]])
    means = tokens.encode(images()).flatten(0, 1)
    assert_close(means.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    many = torch.cat([tokens.encode(images(), torch.arange(24) + 24 * n) for n in range(200)]).flatten(0, 1)
    assert_close(many.var(0, correction=0).mean().item(), 1.0, rtol=0.01, atol=0)
    assert means.var(0).mean() < 0.9  # of the means alone it is less


def test_a_draw_is_the_sample_s_own_and_without_keys_there_is_none() -> None:
    tokens = source()
    keys = torch.arange(24)
    drawn = tokens.encode(images(), keys)
    assert_close(tokens.encode(images()[5:9], keys[5:9]), drawn[5:9])
    assert_close(tokens.encode(images()), tokens.encode(images()))
    assert (drawn - tokens.encode(images())).abs().mean() > 0.01
    assert not torch.equal(tokens.encode(images(), keys + 24), drawn)


def test_draws_have_the_posterior_s_mean_and_deviation() -> None:
    mean, log_variance = torch.full((20000, 1, 1, 1), 2.0), torch.full((20000, 1, 1, 1), math.log(0.25))
    drawn = draw_codes(mean, log_variance, torch.arange(20000))
    assert_close(drawn.mean().item(), 2.0, atol=0.02, rtol=0)
    assert_close(drawn.std().item(), 0.5, atol=0.01, rtol=0)


def test_scale_and_mean_are_lost_on_the_way_back() -> None:
    tokens = source()
    before = tokens.decode(tokens.encode(images()))
    tokens.fit([images()])
    assert_close(tokens.decode(tokens.encode(images())), before, atol=1e-5, rtol=0)
    assert before.shape == (24, 3, 16, 16) and before.min() >= 0 and before.max() <= 1


@pytest.mark.parametrize(
    ("size", "patch_size", "network", "message"),
    [
        (18, 4, {"width": 8}, "data.image_size=18: a multiple of 4, the autoencoder's patch size"),
        (18, 6, {"width": 8}, "tokens.patch_size=6: a power of 2"),
        (16, 4, {"width": 12}, "method.width=12: a multiple of 8"),
        (16, 4, {"width": 8, "num_blocks": 0}, "at least 1 is needed"),
        (16, 4, None, "tokens.kind=autoencoder: set tokens.path to a run of smalti train autoencoder"),
    ],
)
def test_numbers_that_fit_nothing(size: int, patch_size: int, network: dict[str, int] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tokens(TokenConfig(kind="autoencoder", patch_size=patch_size, network=network), size, 3)


def test_images_that_fit_nothing() -> None:
    with pytest.raises(ShapeError, match=r"images of shape \(1, 16, 16\)"):
        source().encode(images()[:, :1])
    with pytest.raises(DataError, match="no images"):
        source().fit([])
    with pytest.raises(DataError, match="all codes of the images are equal"):
        network = source()
        for parameter in network.parameters():
            torch.nn.init.zeros_(parameter)
        network.fit([images()])
