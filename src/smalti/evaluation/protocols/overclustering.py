"""Overclustering: do patches that are close in feature space belong to one class? Labels are not used for training.

Source: Ziegler & Asano, Leopart, arXiv:2204.13101, Sec. 4.1, and Pariza et al., NeCo, arXiv:2408.11054, in the settings
of their code: standardised tokens of the test images, PCA, k-means; then clusters are mapped to classes by the masks.
Differs from them: all test images count (their loader drops the last incomplete batch); k-means is scikit-learn's,
which moves an empty cluster to the points farthest from their centres (theirs splits the largest cluster).
Letters: n images, N = h*w patches, D embed_dim, d dimensions after PCA, K clusters, C classes, M side of the masks.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from smalti.config import Count, ImageSize, settings
from smalti.data.images.labelled import eval_mask
from smalti.errors import DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.dense import ignored_value, read_masks, unlabelled_of
from smalti.evaluation.features import Features
from smalti.evaluation.metrics import MATCHINGS, Absent, ConfusionMatrix, Matching, class_iou
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.tally import PixelTally, Tally, join_repetitions
from smalti.functional.spectra import sum_moments

MORE_CLUSTERS = (300, 500)
"""Numbers of clusters in addition to the number of classes."""
PATCHES_PER_CLUSTER = 39
"""Minimum number of patches per cluster if ``clusters`` is empty: with fewer, each patch could be its own cluster and a
high score would mean nothing. It is the number below which faiss warns about its training set."""
POINTS_PER_CLUSTER = 256
"""Maximum number of points to fit k-means on: the default of faiss, which the published code uses."""
NUM_DIMS = 50


@dataclass(frozen=True)
class ClusteringRecipe:
    """A preset with the settings that the user changed."""

    image_size: int
    mask_size: int
    repeats: int
    restarts: int
    iters: int
    init: Literal["k-means++", "random"]
    absent: Absent


def fit_projection(
    batches: Iterable[Float[Tensor, "... D"]], num_dims: int
) -> tuple[Float[Tensor, " D"], Float[Tensor, "D d"]]:
    """Standardisation and PCA as one affine map: ``(tokens - mean) @ basis``.

    Args:
        batches: ``(..., D)`` tokens, in one pass; their order only affects rounding.
        num_dims: d, at most D.

    Returns:
        float64, on the CPU: ``(D,)`` mean, and ``(D, d)`` principal axes of the tokens divided by their standard
        deviation (population; constant dimensions are not divided). No whitening.
    """
    moments = sum_moments(batches)
    covariance = moments.covariance
    variance, mean_square = covariance.diagonal(), moments.square.diagonal() / moments.count
    # the variance of a constant dimension is only rounding error
    sigma = torch.where(variance > 1e-12 * mean_square, variance, 1.0).sqrt()
    axes = torch.linalg.eigh(covariance / (sigma[:, None] * sigma)).eigenvectors  # ascending eigenvalues
    return moments.mean, axes.flip(1)[:, :num_dims] / sigma[:, None]


def cluster(
    points: Float[np.ndarray, "n d"],
    num_clusters: int,
    seed: int,
    *,
    iters: int = 100,
    restarts: int = 1,
    init: Literal["k-means++", "random"] = "k-means++",
    per_cluster: int | None = POINTS_PER_CLUSTER,
) -> Int[np.ndarray, " n"]:
    """Euclidean k-means (Lloyd), fitted on a sample of the points; all points are assigned.

    Args:
        points: ``(n, d)`` float32, with ``n >= num_clusters``.
        num_clusters: K; fewer if there are fewer distinct points.
        seed: seed of the sampled points and the initial centres.
        iters: maximum number of iterations.
        restarts: number of fits; the one with the smallest sum of squared distances is used.
        init: initial centres: ``k-means++`` or ``random`` points.
        per_cluster: maximum number of points per cluster to fit on; None: all points.

    Returns:
        ``(n,)`` int64 clusters, 0..K-1.
    """
    from sklearn.cluster import KMeans  # heavy, and only needed here
    from sklearn.exceptions import ConvergenceWarning

    fitted = points
    if per_cluster is not None and len(points) > per_cluster * num_clusters:
        chosen = np.random.default_rng(seed).permutation(len(points))[: per_cluster * num_clusters]
        fitted = points[np.sort(chosen)]
    kmeans = KMeans(num_clusters, init=init, n_init=restarts, max_iter=iters, tol=0, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # fewer distinct points than clusters: reported in the settings
        kmeans.fit(fitted)
    return kmeans.predict(points).astype(np.int64)


@settings
class OverclusteringConfig:
    """Settings of ``overclustering``."""

    clusters: tuple[Count, ...] = ()
    """Numbers of clusters; empty: the number of classes, 300 and 500, if there are enough patches."""
    repeats: Count | None = None
    """Clusterings with different seeds, whose scores are averaged; None: the preset's."""
    mask_size: ImageSize | None = None
    """Side of the masks in pixels; None: the preset's."""
    absent: Absent | None = None
    """mIoU: a class in neither masks nor predictions counts zero, or is skipped; None: the preset's."""


def choose_recipe(features: Features, config: EvalConfig, protocol: str = "overclustering") -> ClusteringRecipe:
    """The preset with the user's settings.

    Args:
        features: encoder and data.
        config: preset and image size.
        protocol: whose ``mask_size``, ``repeats`` and ``absent`` apply.

    Raises:
        ConfigError: if the encoder's own image size isn't square and none is given.
        ShapeError: if the patch size does not divide the image size.
    """
    own: Any = config.of(protocol)
    if config.preset == "small":
        size = features.dense_size(config.image_size)
        recipe = ClusteringRecipe(size, min(100, size), 3, 1, 20, "k-means++", "skip")
    else:
        size = features.image_size(config.image_size or 448)
        paper = config.preset == "paper"
        recipe = ClusteringRecipe(size, 100, 5, 5, 100, "random" if paper else "k-means++", "zero" if paper else "skip")
    changed: dict[str, Any] = {"mask_size": own.mask_size, "repeats": own.repeats, "absent": own.absent}
    return replace(recipe, **{name: value for name, value in changed.items() if value is not None})


def choose_clusters(wanted: Sequence[int], num_classes: int, num_patches: int) -> tuple[list[int], list[int]]:
    """Numbers of clusters in ascending order, and those with too few patches, which are skipped.

    Args:
        wanted: numbers from the user; empty: the number of classes, 300 and 500, of which the last two need
            :data:`PATCHES_PER_CLUSTER` patches per cluster.
        num_classes: C.
        num_patches: number of patches of all images.
    """
    needed = {k: k for k in wanted} or {
        **{k: k * PATCHES_PER_CLUSTER for k in MORE_CLUSTERS},
        num_classes: num_classes,
    }
    return [k for k in sorted(needed) if needed[k] <= num_patches], [
        k for k in sorted(needed) if needed[k] > num_patches
    ]


@register_protocol(
    "overclustering",
    need="masks",
    settings=OverclusteringConfig,
    takes_norm=True,
    priority=20,
)
@torch.no_grad()
def overclustering(features: Features, config: EvalConfig) -> Scores:
    """Semantic segmentation by k-means on patch tokens, clusters matched to classes; needs masks."""
    own: OverclusteringConfig = config.of("overclustering")
    recipe = choose_recipe(features, config)
    images, classes = features.data.test, features.data.classes
    ignore = ignored_value(len(classes))
    masks = read_masks(images, len(classes), recipe.mask_size)
    unlabelled = unlabelled_of(images, masks, ignore, features.evaluated)
    points, places = _project(features, recipe.image_size)
    num_patches = len(places) * points.shape[1]
    chosen, left_out = choose_clusters(own.clusters, len(classes), num_patches)
    if not chosen:
        raise DataError(
            f"{images.root}: {len(images)} {features.evaluated} have {num_patches} patches, too few for "
            f"{min(left_out)} clusters; lower eval.overclustering.clusters, or evaluate on more or larger images"
        )
    grid = features.encoder.check_size(recipe.image_size, recipe.image_size)
    # (M, M): index of the patch at each pixel of a mask
    patch_of = torch.from_numpy(eval_mask(np.arange(points.shape[1]).reshape(grid), recipe.mask_size))
    targets = masks[torch.tensor(places)]

    tallies: dict[str, list[Tally]] = {}
    used: dict[str, list[int]] = {}
    shown: list[PixelTally] = []
    predictions: dict[int, np.ndarray] = {}
    done = 0
    for k in reversed(chosen):  # the largest first: it is the headline
        matchings: dict[str, Matching] = (
            {"": "hungarian"} if k == len(classes) else {"": "many-to-one-precision", "_iou": "many-to-one-iou"}
        )
        for repeat in range(recipe.repeats):
            found = cluster(
                points.reshape(-1, points.shape[2]),
                k,
                config.seed + repeat,
                iters=recipe.iters,
                restarts=recipe.restarts,
                init=recipe.init,
            )
            used.setdefault(str(k), []).append(len(np.unique(found)))
            assigned = torch.from_numpy(found.reshape(len(places), -1))
            matrix = _contingency(targets, assigned, patch_of, len(classes), k, ignore)
            for suffix, matching in matchings.items():
                mapping = MATCHINGS[matching](matrix)
                tally = PixelTally(len(classes), len(images), ignore)
                for target, patches, place in zip(targets, mapping[assigned], places, strict=True):
                    pred = patches[patch_of]
                    tally.update(target[None], pred[None], [place])
                    if k == chosen[-1] and not suffix and not repeat and place in features.shown:
                        predictions[place] = pred.numpy().astype(np.int32)
                tallies.setdefault(f"miou_k{k}{suffix}", []).append(tally.iou(recipe.absent))
                tallies.setdefault(f"pixel_accuracy_k{k}{suffix}", []).append(tally.pixel_accuracy())
                if k == chosen[-1] and not suffix:
                    shown.append(tally)
            done += 1
            features.progress("clusterings", done, len(chosen) * recipe.repeats)
    joined = {name: join_repetitions(repetitions) for name, repetitions in tallies.items()}
    per_repeat = {name: [tally.score() for tally in repetitions] for name, repetitions in tallies.items()}
    settings = {
        "preset": config.preset,
        "comparable": "small preset: not comparable with published numbers"
        if config.preset == "small"
        else "Leopart's and NeCo's settings, unless changed"
        + ("" if config.preset == "paper" else "; absent classes skipped, k-means++ initialisation"),
        "image_size": recipe.image_size,
        "resize": "to a square, aspect ratio ignored",
        "mask_size": recipe.mask_size,
        "clusters": chosen,
        "clusters_left_out": left_out,
        "clusters_used": used,
        "clusters_note": f"skipped, since there are only {num_patches} patches" if left_out else "",
        "num_patches": num_patches,
        "pca_dims": points.shape[2],
        "kmeans": f"initialisation {recipe.init}, at most {recipe.iters} iterations, best of {recipe.restarts}, "
        f"fitted on at most {POINTS_PER_CLUSTER} patches per cluster",
        "repeats": recipe.repeats,
        "scores_of_repeats": per_repeat,
        "matching": f"hungarian for {len(classes)} clusters; else many-to-one by precision, and by IoU for names "
        "that end in _iou",
        "shown": "predictions and confusion matrix of the first clustering",
        "absent": recipe.absent,
        "ignored_value": ignore if ignore >= 0 else None,
        "num_unlabelled": len(unlabelled),
        "cache_dtype": config.cache_dtype,
    }
    iou = torch.stack([class_iou(tally.confusion.matrix) for tally in shown]).nanmean(0).tolist()
    return Scores(
        {name: tally.score() for name, tally in joined.items()},
        settings,
        {"iou": dict(zip(classes, iou, strict=True))},
        tallies=joined,
        confusion=shown[0].confusion.matrix.numpy(),
        predictions=predictions,
    )


def _project(features: Features, size: int) -> tuple[Float[np.ndarray, "n N d"], list[int]]:
    """Standardised and projected tokens of the readable test images, and the indices of these images.

    Images are sorted by name, since k-means samples points by index, and the order of the listing must not matter.

    Raises:
        DataError: if no image can be read.
    """
    tokens = features.tokens("test", size)
    images = features.data.test
    if not any(True for _ in tokens.batches(batch_size=1)):
        raise DataError(f"{images.root}: none of the {len(images)} {features.evaluated} can be read")
    mean, basis = fit_projection((batch for batch, _ in tokens.batches()), NUM_DIMS)
    by_place: dict[int, np.ndarray] = {}
    for batch, places in tokens.batches():
        reduced = ((batch.cpu().double() - mean) @ basis).float().numpy()
        by_place.update(zip(places, reduced, strict=True))
    names = features.names
    places = sorted(by_place, key=lambda place: names[place])
    return np.stack([by_place[place] for place in places]), places


def _contingency(
    targets: Integer[Tensor, "n M M"],
    assigned: Int[Tensor, "n N"],
    patch_of: Int[Tensor, "M M"],
    num_classes: int,
    num_clusters: int,
    ignore: int,
) -> Int[Tensor, "C K"]:
    """Number of pixels of each class in each cluster."""
    confusion = ConfusionMatrix(num_classes, num_clusters, ignore=ignore)
    for target, patches in zip(targets, assigned, strict=True):
        confusion.update(target, patches[patch_of])
    return confusion.matrix
