"""The baseline of a trained encoder is its own network before training."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods import SMALL, WITH_ENCODER

import smalti
from smalti.config import merge, read_yaml
from smalti.errors import DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.paired import result_cells
from smalti.evaluation.protocols.keep_curve import OWN_HEAD
from smalti.evaluation.result import read_results, write_results
from smalti.methods.base import get_method
from smalti.models.loading import as_loaded
from smalti.models.weights import LoadConfig
from smalti.runs.baseline import baseline_of, evaluate, untrained_network
from smalti.runs.config import resolve
from smalti.runs.folder import CONFIG_FILE, end_of_log

TINY: dict[str, Any] = {
    "encoder": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "data": {"image_size": 32},
    "steps": 2,
    "batch_size": 4,
    "seed": 3,
    "optim": {"lr": 1e-2, "warmup_ratio": 0.0},
    "checkpoint": {"every": 1, "keep": 3},
}
KNN = EvalConfig(protocols=("knn",), image_size=32)


def train(out: Path, name: str, images: Path, **more: Any) -> Path:
    own = {key: value for key, value in SMALL.get(name, {}).items() if key not in ("num_classes", "num_images")}
    if get_method(name).is_posttraining:
        own["from_scratch"] = True
    overrides = merge(merge(TINY, {"method": own}), more)
    return smalti.train(name, images, out, overrides=overrides, quiet=True)


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


@pytest.fixture(scope="module")
def mae(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "mae", "mae", photos)


@pytest.mark.parametrize("name", WITH_ENCODER)
def test_the_untrained_network_is_the_checkpoint_of_step_0_bit_for_bit(
    name: str, photos: Path, class_folders: Path, tmp_path: Path
) -> None:
    run = train(tmp_path / "run", name, class_folders if get_method(name).needs_labels else photos)
    config = resolve(read_yaml(run / CONFIG_FILE))
    network = get_method(name).export_network
    rebuilt = as_loaded(untrained_network(config, network))
    kept, trained = smalti.load(step(run, 0), quiet=True), smalti.load(run, quiet=True)
    assert rebuilt.config() == kept.config()
    before, after = kept.state_dict(), trained.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in rebuilt.state_dict().items())
    assert any(not torch.equal(value, after[key]) for key, value in before.items())
    baseline = baseline_of(trained)
    assert baseline is not None and baseline.kind == "untrained"


@pytest.mark.parametrize("is_kept", [True, False])
def test_scores_of_the_baseline_are_those_of_step_0(
    is_kept: bool, mae: Path, class_folders: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(mae, tmp_path / "run"))
    (alone,) = evaluate(smalti.load(step(run, 0), quiet=True), "step 0", str(class_folders), KNN)
    if not is_kept:
        shutil.rmtree(step(run, 0))
    trained, baseline = evaluate(smalti.load(run, quiet=True), "run", str(class_folders), KNN)
    assert alone.baseline is None and trained.baseline is None and baseline.baseline == "untrained"
    assert baseline.metrics == alone.metrics
    assert baseline.to_json()["baseline"] == "untrained" and baseline.encoder == "run (untrained)"


def test_the_baseline_is_loaded_and_pooled_as_the_encoder_is(mae: Path, photos: Path) -> None:
    encoder = smalti.load(mae, img_size=64, quiet=True)
    encoder.set_pool("avg")
    baseline = baseline_of(encoder)
    assert baseline is not None
    before = baseline.make()
    assert before.img_size == (64, 64) and before.pool == "avg"
    rebuilt = as_loaded(smalti.load(step(mae, 0), quiet=True), LoadConfig(img_size=64))
    assert all(torch.equal(value, rebuilt.state_dict()[key]) for key, value in before.state_dict().items())


def test_a_run_that_started_from_weights_is_compared_with_them(mae: Path, photos: Path, tmp_path: Path) -> None:
    start = Path(shutil.copytree(mae, tmp_path / "start"))
    run = smalti.train(
        "mae",
        photos,
        tmp_path / "run",
        init=str(start),
        overrides={key: value for key, value in TINY.items() if key != "encoder"} | {"method": SMALL["mae"]},
        quiet=True,
    )
    encoder = smalti.load(run, quiet=True)
    kept = baseline_of(encoder)
    assert kept is not None and kept.kind == "before"
    shutil.rmtree(step(run, 0))
    rebuilt = baseline_of(encoder)
    assert rebuilt is not None and rebuilt.kind == "before"
    weights = rebuilt.make().state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in smalti.load(start, quiet=True).state_dict().items())
    shutil.rmtree(step(start, 2))  # the newest weights are others now
    with pytest.warns(UserWarning, match="no baseline: init=.* has changed"):
        assert baseline_of(encoder) is None


def test_what_is_untrained_has_no_baseline_and_what_is_imported_a_random_one(mae: Path, tmp_path: Path) -> None:
    assert baseline_of(smalti.load(step(mae, 0), quiet=True)) is None
    random = smalti.load("random:vit_tiny_patch16_224", img_size=32)
    assert baseline_of(random, "random:vit_tiny_patch16_224") is None
    imported = baseline_of(random, "mine")
    assert imported is not None and imported.kind == "random-init"
    lost = Path(shutil.copytree(step(mae, 2), tmp_path / "checkpoints" / "step_00000002"))
    with pytest.warns(UserWarning, match="can't be rebuilt"):
        baseline = baseline_of(smalti.load(lost, quiet=True))
    assert baseline is not None and baseline.kind == "random-init"


def test_no_baseline_where_none_is_asked_for(mae: Path, class_folders: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = dataclasses.replace(KNN, baseline=False)
        results = evaluate(smalti.load(mae, quiet=True), "run", str(class_folders), config)
    assert [result.baseline for result in results] == [None]


def test_scores_and_paired_differences_have_intervals_that_survive_their_file(
    mae: Path, class_folders: Path, tmp_path: Path
) -> None:
    encoder = smalti.load(mae, quiet=True)
    trained, before = results = evaluate(encoder, str(mae), str(class_folders), KNN)
    found = trained.intervals["top1"]
    assert found["low"] <= trained.metrics["top1"] <= found["high"]
    assert found["difference"] == pytest.approx(trained.metrics["top1"] - before.metrics["top1"])
    assert found["difference_low"] <= found["difference"] <= found["difference_high"]
    assert set(before.intervals["top1"]) == {"low", "high"}
    assert trained.settings["intervals"] == "95%, percentile bootstrap with 2000 resamplings of 6 images"
    write_results(tmp_path / "r.json", results)
    assert [result.intervals for result in read_results(tmp_path / "r.json")] == [r.intervals for r in results]
    value, level, gap = result_cells(trained, before, "top1")
    assert value.endswith(f"[{found['low']:.3f}, {found['high']:.3f}]") and level == f"{before.metrics['top1']:.3f}"
    assert gap.endswith(f"[{found['difference_low']:+.3f}, {found['difference_high']:+.3f}]")


def test_groups_change_the_intervals_and_no_score(mae: Path, class_folders: Path) -> None:
    encoder = smalti.load(mae, quiet=True)
    plain, grouped = (
        evaluate(encoder, str(mae), str(class_folders), dataclasses.replace(KNN, groups=groups, baseline=False))
        for groups in (None, r"/(\d)\.png")
    )
    assert plain[0].metrics == grouped[0].metrics
    assert grouped[0].settings["intervals"].endswith(r"of 3 groups of images (/(\d)\.png)")
    with pytest.raises(DataError, match=r"eval\.groups=blue/\(\.\): does not match val/red/0\.png"):
        evaluate(encoder, str(mae), str(class_folders), dataclasses.replace(KNN, groups="blue/(.)"))


def test_a_keep_curve_reads_the_untrained_network_through_its_own_untrained_head(
    class_folders: Path, tmp_path: Path
) -> None:
    run = train(tmp_path / "run", "supervised", class_folders)
    config = EvalConfig(
        protocols=("keep-curve",),
        image_size=32,
        own={"keep-curve": {"rates": (0.0, 0.5), "speed": False, "orders": ("halton",)}},
    )
    results = evaluate(smalti.load(run, quiet=True), str(run), str(class_folders), config)
    assert [result.baseline for result in results] == [None, "untrained"]
    assert [result.settings["head"] for result in results] == [OWN_HEAD, OWN_HEAD]
    assert [result.settings["order"] for result in results] == ["halton", "halton"]


def test_a_run_keeps_what_a_predictor_that_ignores_the_image_gets(mae: Path) -> None:
    reference = json.loads((mae / "run.json").read_text())["reference"]
    last = end_of_log(mae)
    assert reference["value"] == pytest.approx(last["loss/reconstruction"])
    assert reference["constant"] == pytest.approx(last["mean_predictor_mse"])
    assert not reference["has_learned"] and reference["sentence"].startswith("nothing learned: ")  # after two steps
