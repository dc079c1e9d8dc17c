"""The command line on data that it was not written for: strange names, layouts, splits, tables."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import smalti

ENCODER = "random:vit_tiny_patch16_224"
TINY = (
    "encoder=vit_tiny_patch16_224 encoder.patch_size=8 encoder.embed_dim=24 encoder.depth=1 encoder.num_heads=3 "
    "data.image_size=32 batch_size=4 steps=2 method.decoder_dim=16 method.decoder_depth=1 method.decoder_num_heads=2"
).split()


def picture(path: Path, level: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([level, seed]).integers(level, level + 60, (40, 40, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def test_names_of_any_signs_work_in_tables_pages_and_files(photos: Path, tmp_path: Path) -> None:
    strange = (r"a$b$c_{x}^2", "[red]bold[", "back\\slash", os.fsdecode(b"caf\xe9"), "two\nlines")
    for number, name in enumerate(strange):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for place in range(4):
            pixels = np.random.default_rng([number, place]).integers(40 * number, 40 * number + 60, (40, 40, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"[{place}]$x$_\\{os.fsdecode(bytes([0xE9]))}.png")
    out, found = tmp_path / "page", tmp_path / "found.json"
    words = ("--data", tmp_path / "data", "--protocol", "knn", "--out", out, "--json", found, "eval.image_size=32")
    done = smalti("evaluate", "random:vit_tiny_patch16_224", *words, "eval.baseline=false")
    assert "data: classes: 20 images, 5 classes" in done.stderr
    page = (out / "report.html").read_text()
    assert "caf\\xe9" in page and "two\\nlines" in page
    assert json.loads(found.read_text())["results"][0]["protocol"] == "knn"
    table = tmp_path / "features.parquet"
    smalti("embed", "random:vit_tiny_patch16_224", "--data", tmp_path / "data", "--out", table, "image_size=32")
    assert table.is_file()


def test_an_output_folder_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "x.png", 90)
    out = tmp_path / os.fsdecode(b"r\xfcn")
    done = smalti("train", "mae", "--data", tmp_path / "set", "--out", out, *TINY, code=2)
    assert "the path is not UTF-8, so weights can't be read from it; rename it" in done.stderr
    assert not out.exists()


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """Class folders with train, valid and test, and a picture that belongs to none."""
    for split, count in (("train", 6), ("valid", 3), ("test", 3)):
        for level, kind in ((40, "ant"), (160, "bee")):
            for number in range(count):
                picture(tmp_path / "set" / split / kind / f"{number}.png", level, number)
    picture(tmp_path / "set" / "overview.png", 0)
    return tmp_path / "set"


def test_every_command_says_what_it_reads_and_training_reads_train_alone(splits: Path, tmp_path: Path) -> None:
    line = (
        "data: classes: 24 images (train 12, val 6, test 6), 2 classes; "
        "left out: 1 image beside the split folders (overview.png)"
    )
    run = tmp_path / "run"
    assert line in smalti("train", "mae", "--data", splits, "--out", run, *TINY).stderr
    assert json.loads((run / "run.json").read_text())["num_images"] == 12
    assert line in smalti("evaluate", run, "--data", splits, "--protocol", "knn", "eval.knn.k=3").stderr
    assert line in smalti("embed", run, "--data", splits, "--out", tmp_path / "x.parquet").stderr
    quiet = smalti("evaluate", run, "--data", splits, "--protocol", "knn", "eval.knn.k=3", "--quiet")
    assert "data:" not in quiet.stderr


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (["photos/{}.png", "outlines/{}.png"], "those in outlines/ look like masks; rename the folders to images/ and"),
        (["train/a/{}.png", "train/b/{}.png", "holdout/a/{}.png"], "holdout/ lies beside train/ and is no split"),
        (
            ["cat/train/{}.png", "cat/test/{}.png", "dog/train/{}.png"],
            "cat/ holds test, train; put splits above everything else",
        ),
    ],
    ids=["masks", "unknown split", "splits inside"],
)
def test_a_folder_that_could_be_read_in_two_ways_stops_training(tmp_path: Path, images: list[str], words: str) -> None:
    for form in images:
        for number in range(4):
            path = picture(tmp_path / "set" / form.format(number), 100, number)
            if form.startswith("outlines"):
                Image.fromarray(np.eye(40, dtype=np.uint8)).save(path)
    run = tmp_path / "run"
    done = smalti("train", "mae", "--data", tmp_path / "set", "--out", run, *TINY, code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("smalti: ") and words in line and not run.exists()


def test_a_table_with_labels_is_evaluated(splits: Path, tmp_path: Path) -> None:
    rows = [f"set/{path.relative_to(splits).as_posix()},{path.parent.name}" for path in sorted(splits.rglob("*/*.png"))]
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n" + "\n".join(rows) + "\n")
    done = smalti("evaluate", ENCODER, "--data", table, "--protocol", "knn", "eval.knn.k=3", "eval.image_size=32")
    assert "data: table: 24 images, 2 classes" in done.stderr and "top1" in done.stdout


def test_the_groups_of_a_table_are_resampled_whole(tmp_path: Path) -> None:
    rows = []
    for number in range(24):
        level, kind = ((40, "ant"), (160, "bee"))[number % 2]
        picture(tmp_path / f"{number}.png", level, number)
        rows.append(f"{number}.png,{kind},{'train' if number < 12 else 'test'},video{number // 4}")
    table, found = tmp_path / "labels.csv", tmp_path / "found.json"
    table.write_text("path,label,split,group\n" + "\n".join(rows) + "\n")
    words = ("--data", table, "--protocol", "knn", "eval.knn.k=3", "eval.image_size=32", "--json", found)
    assert "resamplings of 3 groups of images (from the table)" in smalti("evaluate", ENCODER, *words).stdout
    settings = json.loads(found.read_text())["results"][0]["settings"]
    assert settings["num_test"] == 12 and "3 groups of images" in settings["intervals"]
    assert "resamplings of 12 groups" in smalti("evaluate", ENCODER, *words, r"eval.groups=\d+").stdout
