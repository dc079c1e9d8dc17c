"""CViT with several orders on handwritten digits: the CPU form of E3. A smoke run: no verdict.

    python evidence/cvit_smoke.py --out runs/cvit-smoke

Digits of 32 px with 16 patches. A small CoMAE finds the collapse orders of all images and their mirror images. Then one
``smalti compare`` trains an arm for each order (two blocks of width 64, the same steps) and evaluates it with its own
order at rates 0, 0.05 ... 0.95: R random, F one random permutation, S the mean collapse order, X the collapse order of
another image, C collapse, K coverage, H Halton. It shows that all parts work together. Its numbers are no evidence for
or against any order: too few steps, patches and images.

``--orders FILE`` uses a file of ``smalti rank`` instead of the small CoMAE's; ``--arms R F H`` trains some arms only.
"""

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from sklearn.datasets import load_digits

import smalti
from smalti.data.images.folders import open_images
from smalti.ranking.rankers import GraphRanker, rank_images
from smalti.runs.build import load_method

SIDE, PATCH, TEST = 32, 8, 400
ARMS = {
    "R": "random",
    "F": "fixed_random",
    "S": "collapse_static",
    "X": "collapse_shuffled",
    "C": "collapse",
    "K": "coverage",
    "H": "halton",
}
WITHOUT_FILE = ("R", "F", "H")
ENCODER = {"name": "vit_tiny_patch16_224", "patch_size": PATCH, "embed_dim": 64, "depth": 2, "num_heads": 4}
COMAE = {
    "method": {"encoder_dim": 32, "encoder_depth": 2, "decoder_dim": 64, "decoder_depth": 2, "alternate": False},
    "tokens": {"kind": "pca", "patch_size": PATCH, "dim": 8},
    "data": {"image_size": SIDE},
    "batch_size": 32,
    "optim": {"lr": 1e-3},
}


def write_digits(folder: Path) -> Path:
    """Write class folders with the splits train and test, unless they exist."""
    if folder.is_dir():
        return folder
    digits = load_digits()
    for number, place in enumerate(np.random.default_rng(0).permutation(len(digits.target))):
        target = folder / ("test" if number < TEST else "train") / str(digits.target[place])
        target.mkdir(parents=True, exist_ok=True)
        small = (digits.images[place] * 255 / 16).astype(np.uint8)
        cv2.imwrite(str(target / f"{place:04d}.png"), cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC))
    return folder


def rank(data: Path, out: Path, steps: int) -> Path:
    """The file of orders that a small CoMAE finds, trained on the training images."""
    file = out / "orders.parquet"
    if file.is_file():
        return file
    run = smalti.train("comae", data, out / "comae", overrides={**COMAE, "steps": steps}, quiet=True)
    ranker = GraphRanker(load_method(run), int(COMAE["method"]["encoder_dim"]), "a small CoMAE")  # type: ignore[arg-type, index]
    ranked = rank_images(ranker, open_images(data), ("collapse", "coverage"), batch_size=64)
    ranked.write(file, ranker)
    return file


def plan(data: Path, orders: Path | None, arms: list[str], steps: int, seeds: list[int]) -> dict[str, Any]:
    """One plan for all arms; differences are to random."""
    return {
        "data": str(data),
        "evaluate": [{"data": str(data), "split": "test", "protocols": ["keep-curve"], "speed": False}],
        "budget": {"steps": steps},
        "seeds": seeds,
        "settings": {
            "encoder": ENCODER,
            "data.image_size": SIDE,
            "batch_size": 64,
            "optim.lr": 2e-3,
            "drop_path": 0.0,
            "checkpoint.every": 1000,
        },
        "arms": {
            name: {
                "method": {
                    "name": "cvit",
                    "order": ARMS[name],
                    **({} if name in WITHOUT_FILE or orders is None else {"orders": str(orders)}),
                }
            }
            for name in arms
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--orders", type=Path, help="a file of smalti rank for the digits in OUT/digits")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    data = write_digits(given.out / "digits")
    needs_file = bool(set(given.arms) - set(WITHOUT_FILE))
    orders = given.orders or (rank(data, given.out, given.steps) if needs_file else None)
    tree = plan(data, orders, given.arms, given.steps, given.seeds)
    comparison = smalti.compare(tree, given.out / "compare", isolate=False)
    print(f"smoke run, no verdict: {given.steps} steps, {len(given.seeds)} seed(s), 16 patches, {TEST} test images")
    metrics = ("mean_top1", "top1", "top1_drop30", "top1_drop50", "top1_drop78", "knee")
    print(f"{'arm':22}" + "".join(f"{name:>13}" for name in metrics))
    for arm in comparison.arms:
        scores = {row.metric: row.score for row in comparison.rows if row.arm == arm}
        print(f"{arm + ' ' + ARMS[arm]:22}" + "".join(f"{scores[name].mean:13.3f}" for name in metrics))
        print(f"{'':22}  interval of mean_top1 {scores['mean_top1'].low:.3f} to {scores['mean_top1'].high:.3f}")
    for arm, error in comparison.failures.items():
        print(f"{arm} failed: {error}")


if __name__ == "__main__":
    main()
