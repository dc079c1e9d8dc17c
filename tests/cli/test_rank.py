"""``smalti rank`` as a stranger types it: orders, numbers, a page; mistakes are one line and leave nothing."""

import json
import os
import warnings
from pathlib import Path

import cv2
import jaxtyping
import numpy as np
import pytest
import torch

from htmlpage import Page, check_page
from smalti.cli.main import run as smalti
from smalti.data.images.folders import open_images
from smalti.data.order_files import check_fits, read_orders
from smalti.runs.build import load_method

TOKENS = "data.image_size=32 tokens.patch_size=8 tokens.dim=8 batch_size=4 checkpoint.every=4 optim.lr=1e-3".split()
COMAE = [f"method.{part}_{word}" for part in ("encoder", "decoder") for word in ("dim=16", "depth=1", "num_heads=2")]
JUDGE = "method.dim=16 method.depth=1 method.num_heads=2".split()
TINY = "encoder=vit_tiny_patch16_224 encoder.patch_size=8 encoder.embed_dim=24 encoder.depth=1 encoder.num_heads=3"
MAE = [*TINY.split(), "data.image_size=32", "batch_size=4", "method.decoder_dim=16", "method.decoder_depth=1"]


def call(*words: object, code: int = 0) -> None:
    """In this process, so that many mistakes are quickly made."""
    jaxtyping.config.update("jaxtyping_disable", True)  # typer hands None to flags
    try:
        with pytest.raises(SystemExit) as left, warnings.catch_warnings():
            smalti([str(word) for word in words])
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert left.value.code == code


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photographs of sorts in class folders with splits: grey and 16-bit ones among them."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(10):
        path = folder / ("train" if number < 6 else "test") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (64, 48), interpolation=cv2.INTER_CUBIC)
        if number == 1:
            pixels = pixels[..., 0]
        if number == 3:
            pixels = pixels[..., 0].astype(np.uint16) * 200
        cv2.imwrite(str(path), pixels)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Runs of comae (two seeds), prefix and mae, of two steps each."""
    folder = tmp_path_factory.mktemp("runs")
    common = ("--data", images, "--quiet", "steps=2", "devices=cpu")
    call("train", "comae", "--out", folder / "c0", *common, *TOKENS, *COMAE)
    call("train", "comae", "--out", folder / "c1", *common, *TOKENS, *COMAE, "seed=1")
    call("train", "comae", "--out", folder / "c6", *common, *TOKENS, *COMAE, "tokens.patch_size=16")
    call("train", "prefix", "--out", folder / "prefix", *common, *TOKENS, *JUDGE)
    call("train", "mae", "--out", folder / "mae", *common, *MAE)
    # one in eleven can't be read: more than training puts up with
    (images / "train" / "a" / "broken.png").write_bytes((images / "train" / "a" / "0.png").read_bytes()[:100])
    return folder


@pytest.fixture(scope="module")
def ranked(runs: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "orders"
    words = (
        "--data",
        images,
        "--out",
        out,
        "--against",
        runs / "c1",
        "--predictor",
        runs / "prefix",
        "batch_size=3",
    )
    call("rank", runs / "c0", *words, "--json", out.parent / "x.json")
    return out


def test_a_run_of_comae_gives_orders_numbers_and_a_page(ranked: Path, runs: Path, images: Path) -> None:
    assert {path.name for path in ranked.iterdir()} == {f"orders.{end}" for end in ("parquet", "json", "html", "png")}
    cache = read_orders(ranked / "orders.parquet")
    assert tuple(cache.stored) == ("collapse", "in_strength", "coverage", "variance")
    assert cache.grid == (4, 4) and len(cache.images) == 20 and cache.flips.sum() == 10
    numbers = json.loads((ranked / "orders.json").read_text())
    assert numbers == json.loads((ranked.parent / "x.json").read_text())
    assert numbers["num_images"] == 10 and numbers["unreadable"][0]["path"].endswith("broken.png")
    assert set(numbers["orders"]) == {*cache.stored, "collapse_reversed", "collapse_static", "collapse_shuffled"}
    assert numbers["orders"]["collapse_static"]["position_variance_ratio"] == pytest.approx(1)
    assert numbers["orders"]["variance"]["position_variance_ratio"] < 0.5
    assert set(numbers["orders"]) <= set(numbers["units"]) | set(numbers["orders"])
    assert set(numbers["against"]["orders"]) == set(cache.stored)
    assert numbers["against"]["orders"]["variance"]["spearman"] == pytest.approx(1)
    curves = numbers["curves"]["orders"]
    assert numbers["curves"]["images"] == "4 images of the test split"
    assert {"random", "fixed_random", "collapse_static", "collapse_shuffled", "halton", "coverage"} <= set(curves)
    for curve in curves.values():
        assert curve["k"][0] == 0 and curve["k"][-1] == 16 and curve["left"][-1] == 0
        assert curve["auc_q"]["low"] <= curve["auc_q"]["value"] <= curve["auc_q"]["high"]
    assert curves["random"]["auc_q"]["difference"] is None and curves["fixed_random"]["auc_q_sd_of_draws"] > 0
    check_page(ranked / "orders.html")
    page = Page(ranked / "orders.html")
    for words in ("position explains", "images ranked", "Variance left", "order of collapse", "halton", "smalti"):
        assert words in page.text, words
    assert cv2.imread(str(ranked / "orders.png")).shape[1] > 800


def test_random_patches_on_the_page_are_each_image_s_own(
    runs: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[tuple[str, dict[str, np.ndarray]]] = []
    monkeypatch.setattr("smalti.report.ranking.draw_sheet", lambda path, found: rows.extend(found))
    call("rank", runs / "c0", "--data", images, "--out", tmp_path / "o", "--quiet", "num_shown=4")
    blank = [(pictures["random, 8 of 16"] == (206, 204, 200)).all(-1) for _, pictures in rows]
    assert len(blank) == 4 and all(0.45 < mask.mean() < 0.55 for mask in blank)
    assert not all((mask == blank[0]).all() for mask in blank)


def test_the_orders_are_those_of_the_runs_graphs(ranked: Path, runs: Path, images: Path) -> None:
    from smalti.data.images.labelled import eval_image
    from smalti.functional.graphs import coverage_order, descending, pagerank

    cache, method = read_orders(ranked / "orders.parquet"), load_method(runs / "c0")
    sample = open_images(str(images)).samples[0]
    shown = torch.from_numpy(eval_image(sample.path, 32, 3, "centre")).permute(2, 0, 1)[None]
    for flip in (False, True):
        graph = method.dependency(shown.flip(-1) if flip else shown)
        name = open_images(str(images)).names[0]
        assert cache.orders("collapse", [name], [flip])[0].tolist() == descending(pagerank(graph))[0].tolist()
        assert cache.orders("coverage", [name], [flip])[0].tolist() == coverage_order(graph)[0].tolist()


def test_an_encoder_ranks_by_attention_and_a_file_is_compared(
    runs: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("rank", runs / "mae", "--data", images, "--no-flips", "--quiet", "num_shown=1")
    call(*words, "--out", tmp_path / "a.parquet")
    cache = read_orders(tmp_path / "a.parquet")
    assert tuple(cache.stored) == ("attention", "variance") and not cache.flips.any()
    call(*words, "--out", tmp_path / "b", "--against", tmp_path / "a.parquet", "--orders", "attention,halton")
    said = capsys.readouterr().out
    assert "attention of the other run has rank correlation 1.00" in said
    assert tuple(read_orders(tmp_path / "b" / "orders.parquet").stored) == ("attention",)
    assert json.loads((tmp_path / "b" / "orders.json").read_text())["orders"]["halton"]["position_variance_ratio"] == 1


def test_a_list_file_and_the_images_of_another_folder(
    runs: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = sorted(path for path in images.rglob("[0-4].png"))
    (tmp_path / "some.txt").write_text("".join(f"{path}\n" for path in chosen))
    call("rank", runs / "c0", "--data", tmp_path / "some.txt", "--out", tmp_path / "o", "--quiet", "num_shown=0")
    cache = read_orders(tmp_path / "o" / "orders.parquet")
    check_fits(cache, open_images(str(tmp_path / "some.txt")), (4, 4), flips_needed=True)
    assert not (tmp_path / "o" / "orders.png").exists()
    capsys.readouterr()
    words = ("rank", runs / "c0", "--data", images, "--against", tmp_path / "o" / "orders.parquet", "--quiet")
    call(*words, "--out", tmp_path / "p", code=2)
    assert "has orders of 0 of the 11 images" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_names_that_are_no_text_and_numbers_that_stay_whole(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in (b"bad\xff.png", b"a $x_{$ b.png", b"c.png"):
        pixels = cv2.imencode(".png", rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))[1]
        (folder / os.fsdecode(name)).write_bytes(pixels.tobytes())
    (folder / os.fsdecode(b"broken\xff.png")).write_bytes(b"nothing")
    call("rank", runs / "c0", "--data", folder, "--out", tmp_path / "o", "--predictor", runs / "prefix", "--quiet")
    printed = capsys.readouterr().out
    assert "broken\\xff.png" in printed or "broken\\udcff.png" in printed
    row = next(line for line in printed.splitlines() if line.split()[:1] == ["collapse_shuffled"])
    assert len(row.split()) == 6 and all(float(cell) < 100 for cell in row.split()[1:])
    page = (tmp_path / "o" / "orders.html").read_text(encoding="utf-8")
    assert "bad\\xff.png" in page
    assert len(json.loads((tmp_path / "o" / "orders.json").read_text(encoding="utf-8"))["unreadable"]) == 1


def wrong(runs: Path, images: Path, folder: Path) -> dict[str, tuple[list[object], str]]:
    """Words of mistakes, and what is said."""
    (folder / "a.txt").write_text("x")
    good = [runs / "c0", "--data", images, "--out", folder / "out"]
    return {
        "no order": ([*good, "--orders", "colapse"], "there is no order 'colapse'"),
        "another method": ([runs / "mae", *good[1:], "--orders", "collapse"], "order 'collapse' needs a run of comae"),
        "not for comae": ([*good, "--orders", "attention"], "order 'attention' needs an encoder with a class token"),
        "prefix as run": (
            [runs / "prefix", *good[1:]],
            "is a run of prefix; patches are ranked by a run of comae",
        ),
        "run as predictor": (
            [*good, "--predictor", runs / "c1"],
            "is a run of comae; orders are scored by a run of prefix",
        ),
        "no predictor": (
            [*good, "--predictor", folder / "none"],
            "is not a run directory; train one with smalti train prefix",
        ),
        "no run": ([folder / "none", *good[1:]], "none"),
        "no images": ([runs / "c0", "--data", folder / "none", "--out", folder / "out"], "none"),
        "no other": ([*good, "--against", folder / "none.parquet"], "is not a file; orders are written by smalti rank"),
        "other is text": ([*good, "--against", folder / "a.txt"], "can't be read as a Parquet file"),
        "other of other patches": ([*good, "--against", runs / "c6"], "orders 2x2 patches, these are 4x4"),
        "nothing in common": ([*good, "--orders", "halton", "--against", runs / "c1"], "none of those compared here"),
        "workers": ([*good, "num_workers=-1"], "num_workers=-1"),
        "shown": ([*good, "num_shown=-1"], "num_shown=-1"),
        "unknown key": ([*good, "batchsize=3"], "did you mean 'batch_size'?"),
        "no batch": ([*good, "batch_size=0"], "batch_size=0: at least 1 is needed"),
        "no targets": ([*good, "chunk=0"], "chunk=0: at least 1 is needed"),
        "damping": ([*good, "damping=1.5"], "damping=1.5"),
        "size of comae": ([*good, "image_size=64"], "image_size: "),
        "damping of mae": ([runs / "mae", *good[1:], "damping=0.5"], "damping=0.5: only applies to runs of comae"),
        "other size": ([runs / "mae", *good[1:], "image_size=30"], "30"),
        "predictor of other patches": (
            [runs / "mae", *good[1:], "image_size=48", "--predictor", runs / "prefix"],
            "uses 4x4 patches of 32 px images, the orders are of 6x6 of 48 px; train it with data.image_size=48 "
            "tokens.p",
        ),
        "other file": ([*good[:-1], folder / "out.csv"], "is neither a folder nor a .parquet file"),
        "folder of others": ([*good[:-1], folder], "is not empty and holds no orders.parquet"),
        "under a file": ([*good[:-1], folder / "a.txt" / "o.parquet"], "can't be written"),
        "no out": (good[:-2], "--out is needed"),
    }


def test_mistakes_are_one_line_and_leave_nothing(
    runs: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (words, match) in wrong(runs, images, tmp_path).items():
        capsys.readouterr()
        call("rank", *words, "--quiet", code=2)
        lines = [line for line in capsys.readouterr().err.splitlines() if "tensors matched" not in line]
        assert len(lines) == 1 and lines[0].startswith("smalti: ") and match in lines[0], (name, lines)
        left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
        assert left == ["a.txt"], (name, left)


def test_too_large_a_batch_is_refused_with_the_one_that_fits(
    runs: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smalti.ranking.rank.free_bytes", lambda device: 2.0**20)
    call("rank", runs / "c0", "--data", images, "--out", tmp_path / "o", "--quiet", "batch_size=64", code=2)
    said = capsys.readouterr().err
    assert "batch_size=64: graphs of 16x16 patches need about" in said and "fits" in said
    assert not list(tmp_path.rglob("*.parquet"))
