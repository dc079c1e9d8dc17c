"""Position field and masked position prediction on synthetic scenes: does each help, against controls?

    python evidence/intertwined_small.py --out runs/intertwined
    python evidence/intertwined_small.py --out runs/intertwined-gpu --device cuda

Every arm is a ``smalti train`` run of the method ``intertwined`` on the same 3,000 images without labels, with the same
seeds and data order; only its two components differ:

    base        neither: DINOv2, half of the global crops content-masked
    content100  base with every global crop content-masked: the control for the patch loss that L_pos adds
    field       positions read from the field
    position    L_pos, the other half of the crops position-masked
    both        field and L_pos

Probes of frozen teacher features of whole images are fitted on 1,000 images and evaluated on 500 others. The baseline
is the untrained base arm. Fixed before the first comparison: everything below; no checkpoint is chosen.

On a CPU: base, content100 and both, one seed; correctness and gates are required, differences only reported. On a GPU:
five arms, three seeds, and position masking alone (f_c = 0). If the base arm misses a gate, comparisons are "not tested
at this scale". Tried before, with the base arm alone: the CPU form's width and depth on other textures; L_image and
xy_r2 passed after 700 and 750 of 1,500 steps, seg_bacc did not. Nothing of the GPU form was tried.
Finished arms in ``--out`` are kept. Results are written after each arm.
"""

import argparse
import csv
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score
from torch import Tensor

import smalti
from smalti.config import read_yaml, write_atomically
from smalti.functional.masking import cross_mask
from smalti.methods.intertwined import Intertwined
from smalti.models.loading import WEIGHTS_FILE, latest_checkpoint
from smalti.models.weights import read_tensors
from smalti.runs.build import build_method
from smalti.runs.config import resolve
from smalti.runs.machine import describe_machine
from smalti.runs.train import resume

SIZE, PATCH, GRID = 96, 8, (12, 12)
CLASSES = ("background", "disc", "square", "triangle", "star", "cross", "ring")
NUM_PROTOTYPES = 128
SPLITS = {"unlabelled": (0, 3000), "train": (1, 1000), "test": (2, 500)}
"""Stream of the seed, and images."""
MASKED_RATIO = 0.3
RIDGE = 10.0

OFF = {"field": False, "position_loss": False}
ARMS: dict[str, dict[str, Any]] = {
    "base": OFF,
    "content100": {**OFF, "mask_sample_prob": 1.0},
    "field": {"field": True, "position_loss": False},
    "position": {"field": False, "position_loss": True},
    "both": {"field": True, "position_loss": True},
    "position100": {"field": True, "position_loss": True, "mask_sample_prob": 0.0},
}
FORMS: dict[str, dict[str, Any]] = {
    "cpu": {
        "arms": ("base", "content100", "both"),
        "seeds": (0,),
        "steps": 1200,
        "batch_size": 32,
        "width": 96,
        "depth": 4,
    },
    "cuda": {
        "arms": ("base", "content100", "field", "position", "both"),
        "seeds": (0, 1, 2),
        "steps": 4000,
        "batch_size": 64,
        "width": 192,
        "depth": 6,
    },
}
QUICK = {"steps": 30, "batch_size": 8, "width": 48, "depth": 2}
LOSS_GATE, XY_GATE, SEG_GATE = 0.3, 0.3, 0.24


class Scene(NamedTuple):
    """An image and its labels."""

    image: np.ndarray
    """``(96, 96, 3)`` uint8."""
    mask: np.ndarray
    """``(96, 96)`` uint8, place in :data:`CLASSES`."""
    instances: np.ndarray
    """``(96, 96)`` uint8, 0 background, 1..n the objects."""


def draw_scene(seed: int, stream: int, index: int) -> Scene:
    """One to four textured shapes that don't touch, on a smooth random background with thin lines.

    The background's colours are random in each image, so they carry no information about position.
    """
    rng = np.random.default_rng([seed, stream, index])
    coarse = rng.uniform(0.2, 0.8, (4, 4, 3)).astype(np.float32)
    image = np.clip(cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC), 0, 1)
    for _ in range(rng.integers(6, 13)):
        ends = rng.integers(0, SIZE, 4).tolist()
        cv2.line(image, ends[:2], ends[2:], rng.uniform(0, 1, 3).tolist(), 1, cv2.LINE_AA)
    mask, instances = np.zeros((SIZE, SIZE), np.uint8), np.zeros((SIZE, SIZE), np.uint8)
    circles: list[tuple[float, float, float]] = []
    for _ in range(rng.integers(1, 5)):
        label, radius = int(rng.integers(1, len(CLASSES))), rng.uniform(0.09, 0.20) * SIZE
        for _ in range(20):
            x, y = rng.uniform(radius, SIZE - radius, 2)
            if all(math.hypot(x - a, y - b) > radius + r + 1 for a, b, r in circles):
                circles.append((x, y, radius))
                shape, texture = outline(label, x, y, radius, rng)
                colours = rng.uniform(0, 1, (2, 3))
                image[shape] = (colours[0] + (colours[1] - colours[0]) * texture[..., None])[shape]
                mask[shape], instances[shape] = label, len(circles)
                break
    noisy = image + rng.normal(0, 0.02, image.shape)
    return Scene((np.clip(noisy, 0, 1) * 255).round().astype(np.uint8), mask, instances)


def outline(label: int, x: float, y: float, radius: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of a shape, and its texture in 0..1 over the whole image, turned by the same angle."""
    angle, turn = rng.uniform(0, 2 * math.pi), 2 * math.pi
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    a = (columns - x) * math.cos(angle) + (rows - y) * math.sin(angle)  # in pixels
    b = (rows - y) * math.cos(angle) - (columns - x) * math.sin(angle)
    u, v = a / radius, b / radius
    r, phi = np.hypot(u, v), np.arctan2(v, u)
    shapes = {  # outline; texture: fine stripes, coarse checks, rings, none, dots, noise
        "disc": (r < 1, np.sin(turn * a / 3)),
        "square": (np.maximum(abs(u), abs(v)) < 0.8, np.sign(np.sin(turn * a / 9) * np.sin(turn * b / 9))),
        "triangle": (
            np.maximum(np.maximum(-v, v / 2 + 0.87 * u), v / 2 - 0.87 * u) < 0.5,
            np.sin(turn * r * radius / 4.5),
        ),
        "star": (r < 0.7 + 0.3 * np.cos(5 * phi), np.zeros_like(r)),
        "cross": (
            (np.minimum(abs(u), abs(v)) < 0.35) & (r < 1),
            2.0 * (np.sin(turn * a / 5) * np.sin(turn * b / 5) > 0.3) - 1,
        ),
        "ring": ((r < 1) & (r > 0.45), rng.choice([-1.0, 1.0], r.shape)),
    }
    shape, texture = shapes[CLASSES[label]]
    return shape, (texture + 1) / 2


class Probed(NamedTuple):
    """Images with the targets of the probes, ``(n, N, ...)`` each."""

    images: Tensor
    labels: np.ndarray
    """Class of most of a patch's pixels."""
    instances: np.ndarray
    """Object of most of a patch's pixels, 0 background."""
    boxes: np.ndarray
    """``(n, N, 4)`` pixels from a patch's centre to the left, top, right and bottom of its object's box."""
    places: np.ndarray
    """``(n, N, 2)`` x and y of a patch's centre in pixels."""


def probed_images(split: str, count: int | None = None) -> Probed:
    """The labelled images of a split."""
    stream, number = SPLITS[split]
    scenes = [draw_scene(0, stream, index) for index in range(number if count is None else count)]
    y, x = (np.mgrid[: GRID[0], : GRID[1]] + 0.5) * PATCH
    places = np.stack([x.ravel(), y.ravel()], 1)
    labels, instances, boxes = [], [], []
    for scene in scenes:
        instance = most_of(scene.instances, 5)
        edges = np.zeros((5, 4))
        for number in range(1, int(scene.instances.max()) + 1):
            rows, columns = np.nonzero(scene.instances == number)
            edges[number] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        own = edges[instance]
        labels.append(most_of(scene.mask, len(CLASSES)))
        instances.append(instance)
        boxes.append(np.concatenate([places - own[:, :2], own[:, 2:] - places], 1))
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    return Probed(
        images,
        np.stack(labels),
        np.stack(instances),
        np.stack(boxes),
        np.broadcast_to(places, (len(scenes), *places.shape)),
    )


def most_of(values: np.ndarray, count: int) -> np.ndarray:
    """``(N,)``: the most frequent value of each patch."""
    patches = values.reshape(GRID[0], PATCH, GRID[1], PATCH).swapaxes(1, 2).reshape(GRID[0] * GRID[1], -1)
    return (patches[:, :, None] == np.arange(count)).sum(1).argmax(1)


@torch.no_grad()
def features_of(method: Intertwined, images: Tensor, masked: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Patch tokens of whole images from the teacher, ``(n, N, D)`` float64, and which positions were hidden ``(n, N)``.

    A hidden position is the learned token, or zeros (its initial value) in arms that never hide one.
    """
    network, device = method.teacher.module, next(method.parameters()).device
    encoder = network.encoder
    token = (
        torch.zeros(1, encoder.embed_dim, device=device) if network.position_token is None else network.position_token
    )
    counts = torch.full((len(images),), int(MASKED_RATIO * GRID[0] * GRID[1]))
    mask = (
        cross_mask(torch.arange(len(images)), counts, GRID)
        if masked
        else torch.zeros(len(images), GRID[0] * GRID[1]).bool()
    )
    found = []
    for part, hidden in zip(images.split(100), mask.split(100), strict=True):
        tokens, grid = encoder.embed_patches(encoder.normalize(part.to(device)))
        patches, prefix = encoder.positions(grid)
        patches = torch.where(hidden.to(device)[..., None], token, patches)
        sequence = encoder.forward_tokens(encoder.assemble(tokens, (patches, prefix)))
        found.append(sequence[:, encoder.num_prefix_tokens :].double().cpu())
    return torch.cat(found).numpy(), mask.numpy()


def ridge_r2(train: np.ndarray, target: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    """Mean R^2 of a ridge regression on standardised features."""
    mean, std = train.mean(0), train.std(0) + 1e-9
    x, z = (train - mean) / std, (test - mean) / std
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (target - target.mean(0)))
    return float(r2_score(truth, z @ weights + target.mean(0)))


def instance_auc(features: np.ndarray, instances: np.ndarray) -> float:
    """AUC of cosine similarity for pairs of foreground patches, same object or not; mean over images with both."""
    scores = []
    for tokens, of in zip(features, instances, strict=True):
        tokens, of = tokens[of > 0], of[of > 0]
        unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
        first, second = np.triu_indices(len(of), 1)
        same = of[first] == of[second]
        if same.any() and not same.all():
            scores.append(roc_auc_score(same, (unit @ unit.T)[first, second]))
    return float(np.mean(scores))


def probe(method: Intertwined, train: Probed, test: Probed) -> dict[str, float]:
    """All probes of one arm."""
    (x, _), (z, _) = features_of(method, train.images), features_of(method, test.images)
    width = x.shape[-1]
    inside, inside_test = train.instances > 0, test.instances > 0
    mean, std = x.reshape(-1, width).mean(0), x.reshape(-1, width).std(0) + 1e-9
    classifier = LogisticRegression(class_weight="balanced", max_iter=200)
    classifier.fit(((x - mean) / std).reshape(-1, width)[::3], train.labels.ravel()[::3])
    guessed = classifier.predict(((z - mean) / std).reshape(-1, width))
    (m, hidden), (n, hidden_test) = (features_of(method, part.images, masked=True) for part in (train, test))
    return {
        "box_r2": ridge_r2(x[inside], train.boxes[inside], z[inside_test], test.boxes[inside_test]),
        "seg_bacc": float(balanced_accuracy_score(test.labels.ravel(), guessed)),
        "xy_r2": ridge_r2(
            x.reshape(-1, width), train.places.reshape(-1, 2), z.reshape(-1, width), test.places.reshape(-1, 2)
        ),
        "inst_auc": instance_auc(z, test.instances),
        "mpos_r2": ridge_r2(m[hidden], train.places[hidden], n[hidden_test], test.places[hidden_test]),
    }


def settings_of(arm: str, seed: int, form: dict[str, Any], data: Path) -> dict[str, Any]:
    """Settings of one run."""
    pixels = np.stack([cv2.imread(str(path))[..., ::-1] for path in sorted(data.glob("*.png"))[:200]]) / 255
    steps = form["steps"]
    return {
        "method": {
            "num_prototypes": NUM_PROTOTYPES,
            "hidden_dim": 256,
            "bottleneck_dim": 64,
            "targets": "sinkhorn",
            **{f"{stage}{kind}teacher_temp": 0.05 for stage in ("", "warmup_") for kind in ("", "patch_")},
            "momentum": 0.97,
            "koleo_weight": 0.1,
            "num_local_views": 4,
            "local_size": 32,
            "global_scale": [0.5, 1.0],
            "local_scale": [0.12, 0.4],
            "color_strength": 0.2,  # gain 8 %
            "gray_prob": 0.0,
            "blur_prob": [0.0, 0.0, 0.0],
            "solarize_prob": 0.0,
            "linear_init": "fan_in",
            "position_init": "sincos",
            "field_grid": [24, 24],
            **ARMS[arm],
        },
        "encoder": {
            "name": "vit_tiny_patch16_224",
            "patch_size": PATCH,
            "embed_dim": form["width"],
            "depth": form["depth"],
            "num_heads": form["width"] // 32 if form["width"] % 32 == 0 else 3,
        },
        "data": {
            "image_size": 64,
            "mean": pixels.mean((0, 1, 2)).round(4).tolist(),
            "std": pixels.std((0, 1, 2)).round(4).tolist(),
        },
        "optim": {
            "lr": 1e-3,
            "weight_decay": 0.04,
            "weight_decay_end": 0.04,
            "warmup_ratio": min(150 / steps, 0.5),
            "clip_norm": 3.0,
        },
        "drop_path": 0.0,
        "batch_size": form["batch_size"],
        "steps": steps,
        "seed": seed,
        "devices": "auto" if form["device"] == "cuda" else "cpu",
        "precision": "fp32",
        "checkpoint": {"every": max(steps // 4, 1)},
        "log": {"every": 50 if steps >= 100 else 5},
    }


def load_method(run: Path, device: str, trained: bool = True) -> Intertwined:
    """The method of a finished run, in eval mode; or before the first step."""
    config = resolve(read_yaml(run / "config.yaml"))
    method = build_method(config)
    if trained:
        checkpoint = latest_checkpoint(run)
        assert checkpoint is not None, "a finished run has one"
        method.load_state_dict(read_tensors(checkpoint / WEIGHTS_FILE))
    assert isinstance(method, Intertwined)
    return method.to(device).eval()


def log_of(run: Path) -> list[dict[str, float]]:
    """Rows of a run's log."""
    with (run / "log.csv").open(encoding="utf-8", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def check_run(run: Path, probes: dict[str, float]) -> dict[str, Any]:
    """Checks, losses and usage of a run."""
    rows = log_of(run)
    last = rows[-1]
    early = next(row for row in rows if row["step"] >= min(50, last["step"]))
    half = 0.5 * math.log(NUM_PROTOTYPES)
    usage = {name: value for name, value in last.items() if name.endswith("usage_entropy")}
    checks = {
        "losses are finite": all(math.isfinite(v) for row in rows for k, v in row.items() if k.startswith("loss")),
        "every teacher head uses its prototypes": all(value > half for value in usage.values()),
        f"xy_r2 >= {XY_GATE}": probes["xy_r2"] >= XY_GATE,
    }
    if "loss/position" in last:
        checks["L_pos fell to 0.9 of step 50"] = last["loss/position"] <= 0.9 * early["loss/position"]
    return {"checks": checks, "losses": {k: v for k, v in last.items() if k.startswith("loss/")}, "usage": usage}


def train_arm(arm: str, seed: int, form: dict[str, Any], data: Path, out: Path) -> Path:
    """The finished run of an arm."""
    run = out / f"{arm}_{seed}"
    if (run / "config.yaml").exists():
        resume(run, quiet=True)
    else:
        smalti.train("intertwined", data, run, overrides=settings_of(arm, seed, form, data), quiet=True)
    return run


def verdicts(results: dict[str, dict[str, Any]], form: dict[str, Any], gates: bool) -> Iterator[tuple[str, str]]:
    """Each criterion with pass, FAIL or not tested."""
    for name, found in results.items():
        for check, passed in found["checks"].items():
            yield f"{name}: {check}", "pass" if passed else "FAIL"

    def difference(metric: str, one: str, other: str) -> list[float]:
        return [
            results[f"{one}_{seed}"]["probes"][metric] - results[f"{other}_{seed}"]["probes"][metric]
            for seed in form["seeds"]
            if f"{one}_{seed}" in results and f"{other}_{seed}" in results
        ]

    def said(found: list[float], passed: bool) -> str:
        numbers = ", ".join(f"{one:+.3f}" for one in found) or "no such arm"
        if not gates:
            return f"not tested at this scale ({numbers})"
        if form["device"] == "cpu" or len(found) < len(form["seeds"]):
            return f"not tested ({numbers})"
        return f"{'pass' if passed else 'FAIL'} ({numbers})"

    pairs = (("position", "content100"), ("both", "field"), ("both", "content100"))
    box = difference("box_r2", "field", "base")
    enough = sum(one > 0 for one in box) >= 2
    yield (
        "field - base, box_r2: +0.02, positive in 2 of 3 seeds",
        said(box, bool(box) and np.mean(box) >= 0.02 and enough),
    )
    seg = difference("seg_bacc", "field", "base")
    yield "field - base, seg_bacc: not worse by 0.03", said(seg, bool(seg) and np.mean(seg) >= -0.03)
    for one, other in pairs[: 2 if form["device"] == "cuda" else 3]:
        hidden, box = difference("mpos_r2", one, other), difference("box_r2", one, other)
        every = bool(hidden) and min(hidden) > 0 and np.mean(hidden) >= 0.05
        yield f"{one} - {other}, mpos_r2: +0.05, same sign in every seed", said(hidden, every)
        yield f"{one} - {other}, box_r2: not worse by 0.02", said(box, bool(box) and np.mean(box) >= -0.02)
    alone = [
        results["position100_0"]["probes"]["seg_bacc"] - results["both_0"]["probes"]["seg_bacc"]
        for _ in range("position100_0" in results and "both_0" in results)
    ]
    verdict = "not tested" if not alone or not gates else f"{'pass' if alone[0] < 0 else 'FAIL'} ({alone[0]:+.3f})"
    yield "positions masked alone - half and half, seg_bacc: lower", verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/intertwined"), help="folder of runs and results")
    parser.add_argument("--json", type=Path, help="file of a copy of the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="which form")
    parser.add_argument("--quick", action="store_true", help="one minute, to see that it runs; no evidence")
    parser.add_argument("--arms", help="only these, with commas: the gates are set with --arms base")
    for name in ("steps", "batch-size", "width", "depth"):
        parser.add_argument(f"--{name}", type=int, help="instead of the form's, for setting the gates")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.device == "cpu" else torch.get_num_threads())
    form = {**FORMS[options.device], "device": options.device, **(QUICK if options.quick else {})}
    form |= {key: value for key in ("steps", "batch_size", "width", "depth") if (value := getattr(options, key))}
    form["arms"] = tuple(options.arms.split(",")) if options.arms else form["arms"]
    same = {key: form[key] for key in ("device", "steps", "batch_size", "width", "depth")}
    known = options.out / "form.json"
    if known.exists() and json.loads(known.read_text()) != same:
        parser.error(f"{options.out} holds runs of another form ({known.read_text().strip()}); choose another --out")
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(known, json.dumps(same) + "\n")
    number = 64 if options.quick else SPLITS["unlabelled"][1]
    data = options.out / "images"
    data.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        path = data / f"{index:05d}.png"
        if not path.exists():
            write_atomically_png(path, draw_scene(0, SPLITS["unlabelled"][0], index).image)
    train, test = (probed_images(split, 40 if options.quick else None) for split in ("train", "test"))

    file = options.out / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(file.read_text())["arms"] if file.exists() else {}
    jobs = [(arm, seed) for seed in form["seeds"] for arm in form["arms"]]
    jobs += [("position100", 0)] if options.device == "cuda" and not options.arms else []
    gates: dict[str, bool] = {}
    for arm, seed in jobs:
        name = f"{arm}_{seed}"
        if name not in results:
            started = time.process_time()
            run = train_arm(arm, seed, form, data, options.out)
            trained = time.process_time() - started
            probes = probe(load_method(run, options.device), train, test)
            results[name] = {"probes": probes, **check_run(run, probes), "training_cpu_s": trained}
            results[name]["cpu_s"] = time.process_time() - started
            if name == "base_0":
                results[name]["untrained"] = probe(load_method(run, options.device, trained=False), train, test)
        if name == "base_0":
            loss, probes = results[name]["losses"]["loss/image"], results[name]["probes"]
            gates = {
                f"L_image {loss:.3f} <= ln K - {LOSS_GATE}": loss <= math.log(NUM_PROTOTYPES) - LOSS_GATE,
                f"xy_r2 {probes['xy_r2']:.3f} >= {XY_GATE}": probes["xy_r2"] >= XY_GATE,
                f"seg_bacc {probes['seg_bacc']:.3f} >= {SEG_GATE}": probes["seg_bacc"] >= SEG_GATE,
            }
        said = dict(verdicts(results, form, bool(gates) and all(gates.values())))
        content = {"form": form, "gates": gates, "arms": results, "criteria": said, "date": time.strftime("%Y-%m-%d")}
        text = json.dumps({**content, **describe_machine()}, indent=1) + "\n"
        for target in (file, *([options.json] if options.json else [])):
            write_atomically(target, text)
        print(f"{name}: {results[name]['cpu_s']:.0f} s of CPU; " + show(results[name]["probes"]), flush=True)
    print("\n| arm | L_image | L_content | L_pos | box_r2 | seg_bacc | xy_r2 | inst_auc | mpos_r2 |\n|" + "---|" * 9)
    if "base_0" in results:
        print(
            "| untrained | | | | "
            + " | ".join(f"{value:.3f}" for value in results["base_0"]["untrained"].values())
            + " |"
        )
    for name, found in results.items():
        losses = [found["losses"].get(f"loss/{kind}", math.nan) for kind in ("image", "content", "position")]
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in (*losses, *found["probes"].values())) + " |")
    for gate, passed in gates.items():
        print(f"gate, base arm: {gate}: {'pass' if passed else 'FAIL'}")
    for criterion, verdict in said.items():
        print(f"{criterion}: {verdict}")


def write_atomically_png(path: Path, image: np.ndarray) -> None:
    """Write a PNG file atomically."""
    draft = path.with_suffix(".part")
    draft.write_bytes(cv2.imencode(".png", np.ascontiguousarray(image[..., ::-1]))[1].tobytes())
    draft.replace(path)


def show(numbers: dict[str, float]) -> str:
    """Numbers in a line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())


if __name__ == "__main__":
    main()
