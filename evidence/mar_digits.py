"""MAR and CMAR on scikit-learn's digits: are samples digits, and does the order of tokens matter? The CPU form of E4.

    python evidence/mar_digits.py --out runs/mar_digits

8x8 images in 2x2 patches, 16 tokens. One CoMAE gives each image's collapse order. For each seed one MAR is trained in
random orders and fine-tuned from there in arms of equal length: random (R+, the control that the paper lacks), collapse
(C), collapse_reversed, fixed_random, collapse_static, halton. FD-cls is the Fréchet distance of 32 features of a
digits classifier that is trained once; it is not FID. Fixed before the first run: everything below.

H4.1 FD(C) < FD(R+) at each arm's best guidance and at equal guidance; H4.2 FD(C) < FD(reversed); H4.3 FD(C) against
fixed_random, collapse_static, halton; H4.4 with a mixture head, bits per dimension of test images, each arm in its own
order: a difference of 0.01 counts; H4.5 bank, class_mean and global_mean orders within one standard error. Differences
are by seed, two-sided 95 % t-interval: pass, fail, or inconclusive where it holds 0 or there is one seed. A run this
small shows that the parts work together; its numbers are no evidence about the paper's claims.

Finished cells in ``--out`` are kept; verdicts use the cells that exist.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.config import write_atomically
from smalti.data.images.folders import open_images, read_image
from smalti.data.images.image_set import ImageSet
from smalti.data.order_files import read_orders, write_orders
from smalti.data.views import Views
from smalti.functional.distributions import (
    bootstrap_error,
    classifier_score,
    frechet_distance,
    kernel_distance,
    resamples,
    within_manifold,
)
from smalti.functional.graphs import descending, pagerank
from smalti.functional.orders import image_dependence, random_orders
from smalti.layers.tokens import TokenConfig, build_tokens
from smalti.methods.base import TokenMethod
from smalti.methods.cmar import CMAR, CMARConfig
from smalti.methods.comae import CoMAE, CoMAEConfig
from smalti.methods.mar import MAR, MARConfig, SamplerConfig
from smalti.report.samples import film_strip, picture_grid, write_png
from smalti.runs.generate import choose_orders, draw_images, image_keys
from smalti.runs.machine import describe_machine
from smalti.training.optim import OptimConfig, apply_schedules, build_optimizer, clip_gradients

ARMS = ("random", "collapse", "halton", "collapse_reversed", "collapse_static", "fixed_random")
MANY, FEW, NLL_SEEDS = 5, 3, 5
"""Number of seeds of random and collapse; of the other arms; of the mixtures."""
NLL_ARMS = ("random", "collapse", "halton")
CFGS = (1.0, 1.5, 2.0, 3.0)
SOURCES = ("bank", "class_mean", "global_mean")
SOURCE_CFG = 1.5
WAYS: dict[str, dict[str, Any]] = {
    "a token each": {"iterations": 16},
    "all tokens at once": {"iterations": 1},
    "decoder on needed tokens": {"decoder": "needed"},
    "without the clip": {"clip": None},
}
"""Other ways to sample from seed 0's MAR at guidance 1.5."""
NUM_SAMPLES, REPEATS, ITERATIONS, DIFFUSION_STEPS = 720, 20, 8, 25
STEPS, TUNE_STEPS, BATCH, COMAE_STEPS, COMAE_BATCH, CLASSIFIER_STEPS = 2000, 400, 64, 1500, 16, 600
LEVEL = 1 / 16
"""Step of a pixel in 0..1: digits have 17 levels."""
NETWORK: dict[str, Any] = {
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 2,
    "decoder_depth": 2,
    "num_heads": 4,
    "buffer_size": 4,
    "dropout": 0.0,
    "head_depth": 2,
    "head_width": 128,
    "clip": 5.0,
    "ema_momentum": 0.995,
    "flip_prob": 0.0,
}
MIXTURE: dict[str, Any] = {"head": "mixture", "dequantization": LEVEL}
MAR_OPTIM = OptimConfig(
    lr=1e-3, betas=(0.9, 0.95), weight_decay=0.02, warmup_ratio=0.05, after_warmup="constant", clip_norm=3.0
)
TUNE_OPTIM = OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02, warmup_ratio=0.1, clip_norm=3.0)
COMAE_OPTIM = OptimConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup_ratio=0.02, clip_norm=None)
COMAE = CoMAEConfig(
    encoder_dim=32,
    encoder_depth=3,
    encoder_num_heads=4,
    decoder_dim=64,
    decoder_depth=3,
    decoder_num_heads=4,
    alternate=False,
    flip_prob=0.0,
    num_diagnosed=0,
)


@dataclasses.dataclass(frozen=True)
class Digits:
    """A split, in the order of its image set."""

    images: Tensor
    """``(n, 1, 8, 8)`` uint8."""
    labels: Tensor
    """``(n,)``."""
    files: ImageSet


def write_digits(root: Path) -> None:
    """The digits as PNG files, SPLIT/CLASS/NUMBER.png; a fifth, stratified by class, is the test split."""
    digits = load_digits()
    numbers = np.arange(len(digits.target))
    parts = train_test_split(numbers, test_size=360, stratify=digits.target, random_state=0)
    for split, chosen in zip(("train", "test"), parts, strict=True):
        for number in chosen:
            pixels = np.round(digits.images[number] * LEVEL * 255).astype(np.uint8)
            write_png(root / split / str(digits.target[number]) / f"{number:04d}.png", pixels)


def read_digits(root: Path, split: str) -> Digits:
    """A split as tensors."""
    files = open_images(str(root)).subset(split)
    pixels = np.stack([read_image(path, 1) for path in files.paths])
    labels = torch.tensor([int(sample.label or 0) for sample in files.samples])
    return Digits(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels, files)


def as_views(data: Digits, chosen: Tensor, keys: Tensor) -> Views:
    """A batch."""
    nothing = torch.zeros(len(chosen), dtype=torch.bool)
    return Views(
        crops=(data.images[chosen],),
        boxes=torch.tensor([[0.0, 0.0, 8.0, 8.0]]).repeat(len(chosen), 1),
        flips=nothing,
        source_size=torch.full((len(chosen), 2), 8),
        index=chosen,
        keys=keys,
        labels=data.labels[chosen],
    )


def train(method: TokenMethod, data: Digits, optim: OptimConfig, steps: int, batch: int, seed: int) -> list[float]:
    """Train in memory; the loss of each step. All arms of a seed see the same images and random numbers."""
    optimizer = build_optimizer(method.param_groups(), optim)
    generator = torch.Generator().manual_seed(seed)
    losses, left = [], torch.empty(0, dtype=torch.int64)
    method.train()
    torch.manual_seed(seed)
    for step in range(steps):
        if len(left) < batch:
            left = torch.cat([left, torch.randperm(len(data.labels), generator=generator)])
        chosen, left = left[:batch], left[batch:]
        keys = torch.arange(batch) + batch * step + 10**9 * seed
        apply_schedules(optimizer, optim, peak=float(optim.lr or 0), progress=step / steps)
        terms = method(as_views(data, chosen, keys), step / steps)
        loss = torch.stack(list(terms.values())).sum()
        torch.autograd.backward(loss)
        method.after_backward(step / steps)
        clip_gradients([p for p in method.parameters() if p.requires_grad], optim)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(step / steps)
        losses.append(float(loss.detach()))
    method.eval()
    return losses


class Classifier(nn.Module):
    """A small convolutional network with 32 features before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(1024, 32),
            nn.ReLU(),
        )
        self.out = nn.Linear(32, 10)

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and class probabilities of images in 0..1, rounded to a pixel's levels as files are."""
        rounded = (images.clamp(0, 1) * 255).round() / 255
        parts = [self.body(part - 0.5) for part in rounded.split(500)]
        features = torch.cat(parts)
        return features, self.out(features).softmax(1)


def classifier(out: Path, data: Digits, test: Digits) -> tuple[Classifier, float]:
    """The classifier, trained once, whose features are used for distances; and its accuracy on the test split."""
    torch.manual_seed(0)
    network = Classifier()
    path = out / "classifier.safetensors"
    if path.is_file():
        network.load_state_dict(load_file(path))
    else:
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
        generator = torch.Generator().manual_seed(0)
        for _ in range(CLASSIFIER_STEPS):
            chosen = torch.randint(len(data.labels), (128,), generator=generator)
            features = network.body(data.images[chosen].float() / 255 - 0.5)
            loss = F.cross_entropy(network.out(features), data.labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        save_file(network.state_dict(), path)
    network.eval()
    _, probabilities = network.look(test.images.float() / 255)
    return network, float((probabilities.argmax(1) == test.labels).float().mean())


def tokens_for(data: Digits, kind: str = "pixels") -> Any:
    """2x2 pixels per token, scaled on the training images."""
    source = build_tokens(TokenConfig(kind=kind, patch_size=2), 8, 1)
    source.fit([data.images])
    return source


def rank(out: Path, root: Path, data: Digits, test: Digits) -> dict[str, float]:
    """Write the collapse orders of all images; the numbers say how far they are one order for all."""
    path, note = out / "orders.parquet", out / "orders.json"
    if not path.is_file():
        torch.manual_seed(0)
        comae = CoMAE(tokens_for(data), COMAE)
        losses = train(comae, data, COMAE_OPTIM, COMAE_STEPS, COMAE_BATCH, 0)
        both = torch.cat([data.images, test.images])
        scores = torch.cat([pagerank(comae.dependency(part), method="solve") for part in both.split(200)])
        orders = descending(scores)
        files = open_images(str(root))
        names = [*data.files.names, *test.files.names]
        write_orders(
            path,
            images=names,
            splits=["train"] * len(data.labels) + ["test"] * len(test.labels),
            flips=[False] * len(names),
            orders={"collapse": orders},
            scores={"collapse": scores.float()},
            grid=(4, 4),
            image_size=8,
            root=str(files.root),
            source="evidence/mar_digits.py",
        )
        spread = float((16 * (scores.amax(1) - scores.amin(1))).mean())
        found = {"loss": statistics.mean(losses[-100:]), "score_spread": spread, **image_dependence(orders)}
        write_atomically(note, json.dumps(found))
    return json.loads(note.read_text())


def build(kind: str, seed: int, data: Digits, arm: str | None = None, orders: Path | None = None) -> MAR:
    """A MAR, or the CMAR of an arm, randomly initialised from a seed; ``kind`` is ``diffusion`` or ``mixture``."""
    settings = {**NETWORK, **(MIXTURE if kind == "mixture" else {})}
    torch.manual_seed(seed)
    if arm is None:
        return MAR(tokens_for(data), MARConfig(**settings))
    cmar = CMAR(tokens_for(data), CMARConfig(**settings, order=arm, orders=str(orders)))
    cmar.bind(data.files, 8)
    return cmar


def trained(out: Path, kind: str, seed: int, data: Digits, arm: str | None = None) -> MAR:
    """A trained MAR, or an arm fine-tuned from it; read from its file if it exists."""
    method = build(kind, seed, data, arm, out / "orders.parquet")
    path = out / "weights" / f"{kind}_{seed}_{arm or 'mar'}.safetensors"
    if path.is_file():
        method.load_state_dict(load_file(path))
        return method.eval()
    started = time.process_time()
    if arm is None:
        losses = train(method, data, MAR_OPTIM, STEPS, BATCH, seed)
    else:
        method.start_from(trained(out, kind, seed, data))
        losses = train(method, data, TUNE_OPTIM, TUNE_STEPS, BATCH, 100 + seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(method.state_dict(), path)
    cost = time.process_time() - started
    print(f"{path.stem}: loss {statistics.mean(losses[-50:]):.4f}, {cost:.0f} s of one core", flush=True)
    return method.eval()


def compare(features: Tensor, reference: Tensor, seed: int = 0) -> dict[str, float]:
    """Distances of the features of samples to those of real images."""
    places = resamples(len(features), REPEATS, seed)
    return {
        "fd": frechet_distance(features, reference),
        "fd_error": bootstrap_error(lambda rows: frechet_distance(features[rows], reference), places),
        "kd": float(kernel_distance(features, reference)[0]),
        "precision": float(within_manifold(features, reference).float().mean()),
        "recall": float(within_manifold(reference, features).float().mean()),
    }


def sample(
    out: Path,
    seed: int,
    arm: str | None,
    cfg: float,
    source: str,
    data: Digits,
    test: Digits,
    network: Classifier,
    way: str = "",
) -> dict[str, Any]:
    """Sample and evaluate; read from its file if it exists. ``way``: one of ``WAYS``; empty: the default sampler."""
    name = f"{seed}_{arm or 'mar'}_{cfg:g}_{source}" + (f"_{way.replace(' ', '_')}" if way else "")
    path = out / "cells" / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    method = trained(out, "diffusion", seed, data, arm)
    changed = dict(WAYS.get(way, {}))
    if "clip" in changed:
        method.config = dataclasses.replace(method.config, clip=changed.pop("clip"))
    sampler = {"iterations": ITERATIONS, "cfg": cfg, "steps": DIFFUSION_STEPS, "temperature": 1.0, **changed}
    started = time.process_time()
    labels = [number % 10 for number in range(NUM_SAMPLES)]
    keys = image_keys(seed, range(NUM_SAMPLES))
    cache = read_orders(out / "orders.parquet")
    names = tuple(str(number) for number in range(10))
    orders = choose_orders(arm or "random", source, cache, labels, keys, (4, 4), names)
    parts: list[Tensor] = []
    film, rate = draw_images(
        method,
        orders,
        labels,
        seed=seed,
        sampler=SamplerConfig(**sampler),
        batch_size=240,
        keep=lambda first, images: parts.append(images),
        film_images=6,
    )
    images = torch.cat(parts)
    assert film is not None
    write_png(out / "pictures" / f"{name}.png", picture_grid(images[:80], 10))
    write_png(out / "pictures" / f"{name}_film.png", film_strip(film))
    features, probabilities = network.look(images)
    result = {
        "seed": seed,
        "arm": arm or "mar",
        "cfg": cfg,
        "source": source,
        "way": way,
        "cpu_s": time.process_time() - started,
        "as_asked": float((probabilities.argmax(1) == torch.tensor(labels)).float().mean()),
        "classifier_score": classifier_score(probabilities.double()),
        "train": compare(features, network.look(data.images.float() / 255)[0]),
        "test": compare(features, network.look(test.images.float() / 255)[0]),
        "images_per_s": rate,
    }
    write_atomically(path, json.dumps(result))
    print(f"{name}: FD-cls {result['train']['fd']:.3f}, as asked {result['as_asked']:.3f}", flush=True)
    return result


def likelihood(out: Path, seed: int, arm: str, data: Digits, test: Digits) -> dict[str, Any]:
    """Bits per dimension of test images in an arm's own order: 17 levels, an upper bound."""
    path = out / "cells" / f"nll_{seed}_{arm}.json"
    if path.is_file():
        return json.loads(path.read_text())
    method = trained(out, "mixture", seed, data, arm)
    keys = torch.arange(len(test.labels)) + 10**12
    tokens = method.encode(test.images, keys)
    if arm == "random":
        orders = random_orders(keys, 16)
    elif arm == "halton":
        orders = choose_orders(arm, "bank", None, test.labels.tolist(), keys, (4, 4), ())
    else:
        cache = read_orders(out / "orders.parquet")
        orders = cache.orders(arm, list(test.files.names), [False] * len(test.labels))
    nats = -method.log_likelihood(tokens, orders, test.labels).sum(1).double() / 64
    bits = nats / math.log(2) + math.log2(float(method.tokens.scale)) - math.log2(LEVEL)
    result = {"seed": seed, "arm": arm, "bits_per_dim": float(bits.mean()), "error": float(bits.std()) / 360**0.5}
    write_atomically(path, json.dumps(result))
    print(f"mixture {seed} {arm}: {result['bits_per_dim']:.4f} bits/dim", flush=True)
    return result


def paired(first: dict[int, float], second: dict[int, float], threshold: float = 0.0) -> dict[str, Any]:
    """Mean difference first - second by seed with its 95 % t-interval: pass where it lies below ``-threshold``."""
    seeds = sorted(set(first) & set(second))
    gaps = [first[seed] - second[seed] for seed in seeds]
    found: dict[str, Any] = {"seeds": len(gaps), "difference": statistics.mean(gaps) if gaps else None}
    if len(gaps) < 2:
        return {**found, "verdict": "inconclusive", "why": "fewer than two seeds"}
    half = float(stats.t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / len(gaps) ** 0.5
    low, high = found["difference"] - half, found["difference"] + half
    is_large = abs(found["difference"]) >= threshold
    verdict = "pass" if high < 0 and is_large else "fail" if low > 0 and is_large else "inconclusive"
    return {**found, "interval": [low, high], "verdict": verdict}


def conclude(cells: list[dict[str, Any]], nlls: list[dict[str, Any]]) -> dict[str, Any]:
    """Every hypothesis with the numbers behind it."""

    def fds(arm: str, cfg: float, source: str = "bank") -> dict[int, float]:
        return {
            cell["seed"]: cell["train"]["fd"]
            for cell in cells
            if (cell["arm"], cell["cfg"], cell["source"]) == (arm, cfg, source) and not cell.get("way")
        }

    best = {arm: min(CFGS, key=lambda cfg: statistics.mean(fds(arm, cfg).values() or [math.inf])) for arm in ARMS}
    at_best = {arm: fds(arm, best[arm]) for arm in ARMS}
    bits = {arm: {cell["seed"]: cell["bits_per_dim"] for cell in nlls if cell["arm"] == arm} for arm in NLL_ARMS}
    sources = {}
    for source in SOURCES:
        values = list(fds("collapse", SOURCE_CFG, source).values())
        sources[source] = {
            "fd": statistics.mean(values) if values else None,
            "error": statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None,
        }
    known = [one for one in sources.values() if one["fd"] is not None and one["error"] is not None]
    if len(known) == len(SOURCES):
        spread = max(one["fd"] for one in known) - min(one["fd"] for one in known)
        within = "pass" if spread <= max(one["error"] for one in known) else "fail"
    else:
        spread, within = None, "inconclusive"
    return {
        "best_cfg": best,
        "H4.1 at best guidance": paired(at_best["collapse"], at_best["random"]),
        **{f"H4.1 at guidance {cfg:g}": paired(fds("collapse", cfg), fds("random", cfg)) for cfg in CFGS},
        "H4.2 against collapse_reversed": paired(at_best["collapse"], at_best["collapse_reversed"]),
        **{
            f"H4.3 against {arm}": paired(at_best["collapse"], at_best[arm])
            for arm in ("fixed_random", "collapse_static", "halton")
        },
        "H4.4 collapse against random": paired(bits["collapse"], bits["random"], 0.01),
        "H4.4 collapse against halton": paired(bits["collapse"], bits["halton"], 0.01),
        "H4.5 sources of orders": {"sources": sources, "spread": spread, "verdict": within},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="MAR and CMAR on digits.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="file of the numbers; default: OUT/mar-digits.json")
    parser.add_argument("--seeds", type=int, default=MANY, help="only the first N seeds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    out: Path = arguments.out
    root = out / "digits"
    if not (out / "digits.done").is_file():
        write_digits(root)
        write_atomically(out / "digits.done", "")
    data, test = read_digits(root, "train"), read_digits(root, "test")
    network, accuracy = classifier(out, data, test)
    real, held_out = (network.look(part.images.float() / 255)[0] for part in (data, test))
    floor = compare(held_out, real)
    print(f"classifier: {accuracy:.3f} on test images; real against real: FD-cls {floor['fd']:.3f}", flush=True)
    orders = rank(out, root, data, test)
    print(f"orders: {orders}", flush=True)

    cells: list[dict[str, Any]] = []
    nlls: list[dict[str, Any]] = []

    def draw(seed: int, arm: str | None, cfgs: tuple[float, ...], source: str = "bank") -> None:
        cells.extend(sample(out, seed, arm, cfg, source, data, test, network) for cfg in cfgs)

    seeds = range(min(arguments.seeds, MANY))
    for stage in ("main", "likelihood", "others", "sources", "ways"):  # the most important first
        for seed in seeds:
            if stage == "main":
                draw(seed, None, (SOURCE_CFG,))
                draw(seed, "random", CFGS)
                draw(seed, "collapse", CFGS)
            elif stage == "likelihood" and seed < NLL_SEEDS:
                nlls.extend(likelihood(out, seed, arm, data, test) for arm in NLL_ARMS)
            elif stage == "others" and seed < FEW:
                for arm in ARMS[2:]:
                    draw(seed, arm, CFGS)
            elif stage == "sources":
                for source in SOURCES[1:]:
                    draw(seed, "collapse", (SOURCE_CFG,), source)
            elif stage == "ways" and seed == 0:
                ways = [sample(out, 0, None, SOURCE_CFG, "bank", data, test, network, way) for way in WAYS]
                cells.extend(ways)
            else:
                continue
            content = {
                "machine": describe_machine(),
                "settings": {
                    "network": NETWORK,
                    "steps": STEPS,
                    "tune_steps": TUNE_STEPS,
                    "batch": BATCH,
                    "samples": NUM_SAMPLES,
                    "iterations": ITERATIONS,
                    "diffusion_steps": DIFFUSION_STEPS,
                },
                "classifier_accuracy": accuracy,
                "real_against_real": floor,
                "orders": orders,
                "cells": cells,
                "likelihoods": nlls,
                "verdicts": conclude(cells, nlls),
            }
            write_atomically(arguments.json or out / "mar-digits.json", json.dumps(content, indent=2) + "\n")
            print(f"{stage}: seed {seed} done", flush=True)
    for name, verdict in conclude(cells, nlls).items():
        print(f"{name}: {verdict}")


if __name__ == "__main__":
    main()
