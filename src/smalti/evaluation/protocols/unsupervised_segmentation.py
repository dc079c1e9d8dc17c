"""Unsupervised segmentation: foreground from clusters, then objects from clusters of the foreground that lie together.

Source: Ziegler & Asano, Leopart, arXiv:2204.13101 (cluster-based foreground extraction, CBFE, and community detection),
and Pariza et al., NeCo, arXiv:2408.11054, in the settings of their code: clusters of all patches are foreground if the
class token attends to them; the foreground is clustered again, and its clusters are joined where they are neighbours.
Labels are used twice: the fraction of background clusters is chosen on the training masks, as in the code, unless it is
given; and predictions are matched to classes by the evaluated masks, as in every clustering score.
Differs from them: communities minimise Infomap's map equation, but without its refinement, and its settings aren't
searched on training masks; k-means is scikit-learn's, on tokens of length 1, whose centres aren't renormalised in
between; the foreground is clustered at the patches' resolution; the chosen quantity is the fraction of background
clusters itself, not the precision at which it is reached.
Letters: n images, h w the patch grid, N = h*w patches, d dimensions after PCA, K clusters, C classes, M side of the
masks.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from pydantic import Field
from torch import Tensor

from smalti.config import Count, ImageSize, RatioBelowOne, settings
from smalti.data.images.labelled import eval_batches, eval_mask
from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.dense import ignored_value, read_masks, unlabelled_of
from smalti.evaluation.features import Features, Split
from smalti.evaluation.metrics import MATCHINGS, Absent, ConfusionMatrix, class_iou
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.protocols.overclustering import (
    NUM_DIMS,
    PATCHES_PER_CLUSTER,
    POINTS_PER_CLUSTER,
    ClusteringRecipe,
    choose_recipe,
    cluster,
    fit_projection,
)
from smalti.evaluation.tally import PixelTally, Tally, join_repetitions
from smalti.functional.attention import foreground
from smalti.functional.communities import communities

ATTENTION_MASS = 0.65
RATIOS = (0.55, 0.6, 0.65, 0.7, 0.75)
"""Fractions of background clusters that are tried on the training masks."""
CLUSTERS, PARTS = 200, 149
TRIALS = 10
OFFSETS = tuple(
    (down * distance, right * distance)
    for distance in (1, 2)
    for down, right in itertools.product((-1, 0, 1), repeat=2)
    if (down, right) != (0, 0)
)
"""Neighbours of a patch: eight directions, at distances 1 and 2."""


@settings
class UnsupervisedSegmentationConfig:
    """Settings of ``unsupervised-segmentation``."""

    clusters: Count | None = None
    """Clusters of all patches, from which the foreground is chosen; None: 200, or what 39 patches each allow."""
    background_ratio: RatioBelowOne | None = None
    """Fraction of the clusters that is background. None: the best of 0.55 to 0.75 on the training masks, as published;
    with a number no training mask is read."""
    parts: Count | None = None
    """Clusters of the foreground, joined to communities; None: 149, or what 39 patches each allow."""
    markov_time: Annotated[float, Field(gt=0)] = 2.0
    """Above 1 communities are larger, below 1 smaller."""
    min_weight: Annotated[float, Field(ge=0, le=1)] = 0.09
    """Clusters are neighbours if each is at least this fraction of the other's neighbourhood."""
    repeats: Count | None = None
    """Clusterings with different seeds, whose scores are averaged; None: the preset's."""
    mask_size: ImageSize | None = None
    """Side of the masks in pixels; None: the preset's."""
    absent: Absent | None = None
    """mIoU: a class in neither masks nor predictions counts zero, or is skipped; None: the preset's."""


def cluster_precision(
    assigned: Int[np.ndarray, "n N"], is_attended: Bool[np.ndarray, "n N"], num_clusters: int
) -> Float[np.ndarray, " K"]:
    """How much of each cluster the class token attends to: the fraction of its patches in an image, averaged over the
    images that have it; 0 for an empty cluster."""
    counts, inside = np.zeros((2, len(assigned), num_clusters))
    for image, (clusters, attended) in enumerate(zip(assigned, is_attended, strict=True)):
        counts[image] = np.bincount(clusters, minlength=num_clusters)
        inside[image] = np.bincount(clusters[attended], minlength=num_clusters)
    fraction = np.divide(inside, counts, out=np.zeros_like(inside), where=counts > 0)
    return fraction.sum(0) / np.maximum((counts > 0).sum(0), 1)


def foreground_clusters(precision: Float[np.ndarray, " K"], background_ratio: float) -> Bool[np.ndarray, " K"]:
    """True for the clusters with the highest precision, all but the fraction ``background_ratio``; at least one."""
    count = min(round(background_ratio * len(precision)), len(precision) - 1)
    is_foreground = np.ones(len(precision), dtype=bool)
    is_foreground[np.argsort(precision, kind="stable")[:count]] = False
    return is_foreground


def neighbourhoods(parts: Int[np.ndarray, "n h w"], num_parts: int) -> Float[np.ndarray, "K K"]:
    """How often a part (column) is a neighbour of another (row): rows of an image add up to 1, and are averaged over
    the images in which the row's part has neighbours.

    Args:
        parts: part of each patch; negative: background, which is no neighbour.
        num_parts: K.
    """
    total, images = np.zeros((num_parts, num_parts)), np.zeros(num_parts)
    for grid in parts:
        counts = np.zeros((num_parts, num_parts))
        height, width = grid.shape
        for down, right in OFFSETS:
            here = grid[max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
            there = grid[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)]
            both = (here >= 0) & (there >= 0)
            np.add.at(counts, (here[both], there[both]), 1)
        row = counts.sum(1, keepdims=True)
        total += np.divide(counts, row, out=np.zeros_like(counts), where=row > 0)
        images += row[:, 0] > 0
    return total / np.maximum(images, 1)[:, None]


def joined(
    parts: Int[np.ndarray, "n h w"], num_parts: int, min_weight: float, markov_time: float, seed: int
) -> Int[np.ndarray, " K"]:
    """The community of each part: parts that are often neighbours in both directions belong together."""
    near = neighbourhoods(parts, num_parts)
    weights = np.minimum(near, near.T)
    return communities(np.where(weights >= min_weight, weights, 0.0), markov_time, TRIALS, seed)


@dataclass(frozen=True)
class Patches:
    """All readable images of both splits: projected tokens and the class token's attention."""

    points: Float[np.ndarray, "n N d"]
    is_attended: Bool[np.ndarray, "n N"]
    places: dict[Split, list[int]]
    """Indices of the images in their split, sorted by name; first those of ``train``."""
    grid: tuple[int, int]

    def of(self, split: Split) -> slice:
        """The rows of a split."""
        num_train = len(self.places["train"])
        return slice(num_train) if split == "train" else slice(num_train, None)


@dataclass(frozen=True)
class Segmentation:
    """Objects in the test images, from one clustering."""

    is_object: Bool[np.ndarray, "n N"]
    """Foreground patches."""
    labels: dict[str, Int[np.ndarray, "n N"]]
    """By name, ``communities`` and ``cbfe`` (clusters, one per class): 0 for the background, then the objects."""
    background_ratio: float
    num_parts: int
    num_communities: int


def segment(
    patches: Patches,
    recipe: ClusteringRecipe,
    own: "UnsupervisedSegmentationConfig",
    num_classes: int,
    seed: int,
    choose: Callable[[Float[np.ndarray, " K"], Int[np.ndarray, "n N"]], float],
) -> Segmentation:
    """Foreground of the test images from clusters of all patches, its clusters, and their communities.

    Args:
        patches: of both splits.
        recipe: the preset.
        own: the user's settings.
        num_classes: C, with the background.
        seed: of the clusterings.
        choose: the fraction of background clusters, from the clusters' precision and those of the training patches.
    """
    directions = patches.points / np.maximum(np.linalg.norm(patches.points, axis=-1, keepdims=True), 1e-12)
    num_clusters = _count(own.clusters, CLUSTERS, directions[..., 0].size)
    clusters = _cluster(directions.reshape(-1, directions.shape[-1]), num_clusters, seed, recipe)
    clusters = clusters.reshape(directions.shape[:2])
    precision = cluster_precision(clusters, patches.is_attended, num_clusters)
    ratio = choose(precision, clusters[patches.of("train")])
    is_object = foreground_clusters(precision, ratio)[clusters[patches.of("test")]]
    points = patches.points[patches.of("test")][is_object]
    num_parts = _count(own.parts, PARTS, len(points))
    parts, objects = np.full((2, *is_object.shape), -1)
    parts[is_object] = _cluster(points, num_parts, seed, recipe)
    objects[is_object] = _cluster(points, num_classes - 1, seed, recipe)
    community = joined(parts.reshape(-1, *patches.grid), num_parts, own.min_weight, own.markov_time, seed)
    merged = np.where(is_object, community[parts], -1)
    found = len(np.unique(merged[is_object]))
    return Segmentation(is_object, {"communities": merged + 1, "cbfe": objects + 1}, ratio, num_parts, found)


@register_protocol(
    "unsupervised-segmentation",
    need="masks",
    settings=UnsupervisedSegmentationConfig,
    takes_norm=True,
    by_default=False,
    priority=15,
)
@torch.no_grad()
def unsupervised_segmentation(features: Features, config: EvalConfig) -> Scores:
    """Segmentation without training: foreground from attention and clusters, objects from communities of clusters."""
    own: UnsupervisedSegmentationConfig = config.of("unsupervised-segmentation")
    recipe = choose_recipe(features, config, "unsupervised-segmentation")
    images, classes = features.data.test, features.data.classes
    if not features.encoder.has_class_token:
        raise ConfigError(
            f"unsupervised-segmentation: {features.encoder.name} has no class token, whose attention shows the "
            "foreground; evaluate it with overclustering"
        )
    if len(classes) < 2:
        raise DataError(f"{images.root}: has {len(classes)} class; a background (the first) and another are needed")
    ignore = ignored_value(len(classes))
    masks = read_masks(images, len(classes), recipe.mask_size)
    unlabelled = unlabelled_of(images, masks, ignore, features.evaluated)
    patches = collect_patches(features, recipe.image_size)
    places = patches.places["test"]
    targets = masks[torch.tensor(places)]
    # (M, M): index of the patch at each pixel of a mask
    patch_of = torch.from_numpy(eval_mask(np.arange(patches.points.shape[1]).reshape(patches.grid), recipe.mask_size))
    train_masks = None
    if own.background_ratio is None:
        train_masks = read_masks(features.data.train, len(classes), recipe.mask_size)
        train_masks = train_masks[torch.tensor(patches.places["train"])]

    def choose(precision: Float[np.ndarray, " K"], clusters: Int[np.ndarray, "n N"]) -> float:
        if train_masks is None:
            assert own.background_ratio is not None, "else the masks are read"
            return own.background_ratio
        return choose_ratio(precision, clusters, train_masks, patch_of, ignore)

    def count(target: Integer[Tensor, "n M M"], labels: Int[Tensor, "n N"], num_classes: int) -> PixelTally:
        tally = PixelTally(num_classes, len(images), ignore)
        for truth, one, place in zip(target, labels, places, strict=True):
            tally.update(truth[None], one[patch_of][None], [place])
        return tally

    is_thing = torch.where(targets == ignore, targets, (targets != 0).to(targets.dtype))
    tallies: dict[str, list[Tally]] = {}
    shown: list[PixelTally] = []
    runs: list[Segmentation] = []
    predictions: dict[int, np.ndarray] = {}
    for repeat in range(recipe.repeats):
        run = segment(patches, recipe, own, len(classes), config.seed + repeat, choose)
        for name, assigned in run.labels.items():
            labels = torch.from_numpy(assigned)
            matrix = ConfusionMatrix(len(classes), int(labels.max()) + 1, ignore=ignore)
            for target, one in zip(targets, labels, strict=True):
                matrix.update(target, one[patch_of])
            mapped = MATCHINGS["hungarian"](matrix.matrix)[labels]
            tally = count(targets, mapped, len(classes))
            tallies.setdefault(f"miou_{name}", []).append(tally.iou(recipe.absent))
            tallies.setdefault(f"pixel_accuracy_{name}", []).append(tally.pixel_accuracy())
            if name == "communities":
                shown.append(tally)
                if not repeat:
                    by_place = dict(zip(places, mapped, strict=True))
                    predictions = {
                        place: by_place[place][patch_of].numpy().astype(np.int32)
                        for place in features.shown
                        if place in by_place
                    }
        both = count(is_thing, torch.from_numpy(run.is_object.astype(np.int64)), 2).iou("skip")
        tallies.setdefault("foreground_iou", []).append(Tally(both.part[:, 1:], both.whole[:, 1:]))
        runs.append(run)
        features.progress("unsupervised-segmentation", repeat + 1, recipe.repeats)
    averaged = {name: join_repetitions(repetitions) for name, repetitions in tallies.items()}
    settings = {
        "preset": config.preset,
        "comparable": "small preset: not comparable with published numbers"
        if config.preset == "small"
        else "Leopart's and NeCo's settings, unless changed, with other communities",
        "image_size": recipe.image_size,
        "resize": "to a square, aspect ratio ignored",
        "mask_size": recipe.mask_size,
        "background": classes[0],
        "attention_mass": ATTENTION_MASS,
        "num_clusters": _count(own.clusters, CLUSTERS, patches.points[..., 0].size),
        "background_ratio": [run.background_ratio for run in runs],
        "background_ratio_chosen_by": "foreground IoU on the training masks"
        if own.background_ratio is None
        else "eval.unsupervised-segmentation.background_ratio; no training mask is read",
        "num_parts": [run.num_parts for run in runs],
        "num_communities": [run.num_communities for run in runs],
        "markov_time": own.markov_time,
        "min_weight": own.min_weight,
        "pca_dims": patches.points.shape[2],
        "kmeans": f"initialisation {recipe.init}, at most {recipe.iters} iterations, best of {recipe.restarts}, "
        f"fitted on at most {POINTS_PER_CLUSTER} patches per cluster",
        "repeats": recipe.repeats,
        "scores_of_repeats": {name: [tally.score() for tally in of] for name, of in tallies.items()},
        "matching": "hungarian; the background is matched, too, and unmatched communities count as the first class",
        "shown": "predictions and confusion matrix of the communities of the first clustering",
        "absent": recipe.absent,
        "ignored_value": ignore if ignore >= 0 else None,
        "num_unlabelled": len(unlabelled),
        "cache_dtype": config.cache_dtype,
    }
    iou = torch.stack([class_iou(tally.confusion.matrix) for tally in shown]).nanmean(0).tolist()
    return Scores(
        {name: tally.score() for name, tally in averaged.items()},
        settings,
        {"iou": dict(zip(classes, iou, strict=True))},
        tallies=averaged,
        confusion=shown[0].confusion.matrix.numpy(),
        predictions=predictions,
    )


def choose_ratio(
    precision: Float[np.ndarray, " K"],
    clusters: Int[np.ndarray, "n N"],
    masks: Integer[Tensor, "n M M"],
    patch_of: Int[Tensor, "M M"],
    ignore: int,
) -> float:
    """The fraction of background clusters with the highest IoU of foreground pixels on training images; ties go to the
    lowest."""
    counted = masks != ignore
    truth = (masks != 0) & counted
    best, best_iou = RATIOS[0], -1.0
    for ratio in RATIOS:
        is_object = torch.from_numpy(foreground_clusters(precision, ratio)[clusters])
        pred = is_object[:, patch_of] & counted
        union = int((pred | truth).sum())
        iou = int((pred & truth).sum()) / union if union else 0.0
        if iou > best_iou:
            best, best_iou = ratio, iou
    return best


def collect_patches(features: Features, size: int) -> Patches:
    """Tokens of both splits, standardised and projected together, and attention masks.

    Images are sorted by name, since k-means samples points by index, and the order of the listing must not matter.

    Raises:
        DataError: if no image of a split can be read.
    """
    splits: tuple[Split, Split] = ("train", "test")
    tokens = {split: features.tokens(split, size) for split in splits}
    mean, basis = fit_projection((batch for split in splits for batch, _ in tokens[split].batches()), NUM_DIMS)
    points, attended, places = list[np.ndarray](), list[np.ndarray](), dict[Split, list[int]]()
    for split in splits:
        images = features.data.train if split == "train" else features.data.test
        reduced: dict[int, np.ndarray] = {}
        for batch, found in tokens[split].batches():
            reduced.update(zip(found, ((batch.cpu().double() - mean) @ basis).float().numpy(), strict=True))
        if not reduced:
            called = "train images" if split == "train" else features.evaluated
            raise DataError(f"{images.root}: none of the {len(images)} {called} can be read")
        seen = dict(_attended(features, split, size))
        order = sorted(reduced, key=lambda place, names=images.names: names[place])  # type: ignore[misc]
        points += [reduced[place] for place in order]
        attended += [seen[place] for place in order]
        places[split] = order
    return Patches(np.stack(points), np.stack(attended), places, tokens["test"].grid)


def _attended(features: Features, split: Split, size: int) -> Iterator[tuple[int, Bool[np.ndarray, " N"]]]:
    """Image and the patches to which its class token attends."""
    encoder, images = features.encoder, features.data.train if split == "train" else features.data.test
    grid = encoder.check_size(size, size)
    batches = eval_batches(
        images,
        size,
        encoder.in_chans,
        mode="squash",
        batch_size=features.batch_size,
        num_workers=features.num_workers,
    )
    done = 0
    for pixels, positions, skipped in batches:
        done += len(positions) + len(skipped)
        if len(positions):
            attention = encoder.encode_with_attention(encoder.normalize(pixels.to(features.device)))[1]
            yield from zip(positions, foreground(attention, grid, ATTENTION_MASS).flatten(1).cpu().numpy(), strict=True)
        features.progress("attention", done, len(images))


def _count(given: int | None, default: int, num_patches: int) -> int:
    """Number of clusters for that many patches, at least 1."""
    return max(1, min(given, num_patches) if given else min(default, num_patches // PATCHES_PER_CLUSTER))


def _cluster(
    points: Float[np.ndarray, "m d"], num_clusters: int, seed: int, recipe: ClusteringRecipe
) -> Int[np.ndarray, " m"]:
    """Clusters of any number of points, also fewer than ``num_clusters``, and none."""
    if not len(points):
        return np.zeros(0, dtype=np.int64)
    wanted = min(num_clusters, len(points))
    return cluster(points, wanted, seed, iters=recipe.iters, restarts=recipe.restarts, init=recipe.init)
