"""Pairs of patches and their relative offsets, sizes and angles.

Letters: B images, N patches, K pairs, A axes, E = 2*A numbers per box, C channels of a target. In a pair (i, j), i is
the reference patch, j the other. Boxes and offsets have x first.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import ConfigError
from smalti.functional.random import sample_uniform
from smalti.functional.transfer import move

_PAIRS = 24  # random stream of a sample


def select_pairs(
    keys: Int[Tensor, " B"],
    num_patches: int,
    num_pairs: int,
    *,
    replacement: bool = False,
) -> Int[Tensor, "B K 2"]:
    """Random ordered pairs of patches, one set per key; pairs (i, i) are included.

    Args:
        keys: ``(B,)`` seeds; a single key for pairs shared by the batch.
        num_patches: N.
        num_pairs: K; N**2 gives all pairs in raster order.
        replacement: sample pairs independently, with repeats.

    Raises:
        ConfigError: if there are fewer than K different pairs.

    Source: PART, arXiv:2506.03682: K of the N**2 pairs.
    """
    total = num_patches**2
    if num_pairs < 1 or (num_pairs > total and not replacement):
        raise ConfigError(f"num_pairs={num_pairs}: {num_patches} patches have 1..{total} different pairs")
    if replacement:
        places = (sample_uniform(keys, num_pairs, _PAIRS).double() * total).long()
    elif num_pairs == total:
        places = torch.arange(total, device=keys.device).expand(len(keys), -1)
    else:
        places = sample_uniform(keys, total, _PAIRS).argsort(dim=1, stable=True)[:, :num_pairs]
    return torch.stack([places // num_patches, places % num_patches], dim=-1)


def gather_pairs(
    values: Float[Tensor, "B N *D"], pairs: Int[Tensor, "1 K 2"]
) -> tuple[Float[Tensor, "B K *D"], Float[Tensor, "B K *D"]]:
    """The values of i and of j for each pair; all images share the pairs."""
    return values.index_select(1, pairs[0, :, 0]), values.index_select(1, pairs[0, :, 1])


def offset_units(
    boxes: Float[Tensor, "B N E"],
    pairs: Int[Tensor, "1 K 2"],
    normalize: Literal["patch", "image"],
    size: tuple[int, ...],
) -> Float[Tensor, "B K A"]:
    """The unit of offsets, in pixels: the sides of patch i, or of the image.

    Args:
        boxes: ``(B, N, E)``.
        pairs: ``(1, K, 2)``.
        normalize: ``patch`` or ``image``.
        size: size of the image in the order of the tensor, ``(H, W)`` or ``(T,)``.
    """
    axes = boxes.shape[-1] // 2
    if normalize == "patch":
        return gather_pairs(boxes[..., axes:] - boxes[..., :axes], pairs)[0]
    unit = move(torch.tensor(size[::-1], dtype=boxes.dtype), boxes.device)
    return unit.expand(len(boxes), pairs.shape[1], axes)


def relative_offsets(
    boxes: Float[Tensor, "B N E"], pairs: Int[Tensor, "1 K 2"], units: Float[Tensor, "B K A"]
) -> Float[Tensor, "B K A"]:
    """Offset of patch j from patch i: the difference of their centres, in ``units``.

    Computed in float32: whole-pixel offsets are exact, so they are exactly antisymmetric.

    Source: PART, arXiv:2506.03682. Its code truncates offsets to integers in the scale mode; here they keep fractions.
    """
    axes = boxes.shape[-1] // 2
    places = (boxes[..., :axes] + boxes[..., axes:]) / 2
    own, other = gather_pairs(places.float(), pairs)
    return (other - own) / units


def relative_sizes(
    boxes: Float[Tensor, "B N E"], pairs: Int[Tensor, "1 K 2"], log: bool = True
) -> Float[Tensor, "B K A"]:
    """Sides of patch j divided by those of patch i, or the logarithm of that ratio, which is antisymmetric."""
    axes = boxes.shape[-1] // 2
    own, other = gather_pairs((boxes[..., axes:] - boxes[..., :axes]).float(), pairs)
    return (other / own).log() if log else other / own


def turn_offsets(offsets: Float[Tensor, "B K 2"], angles: Float[Tensor, "B K"]) -> Float[Tensor, "B K 2"]:
    """Vectors rotated by angles in radians, from x to y."""
    cos, sin = angles.cos(), angles.sin()
    x, y = offsets.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)


def relative_angles(angles: Float[Tensor, "B N"], pairs: Int[Tensor, "1 K 2"]) -> Float[Tensor, "B K 2"]:
    """Cosine and sine of the angle from patch i to patch j."""
    own, other = gather_pairs(angles, pairs)
    return torch.stack([(other - own).cos(), (other - own).sin()], dim=-1)


def offset_floor(
    extent: int, side: int, num_patches: int | None = None, *, on_grid: bool = False, diagonal: bool = True
) -> float:
    """Mean squared offset along one axis, in patches: the MSE of the constant prediction 0.

    Args:
        extent: S, side of the image in pixels.
        side: P, side of a patch.
        num_patches: N; None: infinitely many.
        on_grid: patches are the cells of the square grid, each once, which determines N.
        diagonal: include pairs of a patch with itself.

    Source: the variances of a discrete uniform variable and of a permutation.
    """
    if on_grid:
        num_patches = (extent // side) ** 2
        variance = ((extent // side) ** 2 - 1) / 12
        return 2 * variance * (1 if diagonal else num_patches / (num_patches - 1))
    variance = ((extent - side + 1) ** 2 - 1) / (12 * side**2)
    return 2 * variance * (1 - 1 / num_patches if diagonal and num_patches else 1)


def r_squared(predicted: Float[Tensor, "*B C"], target: Float[Tensor, "*B C"]) -> Float[Tensor, " C"]:
    """1 - (squared error) / (squared distance of the targets from their mean), for each channel.

    The denominator is the MSE of the best constant on the given targets; its mean over many batches is
    :func:`offset_floor`. NaN for a channel that does not vary.
    """
    predicted, target = predicted.flatten(0, -2).float(), target.flatten(0, -2).float()
    floor = (target - target.mean(0)).square().mean(0)
    return 1 - (predicted - target).square().mean(0) / torch.where(floor > 0, floor, math.nan)
