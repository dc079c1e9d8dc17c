"""PART against training from scratch on synthetic sleep EEG, with few labels and with many.

    python evidence/eeg_sweep.py --out runs/eeg_sweep

Synthetic nights (100 subjects for training, 24 others for evaluation), five seeds. For each seed PART trains on the
training subjects without stages. Then a sleep-stage classifier is fine-tuned on fractions of the subjects, from PART's
weights and from random weights, on the same subjects for the same number of steps. Finished cells are kept,
interrupted runs resume. One thread, below 20 minutes of CPU time.

Fixed before the first full run, over the five seeds, intervals by Student's t on paired differences:
  learned     PART's R2 of offsets at the end of training is above 0.05
  possible    from scratch, kappa with all labels is above 0.5 and above that with the smallest fraction
  area        kappa's area over the logarithm of the fraction: PART minus scratch and its interval are above 0
  few labels  the same for the mean kappa over fractions up to 5 %
A criterion that is not met is printed as FAIL. The nights are synthetic: the result says whether the protocol works and
whether pretraining helps there, and nothing about people.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from scipy import stats

import smalti
from smalti.config import write_atomically
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.sleep_samples import write_nights
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.evaluate import evaluate, random_init
from smalti.evaluation.window_tuning import area_under_log
from smalti.models.encoder import Encoder
from smalti.runs.machine import describe_machine
from smalti.runs.train import resume
from smalti.training.logs import read_csv

SEEDS = (0, 1, 2, 3, 4)
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
FEW = 0.05
ARMS = ("part", "scratch")
NIGHTS = {"num_train": 100, "num_test": 24, "epochs": 12}
PRETRAINING: dict[str, Any] = {
    "encoder": {"patch_size": 100, "embed_dim": 64, "depth": 3, "num_heads": 4},
    "data": {"signal": {"window_s": 2.0}},
    "method": {"num_patches": 8, "num_pairs": 64},
    "optim": {"lr": 1e-3, "clip_norm": 1.0},
    "batch_size": 32,
    "steps": 2500,
    "log": {"every": 100},
    "checkpoint": {"every": 500},
    "devices": "cpu",
}
FINE_TUNING: dict[str, Any] = {"steps": 200, "batch_size": 32, "learning_rate": 1e-3}
LEARNED, POSSIBLE, LEVEL = 0.05, 0.5, 0.95


def pretrained(seed: int, data: Path, out: Path) -> tuple[Encoder, dict[str, float]]:
    """PART's encoder for a seed and its training log's last row; trained or resumed where it is not finished."""
    run, file = out / f"part_{seed}", out / "cells" / f"pretraining_{seed}.json"
    if not file.exists():
        started = time.process_time()
        if (run / "config.yaml").exists():
            resume(run, quiet=True)
        else:
            smalti.train("part", data, run, overrides={**PRETRAINING, "seed": seed}, quiet=True)
        last = read_csv(run / "log.csv")[-1]
        found = {name: float(last[name]) for name in ("r2", "loss", "effective_rank")}
        write_atomically(file, json.dumps({**found, "cpu_s": time.process_time() - started}))
    return smalti.load(run, quiet=True), json.loads(file.read_text())


def cell(arm: str, fraction: float, seed: int, encoder: Encoder, data: Path, out: Path) -> dict[str, float]:
    """Kappa of one fine-tuning; computed if missing."""
    file = out / "cells" / f"{arm}_{fraction:g}_{seed}.json"
    if not file.exists():
        started = time.process_time()
        config = EvalConfig(
            protocols=("sleep-staging",),
            seed=seed,
            baseline=False,
            signal=SignalConfig(),
            own={"sleep-staging": {**FINE_TUNING, "fractions": (fraction,)}},
        )
        result = evaluate(encoder, f"{arm}, seed {seed}", str(data), config)[0]
        content = {**result.metrics, "subjects": result.settings["label_sweep"][0]["subjects"]}
        write_atomically(file, json.dumps({**content, "cpu_s": time.process_time() - started}))
    return json.loads(file.read_text())


def student(values: list[float]) -> tuple[float, float, float]:
    """Mean and its interval over seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def verdicts(
    kappas: dict[str, list[list[float]]], fractions: list[float], r2: list[float]
) -> list[tuple[str, bool, str]]:
    """Name of each criterion, whether it is met, and the numbers; ``kappas[arm][seed][fraction]``."""
    part, scratch = (kappas[arm] for arm in ARMS)
    whole, least = (statistics.mean(curve[place] for curve in scratch) for place in (-1, 0))
    few = [place for place, fraction in enumerate(fractions) if fraction <= FEW]
    rows = [
        ("learned", statistics.mean(r2) > LEARNED, f"R2 {statistics.mean(r2):.4f}, above {LEARNED:g} is needed"),
        (
            "possible",
            whole > POSSIBLE and whole > least,
            f"scratch: kappa {whole:.3f} with {fractions[-1]:.0%}, {least:.3f} with {fractions[0]:.0%} of the subjects",
        ),
    ]
    areas = [area_under_log(fractions, a) - area_under_log(fractions, b) for a, b in zip(part, scratch, strict=True)]
    at_few = [
        statistics.mean(a[i] for i in few) - statistics.mean(b[i] for i in few)
        for a, b in zip(part, scratch, strict=True)
    ]
    for name, gaps in (("area", areas), ("few labels", at_few)):
        mean, low, high = student(gaps)
        each = ", ".join(f"{gap:+.3f}" for gap in gaps)
        rows.append(
            (name, bool(low > 0), f"PART minus scratch {mean:+.4f} [{low:+.4f}, {high:+.4f}], each seed {each}")
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/eeg_sweep"), help="folder of nights, runs and cells")
    parser.add_argument("--results", type=Path, default=Path("evidence/results"), help="folder of the JSON file")
    parser.add_argument("--figures", type=Path, default=Path("docs/evidence"), help="folder of the figure")
    parser.add_argument("--only", metavar="ARM:FRACTION:SEED", help="do one cell, with its pretraining, and stop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = options.out / "nights"
    if not (data / "recordings.csv").exists():
        write_nights(data, **NIGHTS, seed=0)
    chosen = options.only.split(":") if options.only else None
    seeds = [int(chosen[2])] if chosen else list(SEEDS)
    fractions = [float(chosen[1])] if chosen else list(FRACTIONS)
    arms = [chosen[0]] if chosen else list(ARMS)
    kappas: dict[str, list[list[float]]] = {arm: [] for arm in arms}
    pretraining, cpu_s = [], 0.0
    for seed in seeds:
        trained, how = pretrained(seed, data, options.out)
        pretraining.append(how)
        cpu_s += how["cpu_s"]
        print(f"seed {seed}: PART, R2 {how['r2']:.4f}, {how['cpu_s']:.0f} s of CPU", flush=True)
        encoders = {"part": trained, "scratch": random_init(trained, seed)}
        for arm in arms:
            curve = []
            for fraction in fractions:
                found = cell(arm, fraction, seed, encoders[arm], data, options.out)
                cpu_s += found["cpu_s"]
                curve.append(found["kappa"])
                print(
                    f"seed {seed}: {arm}, {fraction:.0%}: kappa {found['kappa']:.3f}, {found['cpu_s']:.0f} s",
                    flush=True,
                )
            kappas[arm].append(curve)
    if chosen:
        return
    lines = ["| fraction of subjects | PART | from scratch | paired difference, 95 % over seeds |", "|---|---|---|---|"]
    for place, fraction in enumerate(fractions):
        values = {arm: [curve[place] for curve in kappas[arm]] for arm in arms}
        cells = [f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" for v in values.values()]
        mean, low, high = student([a - b for a, b in zip(*values.values(), strict=True)])
        lines.append(f"| {fraction:.0%} | {cells[0]} | {cells[1]} | {mean:+.3f} [{low:+.3f}, {high:+.3f}] |")
    print("\n".join(lines))
    rows = verdicts(kappas, fractions, [how["r2"] for how in pretraining])
    for name, is_met, numbers in rows:
        print(f"{'pass' if is_met else 'FAIL'}  {name}: {numbers}")
    print(f"CPU time of all cells: {cpu_s / 60:.1f} minutes")
    content = {
        "kappa": kappas,
        "fractions": fractions,
        "seeds": seeds,
        "pretraining": pretraining,
        "criteria": [{"name": name, "met": is_met, "numbers": numbers} for name, is_met, numbers in rows],
        "settings": {"nights": NIGHTS, "pretraining": PRETRAINING, "fine_tuning": FINE_TUNING},
        "cpu_s": cpu_s,
        "date": time.strftime("%Y-%m-%d"),
        **describe_machine(),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    options.figures.mkdir(parents=True, exist_ok=True)
    (options.results / "eeg-sweep.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(kappas, fractions, options.figures / "eeg-sweep.png")


def draw(kappas: dict[str, list[list[float]]], fractions: list[float], path: Path) -> None:
    """Each seed as a thin line, the mean as a thick one."""
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for arm, colour in zip(ARMS, ("#2a6f97", "#999999"), strict=True):
        for curve in kappas[arm]:
            axes.plot(fractions, curve, color=colour, linewidth=0.6, alpha=0.6)
        axes.plot(
            fractions,
            [statistics.mean(at) for at in zip(*kappas[arm], strict=True)],
            color=colour,
            label=arm,
            marker="o",
        )
    axes.set_xscale("log")
    axes.set_xticks(fractions, [f"{fraction:.0%}" for fraction in fractions])
    axes.set_xlabel("fraction of the training subjects with labels")
    axes.set_ylabel("Cohen's kappa, 24 other subjects")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title("synthetic sleep EEG; thin lines: seeds", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
