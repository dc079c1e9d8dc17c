"""The examples run and do what they say; made small."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.backend_bases import MouseButton, MouseEvent
from PIL import Image
from torch.testing import assert_close

import smalti
from command import smalti as command
from forked import run_script
from smalti.evaluation.evaluate import open_unlabelled

FOLDER = Path(__file__).parents[1] / "examples"
SPEC = "random:vit_tiny_patch16_224"


def run_alone(name: str, *words: object, folder: Path) -> str:
    """What an example prints, started as a user does."""
    done = subprocess.run(
        [sys.executable, FOLDER / name, *map(str, words)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(name: str, *words: object, folder: Path) -> str:
    """What an example prints, in a process that has imported everything."""
    return run_script(FOLDER / name, words, folder)


def test_every_example_is_in_the_list_and_has_a_test() -> None:
    files = {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb")}
    listed = set(re.findall(r"\]\(([^)]+)\)", (FOLDER / "README.md").read_text(encoding="utf-8")))
    assert listed == files
    assert all(f'"{name}"' in Path(__file__).read_text(encoding="utf-8") for name in files)


def test_a_folder_becomes_a_verdict(class_folders: Path, tmp_path: Path) -> None:
    text = run("folder_to_verdict.py", class_folders, class_folders, "run", "--steps", 2, "--size", 32, folder=tmp_path)
    lines = re.findall(r"^(\S+) (\S+): ([\d.]+), untrained ([\d.]+), gain ([+-][\d.]+)$", text, re.M)
    assert [line[:2] for line in lines] == [("knn", "top1"), ("linear-probe", "top1")]
    for _, _, score, before, gain in lines:
        assert float(gain) == pytest.approx(float(score) - float(before), abs=1.1e-3)


def test_an_exported_encoder_gives_the_same_features_without_smalti(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for path, pixels in zip(paths, noise, strict=True):
        Image.fromarray(pixels).save(path)
    command("export", SPEC, "to=timm", "--out", str(tmp_path / "exported"))
    text = run_alone("exported_features.py", "exported", "features.npz", *paths, folder=tmp_path)
    assert "features.npz: image (2, 192), patches (2, 196, 192)" in text
    saved = np.load(tmp_path / "features.npz")
    encoder = smalti.load(SPEC, quiet=True)
    with torch.inference_mode():
        tokens = encoder.encode(smalti.load_images(paths, size=224, mode="centre"))
        assert_close(torch.from_numpy(saved["patches"]), tokens.patches, atol=1e-4, rtol=1e-4)
        assert_close(torch.from_numpy(saved["image"]), encoder.pooled(tokens), atol=1e-4, rtol=1e-4)
    source = (FOLDER / "exported_features.py").read_text(encoding="utf-8")
    assert re.findall(r"^(?:import|from) (\w+)", source, re.M) == ["argparse", "numpy", "timm", "torch", "PIL"]


def test_a_protocol_of_ones_own_is_evaluated_beside_others(class_folders: Path, tmp_path: Path) -> None:
    text = run("own_protocol.py", SPEC, class_folders, "--size", 64, folder=tmp_path)
    found = dict(re.findall(r"^(\S+ \S+): (-?[\d.]+) \(encoder\)$", text, re.M))
    assert set(found) == {"uniformity uniformity", "knn top1"}
    encoder = smalti.load(SPEC, quiet=True)
    paths = open_unlabelled(str(class_folders)).test.paths
    with torch.inference_mode():
        vectors = encoder.image_features(smalti.load_images(paths, size=64))
    unit = (vectors / vectors.norm(dim=1, keepdim=True)).double().numpy()
    squares = ((unit[:, None] - unit[None]) ** 2).sum(-1)[np.triu_indices(len(unit), 1)]
    assert float(found["uniformity uniformity"]) == pytest.approx(np.log(np.exp(-2 * squares).mean()), abs=1e-3)


def test_a_method_of_ones_own_is_trained_and_compared(class_folders: Path, tmp_path: Path) -> None:
    words = ("--steps", 12, "--size", 32, "--seeds", 0)
    text = run("own_method.py", class_folders, class_folders, "out", *words, folder=tmp_path)
    assert "failed" not in text
    assert re.search(r"^  simmim: [\d.]+, [+-][\d.]+ against random: .+$", text, re.M), text
    logs = [path for path in (tmp_path / "out").rglob("log.csv") if "loss/pixels" in path.read_text().splitlines()[0]]
    assert len(logs) == 1
    losses = [
        float(row["loss/pixels"]) for row in csv.DictReader(logs[0].read_text().splitlines()) if row["loss/pixels"]
    ]
    assert losses[-1] < losses[0]


def test_the_notebook_draws_what_is_clicked_on(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = json.loads((FOLDER / "patch_tokens.ipynb").read_text(encoding="utf-8"))
    assert book["nbformat"] == 4
    paths = [str(path) for path in sorted(photos.iterdir())[:3]]
    names: dict[str, Any] = {}
    monkeypatch.setattr(plt, "show", lambda: None)
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            parameters = "parameters" in cell["metadata"].get("tags", [])
            code = f"ENCODER, IMAGES, SIZE = {SPEC!r}, {paths}, 224" if parameters else "".join(cell["source"])
            exec(compile(code, cell["id"], "exec"), names)
    assert names["colors"].shape == (3, 14, 14, 3)
    assert names["similarity"][0, 7 * 14 + 7] == pytest.approx(1)  # a patch and itself

    ax = names["axes"][0, 2]
    x, y = ax.transData.transform((5.5 * 16, 3.5 * 16))  # patches of 16 pixels: row 3, column 5
    event = MouseEvent("button_press_event", names["figure"].canvas, x, y, MouseButton.LEFT)
    names["figure"].canvas.callbacks.process("button_press_event", event)
    wanted = names["features"] @ names["features"][2, 3 * 14 + 5]
    assert_close(torch.from_numpy(names["maps"][1].get_array().data), wanted[1].reshape(14, 14))
    plt.close("all")
