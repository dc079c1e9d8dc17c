"""Pictures of attention maps, for pages.

Letters: H heads, Q queries, N = h*w patches.
"""

from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

TILE_PX, GAP_PX = 112, 4
"""Height of a map, and distance between two."""
_PAPER = 255


def attention_picture(
    picture: UInt8[np.ndarray, "S1 S2 3"],
    attention: Float[Tensor, "heads Q N"],
    grid: tuple[int, int],
    patches: Sequence[int | None],
    aspect: float = 1.0,
) -> UInt8[np.ndarray, "H W 3"]:
    """A row for each query: the image, the mean over heads, and each head.

    A map runs from dark (0) to pale (its own largest weight); its colours follow the square root, so that a single
    large weight does not hide all others.

    Args:
        picture: the image as the encoder was given it, RGB.
        attention: not negative.
        grid: ``(h, w)``.
        patches: patch of each query, which gets a frame; None: a query without a place, such as the class token.
        aspect: width over height of the image before it was made square.
    """
    size = (round(TILE_PX * min(max(aspect, 0.5), 2.0)), TILE_PX)
    tile = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    rows = []
    for query, patch in enumerate(patches):
        maps = [attention[:, query].mean(0), *attention[:, query]]
        tiles = [tile.copy(), *(_heat(weights.view(grid).double().numpy(), size) for weights in maps)]
        if patch is not None:
            for one in tiles:
                _frame(one, grid, patch)
        padded = [np.pad(one, ((0, GAP_PX), (0, GAP_PX), (0, 0)), constant_values=_PAPER) for one in tiles]
        rows.append(np.concatenate(padded, axis=1))
    return np.concatenate(rows)[:-GAP_PX, :-GAP_PX]


def _heat(weights: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    shade = np.sqrt(weights / max(float(weights.max()), 1e-30))
    colours = (matplotlib.colormaps["magma"](shade)[..., :3] * 255).round().astype(np.uint8)
    return cv2.resize(colours, size, interpolation=cv2.INTER_NEAREST)


def _frame(tile: np.ndarray, grid: tuple[int, int], patch: int) -> None:
    height, width = tile.shape[:2]
    down, across = divmod(patch, grid[1])
    corners = (
        (across * width // grid[1], down * height // grid[0]),
        ((across + 1) * width // grid[1] - 1, (down + 1) * height // grid[0] - 1),
    )
    for colour, thickness in (((0, 0, 0), 3), ((127, 240, 255), 1)):  # a rim on any picture
        cv2.rectangle(tile, *corners, colour, thickness)
