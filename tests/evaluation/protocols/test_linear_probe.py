"""The linear probe: many heads at once equal many heads apart, and nothing is chosen on the evaluated images."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.testing import assert_close

from smalti.data.crops import random_resized_crop
from smalti.data.images.image_set import ImageSample
from smalti.data.loader import epoch_order
from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocols.linear_probe import (
    LEARNING_RATES,
    LastBlocks,
    _CroppedExamples,
    linear_probe,
    stratified_fifth,
    train_heads,
)
from smalti.functional.refinement import prr_refine
from smalti.models.build import build_encoder

RATES = torch.tensor([0.01, 0.1, 0.5])
SEES = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 6])


def problem(n=50, width=6, num_classes=3):
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, width, generator=g)
    return inputs, (inputs @ torch.randn(width, num_classes, generator=g)).argmax(1)


def test_a_head_equals_torchs_sgd_with_cosine_schedule():
    inputs, labels = problem()
    heads = train_heads(inputs, labels, 3, RATES[1:2], SEES[:1], epochs=4, batch_size=16, seed=7)
    layer = nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight.copy_((torch.randn(6, 3, generator=torch.Generator().manual_seed(7)) * 0.01).T)
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16)
    for epoch in range(4):
        for batch in torch.from_numpy(epoch_order(7, epoch, 50)).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(inputs[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    assert_close(heads.weight, layer.weight.detach().T)
    assert_close(heads.bias, layer.bias.detach())


def test_heads_trained_together_equal_heads_trained_apart():
    inputs, labels = problem()
    together = train_heads(inputs, labels, 3, RATES, SEES, epochs=3, batch_size=16, seed=0)
    for head in range(3):
        rate, sees = RATES[head : head + 1], SEES[head : head + 1]
        apart = train_heads(inputs, labels, 3, rate, sees, epochs=3, batch_size=16, seed=0)
        assert_close(together.logits(inputs, 3)[:, head], apart.logits(inputs, 3)[:, 0])
    assert not together.weight[4:, 3:6].any()  # what the second head doesn't see


@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=6), seed=st.integers(0, 100))
def test_a_fifth_of_each_class_is_held_out(counts, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    held_out = stratified_fifth(labels, seed)
    for label, count in enumerate(counts):
        taken = int(held_out[labels == label].sum())
        assert taken == (max(1, round(count / 5)) if count > 1 else 0)
    assert torch.equal(held_out, stratified_fifth(labels, seed))


def test_e18_a_perfect_encoder_finds_every_class(perfect, greys, features_of):
    scores = linear_probe(features_of(perfect, greys, "labels"), EvalConfig())
    assert scores.metrics == {"top1": 1.0, "balanced_top1": 1.0}
    assert scores.settings["held_out_top1"] == 1.0


def test_e18_a_constant_encoder_gets_the_most_frequent_class(constant, greys, features_of):
    scores = linear_probe(features_of(constant, greys, "labels"), EvalConfig())
    assert scores.metrics["top1"] == 0.5
    assert scores.metrics["balanced_top1"] == pytest.approx(1 / 5)


def test_evaluated_images_select_nothing(tiny, greys, features_of):
    features = features_of(tiny, greys, "labels")
    chosen = linear_probe(features, EvalConfig()).settings
    assert chosen["learning_rate"] in LEARNING_RATES and chosen["features"] in ("cls", "cls+avg")
    few = dataclasses.replace(features.data.test, samples=features.data.test.samples[:1])
    features.data = dataclasses.replace(features.data, test=few)
    features._image_level.clear()
    assert linear_probe(features, EvalConfig()).settings == chosen


def test_order_of_judged_images_and_batch_size_do_not_matter(tiny, greys, features_of):
    whole = linear_probe(features_of(tiny, greys, "labels"), EvalConfig())
    features = features_of(tiny, greys, "labels", batch_size=3)
    turned = dataclasses.replace(features.data.test, samples=features.data.test.samples[::-1])
    features.data = dataclasses.replace(features.data, test=turned)
    assert linear_probe(features, EvalConfig()).metrics == whole.metrics


def test_an_encoder_without_class_token_is_read_by_its_mean_patch(greys, features_of):
    from smalti.models.build import build_encoder

    bare = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, seed=0, class_token=False, global_pool="avg"
    )
    assert (
        linear_probe(features_of(bare, greys, "labels"), EvalConfig(own={"linear-probe": {"epochs": 2}})).settings[
            "features"
        ]
        == "avg"
    )


def test_one_image_a_class_is_too_few_to_choose_by(tiny, greys, features_of):
    features = features_of(tiny, greys, "labels")
    by_class = {sample.label: sample for sample in features.data.train.samples}
    lonely = dataclasses.replace(features.data.train, samples=tuple(by_class.values()))
    features.data = dataclasses.replace(features.data, train=lonely)
    with pytest.raises(DataError, match="5 training images, one of each class"):
        linear_probe(features, EvalConfig())


@pytest.mark.parametrize(("width", "depth"), [(192, 3), (768, 2)])
def test_dinos_features_are_the_normed_class_tokens_of_the_last_blocks(width, depth):
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, depth=depth, embed_dim=width, num_heads=3, reg_tokens=2, seed=0
    ).eval()
    read, images = LastBlocks(encoder), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        layers = encoder.vit.forward_intermediates(
            images, norm=True, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
        )
        found = read(images)
    if width < 768:
        expected = torch.cat([prefix[:, 0] for _, prefix in layers], dim=1)
    else:
        expected = torch.cat([layers[-1][1][:, 0], layers[-1][0].mean(1)], dim=1)
    assert found.shape == (2, read.width)
    assert_close(found, expected)


def test_dinos_crops_are_pillows_bilinear_ones(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    crop = _CroppedExamples((ImageSample(tmp_path / "noise.png", 0),), 16, (0.0,) * 3, (1.0,) * 3)
    for key in range(8):
        view, _ = crop(0, key)
        rng = np.random.default_rng(key)
        top, left, height, width = random_resized_crop(rng, 90, 70, (0.08, 1.0), (3 / 4, 4 / 3))
        part = Image.fromarray(pixels[top : top + height, left : left + width])
        expected = np.asarray(part.resize((16, 16), Image.Resampling.BILINEAR))
        expected = expected[:, ::-1] if rng.random() < 0.5 else expected
        ours = (view * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(ours - expected).max() <= 1
        assert np.abs(ours - np.asarray(part.resize((16, 16), Image.Resampling.BICUBIC))).max() > 5


def test_dinos_form_learns_and_leaves_the_encoder_alone(tiny, greys, features_of):
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    config = EvalConfig(preset="paper", image_size=32, own={"linear-probe": {"epochs": 80, "batch_size": 8}})
    features = features_of(tiny, greys, "labels")
    scores = linear_probe(features, config)
    frequencies = torch.tensor([1 / 2, 1 / 8, 1 / 8, 1 / 8, 1 / 8])
    assert (
        scores.charts["loss"].lines[0].y[-1]
        < float(torch.special.entr(frequencies).sum())
        < scores.charts["loss"].lines[0].y[0]
    )
    assert scores.metrics["top1"] >= 0.5 and scores.metrics["top5"] == 1.0
    assert scores.settings["learning_rate"] == 0.001 * 8 / 256 and scores.settings["steps"] == 320
    assert all(torch.equal(value, before[key]) for key, value in tiny.state_dict().items())
    again = linear_probe(features_of(tiny, greys, "labels", batch_size=3, num_workers=1), config)
    assert again.metrics == scores.metrics
    assert again.charts["loss"].lines[0].y == pytest.approx(scores.charts["loss"].lines[0].y, rel=1e-5)


def test_dinos_form_for_an_encoder_without_a_class_token(features_of, greys):
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, depth=1, class_token=False, global_pool="avg", seed=0
    ).eval()
    assert_close(
        LastBlocks(encoder)(torch.ones(1, 3, 32, 32)), encoder.encode(torch.ones(1, 3, 32, 32)).patches.mean(1)
    )
    assert "mean patch" in str(LastBlocks(encoder))


def test_the_pooling_that_an_encoder_hands_on_takes_the_place_of_the_class_token(tiny, greys, features_of):
    def features(pool="auto"):
        scores = linear_probe(
            features_of(tiny, greys, "labels"), EvalConfig(pool=pool, own={"linear-probe": {"epochs": 1}})
        )
        return scores.settings["grid"].partition(" x ")[2]

    assert features() == features("cls") == "cls | cls+avg"
    assert features("avg") == "avg" and features("prr") == "prr | prr+avg"
    tiny.set_pool("prr")
    assert features() == "prr | prr+avg" and features("cls") == "cls | cls+avg"


@pytest.mark.parametrize("width", [192, 768])
def test_dinos_form_refines_each_block_only_with_prr(width, greys, features_of):
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=width, num_heads=3, reg_tokens=2, seed=0
    ).eval()
    encoder.set_pool("prr")
    images = torch.rand(2, 3, 32, 32)
    tokens, grid = encoder.embed_patches(images)
    layers = encoder.forward_layers(encoder.assemble(tokens, encoder.positions(grid)), range(-3, 0))
    plain, refined = LastBlocks(encoder), LastBlocks(encoder, "prr")
    assert_close(plain(images)[:, :width], layers[0 if width < 768 else -1][:, 0])
    chosen = layers if width < 768 else layers[-1:]
    expected = torch.cat([prr_refine(layer, 3)[:, 0] for layer in chosen], 1)
    assert_close(refined(images)[:, : expected.shape[1]], expected)
    assert "PRR" in str(refined) and "class token" in str(plain)
    with pytest.raises(ConfigError, match=r"eval\.pool=map is trained for the last block only"):
        linear_probe(features_of(encoder, greys, "labels"), EvalConfig(preset="paper", pool="map"))
