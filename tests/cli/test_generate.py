"""MAR and CMAR from images to runs to PNG files: ``smalti generate`` as a function, and once as a command."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from command import smalti
from smalti.cli.generate import command as generate
from smalti.config import parse_overrides
from smalti.data.images.folders import open_images
from smalti.data.order_files import write_orders
from smalti.errors import SmaltiError
from smalti.functional.orders import fixed_random, halton, raster
from smalti.methods.mar import MAR
from smalti.report.run_page import write_report
from smalti.runs.train import train

TINY = (
    "method.embed_dim=16 method.depth=1 method.decoder_depth=1 method.num_heads=2 method.buffer_size=2 "
    "method.head_depth=1 method.head_width=16 method.dropout=0 method.clip=4 tokens.kind=pixels tokens.patch_size=8 "
    "data.image_size=32 batch_size=4 steps=2 precision=fp32 devices=cpu"
).split()


def fit(method: str, data: Path, out: Path, *words: str, init: Path | None = None) -> Path:
    return train(
        method, data, out, init=None if init is None else str(init), overrides=parse_overrides(words), quiet=True
    )


def draw(run: Path, out: Path, **options: Any) -> None:
    orders, classifier = options.pop("orders", None), options.pop("classifier", None)
    words = [f"{key}={value}" for key, value in {"steps": 3, "iterations": 4, **options}.items()]
    generate(run=run, words=words, orders=orders, classifier=classifier, out=out, quiet=True)


@pytest.fixture(scope="module")
def mar(tmp_path_factory: pytest.TempPathFactory, class_folders: Path) -> Path:
    """A run of two steps on blue and red images."""
    out = tmp_path_factory.mktemp("runs") / "mar"
    return fit("mar", class_folders, out, *TINY)


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory, class_folders: Path) -> Path:
    """Orders of the training images: blue ones begin in raster order, red ones as the Halton sequence goes."""
    images = open_images(str(class_folders)).subset("train")
    file = tmp_path_factory.mktemp("orders") / "orders.parquet"
    names = [name for name in images.names for _ in range(2)]
    write_orders(
        file,
        images=names,
        splits=["train"] * len(names),
        flips=[False, True] * len(images),
        orders={"collapse": torch.stack([raster((4, 4)) if "blue" in name else halton((4, 4)) for name in names])},
        grid=(4, 4),
        image_size=32,
        root=str(class_folders),
        source="a test",
    )
    return file


def test_images_a_grid_and_a_strip_are_written_and_a_seed_draws_the_same_again(mar: Path, tmp_path: Path) -> None:
    draw(mar, tmp_path / "a", num=5, labels="red,blue", cfg=2.0, seed=3)
    draw(mar, tmp_path / "b", num=5, labels="1,0", cfg=2.0, seed=3, batch_size=2)
    files = sorted((tmp_path / "a" / "images").rglob("*.png"))
    names = [file.relative_to(tmp_path / "a" / "images").as_posix() for file in files]
    assert names == ["blue/00001.png", "blue/00003.png", "red/00000.png", "red/00002.png", "red/00004.png"]
    for file in files:
        image = cv2.imread(str(file))
        other = cv2.imread(str(tmp_path / "b" / file.relative_to(tmp_path / "a")))
        assert image.shape == (32, 32, 3) and np.abs(image.astype(int) - other).max() <= 1  # the last bit may round
    for one in "ab":  # a row an image, at least 64 pixels, however many are drawn at a time
        assert cv2.imread(str(tmp_path / one / "film.png")).shape[0] == 5 * 68 + 4
    note = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert note["labels"] == ["red", "blue", "red", "blue", "red"] and note["images_per_s"] > 0
    assert (mar / "samples" / "film.png").is_file()
    page = write_report(mar, num_images=0).read_text()
    assert "Drawn images" in page and page.count("data:image/png;base64") >= 2


def test_a_cmar_learns_from_a_mar_and_draws_in_the_orders_of_each_class(
    mar: Path, orders: Path, class_folders: Path, tmp_path: Path
) -> None:
    run = tmp_path / "cmar"
    words = ("steps=2", "batch_size=4", "optim.lr=1e-3", "devices=cpu", "precision=fp32")
    fit("cmar", class_folders, run, f"method.orders={orders}", *words, init=mar)
    draw(run, tmp_path / "out", num=4, order_source="class_mean")
    note = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert note["order"] == "collapse" and Path(note["orders"]) == orders
    strip = cv2.imread(str(tmp_path / "out" / "film.png"))[..., ::-1]
    maps = [strip[4 + 68 * row : 68 * row + 68, -68:-4] for row in range(4)]  # the last tile of each row
    first = [np.unravel_index(picture.sum(-1).argmin(), picture.shape[:2]) for picture in maps]
    assert [(int(y) // 16, int(x) // 16) for y, x in first[::2]] == [(0, 0), (0, 0)]  # blue: dark, so first
    cell = int(halton((4, 4))[0])
    assert [(int(y) // 16, int(x) // 16) for y, x in first[1::2]] == [divmod(cell, 4)] * 2  # red


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, class_folders: Path) -> str:
    """A run of one step on the same classes."""
    words = "encoder=vit_tiny_patch16_224 encoder.embed_dim=24 encoder.depth=1 encoder.num_heads=3 encoder.patch_size=8"
    more = "data.image_size=32 steps=1 batch_size=4 devices=cpu"
    out = tmp_path_factory.mktemp("runs") / "supervised"
    return str(fit("supervised", class_folders, out, *words.split(), *more.split()))


def test_a_classifiers_certainty_is_measured_while_drawing(
    mar: Path, classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(mar, tmp_path / "out", num=10, classifier=classifier)
    assert f"certainty of {classifier} while drawing, mean of 10 images (chance: 50%): " in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "certainty.json").read_text())
    assert found["drawn"][0] == 0 and found["drawn"][-1] == 1 and len(found["drawn"]) == 1 + 4  # iterations
    assert [one["label"] for one in found["images"]] == ["blue", "red"] * 5
    assert all((tmp_path / "out" / one["file"]).is_file() for one in found["images"])
    values = np.array([one["certainty"] for one in found["images"]])
    assert values.mean(0) == pytest.approx(found["mean"], abs=1e-4)
    assert values[::2, 0] + values[1::2, 0] == pytest.approx(np.ones(5), abs=1e-4)  # an empty image: either class
    assert cv2.imread(str(tmp_path / "out" / "film.png")).shape[0] == 8 * (68 + 18) + 4
    assert cv2.imread(str(tmp_path / "out" / "certainty.png")).shape[2] == 3
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["classifier"] == classifier
    page = write_report(mar, num_images=0).read_text()
    assert "Certainty while drawing" in page and "Below a frame: the certainty of the classifier." in page
    draw(mar, tmp_path / "without", num=2)
    assert not (tmp_path / "without" / "certainty.json").exists()
    assert "Certainty while drawing" not in write_report(mar, num_images=0).read_text()


def test_a_classifier_that_does_not_fit_is_one_line_and_nothing_is_written(
    mar: Path, classifier: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for expected, given in (
        ("has no classification head", {"classifier": "random:vit_tiny_patch16_224"}),
        ("no such run or file", {"classifier": str(tmp_path / "nothing")}),
        ("needs images of classes, but these are drawn without", {"classifier": classifier, "labels": "none"}),
    ):
        with pytest.raises(SmaltiError) as raised:
            draw(mar, out, num=2, **given)
        assert expected in str(raised.value) and "\n" not in str(raised.value), str(raised.value)
        assert not out.exists()


def test_a_run_without_classes_draws_without_labels(photos: Path, tmp_path: Path) -> None:
    run = fit("mar", photos, tmp_path / "run", *TINY)
    draw(run, tmp_path / "out", num=2)
    assert [file.name for file in sorted((tmp_path / "out" / "images").iterdir())] == ["00000.png", "00001.png"]
    with pytest.raises(SmaltiError, match="trained without classes"):
        draw(run, tmp_path / "other", labels="cat")
    with pytest.raises(SmaltiError, match="guidance needs classes"):
        draw(run, tmp_path / "other", cfg=2.0)


def test_mistakes_are_one_line_and_nothing_is_written(
    mar: Path, orders: Path, class_folders: Path, tmp_path: Path
) -> None:
    words = "encoder=vit_tiny_patch16_224 encoder.embed_dim=24 encoder.depth=1 encoder.num_heads=3 encoder.patch_size=8"
    more = "data.image_size=32 steps=1 batch_size=2 method.decoder_dim=16 method.decoder_depth=1 devices=cpu"
    other = fit("mae", class_folders, tmp_path / "mae", *words.split(), *more.split())
    full, wrong = tmp_path / "full", tmp_path / "wrong.parquet"
    full.mkdir()
    (full / "a.txt").write_text("mine")
    write_orders(
        wrong,
        images=["train/red/0.png"],
        splits=[None],
        flips=[False],
        orders={"collapse": fixed_random(9)[None]},
        grid=(3, 3),
        image_size=24,
        root="x",
        source="a test",
    )
    out = tmp_path / "out"
    cases: list[tuple[str, dict[str, Any]]] = [
        ("there is no class 'bleu'; did you mean 'blue'?", {"labels": "bleu"}),
        ("labels=7: a class of 0..1 is needed", {"labels": "7"}),
        ("iterations=17: images of 16 tokens need 1..16 iterations", {"iterations": 17}),
        ("is a run of mae; only runs of mar and cmar generate images", {"run": other}),
        ("orders of 3x3 patches, but this run generates 4x4 tokens", {"order": "collapse", "orders": wrong}),
        ("collapse needs a file; name it with --orders", {"order": "collapse"}),
        ("there is no order 'colapse'", {"order": "colapse"}),
        ("holds no order 'coverage'", {"order": "coverage", "orders": orders}),
        (
            "order_source='mean': input should be 'bank'",
            {"order": "collapse", "orders": orders, "order_source": "mean"},
        ),
        ("settings has no field 'cgf'; did you mean 'cfg'?", {"cgf": 2}),
        ("is not needed for order 'random'; choose an order from the file", {"orders": orders}),
        ("is not needed for order 'halton'; leave it out", {"order": "halton", "orders": orders}),
        ("steps=2000: the diffusion has 2..1000 steps", {"steps": 2000}),
        ("num=0: at least 1", {"num": 0}),
        ("is not a run directory with a checkpoint", {"run": tmp_path / "nothing"}),
        ("decoder='some'", {"decoder": "some"}),
    ]
    for expected, given in cases:
        with pytest.raises(SmaltiError) as raised:
            draw(given.pop("run", mar), out, **given)
        assert expected in str(raised.value) and "\n" not in str(raised.value)
        assert not out.exists()
    with pytest.raises(SmaltiError, match="is not empty; choose another --out"):
        draw(mar, full)
    done = smalti("generate", mar, "labels=bleu", "--out", out, code=2)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("smalti: labels: there is no class 'bleu'")


def test_a_cmar_needs_a_mar_and_its_images_orders(mar: Path, orders: Path, class_folders: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    shutil.copytree(class_folders, more)
    shutil.copy(more / "train" / "red" / "0.png", more / "train" / "red" / "new.png")
    out, file = tmp_path / "run", f"method.orders={orders}"
    for expected, data, init, words in (
        ("cmar fine-tunes a run of mar or cmar; name it with --init RUN", class_folders, None, []),
        ("give its file as method.orders=FILE", class_folders, mar, []),
        ("has orders of 12 of the 13 images", more, mar, [file]),
        ("with other sizes", class_folders, mar, [file, "method.embed_dim=32"]),
    ):
        with pytest.raises(SmaltiError) as raised:
            fit("cmar", data, out, "devices=cpu", *words, init=init)
        assert expected in str(raised.value) and "\n" not in str(raised.value), str(raised.value)
        assert not out.exists()


def test_a_stopped_command_resumes_and_draws_only_what_is_missing(
    mar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"num": 12, "batch_size": 2, "seed": 3}
    draw(mar, tmp_path / "whole", **options)
    original, drawn = MAR.draw, []

    def stop(self: MAR, orders: torch.Tensor, *more: Any) -> torch.Tensor:
        drawn.append(len(orders))
        if len(drawn) == 6:
            raise KeyboardInterrupt
        return original(self, orders, *more)

    monkeypatch.setattr(MAR, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        draw(mar, tmp_path / "out", **options)
    with pytest.raises(SmaltiError, match=r"holds images with seed=3, not 4; choose another --out"):
        draw(mar, tmp_path / "out", **{**options, "seed": 4})
    begun = (tmp_path / "out" / "samples.json").read_bytes()
    (tmp_path / "out" / "samples.json").write_text("[" * 100_000)
    with pytest.raises(SmaltiError, match=r"settings of generated images \(it is nested too deeply\); choose another"):
        draw(mar, tmp_path / "out", **options)
    (tmp_path / "out" / "samples.json").write_bytes(begun)
    draw(mar, tmp_path / "out", **options)
    assert len(drawn) == 6 + 5  # the film's four batches once more, since it was not written, and the missing one
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.png"))
    assert len(files) == 12 + 2
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), file
    with pytest.raises(SmaltiError, match="already holds all images; choose another --out"):
        draw(mar, tmp_path / "out", **options)
