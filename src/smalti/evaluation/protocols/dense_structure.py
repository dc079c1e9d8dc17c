"""Dense structure (DSE): tight, distant clusters of patch tokens that fill many dimensions; needs no labels.

Source: Dai et al., "dense representation structure estimator", arXiv:2510.17299, in the form of the released code. The
paper weighs M_dim by lambda = Std(M_inter - M_intra) / Std(M_dim) over the checkpoints of a run, the code by 1. The
score of one encoder has the weight 1; :func:`run_curve` uses the paper's once a run has enough evaluations.
Only compare checkpoints of one run, with equal numbers of images: a random network scores, too.
With the weight 1, fewer dimensions can raise the score of narrow tokens: tight clusters outweigh M_dim.
Differs from the code: one fixed list of images; k-means is scikit-learn's, with three seeds; groups have
about ``group`` images, so that none is left over.
Letters: B images, N = h*w patches, D embed_dim; z tokens, C the tokens of a cluster, a the scale of the tokens.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from smalti.charts import Line, LineChart, floats
from smalti.config import Count, settings
from smalti.data.images.decode import as_picture
from smalti.data.images.labelled import eval_image
from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import NUM_SHOWN, spread
from smalti.evaluation.features import Features
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.protocols.overclustering import cluster
from smalti.evaluation.tally import tally_mean
from smalti.functional.colours import palette
from smalti.functional.spectra import singular_values_of

BATCH = 1024
"""Images at most of which one score is computed, as published; scores of several batches are averaged."""
NUM_IMAGES = {"small": 256, "full": 2048, "paper": 2048}
ITERS = 20
CONSTANT = 1e-5
"""Tokens whose mean distance to their mean is less than this fraction of their length are all the same."""
MIN_STEPS = 4
"""Checkpoints of a run from which the paper's weight is computed."""
WINDOW, NUM_CANDIDATES = 2, 3
TILE_PX, GAP_PX = 112, 4
DISTANCE = "in mean distances of a token to the mean token"
UNITS = {
    "dse": "M_inter + M_dim - M_intra, higher is better between checkpoints of one run",
    "m_inter": f"{DISTANCE}, higher is better",
    "m_intra_image": f"{DISTANCE}, lower is better",
    "m_intra_group": f"{DISTANCE}, lower is better",
    "m_dim": "fraction of the dimensions that tokens can fill, 0 to 1, higher is better",
}


class Structure(NamedTuple):
    """The terms of the score."""

    m_inter: float
    m_intra_images: tuple[float, ...]
    """M_intra of each image; NaN if all its clusters are single tokens."""
    m_intra_group: float
    m_dim: float

    @property
    def m_intra_image(self) -> float:
        """Mean over images."""
        return float(np.nanmean(self.m_intra_images))

    @property
    def dse(self) -> float:
        """M_inter + M_dim - (M_intra_image + M_intra_group) / 2."""
        return self.m_inter + self.m_dim - (self.m_intra_image + self.m_intra_group) / 2


def radii(tokens: Float[Tensor, "n D"], labels: Int[Tensor, " n"]) -> list[float]:
    """r(C) of each cluster of at least two tokens: the sum of singular values of its centred tokens, divided by
    sqrt(max(|C| - 1, D)).

    With more than D tokens that is the sum of their standard deviations along the principal axes.
    """
    found = []
    for label in torch.unique(labels):
        members = tokens[labels == label].double()
        if len(members) > 1:
            values = singular_values_of(members - members.mean(0))
            found.append(float(values.sum()) / max(len(members) - 1, members.shape[1]) ** 0.5)
    return found


def distances_to_others(tokens: Float[Tensor, "n D"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Distance of each token to the nearest centre of another cluster; 0 if there is only one cluster."""
    names, own = torch.unique(labels, return_inverse=True)
    if len(names) < 2:
        return torch.zeros(len(tokens), dtype=torch.float64)
    points = tokens.double()
    centres = torch.stack([points[own == number].mean(0) for number in range(len(names))])
    distances = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.scatter(1, own[:, None], torch.inf).min(1).values


def dimension(tokens: Float[Tensor, "B N D"]) -> float:
    """M_dim: effective rank of one token per image, not centred, as a fraction of min(B, D); mean over patches.

    Args:
        tokens: ``(B, N, D)``, the patches of each image already shuffled.
    """
    ranks = []
    for some in torch.split(tokens.transpose(0, 1), 32):  # (n, B, D): few matrices at once
        values = singular_values_of(some)
        fractions = values / values.sum(-1, keepdim=True).clamp(min=1e-12)
        ranks.append(torch.special.entr(fractions).sum(-1).exp())
    return float(torch.cat(ranks).mean()) / min(len(tokens), tokens.shape[2])


def structure(
    tokens: Float[Tensor, "B N D"],
    image_labels: Int[Tensor, "B N"],
    group_labels: Int[Tensor, "B N"],
    groups: Sequence[Sequence[int]],
    m_dim: float,
) -> Structure:
    """The terms of the score for given clusters; tokens that are all the same have distances of 0.

    Args:
        tokens: ``(B, N, D)``, of unit length if that is wanted.
        image_labels: cluster of each token among those of its image.
        group_labels: cluster of each token among those of its group.
        groups: indices of the images of each group.
        m_dim: :func:`dimension` of the tokens.
    """
    every = tokens.flatten(0, 1)
    scale = float(torch.linalg.vector_norm(every - every.mean(0), dim=1).double().mean())
    if scale <= CONSTANT * float(torch.linalg.vector_norm(every, dim=1).double().mean()):
        return Structure(0.0, (0.0,) * len(tokens), 0.0, m_dim)
    per_image = [radii(one, labels) for one, labels in zip(tokens, image_labels, strict=True)]
    per_group, inter = list[float](), list[float]()
    for group in groups:
        points, labels = tokens[list(group)].flatten(0, 1), group_labels[list(group)].flatten()
        per_group += radii(points, labels)
        inter.append(float(distances_to_others(points, labels).mean()))
    return Structure(
        float(np.mean(inter)) / scale,
        tuple(float(np.mean(found)) / scale if found else np.nan for found in per_image),
        float(np.mean(per_group)) / scale if per_group else np.nan,
        m_dim,
    )


def split_evenly(number: int, size: int) -> list[list[int]]:
    """The indices 0..number-1 in consecutive parts of about ``size``, at least one part."""
    return [part.tolist() for part in np.array_split(np.arange(number), max(1, round(number / size)))]


def shuffle_patches(tokens: Float[Tensor, "B N D"], seed: int) -> Float[Tensor, "B N D"]:
    """The patches of each image in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    orders = torch.rand(tokens.shape[:2], generator=generator).argsort(1)
    return tokens.gather(1, orders[..., None].expand_as(tokens))


def find_clusters(tokens: Float[Tensor, "n D"], number: int, seed: tuple[int, ...]) -> Int[Tensor, " n"]:
    """k-means of all tokens."""
    state = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.from_numpy(cluster(tokens.float().numpy(), number, state, iters=ITERS, per_cluster=None))


def run_weight(differences: Sequence[float], dimensions: Sequence[float]) -> float:
    """The weight of M_dim over the checkpoints of a run: Std(M_inter - M_intra) / Std(M_dim); NaN if M_dim is
    constant."""
    below = float(np.std(dimensions))
    return float(np.std(differences)) / below if below > 0 else float("nan")


def candidates(scores: Sequence[float]) -> list[int]:
    """Indices of up to three checkpoints: maxima of their window of two on either side, the highest first, ties to the
    earlier one."""
    peaks = [
        place for place, score in enumerate(scores) if score >= max(scores[max(0, place - WINDOW) : place + WINDOW + 1])
    ]
    return sorted(peaks, key=lambda place: (-scores[place], place))[:NUM_CANDIDATES]


def run_curve(steps: Sequence[int], metrics: Sequence[Mapping[str, float]]) -> LineChart | None:
    """The score over a run's checkpoints with the paper's weight, and the candidates for the best one.

    Args:
        steps: steps of the checkpoints, ascending.
        metrics: scores of each.

    Returns:
        The chart; None for fewer than four checkpoints, if M_dim is constant, or if a score is missing.
    """
    if len(steps) < MIN_STEPS or not all(UNITS.keys() <= one.keys() for one in metrics):
        return None
    inner = [m["m_inter"] - (m["m_intra_image"] + m["m_intra_group"]) / 2 for m in metrics]
    dims = [m["m_dim"] for m in metrics]
    weight = run_weight(inner, dims)
    if not np.isfinite(weight):
        return None
    scores = [ours + weight * dim for ours, dim in zip(inner, dims, strict=True)]
    best = ", ".join(f"{steps[place]:,}" for place in candidates(scores))
    return LineChart(
        "DSE with the weight of the run",
        f"M_inter - M_intra + {weight:.3g} M_dim over the checkpoints of the run, the weight being the ratio of their "
        f"standard deviations; higher is better. Candidates, the best first: step {best}. Where this protocol "
        "chooses RUN/best, it does so with the weight 1, since the ratio is known only at the end.",
        (Line(floats(scores), floats(steps), "DSE"),),
        x_label="step",
        has_points=True,
    )


@settings
class DenseStructureConfig:
    """Settings of ``dense-structure``."""

    num_images: Annotated[int, Field(ge=2)] | None = None
    """Images to measure, spread evenly over the set; None: 256, or 2,048 with ``preset=full``. Scores depend on it."""
    clusters_image: Count = 3
    """Clusters of the patches of an image."""
    clusters_group: Annotated[int, Field(ge=2)] = 24
    """Clusters of the patches of a group of images."""
    group: Count = 8
    """Images of a group."""
    normalize: bool = True
    """Whether tokens are scaled to unit length first."""
    repeats: Count = 3
    """Clusterings with different seeds, whose scores are averaged."""


class Clustered(NamedTuple):
    """Clusters of the patches of a batch, and the scores that follow from them."""

    structure: Structure
    image_labels: Tensor
    group_labels: Tensor
    groups: list[list[int]]


def cluster_all(
    tokens: Float[Tensor, "B N D"], own: DenseStructureConfig, seed: tuple[int, int]
) -> Iterator[Clustered]:
    """Cluster the patches of each image and of each group, once per repeat; no global random state is touched."""
    groups = split_evenly(len(tokens), own.group)
    m_dim = dimension(shuffle_patches(tokens, seed[0]))
    for repeat in range(own.repeats):
        image_labels = torch.stack(
            [find_clusters(one, own.clusters_image, (*seed, repeat, 0, place)) for place, one in enumerate(tokens)]
        )
        group_labels = torch.empty_like(image_labels)
        for place, group in enumerate(groups):
            labels = find_clusters(tokens[group].flatten(0, 1), own.clusters_group, (*seed, repeat, 1, place))
            group_labels[group] = labels.view(len(group), -1)
        yield Clustered(
            structure(tokens, image_labels, group_labels, groups, m_dim), image_labels, group_labels, groups
        )


@register_protocol(
    "dense-structure", need="images", settings=DenseStructureConfig, takes_norm=True, over_steps=run_curve
)
@torch.no_grad()
def dense_structure(features: Features, config: EvalConfig) -> Scores:
    """Tight, distant clusters of patches in many dimensions (DSE); compares checkpoints, needs no labels."""
    own: DenseStructureConfig = config.of("dense-structure")
    size = features.dense_size(config.image_size)
    images = features.data.test
    height, width = features.encoder.check_size(size, size)
    chosen = spread(len(images), own.num_images or NUM_IMAGES[config.preset])
    if height * width <= own.clusters_image:
        raise ConfigError(
            f"images of {size} pixels have {height}x{width} patches, too few for {own.clusters_image} clusters; "
            "set a larger eval.image_size, or a smaller eval.dense-structure.clusters_image"
        )
    subset = dataclasses.replace(images, samples=tuple(images.samples[place] for place in chosen))
    found, places = list[Tensor](), list[int]()
    for encoded, positions in features.encode(
        subset, size, "crop", features.batch_size, "dense structure", norm=features.norm
    ):
        tokens = features.round(encoded.patches).float()
        found.append((F.normalize(tokens, dim=-1) if own.normalize else tokens).cpu())
        places += [chosen[position] for position in positions]
    if len(places) < 2:
        raise DataError(
            f"{images.root}: dense-structure compares patches of at least 2 images, but {len(places)} of the "
            f"{len(subset)} {features.evaluated} can be read"
        )
    tokens = torch.cat(found)
    batches = np.array_split(np.arange(len(tokens)), -(-len(tokens) // BATCH))
    smallest = min(len(group) for batch in batches for group in split_evenly(len(batch), own.group))
    if smallest * height * width <= own.clusters_group:
        raise ConfigError(
            f"a group of {smallest} images of {size} pixels has {smallest * height * width} patches, too few for "
            f"{own.clusters_group} clusters; use more or larger images, or a smaller "
            "eval.dense-structure.clusters_group"
        )
    rounds: list[list[Clustered]] = []
    for number, batch in enumerate(batches):
        rounds.append([])
        for found_clusters in cluster_all(tokens[batch[0] : batch[-1] + 1], own, (config.seed, number)):
            rounds[-1].append(found_clusters)
            features.progress("clusterings", sum(map(len, rounds)), len(batches) * own.repeats)
    per_repeat = [
        {name: float(np.mean([getattr(one.structure, name) for one in repeat])) for name in UNITS}
        for repeat in zip(*rounds, strict=True)
    ]
    within = np.full(len(images), np.nan)
    within[places] = np.concatenate(
        [np.mean([one.structure.m_intra_images for one in batch], axis=0) for batch in rounds]
    )
    metrics = {name: float(np.mean([one[name] for one in per_repeat])) for name in UNITS}
    settings = {
        "preset": config.preset,
        "comparable": "only between checkpoints of one run: the same images, image size and width",
        "image_size": size,
        "resize": "short side to size * 256 / 224, then the central square",
        "num_images": len(tokens),
        "images_per_batch": len(batches[0]),
        "patches_per_image": height * width,
        "embed_dim": features.encoder.embed_dim,
        "clusters_per_image": own.clusters_image,
        "clusters_per_group": own.clusters_group,
        "images_per_group": own.group,
        "unit_length": own.normalize,
        "kmeans": f"initialisation k-means++, at most {ITERS} iterations",
        "repeats": own.repeats,
        "scores_of_repeats": {name: [one[name] for one in per_repeat] for name in UNITS},
        "weight_of_m_dim": "1: the paper's is known only at the end of a run",
        "cache_dtype": config.cache_dtype,
    }
    return Scores(
        metrics,
        settings,
        {},
        units=UNITS,
        tallies={"m_intra_image": tally_mean(within)} if len(batches) == 1 else {},
        pictures=_picture(features, places, rounds[0][0], (height, width)),
    )


def _picture(
    features: Features, places: Sequence[int], clustered: Clustered, grid: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Caption -> images of the first group, their clusters, and the clusters of the group."""
    images = features.data.test
    columns, names = [], []
    for number in clustered.groups[0][:NUM_SHOWN]:
        sample = images.samples[places[number]]
        tile = as_picture(eval_image(sample.path, TILE_PX, features.encoder.in_chans, "crop", sample.pixels))
        labels = (clustered.image_labels[number], clustered.group_labels[number])
        maps = [palette(int(one.max()) + 1)[one.view(grid).numpy()] for one in labels]
        tiles = [tile, *(cv2.resize(one, (TILE_PX, TILE_PX), interpolation=cv2.INTER_NEAREST) for one in maps)]
        columns.append(
            np.concatenate([np.pad(one, ((0, GAP_PX), (0, GAP_PX), (0, 0)), constant_values=255) for one in tiles])
        )
        names.append(images.names[places[number]])
    caption = (
        f"Clusters of patches of the first group ({', '.join(names)}). Rows: the image; its own clusters; the clusters "
        "of the whole group, whose colours are the same in all images."
    )
    return {caption: np.concatenate(columns, axis=1)[:-GAP_PX, :-GAP_PX]}
