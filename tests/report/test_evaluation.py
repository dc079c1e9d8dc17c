"""The page of an evaluation, and what its folder may hold."""

import json

import pytest

from htmlpage import check_page
from smalti.errors import ConfigError, RunError
from smalti.evaluation.config import EvalConfig
from smalti.exporters.timm import export_timm
from smalti.models.loading import load
from smalti.report.evaluation import save_evaluation, write_evaluation
from smalti.runs.baseline import evaluate

EVIL = "<img src=x onerror=alert(1)>"


def test_an_evaluation_has_a_page_with_figures(encoder, class_folders, tmp_path):
    config = EvalConfig(protocols=("knn",), image_size=64)
    results = evaluate(encoder, EVIL, str(class_folders), config, figures=True)
    page = check_page(save_evaluation(tmp_path / "ev", results, "smalti evaluate <x>"))
    for words in (
        "random initialisation of its architecture: knn top1",
        "recall of each class (2)",
        "smalti evaluate <x>",
        EVIL,
    ):
        assert words in page.text, words
    assert any(alt.startswith("PCA map") for alt in page.attributes("alt")) and not page.attributes("onerror")
    assert json.loads((tmp_path / "ev" / "results.json").read_text())["results"]
    check_page(save_evaluation(tmp_path / "ev", results[:1]))
    assert len(list((tmp_path / "ev" / "details").glob("*_knn"))) == 1
    (tmp_path / "ev" / "details" / "details.json").write_text("{")
    assert "No figures" in check_page(write_evaluation(tmp_path / "ev", tmp_path / "x.html")).text


def test_an_evaluation_leaves_other_folders_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="is not empty and holds no evaluation"):
        save_evaluation(tmp_path, [])
    with pytest.raises(RunError, match="holds no evaluation"):
        write_evaluation(tmp_path)


def test_weights_of_a_file_are_named_as_imported(encoder, class_folders, tmp_path):
    export_timm(encoder, tmp_path / "exported")
    file = str(tmp_path / "exported" / "model.safetensors")
    config = EvalConfig(protocols=("knn",), image_size=64)
    results = evaluate(load(file, quiet=True), file, str(class_folders), config, figures=True)
    page = check_page(save_evaluation(tmp_path / "ev", results))
    assert f"Imported weights: {file}: " in page.text and "tensors matched" in page.text
    assert any(alt.endswith("by imported") for alt in page.attributes("alt"))
    assert "Trained:" not in page.text and not any("trained" == alt.split(" ")[-1] for alt in page.attributes("alt"))
