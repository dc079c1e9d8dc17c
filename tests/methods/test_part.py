"""PART against its definition: what the encoder may know, what pairs are asked, what is asked about them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.evaluation.evaluate import random_init
from smalti.evaluation.tuning import rate_positions, seeded, trainable_copy
from smalti.functional.offgrid import Patches
from smalti.functional.pairs import r_squared, select_pairs
from smalti.functional.positions import sincos_positions
from smalti.methods.part import PART, PARTConfig, info_nce, pair_loss
from smalti.models.build import build_encoder, encoder_from_config

POSITION_FREE = [
    {},
    {"sampling": "grid"},
    {"sampling": "offgrid_scale", "head": "pairwise_linear"},
    {"sampling": "nonoverlapping", "head_norm": True, "head_mlp": True},
    {"sampling": "hierarchical", "head": "difference"},
    {"sampling": "saliency", "key_mask_ratio": 0.5},
]


def tiny(size: int = 32, dim: int = 24, **config: object) -> PART:
    torch.manual_seed(0)
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=size, patch_size=8, embed_dim=dim, depth=2, num_heads=3, seed=0
    )
    return PART(encoder, PARTConfig(**config))


def views(images: torch.Tensor, keys: torch.Tensor | None = None, num_views: int = 1) -> Views:
    batch = len(images) // num_views
    return Views(
        crops=(images,),
        boxes=torch.zeros(len(images), 4),
        flips=torch.zeros(len(images), dtype=torch.bool),
        source_size=torch.full((batch, 2), 32),
        index=torch.arange(batch),
        keys=torch.arange(batch) if keys is None else keys,
        skipped=(),
    )


def photos(batch: int, size: int = 32) -> torch.Tensor:
    noise = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return (F.avg_pool2d(noise, 5, 1, 2) + noise) / 2


def all_pairs(num_patches: int) -> torch.Tensor:
    return select_pairs(torch.arange(1), num_patches, num_patches**2)


def fit(
    part: PART, patches: Patches, size: int, steps: int, lr: float = 2e-3, swap: bool = False, again: bool = False
) -> float:
    """Train on all pairs of some patches, with a rate that falls to nothing; the error over the best constant's, at the
    end.

    Args:
        swap: ask for (j, i) in the place of (i, j).
        again: new patches of new noise at each step.
    """
    optimizer = torch.optim.AdamW(part.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    pairs = all_pairs(patches.boxes.shape[1])
    keys = torch.arange(len(patches.boxes))
    for step in range(steps):
        if again:
            keys = torch.arange(len(keys)) + (step + 1) * len(keys)
            images = torch.randn(len(keys), 3, size, size, generator=torch.Generator().manual_seed(step))
            patches = part.sampler(keys, images)
        target = part.target(patches, pairs.flip(-1) if swap else pairs, (size, size)).values
        prediction = part.head(part.encode(patches, keys)[0], pairs)
        loss = pair_loss(prediction, target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(1 - r_squared(prediction.detach(), target).mean())


@torch.no_grad()
def moved(part: PART) -> float:
    """D7, L1: how much the tokens change, beyond going along, when patches change places in the sequence."""
    images, keys = photos(2), torch.arange(2)
    patches = part.sampler(keys, images)
    order = torch.randperm(patches.boxes.shape[1], generator=torch.Generator().manual_seed(1))
    there = part.encode(patches, keys)[0][:, order]
    back = part.encode(patches._replace(pixels=patches.pixels[:, order]), keys)[0]
    return float((there - back).abs().max() / there.abs().max())


@torch.no_grad()
def blank_score(part: PART, noise: bool = False) -> float:
    """D7, L2: R^2 on images of one colour; L2b: where each patch is noise of its own."""
    keys = torch.arange(16) + 1000
    colour = torch.rand(16, 3, 1, 1, generator=torch.Generator().manual_seed(2))
    patches = part.sampler(keys, colour.expand(-1, -1, 32, 32))
    if noise:
        patches = patches._replace(pixels=torch.randn_like(patches.pixels))
    pairs = all_pairs(patches.boxes.shape[1])
    target = part.target(patches, pairs, (32, 32)).values
    return float(r_squared(part.head(part.encode(patches, keys)[0], pairs), target)[:2].max())


@pytest.mark.parametrize("config", POSITION_FREE, ids=lambda c: c.get("sampling", "default"))
def test_position_free_encoders_leak_no_position(config: dict[str, object]) -> None:
    part = tiny(**config).eval()
    assert moved(part) <= 1e-4
    assert blank_score(part) <= 0.01 and blank_score(part, noise=True) <= 0.01


def test_what_a_trained_position_free_encoder_knows_is_in_the_pixels() -> None:
    part = tiny(head="pairwise_linear")
    fit(part, part.sampler(torch.arange(8), photos(8)), 32, 60, again=True)
    part.eval()
    assert moved(part) <= 1e-4
    assert blank_score(part) <= 0.01 and blank_score(part, noise=True) <= 0.01


def test_the_probes_turn_red_when_positions_are_switched_on() -> None:  # by design
    part = tiny(head="pairwise_linear", positions="sincos")
    fit(part, part.sampler(torch.arange(8), photos(8)), 32, 80, again=True)
    part.eval()
    assert moved(part) > 0.01
    assert blank_score(part) > 0.5 and blank_score(part, noise=True) > 0.5


@pytest.mark.parametrize("head", ["cross_attention", "pairwise_linear"])
@pytest.mark.parametrize("swap", [False, True], ids=["as asked", "swapped"])
def test_one_batch_can_be_overfit(head: str, swap: bool) -> None:  # D6: pairs and targets belong together
    part = tiny(dim=48, head=head, num_patches=5)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))  # no two patches are alike
    assert fit(part, part.sampler(torch.arange(3), images), 32, 200, lr=4e-3, swap=swap) <= 0.02


def test_the_step_is_the_papers_computed_the_long_way() -> None:
    part = tiny(num_pairs=7).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    loss = part(views(images), 0.25)["offsets"]

    encoder = part.encoder
    x = encoder.normalize(images)
    boxes = part.sampler.boxes(torch.arange(2), x)
    key = torch.tensor([0.25], dtype=torch.float64).view(torch.int64)
    pairs = select_pairs(key, 16, 7)[0].tolist()
    total = 0.0
    for image, its in zip(x, boxes.int().tolist(), strict=True):
        crops = torch.stack([image[:, y0:y1, x0:x1] for x0, y0, x1, y1 in its])
        tokens = encoder.vit.patch_embed.proj(crops)[:, :, 0, 0]  # (N, D), no positions
        sequence = torch.cat([tokens, encoder.vit.cls_token[0]])[None]  # the class token at the end
        tokens = encoder.vit.norm(encoder.vit.blocks(sequence))[:, :-1]
        for i, j in pairs:
            query = part.head.input_project(torch.cat([tokens[0, i], tokens[0, j]]))[None, None]
            answer = part.head.output_project(part.head.multihead_attn(query, tokens, tokens)[0])[0, 0].tolist()
            truth = [(its[j][0] - its[i][0]) / 8, (its[j][1] - its[i][1]) / 8]
            total += sum((a - t) ** 2 for a, t in zip(answer, truth, strict=True)) / 2
    assert_close(loss.item(), total / (2 * 7), rtol=1e-4, atol=1e-5)


def test_masked_keys_are_seen_by_nobody() -> None:
    part = tiny(key_mask_ratio=0.75).train()
    part.encoder.set_drop_path(0.0)
    patches, keys = part.sampler(torch.arange(2), photos(2)), torch.arange(2)
    tokens, prefix = part.encode(patches, keys)
    changed = []
    for n in range(16):
        pixels = patches.pixels.clone()
        pixels[:, n] = 0
        others = [m for m in range(16) if m != n]
        again = part.encode(patches._replace(pixels=pixels), keys)
        same = torch.isclose(again[0][:, others], tokens[:, others], atol=1e-6).flatten(1).all(1)
        assert torch.equal(torch.isclose(again[1], prefix, atol=1e-6).flatten(1).all(1), same)
        changed.append(~same)
    assert torch.stack(changed).sum(0).tolist() == [4, 4]  # int(16 * 0.25) are keys


def test_pairs_of_a_step_are_shared_and_redrawn() -> None:
    part, cpu = tiny(), torch.device("cpu")
    first, second = part.draw_pairs(16, 0.1, cpu), part.draw_pairs(16, 0.2, cpu)
    assert first.shape == (1, 128, 2) and not torch.equal(first, second)
    assert [part.num_pairs(n) for n in (64, 196)] == [2048, 4802]  # the paper's, the code's
    with pytest.raises(ConfigError, match=r"num_pairs=257: 16 patches have 1..256"):
        tiny(num_pairs=257)(views(photos(2)), 0.0)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"normalize": "image"},
        {"sampling": "offgrid_scale"},
        {"sampling": "offgrid_scale", "scale_target": "ratio"},
        {"max_angle": 30.0, "frame": "patch"},
        {"angles": "quad", "frame": "patch"},
        {"sampling": "hierarchical"},
    ],
    ids=str,
)
def test_targets_are_the_offsets_of_centres_in_pixels(config: dict[str, object]) -> None:
    part = tiny(**config)
    patches, pairs = part.sampler(torch.arange(2), photos(2)), all_pairs(16)[:, :100]
    values, units = part.target(patches, pairs, (32, 32))
    assert values.shape[-1] == len(part.channels) and values.dtype == torch.float32
    centres = (patches.boxes[..., :2] + patches.boxes[..., 2:]) / 2
    i, j = pairs[0].unbind(-1)
    assert_close(part.pixel_offsets(values, patches, pairs, units), centres[:, j] - centres[:, i], rtol=0, atol=1e-4)
    backward = part.target(patches, pairs.flip(-1), (32, 32)).values[..., 2:]
    names = part.channels[2:]
    for name, one, other in zip(names, values[..., 2:].unbind(-1), backward.unbind(-1), strict=True):
        if name == "cos":
            assert_close(one, other, rtol=0, atol=1e-5)
        elif part.config.scale_target == "ratio":
            assert_close(one * other, torch.ones_like(one))
        else:
            assert_close(one, -other, rtol=0, atol=1e-5)


def test_the_loss_is_a_mean_and_has_the_right_gradient() -> None:
    a, b = torch.randn(2, 2, 3, 2, dtype=torch.float64)
    for loss, error in (
        ("mse", lambda e: e * e),
        ("huber", lambda e: e * e / 2 if abs(e) < 1 else abs(e) - 0.5),
    ):
        by_hand = [sum(error(float(a[n, k, c] - b[n, k, c])) for n in range(2) for k in range(3)) / 6 for c in range(2)]
        assert_close(pair_loss(a, b, loss).tolist(), by_hand)
        assert gradcheck(lambda x, kind=loss: pair_loss(x, b, kind), a.clone().requires_grad_())


def test_weightings_of_sizes() -> None:
    images = photos(4)
    plain = tiny(sampling="offgrid_scale")(views(images), 0.5)
    later = tiny(sampling="offgrid_scale", weighting="schedule")
    assert later(views(images), 0.1)["sizes"] == 0
    assert_close(later(views(images), 0.5), plain)

    learned = tiny(sampling="offgrid_scale", weighting="uncertainty")
    with torch.no_grad():
        learned.log_variance.copy_(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    expected = math.exp(-1) * plain["sizes"] + 2 / 4
    assert_close(learned(views(images), 0.5)["sizes"], expected)

    part = tiny(sampling="offgrid_scale", weighting="variance")
    assert_close(part(views(images), 0.5), plain)  # before the first step the variances count as 1
    target = part.target(
        part.sampler(torch.arange(4), photos(4)), part.draw_pairs(16, 0.5, torch.device("cpu")), (32, 32)
    )
    part.after_step(0.5)
    assert_close(part.target_variance, 0.99 + 0.01 * target.values.flatten(0, 1).var(0), rtol=1e-4, atol=1e-5)
    part.target_variance.copy_(torch.tensor([1.0, 1.0, 0.5, 0.5]))
    assert_close(part(views(images), 0.5)["sizes"], 2 * plain["sizes"])


def test_two_views_are_cut_differently_and_their_class_tokens_compared() -> None:
    part = tiny(contrastive=0.1, head="pairwise_linear")
    assert part.make_views(32).num_views == 2 and tiny().make_views(32).num_views == 1
    images = photos(6)
    terms = part(views(images, num_views=2), 0.5)
    assert set(terms) == {"offsets", "contrastive"}
    terms["contrastive"].backward()
    assert part.encoder.vit.cls_token.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in part.head.parameters())
    unit = F.normalize(torch.eye(4), dim=-1)
    assert_close(info_nce(unit, unit, 0.5).item(), math.log(1 + 3 * math.exp(-2)), rtol=1e-5, atol=0)  # by hand


def test_flips_can_be_switched_off() -> None:
    assert [tiny(**how).make_views(32).specs[0].flip_prob for how in ({}, {"flip_prob": 0.0})] == [0.5, 0.0]
    with pytest.raises(ConfigError, match=r"PARTConfig.flip_prob=1.5: at most 1 is needed"):
        tiny(flip_prob=1.5)


def test_what_is_observed() -> None:
    part = tiny(sampling="hierarchical")
    part(views(photos(4)), 0.5)
    assert {"r2", "mean_predictor_mse", "r2_x", "r2_width", "r2_whole_whole", "r2_part_part"} <= set(part.observations)
    plain = tiny()
    with torch.no_grad():
        for parameter in plain.head.parameters():
            parameter.zero_()
    plain(views(photos(4)), 0.5)  # says 0 always: no better than the best constant, but for its mean
    assert -0.05 < plain.observations["r2"] <= 0


def test_quarter_turned_patches_are_asked_about_their_angles() -> None:
    part = tiny(angles="quad")
    assert part.channels == ("x", "y", "cos", "sin")
    assert set(part(views(photos(2)), 0.5)) == {"offsets", "angles"}
    assert set(tiny(max_angle=20.0, supervise_angles=False)(views(photos(2)), 0.5)) == {"offsets"}


def test_the_encoder_is_exported_without_positions_and_fine_tuned_with_new_ones() -> None:
    encoder = tiny().encoder
    assert encoder.position_free and encoder.vit.pos_embed.abs().max() == 0
    assert not encoder.vit.pos_embed.requires_grad
    images = photos(2)
    moved = images.roll(8, dims=-1)  # by one patch: the same bag of patches
    before, after = (encoder.eval().encode(encoder.normalize(x)).patches.view(2, 4, 4, -1) for x in (images, moved))
    assert_close(before.roll(1, dims=2), after, rtol=1e-4, atol=1e-5)
    assert random_init(encoder, 0).vit.pos_embed.abs().max() == 0
    assert encoder_from_config(encoder.config()).position_free

    copies = []
    for seed in (0, 1):
        with seeded(seed):
            copies.append(trainable_copy(encoder, 0.0))
    for copy in copies:
        assert copy.vit.pos_embed.requires_grad and 0.015 < copy.vit.pos_embed.std() < 0.025
        assert not copy.position_free
    assert not torch.equal(copies[0].vit.pos_embed, copies[1].vit.pos_embed)
    assert encoder.vit.pos_embed.abs().max() == 0


def test_fresh_positions_learn_at_the_full_rate() -> None:
    encoder = tiny().encoder
    copy = trainable_copy(encoder, 0.0)
    groups = [{"params": list(copy.vit.parameters()), "lr_scale": 0.1, "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    rate_positions(optimizer, encoder, copy)
    last = optimizer.param_groups[-1]
    assert last["params"] == [copy.vit.pos_embed] and (last["lr_scale"], last["weight_decay"]) == (1.0, 0.0)
    assert all(p is not copy.vit.pos_embed for p in optimizer.param_groups[0]["params"])
    known = build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    other = trainable_copy(known, 0.0)
    optimizer = torch.optim.AdamW([{"params": list(other.vit.parameters()), "lr_scale": 0.1}], lr=1e-3)
    rate_positions(optimizer, known, other)
    assert len(optimizer.param_groups) == 1


def test_the_control_s_positions_are_those_of_the_grid() -> None:
    encoder = tiny(positions="sincos").encoder
    assert not encoder.position_free and encoder.fixed_positions
    assert_close(encoder.vit.pos_embed[0, 1:], sincos_positions(24, (4, 4)))
    assert encoder.vit.pos_embed[0, 0].abs().max() == 0


def test_mistakes_are_one_line_each() -> None:
    for wrong, text in (
        ({"key_mask_ratio": 1.0}, "key_mask_ratio=1.0: less than 1 is needed"),
        ({"angles": "quad", "max_angle": 10.0}, "leave max_angle out"),
        ({"max_angle": 200.0}, "max_angle=200.0: at most 180 is needed"),
        ({"max_angle": 10.0, "sampling": "grid"}, "rotation needs square patches and sampling=offgrid"),
        ({"weighting": "schedule"}, "weighting=schedule delays the size loss"),
        (
            {"head": "difference", "sampling": "offgrid_scale", "scale_target": "ratio"},
            "head=difference cannot predict",
        ),
        ({"contrastive": -1.0}, "method.contrastive=-1: a weight of at least 0"),
        ({"head_num_heads": 5}, "head_num_heads=5 does not divide"),
    ):
        with pytest.raises(ConfigError, match=text):
            tiny(**wrong)
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3,
                            class_token=False, global_pool="avg")  # fmt: skip
    with pytest.raises(ConfigError, match="compares class tokens"):
        PART(encoder, PARTConfig(contrastive=0.1))
