"""Fine-tuning: learns what can be learned, by MAE's recipe, on a copy."""

import json

import cv2
import numpy as np
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch.testing import assert_close

from evaluation.conftest import STEP, tiny_encoder, write_image
from smalti.errors import ConfigError, DataError, ShapeError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocols.finetune import ClassificationExamples, FinetuneClassifier, choose_recipe, finetune
from smalti.evaluation.tuning import seeded, trainable_copy
from smalti.models.build import clone_encoder


def test_it_learns_classes_that_can_be_told_apart_and_leaves_the_encoder_alone(tiny, greys, features_of):
    before = clone_encoder(tiny).state_dict()
    scores = finetune(features_of(tiny, greys, "labels"), EvalConfig(own={"finetune": {"batch_size": 8}}))
    assert scores.metrics["top1"] > 0.9 and scores.metrics["balanced_top1"] > 0.9
    assert scores.metrics["top5"] == 1.0  # of five classes
    assert scores.charts["loss"].lines[0].y[-1] < 0.5 * scores.charts["loss"].lines[0].y[0]
    assert scores.settings["steps"] >= 200
    after = tiny.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(p.grad is None for p in tiny.parameters())


@pytest.mark.parametrize("preset", ["small", "full"])
def test_the_same_seed_gives_the_same_numbers_with_any_number_of_workers(preset, tiny, greys, features_of):
    config = EvalConfig(preset=preset, image_size=32, seed=5, own={"finetune": {"epochs": 1, "batch_size": 8}})
    first = finetune(features_of(tiny, greys, "labels"), config)
    again = finetune(features_of(tiny, greys, "labels", num_workers=1, batch_size=3), config)
    other = finetune(features_of(tiny, greys, "labels"), EvalConfig(**{**vars(config), "seed": 6}))
    assert first.charts == again.charts and first.metrics == again.metrics
    assert first.charts != other.charts
    json.dumps(first.settings, allow_nan=False)


def test_the_published_recipe_goes_by_the_size_of_the_encoder(greys, features_of):
    for depth, expected in {12: (100, 5e-4, 0.65, 0.1), 24: (50, 1e-3, 0.75, 0.2), 32: (50, 1e-3, 0.75, 0.3)}.items():
        encoder = tiny_encoder()
        encoder.vit.blocks = torch.nn.Sequential(*[encoder.vit.blocks[0]] * depth)
        recipe = choose_recipe(features_of(encoder, greys, "labels"), EvalConfig(preset="full"))
        assert (recipe.epochs, recipe.base_lr, recipe.layer_decay, recipe.drop_path) == expected
        assert recipe.peak_lr == 4 * recipe.base_lr  # 1024 images a step
        assert recipe.warmup_ratio * recipe.epochs == 5
        assert (recipe.image_size, recipe.weight_decay, recipe.least_lr) == (224, 0.05, 1e-6)
        assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing, recipe.erase_prob) == (0.8, 1.0, 0.1, 0.25)


def test_the_learning_rate_falls_from_the_head_to_the_patches():
    encoder = trainable_copy(tiny_encoder(), 0.0)
    vit = FinetuneClassifier(encoder, 3).encoder.vit
    optimizer = create_optimizer_v2(vit, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert scale[id(vit.head.weight)] == scale[id(vit.fc_norm.weight)] == 1.0
    assert scale[id(vit.blocks[0].attn.qkv.weight)] == 0.5
    assert scale[id(vit.patch_embed.proj.weight)] == scale[id(vit.pos_embed)] == scale[id(vit.cls_token)] == 0.25
    assert decay[id(vit.head.weight)] == 0.05
    assert decay[id(vit.head.bias)] == decay[id(vit.pos_embed)] == decay[id(vit.fc_norm.weight)] == 0.0
    assert len(scale) == len(list(vit.parameters()))


def test_the_classifier_is_timms_with_average_pooling():
    model = FinetuneClassifier(trainable_copy(tiny_encoder(), 0.0), 3).eval()
    torch.nn.init.normal_(model.encoder.vit.head.weight)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=3, global_pool="avg", fc_norm=True
    ).eval()
    theirs.load_state_dict(model.encoder.vit.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert_close(model(images), theirs(images))


def augmented(samples, encoder, features, **settings):
    recipe = choose_recipe(features, EvalConfig(image_size=32, **settings, own={"finetune": {"batch_size": 4}}))
    return ClassificationExamples(samples, recipe, encoder.mean, encoder.std)


def test_augmentation_depends_on_its_key_alone(tiny, greys, features_of):
    features = features_of(tiny, greys, "labels")
    for preset in ("small", "full"):
        make = augmented(features.data.train.samples, tiny, features, preset=preset)
        views = [make(0, key)[0] for key in (1, 1, 2, 3)]
        assert torch.equal(views[0], views[1])
        assert not torch.equal(views[0], views[2]) and not torch.equal(views[2], views[3])
        assert views[0].shape == (3, 32, 32) and views[0].dtype == torch.float32
        assert make(len(features.data.train) - 1, 0)[1] == 4


def test_grey_images_of_one_channel_and_of_16_bits(tmp_path, features_of):
    for split in ("train", "val"):
        for label in range(2):
            for number in range(2):
                grey = np.full((20, 24), (label + 1) * STEP * 200, dtype=np.uint16)
                write_image(tmp_path / "deep" / split / f"{label}" / f"{number}.png", grey)
                write_image(tmp_path / "flat" / split / f"{label}" / f"{number}.png", (grey >> 8).astype(np.uint8))
    encoder = tiny_encoder(in_chans=1)
    config = EvalConfig(own={"finetune": {"epochs": 1, "batch_size": 4}})
    assert 0 <= finetune(features_of(encoder, tmp_path / "deep", "labels"), config).metrics["top1"] <= 1
    full = EvalConfig(preset="full", image_size=32, own={"finetune": {"epochs": 1, "batch_size": 4}})
    assert "top5" not in finetune(features_of(encoder, tmp_path / "flat", "labels"), full).metrics
    with pytest.raises(DataError, match=r"RandAugment needs 8-bit images .* float32 with 1; use eval\.preset=small"):
        finetune(features_of(encoder, tmp_path / "deep", "labels"), full)


def test_images_that_cannot_be_read_are_left_out(tiny, greys, tmp_path, features_of):
    for split in ("train", "val"):
        for label in range(2):
            for number in range(2):
                image = cv2.imread(str(greys / split / f"grey{label}" / f"{number}.png"))
                write_image(tmp_path / split / f"{label}" / f"{number}.png", image)
            (tmp_path / split / f"{label}" / "bad.png").write_bytes(b"no image")
    features = features_of(tiny, tmp_path, "labels")
    scores = finetune(features, EvalConfig(own={"finetune": {"epochs": 2, "batch_size": 3}}))
    assert scores.confusion.sum() == 4
    assert len(features.skipped) == 4


def test_mistakes_are_told_in_one_line(tiny, greys, features_of):
    features = features_of(tiny, greys, "labels")
    with pytest.raises(ConfigError, match=r"^eval\.finetune\.batch_size=3: an even number is needed for mixup$"):
        finetune(features, EvalConfig(preset="full", own={"finetune": {"batch_size": 3}}))
    with pytest.raises(ShapeError, match="images are 30x30 pixels, which patch_size=8 does not divide"):
        finetune(features, EvalConfig(image_size=30))


@pytest.mark.parametrize(("pool", "theirs"), [("cls", "token"), ("map", "map"), ("prr", "prr")])
def test_the_classifier_is_timms_with_other_pooling(pool, theirs):
    with seeded(0):
        model = FinetuneClassifier(trainable_copy(tiny_encoder(), 0.0), 3, pool).eval()
    torch.nn.init.normal_(model.encoder.vit.head.weight)
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=3, global_pool=theirs
    ).eval()
    plain.load_state_dict(model.encoder.vit.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert_close(model(images), plain(images))
    optimizer = create_optimizer_v2(model.encoder.vit, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert all(scale[id(p)] == 1.0 for p in (model.encoder.vit.attn_pool or torch.nn.Identity()).parameters())


def test_pooling_is_chosen_and_reported(tiny, greys, features_of):
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    found = {}
    for pool in ("auto", "avg", "cls", "prr", "map"):
        scores = finetune(
            features_of(tiny, greys, "labels"), EvalConfig(pool=pool, own={"finetune": {"epochs": 2, "batch_size": 8}})
        )
        found[pool] = scores.charts["loss"].lines[0].y
        assert scores.settings["pool"].startswith("mean patch" if pool in ("auto", "avg") else pool)
    assert found["auto"] == found["avg"]
    assert len({tuple(curve) for curve in found.values()}) == 4
    assert tiny.pool == "auto" and tiny.vit.attn_pool is None
    assert all(torch.equal(value, before[key]) for key, value in tiny.state_dict().items())
