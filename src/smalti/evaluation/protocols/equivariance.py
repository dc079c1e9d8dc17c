"""Equivariance: do patch tokens move with the image? No labels, nothing learned.

A view of an image is mirrored, shifted by whole patches, or a part of it is enlarged; each token of the first view is
looked for among the tokens of the other. That a representation should follow a change of the image by a known
rearrangement of its cells is Lenc & Vedaldi, "Understanding image representations by measuring their equivariance and
equivalence", arXiv:1411.5908v2; the two measures here are our own, so there are no published numbers to compare with.
What they are not: a measure of meaning. Tokens that copy the colours of their patch score high, and tokens that say
where they are in the image score low, whatever else they know.
Letters: B images, N = h*w patches, M of them that both views show, S side of a view.
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
from smalti.evaluation.result import SHARE
from smalti.evaluation.tally import tally_mean

VIEWS = ("flip", "shift", "zoom")
ZOOM = 2
"""The middle of an image, this much smaller than it, is enlarged to its size."""
CONTRAST_UNIT = "difference of cosines, -2..2, higher is better"


def match(tokens: Float[Tensor, "M D"], others: Float[Tensor, "M D"]) -> tuple[float, float]:
    """How well each token finds the one that shows the same place.

    Args:
        tokens: ``(M, D)`` of one view.
        others: ``(M, D)`` of the other view, each in the place of its partner; with ``M >= 2``.

    Returns:
        Fraction of tokens whose cosine with their partner is greater than with every other token, 0..1 (ties don't
        count);
        mean cosine with the partner less mean cosine with all others.
    """
    sims = F.normalize(tokens, dim=1) @ F.normalize(others, dim=1).T
    partner = sims.diagonal()
    rest = sims - torch.diag_embed(torch.full_like(partner, torch.inf))
    found = (partner > rest.max(1).values + 1e-6).double().mean()  # rounding makes no winner of equal tokens
    count = len(sims)
    between = (sims.sum() - partner.sum()) / (count * (count - 1))
    return float(found), float(partner.mean() - between)


def shift_step(grid: tuple[int, int]) -> tuple[int, int]:
    """A quarter of the grid, at least one patch, down and across."""
    return max(1, grid[0] // 4), max(1, grid[1] // 4)


def flipped(grid: tuple[int, int]) -> Int[Tensor, " N"]:
    """For each patch the number of the patch that shows it in the mirrored image."""
    return torch.arange(grid[0] * grid[1]).view(grid).flip(1).flatten()


def shifted(grid: tuple[int, int], step: tuple[int, int]) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"]]:
    """Numbers of the patches that both views show, in the first view and in the one ``step`` further down and right."""
    numbers = torch.arange(grid[0] * grid[1]).view(grid)
    rows, columns = step
    return numbers[rows:, columns:].flatten(), numbers[: grid[0] - rows, : grid[1] - columns].flatten()


def enlarge(maps: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """The middle of images, or of maps of tokens, at their own size: read bilinearly at the centres of its cells."""
    # -1..1 is the whole map; the centres of its cells, drawn together
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
    """For each image and kind of view what :func:`match` says.

    Args:
        images: ``(B, C, S + step, S + step)`` in 0..1, ``step`` patches larger than a view: see :func:`shift_step`.
        encode: ``(B, C, S, S)`` images -> tokens.
        grid: of a view.
        patch_size: height and width in pixels.
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
            f"images of {size} pixels have {grid[0]}x{grid[1]} patches, equivariance needs 3x3 at least; "
            "set a greater eval.image_size"
        )
    chosen = spread(len(images), own.num_images)
    few = dataclasses.replace(images, samples=tuple(images.samples[place] for place in chosen))
    larger = size + max(step * side for step, side in zip(shift_step(grid), encoder.patch_size, strict=True))
    values = np.full((len(images), len(VIEWS), 2), np.nan)
    done = 0
    for pixels, positions, skipped in eval_batches(
        few,
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
        features.progress("equivariance", done, len(few))
    if not np.isfinite(values).any():
        raise DataError(f"{images.root}: none of the {len(few)} {features.evaluated} can be read")
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
        units={name: SHARE if name.startswith("match") else CONTRAST_UNIT for name in tallies},
        tallies=tallies,
    )
