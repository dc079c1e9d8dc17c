"""Statistics of patch orders: static or image-specific, spread out or clustered, similar to each other or not.

Source: Guo et al., arXiv:2511.22281v2, whose published orders, decoded from their Fig. 5, are nearly the same for all
images: ``position_variance_ratio`` 0.95, ``static_correlation`` 0.975, ``top_overlap`` 0.87 where 0.22 is chance.
Letters: M images, N patches of an h x w grid, k the patches that come first.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import ShapeError
from smalti.functional.graphs import ranks_of
from smalti.functional.orders import (
    image_dependence,
    neighbour_correlation,
    rank_correlation,
    residual_correlation,
    top_overlap,
)

TOP = 0.22
"""Fraction of patches kept by the paper's classifier."""
DEGENERATE, IMAGE_SPECIFIC, STATIC = 0.02, 0.7, 0.9
"""A graph is degenerate if the spread of its scores is below the first; an order is image-specific if position explains
less of the ranks' variance than the second, static if more than the third."""
SAME, REPRODUCED = 0.95, 0.6
"""Rank correlations above which two rules, and two training runs, give the same order."""
_RANDOM_SETS = 500
_AT_ONCE = 2**24  # elements of a table in memory

UNITS = {
    "static_correlation": "correlation of an image's ranks with the mean ranks of the others; 1: all the same",
    "position_variance_ratio": "fraction of rank variance explained by position; chance: 1/images, 1: all the same",
    "top_overlap": "fraction of the first 22 % that is also first in the mean order of the other images; chance: 0.22",
    "neighbour_correlation": "correlation of the ranks of patches that share an edge; 0: no spatial structure",
    "nearest_distance": "distance in patches from one of the first 22 % to the nearest other; below random: clustered",
    "nearest_distance_random": "nearest_distance of 500 random sets",
    "nearest_distance_random_sd": "standard deviation of nearest_distance over these sets",
    "flip_agreement": "rank correlation of the mirrored image's order with the mirrored order; 1: follows the content",
    "score_spread": "largest less smallest score over the mean score, mean; below 0.02 the graph is degenerate",
    "num_degenerate": "images whose patches all have the same score",
}
"""Statistics of :func:`describe_orders` -> their meaning."""


def num_top(num_patches: int) -> int:
    """k of the paper: 22 % of the patches, rounded, at least one."""
    return max(1, round(TOP * num_patches))


def describe_orders(
    orders: Int[Tensor, "M N"],
    grid: tuple[int, int],
    *,
    mirrored: Int[Tensor, "M N"] | None = None,
    scores: Float[Tensor, "M N"] | None = None,
    degenerate: int | None = None,
) -> dict[str, float]:
    """The statistics of :data:`UNITS`; NaN if undefined, such as for a single image.

    Args:
        orders: orders of images.
        grid: ``(h, w)``.
        mirrored: orders of the mirrored images, or None.
        scores: scores that determine the orders, or None.
        degenerate: number of images with equal scores.
    """
    num = orders.shape[-1]
    found = {"static_correlation": math.nan, "position_variance_ratio": math.nan, "top_overlap": math.nan}
    if len(orders) > 1 and num > 1:
        found |= image_dependence(orders)
        found["top_overlap"] = float(overlap_with_others(orders, num_top(num)).mean())
    if num > 1:
        found["neighbour_correlation"] = float(neighbour_correlation(orders, grid).mean())
    if num_top(num) > 1:
        tops = orders[:, : num_top(num)].long()
        found["nearest_distance"] = float(nearest_distance(tops, grid).mean())
        draws = torch.rand(_RANDOM_SETS, num, generator=torch.Generator().manual_seed(0)).argsort(1)
        random = nearest_distance(draws[:, : num_top(num)], grid)
        found |= {
            "nearest_distance_random": float(random.mean()),
            "nearest_distance_random_sd": float(random.std()),
        }
    if mirrored is not None:
        found["flip_agreement"] = float(rank_correlation(orders, mirror(mirrored, grid)).mean())
    if scores is not None and bool((scores >= 0).all()):  # of scores with a sign, the mean means nothing
        # as fractions of their sum
        normalized = scores.double() / scores.double().sum(-1, keepdim=True).clamp(min=1e-12)
        found["score_spread"] = float((num * (normalized.amax(-1) - normalized.amin(-1))).mean())
    if degenerate is not None:
        found["num_degenerate"] = float(degenerate)
    return found


def overlap_with_others(orders: Int[Tensor, "M N"], k: int) -> Float[Tensor, " M"]:
    """Fraction of each image's first k patches that are among the first k by mean rank over all other images."""
    ranks = ranks_of(orders).long()
    others = (ranks.sum(0) - ranks).argsort(dim=1, stable=True)
    return top_overlap(orders, others, k)


def nearest_distance(sets: Int[Tensor, "*B k"], grid: tuple[int, int]) -> Float[Tensor, "*B"]:
    """Mean distance, in patches, from each of the k patches of a set to the nearest other one.

    Raises:
        ShapeError: for k = 1.
    """
    if sets.shape[-1] < 2:
        raise ShapeError("sets of 1 patch have no nearest distance; at least 2 patches are needed")
    places = torch.stack([sets // grid[1], sets % grid[1]], dim=-1).double()
    flat = places.flatten(0, -3) if places.ndim > 3 else places.reshape(-1, *places.shape[-2:])
    found = []
    for part in torch.split(flat, max(1, _AT_ONCE // flat.shape[1] ** 2)):
        dist = torch.cdist(part, part)
        dist.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
        found.append(dist.amin(-1).mean(-1))
    return torch.cat(found).view(sets.shape[:-1])


def mirror(orders: Int[Tensor, "*B N"], grid: tuple[int, int]) -> Int[Tensor, "*B N"]:
    """The same patches in the horizontally flipped image."""
    rows, columns = orders.long() // grid[1], orders.long() % grid[1]
    return rows * grid[1] + grid[1] - 1 - columns


def kendall(first: Int[Tensor, "M N"], second: Int[Tensor, "M N"]) -> Float[Tensor, " M"]:
    """Kendall's tau of two orders of the same patches: concordant minus discordant pairs, over all pairs."""
    num = first.shape[-1]
    ranks = [ranks_of(order).to(torch.int16) for order in (first, second)]
    found = []
    for one, other in zip(*(torch.split(each, max(1, _AT_ONCE // num**2)) for each in ranks), strict=True):
        signs = [torch.sign(each[:, :, None] - each[:, None]).to(torch.int8) for each in (one, other)]
        found.append((signs[0] * signs[1]).sum((1, 2), dtype=torch.int64).double() / max(1, num * (num - 1)))
    return torch.cat(found)


def agreement(first: Int[Tensor, "M N"], second: Int[Tensor, "M N"]) -> dict[str, float]:
    """Agreement of two orders of the same images, as means over images.

    Returns:
        ``spearman`` with its standard deviation ``spearman_sd``, ``spearman_residual`` (after subtracting each one's
        mean rank of every position; NaN for one image), ``kendall``, and ``jaccard``, the index of the first 22 %.
    """
    num = first.shape[-1]
    spearman = rank_correlation(first, second)
    both = top_overlap(first, second, num_top(num))
    return {
        "spearman": float(spearman.mean()),
        "spearman_sd": float(spearman.std(correction=0)),
        "spearman_residual": float(residual_correlation(first, second).nanmean()),
        "kendall": float(kendall(first, second).mean()),
        "jaccard": float((both / (2 - both)).mean()),
    }


def conclude(
    described: Mapping[str, Mapping[str, float]],
    agreements: Mapping[tuple[str, str], Mapping[str, float]],
    against: Mapping[str, Mapping[str, float]],
    num_images: int,
) -> list[str]:
    """Conclusions in one sentence each; *degenerate graph* and *static order* come first.

    Args:
        described: order -> statistics of :func:`describe_orders`.
        agreements: pair of orders -> statistics of :func:`agreement`.
        against: order -> agreement with the order of another run.
        num_images: M.
    """
    sentences = []
    for name, numbers in described.items():
        if name not in ("collapse", "in_strength", "coverage", "attention", "variance"):
            continue
        fraction, spread = numbers.get("position_variance_ratio", math.nan), numbers.get("score_spread", math.nan)
        if name == "collapse" and spread < DEGENERATE:
            sentences.append(
                f"degenerate graph: scores of collapse differ by only {spread:.3f} of their mean; their order is "
                "meaningless."
            )
        if numbers.get("num_degenerate"):
            sentences.append(
                f"{name}: {numbers['num_degenerate']:.0f} of {num_images} images have the same score for all patches."
            )
        if fraction > STATIC:
            sentences.append(
                f"static order: position alone explains {fraction:.2f} of the ranks' variance of {name}; all images "
                "have nearly the same order."
            )
        elif fraction < IMAGE_SPECIFIC:
            sentences.append(f"{name} is image-specific: position explains {fraction:.2f} of the ranks' variance.")
        elif fraction <= STATIC:
            sentences.append(f"{name} is mixed: position explains {fraction:.2f} of the ranks' variance.")
    tie = agreements.get(("collapse", "in_strength"))
    if tie is not None:
        verdict = "PageRank adds nothing to its first step" if tie["spearman"] > SAME else "they differ"
        sentences.append(f"collapse and in_strength have rank correlation {tie['spearman']:.3f}: {verdict}.")
    for name, numbers in against.items():
        rho = numbers["spearman"]
        verdict = (
            f"above {REPRODUCED}, the order is reproduced"
            if rho > REPRODUCED
            else f"not above {REPRODUCED}, the order is not a property of the data"
        )
        residual = numbers["spearman_residual"]
        beyond = "" if math.isnan(residual) else f"; {residual:.2f} with the mean order of each run subtracted"
        sentences.append(f"{name} of the other run has rank correlation {rho:.2f}{beyond}: {verdict}.")
    return sentences


def spread_evenly(number: int, count: int) -> Sequence[int]:
    """At most ``count`` of the indices 0..number-1, evenly spaced, ascending."""
    return sorted({place * number // count for place in range(count)}) if number and count > 0 else []
