import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from smalti.config import write_yaml
from smalti.evaluation.result import Result, write_results
from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder

DATA = "scenes"
UNITS = {"miou": "share, higher is better", "error": "share, lower is better", "top1": "share, higher is better"}


def draw_images(folder: Path, count: int = 5, size: tuple[int, int] = (80, 96)) -> None:
    """Smooth random colours with a bright disc."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = cv2.resize(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC)
        cv2.circle(image, (int(rng.integers(20, 70)), int(rng.integers(20, 60))), 14, (250, 240, 90), -1)
        cv2.imwrite(str(folder / f"image_{number}.png"), image)


def result(protocol: str, encoder: str, metrics: dict[str, float], per_class: dict | None = None, **settings) -> Result:
    return Result(protocol, encoder, DATA, metrics, UNITS, settings, per_class or {})


def pair(protocol: str, name: str, metrics: dict[str, float], random: dict[str, float], classes=()) -> list[Result]:
    """A trained encoder's result and its baseline's."""
    headline = next(iter(metrics))
    bars = (
        [
            {headline: {c: value * (1 - i / 9) for i, c in enumerate(classes)}}
            for value in (metrics[headline], random[headline])
        ]
        if classes
        else [{}, {}]
    )
    return [
        result(protocol, name, metrics, bars[0]),
        dataclasses.replace(result(protocol, f"{name} (untrained)", random, bars[1]), baseline="untrained"),
    ]


def write_log(path: Path, steps: int = 200, every: int = 2) -> None:
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(
            "step progress lr weight_decay loss loss/global loss/local "
            "grad_norm feature_std effective_rank images_per_s elapsed_s memory_mib".split()
        )
        for step in range(every, steps + 1, every):
            t = step / steps
            terms = [2.5 * math.exp(-3 * t) + 1 + rng.normal(0, 0.08), 1.5 * math.exp(-2 * t) + rng.normal(0, 0.05)]
            lr = 1e-3 * min(t / 0.1, 0.5 * (1 + math.cos(math.pi * t)))
            health = [1 + rng.exponential(0.3), 0.4 + 0.4 * t, 8 + 30 * t, rng.normal(180, 9), step * 0.7, 1830]
            rows.writerow([step, t, lr, 0.04 + 0.3 * t, sum(terms), *terms, *health])


@pytest.fixture(scope="session")
def builder() -> Callable[..., Path]:
    """Makes a run directory as training leaves it, without weights: ``builder(run, images)``."""
    return build_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """The same in a folder of the test's own."""
    return lambda name="run", **changes: build_run(tmp_path / name, tmp_path / "images", **changes)


def build_run(
    run: Path, images: Path, *, results: bool = True, classes=("disc", "rest"), bad_name="broken.jpg"
) -> Path:
    if not images.exists():
        draw_images(images)
    write_yaml(
        run / "config.yaml",
        {
            "method": {"name": "mae", "mask_ratio": 0.75},
            "data": {"path": str(images), "image_size": 64, "channels": 3},
            "encoder": "vit_tiny_patch16_224",
            "steps": 200,
            "batch_size": 64,
            "seed": 7,
            "optim": {"lr": 1.5e-4, "betas": [0.9, 0.95]},
        },
    )
    write_log(run / "log.csv")
    (run / "events.csv").write_text(
        "step,event,detail\n80,resumed,checkpoints/step_00000080\n"
        "140,rolled back,loss term 'global' is not finite at step 160\n"
    )
    (run / "unreadable.csv").write_text(f'path,reason\n"{bad_name}",a JPEG cut short after 812 bytes\n')
    (run / "run.json").write_text(
        json.dumps(
            {
                "command": f"smalti train mae --data {images} --out {run}",
                "started": "2026-01-02 03:04:05",
                "finished": "2026-01-02 04:04:05",
                "versions": {"smalti": "0.1.0", "torch": "2.10.0"},
                "machine": {"processor": "An example processor", "cores": 8, "gpus": []},
                "commit": "abc1234",
            }
        )
    )
    if results:
        for number, step in enumerate(range(0, 201, 50)):
            found = pair("linear-segmentation", f"{run} (step {step})", {"miou": 0.2 + 0.03 * number}, {"miou": 0.2})
            write_results(run / "results" / f"step_{step:08d}.json", found if step == 0 else found[:1])
        write_results(
            run / "results" / "evaluate_scenes.json",
            [
                *pair("knn", str(run), {"top1": 0.41, "error": 0.59}, {"top1": 0.33, "error": 0.67}),
                *pair("linear-segmentation", str(run), {"miou": 0.314}, {"miou": 0.207}, classes),
            ],
        )
    return run


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """Thirty dimensions: fewer than the page keeps, so nothing but the rounding is lost."""
    return build_encoder("vit_tiny_patch16_224", img_size=64, seed=3, depth=2, embed_dim=30, num_heads=3).eval()
