"""Does PRR pooling give better patch tokens than a class token, without loss of accuracy? On synthetic images.

    python evidence/prr_small.py --out runs/prr

Three arms differ only in ``pool`` (cls, avg, prr) and learn six classes of images with ``supervised``. Then the encoder
is frozen and a linear probe classifies each patch. Fixed before the first run: everything below, seeds 3, 4 and 5 (a
pilot had used 0, 1, 2), and the criteria:

(a) gradients of ``w . pooled`` with respect to the final tokens: exactly 0 on patches with cls, exactly equal with avg,
    none 0, not all equal and those of the paper's formula with prr;
(b) mIoU of patches before the final norm: prr at least 0.05 above cls in every seed;
(c) top-1: the mean of prr at most 2 points below that of cls.

Finished arms in ``--out`` are kept.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.config import write_atomically
from smalti.data.views import Views
from smalti.evaluation.metrics import ConfusionMatrix, class_iou
from smalti.methods.supervised import Supervised, SupervisedConfig
from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder
from smalti.runs.machine import describe_machine
from smalti.training.optim import OptimConfig, apply_schedules, build_optimizer, clip_gradients

SEEDS = (3, 4, 5)
ARMS = ("cls", "avg", "prr")
SIDE, PATCH, NUM_TRAIN, NUM_TEST = 48, 6, 4000, 1200
DATA_SEEDS = {"train": 100, "test": 101}
STEPS, BATCH = 400, 32
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.05, warmup_ratio=60 / STEPS, clip_norm=5.0)
PROBE_STEPS, PROBE_BATCH, PROBE_LR = 400, 4096, 1e-2
ORIENTATIONS, PERIODS = (0.0, math.pi / 3, 2 * math.pi / 3), (3, 6)
BACKGROUND = len(ORIENTATIONS) * len(PERIODS)


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Images with one textured object each, and one distractor figure."""

    images: Tensor
    """``(n, 3, 48, 48)`` float32 in 0..1."""
    labels: Tensor
    """``(n,)`` class of the object: orientation times two, plus period."""
    patches: Tensor
    """``(n, 64)`` class of most pixels of each patch: the object's, or 6 for background and the other figure."""


def figure_mask(rng: np.random.Generator) -> np.ndarray:
    """A disk or a square of equal area somewhere inside: ``(48, 48)`` bool."""
    radius = rng.uniform(0.17, 0.30) * SIDE
    is_disk = rng.random() < 0.5
    half = radius if is_disk else radius * math.sqrt(math.pi) / 2
    y, x = (rng.uniform(half, SIDE - half) for _ in range(2))
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    if is_disk:
        return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    return np.maximum(abs(rows - y), abs(columns - x)) <= half


def scene(rng: np.random.Generator, label: int) -> tuple[np.ndarray, np.ndarray]:
    """An image ``(3, 48, 48)`` and the mask of its object."""
    knots = torch.from_numpy(rng.uniform(-0.12, 0.12, (1, 3, 4, 4)))
    image = 0.5 + F.interpolate(knots, (SIDE, SIDE), mode="bicubic", align_corners=True)[0].numpy()
    image += rng.normal(0, 0.06, image.shape)
    other = figure_mask(rng)
    blocks = np.kron(rng.choice([-0.16, 0.16], (SIDE // 2, SIDE // 2)), np.ones((2, 2)))
    image = np.where(other, rng.uniform(0.3, 0.7, (3, 1, 1)) + blocks, image)
    mask = figure_mask(rng)
    angle = ORIENTATIONS[label // len(PERIODS)] + rng.normal(0, 0.06)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    phase = 2 * math.pi * (rng.random() + (columns * math.cos(angle) + rows * math.sin(angle)) / PERIODS[label % 2])
    image = np.where(mask, rng.uniform(0.3, 0.7, (3, 1, 1)) + 0.22 * np.sin(phase), image)
    return np.clip(image, 0, 1).astype(np.float32), mask


def scenes(split: str, count: int) -> Scenes:
    """All images of a split, determined by its seed."""
    rng = np.random.default_rng(DATA_SEEDS[split])
    labels = rng.integers(0, BACKGROUND, count)
    made = [scene(rng, int(label)) for label in labels]
    masks = torch.from_numpy(np.stack([mask for _, mask in made])).float()
    is_object = F.avg_pool2d(masks[:, None], PATCH).flatten(1) > 0.5
    targets = torch.from_numpy(labels)
    patches = torch.where(is_object, targets[:, None], torch.tensor(BACKGROUND))
    return Scenes(torch.from_numpy(np.stack([image for image, _ in made])), targets, patches)


def batches(data: Scenes, seed: int) -> Iterator[Views]:
    """Endless batches in an order that depends on the seed, without crops or flips."""
    g = torch.Generator().manual_seed(seed)
    nothing = torch.zeros(BATCH, dtype=torch.int64)
    while True:
        for chosen in torch.randperm(len(data.labels), generator=g).split(BATCH):
            yield Views(
                crops=(data.images[chosen],),
                boxes=torch.tensor([[0.0, 0.0, SIDE, SIDE]]).repeat(len(chosen), 1),
                flips=torch.zeros(len(chosen), dtype=torch.bool),
                source_size=torch.full((len(chosen), 2), SIDE),
                index=chosen,
                keys=nothing[: len(chosen)],
                labels=data.labels[chosen],
            )


def build(pool: str, seed: int) -> Supervised:
    """An arm before its first step: equal weights for all arms of a seed."""
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=PATCH, embed_dim=64, depth=3, num_heads=2, seed=seed
    )
    encoder.set_pool(pool)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Supervised(encoder, SupervisedConfig(num_classes=BACKGROUND))


def train(method: Supervised, data: Scenes, seed: int) -> list[float]:
    """Train for 400 steps; the loss of each."""
    optimizer = build_optimizer(method.param_groups(), OPTIM)
    losses = []
    method.train()
    for step, views in zip(range(STEPS), batches(data, seed), strict=False):
        apply_schedules(optimizer, OPTIM, peak=1e-3, progress=step / STEPS)
        loss = method(views, step / STEPS)["class"]
        torch.autograd.backward(loss)
        clip_gradients(method.parameters(), OPTIM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    method.eval()
    return losses


@torch.no_grad()
def in_parts(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply a function to 200 images at a time."""
    return torch.cat([run(part) for part in images.split(200)])


def patch_miou(encoder: Encoder, norm: bool, train_set: Scenes, test_set: Scenes, seed: int) -> float:
    """Mean IoU over 7 classes of patches of a linear probe on frozen tokens, standardised per channel."""
    tokens = [
        in_parts(lambda images: encoder.encode(encoder.normalize(images), norm=norm).patches, part.images).flatten(0, 1)
        for part in (train_set, test_set)
    ]
    mean, std = tokens[0].mean(0), tokens[0].std(0).clamp(min=1e-6)
    fit, held_out = ((part - mean) / std for part in tokens)
    targets = train_set.patches.flatten()
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = nn.Linear(fit.shape[1], BACKGROUND + 1)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=PROBE_LR, weight_decay=1e-4)
    for step in range(PROBE_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = PROBE_LR * (1 + math.cos(math.pi * step / PROBE_STEPS)) / 2
        chosen = torch.randint(len(fit), (PROBE_BATCH,), generator=g)
        loss = F.cross_entropy(probe(fit[chosen]), targets[chosen])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    confusion = ConfusionMatrix(BACKGROUND + 1)
    with torch.no_grad():
        confusion.update(test_set.patches.flatten(), probe(held_out).argmax(1))
    return float(class_iou(confusion.matrix).nanmean())


def mechanism_holds(encoder: Encoder, image: Tensor) -> bool:
    """Criterion (a) for an arm, on its tokens of one image, in float64."""
    encoder = encoder.double()
    with torch.no_grad():
        features = encoder.encode(encoder.normalize(image[None]).double())
    patches, prefix = features.patches.requires_grad_(), features.prefix.requires_grad_()
    weights = torch.randn(encoder.embed_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pooled = encoder.pooled(features._replace(patches=patches, prefix=prefix))
    gradients = torch.autograd.grad((weights * pooled).sum(), [patches, prefix], allow_unused=True)
    of_patches = torch.zeros_like(patches[0]) if gradients[0] is None else gradients[0][0]
    encoder.float()
    if encoder.pool == "cls":
        return bool((of_patches == 0).all())
    if encoder.pool == "avg":
        return bool((of_patches == of_patches[:1]).all() and (of_patches != 0).any())
    tokens = torch.cat([prefix, patches], 1)[0].detach()
    expected = torch.empty_like(tokens)
    width = encoder.embed_dim // encoder.num_heads
    for head in range(encoder.num_heads):  # a_t g + r_t x_0, and for the class token r . x more
        channels = slice(head * width, (head + 1) * width)
        x, g = tokens[:, channels], weights[channels]
        a = (x @ x[0] / math.sqrt(width)).softmax(0)
        r = a * ((x - a @ x) @ g) / math.sqrt(width)
        expected[:, channels] = a[:, None] * g + r[:, None] * x[0]
        expected[0, channels] += r @ x
    found = torch.cat([gradients[1][0], of_patches])
    some = bool((of_patches != 0).all() and (of_patches != of_patches[:1]).any())
    return some and bool(torch.allclose(found, expected, atol=1e-12, rtol=1e-9))


def measure(pool: str, seed: int, train_set: Scenes, test_set: Scenes) -> dict[str, Any]:
    """All numbers of one arm and seed."""
    method = build(pool, seed)
    encoder = method.encoder.eval()
    row: dict[str, Any] = {"arm": pool, "seed": seed}
    row["miou_untrained"] = patch_miou(encoder, False, train_set, test_set, seed)
    started, cpu = time.time(), time.process_time()
    losses = train(method, train_set, seed)
    row |= {"train_s": round(time.time() - started, 1), "train_cpu_s": round(time.process_time() - cpu, 1)}
    logits = in_parts(lambda images: method.head(encoder.image_features(encoder.normalize(images))), test_set.images)
    row["top1"] = float((logits.argmax(1) == test_set.labels).double().mean())
    row["miou"] = patch_miou(encoder, False, train_set, test_set, seed)
    row["miou_after_norm"] = patch_miou(encoder, True, train_set, test_set, seed)
    row["mechanism"] = mechanism_holds(encoder, test_set.images[0])
    row["loss"] = [statistics.mean(losses[i : i + 20]) for i in range(0, STEPS, 20)]
    return row


def verdicts(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The three criteria, each with its numbers."""
    of = {(row["arm"], row["seed"]): row for row in rows}
    gaps = [of["prr", seed]["miou"] - of["cls", seed]["miou"] for seed in SEEDS]
    top1 = {arm: statistics.mean(of[arm, seed]["top1"] for seed in SEEDS) for arm in ARMS}
    return {
        "a": {"passes": all(row["mechanism"] for row in rows), "arms and seeds": len(rows)},
        "b": {"passes": min(gaps) >= 0.05, "prr - cls, each seed": gaps},
        "c": {"passes": top1["prr"] >= top1["cls"] - 0.02, "mean top1": top1},
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Each seed as a dot; untrained encoders in grey."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    shown = (("miou", "patches, before the norm: mIoU"), ("miou_after_norm", "after the norm: mIoU"), ("top1", "top-1"))
    for axis, (name, title) in zip(axes, shown, strict=True):
        for place, arm in enumerate(ARMS):
            mine = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["seed"])
            if name == "miou":
                axis.scatter([place] * len(mine), [row["miou_untrained"] for row in mine], color="#999999")
            axis.scatter([place] * len(mine), [row[name] for row in mine], color="#2a6f97", zorder=3)
        axis.set_xticks(range(len(ARMS)), list(ARMS))
        axis.set_title(title, fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle("blue: trained by image classes alone, grey: untrained; one dot per seed", fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/prr"), help="folder of finished arms")
    parser.add_argument("--results", type=Path, default=Path("evidence/results"), help="folder of the JSON file")
    parser.add_argument("--figures", type=Path, default=Path("docs/evidence"), help="folder of the figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train_set, test_set = scenes("train", NUM_TRAIN), scenes("test", NUM_TEST)
    rows = []
    for seed in SEEDS:
        for arm in ARMS:
            file = options.out / f"{arm}_{seed}.json"
            if not file.exists():
                machine = describe_machine()
                row = measure(arm, seed, train_set, test_set)
                row["commit"] = machine["commit"]
                write_atomically(file, json.dumps(row, indent=1))
            rows.append(json.loads(file.read_text(encoding="utf-8")))
            row = rows[-1]
            print(
                f"{arm} seed {seed}: top-1 {row['top1']:.3f}, mIoU {row['miou']:.3f} (after the norm "
                f"{row['miou_after_norm']:.3f}, untrained {row['miou_untrained']:.3f}), {row['train_cpu_s']} CPU s",
                flush=True,
            )
    found = verdicts(rows)
    for name, verdict in found.items():
        numbers = {key: value for key, value in verdict.items() if key != "passes"}
        print(f"({name}) {'passes' if verdict['passes'] else 'FAILS'}: {numbers}")
    content = {"rows": rows, "criteria": found, "seeds": SEEDS, "data_seeds": DATA_SEEDS, "threads": 1}
    content["share_of_object_pixels"] = float((test_set.patches != BACKGROUND).double().mean())
    content |= {"date": time.strftime("%Y-%m-%d"), **describe_machine()}
    options.results.mkdir(parents=True, exist_ok=True)
    options.figures.mkdir(parents=True, exist_ok=True)
    (options.results / "prr.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw(rows, options.figures / "prr.png")


if __name__ == "__main__":
    main()
