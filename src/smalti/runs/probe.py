"""Position metrics of a trained PART: consistency, fit, collapse, leaks, reconstruction.

Letters: B images or windows of signals, N patches, C channels of a prediction, A axes of an offset (2 of images, 1 of
signals), D embed_dim. Tables of pairs are ``(B, N, N, C)``, with the reference patch i first.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from smalti.config import read_yaml
from smalti.data.crops import MultiCrop
from smalti.data.images.folders import ImageSet, open_images
from smalti.data.images.pixels import trained_pixels
from smalti.data.loader import TrainLoader
from smalti.data.signals.signal_set import SignalSet, open_signals
from smalti.data.signals.signal_views import SignalViews
from smalti.data.views import collate
from smalti.errors import ConfigError
from smalti.files import check_folder, write_atomically
from smalti.functional.offgrid import Patches, resample_boxes
from smalti.functional.pairs import r_squared, select_pairs
from smalti.methods.part import PART, pair_loss
from smalti.models.encoder import eval_mode
from smalti.runs.build import build_method, load_method
from smalti.runs.config import resolve
from smalti.runs.folder import CONFIG_FILE

FOLDER = "probes"
NUM_TRIPLES, NUM_REFERENCES, NUM_SHOWN, NUM_DISTANCES = 4096, 8, 4, 10
OVERFIT_IMAGES, OVERFIT_STEPS, OVERFIT_LR = 8, 1000, 5e-4
_SPLITS = ("val", "test", "train")
UNITS = {
    "r2": "R^2 of the offsets; 1: perfect, 0: the best constant",
    "rmse_px": "pixels",
    "rmse_samples": "samples of the signal",
    "r2_overlap": "R^2 among pairs whose boxes overlap",
    "r2_disjoint": "R^2 among pairs whose boxes don't overlap",
    "shortcut": "r2_overlap - r2_disjoint",
    "antisymmetry": "0: perfect, 1.41: noise, 2: a constant",
    "identity_px": "predicted distance in pixels between a patch and itself",
    "identity_samples": "predicted distance in samples between a patch and itself",
    "composition": "0: perfect, 1.73: noise",
    "spread_x": "spread of predictions relative to that of the targets; near 0: collapsed",
    "spread_y": "spread of predictions relative to that of the targets; near 0: collapsed",
    "spread_time": "spread of predictions relative to that of the targets; near 0: collapsed",
    "effective_rank": "effective rank of the tokens, 1..D",
    "reconstruction": "median error of reconstructed positions, in patches",
    "leak_order": "change of tokens when patches are permuted; at most 1e-4 without positions",
    "leak_blank": "R^2 on images of one colour, or windows of one value; at most 0.01",
    "leak_noise": "R^2 if each patch is independent noise; at most 0.01",
    "leak_slot": "correlation of a patch's index and position",
    "leak_border": "R^2 on the same after training augmentation; at most 0.01",
    "leak_size": "R^2 of sizes if each box is independent noise: what resizing reveals",
    "overfit": "error relative to the best constant's after 1000 steps from scratch on 8 images or windows; at most "
    "0.02 if pairs and targets match",
}
GATES = {"leak_order": 1e-4, "leak_blank": 0.01, "leak_noise": 0.01, "leak_border": 0.01}
"""Upper limits of the leak metrics."""


@dataclass(frozen=True)
class PositionProbe:
    """Metrics, and data for figures."""

    metrics: dict[str, float]
    """As listed in :data:`UNITS`; NaN if undefined."""
    pixels: Tensor
    """``(4, N, 3, ph, pw)`` patches of a few images, 0..1; of signals ``(4, N, channels, P)``."""
    boxes: Tensor
    """``(4, N, 2 * A)``."""
    predicted: Tensor
    """``(4, N, N, A)`` offsets in pixels or samples."""
    truth: Tensor
    """``(4, N, N, A)`` true offsets in pixels or samples."""
    distances: Tensor
    """``(10,)`` pixels or samples: mean distance of the pairs of each tenth, nearest first."""
    fits: Tensor
    """``(10,)`` R^2 of the offsets within each tenth; NaN if the tenth has one offset only."""

    @property
    def is_signal(self) -> bool:
        """Whether the patches are of signals."""
        return self.truth.shape[-1] == 1

    @property
    def unit(self) -> str:
        """Unit of offsets: ``px`` or ``samples``."""
        return "samples" if self.is_signal else "px"


def probe_positions(
    run: Path,
    data: str | None = None,
    num_images: int = 32,
    seed: int = 0,
    run_overfit: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PositionProbe:
    """Probe a run of PART on held-out images or recordings if its data set has some, with the views of training.

    Args:
        run: the run directory.
        data: images or recordings, of the kind that the run was trained on; None: those of the run.
        num_images: B.
        seed: of images, views, patches and noise.
        run_overfit: also overfit the untrained method on eight of the images; see :func:`overfit`.
        progress: called with completed and total steps of overfitting.

    Raises:
        ConfigError: if the run is of another method, or ``num_images`` is below 4.
        RunError: as :func:`load_method`.
    """
    if num_images < NUM_SHOWN:
        raise ConfigError(f"num_images={num_images}: at least {NUM_SHOWN} are needed")
    method = load_method(run)
    check_folder(run / FOLDER)
    if not isinstance(method, PART):
        raise ConfigError(f"{run}: is a run of {method.name}; position probes need a run of part")
    tree = read_yaml(run / CONFIG_FILE)
    config = resolve(tree, str(run / CONFIG_FILE))
    views, path = method.make_views(config.data.image_size), data or str(config.data.path)
    assert isinstance(views, MultiCrop | SignalViews), "the views of PART"
    images: ImageSet | SignalSet
    if config.data.signal is None:
        images = open_images(path).with_pixels(trained_pixels(tree))
    else:
        images = open_signals(path, config.data.signal)
    channels, size = method.encoder.in_chans, method.encoder.img_size
    batch = next(iter(TrainLoader(_held_out(images), views, batch_size=num_images, seed=seed, channels=channels)))
    crops = batch.global_crops[:num_images]
    blank = _blank_views(views, num_images, channels, size, seed)
    with torch.no_grad(), eval_mode(method):
        probe = measure(method, crops, blank, seed)
    if not run_overfit:
        return probe
    fresh = build_method(config)  # before the first step
    assert isinstance(fresh, PART)
    error = overfit(fresh, crops[:OVERFIT_IMAGES], progress=progress)
    return dataclasses.replace(probe, metrics={**probe.metrics, "overfit": error})


def overfit(
    part: PART, images: Tensor, steps: int | None = None, progress: Callable[[int, int], None] | None = None
) -> float:
    """Overfit all pairs of the same patches; final mean squared error relative to that of the best constant.

    Without augmentation or stochastic depth, in float32, AdamW at a constant 5e-4. A ratio near 1 means
    an error in the model, or identical patches, which can't be distinguished without positions.

    Args:
        part: untrained or trained; modified in place.
        images: ``(B, C, S, S)`` uint8, or float in 0..1; windows of signals ``(B, C, 1, T)``.
        steps: optimiser steps; None: 1000.
        progress: called with completed and total steps.
    """
    steps = OVERFIT_STEPS if steps is None else steps
    normalized = _normalized(part, images)
    keys = torch.arange(len(images))
    patches = part.sampler(keys, normalized)
    num_patches = patches.boxes.shape[1]
    pairs = select_pairs(torch.arange(1), num_patches, num_patches**2)
    target = part.target(patches, pairs, tuple(normalized.shape[2:])).values
    floor = target.flatten(0, 1).var(0, correction=0).mean()
    optimizer = torch.optim.AdamW(part.parameters(), lr=OVERFIT_LR)
    error = math.nan
    with torch.enable_grad(), eval_mode(part):
        for step in range(1, steps + 1):
            prediction = part.head(part.encode(patches, keys)[0], pairs)
            loss = pair_loss(prediction, target).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            error = float(loss.detach() / floor)
            if progress is not None:
                progress(step, steps)
    return error


def measure(part: PART, images: Tensor, blank: Tensor, seed: int = 0) -> PositionProbe:
    """All numbers for a batch of images.

    Args:
        part: in eval mode.
        images: ``(B, C, S, S)`` uint8, or float in 0..1; windows of signals ``(B, C, 1, T)``.
        blank: the same shape, images of one colour or windows of one value after the views of training.
        seed: of patches and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    normalized = _normalized(part, images)
    size = tuple(normalized.shape[2:])
    axes, unit = len(size), "samples" if part.is_signal else "px"
    keys = torch.arange(len(images)) + 1_000_003 * (seed + 1)
    patches = part.sampler(keys, normalized)
    tokens, _ = part.encode(patches, keys)
    prediction, target, in_pixels, truth = _tables(part, patches, tokens, size)
    off = ~torch.eye(in_pixels.shape[1], dtype=torch.bool)

    metrics = {"r2": _mean(r_squared(prediction, target)[:axes])}
    metrics |= {
        f"r2_{name}": float(score) for name, score in zip(part.channels, r_squared(prediction, target), strict=True)
    }
    metrics[f"rmse_{unit}"] = rms(in_pixels - truth)
    overlap = boxes_overlap(patches.boxes) & off
    for name, chosen in (("r2_overlap", overlap), ("r2_disjoint", ~overlap & off)):
        metrics[name] = _mean(r_squared(in_pixels[chosen], truth[chosen])) if chosen.any() else math.nan
    metrics["shortcut"] = metrics["r2_overlap"] - metrics["r2_disjoint"]
    metrics["antisymmetry"] = antisymmetry(in_pixels, truth)
    metrics[f"identity_{unit}"] = rms(in_pixels.diagonal(dim1=1, dim2=2))
    metrics["composition"] = composition(in_pixels, generator)
    for axis, name in enumerate(part.channels[:axes]):
        metrics[f"spread_{name}"] = float(in_pixels[:, off][..., axis].std() / truth[:, off][..., axis].std())
    metrics["effective_rank"] = effective_rank(tokens.flatten(0, 1)[:2048])
    metrics["reconstruction"] = reconstruction_error(in_pixels, truth, generator) / max(part.encoder.patch_size)
    metrics |= leaks(part, patches, tokens, keys, normalized, _normalized(part, blank), generator)
    some = slice(0, NUM_SHOWN)
    shown = patches.pixels[some]
    if not part.is_signal:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (part.encoder.mean, part.encoder.std))
        shown = (shown * std + mean).clamp(0, 1)
    distances, fits = fit_by_distance(in_pixels[:, off], truth[:, off])
    return PositionProbe(metrics, shown, patches.boxes[some], in_pixels[some], truth[some], distances, fits)


def fit_by_distance(
    offsets: Float[Tensor, "B M A"], truth: Float[Tensor, "B M A"]
) -> tuple[Float[Tensor, " 10"], Float[Tensor, " 10"]]:
    """Mean true distance and R^2 (mean of the axes) of the pairs of each tenth, nearest first.

    The best constant has a smaller error within a tenth than over all pairs, so R^2 may be lower in all tenths.
    """
    offsets, truth = offsets.flatten(0, 1), truth.flatten(0, 1)
    length = truth.square().sum(-1).sqrt()
    tenths = length.argsort().tensor_split(NUM_DISTANCES)
    fits = [_mean(r_squared(offsets[tenth], truth[tenth])) for tenth in tenths]
    return torch.stack([length[tenth].mean() for tenth in tenths]), torch.tensor(fits)


def antisymmetry(table: Float[Tensor, "B N N A"], truth: Float[Tensor, "B N N A"]) -> float:
    """RMS of (i, j) + (j, i) over the RMS of (i, j), without the diagonal; NaN if predictions are near 0."""
    off = ~torch.eye(table.shape[1], dtype=torch.bool)
    size = rms(table[:, off])
    return rms((table + table.transpose(1, 2))[:, off]) / size if size >= 1e-3 * float(truth.std()) else math.nan


def composition(table: Float[Tensor, "B N N A"], generator: torch.Generator) -> float:
    """RMS of (i, k) - (i, j) - (j, k) over the RMS of (i, k), for 4096 triples of different patches."""
    count, num_patches = NUM_TRIPLES, table.shape[1]
    image = torch.randint(len(table), (count,), generator=generator)
    i, j, k = torch.rand(count, num_patches, generator=generator).argsort(1)[:, :3].unbind(1)
    return rms(table[image, i, k] - table[image, i, j] - table[image, j, k]) / max(rms(table[image, i, k]), 1e-12)


def reconstruction_error(
    table: Float[Tensor, "B N N A"], truth: Float[Tensor, "B N N A"], generator: torch.Generator
) -> float:
    """Median distance, in the table's units, of patches placed by their offsets from a reference; 8 references."""
    chosen = torch.randperm(table.shape[1], generator=generator)[:NUM_REFERENCES]
    missed = (table - truth)[:, chosen].square().sum(-1).sqrt()  # (B, 8, N)
    is_other = torch.ones(len(chosen), table.shape[1], dtype=torch.bool)
    is_other[torch.arange(len(chosen)), chosen] = False
    return float(missed[:, is_other].median())


def effective_rank(tokens: Float[Tensor, "M D"]) -> float:
    """Exponential of the entropy of the normalised singular values of the centred tokens."""
    values = torch.linalg.svdvals((tokens - tokens.mean(0)).float())
    return float(torch.special.entr(values / values.sum().clamp(min=1e-12)).sum().exp())


def boxes_overlap(boxes: Float[Tensor, "B N E"]) -> Tensor:
    """``(B, N, N)`` True where two boxes overlap."""
    start, end = boxes.chunk(2, dim=-1)
    inner = torch.minimum(end[:, :, None], end[:, None]) - torch.maximum(start[:, :, None], start[:, None])
    return (inner > 0).all(-1)


def leaks(
    part: PART,
    patches: Patches,
    tokens: Tensor,
    keys: Tensor,
    images: Tensor,
    blank: Tensor,
    generator: torch.Generator,
) -> dict[str, float]:
    """Information about a patch's position that doesn't come from its content; see :data:`UNITS`."""
    order = torch.randperm(tokens.shape[1], generator=generator)
    again, _ = part.encode(patches._replace(pixels=patches.pixels[:, order]), keys)
    colour = torch.rand(len(images), images.shape[1], 1, 1, generator=generator)
    flat = part.sampler(keys, _normalized(part, colour).expand_as(images))
    if part.sampler.kind == "saliency":
        flat = flat._replace(boxes=patches.boxes)
    noise = patches._replace(pixels=torch.randn(patches.pixels.shape, generator=generator))
    slots = torch.arange(tokens.shape[1]).float().expand(len(images), -1).flatten()
    starts = patches.boxes.chunk(2, dim=-1)[0].flatten(0, 1)
    found = {
        "leak_order": float((tokens[:, order] - again).abs().max() / tokens.abs().max()),
        "leak_blank": _score(part, flat, keys, images)[0],
        "leak_noise": _score(part, noise, keys, images)[0],
        "leak_slot": max(abs(float(torch.corrcoef(torch.stack([slots, axis]))[0, 1])) for axis in starts.unbind(1)),
        "leak_border": _score(part, part.sampler(keys, blank), keys, images)[0],
        "leak_size": math.nan,
    }
    if part.sampler.has_sizes:  # independent noise at each box's size, then resized
        found["leak_size"] = _score(
            part, noise._replace(pixels=_resized_noise(part, patches, generator)), keys, images
        )[1]
    return found


def write_probe(run: Path, probe: PositionProbe) -> Path:
    """``probes/positions.json`` in the run directory: numbers and their meaning."""
    path = run / FOLDER / "positions.json"
    metrics = {name: None if math.isnan(value) else value for name, value in probe.metrics.items()}
    content: dict[str, Any] = {"metrics": metrics, "units": {name: UNITS.get(name, "") for name in metrics}}
    tenths = zip(probe.distances.tolist(), probe.fits.tolist(), strict=True)
    content["by_distance"] = [{probe.unit: far, "r2": None if math.isnan(fit) else fit} for far, fit in tenths]
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    return path


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())


def _tables(part: PART, patches: Patches, tokens: Tensor, size: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Prediction and target of all pairs ``(B, N * N, C)``, and both offsets in pixels ``(B, N, N, A)``."""
    num_patches, axes = tokens.shape[1], len(size)
    pairs = select_pairs(torch.arange(1), num_patches, num_patches**2)
    prediction = torch.cat([part.head(tokens[i : i + 4], pairs) for i in range(0, len(tokens), 4)]).float()
    target, units = part.target(patches, pairs, size)
    squares = (
        part.pixel_offsets(values, patches, pairs, units).view(len(tokens), num_patches, num_patches, axes)
        for values in (prediction, target)
    )
    return prediction, target, *squares


def _score(part: PART, patches: Patches, keys: Tensor, images: Tensor) -> tuple[float, float]:
    """R^2 of offsets and of sizes (NaN if undefined), each for the better axis."""
    tokens, _ = part.encode(patches, keys)
    prediction, target, _, _ = _tables(part, patches, tokens, tuple(images.shape[2:]))
    scores, axes = r_squared(prediction, target), images.ndim - 2
    return float(scores[:axes].max()), float(scores[axes : 2 * axes].max()) if part.sampler.has_sizes else math.nan


def _resized_noise(part: PART, patches: Patches, generator: torch.Generator) -> Tensor:
    """Each box cropped from its own noise image, which is as large as the largest box."""
    start, end = patches.boxes.flatten(0, 1).chunk(2, dim=-1)
    sides = end - start
    own = torch.cat([torch.zeros_like(sides), sides], dim=1)[:, None]
    largest, channels = int(sides.max()), patches.pixels.shape[2]
    pieces = []
    for first in range(0, len(own), 64):
        some = own[first : first + 64]
        noise = torch.randn(len(some), channels, *(largest,) * sides.shape[1], generator=generator)
        patch, mode = part.sampler.patch_size, part.sampler.mode
        pieces.append(resample_boxes(noise, some, patch, max_side=largest, mode=mode)[:, 0])
    return torch.cat(pieces).view(patches.pixels.shape)


def _normalized(part: PART, images: Tensor) -> Tensor:
    """Images as the sampler takes them: ``(B, C, H, W)`` normalised, or windows of signals ``(B, C, T)``."""
    normalized = part.encoder.normalize(images)
    return normalized.squeeze(-2) if part.is_signal else normalized


def _held_out(images: ImageSet | SignalSet) -> ImageSet | SignalSet:
    split = next((split for split in _SPLITS if split in images.splits), None)
    return images.subset(split) if split else images


def _blank_views(views: MultiCrop | SignalViews, count: int, channels: int, size: tuple[int, int], seed: int) -> Tensor:
    """Images of one colour each, or windows of one value per channel, after training augmentation: only borders and
    padding can vary."""
    samples = []
    blank: np.ndarray
    for place in range(count):
        rng = np.random.default_rng([seed, place])
        if isinstance(views, SignalViews):
            blank = np.broadcast_to(rng.normal(size=(1, 1, channels)), (*size, channels)).astype(np.float32)
        else:
            colour = rng.integers(0, 256, (1, 1, channels), dtype=np.uint8)
            blank = np.broadcast_to(colour, (240, 320, channels)).copy()
        samples.append(views(blank, rng))
    return collate(samples).global_crops[:count]


def _mean(values: Tensor) -> float:
    return float(values.mean())
