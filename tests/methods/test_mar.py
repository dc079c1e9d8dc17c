"""MAR against its paper: masks, sampling, averaging, likelihoods."""

import itertools
import math
import statistics

import pytest
import torch
from torch.testing import assert_close

from small_mar import make, views
from smalti.config import build
from smalti.errors import ConfigError, ShapeError
from smalti.functional.orders import random_orders
from smalti.methods.mar import SamplerConfig, drawn_per_step, step_uniform, truncated_ratio


def test_the_hidden_share_has_the_mean_and_median_of_the_cut_normal_law() -> None:
    ratios = [truncated_ratio((n + 0.5) / 2000, 0.7, 0.25) for n in range(2000)]
    assert statistics.mean(ratios) == pytest.approx(0.867, abs=2e-3)
    assert statistics.median(ratios) == pytest.approx(0.874, abs=2e-3)
    assert truncated_ratio(0.0, 0.7, 0.25) == pytest.approx(0.7) and truncated_ratio(1.0, 0.7, 0.25) == 1.0


def test_a_step_s_share_is_spread_over_the_steps_and_always_the_same() -> None:
    shares = [step_uniform(step / 500) for step in range(500)]
    assert statistics.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert statistics.pstdev(shares) == pytest.approx(1 / math.sqrt(12), abs=0.02)
    assert shares[17] == step_uniform(17 / 500)


def test_what_sampling_draws_sums_to_all_few_first_and_one_at_least() -> None:
    assert drawn_per_step(256, 256) == [1] * 256
    counts = drawn_per_step(256, 64)
    assert sum(counts) == 256 and min(counts) == 1 and max(counts) == 7
    assert sum(counts[:32]) < sum(counts[32:])
    assert drawn_per_step(16, 1) == [16]
    for tokens, steps in itertools.product((1, 5, 16, 17), range(1, 18)):
        if steps <= tokens:
            counts = drawn_per_step(tokens, steps)
            assert sum(counts) == tokens and len(counts) == steps and min(counts) >= 1
    for steps in (0, 17):
        with pytest.raises(ConfigError, match=rf"iterations={steps}: images of 16 tokens need 1\.\.16 iterations"):
            drawn_per_step(16, steps)


def test_what_is_hidden_is_not_seen_and_what_is_visible_is() -> None:
    mar, orders = make(), random_orders(torch.arange(2), 16)
    tokens, classes = torch.randn(2, 16, 4), torch.tensor([0, 2])
    visible, hidden = orders[:, :5], orders[:, 5:]

    def told(x: torch.Tensor) -> torch.Tensor:
        return mar.network(x.gather(1, visible[..., None].expand(-1, -1, 4)), visible, hidden, classes)

    changed = tokens.clone().scatter_(1, hidden[..., None].expand(-1, -1, 4), 9.0)
    assert torch.equal(told(tokens), told(changed))
    changed = tokens.clone()
    changed[0, visible[0, 0]] += 1
    assert not torch.allclose(told(tokens)[0], told(changed)[0]) and torch.equal(told(tokens)[1], told(changed)[1])


def test_places_not_sequence_decide() -> None:
    """Tokens given in another sequence are the same tokens."""
    mar, orders = make(), random_orders(torch.arange(2), 16)
    tokens, classes = torch.randn(2, 16, 4), torch.tensor([0, 3])
    visible, hidden = orders[:, :6], orders[:, 6:]
    known = tokens.gather(1, visible[..., None].expand(-1, -1, 4))
    expected = mar.network(known, visible, hidden, classes)
    assert_close(mar.network(known.flip(1), visible.flip(1), hidden, classes), expected)
    assert_close(mar.network(known, visible, hidden.flip(1), classes), expected.flip(1))
    assert_close(mar.network(known, visible, hidden, classes, 3), expected[:, :3])  # the last block for a few only


def test_the_network_is_the_paper_s_grid_with_mask_tokens() -> None:
    """Written the long way: encoder outputs put back into a grid of mask tokens, in raster order."""
    mar, orders = make(), random_orders(torch.arange(1), 16)
    net, visible, hidden = mar.network, orders[:, :5], orders[:, 5:]
    tokens, classes = torch.randn(1, 16, 4), torch.tensor([1])
    seen = sorted(visible[0].tolist())
    slots = net.classes.weight[1].expand(2, -1)
    x = torch.cat([slots, net.embed(tokens[0])]) + net.encoder_positions
    x = net.encoder_start(x)[[0, 1, *(2 + n for n in seen)]]
    x = net.decoder_embed(net.encoder_norm(net.encoder(x[None])))[0]
    grid = net.mask_token[0].expand(18, -1).clone()
    grid[[0, 1, *(2 + n for n in seen)]] = x
    z = net.decoder_norm(net.decoder((grid + net.decoder_positions)[None]))[0, 2:] + net.head_positions
    known = tokens.gather(1, visible[..., None].expand(-1, -1, 4))
    assert_close(net(known, visible, hidden, classes)[0], z[hidden[0]])


def test_the_loss_is_of_hidden_tokens_only() -> None:
    mar, batch, learned = make(), views(), []
    step = next(step for step in range(100) if math.ceil(mar.mask_ratio(step / 100) * 16) == 12)

    class Recorder(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, told: torch.Tensor, keys: torch.Tensor, repeats: int) -> object:
            learned.append(tokens)
            assert told.shape == (48, 16) and len(keys.unique()) == 48 and repeats == 2
            return {"noise": torch.arange(48.0)}

    mar.network.head = Recorder()
    assert mar(batch, step / 100)["noise"].item() == pytest.approx(23.5)
    tokens, orders = mar.encode(batch.global_crops, batch.keys), mar.orders(batch)
    expected = torch.cat([tokens[image, orders[image, 4:]] for image in range(4)])
    assert torch.equal(learned[0], expected)
    assert mar.observations["hidden_ratio"].item() == pytest.approx(12 / 16)


def test_labels_are_dropped_as_often_as_asked_in_training_only() -> None:
    mar, batch = make(label_drop=0.3), views(2000)
    assert torch.equal(mar.class_conditions(batch), batch.labels)
    told = mar.train().class_conditions(batch)
    dropped = told == 3
    assert 0.25 < dropped.float().mean() < 0.35 and torch.equal(told[~dropped], batch.labels[~dropped])
    assert (mar.class_conditions(views(5, labels=False)) == 3).all()
    assert (make(num_classes=None).class_conditions(views(5)) == 0).all()


def test_losses_do_not_depend_on_the_rest_of_the_batch() -> None:
    mar, batch = make(), views()
    whole = mar(batch, 0.3)
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        some = views()
        some.crops, some.index, some.keys = (batch.crops[0][rows],), batch.index[rows], batch.keys[rows]
        some.labels, some.flips = batch.labels[rows], batch.flips[rows]
        parts.append(mar(some, 0.3))
    for name in whole:
        assert_close(whole[name], (parts[0][name] + parts[1][name]) / 2)


def test_the_average_moves_by_its_formula_over_the_last_tenth_of_a_run() -> None:
    mar = make(ema_momentum=0.9)
    before = mar.average.module.embed.weight.clone()
    with torch.no_grad():
        mar.network.embed.weight += 1
    mar.after_step(0.5)
    assert_close(mar.average.module.embed.weight, 0.9 * before + 0.1 * mar.network.embed.weight)

    mar, momenta = make(), []
    for step in range(5):
        momenta.append(mar.momentum(step / 200))
        mar.after_step(step / 200)
    assert momenta == pytest.approx([0, *[1 - 10 / 200] * 4])
    resumed = make()
    resumed.load_state_dict(mar.state_dict())
    assert resumed.momentum(5 / 200) == pytest.approx(1 - 10 / 200)
    long = make()
    long.load_state_dict({**long.state_dict(), "num_updates": torch.tensor(1000)})
    assert long.momentum(1000 / 400_000) == 0.9999


def test_the_head_is_not_decayed() -> None:
    mar = make()
    decayed, plain = mar.param_groups()
    of_head = {id(parameter) for parameter in mar.network.head.parameters()}
    assert not of_head & {id(parameter) for parameter in decayed["params"]}
    assert of_head <= {id(parameter) for parameter in plain["params"]} and plain["weight_decay_scale"] == 0


@pytest.mark.parametrize("head", ["diffusion", "mixture"])
def test_drawing_fills_each_place_once_in_its_order(head: str) -> None:
    mar, orders, seen = make(head=head), random_orders(torch.arange(3), 16), []

    def watch(drawn: int, tokens: torch.Tensor) -> None:
        seen.append((drawn, tokens.clone()))

    result = mar.draw(orders, torch.arange(3), sampler=SamplerConfig(iterations=5, steps=5), watch=watch)
    assert [drawn for drawn, _ in seen] == list(itertools.accumulate(drawn_per_step(16, 5)))
    for drawn, tokens in seen:
        filled = tokens.abs().sum(-1) > 0
        assert torch.equal(filled, torch.zeros_like(filled).scatter_(1, orders[:, :drawn], True))
        assert_close(tokens[filled], result[filled])  # what is drawn stays


def test_a_drawn_image_does_not_depend_on_its_batch() -> None:
    mar, orders, keys = make(), random_orders(torch.arange(4), 16), torch.arange(4) + 50
    sampler, classes = SamplerConfig(iterations=4, steps=5, cfg=2.0), torch.tensor([0, 1, 2, 0])
    together = mar.draw(orders, keys, classes, sampler)
    alone = mar.draw(orders[2:3], keys[2:3], classes[2:3], sampler)
    assert_close(together[2:3], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, mar.draw(orders, keys + 1, classes, sampler))


def test_guidance_of_one_is_none_and_it_grows_with_what_is_drawn() -> None:
    mar, orders, keys = make(), random_orders(torch.arange(3), 16), torch.arange(3)
    classes = torch.tensor([0, 1, 2])
    plain = mar.draw(orders, keys, classes, SamplerConfig(iterations=4, steps=5, temperature=1.0))
    almost = mar.draw(orders, keys, classes, SamplerConfig(iterations=4, steps=5, cfg=1 + 1e-9))  # the doubled batch
    assert_close(plain, almost, rtol=1e-4, atol=1e-4)
    guided = mar.draw(orders, keys, classes, SamplerConfig(iterations=4, steps=5, cfg=4.0))
    assert not torch.allclose(plain, guided, atol=1e-2)
    linear, constant = SamplerConfig(cfg=3.0), SamplerConfig(cfg=3.0, cfg_schedule="constant")
    assert mar.guidance(linear, 4) == pytest.approx(1 + 2 * 4 / 16)
    assert mar.guidance(linear, 16) == pytest.approx(1 + 2 * 15 / 16) and mar.guidance(constant, 4) == 3.0


def test_fewer_mask_tokens_are_another_answer_at_the_same_places() -> None:
    mar, orders, keys = make(), random_orders(torch.arange(2), 16), torch.arange(2)
    whole = mar.draw(orders, keys, sampler=SamplerConfig(iterations=16, steps=5))
    lean = mar.draw(orders, keys, sampler=SamplerConfig(iterations=16, steps=5, decoder="needed"))
    assert lean.shape == whole.shape and not torch.allclose(lean, whole)
    one = SamplerConfig(iterations=1, steps=5)  # nothing is left out where all are drawn at once
    assert_close(
        mar.draw(orders, keys, sampler=one),
        mar.draw(orders, keys, sampler=SamplerConfig(iterations=1, steps=5, decoder="needed")),
    )


def test_the_likelihood_is_the_sum_over_the_order_of_each_token_given_those_before() -> None:
    mar, orders = make(head="mixture"), random_orders(torch.arange(2), 16)
    tokens, classes = torch.randn(2, 16, 4), torch.tensor([0, 3])
    found = mar.log_likelihood(tokens, orders, classes)
    net, expected = mar.network, torch.zeros(2, 16)
    for image in range(2):
        order = orders[image]
        for step in range(16):
            told = net(
                tokens[image, order[:step]][None], order[None, :step], order[None, step:], classes[image : image + 1]
            )
            here = order[step]
            expected[image, here] = net.head.log_likelihood(tokens[image, here][None], told[:, 0])[0]
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    at_once = mar.log_likelihood(tokens, orders, classes, iterations=1)
    assert not torch.allclose(at_once, found) and at_once.shape == (2, 16)


def test_dequantization_spreads_a_level_evenly() -> None:
    mar = make(dequantization=0.25)
    images = torch.full((500, 1, 8, 8), 0.5)
    tokens = mar.encode(images, torch.arange(500)) * mar.tokens.scale + mar.tokens.mean
    assert tokens.min() >= 0.375 - 1e-6 and tokens.max() <= 0.625 + 1e-6
    assert tokens.std().item() == pytest.approx(0.25 / math.sqrt(12), rel=0.02)


def test_mistakes_are_one_clear_line() -> None:
    orders, keys = random_orders(torch.arange(1), 16), torch.arange(1)
    with pytest.raises(ConfigError, match=r"iterations=17: images of 16 tokens"):
        make().draw(orders, keys, sampler=SamplerConfig(iterations=17))
    with pytest.raises(ConfigError, match="guidance needs classes"):
        make(num_classes=0).draw(orders, keys, sampler=SamplerConfig(cfg=2.0))
    with pytest.raises(ConfigError, match=r"needs method.head=diffusion"):
        make(head="mixture").draw(orders, keys, sampler=SamplerConfig(cfg=2.0))
    with pytest.raises(ConfigError, match=r"steps=5000: the diffusion has 2..1000"):
        make().draw(orders, keys, sampler=SamplerConfig(steps=5000))
    for name, value in (("cfg", math.nan), ("temperature", math.inf)):
        with pytest.raises(ConfigError, match=f"{name}={value}: input should be a finite number"):
            build(SamplerConfig, {name: value})
    with pytest.raises(ConfigError, match="cfg=-1: a finite number of at least 0"):
        make().draw(orders, keys, sampler=SamplerConfig(cfg=-1.0))
    with pytest.raises(ConfigError, match=r"needs a run with method.head=mixture"):
        make().log_likelihood(torch.randn(1, 16, 4), orders)
    with pytest.raises(ShapeError, match="orders have 9 tokens, but this run's images have 16"):
        make().draw(random_orders(keys, 9), keys)
    for settings, words in (
        ({"embed_dim": 15}, "must be a multiple of num_heads=2"),
        ({"buffer_size": 0}, "method.buffer_size=0: at least 1"),
        ({"mask_ratio_min": 1.0}, "MARConfig.mask_ratio_min=1.0: less than 1 is needed"),
        ({"clip": 0.0}, "clip=0.0: more than 0 is needed"),
        ({"ema_momentum": 2.0}, "ema_momentum=2.0: at most 1 is needed"),
    ):
        with pytest.raises(ConfigError, match=words):
            make(**settings)
