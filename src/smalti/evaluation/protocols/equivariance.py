"""Equivariance: do patch tokens move with the image? Needs no labels and no training.

A view of an image is mirrored, shifted by whole patches, or enlarged; each token of the first view is matched with the
tokens of the other. The idea that features should follow an image transformation by a known permutation of cells is
from Lenc & Vedaldi, "Understanding image representations by measuring their equivariance and equivalence",
arXiv:1411.5908v2; the two metrics here are our own, so there are no published numbers to compare with.
They don't measure semantics: tokens that copy the colours of their patch score high, and tokens that encode their
position score low, whatever else they encode.
Letters: B images, N = h*w patches, M of them visible in both views, S side of a view.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from smalti.config import Count, settings
from smalti.data.images.labelled import eval_batches
from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import spread
from smalti.evaluation.features import Features
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.result import FRACTION
from smalti.evaluation.tally import tally_mean

VIEWS = ("flip", "shift", "zoom")
ZOOM = 2
"""Factor by which the centre of an image is enlarged."""
CONTRAST_UNIT = "difference of cosines, -2..2, higher is better"


def match(tokens: Float[Tensor, "M D"], others: Float[Tensor, "M D"]) -> tuple[float, float]:
    """How well tokens match those of the same position in the other view.

    Args:
        tokens: ``(M, D)`` tokens of one view.
        others: ``(M, D)`` tokens of the other view, in the order of their partners, with ``M >= 2``.

    Returns:
        Fraction of tokens whose cosine with their partner is greater than with every other token, 0..1 (ties don't
        count);
        mean cosine with the partner minus mean cosine with all others.
    """
    sims = F.normalize(tokens, dim=1) @ F.normalize(others, dim=1).T
    partner = sims.diagonal()
    rest = sims - torch.diag_embed(torch.full_like(partner, torch.inf))
    found = (
        (partner > rest.max(1).values + 1e-6).double().mean()
    )  # margin: rounding must not decide between equal tokens
    count = len(sims)
    between = (sims.sum() - partner.sum()) / (count * (count - 1))
    return float(found), float(partner.mean() - between)


def shift_step(grid: tuple[int, int]) -> tuple[int, int]:
    """A quarter of the grid in each direction, at least one patch."""
    return max(1, grid[0] // 4), max(1, grid[1] // 4)


def flipped(grid: tuple[int, int]) -> Int[Tensor, " N"]:
    """For each patch, its index in the mirrored image."""
    return torch.arange(grid[0] * grid[1]).view(grid).flip(1).flatten()


def shifted(grid: tuple[int, int], step: tuple[int, int]) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"]]:
    """Indices of the patches visible in both views: in the first, and in the one shifted down and right by ``step``."""
    numbers = torch.arange(grid[0] * grid[1]).view(grid)
    rows, columns = step
    return numbers[rows:, columns:].flatten(), numbers[: grid[0] - rows, : grid[1] - columns].flatten()


def enlarge(maps: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """The centre of images, or of token maps, enlarged to full size by bilinear interpolation at cell centres."""
    # cell centres in -1..1 (the whole map), contracted towards the centre
    axes = [((torch.arange(side, dtype=torch.float32) * 2 + 1) / side - 1) / ZOOM for side in maps.shape[-2:]]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    where = torch.stack([columns, rows], dim=-1).to(maps)[None].expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps, where, mode="bilinear", padding_mode="border", align_corners=False)


def compare_views(
    images: Float[Tensor, "B C S1 S2"],
    encode: Callable[[Tensor], Float[Tensor, "B N D"]],
    grid: tuple[int, int],
    patch_size: tuple[int, int],
) -> list[dict[str, tuple[float, float]]]:
    """:func:`match` for each image and kind of view.

    Args:
        images: ``(B, C, S + step, S + step)`` in 0..1, ``step`` patches larger than a view: see :func:`shift_step`.
        encode: ``(B, C, S, S)`` images -> tokens.
        grid: patch grid of a view.
        patch_size: height and width of a patch in pixels.
    """
    step = shift_step(grid)
    height, width = grid[0] * patch_size[0], grid[1] * patch_size[1]
    top, left = step[0] * patch_size[0], step[1] * patch_size[1]
    view, moved = images[..., :height, :width], images[..., top : top + height, left : left + width]
    tokens = encode(view)
    maps = tokens.float().mT.reshape(len(tokens), -1, *grid)  # (B, N, D) -> (B, D, h, w)
    here, there = shifted(grid, step)
    pairs = {
        "flip": (tokens, encode(view.flip(-1))[:, flipped(grid)]),
        "shift": (tokens[:, here], encode(moved)[:, there]),
        "zoom": (enlarge(maps).flatten(2).mT, encode(enlarge(view))),
    }
    return [
        {name: match(ours[i].float(), others[i].float()) for name, (ours, others) in pairs.items()}
        for i in range(len(images))
    ]


@settings
class EquivarianceConfig:
    """Settings of ``equivariance``."""

    num_images: Count = 64
    """Number of images to measure, spread evenly over the set."""


@register_protocol("equivariance", need="images", settings=EquivarianceConfig, has_presets=False)
@torch.no_grad()
def equivariance(features: Features, config: EvalConfig) -> Scores:
    """Whether patch tokens follow flips, shifts and zooms of the image; needs no labels."""
    own: EquivarianceConfig = config.of("equivariance")
    size = features.dense_size(config.image_size)
    encoder, images = features.encoder, features.data.test
    grid = encoder.check_size(size, size)
    if min(grid) < 3:
        raise ConfigError(
            f"images of {size} pixels have {grid[0]}x{grid[1]} patches, but equivariance needs at least 3x3; "
            "set a larger eval.image_size"
        )
    chosen = spread(len(images), own.num_images)
    subset = dataclasses.replace(images, samples=tuple(images.samples[place] for place in chosen))
    larger = size + max(step * side for step, side in zip(shift_step(grid), encoder.patch_size, strict=True))
    values = np.full((len(images), len(VIEWS), 2), np.nan)
    done = 0
    for pixels, positions, skipped in eval_batches(
        subset,
        larger,
        encoder.in_chans,
        mode="squash",
        batch_size=features.batch_size,
        num_workers=features.num_workers,
    ):
        features.skipped.update({str(item.path): item.reason for item in skipped})
        done += len(positions) + len(skipped)
        if positions:
            scaled = (pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels).to(features.device)
            for position, found in zip(
                positions, compare_views(scaled, features.patches, grid, encoder.patch_size), strict=True
            ):
                values[chosen[position]] = [found[name] for name in VIEWS]
        features.progress("equivariance", done, len(subset))
    if not np.isfinite(values).any():
        raise DataError(f"{images.root}: none of the {len(subset)} {features.evaluated} can be read")
    columns = {
        "match": values[:, :, 0].mean(1),
        **{f"match_{name}": values[:, i, 0] for i, name in enumerate(VIEWS)},
        "contrast": values[:, :, 1].mean(1),
        **{f"contrast_{name}": values[:, i, 1] for i, name in enumerate(VIEWS)},
    }
    tallies = {name: tally_mean(column) for name, column in columns.items()}
    num_shared = len(shifted(grid, shift_step(grid))[0])
    settings = {
        "image_size": size,
        "resize": f"to a square of {larger} pixels, aspect ratio ignored; views are {size} pixels of it",
        "num_images": int(np.isfinite(values[:, 0, 0]).sum()),
        "shift_in_patches": list(shift_step(grid)),
        "zoom": ZOOM,
        "chance": {"flip": 1 / (grid[0] * grid[1]), "shift": 1 / num_shared, "zoom": 1 / (grid[0] * grid[1])},
        "cache_dtype": config.cache_dtype,
    }
    return Scores(
        {name: tally.score() for name, tally in tallies.items()},
        settings,
        {},
        units={name: FRACTION if name.startswith("match") else CONTRAST_UNIT for name in tallies},
        tallies=tallies,
    )
