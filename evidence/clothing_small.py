"""MAE and DINO on a small set of real photographs: do a few hundred steps of training help?

    python evidence/clothing_small.py --data CLOTHING_SMALL --out runs/evidence

For each method and seed: train on the training split without labels, then evaluate with k-NN and a linear probe on the
test split. The baseline is the same network untrained.

Fixed before the first run: the recipes below, three seeds, k = 20, no choice of checkpoints. "Training helped" means
that the gain over the untrained network is above zero at each seed. Finished runs are kept.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

import smalti
from smalti.config import read_yaml
from smalti.evaluation.result import Result, read_results, write_results
from smalti.runs.machine import describe_machine
from smalti.runs.train import resume

SEEDS = (0, 1, 2)
RECIPES = Path(__file__).parents[1] / "recipes"
ARMS = {"mae": RECIPES / "mae_tiny96.yaml", "dino": RECIPES / "dino_tiny64.yaml"}
PROTOCOLS = ("knn", "linear-probe")
METRICS = ("top1", "balanced_top1")


def results_of(method: str, seed: int, data: Path, out: Path) -> tuple[list[Result], float]:
    """Results and training seconds of one run; computed if missing."""
    run = out / f"{method}_{seed}"
    file = run / "results" / "evaluate_evidence.json"
    if not file.exists():
        if (run / "config.yaml").exists():
            resume(run)
        else:
            smalti.train(None, data / "train", run, recipe=ARMS[method], overrides={"seed": seed})
        size = read_yaml(ARMS[method])["data"]["image_size"]
        write_results(file, smalti.evaluate(run, data, PROTOCOLS, split="test", seed=seed, image_size=size))
    return read_results(file), json.loads((run / "run.json").read_text())["training_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="class folders with train and test")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("evidence/results"), help="folder of the JSON file")
    parser.add_argument("--figures", type=Path, default=Path("docs/evidence"), help="folder of the figure")
    options = parser.parse_args()
    table: list[dict[str, Any]] = []
    for method in ARMS:
        for seed in SEEDS:
            results, seconds = results_of(method, seed, options.data, options.out)
            for result in results:
                arm = result.baseline or method
                row = {"method": method, "arm": arm, "seed": seed, "protocol": result.protocol, "training_s": seconds}
                table.append(row | {metric: result.metrics[metric] for metric in METRICS})
    lines = ["| method | protocol | metric | trained | untrained | gain (each seed) | training helped |"]
    lines.append("|---|---|---|---|---|---|---|")
    for method in ARMS:
        for protocol in PROTOCOLS:
            for metric in METRICS:
                values = {
                    arm: [r[metric] for r in table if (r["method"], r["arm"], r["protocol"]) == (method, arm, protocol)]
                    for arm in (method, "untrained")
                }
                gaps = [a - b for a, b in zip(values[method], values["untrained"], strict=True)]
                cells = [f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" for v in values.values()]
                each = ", ".join(f"{gap:+.3f}" for gap in gaps)
                lines.append(
                    f"| {method} | {protocol} | {metric} | {cells[0]} | {cells[1]} | "
                    f"{statistics.mean(gaps):+.3f} ({each}) | {'yes' if min(gaps) > 0 else 'NO'} |"
                )
    print("\n".join(lines))
    content = {
        "rows": table,
        "recipes": {name: read_yaml(path) for name, path in ARMS.items()},
        "seeds": SEEDS,
        "threads": torch.get_num_threads(),
    }
    content |= {"date": time.strftime("%Y-%m-%d"), **describe_machine()}
    options.results.mkdir(parents=True, exist_ok=True)
    options.figures.mkdir(parents=True, exist_ok=True)
    (options.results / "clothing-small.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(table, options.figures / "clothing-small.png")


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Every seed as a dot, trained beside untrained."""
    figure, axes = plt.subplots(1, len(PROTOCOLS), figsize=(8, 3), sharey=True, layout="constrained")
    for axis, protocol in zip(axes, PROTOCOLS, strict=True):
        for place, method in enumerate(ARMS):
            for shift, arm, colour in ((-0.12, "untrained", "#999999"), (0.12, method, "#2a6f97")):
                values = [
                    r["balanced_top1"]
                    for r in table
                    if (r["method"], r["arm"], r["protocol"]) == (method, arm, protocol)
                ]
                axis.scatter([place + shift] * len(values), values, color=colour, zorder=3)
        axis.set_xticks(range(len(ARMS)), list(ARMS))
        axis.set_title(protocol)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("balanced top-1")
    figure.suptitle("grey: untrained, blue: trained; one dot per seed", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
