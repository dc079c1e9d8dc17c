"""Window classification: mean recall of classes of windows, with fractions of the labels, from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, recall_score

from command import smalti
from signal_files import save
from smalti.cli.evaluate import as_trained
from smalti.config import write_yaml
from smalti.data.signals.motion_samples import ACTIVITIES
from smalti.data.signals.signal_config import SignalConfig
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocols.window_classification import mean_recall
from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder
from smalti.report.evaluation import save_evaluation
from smalti.runs.baseline import evaluate

NAME = "window-classification"
FAST = {"steps": 3, "batch_size": 4}
MOTION = SignalConfig(window_s=4, resample_hz=50, high_hz=20)
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


def encoder(window: int, channels: int, patch: int = 20) -> Encoder:
    vit = build_encoder(
        "vit_tiny_patch16_224",
        img_size=(1, window),
        in_chans=channels,
        seed=0,
        mean=(0.0,),
        std=(1.0,),
        patch_size=[1, patch],
        embed_dim=24,
        depth=2,
        num_heads=3,
    )
    vit.drop_positions()
    return vit.eval()


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


def test_fast_and_slow_tones_are_told_apart(tmp_path):
    rows = ["file,start_s,end_s,label"]
    for number in range(8):
        rng = np.random.default_rng(number)
        t, parts = np.arange(200) / 100, rng.permutation(["fast", "slow"] * 6)
        waves = [np.sin(2 * np.pi * (20 if part == "fast" else 2) * t + rng.uniform(0, 6)) for part in parts]
        save(tmp_path / f"s{number}.npz", np.concatenate(waves)[None] + rng.normal(0, 0.1, (1, 2400)))
        rows += [f"s{number}.npz,{2 * i},{2 * i + 2},{part}" for i, part in enumerate(parts)]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    config = EvalConfig(
        baseline=False,
        signal=SignalConfig(window_s=2),
        own={NAME: {"steps": 60, "batch_size": 16, "learning_rate": 2e-3}},
    )
    result = evaluate(encoder(200, 1), "x", str(tmp_path), config)[0]
    assert result.headline[0] == "balanced_top1" and result.metrics["balanced_top1"] > 0.9
    assert evaluate(encoder(200, 1), "x", str(tmp_path), config)[0].metrics == result.metrics


def test_a_sweep_has_scores_baseline_and_a_page(motion, tmp_path):
    config = EvalConfig(signal=MOTION, own={NAME: {**FAST, "fractions": (0.25, 1.0), "repeats": 2}})
    trained, scratch = evaluate(encoder(200, 3), "x", str(motion), config, figures=True)
    assert trained.protocol == NAME and scratch.is_baseline
    sweep = trained.settings["label_sweep"]
    assert sweep[0]["subjects"] <= sweep[1]["subjects"] == 4 and len(sweep[0]["balanced_top1"]) == 2
    assert trained.metrics["balanced_top1_at_0.25"] == sweep[0]["mean"] and "balanced_top1_area" in trained.metrics
    assert trained.metrics["balanced_top1"] == sweep[1]["mean"]
    assert set(trained.per_class["recall"]) == set(ACTIVITIES)
    assert trained.settings["labels"] == f"{', '.join(ACTIVITIES)}; a window has the class of most of its time"
    scored = trained.details.tallies["top1"].whole.sum()
    assert f"{scored:.0f} scored windows" in trained.settings["test_set"] and scored < trained.settings["num_test"]
    page = save_evaluation(tmp_path / "out", [trained, scratch]).read_text()
    assert "Classes over time" in page and "Balanced accuracy with fewer labels" in page
    assert "Classes of test_00000.npz" in page and "labelled" in page


def test_intervals_resample_subjects_that_have_several_recordings(tmp_path):
    rows = ["file,subject,split,label"]
    for number in range(12):
        label, split = ("up", "down")[number % 2], ("train", "test")[number // 6]
        save(tmp_path / f"r{number:02d}.npz", np.random.default_rng(number).normal(size=(1, 400)))
        rows.append(f"r{number:02d}.npz,s{number // 2},{split},{label}")
    (tmp_path / "recordings.csv").write_text("\n".join(rows))
    config = EvalConfig(baseline=False, signal=SignalConfig(window_s=2), own={NAME: FAST})
    result = evaluate(encoder(200, 1), "x", str(tmp_path), config)[0]
    assert result.details.groups == ("s3", "s3", "s4", "s4", "s5", "s5")
    assert result.settings["interval"] == "95 %, bootstrap over the test subjects"
    assert not [chart for chart in result.details.charts if chart.startswith("classes")]  # they never change


def test_classes_keep_the_window_of_training(motion, tmp_path):
    write_yaml(tmp_path / "config.yaml", {"data": {"signal": {"resample_hz": 50, "high_hz": 20, "window_s": 4}}})
    assert as_trained(str(tmp_path), str(motion), {})["signal"]["window_s"] == 4
