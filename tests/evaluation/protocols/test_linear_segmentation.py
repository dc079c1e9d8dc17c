"""Linear segmentation: the head commutes with upsampling, its gradient is autograd's, and theory's scores come out."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from smalti.data.images.labelled import open_labelled
from smalti.data.loader import epoch_order
from smalti.errors import DataError, RunError, ShapeError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.dense import crop_and_flip, ignored_value, upsampling
from smalti.evaluation.protocols.linear_segmentation import (
    GRID,
    Head,
    LinearSegmentationRecipe,
    choose_recipe,
    linear_segmentation,
    one_cycle,
)
from smalti.evaluation.protocols.overclustering import overclustering
from smalti.evaluation.protocols.segmenter import segmenter


def test_e6_bilinear_upsampling_by_half_pixels():
    matrix = upsampling(2, 4)
    rows = matrix @ torch.tensor([[0.0, 1.0], [2.0, 3.0]]) @ matrix.T
    expected = [[0, 0.25, 0.75, 1], [0.5, 0.75, 1.25, 1.5], [1.5, 1.75, 2.25, 2.5], [2, 2.25, 2.75, 3]]
    assert_close(rows, torch.tensor(expected))


@given(h=st.integers(1, 9), w=st.integers(1, 9), size=st.integers(1, 25))
def test_e7_the_head_commutes_with_upsampling(h, w, size):
    g = torch.Generator().manual_seed(h + 10 * w)
    tokens = torch.randn(2, h * w, 8, generator=g)
    head = Head(8, 3, (h, w), size)
    features = F.interpolate(tokens.mT.reshape(2, 8, h, w), (size, size), mode="bilinear", align_corners=False)
    behind = F.conv2d(features, head.weight[:, :, None, None], head.bias)
    assert_close(head.logits(tokens), behind.permute(0, 2, 3, 1), atol=2e-6, rtol=0)


@pytest.mark.parametrize("batch", [1, 20])  # more than what is computed at once
def test_gradient_equals_autograd_of_upsampled_features(batch):
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, 6, 5, generator=g)
    target = torch.randint(0, 4, (batch, 7, 7), generator=g)
    target[:, :2] = 255
    head = Head(5, 4, (2, 3), 7)
    head.backward(tokens, target, ignore=255)
    weight, bias = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    features = F.interpolate(tokens.mT.reshape(batch, 5, 2, 3), (7, 7), mode="bilinear", align_corners=False)
    F.cross_entropy(F.conv2d(features, weight[:, :, None, None], bias), target, ignore_index=255).backward()
    assert_close(head.weight.grad, weight.grad)
    assert_close(head.bias.grad, bias.grad)


@pytest.mark.parametrize("batch", [2, 20])
def test_gradient_with_a_hidden_layer_equals_autograd_of_convolutions(batch):
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, 6, 5, generator=g)
    target = torch.randint(0, 4, (batch, 7, 7), generator=g)
    target[:, :2] = 255
    head = Head(5, 4, (2, 3), 7, hidden_dim=8)
    head.backward(tokens, target, ignore=255)
    conv, norm, out = torch.nn.Conv2d(5, 8, 1), torch.nn.GroupNorm(1, 8), torch.nn.Conv2d(8, 4, 1)
    with torch.no_grad():
        conv.weight.copy_(head.hidden.conv.weight[:, :, None, None])
        conv.bias.copy_(head.hidden.conv.bias)
        out.weight.copy_(head.weight[:, :, None, None])
        out.bias.copy_(head.bias)
    net = torch.nn.Sequential(conv, norm, torch.nn.GELU(), out)
    logits = F.interpolate(net(tokens.mT.reshape(batch, 5, 2, 3)), (7, 7), mode="bilinear", align_corners=False)
    assert_close(head.logits(tokens).permute(0, 3, 1, 2), logits, atol=2e-6, rtol=0)
    F.cross_entropy(logits, target, ignore_index=255).backward()
    expected = [out.weight, out.bias, conv.weight, conv.bias, norm.weight, norm.bias]
    for parameter, other in zip(head.parameters, expected, strict=True):
        assert_close(parameter.grad, other.grad.reshape(parameter.shape))


def test_one_cycle_rises_in_a_quarter_and_falls():
    found = [one_cycle(step / 8) for step in range(9)]
    assert found == pytest.approx([1e-4, 0.50005, 1, *(1e-4 + (1 - 1e-4) * left / 6 for left in range(5, -1, -1))])


def test_locatvits_head_segments_what_no_linear_head_can(perfect, scenes, features_of):
    encode = perfect.encode

    def entangled(images):
        patches = encode(images).patches.clone()
        signs = torch.where(torch.arange(patches.shape[1]) % 2 == 0, 1.0, -1.0)
        return encode(images)._replace(patches=patches * signs[:, None])  # a class lies on both sides of the origin

    perfect.encode = entangled
    own = {"mask_size": 4, "epochs": 100, "hidden_dim": 32, "learning_rate": 0.01}
    scores = linear_segmentation(features_of(perfect, scenes, "masks"), EvalConfig(own={"linear-segmentation": own}))
    linear = linear_segmentation(
        features_of(perfect, scenes, "masks"), EvalConfig(own={"linear-segmentation": {**own, "hidden_dim": None}})
    )
    assert scores.metrics["miou"] > 0.95 > 0.7 > linear.metrics["miou"]
    assert scores.settings["hidden_dim"] == 32 and scores.settings["optimiser"].startswith("AdamW")
    assert "hidden_dim" not in linear.settings


def test_a_batch_without_labelled_pixels_has_no_gradient():
    head = Head(5, 4, (2, 2), 3)
    head.backward(torch.randn(1, 4, 5), torch.full((1, 3, 3), 255), ignore=255)
    assert not head.weight.grad.any() and not head.bias.grad.any()


def test_e16_learning_rate_falls_once():
    recipe = LinearSegmentationRecipe(448, 100, 25, 128, True, "zero", (0.01,))
    assert [0.01 * recipe.decay(epoch) for epoch in range(25)] == [0.01] * 20 + [0.001] * 5


def test_presets_are_what_their_sources_say(tiny, scenes, features_of):
    features = features_of(tiny, scenes, "masks")
    assert choose_recipe(features, EvalConfig(preset="paper")) == LinearSegmentationRecipe(
        448, 100, 25, 128, True, "zero", (0.01,)
    )
    assert choose_recipe(features, EvalConfig()) == LinearSegmentationRecipe(
        32, 32, 300, 16, False, "skip", GRID
    )  # an epoch is one step
    changed = EvalConfig(
        preset="paper",
        image_size=64,
        own={
            "linear-segmentation": {
                "augment": False,
                "epochs": 3,
                "mask_size": 50,
                "absent": "skip",
                "learning_rate": 1,
            }
        },
    )
    assert choose_recipe(features, changed) == LinearSegmentationRecipe(64, 50, 3, 128, False, "skip", (1.0,))
    locat = EvalConfig(own={"linear-segmentation": {"hidden_dim": 512}})
    assert choose_recipe(features, locat) == LinearSegmentationRecipe(32, 32, 300, 16, False, "skip", (1e-3,), 512)


def test_e18_a_perfect_encoder_segments_perfectly(perfect, scenes, features_of):
    config = EvalConfig(
        own={"linear-segmentation": {"mask_size": 4, "epochs": 60}}
    )  # a pixel of the mask is a patch: nothing is lost at borders
    scores = linear_segmentation(features_of(perfect, scenes, "masks"), config)
    assert scores.metrics == {"miou": 1.0, "pixel_accuracy": 1.0}
    assert list(scores.per_class["iou"]) == ["ground", "leaf", "stone"]
    full = linear_segmentation(
        features_of(perfect, scenes, "masks"), EvalConfig(own={"linear-segmentation": {"epochs": 60}})
    )
    assert 0.85 < full.metrics["miou"] < 1  # corners of patches go to the bilinear majority


def test_e18_a_constant_encoder_gets_the_majority_class(constant, scenes, features_of):
    scores = linear_segmentation(
        features_of(constant, scenes, "masks"), EvalConfig(own={"linear-segmentation": {"mask_size": 4, "epochs": 60}})
    )
    masks = [cv2.imread(str(scenes / "masks" / f"val{i}.png"), cv2.IMREAD_UNCHANGED)[::8, ::8] for i in range(6)]
    labels = np.concatenate([mask[mask != 255] for mask in masks])
    share = float((labels == 0).mean())
    assert scores.metrics["pixel_accuracy"] == pytest.approx(share)
    assert scores.metrics["miou"] == pytest.approx(share / 3)  # the other two have IoU 0
    assert scores.per_class["iou"] == {"ground": pytest.approx(share), "leaf": 0.0, "stone": 0.0}


@given(batch_size=st.integers(1, 20), encoded=st.integers(1, 20), seed=st.integers(0, 100))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokens_come_in_the_same_batches_whether_kept_or_not(perfect, scenes, features_of, batch_size, encoded, seed):
    order = epoch_order(seed, 0, 16).tolist()[:13]
    kept = features_of(perfect, scenes, "masks").tokens("train", 32)
    again = features_of(perfect, scenes, "masks", cache_mib=0, batch_size=encoded).tokens("train", 32)
    assert (kept.is_kept, again.is_kept) == (True, False)
    pairs = zip(kept.batches(order, batch_size), again.batches(order, batch_size), strict=True)
    for (tokens, places), (others, other_places) in pairs:
        assert places == other_places and torch.equal(tokens, others)


@pytest.mark.parametrize("scale", [0.3, 1, 30])
def test_e18_the_length_of_tokens_does_not_matter(perfect, scenes, features_of, scale):
    encode = perfect.encode
    perfect.encode = lambda images: encode(images)._replace(patches=encode(images).patches * scale)
    scores = linear_segmentation(
        features_of(perfect, scenes, "masks"), EvalConfig(own={"linear-segmentation": {"mask_size": 4, "epochs": 100}})
    )
    assert scores.metrics["miou"] == 1.0


def test_evaluated_images_select_no_learning_rate(tiny, scenes, features_of):
    features = features_of(tiny, scenes, "masks")
    chosen = linear_segmentation(features, EvalConfig(own={"linear-segmentation": {"epochs": 5}})).settings
    assert chosen["learning_rates_tried"].keys() == {f"{rate:g}" for rate in GRID}
    features = features_of(tiny, scenes, "masks")
    few = dataclasses.replace(features.data.test, samples=features.data.test.samples[:1])
    features.data = dataclasses.replace(features.data, test=few)
    assert linear_segmentation(features, EvalConfig(own={"linear-segmentation": {"epochs": 5}})).settings == chosen
    told = linear_segmentation(
        features, EvalConfig(own={"linear-segmentation": {"epochs": 5, "learning_rate": 0.3}})
    ).settings
    assert told["learning_rate"] == 0.3 and told["learning_rates_tried"] == {}


def test_one_training_image_needs_a_learning_rate(tiny, scenes, features_of):
    features = features_of(tiny, scenes, "masks")
    one = dataclasses.replace(features.data.train, samples=features.data.train.samples[:1])
    features.data = dataclasses.replace(features.data, train=one)
    with pytest.raises(DataError, match=r"one training image, .* set eval\.linear-segmentation\.learning_rate"):
        linear_segmentation(features, EvalConfig(own={"linear-segmentation": {"epochs": 1}}))
    assert linear_segmentation(
        features, EvalConfig(own={"linear-segmentation": {"epochs": 1, "learning_rate": 0.1}})
    ).metrics


def test_order_of_judged_images_batch_size_and_cache_do_not_matter(tiny, scenes, features_of):
    whole = linear_segmentation(
        features_of(tiny, scenes, "masks"), EvalConfig(own={"linear-segmentation": {"epochs": 5}})
    )
    turned = features_of(tiny, scenes, "masks", batch_size=3, cache_mib=0)
    assert not turned.tokens("train", 32).is_kept and features_of(tiny, scenes, "masks").tokens("train", 32).is_kept
    test = dataclasses.replace(turned.data.test, samples=turned.data.test.samples[::-1])
    turned.data = dataclasses.replace(turned.data, test=test)
    again = linear_segmentation(turned, EvalConfig(own={"linear-segmentation": {"epochs": 5}}))
    assert again.metrics == pytest.approx(whole.metrics, abs=2e-3)  # a float may round the other way


def test_the_same_seed_gives_the_same_numbers_and_another_seed_another_head(tiny, scenes, features_of):
    features = features_of(tiny, scenes, "masks")
    first, again = (
        linear_segmentation(features, EvalConfig(own={"linear-segmentation": {"epochs": 3}})) for _ in range(2)
    )
    assert first[:3] == again[:3]
    assert (
        linear_segmentation(features, EvalConfig(seed=1, own={"linear-segmentation": {"epochs": 3}})).metrics
        != first.metrics
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmentation_depends_on_seed_epoch_and_image_only(tiny, scenes, features_of, num_workers):
    def run(**settings):
        features = features_of(tiny, scenes, "masks", **settings)
        return linear_segmentation(
            features,
            EvalConfig(preset="paper", image_size=32, own={"linear-segmentation": {"mask_size": 16, "epochs": 2}}),
        )

    whole = run()
    assert run(num_workers=num_workers, batch_size=5).metrics == pytest.approx(whole.metrics, abs=2e-3)
    assert whole.settings["augment"] is True and whole.settings["absent"] == "zero"


@given(seed=st.integers(0, 1000), height=st.integers(8, 40), width=st.integers(8, 40))
def test_a_crop_shows_the_same_part_of_image_and_mask(seed, height, width):
    rows, columns = np.mgrid[:height, :width]
    mask = (rows * 4 + columns * 2).astype(np.uint8)
    pixels, labels = crop_and_flip(mask[..., None], mask, size=16, mask_size=16, rng=np.random.default_rng(seed))
    assert pixels.shape == (16, 16, 1) and labels.shape == (16, 16)
    assert np.abs(pixels[..., 0].astype(int) - labels.astype(int)).max() <= 40  # smooth ramps: resampling aside


def test_classes_that_occur_nowhere_count_as_the_convention_says(perfect, scenes, tmp_path, features_of):
    for name in ("images", "masks", "train.txt", "val.txt"):
        (tmp_path / name).symlink_to(scenes / name)
    (tmp_path / "classes.txt").write_text("ground\nleaf\nstone\nghost\n")
    features = features_of(perfect, tmp_path, "masks")
    skip, zero = (
        linear_segmentation(
            features, EvalConfig(own={"linear-segmentation": {"mask_size": 4, "epochs": 30, "absent": absent}})
        )
        for absent in ("skip", "zero")
    )
    assert skip.metrics["miou"] == 1.0 and zero.metrics["miou"] == 0.75
    assert np.isnan(skip.per_class["iou"]["ghost"])
    assert (skip.settings["absent"], zero.settings["absent"]) == ("skip", "zero")


def test_a_mask_beyond_the_classes_is_named(tiny, scenes, tmp_path, features_of):
    for name in ("images", "masks", "train.txt", "val.txt"):
        (tmp_path / name).symlink_to(scenes / name)
    (tmp_path / "classes.txt").write_text("ground\nleaf\n")
    with pytest.raises(DataError, match=r"holds the value 2, but classes\.txt names 2 classes"):
        linear_segmentation(features_of(tiny, tmp_path, "masks"), EvalConfig())


def test_masks_without_a_labelled_pixel_are_refused_or_counted(tiny, scenes, tmp_path, features_of):
    for name in ("images", "train.txt", "val.txt", "classes.txt"):
        (tmp_path / name).symlink_to(scenes / name)
    (tmp_path / "masks").mkdir()
    for mask in (scenes / "masks").iterdir():
        (tmp_path / "masks" / mask.name).symlink_to(mask)
    void = np.full((32, 32), 255, dtype=np.uint8)
    for number in range(6):
        (tmp_path / "masks" / f"val{number}.png").unlink()
        cv2.imwrite(str(tmp_path / "masks" / f"val{number}.png"), void)
        if number == 0:
            for protocol in (linear_segmentation, overclustering, segmenter):
                with pytest.warns(UserWarning, match="1 of 6 val images have no labelled pixel and are skipped"):
                    scores = protocol(
                        features_of(tiny, tmp_path, "masks"),
                        EvalConfig(
                            own={
                                "linear-segmentation": {"epochs": 1},
                                "overclustering": {"repeats": 1},
                                "segmenter": {"steps": 1},
                            }
                        ),
                    )
                assert scores.settings["num_unlabelled"] == 1
    with pytest.raises(DataError, match="no labelled pixel in the masks of all 6 val images"):
        linear_segmentation(
            features_of(tiny, tmp_path, "masks"), EvalConfig(own={"linear-segmentation": {"epochs": 1}})
        )


@pytest.mark.parametrize("augment", [False, True])
def test_unreadable_images_are_left_out_and_counted(tiny, scenes, tmp_path, features_of, augment):
    for name in ("masks", "train.txt", "val.txt", "classes.txt"):
        (tmp_path / name).symlink_to(scenes / name)
    (tmp_path / "images").mkdir()
    for image in (scenes / "images").iterdir():
        (tmp_path / "images" / image.name).symlink_to(image)
    for name in ("train3", "val2"):
        path = tmp_path / "images" / f"{name}.png"
        path.unlink()
        path.write_bytes((scenes / "images" / f"{name}.png").read_bytes()[:60])
    features = features_of(tiny, tmp_path, "masks")
    scores = linear_segmentation(features, EvalConfig(own={"linear-segmentation": {"epochs": 2, "augment": augment}}))
    assert np.isfinite(scores.metrics["miou"])
    assert sorted(path[-10:] for path in features.skipped) == ["train3.png", "s/val2.png"][::-1]


def test_image_size_must_fit_the_patches(tiny, scenes, features_of):
    with pytest.raises(ShapeError, match="images are 36x36 pixels, which patch_size=8 does not divide"):
        linear_segmentation(features_of(tiny, scenes, "masks"), EvalConfig(image_size=36))


def test_tokens_that_are_not_numbers_or_too_great_are_named(tiny, scenes, features_of):
    with torch.no_grad():
        tiny.vit.norm.bias.fill_(1e5)
    with pytest.raises(RunError, match=r"overflow torch\.float16"):
        linear_segmentation(features_of(tiny, scenes, "masks"), EvalConfig())
    linear_segmentation(
        features_of(tiny, scenes, "masks", cache_dtype="float32"),
        EvalConfig(own={"linear-segmentation": {"epochs": 1}}),
    )
    with torch.no_grad():
        tiny.vit.norm.bias.fill_(torch.nan)
    with pytest.raises(RunError, match="features are not finite"):
        linear_segmentation(features_of(tiny, scenes, "masks"), EvalConfig())


def test_255_is_a_class_where_there_are_more_than_255():
    assert (ignored_value(255), ignored_value(256)) == (255, -1)


def test_masks_of_the_shared_clothing_photos_are_read(shared):
    data = open_labelled(shared / "data" / "ccp-clothing-parsing", need="masks")
    assert len(data.classes) == 59 and len(data.test) == 100
