"""The page of a comparison: verdict first, everything inside, and what is gone is said to be."""

import shutil

import pytest

from htmlpage import check_page
from smalti.comparison.run import compare, read_comparison
from smalti.errors import RunError
from smalti.report.comparison import write_comparison

ENCODER = {"name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def folder(photos, class_folders, tmp_path_factory):
    """A comparison of three arms, one of them broken, evaluated in training, too."""
    out = tmp_path_factory.mktemp("compare") / "out"
    plan = {
        "data": str(photos),
        "evaluate": [{"data": str(class_folders), "protocols": ["knn"], "image_size": 32}],
        "budget": {"steps": 2},
        "seeds": [0, 1],
        "settings": {
            **{"encoder": ENCODER, "batch_size": 4, "data.image_size": 32, "data.num_workers": 0},
            **{"eval.data": str(class_folders), "eval.every": 1, "eval.protocols": ["knn"], "log.every": 1},
        },
        "arms": {
            "start": {"load": "random"},
            EVIL: {"method": "mae", "method.decoder_depth": 1},
            "typo": {"method": "maee"},
        },
    }
    compare(plan, out, quiet=True, isolate=False)
    return out


def test_a_comparison_read_from_its_folder_is_the_one_that_was_written(folder):
    read = read_comparison(folder)
    again = compare(read.plan, folder, quiet=True, isolate=False)
    assert read.rows == again.rows and read.costs == again.costs and read.failures == again.failures
    assert [(c.arm, c.seed, c.folder, c.evaluations) for c in read.cells] == [
        (c.arm, c.seed, c.folder, c.evaluations) for c in again.cells
    ]


def test_the_page_tells_the_comparison(folder):
    page = check_page(write_comparison(folder))
    assert write_comparison(folder) == folder / "report.html"
    for words in (
        f"{EVIL} and start in knn top1",
        "typo failed and has no results: there is no method 'maee'; did you mean 'mae'?",
        "Every method has a loss of its own",
        "trained with mae, started from random weights",
        "not trained: random weights",
        "Scores in training, mean over seeds",
        "recall of each class (2)",
        "images seen",
        "Intervals of 95 %",
        "budget.steps",
    ):
        assert words in page.text, words
    labels = page.attributes("aria-label")
    for start in ("Confusion of start", f"Confusion of {EVIL}", f"Loss of {EVIL}", "knn top1 on"):
        assert any(label.startswith(start) for label in labels), start
    assert any("means and differences" in label for label in labels)
    alts = page.attributes("alt")
    assert any(alt.startswith("PCA map") and alt.endswith(f"by {EVIL}") for alt in alts)
    assert not page.attributes("onerror") and not any(tag == "script" for tag, _ in page.elements)


def test_a_cell_that_was_removed_leaves_the_rest(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "out")
    before = read_comparison(tmp_path / "out")
    shutil.rmtree(next(cell.folder for cell in before.cells if cell.arm == EVIL and cell.seed == 1))
    page = check_page(write_comparison(tmp_path / "out"))
    assert f"Removed since, so numbers are in the tables but not in the figures: {EVIL}, seed 1." in page.text
    assert f"{before.rows[-1].score.mean:.3f}" in page.text
    shutil.rmtree(tmp_path / "out" / "cells")
    page = check_page(write_comparison(tmp_path / "out", tmp_path / "bare.html"))
    assert f"start, seed 0; {EVIL}, seed 0; start, seed 1; {EVIL}, seed 1." in page.text and not page.attributes("alt")


def test_a_folder_of_something_else_is_named(tmp_path):
    with pytest.raises(RunError, match="contains no complete comparison"):
        write_comparison(tmp_path)
    (tmp_path / "compare.json").write_text("[]")
    with pytest.raises(RunError, match=r"compare.json: can't be read as the summary of a comparison"):
        write_comparison(tmp_path)
