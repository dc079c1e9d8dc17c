"""PART's patches and heads, and PART beside other methods that predict positions, on CIFAR-10 under one budget.

    python evidence/cifar_positions.py --cifar CIFAR10_JPEG --out runs/cifar
    python evidence/cifar_positions.py --cifar CIFAR10_JPEG --out runs/cifar-gpu --form gpu --seeds 0

``--cifar`` holds train.tar.xz and test.tar.xz with SPLIT/CLASS/*.jpg; they are unpacked into ``--out``. Each arm
trains on images without labels and is evaluated by fine-tuning on some labelled images and by a linear probe, on the
10,000 test images. The baseline of each arm is its own untrained network. Every trained PART is probed on held-out
images as ``smalti probe`` does.

Fixed before the first run: everything in this file, and no choice of checkpoints. The CPU form is far shorter than any
published run: six blocks of width 96, patches of 8 (16 per image), 10,000 images, 1,000 steps of 64. Finished cells in
``--out`` are kept. About 80 minutes of one core.
"""

import argparse
import json
import math
import shutil
import statistics
import tarfile
from pathlib import Path
from typing import Any

import smalti
from smalti.comparison.cell import RUN
from smalti.comparison.outcome import Comparison
from smalti.config import write_atomically
from smalti.report.positions import draw_positions
from smalti.runs.probe import probe_positions

FORMS: dict[str, dict[str, Any]] = {
    "cpu": {
        "encoder": {"name": "vit_tiny_patch16_224", "depth": 6, "embed_dim": 96, "num_heads": 3, "patch_size": 8},
        "per_class": 1000,
        "steps": 1000,
        "batch_size": 64,
        "lr": 1e-3,
        "labelled": 2000,
        "epochs": 10,
        "loca": {"method.num_small_queries": 4, "method.num_prototypes": 256, "method.hidden_dim": 512},
    },
    "gpu": {
        "encoder": {"name": "vit_tiny_patch16_224", "depth": 9, "patch_size": 4},
        "per_class": 5000,
        "steps": 4000,
        "batch_size": 256,
        "lr": 1e-3,
        "labelled": 10_000,
        "epochs": 30,
        "loca": {"method.num_small_queries": 4, "method.num_prototypes": 1024, "method.hidden_dim": 1024},
    },
}
ALL_IMAGES = 5000
PROBED = ("r2", "rmse_px", "antisymmetry", "composition", "identity_px", "spread_x", "shortcut", "reconstruction")
PROBES, PROBE, FIGURE = "probes.json", "probe.json", "offsets.png"


def unpack(cifar: Path, out: Path, per_class: int) -> Path:
    """Class folders ``train`` and ``test`` under ``out``, with the first ``per_class`` training images of a class."""
    folder = out / f"cifar10-{per_class}"
    if folder.is_dir():
        return folder
    rough = out / "unpacked"
    shutil.rmtree(rough, ignore_errors=True)
    for split in ("train", "test"):
        with tarfile.open(cifar / f"{split}.tar.xz") as archive:
            archive.extractall(rough, filter="data")
    for kind in sorted((rough / "train").iterdir()):
        for path in sorted(kind.iterdir())[per_class:]:
            path.unlink()
    rough.rename(folder)
    return folder


def plan(images: Path, form: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    """Five forms of PART, other methods and random init. Differences are to the first arm, the paper's PART."""
    part = {"method": "part", "method.crop_scale": [0.35, 1.0], "drop_path": 0.0, "optim.lr": form["lr"]}
    linear = {"method.head": "pairwise_linear"}
    other = {"drop_path": 0.0, "optim.lr": form["lr"]}
    return {
        "data": str(images / "train"),
        "evaluate": [
            {
                "data": str(images),
                "split": "test",
                "protocols": ["finetune", "linear-probe"],
                "train_size": form["labelled"],
                "image_size": 32,
                "finetune": {"epochs": form["epochs"], "batch_size": 64},
                "linear-probe": {"epochs": form["epochs"], "batch_size": 64},
            }
        ],
        "budget": {"steps": form["steps"]},
        "seeds": seeds,
        "settings": {
            "encoder": form["encoder"],
            "data.image_size": 32,
            "batch_size": form["batch_size"],
            "checkpoint.every": 500,
        },
        "arms": {
            "part": part,
            "part, residual and norm": {**part, "method.head_residual": True, "method.head_norm": True},
            "part, pairwise linear": {**part, **linear},
            "part, grid": {**part, "method.sampling": "grid"},
            "part, grid, pairwise linear": {**part, "method.sampling": "grid", **linear},
            "mae": {"method": "mae", "method.decoder_depth": 2, **other},
            "droppos": {"method": "droppos", "method.mask_ratio": 0.5, **other},
            "loca": {
                "method": "loca",
                "method.small_size": 16,
                "method.momentum": 0.99,
                "encoder.class_token": False,
                **form["loca"],
                **other,
                "optim.lr": form["lr"] / 2,
            },
            "random": {"load": "random"},
        },
    }


def probe(comparison: Comparison, images: Path, figure: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Probe every trained PART on 32 test images, and draw the offsets of the first one; kept in the cell's folder."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for cell in comparison.cells:
        if not cell.arm.startswith("part"):
            continue
        kept = cell.folder / PROBE
        if not kept.is_file():
            probed = probe_positions(cell.folder / RUN, str(images))
            write_atomically(kept, json.dumps(dict(probed.metrics)))
            draw_positions(probed, cell.folder / FIGURE)
        if cell.arm == "part" and cell.seed == comparison.plan.seeds[0]:
            shutil.copy(cell.folder / FIGURE, figure)
        found.setdefault(cell.arm, {})[cell.seed] = json.loads(kept.read_text())
    return found


def probe_table(found: dict[str, dict[int, dict[str, float]]]) -> str:
    """A table of means over seeds, and R2 of each seed."""
    lines = ["| arm | " + " | ".join(PROBED) + " | r2 of each seed |", "|---" * (len(PROBED) + 2) + "|"]
    for arm, seeds in found.items():
        means = [f"{statistics.mean(metrics[name] for metrics in seeds.values()):.3f}" for name in PROBED]
        each = ", ".join(f"{metrics['r2']:.3f}" for metrics in seeds.values())
        lines.append(f"| {arm} | {' | '.join(means)} | {each} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="holds train.tar.xz and test.tar.xz")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar"), help="folder of images, cells and tables")
    parser.add_argument("--form", choices=FORMS, default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    form = FORMS[options.form]
    options.out.mkdir(parents=True, exist_ok=True)
    images = unpack(options.cifar, options.out.resolve(), min(form["per_class"], ALL_IMAGES))
    comparison = smalti.compare(plan(images, form, options.seeds), options.out / "compare")
    print((options.out / "compare" / "comparison.md").read_text(encoding="utf-8"))
    found = probe(comparison, images, options.out / FIGURE)
    print(probe_table(found))
    plain = {
        arm: {
            seed: {name: None if math.isnan(value) else value for name, value in metrics.items()}
            for seed, metrics in seeds.items()
        }
        for arm, seeds in found.items()
    }
    write_atomically(options.out / PROBES, json.dumps(plain, indent=1))


if __name__ == "__main__":
    main()
