"""Self-distillation on a few thousand photographs: iBOT, DINOv2 and intertwined features beside DINO and MAE.

    python evidence/selfdistillation_small.py --clothing CLOTHING_SMALL --ccp CCP --out runs/selfdistillation

Each arm trains on clothing photographs without labels, for the same number of steps, on the same small encoder, with
the method settings of its recipe for small data (``*_tiny64.yaml``; MAE: ``mae_tiny96.yaml``). Evaluation: k-NN on the
classes of these photographs, overclustering and patch k-NN on the masks of another clothing data set. The gain of an
arm is the difference to its own network before training.

Collapse is read from the log: the entropy of prototype usage divided by its maximum, and the effective rank of the
exported features. Fixed before the first run: everything in this file, and no choice of checkpoints. "Did not collapse"
means a usage entropy above half of the maximum for each head, and an effective rank above 10.

Finished cells in ``--out`` are kept.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import smalti
from smalti.comparison.cell import RUN
from smalti.comparison.outcome import Comparison
from smalti.config import read_yaml, write_atomically
from smalti.training.logs import read_csv

RECIPES = Path(__file__).parents[1] / "recipes"
ARMS = {
    "mae": "mae_tiny96.yaml",
    "dino": "dino_tiny64.yaml",
    "ibot": "ibot_tiny64.yaml",
    "dinov2": "dinov2_tiny64.yaml",
    "intertwined": "intertwined_tiny64.yaml",
}
ENCODER = {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
STEPS, BATCH, SIZE, DENSE_SIZE = 400, 32, 64, 112
LEAST_ENTROPY, LEAST_RANK = 0.5, 10.0
COLLAPSE = "collapse.json"


def arm(recipe: str) -> dict[str, Any]:
    """A recipe's method, optimiser and stochastic depth, without its encoder, images and length."""
    tree = read_yaml(RECIPES / recipe)
    return {name: tree[name] for name in ("method", "optim", "drop_path") if name in tree}


def plan(clothing: Path, ccp: Path, seeds: list[int]) -> dict[str, Any]:
    """All arms; differences are to timm's random initialisation, gains to each arm's own untrained network."""
    return {
        "data": str(clothing / "train"),
        "evaluate": [
            {"data": str(clothing), "split": "test", "protocols": ["knn"], "image_size": SIZE},
            {"data": str(ccp), "protocols": ["overclustering", "knn-patch"], "image_size": DENSE_SIZE},
        ],
        "budget": {"steps": STEPS},
        "seeds": seeds,
        "settings": {"encoder": ENCODER, "data.image_size": SIZE, "batch_size": BATCH, "checkpoint.every": 100},
        "arms": {"random": {"load": "random"}, **{name: arm(recipe) for name, recipe in ARMS.items()}},
    }


def collapse(comparison: Comparison) -> list[dict[str, Any]]:
    """For each run of a method with prototypes, the last row of its log."""
    rows = []
    for cell in comparison.cells:
        log = cell.folder / RUN / "log.csv"
        last = read_csv(log)[-1] if log.is_file() else {}
        names = [name for name in last if name.endswith("usage_entropy")]
        if not names:
            continue
        config = read_yaml(cell.folder / RUN / "config.yaml")
        most = math.log(config["method"]["num_prototypes"])
        ratios = {name.removesuffix("_usage_entropy"): float(last[name]) / most for name in names}
        rank = float(last["effective_rank"])
        kept = min(ratios.values()) > LEAST_ENTROPY and rank > LEAST_RANK
        rows.append({"arm": cell.arm, "seed": cell.seed, "usage": ratios, "effective_rank": rank, "did_not": kept})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clothing", type=Path, required=True, help="class folders with train and test")
    parser.add_argument("--ccp", type=Path, required=True, help="images and masks with train.txt and val.txt")
    parser.add_argument("--out", type=Path, default=Path("runs/selfdistillation"), help="folder of cells and tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    comparison = smalti.compare(plan(options.clothing.resolve(), options.ccp.resolve(), options.seeds), options.out)
    print((options.out / "comparison.md").read_text(encoding="utf-8"))
    rows = collapse(comparison)
    print("| arm | seed | entropy of prototype usage / its maximum | effective rank | did not collapse |")
    print("|---|---|---|---|---|")
    for row in rows:
        usage = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["usage"].items())
        print(f"| {row['arm']} | {row['seed']} | {usage} | {row['effective_rank']:.1f} | {row['did_not']} |")
    write_atomically(options.out / COLLAPSE, json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
