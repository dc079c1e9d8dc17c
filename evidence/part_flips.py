"""Does PART learn horizontal offsets when views are not mirrored? Four short runs on CIFAR-10.

    python evidence/part_flips.py --cifar CIFAR10_JPEG --out runs/flips

The CPU form of cifar_positions.py at half its length: flips on or off, the paper's head or the head with a residual and
norms. Fixed before the first run: everything below. About five minutes of one core.
"""

import argparse
import json
from pathlib import Path

from cifar_positions import FORMS, unpack

import smalti
from smalti.config import write_atomically
from smalti.runs.probe import probe_positions

STEPS = 500
HEADS = {
    "the paper's": {},
    "with residual and norms": {"head_residual": True, "head_norm": True},
}
FLIPS = (0.5, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="holds train.tar.xz and test.tar.xz")
    parser.add_argument("--out", type=Path, default=Path("runs/flips"), help="folder of images and runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    form = FORMS["cpu"]
    options.out.mkdir(parents=True, exist_ok=True)
    images = unpack(options.cifar, options.out.resolve(), form["per_class"])
    found = []
    print("| head | flip_prob | R² | of x | of y |\n|---|---|---|---|---|")
    for head, settings in HEADS.items():
        for flip_prob in FLIPS:
            run = options.out / f"seed{options.seed}" / f"{len(settings)}-{flip_prob}"
            smalti.train(
                "part",
                images / "train",
                run,
                overrides={
                    "encoder": form["encoder"],
                    "data": {"image_size": 32},
                    "batch_size": form["batch_size"],
                    "steps": STEPS,
                    "seed": options.seed,
                    "drop_path": 0.0,
                    "optim": {"lr": form["lr"]},
                    "method": {"crop_scale": [0.35, 1.0], "flip_prob": flip_prob, **settings},
                },
                quiet=True,
            )
            metrics = probe_positions(run, str(images)).metrics
            found.append({"head": head, "flip_prob": flip_prob, **metrics})
            scores = " | ".join(f"{metrics[name]:.3f}" for name in ("r2", "r2_x", "r2_y"))
            print(f"| {head} | {flip_prob} | {scores} |", flush=True)
    write_atomically(options.out / f"seed{options.seed}.json", json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
