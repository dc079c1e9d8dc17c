"""Sleep staging, and fine-tuning on windows (window_tuning.py): kappa as defined, shares of subjects, the classifier,
and the whole way to a page."""

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, f1_score
from torch.testing import assert_close

from smalti.cli.evaluate import as_trained
from smalti.config import build, read_yaml, write_yaml
from smalti.data.signals.hypnograms import STAGES
from smalti.data.signals.labelled_signals import open_labelled_signals
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import open_signals
from smalti.data.signals.sleep_samples import write_nights
from smalti.errors import ConfigError, DataError, ShapeError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.details import read_details
from smalti.evaluation.evaluate import fitting_protocols
from smalti.evaluation.metrics import cohen_kappa, macro_f1
from smalti.evaluation.result import read_results
from smalti.evaluation.tuning import trainable_copy
from smalti.evaluation.window_tuning import (
    WindowClassifier,
    WindowRecipe,
    area_under_log,
    bootstrap_interval,
    confusions,
    labelled_windows,
    predict,
)
from smalti.evaluation.window_tuning import choose_recipe as choose
from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder
from smalti.report.evaluation import save_evaluation
from smalti.runs.baseline import evaluate

SHARED = Path(os.environ.get("SMALTI_SHARED", Path(__file__).parents[2].parent / "shared"))
DREAMS = SHARED / "data" / "dreams-sleep-eeg"
FAST = {"steps": 3, "batch_size": 4}


def encoder(window: int = 3000, **arguments: object) -> Encoder:
    shape = {"patch_size": [1, 100], "embed_dim": 24, "depth": 2, "num_heads": 3, **arguments}
    vit = build_encoder(
        "vit_tiny_patch16_224", img_size=(1, window), in_chans=1, seed=0, mean=(0.0,), std=(1.0,), **shape
    )
    vit.drop_positions()
    return vit.eval()


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nights(tmp_path_factory.mktemp("staging") / "nights", num_train=4, num_test=3, epochs=4)


def choose_recipe(config: EvalConfig) -> WindowRecipe:
    return choose(config, config.of("sleep-staging"))


def random_labels(seed: int, classes: int = 5, count: int = 60) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    rng = np.random.default_rng(seed)
    truth, guess = rng.integers(0, classes, (2, count))
    guess = np.where(rng.random(count) < 0.5, truth, guess)
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (truth, guess), 1)
    return truth, guess, torch.from_numpy(matrix)


@given(seed=st.integers(0, 10_000), classes=st.integers(2, 5))
def test_kappa_and_macro_f1_are_scikit_learns(seed, classes):
    truth, guess, matrix = random_labels(seed, classes)
    assert float(cohen_kappa(matrix)) == pytest.approx(cohen_kappa_score(truth, guess))
    assert macro_f1(matrix) == pytest.approx(f1_score(truth, guess, average="macro"))


def test_kappa_of_cohens_kind_by_hand():
    matrix = torch.tensor([[20, 5], [10, 15]])  # observed 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4
    assert float(cohen_kappa(matrix)) == pytest.approx(0.4)
    assert float(cohen_kappa(torch.diag(torch.tensor([3, 4, 5])))) == 1.0
    assert float(cohen_kappa(torch.ones(5, 5, dtype=torch.int64))) == pytest.approx(0.0)
    assert math.isnan(float(cohen_kappa(torch.tensor([[7, 0], [0, 0]]))))
    assert cohen_kappa(torch.stack([matrix, matrix])).shape == (2,)


def test_area_is_the_mean_height_over_the_logarithm():
    assert area_under_log([0.01, 0.1, 1.0], [0.4, 0.4, 0.4]) == pytest.approx(0.4)
    assert area_under_log([0.01, 0.1, 1.0], [0.0, 0.5, 1.0]) == pytest.approx(0.5)


def test_unscored_windows_count_nowhere_and_recordings_stand_apart(nights):
    signals = open_labelled_signals(nights, SignalConfig()).test
    blank = signals.recordings[0].stages.copy()
    blank[1] = -1
    first = dataclasses.replace(signals.recordings[0], stages=blank)
    signals = dataclasses.replace(signals, recordings=(first, *signals.recordings[1:]))
    counts = confusions(signals, np.where(signals.stages < 0, 4, signals.stages), 5)
    assert counts.shape == (3, 5, 5) and counts.sum((1, 2)).tolist() == [3, 4, 4]
    assert (counts == counts * np.eye(5, dtype=np.int64)).all()
    assert len(labelled_windows(signals)) == 11


def test_an_interval_holds_the_kappa_and_needs_two_recordings():
    parts = np.stack([random_labels(seed)[2].numpy() for seed in range(12)])
    low, high = bootstrap_interval(parts[None], cohen_kappa)
    assert low < float(cohen_kappa(torch.from_numpy(parts.sum(0)))) < high and high - low < 0.3
    same = np.repeat(parts[:1], 5, axis=0)[None]
    assert bootstrap_interval(same, cohen_kappa) == pytest.approx((float(cohen_kappa(torch.from_numpy(parts[0]))),) * 2)
    assert all(math.isnan(value) for value in bootstrap_interval(parts[None, :1], cohen_kappa))


def test_a_classifier_of_a_constant_head_says_one_stage(nights):
    signals = open_signals(nights, SignalConfig())
    model = WindowClassifier(trainable_copy(encoder(), 0.0), 5).eval()
    with torch.no_grad():
        model.encoder.vit.head.weight.zero_()
        model.encoder.vit.head.bias.copy_(torch.tensor([0.0, 0, 9, 0, 0]))
    assert predict(model, signals, 5, torch.device("cpu")).tolist() == [2] * len(signals)


def test_classifiers_begin_with_fresh_positions_and_leave_the_encoder_alone(nights):
    vit = encoder(window=1000)  # trained on shorter windows
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    result = evaluate(vit, "x", str(nights), EvalConfig(own={"sleep-staging": FAST}, baseline=False))[0]
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert vit.position_free and "new, as it was trained without" in result.settings["trained"]
    model = WindowClassifier(trainable_copy(vit, 0.0), 5)
    assert model.encoder.vit.pos_embed.requires_grad and model.encoder.vit.pos_embed.std() > 0.01


def test_loud_and_quiet_windows_are_told_apart(tmp_path):
    for number in range(8):
        rng = np.random.default_rng(number)
        stages = rng.permutation(["W", "N3"] * 4)
        loudness = np.where(stages == "N3", 6.0, 1.0).repeat(3000)
        values = loudness * rng.normal(size=24_000)
        np.savez(tmp_path / f"s{number}.npz", signal=values, rate_hz=100.0, stages=stages)
    config = EvalConfig(baseline=False, own={"sleep-staging": {"steps": 60, "batch_size": 16, "learning_rate": 2e-3}})
    result = evaluate(encoder(), "x", str(tmp_path), config)[0]
    assert result.headline[0] == "kappa" and result.metrics["kappa"] > 0.8
    assert evaluate(encoder(), "x", str(tmp_path), config)[0].metrics == result.metrics


def test_a_sweep_reports_subjects_scores_and_the_baseline_from_scratch(nights):
    config = EvalConfig(own={"sleep-staging": {**FAST, "fractions": (0.25, 1.0), "repeats": 2}})
    trained, scratch = evaluate(encoder(), "x", str(nights), config)
    sweep = trained.settings["label_sweep"]
    assert [(one["share"], one["subjects"], one["windows"]) for one in sweep] == [(0.25, 1, [4, 4]), (1.0, 4, [16, 16])]
    assert all(len(one["kappa"]) == 2 and one["mean"] == pytest.approx(np.mean(one["kappa"])) for one in sweep)
    assert trained.metrics["kappa"] == sweep[-1]["mean"] and trained.metrics["kappa_at_0.25"] == sweep[0]["mean"]
    assert "higher is better" in trained.units["kappa_area"] and "beyond chance" in trained.units["kappa"]
    assert scratch.is_baseline and scratch.settings["label_sweep"][0]["windows"] == [4, 4]
    assert set(trained.per_class["f1"]) == set(STAGES)
    assert trained.details.images == ("test_00000.npz", "test_00001.npz", "test_00002.npz")
    assert int(trained.details.confusion.sum()) == 2 * 12  # both seeds
    assert [len(line.y) for line in trained.details.charts["stages 0"].lines] == [4, 4]
    top1 = trained.details.tallies["top1"]
    assert len(top1) == 3 and top1.whole.sum() == 12


def test_shares_of_as_many_subjects_are_tried_once_with_a_warning(nights):
    with pytest.warns(UserWarning, match="0.01, 0.05 of 4 subjects are the same number as for a larger fraction"):
        result = evaluate(
            encoder(),
            "x",
            str(nights),
            EvalConfig(baseline=False, own={"sleep-staging": {**FAST, "fractions": (0.01, 0.05, 0.2)}}),
        )
    assert [one["share"] for one in result[0].settings["label_sweep"]] == [0.2]
    assert "kappa_area" not in result[0].metrics


def test_few_labels_are_gone_through_more_often():
    small = choose_recipe(EvalConfig())
    assert small.steps(10) == 200 and small.steps(64_000) == 10_000
    assert (
        choose_recipe(EvalConfig(own={"sleep-staging": {"epochs": 2}})).steps(64) == 4
        and choose_recipe(EvalConfig(own={"sleep-staging": {"steps": 7}})).steps(999) == 7
    )
    full = choose_recipe(EvalConfig(preset="full"))
    assert (full.epochs, full.learning_rate, full.layer_decay, full.label_smoothing) == (50, 2.5e-4, 0.75, 0.1)


def test_the_page_shows_hypnograms_and_the_curve(nights, tmp_path):
    results = evaluate(
        encoder(), "x", str(nights), EvalConfig(own={"sleep-staging": {**FAST, "fractions": (0.5, 1.0)}}), figures=True
    )
    page = save_evaluation(tmp_path / "out", results).read_text()
    assert "Hypnograms" in page and "Kappa with fewer labels" in page and "Stages of test_00000.npz" in page
    kept = read_details(tmp_path / "out" / "details", read_results(tmp_path / "out" / "results.json"))
    assert repr(kept[0].details.charts) == repr(results[0].details.charts)  # NaN differs from itself


def test_signals_and_images_are_not_mixed_up(nights, tmp_path):
    assert fitting_protocols(str(nights)) == ("sleep-staging",)
    with pytest.raises(DataError, match="protocol knn needs images, but the data are signals"):
        evaluate(encoder(), "x", str(nights), EvalConfig(protocols=("knn",)))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match="protocol sleep-staging needs signals, but the data are images"):
        evaluate(encoder(), "x", str(tmp_path), EvalConfig(protocols=("sleep-staging",)))
    with pytest.raises(ConfigError, match=r"set eval.sleep-staging.fractions"):
        evaluate(encoder(), "x", str(nights), EvalConfig(train_size=0.5))


def test_encoders_that_do_not_fit_are_refused(nights):
    images = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=24, num_heads=3, seed=0
    )
    with pytest.raises(ShapeError, match="takes images of 32x32 pixels, but the data are signals"):
        evaluate(images, "x", str(nights), EvalConfig(own={"sleep-staging": FAST}))
    with pytest.raises(ShapeError, match=r"windows are 250 samples .* patches of 100"):
        evaluate(
            encoder(), "x", str(nights), EvalConfig(own={"sleep-staging": FAST}, signal=SignalConfig(window_s=2.5))
        )
    two = build_encoder("vit_tiny_patch16_224", img_size=(1, 3000), patch_size=[1, 100], in_chans=2, depth=1, seed=0)
    with pytest.raises(ShapeError, match=r"takes 2 channels, but the signals have 1 \(C3-M2\)"):
        evaluate(two, "x", str(nights), EvalConfig(own={"sleep-staging": FAST}))


def test_recordings_are_read_as_the_run_read_them_in_windows_of_a_stage(nights, tmp_path):
    write_yaml(tmp_path / "config.yaml", {"data": {"signal": {"resample_hz": 50, "high_hz": 20, "window_s": 2}}})
    for name in (tmp_path, tmp_path / "best"):
        signal = as_trained(str(name), str(nights), {"signal": {"high_hz": 15}})["signal"]
        assert build(SignalConfig, signal) == SignalConfig(resample_hz=50, high_hz=15, window_s=30)
    assert as_trained(str(tmp_path), str(tmp_path), {"k": 3}) == {"k": 3}  # no signals there


def test_bad_shares_are_refused():
    with pytest.raises(ConfigError, match="fractions"):
        build(EvalConfig, {"fractions": [0.0, 0.5]}, "eval")


@pytest.mark.skipif(not DREAMS.is_dir(), reason=f"no {DREAMS}: the DREAMS excerpts are not in the repository")
def test_dreams_goes_the_whole_way(tmp_path):
    from smalti.runs.train import train

    run = train(
        "part",
        DREAMS,
        tmp_path / "run",
        overrides={
            "encoder": {"patch_size": 100, "embed_dim": 24, "depth": 2, "num_heads": 3},
            "method": {"num_pairs": 100},
            "data": {"signal": {"codes": "dreams"}},
            "steps": 3,
            "batch_size": 4,
            "devices": "cpu",
            "eval": {"data": str(DREAMS), "sleep-staging": FAST},
        },
        quiet=True,
    )
    assert read_yaml(run / "config.yaml")["eval"]["signal"]["channels"] == ["C3-A1"]
    trained = read_results(run / "results" / "step_00000003.json")[0]
    assert trained.protocol == "sleep-staging" and "subjects split by seed 0" in trained.settings["split"]
    assert trained.settings["label_sweep"][0]["windows"] == [60] and -1 <= trained.metrics["kappa"] <= 1
    assert_close(sum(trained.settings["label_sweep"][0]["kappa"]), trained.metrics["kappa"])
