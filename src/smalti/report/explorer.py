"""Data of the nearest-patch explorer: patch tokens small enough for a page.

Letters: B images, N = h*w patches, K components kept.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

EXPLORER_DIMS = 32
"""Maximum number of principal components of a patch token in the page's data."""


def quantise(coordinates: Float[Tensor, "B N K"]) -> Int[Tensor, "B N K"]:
    """Coordinates of :func:`reduce_patches`, normalised and rounded to steps of 1/127 as int8: precise enough for
    cosine similarities on a page."""
    return (torch.nn.functional.normalize(coordinates, dim=-1) * 127).round().to(torch.int8)


def distinctive_patch(codes: Int[Tensor, "B N K"], grid: tuple[int, int]) -> tuple[int, int]:
    """The patch ``(image, number)`` with the highest variance of similarities to all others.

    Only patches in the middle of the images, where the subject mostly is.
    """
    unit = torch.nn.functional.normalize(codes.flatten(0, 1).float(), dim=-1)
    second = unit.T @ unit / len(unit)  # the mean of squared similarities of x is x' S x, their mean is x' m
    spread = ((unit @ second * unit).sum(1) - (unit @ unit.mean(0)).square()).view(-1, *grid)
    middle = torch.zeros(grid, dtype=torch.bool)
    middle[grid[0] // 4 : grid[0] - grid[0] // 4, grid[1] // 4 : grid[1] - grid[1] // 4] = True
    return divmod(int(spread.masked_fill(~middle, -1).argmax()), codes.shape[1])


def explorer_data(
    codes: Mapping[str, tuple[Int[Tensor, "B N K"], float]], grid: tuple[int, int], names: Sequence[str]
) -> dict[str, Any]:
    """Data of the page's script, which compares any patch with all others; plain values.

    Args:
        codes: encoder -> output of :func:`quantise` and explained variance ratio; the first encoder is shown first.
        grid: ``(h, w)`` of every image.
        names: of the images.
    """
    first = next(iter(codes.values()))[0]
    return {
        "grid": list(grid),
        "names": list(names),
        "start": list(distinctive_patch(first, grid)),
        "encoders": [
            {
                "name": name,
                "dims": code.shape[-1],
                "explained": round(explained, 4),
                "codes": base64.b64encode(code.contiguous().numpy().tobytes()).decode(),
            }
            for name, (code, explained) in codes.items()
        ],
    }
