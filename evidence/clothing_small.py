"""MAE and DINO on a small set of real photographs: do a few hundred steps beat random init?

    python evidence/clothing_small.py --data CLOTHING_SMALL --out runs/evidence

For each method and seed: train on the training split without its labels, then judge by k-NN and linear probe on the
test split, beside the same architecture with random weights of the same seed. What was fixed before the first run: the
settings below, three seeds, k = 20, no choice of checkpoints; "beats random init" means that the mean of the paired
differences over seeds is above zero and so is each of them. A finished run is not made again.
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
from smalti.config import merge
from smalti.evaluation.protocol import EvalConfig, Result, evaluate, read_results, write_results
from smalti.study.machine import describe_machine

SEEDS = (0, 1, 2)
COMMON: dict[str, Any] = {
    "encoder": {"name": "vit_tiny_patch16_224", "depth": 6},
    "data": {"image_size": 96},
    "log": {"every": 50},
    "checkpoint": {"every": 200},
}
ARMS: dict[str, dict[str, Any]] = {
    "mae": {"method": {"decoder_depth": 2}, "steps": 1000, "batch_size": 64, "optim": {"lr": 1e-3}},
    "dino": {
        "method": {"num_prototypes": 1024, "hidden_dim": 512, "num_local_views": 4, "momentum": 0.99},
        "steps": 400,
        "batch_size": 32,
        "optim": {"lr": 5e-4, "weight_decay_end": 0.1},
        "drop_path": 0.0,
    },
}
PROTOCOLS = ("knn", "linear-probe")
METRICS = ("top1", "balanced_top1")


def results_of(method: str, seed: int, data: Path, out: Path) -> tuple[list[Result], float]:
    """Results and training seconds of one run; made if they aren't there."""
    run = out / f"{method}_{seed}"
    file = run / "results" / "evaluate_evidence.json"
    if not file.exists():
        if (run / "config.yaml").exists():
            smalti.study.pretrain.resume(run)
        else:
            smalti.train(method, data / "train", run, overrides=merge(merge(COMMON, ARMS[method]), {"seed": seed}))
        config = EvalConfig(protocols=PROTOCOLS, split="test", seed=seed, image_size=96)
        write_results(file, evaluate(smalti.load(run), f"{method}, seed {seed}", str(data), config))
    return read_results(file), json.loads((run / "run.json").read_text())["training_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="class folders with train and test")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="where the runs lie")
    parser.add_argument("--figures", type=Path, default=Path("docs/evidence"), help="where the page's files go")
    options = parser.parse_args()
    import smalti.study.pretrain  # noqa: F401  # resume

    table: list[dict[str, Any]] = []
    for method in ARMS:
        for seed in SEEDS:
            results, seconds = results_of(method, seed, options.data, options.out)
            for result in results:
                arm = "random init" if result.is_baseline else method
                row = {"method": method, "arm": arm, "seed": seed, "protocol": result.protocol, "training_s": seconds}
                table.append(row | {metric: result.metrics[metric] for metric in METRICS})
    lines = [
        "| method | protocol | metric | trained | random init | paired difference (each seed) | beats random init |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for method in ARMS:
        for protocol in PROTOCOLS:
            for metric in METRICS:
                values = {
                    arm: [r[metric] for r in table if (r["method"], r["arm"], r["protocol"]) == (method, arm, protocol)]
                    for arm in (method, "random init")
                }
                gaps = [a - b for a, b in zip(values[method], values["random init"], strict=True)]
                cells = [f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" for v in values.values()]
                each = ", ".join(f"{gap:+.3f}" for gap in gaps)
                lines.append(
                    f"| {method} | {protocol} | {metric} | {cells[0]} | {cells[1]} | "
                    f"{statistics.mean(gaps):+.3f} ({each}) | {'yes' if min(gaps) > 0 else 'NO'} |"
                )
    print("\n".join(lines))
    content = {
        "rows": table,
        "settings": {"common": COMMON, "arms": ARMS, "seeds": SEEDS},
        "threads": torch.get_num_threads(),
    }
    content |= {"date": time.strftime("%Y-%m-%d"), **describe_machine()}
    options.figures.mkdir(parents=True, exist_ok=True)
    (options.figures / "clothing-small.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(table, options.figures / "clothing-small.png")


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Every seed as a dot, trained beside random."""
    figure, axes = plt.subplots(1, len(PROTOCOLS), figsize=(8, 3), sharey=True, layout="constrained")
    for axis, protocol in zip(axes, PROTOCOLS, strict=True):
        for place, method in enumerate(ARMS):
            for shift, arm, colour in ((-0.12, "random init", "#999999"), (0.12, method, "#2a6f97")):
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
    figure.suptitle("grey: random init, blue: trained; one dot a seed", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
