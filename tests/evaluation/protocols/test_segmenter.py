"""Segmenter: learns to tell pixels, judges in the pixels of the masks, and leaves the encoder alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from evaluation.conftest import STEP, tiny_encoder, write_image
from smalti.errors import ConfigError, DataError, ShapeError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocols import segmenter as segmenter_module
from smalti.evaluation.protocols.segmenter import (
    SegmentationExamples,
    Segmenter,
    SegmenterConfig,
    choose_recipe,
    draw_crop,
    label_map,
    nearest_to,
    photometric_distortion,
    pixel_loss,
    segmenter,
    sliding_logits,
    train_segmenter,
    window_starts,
)
from smalti.evaluation.tuning import seeded, trainable_copy
from smalti.models.build import clone_encoder


def test_it_learns_and_leaves_the_encoder_alone(tiny, scenes, features_of):
    before = clone_encoder(tiny).state_dict()
    untrained = segmenter(
        features_of(tiny, scenes, "masks"), EvalConfig(own={"segmenter": {"steps": 1, "learning_rate": 1e-9}})
    )
    scores = segmenter(
        features_of(tiny, scenes, "masks"), EvalConfig(own={"segmenter": {"steps": 120, "learning_rate": 1e-3}})
    )
    assert scores.metrics["miou"] > 0.8 > untrained.metrics["miou"] + 0.3
    assert scores.charts["loss"].lines[0].y[-1] < 0.5 * scores.charts["loss"].lines[0].y[0]
    after = tiny.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(p.grad is None for p in tiny.parameters())


@pytest.mark.parametrize("preset", ["small", "full", "paper"])
def test_the_same_seed_gives_the_same_numbers_with_any_number_of_workers(preset, tiny, scenes, features_of):
    config = EvalConfig(preset=preset, image_size=32, seed=5, own={"segmenter": {"steps": 3}})
    first = segmenter(features_of(tiny, scenes, "masks"), config)
    again = segmenter(features_of(tiny, scenes, "masks", num_workers=1, batch_size=3), config)
    other = segmenter(features_of(tiny, scenes, "masks"), EvalConfig(**{**vars(config), "seed": 6}))
    assert first.charts == again.charts and first.metrics == again.metrics
    assert first.charts != other.charts
    json.dumps(first.settings, allow_nan=False)
    assert first.confusion.sum() == 6 * (32 * 32 - 4)  # void pixels count nowhere


def test_published_recipes(tiny, scenes, features_of):
    features = features_of(tiny, scenes, "masks")
    ours, paper = (choose_recipe(features, EvalConfig(preset=preset)) for preset in ("full", "paper"))
    assert (ours.crop, ours.stride, ours.steps, ours.batch_size) == (512, 341, 160_000, 16)
    assert (ours.optimizer, ours.learning_rate, ours.weight_decay, ours.num_warmup) == ("adamw", 3e-5, 0.01, 1500)
    assert ours.least_lr == pytest.approx(3e-6)
    assert (paper.crop, paper.stride, paper.steps, paper.batch_size) == (512, 512, 160_000, 8)
    assert (paper.optimizer, paper.learning_rate, paper.least_lr, paper.weight_decay) == ("sgd", 1e-3, 1e-5, 0.0)
    for recipe in (ours, paper):
        assert (recipe.cat_max_ratio, recipe.drop_path, recipe.distort, recipe.scale) == (0.75, 0.1, True, (0.5, 2.0))
    changed = EvalConfig(
        preset="full",
        image_size=64,
        own={"segmenter": {"steps": 10, "learning_rate": 1e-3, "weight_decay": 0.3, "batch_size": 2, "absent": "zero"}},
    )
    recipe = choose_recipe(features, changed)
    assert (recipe.steps, recipe.batch_size, recipe.absent, recipe.crop, recipe.stride) == (10, 2, "zero", 64, 42)
    assert (recipe.learning_rate, recipe.least_lr, recipe.weight_decay) == (1e-3, 1e-4, 0.3)


def test_e17_windows_end_flush_with_the_border():
    assert window_starts(683, 512, 512) == [0, 171]
    assert window_starts(1000, 512, 480) == [0, 480, 488]
    assert window_starts(512, 512, 341) == [0]


@given(extra=st.integers(0, 200), window=st.integers(1, 60), share=st.floats(0.1, 1.0))
def test_windows_cover_every_pixel_and_none_comes_twice(extra, window, share):
    length, stride = window + extra, max(1, int(window * share))
    starts = window_starts(length, window, stride)
    assert {pixel for start in starts for pixel in range(start, start + window)} == set(range(length))
    assert len(set(starts)) == len(starts)


def test_logits_of_overlapping_windows_are_averaged():
    image = torch.zeros(1, 4, 6)
    seen = []

    def model(images):  # each window says how many came before it
        values = torch.arange(len(seen), len(seen) + len(images)).float()
        seen.extend(values.tolist())
        return values[:, None, None, None].expand(-1, 4, 4, 2)

    logits = sliding_logits(model, image, 4, 1, batch_size=2)
    assert logits.shape == (2, 4, 6) and seen == [0.0, 1.0, 2.0]
    assert_close(logits[0, 0], torch.tensor([0.0, 0.5, 1.0, 1.0, 1.5, 2.0]))


def test_the_label_map_is_the_argmax_of_upsampled_scores(monkeypatch):
    logits = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(logits[None], (11, 9), mode="bilinear")[0].argmax(0)
    assert torch.equal(label_map(logits, (11, 9)), expected)
    monkeypatch.setattr("smalti.evaluation.protocols.segmenter._AT_ONCE", 2 * 99)  # two classes at a time
    assert torch.equal(label_map(logits, (11, 9)), expected)
    assert label_map(torch.zeros(7, 5, 6), (3, 3)).sum() == 0  # ties go to the lowest class


def test_logits_are_those_of_each_patch_upsampled(tiny):
    model = Segmenter(trainable_copy(tiny, 0.0), 5).eval()
    images = torch.rand(2, 3, 32, 24)
    tokens = tiny.eval().encode(images).patches
    scores = model.encoder.vit.head(tokens).mT.unflatten(2, (4, 3))
    expected = F.interpolate(scores, (32, 24), mode="bilinear").permute(0, 2, 3, 1)
    assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


def test_images_that_the_patch_size_does_not_divide_are_padded(tiny):
    model = Segmenter(trainable_copy(tiny, 0.0), 5).eval()
    images = torch.rand(1, 3, 27, 30)
    whole = model(F.pad(images, (0, 2, 0, 5)))
    assert_close(model(images), whole[:, :27, :30])


def test_only_labelled_pixels_are_learned_from():
    logits = torch.randn(2, 3, 3, 4, requires_grad=True)
    target = torch.randint(0, 4, (2, 3, 3))
    target[0] = 255
    assert_close(pixel_loss(logits, target, 255), F.cross_entropy(logits[1].flatten(0, 1), target[1].flatten()))
    loss = pixel_loss(logits, torch.full_like(target, 255), 255)
    loss.backward()
    assert loss == 0 and logits.grad.abs().sum() == 0


def test_a_crop_in_which_one_class_rules_is_drawn_again():
    mask = np.zeros((8, 40), dtype=np.uint8)
    mask[:, 20:] = 1
    shares = {1.0: 0, 0.75: 0}
    for ratio in shares:
        rng = np.random.default_rng(0)
        for _ in range(200):
            top, left, height, width = draw_crop(mask, 8, ratio, 255, rng)
            assert (height, width) == (8, 8) and 0 <= top and left + width <= 40
            part = mask[:, left : left + 8]
            shares[ratio] += 0.25 < part.mean() < 0.75
    # Of 33 places 3 hold both classes in 3/8..5/8: a share p of the first draws, 1 - (1 - p)^10 of ten.
    assert shares[1.0] < 40 < 90 < shares[0.75]
    assert draw_crop(np.zeros((5, 6), dtype=np.uint8), 8, 0.75, 255, np.random.default_rng(0)) == (0, 0, 5, 6)


def test_an_image_and_its_mask_are_changed_alike(tiny, scenes, features_of):
    features = features_of(tiny, scenes, "masks")
    recipe = choose_recipe(features, EvalConfig())
    make = SegmentationExamples(features.data.train.samples, recipe, 3, (0.0,) * 3, (1.0,) * 3)
    for key in range(12):
        pixels, mask = make(key, key)
        assert pixels.shape == (3, 32, 32) and mask.shape == (32, 32)
        seen = mask != 255
        wrong = (pixels[0] * 255 / STEP).round()[seen] != mask[seen]
        assert wrong.float().mean() < 0.25  # between two patches, where bilinear mixes what nearest doesn't
    sizes = [int((make(0, key)[1] != 255).sum()) for key in range(20)]
    assert min(sizes) < 32 * 32 / 2  # a shrunk image is padded with what is ignored
    assert torch.equal(make(0, 3)[0], make(0, 3)[0]) and not torch.equal(make(0, 3)[0], make(0, 4)[0])


@given(seed=st.integers(0, 10**6), channels=st.sampled_from([1, 3, 5]), deep=st.booleans())
def test_distorted_images_stay_images(seed, channels, deep):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (6, 5, channels), dtype=np.uint8)
    changed = photometric_distortion(image / np.float32(255) if deep else image, rng)
    assert changed.shape == image.shape and changed.dtype == np.float32
    assert 0 <= changed.min() and changed.max() <= 1


def test_distortion_changes_colours_as_it_says():
    class Drawn(np.random.Generator):  # everything is drawn, and each range's upper end
        def random(self):
            return 0.0

        def uniform(self, low, high):
            return high

    image = np.full((1, 1, 3), 0.2, dtype=np.float32)
    image[..., 0] = 0.3
    # + 32/255, then * 1.5: (.6382, .4882, .4882). Saturation .1498/.6382 = .2350, * 1.5 = .3525, and hue 36 degrees:
    # the lowest is .6382 * (1 - .3525) = .4132; the middle .4132 + .6 * (.6382 - .4132) = .5482.
    changed = photometric_distortion(image, Drawn(np.random.PCG64()))
    assert changed[0, 0].tolist() == pytest.approx([0.6382, 0.5482, 0.4132], abs=1e-3)


def test_masks_shrink_by_nearest_pixel():
    assert nearest_to(np.array([[0, 1], [2, 3]]), 3, 3).tolist() == [[0, 0, 1], [0, 0, 1], [2, 2, 3]]
    assert nearest_to(np.arange(16).reshape(4, 4), 3, 3).tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]


@pytest.fixture
def oblong(tmp_path):
    """Images of several sizes, one of them damaged; 16 bits and one channel."""
    for name, (height, width) in {"a": (40, 60), "b": (70, 33), "c": (300, 20), "d": (32, 32)}.items():
        for split in ("train", "val"):
            mask = np.zeros((height, width), dtype=np.uint8)
            mask[:, width // 2 :] = 1
            write_image(tmp_path / "images" / f"{split}{name}.png", mask.astype(np.uint16) * 30000)
            write_image(tmp_path / "masks" / f"{split}{name}.png", mask)
    for split in ("train", "val"):
        (tmp_path / "images" / f"{split}d.png").write_bytes(b"no image")
        (tmp_path / f"{split}.txt").write_text("\n".join(f"{split}{name}" for name in "abcd"))
    (tmp_path / "classes.txt").write_text("left\nright\n")
    return tmp_path


def test_every_mask_is_evaluated_at_its_own_size(oblong, features_of):
    encoder = tiny_encoder(in_chans=1)
    features = features_of(encoder, oblong, "masks")
    scores = segmenter(features, EvalConfig(own={"segmenter": {"steps": 2, "batch_size": 2}}))
    assert scores.confusion.sum() == 40 * 60 + 70 * 33 + 300 * 20
    assert {place: pred.shape for place, pred in scores.predictions.items()} == {0: (40, 60), 1: (70, 33), 2: (256, 17)}
    assert set(scores.predictions) <= set(features.shown) and scores.predictions[0].dtype == np.int32
    assert len(features.skipped) == 2
    assert scores.tallies["miou"].score() == pytest.approx(scores.metrics["miou"])


def test_mistakes_are_told_in_one_line(tiny, scenes, oblong, features_of):
    with pytest.raises(ShapeError, match="images are 30x30 pixels, which patch_size=8 does not divide"):
        segmenter(features_of(tiny, scenes, "masks"), EvalConfig(image_size=30))
    for path in (oblong / "masks").glob("val*.png"):
        write_image(path, np.full((40, 60), 255, dtype=np.uint8))
    with pytest.raises(DataError, match=r"valb\.png: 60x40 pixels, its image valb\.png has 33x70"):
        segmenter(features_of(tiny, oblong, "masks"), EvalConfig(own={"segmenter": {"steps": 1}}))
    for name, (height, width) in {"b": (70, 33), "c": (300, 20)}.items():
        write_image(oblong / "masks" / f"val{name}.png", np.full((height, width), 255, dtype=np.uint8))
    with pytest.raises(DataError, match="no labelled pixel in the masks of the 4 val images"):
        segmenter(features_of(tiny, oblong, "masks"), EvalConfig(own={"segmenter": {"steps": 1}}))


def test_a_sweep_chooses_on_held_out_training_images_and_reports_what_it_chose(tiny, scenes, features_of, monkeypatch):
    own = {"steps": 12, "batch_size": 4}
    rates, decays = (1e-9, 3e-3), (0.0, 0.1)
    swept = EvalConfig(own={"segmenter": {**own, "sweep": True, "learning_rates": rates, "weight_decays": decays}})
    features = features_of(tiny, scenes, "masks")
    read = []
    resized = segmenter_module._ResizedImages.__init__

    def noting(self, images, *rest):
        read.append({sample.path for sample in images.samples})
        resized(self, images, *rest)

    monkeypatch.setattr(segmenter_module._ResizedImages, "__init__", noting)
    scores = segmenter(features, swept)
    about, train = scores.settings["sweep"], {sample.path for sample in features.data.train.samples}
    test = {sample.path for sample in features.data.test.samples}
    assert all(part == read[0] for part in read[:4]) and read[4:] == [test]
    assert read[0] < train and len(read[0]) == round(0.2 * len(train))
    assert about["held_out"] == f"{len(read[0])} of {len(train)} training images"
    assert list(about["miou"]) == [f"learning rate {r:g}, weight decay {d:g}" for r in rates for d in decays]
    chosen = about["chosen"]
    assert chosen["learning_rate"] == 3e-3 == scores.settings["learning_rate"]
    reached = about["miou"][f"learning rate 0.003, weight decay {chosen['weight_decay']:g}"]
    assert reached == max(about["miou"].values()) > about["miou"]["learning rate 1e-09, weight decay 0"]
    plain = EvalConfig(own={"segmenter": {**own, **chosen}})
    assert segmenter(features_of(tiny, scenes, "masks"), plain).metrics == scores.metrics  # as if it had been set


def test_the_sweep_of_the_paper():
    own = SegmenterConfig()
    assert own.learning_rates == (8e-5, 3e-5, 1e-5, 8e-6) and own.weight_decays == (1e-2, 1e-4)


@pytest.mark.parametrize(
    ("preset", "own", "line"),
    [
        ("small", {"learning_rates": (1e-3,)}, "eval.segmenter.learning_rates only applies to eval.segmenter.sweep"),
        ("small", {"sweep": True, "weight_decay": 0.1}, "weight_decay=0.1: sweep=true chooses it; leave it out"),
        ("small", {"sweep": True, "weight_decays": ()}, r"weight_decays=\[\]: at least one is needed"),
        ("paper", {"sweep": True}, "the sweep is over AdamW; use eval.preset=full or small"),
        ("small", {"micro_batch": 3}, "micro_batch=3 does not divide the batch of 8 images; use 2"),
        ("small", {"micro_batch": 16}, "micro_batch=16 does not divide the batch of 8 images; use 8"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(preset, own, line, tiny, scenes, features_of):
    config = EvalConfig(preset=preset, image_size=32, own={"segmenter": own})
    with pytest.raises(ConfigError, match=line):
        segmenter(features_of(tiny, scenes, "masks"), config)


def test_a_sweep_needs_two_training_images(tiny, scenes, features_of):
    features = features_of(tiny, scenes, "masks")
    alone = replace(features.data.train, samples=features.data.train.samples[:1])
    features.data = replace(features.data, train=alone)
    with pytest.raises(DataError, match="only one training image, so a sweep can't choose"):
        segmenter(features, EvalConfig(own={"segmenter": {"sweep": True, "steps": 1}}))


@pytest.mark.parametrize("own", [{"micro_batch": 1}, {"micro_batch": 2}, {"checkpointing": True}])
def test_accumulation_and_checkpointing_change_no_gradient(own, tiny, scenes, features_of, monkeypatch):
    """Images have different numbers of labelled pixels, so a mean of means would be another gradient."""
    make = SegmentationExamples.__call__

    def partly_labelled(self, place, key):
        pixels, target = make(self, place, key)
        target[: 4 * (key % 7)] = 255
        return pixels, target

    monkeypatch.setattr(SegmentationExamples, "__call__", partly_labelled)
    features, found = features_of(tiny, scenes, "masks"), []
    for more in ({}, own):
        config = EvalConfig(own={"segmenter": {"steps": 1, "batch_size": 4, "learning_rate": 1.0, **more}})
        recipe = replace(
            choose_recipe(features, config), optimizer="sgd", weight_decay=0.0, drop_path=0.3, num_warmup=0
        )
        with seeded(0):
            model, curve = train_segmenter(features, config, recipe, features.data.train, "segmenter")
        found.append((curve, model.state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    start = tiny.state_dict()
    for key, value in found[0][1].items():  # after a step of the negative gradient
        assert_close(found[1][1][key], value, rtol=1e-4, atol=1e-5)
    moved = found[0][1]["encoder.vit.blocks.0.attn.qkv.weight"] - start["vit.blocks.0.attn.qkv.weight"]
    assert moved.abs().max() > 1e-3
