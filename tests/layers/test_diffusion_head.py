import pytest
import torch
from torch.testing import assert_close

from smalti.errors import ConfigError
from smalti.layers.diffusion_head import DiffusionHead, time_features
from smalti.training.optim import OptimConfig, apply_schedules, build_optimizer


def make(seed: int = 0, **settings: int) -> DiffusionHead:
    torch.manual_seed(seed)
    return DiffusionHead(**{"token_dim": 3, "condition_dim": 5, "width": 16, "depth": 2, **settings})


def trained(steps: int = 600) -> DiffusionHead:
    """On tokens at the condition's first number, spread by 0.1."""
    head = make(token_dim=1, condition_dim=1, width=32, num_steps=200)
    optimizer = build_optimizer(
        [{"params": list(head.parameters()), "lr_scale": 1.0, "weight_decay_scale": 0.0}], OptimConfig()
    )
    generator = torch.Generator().manual_seed(0)
    for number in range(steps):
        apply_schedules(optimizer, OptimConfig(warmup_ratio=0.1), peak=5e-3, progress=number / steps)
        condition = torch.randint(0, 2, (256, 1), generator=generator) * 2.0 - 1
        tokens = condition + 0.1 * torch.randn(256, 1, generator=generator)
        losses = head(tokens, condition, torch.arange(256) + 256 * number)
        (losses["noise"] + losses["bound"]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return head


def test_at_first_no_noise_is_predicted_and_the_variance_is_half_way() -> None:
    head = make()
    noise, fraction = head.predict(torch.randn(4, 3), torch.tensor([0, 1, 500, 999]), torch.randn(4, 5))
    assert (noise == 0).all() and (fraction == 0).all()


def test_time_features_tell_steps_apart() -> None:
    features = time_features(torch.arange(1000))
    assert features.shape == (1000, 256)
    assert_close(features[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert torch.cdist(features, features).add(torch.eye(1000)).min() > 0.05


def test_losses_are_a_token_s_own_and_repeats_average_noise_levels() -> None:
    head = make()
    torch.nn.init.normal_(head.out.weight)
    tokens, condition, keys = torch.randn(6, 3), torch.randn(6, 5), torch.arange(6)
    together = head(tokens, condition, keys, 4)
    alone = head(tokens[2:4], condition[2:4], keys[2:4], 4)
    for name in together:
        assert together[name].shape == (6,)
        assert_close(together[name][2:4], alone[name])
    assert not torch.allclose(together["noise"], head(tokens, condition, keys, 1)["noise"])


def test_the_bound_trains_the_variance_and_the_error_the_noise() -> None:
    head = make()
    torch.nn.init.normal_(head.out.weight)
    losses = head(torch.randn(6, 3), torch.randn(6, 5), torch.arange(6))
    of_noise = torch.autograd.grad(losses["noise"].sum(), head.out.weight, retain_graph=True)[0]
    of_bound = torch.autograd.grad(losses["bound"].sum(), head.out.weight)[0]
    assert (of_noise[3:] == 0).all() and (of_noise[:3] != 0).any()
    assert (of_bound[:3] == 0).all() and (of_bound[3:] != 0).any()


def test_a_sample_does_not_depend_on_what_is_drawn_beside_it() -> None:
    head = make()
    torch.nn.init.normal_(head.out.weight, std=0.1)
    condition, keys = torch.randn(5, 5), torch.arange(5)
    together = head.sample(condition, keys, num_steps=10)
    assert_close(together[1:3], head.sample(condition[1:3], keys[1:3], num_steps=10))
    assert not torch.allclose(together, head.sample(condition, keys + 9, num_steps=10))


def test_guidance_of_one_is_none_and_the_null_half_alone_is_guidance_of_zero() -> None:
    head = make()
    for block in head.blocks:
        torch.nn.init.normal_(block.modulation.weight)
    torch.nn.init.normal_(head.out.weight[:3], std=0.1)  # the variance is not guided: keep it out of this
    condition, null, keys = torch.randn(4, 5), torch.randn(4, 5), torch.arange(4)
    plain = head.sample(condition, keys, num_steps=10)
    assert_close(head.sample(condition, keys, num_steps=10, null_condition=null, guidance=1.0), plain)
    guided = head.sample(condition, keys, num_steps=10, null_condition=null, guidance=3.0)
    assert (guided - plain).abs().max() > 1e-3
    without = head.sample(null, keys, num_steps=10)
    assert_close(head.sample(condition, keys, num_steps=10, null_condition=null, guidance=0.0), without)


def test_more_steps_than_the_diffusion_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="2000 of 1000 diffusion steps"):
        make().sample(torch.randn(2, 5), torch.arange(2), num_steps=2000)
    with pytest.raises(ConfigError, match="0 blocks"):
        make(depth=0)


def test_a_trained_head_draws_the_tokens_that_its_condition_names() -> None:
    head = trained()
    condition = torch.tensor([[-1.0], [1.0]]).repeat(500, 1)
    gap = (head.sample(condition, torch.arange(1000), num_steps=50, clip=3.0) - condition).flatten()
    assert abs(gap.mean().item()) < 0.02 and 0.08 < gap.std().item() < 0.12
    cold = head.sample(condition, torch.arange(1000), num_steps=50, clip=3.0, temperature=0.5)
    assert (cold - condition).std() < gap.std()
    free = (head.sample(condition, torch.arange(1000), num_steps=50) - condition).flatten()
    assert 0.08 < free[free.abs() < 1].std() < 0.12 and (free.abs() > 1).float().mean() > 0.02  # what clip is for
