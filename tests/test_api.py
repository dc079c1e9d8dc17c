"""The verbs in Python do what the command line does."""

import csv
from pathlib import Path

import pytest
import torch

import smalti
from small_mar import SMALL
from smalti.errors import ConfigError
from smalti.evaluation.config import EvalConfig
from smalti.models.build import build_encoder
from smalti.runs import baseline

SPEC = "random:vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def encoder() -> smalti.Encoder:
    return build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, seed=0)


def test_evaluate_takes_settings_by_name(class_folders: Path, encoder: smalti.Encoder) -> None:
    found = smalti.evaluate(encoder, class_folders, ["knn"], knn={"k": 3}, baseline=False)
    config = EvalConfig(protocols=("knn",), own={"knn": {"k": 3}}, baseline=False)
    assert [result.metrics for result in found] == [
        result.metrics for result in baseline.evaluate(encoder, "x", str(class_folders), config)
    ]
    assert found[0].settings["k"] == 3
    (probe,) = smalti.evaluate(encoder, class_folders, ["linear-probe"], linear_probe={"epochs": 1}, baseline=False)
    assert probe.settings["epochs"] == 1
    with pytest.raises(ConfigError, match=r"^eval has no field 'kk'"):
        smalti.evaluate(encoder, class_folders, kk=1)


def test_export_and_embed_write_files(photos: Path, tmp_path: Path, encoder: smalti.Encoder) -> None:
    folder = smalti.export(encoder, tmp_path / "timm")
    assert (folder / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match=r"to=tf: timm, hf or onnx is needed"):
        smalti.export(encoder, tmp_path / "x", to="tf")
    with pytest.raises(ConfigError, match=r"image_size only applies to to='onnx'"):
        smalti.export(encoder, tmp_path / "x", image_size=32)
    done = smalti.embed(encoder, photos, tmp_path / "e.npz", level="patch")
    assert done.path.is_file()


def test_doctor_measures_the_step_of_a_supervised_method_without_data(tmp_path: Path) -> None:
    tiny = {"encoder": {"name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 1}, "data.image_size": 32}
    report = smalti.doctor(method="supervised", out=tmp_path, overrides={**tiny, "batch_size": 2, "steps": 3})
    assert report.step is not None and report.step.batch_size == 2
    assert any("images/s" in line or "step" in line for line in report.lines())


def test_rank_writes_orders(photos: Path, tmp_path: Path) -> None:
    ranking = smalti.rank(SPEC, photos, tmp_path / "orders.parquet", orders=["variance"], flips=False, image_size=32)
    assert (tmp_path / "orders.parquet").is_file() and ranking.names == ("variance",)


def test_generate_returns_images_of_the_seed(photos: Path, tmp_path: Path) -> None:
    method = {key: value for key, value in SMALL.items() if key != "num_classes"}
    tree = {"method": method, "data": {"image_size": 16}, "tokens": {"kind": "pixels", "patch_size": 4}}
    run = smalti.train("mar", photos, tmp_path / "run", overrides={**tree, "steps": 1, "batch_size": 4}, quiet=True)
    images = smalti.generate(run, num=2, seed=1)
    assert images.shape[:2] == (2, 3) and 0 <= float(images.min()) <= float(images.max()) <= 1
    assert torch.equal(images, smalti.generate(run, num=2, seed=1))


def test_a_run_is_evaluated_by_its_folder(photos: Path, class_folders: Path, tmp_path: Path) -> None:
    tiny = {"encoder": {"name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 1}, "data": {"image_size": 32}}
    run = smalti.train("mae", photos, tmp_path / "run", overrides={**tiny, "steps": 1, "batch_size": 4}, quiet=True)
    trained, untrained = smalti.evaluate(run, class_folders, ["knn"])
    assert (trained.baseline, untrained.baseline) == (None, "untrained") and trained.encoder == str(run)
    with (run / "log.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 1
