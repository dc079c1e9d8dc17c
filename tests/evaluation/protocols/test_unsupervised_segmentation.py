"""Unsupervised segmentation: each step by hand, perfect tokens and attention, and what it doesn't depend on."""

import dataclasses

import networkx
import numpy as np
import pytest
import torch

from smalti.errors import ConfigError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocols import unsupervised_segmentation as protocol
from smalti.evaluation.protocols.overclustering import ClusteringRecipe, choose_recipe
from smalti.evaluation.protocols.unsupervised_segmentation import (
    OFFSETS,
    choose_ratio,
    cluster_precision,
    foreground_clusters,
    joined,
    neighbourhoods,
    unsupervised_segmentation,
)

SMALL = {"clusters": 3, "background_ratio": 0.34, "parts": 2, "min_weight": 1.0, "mask_size": 4}


def settings(**own) -> EvalConfig:
    return EvalConfig(own={"unsupervised-segmentation": {**SMALL, **own}})


@pytest.fixture
def attentive(perfect):
    """Perfect tokens, and a class token that attends to the objects."""

    def encode_with_attention(images):
        features = perfect.encode(images)
        return features, (0.01 + features.patches[..., 1:5].sum(-1))[:, None]

    perfect.encode_with_attention = encode_with_attention
    return perfect


def test_precision_is_a_mean_over_the_images_that_have_the_cluster():
    assigned = np.array([[0, 0, 0, 1], [1, 1, 2, 2]])
    attended = np.array([[True, False, False, True], [True, False, False, False]])
    assert cluster_precision(assigned, attended, 4).tolist() == pytest.approx([1 / 3, (1 + 1 / 2) / 2, 0, 0])


def test_the_clusters_with_the_lowest_precision_are_background():
    precision = np.array([0.9, 0.1, 0.5, 0.3])
    assert foreground_clusters(precision, 0.5).tolist() == [True, False, True, False]
    assert foreground_clusters(precision, 0.99).tolist() == [True, False, False, False]  # one always remains
    assert foreground_clusters(precision, 0.0).all()


def test_the_fraction_is_the_best_on_the_training_masks():
    precision, clusters = np.arange(100) / 100, np.arange(100).reshape(1, 100)
    patch_of, empty = torch.arange(100).view(10, 10), torch.zeros(1, 10, 10, dtype=torch.uint8)
    for ratio in (0.55, 0.65, 0.75):
        masks = empty.clone()
        masks.view(-1)[round(100 * ratio) :] = 3
        masks.view(-1)[90:] = 255  # ignored
        assert choose_ratio(precision, clusters, masks, patch_of, 255) == ratio
    assert choose_ratio(precision, clusters, empty, patch_of, 255) == 0.55  # no object


def test_neighbourhoods_are_counted_as_loops_count_them():
    rng = np.random.default_rng(0)
    parts = rng.integers(-1, 4, (3, 5, 6))
    expected, images = np.zeros((4, 4)), np.zeros(4)
    for grid in parts:
        counts = np.zeros((4, 4))
        for row in range(5):
            for column in range(6):
                for distance in (1, 2):
                    for down in (-distance, 0, distance):
                        for right in (-distance, 0, distance):
                            y, x = row + down, column + right
                            if (down or right) and 0 <= y < 5 and 0 <= x < 6 and grid[row, column] >= 0 <= grid[y, x]:
                                counts[grid[row, column], grid[y, x]] += 1
        for part in range(4):
            if counts[part].sum():
                expected[part] += counts[part] / counts[part].sum()
                images[part] += 1
    assert len(set(OFFSETS)) == 16
    np.testing.assert_allclose(neighbourhoods(parts, 4), expected / images[:, None])


def test_parts_that_lie_together_are_one_object_as_components_of_networkx():
    grid = np.full((9, 12), -1)
    grid[1:5, 1:3], grid[1:5, 3:5] = 0, 2  # two halves of one object
    grid[4:8, 8:10], grid[4:8, 10:12] = 1, 3
    parts = np.stack([grid, grid[::-1], grid[:, ::-1]])
    near = neighbourhoods(parts, 4)
    graph = networkx.from_numpy_array(np.minimum(near, near.T) * (1 - np.eye(4)) >= 0.09)
    found = joined(parts, 4, 0.09, 2.0, 0)
    components = {frozenset(component) for component in networkx.connected_components(graph)}
    assert components == {frozenset({0, 2}), frozenset({1, 3})}
    assert found.tolist() == [0, 1, 0, 1]
    assert joined(parts, 4, 1.0, 2.0, 0).tolist() == [0, 1, 2, 3]  # no weight is 1


def test_presets_are_what_their_sources_say(tiny, scenes, features_of):
    features = features_of(tiny, scenes, "masks")
    assert choose_recipe(features, EvalConfig(preset="paper"), "unsupervised-segmentation") == ClusteringRecipe(
        448, 100, 5, 5, 100, "random", "zero"
    )
    assert choose_recipe(features, EvalConfig(), "unsupervised-segmentation") == ClusteringRecipe(
        32, 32, 3, 1, 20, "k-means++", "skip"
    )
    changed = EvalConfig(own={"unsupervised-segmentation": {"repeats": 2, "mask_size": 8, "absent": "zero"}})
    assert choose_recipe(features, changed, "unsupervised-segmentation") == ClusteringRecipe(
        32, 8, 2, 1, 20, "k-means++", "zero"
    )


def test_perfect_tokens_and_attention_segment_perfectly(attentive, scenes, features_of):
    features = features_of(attentive, scenes, "masks")
    scores = unsupervised_segmentation(features, settings())
    assert {name: scores.metrics[name] for name in ("miou_communities", "miou_cbfe", "foreground_iou")} == {
        "miou_communities": 1.0,
        "miou_cbfe": 1.0,
        "foreground_iou": 1.0,
    }
    assert next(iter(scores.metrics)) == "miou_communities"
    assert scores.settings["num_communities"] == [2, 2, 2] and scores.settings["background"] == "ground"
    assert scores.predictions.keys() == set(features.shown) and scores.predictions[0].shape == (4, 4)
    for name, tally in scores.tallies.items():
        assert tally.score() == scores.metrics[name]


def test_joined_objects_cost_score(attentive, scenes, features_of):
    scores = unsupervised_segmentation(features_of(attentive, scenes, "masks"), settings(min_weight=0.0))
    assert scores.settings["num_communities"] == [1, 1, 1]  # leaf and stone lie together in these images
    assert scores.metrics["miou_communities"] < 0.9 < scores.metrics["miou_cbfe"]


def test_with_a_given_fraction_no_training_mask_is_read(attentive, scenes, features_of, monkeypatch):
    read, original = [], protocol.read_masks
    monkeypatch.setattr(protocol, "read_masks", lambda x, *more: read.append(len(x)) or original(x, *more))
    unsupervised_segmentation(features_of(attentive, scenes, "masks"), settings(repeats=1))
    assert read == [6]
    config = settings(background_ratio=None)
    chosen = unsupervised_segmentation(features_of(attentive, scenes, "masks"), config).settings
    assert read == [6, 6, 16] and set(chosen["background_ratio"]) <= set(protocol.RATIOS)


def test_the_order_of_images_does_not_matter_and_the_seed_does(tiny, scenes, features_of):
    own = settings(clusters=12, background_ratio=0.5, parts=6, min_weight=0.05)
    whole = unsupervised_segmentation(features_of(tiny, scenes, "masks"), own)
    turned = features_of(tiny, scenes, "masks", batch_size=4, cache_mib=0)
    test = dataclasses.replace(turned.data.test, samples=turned.data.test.samples[::-1])
    turned.data = dataclasses.replace(turned.data, test=test)
    assert unsupervised_segmentation(turned, own).metrics == pytest.approx(whole.metrics)
    assert unsupervised_segmentation(features_of(tiny, scenes, "masks"), own).metrics == whole.metrics
    other = dataclasses.replace(own, seed=5)
    assert unsupervised_segmentation(features_of(tiny, scenes, "masks"), other).metrics != whole.metrics


def test_an_encoder_without_a_class_token_is_refused(scenes, features_of):
    from evaluation.conftest import tiny_encoder

    without = tiny_encoder(class_token=False, global_pool="avg")
    with pytest.raises(ConfigError, match="has no class token, whose attention shows the foreground"):
        unsupervised_segmentation(features_of(without, scenes, "masks"), EvalConfig())
