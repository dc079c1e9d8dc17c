"""CoMAE's orders on CIFAR-10 (experiment E2): do they depend on the image and on the seed, and are they useful?

    python evidence/comae_cifar.py --train DIR --test DIR --form smoke --out runs/comae_cifar

``--train`` and ``--test`` are folders of 32x32 images. Four runs of CoMAE: the paper's objective, the same without the
contrastive term, with a budget (robust), and robust with a second seed; sigma 0.3 in all. The orders of held-out images
are compared with one another. A run of ``prefix``, independent of CoMAE, scores them against random orders.
Forms: ``smoke`` (16 tokens, 2 blocks, 300 steps: minutes on a CPU, numbers without verdicts), ``session`` (64 tokens, 4
blocks, 5,000 steps; a GPU) and ``full`` (15,000 steps).

Fixed before any run; printed as verdicts in the other forms only:
  H2.1  polarisation: the effective count of the paper's run falls by a fifth or more from the first step
  H2.2  with the contrastive term rows are less similar and L_r is not worse
  H2.3  variance of ranks explained by position: below 0.7 image-specific, above 0.9 static, between them mixed
  H2.4  AUC_q(collapse) < AUC_q(random), interval over images (robust)
  H2.5  Spearman's correlation of PageRank and in-strength above 0.95: PageRank adds nothing
  H2.6  Spearman's correlation of two seeds above 0.6, else the order is no property of the data
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import smalti
from smalti.data.images.folders import open_images
from smalti.ranking.rank import RankConfig, Ranking, rank
from smalti.runs.machine import describe_machine
from smalti.runs.train import resume
from smalti.training.launch import resolve_devices
from smalti.training.logs import read_csv

FORMS: dict[str, dict[str, Any]] = {
    "smoke": {"patch": 8, "dims": (32, 32), "depth": 2, "heads": (2, 2), "targets": 8, "batch": 32, "steps": 300},
    "session": {"patch": 4, "dims": (64, 128), "depth": 4, "heads": (4, 8), "targets": 16, "batch": 128, "steps": 5000},
    "full": {"patch": 4, "dims": (64, 128), "depth": 4, "heads": (4, 8), "targets": 16, "batch": 128, "steps": 15000},
}
RUNS: dict[str, tuple[int, dict[str, float]]] = {
    "paper": (0, {"budget_weight": 0.0}),
    "paper_without_contrast": (0, {"budget_weight": 0.0, "contrast_weight": 0.0}),
    "robust": (0, {}),
    "robust_1": (1, {}),
}
NUM_HELD_OUT = 256


def train(name: str, form: dict[str, Any], data: str, out: Path) -> Path:
    """A run of CoMAE, or of ``prefix`` (``predictor``); trained or resumed where it is not finished."""
    run = out / name
    if (run / "config.yaml").exists():
        resume(run, quiet=True)
        return run
    shared: dict[str, Any] = {
        "tokens": {"kind": "pca", "patch_size": form["patch"], "dim": 16},
        "data": {"image_size": 32},
        "batch_size": form["batch"],
        "steps": form["steps"],
        "optim": {"lr": 5e-4},
        "log": {"every": max(1, form["steps"] // 30)},
        "checkpoint": {"every": max(1, form["steps"] // 5)},
    }
    if name == "predictor":
        smalti.train("prefix", data, run, overrides=shared, quiet=True)
        return run
    seed, method = RUNS[name]
    nets = zip(("encoder", "decoder"), form["dims"], form["heads"], strict=True)
    own = {
        f"{net}_{what}": value
        for net, dim, heads in nets
        for what, value in (("dim", dim), ("num_heads", heads), ("depth", form["depth"]))
    }
    own |= {"num_targets": form["targets"], **method}
    smalti.train("comae", data, run, overrides={**shared, "seed": seed, "method": own}, quiet=True)
    return run


def held_out(folder: str, out: Path) -> str:
    """A list of evenly spaced test images."""
    paths = open_images(folder).paths
    file = out / "held_out.txt"
    file.write_text("".join(f"{paths[i * len(paths) // NUM_HELD_OUT].resolve()}\n" for i in range(NUM_HELD_OUT)))
    return str(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="folder of training images")
    parser.add_argument("--test", required=True, help="folder of held-out images")
    parser.add_argument("--form", choices=list(FORMS), default="smoke", help="size of the runs")
    parser.add_argument("--out", type=Path, default=Path("runs/comae_cifar"), help="folder of runs and orders")
    parser.add_argument("--results", type=Path, default=Path("evidence/results"), help="folder of the JSON file")
    options = parser.parse_args()
    form, out = FORMS[options.form], options.out / options.form
    kind = resolve_devices("auto").kind
    if kind == "cpu":
        torch.set_num_threads(1)
    started = time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    predictor = train("predictor", form, options.train, out)
    runs = {name: train(name, form, options.train, out) for name in RUNS}
    images = held_out(options.test, out)
    ranked: dict[str, Ranking] = {}
    for name, run in runs.items():
        ranked[name] = rank(
            str(run),
            images,
            out / f"{name}.parquet",
            RankConfig(),
            both_flips=False,
            against=str(out / "robust.parquet") if name == "robust_1" else None,
            predictor=str(predictor),
            device=torch.device(kind),
        )
    logs = {name: read_csv(run / "log.csv") for name, run in runs.items()}
    found: dict[str, dict[str, float]] = {}
    for name, ranking in ranked.items():
        first, last = logs[name][0], logs[name][-1]
        own = ranking.described["collapse"]
        collapse = ranking.curve_scores["collapse"]["auc_q"]
        found[name] = {
            "effective_count_first": float(first["mask_effective_count"]),
            "effective_count": float(last["mask_effective_count"]),
            "mean_weight": float(last["mean_weight"]),
            "row_cosine": float(last["row_cosine"]),
            "reconstruction": float(last["loss/reconstruction"]),
            "position_variance_ratio": own["position_variance_ratio"],
            "score_spread": own["score_spread"],
            "pagerank_in_strength": ranking.agreements[("collapse", "in_strength")]["spearman"],
            "auc_q": collapse.value,
            "auc_q_less_random": collapse.difference,
            "low": collapse.difference_low,
            "high": collapse.difference_high,
            **{f"auc_q_{order}": numbers["auc_q"].value for order, numbers in ranking.curve_scores.items()},
        }
        print(name, json.dumps({key: round(value, 4) for key, value in found[name].items()}), flush=True)
    seeds = ranked["robust_1"].against["collapse"]["spearman"]
    paper, without, robust = (found[name] for name in ("paper", "paper_without_contrast", "robust"))
    fall = 1 - paper["effective_count"] / paper["effective_count_first"]
    ratio = robust["position_variance_ratio"]
    rows = [
        (
            "H2.1",
            fall >= 0.2,
            f"effective count {paper['effective_count_first']:.1f} to {paper['effective_count']:.1f}",
        ),
        (
            "H2.2",
            paper["row_cosine"] < without["row_cosine"] and paper["reconstruction"] <= without["reconstruction"],
            f"similarity of rows {paper['row_cosine']:.3f} with, {without['row_cosine']:.3f} without; "
            f"L_r {paper['reconstruction']:.3f}, {without['reconstruction']:.3f}",
        ),
        (
            "H2.3",
            None,
            f"variance explained by position {ratio:.3f}; the paper's objective {paper['position_variance_ratio']:.3f}",
        ),
        (
            "H2.4",
            True if robust["high"] < 0 else (False if robust["low"] > 0 else None),
            f"collapse minus random {robust['auc_q_less_random']:+.4f} [{robust['low']:+.4f}, {robust['high']:+.4f}]",
        ),
        ("H2.5", robust["pagerank_in_strength"] > 0.95, f"Spearman {robust['pagerank_in_strength']:.3f}"),
        ("H2.6", seeds > 0.6, f"Spearman of two seeds {seeds:.3f}"),
    ]
    words = {True: "confirmed", False: "refuted", None: "inconclusive"}
    for name, met, text in rows:
        verdict = "no verdict (smoke run)" if options.form == "smoke" else words[met]
        if name == "H2.3" and options.form != "smoke":
            verdict = "image-specific" if ratio < 0.7 else "static" if ratio > 0.9 else "mixed"
        print(f"{verdict}  {name}: {text}")
    content = {
        "form": options.form,
        "settings": form,
        "runs": found,
        "seeds_spearman": seeds,
        "numbers": [{"name": name, "numbers": text} for name, _, text in rows],
        "cpu_s": time.process_time() - started,
        "date": time.strftime("%Y-%m-%d"),
        **describe_machine(),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"comae-cifar-{options.form}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
