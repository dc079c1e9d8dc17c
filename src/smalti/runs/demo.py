"""The demo: train, evaluate and report on the embedded samples, in minutes on two cores."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.config import merge, read_yaml
from smalti.data.samples import write_samples
from smalti.errors import ConfigError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.details import write_details
from smalti.evaluation.result import Result, write_results
from smalti.files import check_folder, is_free
from smalti.models.loading import load
from smalti.runs.baseline import evaluate
from smalti.runs.folder import CONFIG_FILE, RESULTS
from smalti.runs.train import train

SCENES: dict[str, Any] = {
    "num_train": 3000,
    "num_val": 500,
    "num_objects_train": 200,
    "num_objects_val": 150,
    "size": 96,
}
SETTINGS: dict[str, Any] = {
    "encoder": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
    "data": {"image_size": 48},
    "method": {"decoder_depth": 1},
    "steps": 1500,
    "batch_size": 64,
    "optim": {"lr": 1e-3},
    "log": {"every": 50},
    "checkpoint": {"every": 500},
}
"""Chosen so that the gain over the untrained network is clear at three seeds; see docs/evidence/demo.md."""
HEADS = {"linear-segmentation": {"epochs": 5}}
"""Epochs of linear segmentation, a quarter of the protocol's default, to save time."""


@dataclass(frozen=True)
class Demo:
    """Outputs of the demo."""

    samples: Path
    run: Path
    results: list[Result]
    """Results of the trained and the untrained network, by protocol."""
    seconds: float

    @property
    def verdict(self) -> str:
        """One line that compares trained and untrained on each headline metric."""
        parts = []
        pairs = list(zip(self.results[::2], self.results[1::2], strict=True))
        for trained, before in pairs:
            name, value = trained.headline
            parts.append(f"{trained.protocol} {name} {value:.3f}, untrained {before.metrics[name]:.3f}")
        better = sum(trained.headline[1] > before.metrics[trained.headline[0]] for trained, before in pairs)
        word = "beats" if better == len(pairs) else "does not beat" if not better else "partly beats"
        return f"training {word} the untrained network: {'; '.join(parts)}  ({self.seconds:.0f} s)"


def run_demo(out: Path, overrides: Mapping[str, Any] | None = None, *, quiet: bool = False) -> Demo:
    """Write sample images, train MAE on them, and evaluate it against the untrained network.

    Args:
        out: a new or empty folder.
        overrides: settings of the training run.
        quiet: show no progress.

    Raises:
        ConfigError: if ``out`` is a file or not empty.
        MissingExtraError: without scikit-image.
    """
    if not is_free(out):
        raise ConfigError(f"{out}: is not empty; choose another --out")
    check_folder(out)
    start = time.perf_counter()
    samples = write_samples(out / "samples", **SCENES)
    run = train("mae", samples, out / "run", overrides=merge(SETTINGS, overrides or {}), quiet=quiet)
    encoder = load(run, quiet=True)
    results: list[Result] = []
    seed = int(read_yaml(run / CONFIG_FILE)["seed"])
    evaluations: list[tuple[Path, EvalConfig]] = [
        (samples / "objects", EvalConfig(protocols=("linear-probe",), seed=seed)),
        (samples, EvalConfig(protocols=("linear-segmentation",), seed=seed, own=HEADS)),
    ]
    for data, config in evaluations:
        results += evaluate(encoder, str(run), str(data), config, figures=True)
    write_details(run / RESULTS / "evaluate_demo", results)
    write_results(run / RESULTS / "evaluate_demo.json", results)
    return Demo(samples, run, results, time.perf_counter() - start)
