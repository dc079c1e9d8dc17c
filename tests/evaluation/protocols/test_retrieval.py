"""Retrieval of images in class folders; retrieval of patches is tested in ``test_in_context.py``."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch.nn import functional as F
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP

from smalti.errors import DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.evaluate import evaluate, fitting_protocols
from smalti.evaluation.protocols.retrieval import ranked_precision, retrieval


@given(seed=st.integers(0, 1000), num_values=st.integers(1, 40))
def test_average_precision_is_scikit_learns_with_ties(seed, num_values):
    rng = np.random.default_rng(seed)
    sims = -np.sort(-rng.integers(0, num_values, (4, 25)).astype(np.float32), axis=1)
    relevant = rng.random((4, 25)) < 0.3
    relevant[0] = False
    found = ranked_precision(torch.from_numpy(sims), torch.from_numpy(relevant))
    expected = [
        average_precision_score(one, row) if one.any() else 0.0 for one, row in zip(relevant, sims, strict=True)
    ]
    assert found.numpy() == pytest.approx(expected, abs=1e-12)


@pytest.fixture(scope="session")
def noise(tmp_path_factory):
    """24 images to retrieve and 8 queries of two classes that look alike."""
    root, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(1)
    for split, count in (("train", 12), ("val", 4)):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                path = root / split / label / f"{number}.png"
                assert cv2.imwrite(str(path), rng.integers(0, 256, (32, 32), dtype=np.uint8))
    return root


def test_scores_of_images_equal_torchmetrics(tiny, noise, features_of):
    features = features_of(tiny, noise, "labels")
    scores = retrieval(features, EvalConfig(pool="avg", own={"retrieval": {"k": 3}}))
    train, test = (features.image_level(split, 32) for split in ("train", "test"))
    sims = F.normalize(test.pool("avg"), dim=1) @ F.normalize(train.pool("avg"), dim=1).T
    relevant = test.labels[:, None] == train.labels
    queries = torch.arange(len(sims))[:, None].expand_as(sims)
    expected = {
        "map": RetrievalMAP(),
        "recall_at_1": RetrievalHitRate(top_k=1),
        "recall_at_3": RetrievalHitRate(top_k=3),
        "recall_at_5": RetrievalHitRate(top_k=5),
        "recall_at_10": RetrievalHitRate(top_k=10),
    }
    assert list(scores.metrics) == list(expected)
    for name, metric in expected.items():
        value = float(metric(sims.flatten(), relevant.flatten(), indexes=queries.flatten()))
        assert scores.metrics[name] == pytest.approx(value, abs=1e-6), name
        assert scores.tallies[name].score() == scores.metrics[name]
    assert 0.3 < scores.metrics["map"] < 0.7  # two classes that look alike
    assert scores.settings["num_gallery"] == 24 and scores.settings["pool"] == "avg"
    of_class = scores.per_class["map"]
    sizes = np.bincount(test.labels.numpy())
    assert np.dot(list(of_class.values()), sizes) / sizes.sum() == pytest.approx(scores.metrics["map"])


def test_a_perfect_encoder_retrieves_its_class_first(perfect, greys, features_of):
    features = features_of(perfect, greys, "labels")
    assert set(retrieval(features, EvalConfig()).metrics.values()) == {1.0}


def test_a_constant_encoder_scores_chance(constant, greys, features_of):
    features = features_of(constant, greys, "labels")
    scores = retrieval(features, EvalConfig())
    train, test = (features.image_level(split, 32).labels.bincount().double() for split in ("train", "test"))
    expected = float(train @ test / train.sum() / test.sum())
    assert scores.metrics["map"] == pytest.approx(expected, abs=1e-12)
    assert scores.settings["chance"] == pytest.approx(expected, abs=1e-12)
    firsts = [retrieval(features, EvalConfig(seed=seed)).metrics["recall_at_1"] for seed in range(20)]
    assert len(set(firsts)) > 1  # ties are broken by the seed, not by the order of classes


def test_class_folders_have_it_by_name_and_masks_by_default(tiny, greys, scenes):
    assert "retrieval" not in fitting_protocols(str(greys)) and "retrieval" in fitting_protocols(str(scenes))
    both = EvalConfig(protocols=("retrieval", "knn"), baseline=False)
    images, knn = evaluate(tiny, "mine", str(greys), both)
    assert images.headline[0] == "map" and images.settings["pool"] == knn.settings["pool"]
    (patches,) = evaluate(tiny, "mine", str(scenes), EvalConfig(protocols=("retrieval",), baseline=False))
    assert patches.headline[0] == "precision_at_10"


def test_settings_of_the_patch_memory_have_no_effect_on_images(tiny, greys, features_of):
    features = features_of(tiny, greys, "labels")
    with pytest.warns(UserWarning, match=r"eval.retrieval.memory_size, eval.retrieval.void: no effect on images"):
        changed = retrieval(features, EvalConfig(own={"retrieval": {"memory_size": 5, "void": "class0", "k": 99}}))
    assert changed.metrics == retrieval(features, EvalConfig()).metrics
    assert changed.settings["k_note"] == "there are only 32 training images"


def test_images_without_labels_are_refused(tiny, greys):
    with pytest.raises(DataError, match="this needs masks"):
        evaluate(tiny, "mine", str(greys / "train" / "grey0"), EvalConfig(protocols=("retrieval",)))
