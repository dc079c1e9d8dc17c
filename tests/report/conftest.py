import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from htmlpage import Page, check_page
from smalti.charts import layer_chart, loss_chart
from smalti.config import write_yaml
from smalti.evaluation.result import Details, Result, write_results
from smalti.evaluation.shown import Shown
from smalti.evaluation.tally import tally_mean
from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder
from smalti.report.details import DetailSections
from smalti.report.evaluated import Evaluated
from smalti.report.evaluation import EvaluationPage
from smalti.report.parts import Summary, Table
from smalti.report.render import render

DATA = "scenes"
EVIL = "<script>alert(1)</script>"
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


@pytest.fixture
def page_of(tmp_path: Path) -> Callable[[DetailSections], Page]:
    """A page with these details and nothing else, checked as every page is."""

    def make(details: DetailSections) -> Page:
        page = EvaluationPage("x", "y", Summary("same", ("z",)), "", Table((), ()), details, {}, ())
        (tmp_path / "page.html").write_text(render("evaluation", page))
        return check_page(tmp_path / "page.html")

    return make


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """Thirty dimensions: fewer than the page keeps, so nothing but the rounding is lost."""
    return build_encoder("vit_tiny_patch16_224", img_size=64, seed=3, depth=2, embed_dim=30, num_heads=3).eval()


def shown_images(seed: int, grid: tuple[int, int] = (4, 4), places: tuple[int, ...] = (0, 2)) -> Shown:
    rng = np.random.default_rng(seed)
    return Shown(
        places,
        tuple(1.5 for _ in places),
        {place: rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for place in places},
        {place: rng.integers(-1, 3, (224, 224)).astype(np.int32) for place in places},
        torch.from_numpy(rng.standard_normal((len(places), grid[0] * grid[1], 5)).astype(np.float16)),
        0.9,
        grid,
        64,
    )


def detailed_result(seed: int, classes=("sky", EVIL, "road"), keep=True, **shape) -> Result:
    """A result with everything that details can hold."""
    rng = np.random.default_rng(seed)
    details = Details(
        images=("a.png", "b.png", "c <b>.png"),
        classes=classes,
        tallies={"miou": tally_mean(rng.random(3))},
        confusion=rng.integers(0, 50, (3, 3)),
        predictions={place: rng.integers(0, 3, (16, 16)).astype(np.int32) for place in (0, 2)},
        charts={
            "nmi": layer_chart("mutual information", "What it is.", rng.random(6).tolist()),
            "loss": loss_chart(rng.random(80).tolist()),
        },
        shown=shown_images(seed, **shape) if keep else None,
    )
    per_class = {"iou": {classes[0]: 0.9, classes[1]: 0.2 + 0.1 * seed, classes[2]: float("nan")}}
    return Result("linear-segmentation", "x", "d", {"miou": 0.5}, {}, {"seed": seed}, per_class, details)


@pytest.fixture
def make_result() -> Callable[..., Result]:
    """Makes a result with everything that details can hold: ``make_result(seed, keep=True, grid=(4, 4))``."""
    return detailed_result


@pytest.fixture
def evaluated() -> Evaluated:
    """Three arms of two seeds; patches of another size in the second, a hostile name for the third."""
    arms = {
        "one": [detailed_result(0), detailed_result(1)],
        "two": [detailed_result(2, grid=(2, 3))],
        EVIL: [detailed_result(3)],
    }
    return Evaluated("d", "linear-segmentation", arms)
