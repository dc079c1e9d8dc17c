"""Rank: theory's values for encoders that say one thing, or as many as there are classes."""

import numpy as np
import pytest
import torch

from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocols.effective_rank import effective_rank_of_features
from smalti.models.build import build_encoder
from smalti.runs.baseline import evaluate


def test_a_constant_encoder_fills_one_dimension(constant, photos, features_of):
    scores = effective_rank_of_features(features_of(constant, photos, "images"), EvalConfig())
    for name, value in scores.metrics.items():
        assert value == pytest.approx(1.0, abs=1e-3), name


def test_tokens_are_judged_as_one_matrix(tiny, photos, features_of):
    features = features_of(tiny, photos, "images")
    scores = effective_rank_of_features(features, EvalConfig())
    found = [f for f, _ in features.encode(features.data.test, 32, "squash", 64, "")]
    for name, vectors in (("patches", found[0].patches.flatten(0, 1)), ("images", found[0].prefix[:, 0])):
        for metric, matrix in (("rankme", vectors), ("effective_rank", vectors - vectors.mean(0))):
            shares = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
            shares = shares / shares.sum() + (1e-7 if metric == "rankme" else 0)
            shares = shares[shares > 0]
            expected = np.exp(-(shares * np.log(shares)).sum())
            assert scores.metrics[f"{metric}_{name}"] == pytest.approx(expected, rel=2e-3)
    ranks = []
    for tokens in found[0].patches.double():
        shares = torch.linalg.svdvals(tokens - tokens.mean(0))
        ranks.append(float(torch.special.entr(shares / shares.sum()).sum().exp()))
    assert scores.metrics["effective_rank_within_image"] == pytest.approx(np.mean(ranks), rel=1e-4)
    assert scores.tallies["effective_rank_within_image"].part[:, 0] == pytest.approx(ranks, rel=1e-4)
    assert next(iter(scores.metrics)) == "rankme_patches"


def test_few_images_are_reported(tiny, photos, features_of):
    scores = effective_rank_of_features(
        features_of(tiny, photos, "images"), EvalConfig(pool="avg", own={"effective-rank": {"num_images": 5}})
    )
    assert scores.settings["num_images"] == 5 and scores.settings["num_patches"] == 5 * 16
    assert scores.settings["pool"] == "avg"
    assert "5 images have at most rank 5" in scores.settings["images_note"]
    assert scores.metrics["rankme_images"] <= 5.01
    assert int(np.isfinite(scores.tallies["effective_rank_within_image"].part).sum()) == 24
    assert int(scores.tallies["effective_rank_within_image"].whole.sum()) == 5


def test_batch_size_does_not_matter(tiny, photos, features_of):
    whole = effective_rank_of_features(features_of(tiny, photos, "images"), EvalConfig())
    parts = effective_rank_of_features(features_of(tiny, photos, "images", batch_size=5), EvalConfig())
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-4)


def test_unlabelled_masked_and_classified_images_will_do(tiny, photos, scenes, greys):
    for data in (photos, scenes, greys):
        (result,) = evaluate(tiny, "mine", str(data), EvalConfig(protocols=("effective-rank",), baseline=False))
        assert result.headline[1] > 1


def test_mistakes_get_one_line(tiny, tmp_path, photos, features_of):
    shape = {"img_size": 32, "patch_size": 8, "depth": 1}
    without = build_encoder("vit_tiny_patch16_224", class_token=False, global_pool="avg", **shape)
    with pytest.raises(ConfigError, match="pool=cls needs a class token"):
        effective_rank_of_features(features_of(without, photos, "images"), EvalConfig(pool="cls"))
    (tmp_path / "a.png").write_bytes((photos / "00.jpg").read_bytes()[:50])
    with pytest.raises(DataError, match="none of the 1 images can be read"):
        effective_rank_of_features(features_of(tiny, tmp_path, "images"), EvalConfig())
