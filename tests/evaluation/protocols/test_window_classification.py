"""Window classification: mean recall of classes of windows, with fractions of the labels, from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, recall_score

from command import smalti
from smalti.data.signals.motion_samples import ACTIVITIES
from smalti.evaluation.protocols.window_classification import mean_recall

TINY = ("encoder.depth=1", "encoder.embed_dim=24", "encoder.num_heads=2", "devices=cpu")


@pytest.fixture(scope="module")
def motion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of six people with activities."""
    folder = tmp_path_factory.mktemp("motion") / "motion"
    smalti("samples", "--out", folder, "--quiet", "kind=motion", "num_people_train=4", "num_people_val=2", "minutes=2")
    return folder


@pytest.fixture(scope="module")
def trained(motion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of part on them."""
    run = tmp_path_factory.mktemp("motion-run") / "run"
    smalti("train", "part", "--data", motion, "--out", run, "--quiet", "steps=1", "batch_size=4", *TINY)
    return run


def test_mean_recall_is_sklearn_s():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 4, (2, 80))
    matrix = torch.zeros(4, 4, dtype=torch.int64)
    matrix.index_put_((torch.from_numpy(truth), torch.from_numpy(guess)), torch.tensor(1), accumulate=True)
    assert float(mean_recall(matrix)) == pytest.approx(balanced_accuracy_score(truth, guess))
    matrix[2] = 0  # a class that doesn't occur
    seen = truth != 2
    expected = recall_score(truth[seen], guess[seen], labels=[0, 1, 3], average="macro")
    assert float(mean_recall(matrix)) == pytest.approx(expected)


def test_fractions_and_the_untrained_baseline_are_reported(motion, trained, tmp_path):
    own = ("eval.window-classification.fractions=[0.5,1]", "eval.window-classification.steps=1")
    done = smalti("evaluate", trained, "--data", motion, "--json", tmp_path / "r.json", "--quiet", *own)
    assert "window-classification" in done.stdout and "untrained" in done.stdout
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    first, baseline = results
    assert first["protocol"] == "window-classification" and baseline["baseline"] == "untrained"
    metrics = first["metrics"]
    assert {"balanced_top1", "top1", "macro_f1", "balanced_top1_at_0.5", "balanced_top1_area"} <= metrics.keys()
    assert all(0 <= value <= 1 for value in metrics.values())
    assert sorted(first["per_class"]["recall"]) == sorted(ACTIVITIES)


def test_the_wrong_protocol_or_data_is_one_line(motion, trained, class_folders):
    done = smalti("evaluate", trained, "--data", motion, "--protocol", "knn", code=2)
    assert "protocol knn needs images, but the data are signals" in done.stderr and done.stderr.count("\n") == 1
    done = smalti("evaluate", trained, "--data", class_folders, "--protocol", "window-classification", code=2)
    assert "protocol window-classification needs signals, but the data are images" in done.stderr
    assert done.stderr.count("\n") == 1


def test_recordings_without_classes_are_refused(motion, trained, tmp_path):
    for file in motion.glob("*.npz"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    done = smalti("evaluate", trained, "--data", tmp_path, "--protocol", "window-classification", code=2)
    assert "class" in done.stderr and done.stderr.count("\n") == 1
