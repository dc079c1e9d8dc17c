"""Orders of patches on photographs of clothing: their properties, accuracy from few patches, cost. By commands.

    python evidence/orders_clothing.py --data CLOTHING --out runs/orders

1. Two runs of the recipe comae_tiny64 (seeds 0 and 1).
2. ``smalti rank``: orders of all images with seed 0, against seed 1.
3. A classifier at 64 px, patches of 8 px, four blocks of width 96, 1,000 steps of 64, on whole images (``full``) and
   with patches dropped by two orders (collapse_static, collapse): ``smalti train cvit``.
4. ``smalti evaluate --protocol keep-curve`` of each, with all orders of the file, on the test photographs.

One seed per classifier, so no verdict about orders. Finished steps in ``--out`` are kept. Half an hour of one core.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from smalti.config import write_atomically
from smalti.runs.machine import describe_machine

COMAE = {"comae_0": 0, "comae_1": 1}
ARMS = {
    "full": ("method.max_rate=0",),
    "collapse_static": ("method.order=collapse_static",),
    "collapse": ("method.order=collapse",),
}
CLASSIFIER = ("data.image_size=64", "encoder.patch_size=8")


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Orders of patches on photographs of clothing.")
    parser.add_argument("--data", type=Path, required=True, help="class folders with the splits train and test")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    data, out = options.data.resolve(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for run, seed in COMAE.items():
        train("comae_tiny64", data, out / run, f"seed={seed}")
    orders = out / "orders" / "orders.parquet"
    if not orders.is_file():
        what = ("--data", data, "--out", out / "orders", "--against", out / "comae_1", "--quiet")
        smalti("rank", out / "comae_0", *what)
    curves = {}
    for name, settings in ARMS.items():
        file = (f"method.orders={orders}",) if name.startswith("collapse") else ()
        train("cvit_tiny32", data, out / name, *CLASSIFIER, *settings, *file)
        found = out / f"{name}_curve.json"
        if not found.is_file():
            what = ("--protocol", "keep-curve", "--data", data, "--out", out / f"{name}_curve", "--json", found)
            smalti("evaluate", out / name, *what, "--quiet", "eval.split=test", f"eval.keep-curve.orders=[{orders}]")
        curves[name] = json.loads(found.read_text())
    content = {
        "collected_on": describe_machine(),
        "trained_at": {run: json.loads((out / run / "run.json").read_text())["commit"] for run in (*COMAE, *ARMS)},
        "orders": json.loads((out / "orders" / "orders.json").read_text()),
        "curves": curves,
    }
    write_atomically(out / "orders-clothing.json", json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
