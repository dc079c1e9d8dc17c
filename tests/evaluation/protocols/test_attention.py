"""Attention: recomputed weights are the module's own, closed forms come out, objects are found where attention is."""

import dataclasses
import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score
from timm.models.vision_transformer import Attention
from torch import nn
from torch.testing import assert_close

from smalti.data.images.folders import LeftOut
from smalti.errors import ConfigError, DataError
from smalti.evaluation.attention_pictures import GAP_PX, TILE_PX
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import spread
from smalti.evaluation.protocols.attention import (
    AttentionObserver,
    attention,
    attention_distance,
    foreground_scores,
    mutual_information,
    patch_distances,
    query_patch,
)
from smalti.evaluation.protocols.linear_segmentation import linear_segmentation
from smalti.functional.attention import EPS, between_patches
from smalti.layers.attention import attention_weights
from smalti.models.build import build_encoder
from smalti.runs.baseline import evaluate

E12 = torch.tensor([0.05, 0.30, 0.10, 0.25, 0.02, 0.18, 0.06, 0.03, 0.01])


def nmi(rows, eps=0.0):
    return float(mutual_information(between_patches(torch.tensor(rows, dtype=torch.float64), 0, eps)))


def small_vit(**arguments):
    return build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, seed=0, **arguments).eval()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"qkv_bias": True, "scale_norm": True}, {"attn_head_dim": 5}]
)
def test_recomputed_weights_times_values_are_the_modules_output(fused, options):
    torch.manual_seed(0)
    module = Attention(12, num_heads=3, norm_layer=nn.LayerNorm, **options).eval()
    module.fused_attn = fused
    tokens = torch.randn(2, 7, 12) * 3
    weights = attention_weights(module, tokens)
    assert_close(weights.sum(-1), torch.ones(2, 3, 7))
    values = module.qkv(tokens).reshape(2, 7, 3, 3, -1).permute(2, 0, 3, 1, 4)[2]
    ours = module.proj(module.norm((weights @ values).transpose(1, 2).flatten(2)))
    assert_close(ours, module(tokens))
    assert_close(attention_weights(module, tokens, num_queries=2), weights[:, :, :2])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0.9, 0.1], [0.1, 0.9]], 0.531004),
        ([[0.3, 0.7], [0.3, 0.7]], 0.0),
        ([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], 0.263901),
        ([[0.25] * 4] * 4, 0.0),
    ],
)
def test_e14_mutual_information(rows, expected):
    assert nmi(rows) == pytest.approx(expected, abs=1e-6)


def test_e14_each_query_with_a_key_of_its_own():
    assert nmi(np.eye(4), EPS) == pytest.approx(0.9999996, abs=1e-7)
    assert nmi([[1.0]], EPS) == 0.0


@given(seed=st.integers(0, 1000), count=st.integers(2, 8))
def test_mutual_information_is_its_formula_in_plain_loops(seed, count):
    rows = np.random.default_rng(seed).dirichlet(np.full(count, 0.3), size=count) + 1e-9
    rows /= rows.sum(1, keepdims=True)
    of_keys = [sum(rows[q][k] for q in range(count)) / count for k in range(count)]
    information = sum(
        rows[q][k] / count * math.log(rows[q][k] / of_keys[k]) for q in range(count) for k in range(count)
    )
    entropy = -sum(p * math.log(p) for p in of_keys)
    assert nmi(rows) == pytest.approx(information / math.sqrt(math.log(count) * entropy), abs=1e-9)


@pytest.mark.parametrize(
    ("grid", "patch_size", "expected"),
    [((2, 2), 16, 13.656854), ((14, 14), 16, 116.492227), ((16, 16), 14, 116.565053), ((30, 30), 16, 250.138306)],
)
def test_e15_distance_of_uniform_attention(grid, patch_size, expected):
    count = grid[0] * grid[1]
    uniform = torch.full((2, count, count), 1 / count)
    found = attention_distance(uniform, patch_distances(grid, (patch_size, patch_size)))
    assert_close(found, torch.full((2,), expected), rtol=1e-6, atol=0)


def test_e15_distance_of_other_attention():
    distances = patch_distances((2, 2), (16, 16))
    pairs = torch.block_diag(torch.full((2, 2), 0.5), torch.full((2, 2), 0.5))
    assert float(attention_distance(torch.eye(4), distances)) == 0
    assert float(attention_distance(pairs, distances)) == 8
    assert patch_distances((1, 3), (4, 7))[0].tolist() == [0, 7, 14]
    assert patch_distances((3, 1), (4, 7))[0].tolist() == [0, 4, 8]


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}])
def test_the_observer_sees_what_each_block_attends_to(options, scenes, features_of):
    encoder = small_vit(init_values=0.5, qk_norm=True, **options)
    features = features_of(encoder, scenes, "masks", observers={"attention": AttentionObserver(4)}, batch_size=4)
    seen = features.observed("attention", 32)
    assert sorted(seen.nmi) == list(spread(6, 4)) == [0, 1, 3, 4]
    number = encoder.num_prefix_tokens
    for pixels, places in ((p, at) for p, at in _pixels(features)):
        weights, sequence = (
            [],
            encoder.vit.norm_pre(encoder.assemble(encoder.embed_patches(pixels)[0], encoder.positions((4, 4)))),
        )
        for block in encoder.vit.blocks:
            weights.append(attention_weights(block.attn, block.norm1(sequence)))
            sequence = block(sequence)
        for row, place in enumerate(places):
            if place in seen.nmi:
                layers = torch.stack([between_patches(layer[row], number) for layer in weights])
                assert_close(seen.nmi[place], mutual_information(layers))
                assert_close(seen.distance[place], attention_distance(layers, patch_distances((4, 4), (8, 8))))
            if encoder.has_class_token:
                assert_close(seen.of_class_token[place], weights[-1][row, :, 0, number:])
                assert seen.of_class_token[place].shape == (3, 16)
    assert len(seen.of_class_token) == (6 if encoder.has_class_token else 0)
    assert not any(block.attn._forward_pre_hooks for block in encoder.vit.blocks)


@torch.no_grad()
def _pixels(features):
    from smalti.data.images.labelled import eval_batches

    for pixels, places, _ in eval_batches(features.data.test, 32, 3, mode="squash", batch_size=6):
        yield features.encoder.normalize(pixels), places


def test_e12_patches_with_most_of_the_mass_against_a_mask():
    mask = np.kron([[0, 1, 0], [1, 1, 0], [0, 0, 0]], np.ones((4, 4))).astype(np.uint8)
    evaluated = foreground_scores(E12[None], mask, (3, 3), void=255, parity=False)
    assert evaluated.best_head == 0.5


def test_the_best_head_is_chosen_for_each_object():
    mask = np.array([[1, 0], [0, 2]], dtype=np.uint8)
    heads = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.01, 0.01, 0.01, 0.97], [0.01, 0.97, 0.01, 0.01]])
    assert foreground_scores(heads, mask, (2, 2), void=255, parity=False).best_head == 1.0
    assert foreground_scores(heads[[0, 2]], mask, (2, 2), void=255, parity=False).best_head == 0.5


def test_merged_is_the_jaccard_score_of_attention_on_a_square():
    mask = np.zeros((48, 48), dtype=np.uint8)
    mask[8:32, 8:32] = 3
    mask[:8] = 255
    weights = np.full((6, 6), 0.001)
    weights[1:4, 1:4] = 1
    weights[0, 0] = 1
    rows = torch.from_numpy(weights).float().flatten()[None]
    evaluated = foreground_scores(rows / rows.sum(), mask, (6, 6), void=255, parity=False)
    from smalti.functional.attention import foreground

    pred = foreground(rows[None], (6, 6))[0].numpy().repeat(8, 0).repeat(8, 1)
    counted = mask != 255
    assert evaluated.merged == pytest.approx(jaccard_score((mask == 3)[counted], pred[counted]))
    parity = foreground_scores(rows / rows.sum(), mask, (6, 6), void=255, parity=True)
    assert parity.merged == pytest.approx(jaccard_score((mask != 0).ravel(), pred.ravel()))


def test_parity_takes_the_first_and_last_values_for_background_and_void():
    rows = torch.tensor([[0.97, 0.01, 0.01, 0.01]])
    without_void = np.array([[1, 0], [0, 2]], dtype=np.uint8)
    assert foreground_scores(rows, without_void, (2, 2), void=255, parity=True).best_head == 1.0  # 2 is lost
    assert foreground_scores(rows, without_void, (2, 2), void=255, parity=False).best_head == 0.5
    with_void = np.array([[1, 0], [255, 2]], dtype=np.uint8)
    assert foreground_scores(rows, with_void, (2, 2), void=255, parity=True).best_head == 0.5


def test_an_image_without_objects_says_nothing():
    evaluated = foreground_scores(E12[None], np.zeros((3, 3), dtype=np.uint8), (3, 3), void=255, parity=False)
    assert math.isnan(evaluated.merged) and math.isnan(evaluated.best_head)
    assert foreground_scores(E12[None], np.zeros((3, 3), dtype=np.uint8), (3, 3), void=255, parity=True).merged == 0


def run(encoder, data, features_of, need="masks", **settings):
    own = {name: settings.pop(name) for name in ("num_images", "parity", "num_shown", "queries") if name in settings}
    config = EvalConfig(own={"attention": own})
    observers = {"attention": AttentionObserver(config.of("attention").num_images)}
    return attention(features_of(encoder, data, need, observers=observers, **settings), config)


def test_scores_with_masks(scenes, features_of):
    scores = run(small_vit(), scenes, features_of)
    assert list(scores.metrics) == [
        "foreground_iou",
        "foreground_iou_best_head",
        "nmi_last",
        "distance_px_last",
        "nmi_mean",
        "distance_px_mean",
    ]
    assert len(scores.charts["nmi"].lines[0].y) == len(scores.charts["distance_px"].lines[0].y) == 3
    assert scores.metrics["nmi_last"] == pytest.approx(scores.charts["nmi"].lines[0].y[-1])
    assert scores.metrics["distance_px_mean"] == pytest.approx(np.mean(scores.charts["distance_px"].lines[0].y))
    assert scores.settings["background"] == "ground" and scores.settings["num_with_foreground"] == 6
    assert run(small_vit(), scenes, features_of, parity=True).metrics != scores.metrics


def test_what_is_missing_is_said(scenes, photos, features_of):
    without = run(small_vit(class_token=False, global_pool="avg"), scenes, features_of)
    assert without.settings["foreground"] == "omitted: the encoder has no class token"
    plain = run(small_vit(), photos, features_of, need="images", num_images=5)
    assert plain.settings["foreground"] == "omitted: the images were opened without masks"
    assert (
        list(without.metrics) == list(plain.metrics) == ["nmi_last", "distance_px_last", "nmi_mean", "distance_px_mean"]
    )
    assert plain.settings["num_images"] == 5


def test_attention_that_does_not_depend_on_the_query_has_no_information(scenes, features_of):
    encoder = small_vit()
    with torch.no_grad():
        for block in encoder.vit.blocks:
            block.attn.qkv.weight[:192] = 0
            block.attn.qkv.bias[:192] = 0
    scores = run(encoder, scenes, features_of)
    assert max(scores.charts["nmi"].lines[0].y) < 1e-6
    uniform = attention_distance(torch.full((16, 16), 1 / 16), patch_distances((4, 4), (8, 8)))
    assert_close(scores.charts["distance_px"].lines[0].y, [float(uniform)] * 3, rtol=1e-5, atol=0)


def test_order_of_images_and_batch_size_do_not_matter(scenes, features_of):
    whole = run(small_vit(), scenes, features_of)
    features = features_of(small_vit(), scenes, "masks", observers={"attention": AttentionObserver(64)}, batch_size=4)
    test = dataclasses.replace(features.data.test, samples=features.data.test.samples[::-1])
    features.data = dataclasses.replace(features.data, test=test)
    assert attention(features, EvalConfig()).metrics == pytest.approx(whole.metrics, abs=1e-5)


def test_it_shares_the_pass_of_another_protocol(scenes, features_of, monkeypatch):
    features = features_of(small_vit(), scenes, "masks", observers={"attention": AttentionObserver(64)})
    linear_segmentation(features, EvalConfig(own={"linear-segmentation": {"epochs": 1, "learning_rate": 0.1}}))
    monkeypatch.setattr(features, "encode", None)
    assert attention(features, EvalConfig()).metrics["nmi_last"] > 0


def test_masks_are_taken_where_there_are_some(tiny, scenes, greys):
    (with_masks,) = evaluate(tiny, "mine", str(scenes), EvalConfig(protocols=("attention",), baseline=False))
    assert "foreground_iou" in with_masks.metrics and with_masks.settings["num_train"] == 16
    (without,) = evaluate(tiny, "mine", str(greys), EvalConfig(protocols=("attention",), baseline=False))
    assert "foreground_iou" not in without.metrics and without.settings["num_train"] == 0


def test_masks_without_a_train_split_are_not_asked_for(tiny, scenes, tmp_path):
    for name in ("images", "masks", "val.txt", "classes.txt"):
        (tmp_path / name).symlink_to(scenes / name)
    with pytest.warns(LeftOut, match="in no split"):
        (result,) = evaluate(tiny, "mine", str(tmp_path), EvalConfig(protocols=("attention",), baseline=False))
    assert result.settings["foreground"] == "omitted: the images were opened without masks"


def test_attention_of_the_class_token_and_of_chosen_patches_is_drawn(scenes, features_of):
    scores = run(small_vit(), scenes, features_of, num_shown=2, queries=((0.0, 1.0), (0.5, 0.5), (0.99, 0.0)))
    assert len(scores.pictures) == 2 and scores.settings["queries"] == [[0.0, 1.0], [0.5, 0.5], [0.99, 0.0]]
    caption, picture = next(iter(scores.pictures.items()))
    rows = "class token; patch in row 1, column 4; patch in row 3, column 3; patch in row 4, column 1"
    assert f"Rows: {rows}. Columns: the image, the mean over heads, heads 1 to 3." in caption
    assert caption.startswith("images/val0.png: ")
    side = TILE_PX + GAP_PX
    assert picture.shape == (4 * side - GAP_PX, 5 * side - GAP_PX, 3)
    without = run(small_vit(class_token=False, global_pool="avg"), scenes, features_of)
    assert len(without.pictures) == 4 and "Rows: patch in row 3, column 3; patch" in next(iter(without.pictures))
    assert not run(small_vit(), scenes, features_of, num_shown=0).pictures
    assert not run(small_vit(class_token=False, global_pool="avg"), scenes, features_of, queries=()).pictures


def test_a_query_lies_where_its_fractions_say():
    assert [query_patch(place, (2, 4)) for place in ((0, 0), (0.49, 0.26), (0.5, 0.75), (1, 1))] == [0, 1, 7, 7]


@pytest.mark.parametrize("wrong", [((1.5, 0.0),), ((0.5,),)])
def test_queries_outside_of_the_image_are_refused(wrong):
    with pytest.raises(ConfigError, match="queries"):
        EvalConfig(own={"attention": {"queries": wrong}}).of("attention")


def test_blocks_of_another_kind_are_named(tiny, scenes, features_of):
    tiny.vit.blocks[0].attn = nn.Identity()
    with pytest.raises(ConfigError, match="has blocks with Identity, whose attention weights can't be computed"):
        run(tiny, scenes, features_of)


def test_no_image_that_can_be_read(tiny, tmp_path, features_of):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((32, 32, 3), dtype=np.uint8))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    with pytest.raises(DataError, match="none of the 1 images can be read"):
        run(tiny, tmp_path, features_of, need="images")
