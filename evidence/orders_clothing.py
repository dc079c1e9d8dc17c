"""Orders of patches on photographs of clothing: stability, a distilled ranker, accuracy from few patches. By commands.

    python evidence/orders_clothing.py --data CLOTHING_SMALL --out runs/orders

64 px, 64 patches of 8 px.

1. CoMAE by recipe comae_tiny64 in the one-pass form with a falling budget, 3,000 steps of 16, seeds 0, 1 and 2.
2. ``smalti rank`` of all images with each seed, against the next seed.
3. A ranker (recipe ranker_tiny64) for each seed, trained on seed 0's orders of the training photographs; ``smalti
   rank`` of all photographs. Its agreement with the teacher on the test photographs is computed here, beside those of
   the training photographs' mean order and of another test photograph's order.
4. Two classifiers per seed (recipe cvit_tiny32 at this size, 1,000 steps of 64): one trained on whole images
   (``full``), one with patches dropped at random (``random``). ``keep-curve`` on the test photographs with the orders
   of CoMAE and of the ranker, and the controls centre_out, variance, attention, random and the static order; coverage
   is CoMAE's graph ranked by another rule.

Fixed on 2026-12-01 before the first run (the earlier version of this page, with two seeds in the paper's form, was
known):
  O1  the order is a property of the photographs: Spearman between seeds, mean orders subtracted, is at least 0.3 for
      each of the three pairs
  O2  there is more than a static order to learn: the ranker's Spearman with its teacher on the test photographs is
      above the static order's by at least 0.02, in each seed
  O3  for the classifier ``random``, mean top-1 over the rates is higher by collapse than by each of centre_out,
      variance, attention and the static order: the 95 % interval of the difference over three seeds (Student) excludes
      zero. For coverage and distilled the same numbers are reported, no criterion.

Finished steps in ``--out`` are kept. About 75 minutes of one core.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from smalti.config import write_atomically
from smalti.data.order_files import read_orders
from smalti.functional.orders import rank_correlation, static_order
from smalti.runs.machine import describe_machine

SEEDS = (0, 1, 2)
COMAE = ("steps=3000", "method.readout=cross", "method.budget_ramp=[0.35,0.8]")
CLASSIFIERS = {"full": "method.max_rate=0", "random": "method.order=random"}
SIZE = ("data.image_size=64", "encoder.patch_size=8")
CONTROLS = ("centre_out", "variance", "attention", "collapse_static")
SHOWN = ("collapse", "distilled", "coverage", *CONTROLS, "random")
STUDENT = 4.303
"""Student's quantile for two degrees of freedom, two-sided 95 %."""
STABLE, MORE = 0.3, 0.02
SPLITS = ("train", "test")


def smalti(*arguments: str | Path) -> None:
    """Run one command, as a user types it."""
    print("smalti", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "smalti", *map(str, arguments)], check=True)


def train(recipe: str, data: Path, run: Path, *settings: str) -> None:
    """Train, or resume an interrupted run; finished runs are kept."""
    if run.is_dir():
        if not json.loads((run / "run.json").read_text()).get("finished"):
            smalti("train", "--resume", run, "--quiet")
        return
    smalti("train", "--recipe", recipe, "--data", data, "--out", run, "--quiet", *settings)


def rank(run: Path, data: Path, out: Path, against: Path | None = None) -> dict[str, Any]:
    """Orders of all images, and what is known about them; computed once."""
    if not (out / "orders.json").is_file():
        more = ("--against", against) if against else ()
        smalti("rank", run, "--data", data, "--out", out, *more, "--quiet", "num_shown=4")
    return dict(json.loads((out / "orders.json").read_text()))


def agreement(teacher: Path, distilled: Path) -> dict[str, float]:
    """Mean Spearman correlation with the teacher's orders over the test photographs."""
    known, found = read_orders(teacher), read_orders(distilled)
    train, test = (sorted({name for name in known.images if name.startswith(f"{split}/")}) for split in SPLITS)
    expected = known.orders("collapse", test, [False] * len(test))
    static = static_order(known.orders("collapse", train, [False] * len(train)))
    return {
        "ranker": float(rank_correlation(found.orders("distilled", test, [False] * len(test)), expected).mean()),
        "static": float(rank_correlation(static.expand(len(test), -1), expected).mean()),
        "another_image": float(rank_correlation(expected.roll(1, dims=0), expected).mean()),
    }


def keep_curve(run: Path, data: Path, out: Path, orders: str, seed: int) -> dict[str, float]:
    """Accuracy by fraction dropped on the test photographs; computed once."""
    found = out.with_suffix(".json")
    if not found.is_file():
        what = ("--protocol", "keep-curve", "--data", data, "--out", out, "--json", found, "--quiet")
        smalti(
            "evaluate",
            run,
            *what,
            "eval.split=test",
            "eval.baseline=false",
            f"eval.seed={seed}",
            f"eval.keep-curve.orders={orders}",
        )
    result = json.loads(found.read_text())["results"][0]
    return {**result["metrics"], "mean_top1_collapse": result["metrics"]["mean_top1"]}


def draw(out: Path, figures: Path) -> None:
    """Top-1 of both classifiers against the fraction of patches dropped, mean over seeds; and the orders of seed 0."""
    figure, axes = plt.subplots(1, len(CLASSIFIERS), figsize=(9.5, 3.6), sharey=True, layout="constrained")
    for panel, name in zip(axes, CLASSIFIERS, strict=True):
        runs = [json.loads((out / f"curve_{name}_{seed}.json").read_text())["results"][0] for seed in SEEDS]
        curves = [run["settings"]["keep_curve"] for run in runs]
        for order in SHOWN:
            means = [
                statistics.mean(values) for values in zip(*(curve[order]["top1"] for curve in curves), strict=True)
            ]
            style = "-" if order in ("collapse", "distilled", "coverage") else "--"
            panel.plot(curves[0][order]["rate"], means, style, label=order, linewidth=1.4)
        panel.set_title({"full": "trained on whole images", "random": "trained with patches dropped at random"}[name])
        panel.set_xlabel("fraction of patches dropped")
    axes[0].set_ylabel("top-1, mean of three seeds")
    axes[0].legend(fontsize=7)
    figure.savefig(figures / "keep-clothing.png", dpi=110)
    plt.close(figure)
    shutil.copy(out / "orders_0" / "orders.png", figures / "orders-clothing.png")


def differences(rows: list[dict[str, float]], order: str, other: str) -> tuple[float, float]:
    """Mean over seeds of the difference of mean top-1, and half of its 95 % interval."""
    gaps = [row[f"mean_top1_{order}"] - row[f"mean_top1_{other}"] for row in rows]
    return statistics.mean(gaps), STUDENT * statistics.stdev(gaps) / math.sqrt(len(gaps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="class folders with the splits train and test")
    parser.add_argument("--out", type=Path, default=Path("runs/orders"), help="folder of runs and orders")
    parser.add_argument("--results", type=Path, default=Path("evidence/results"), help="folder of the JSON file")
    parser.add_argument("--figures", type=Path, default=Path("docs/evidence"), help="folder of the figures")
    options = parser.parse_args()
    data, out = options.data.resolve(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        train("comae_tiny64", data, out / f"comae_{seed}", f"seed={seed}", *COMAE)
    orders = {
        seed: rank(out / f"comae_{seed}", data, out / f"orders_{seed}", out / f"comae_{(seed + 1) % len(SEEDS)}")
        for seed in SEEDS
    }
    teacher = out / "orders_0" / "orders.parquet"
    rankers, curves = {}, {name: list[dict[str, float]]() for name in CLASSIFIERS}
    for seed in SEEDS:
        run = out / f"ranker_{seed}"
        train("ranker_tiny64", data, run, f"method.orders={teacher}", f"seed={seed}")
        ranked = rank(run, data, out / f"distilled_{seed}")
        distilled = out / f"distilled_{seed}" / "orders.parquet"
        rankers[seed] = {**agreement(teacher, distilled), "seconds_an_image": ranked["seconds_an_image"]["distilled"]}
        files = f"[{teacher},{distilled},centre_out,variance,attention]"
        for name, settings in CLASSIFIERS.items():
            train("cvit_tiny32", data, out / f"{name}_{seed}", *SIZE, settings, f"seed={seed}")
            curves[name].append(keep_curve(out / f"{name}_{seed}", data, out / f"curve_{name}_{seed}", files, seed))
    for seed, found in rankers.items():
        print(f"ranker, seed {seed}: {json.dumps(found)}")
    for name, rows in curves.items():
        print(f"\n| trained on {name} | mean top-1 | collapse minus it |\n|---|---|---|")
        for order in SHOWN:
            mean, half = differences(rows, "collapse", order)
            score = statistics.mean(row[f"mean_top1_{order}"] for row in rows)
            print(f"| {order} | {score:.3f} | {mean:+.3f} ± {half:.3f} |")
    content = {
        "collected_on": describe_machine(),
        "trained_at": {
            run.name: json.loads((run / "run.json").read_text())["commit"]
            for run in sorted(out.iterdir())
            if (run / "run.json").is_file()
        },
        "orders": orders,
        "rankers": rankers,
        "curves": curves,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    options.figures.mkdir(parents=True, exist_ok=True)
    draw(out, options.figures)
    write_atomically(options.results / "orders-clothing.json", json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
