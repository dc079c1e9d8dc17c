"""Pictures of orders of patches: scores as heat, the order as numbers and a path, and what the first patches show.

Letters: N patches of an h x w grid.
"""

import itertools
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure

from smalti.files import write_atomically

LEAST_PX, MOST_PX, CELL_PX = 320, 768, 34
"""Side of a picture, and of a patch in it where that goes."""
PATH = 12
"""First patches that the path joins."""
_HIDDEN = np.array((206, 204, 200), np.uint8)
_READABLE_PX = 20  # cells of fewer pixels have no numbers


def enlarge(picture: UInt8[np.ndarray, "H W 3"], grid: tuple[int, int]) -> UInt8[np.ndarray, "H2 W2 3"]:
    """A square picture, large enough for numbers in its patches, its side a multiple of the grid's."""
    side = min(max(LEAST_PX, CELL_PX * max(grid)), MOST_PX)
    height, width = (max(1, side // count) * count for count in grid)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC)


def heat_picture(
    picture: UInt8[np.ndarray, "H W 3"], scores: Float[np.ndarray, " N"], grid: tuple[int, int]
) -> UInt8[np.ndarray, "H W 3"]:
    """Scores over a grey picture, from the image's lowest (dark) to its highest (pale); equal scores are all dark."""
    low, high = float(scores.min()), float(scores.max())
    shares = (scores - low) / (high - low) if high > low else np.zeros_like(scores)
    height, width = picture.shape[:2]
    heat = matplotlib.colormaps["magma"](shares.reshape(grid))[..., :3].astype(np.float32) * 255
    heat = cv2.resize(heat, (width, height), interpolation=cv2.INTER_NEAREST)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    return (0.35 * grey + 0.65 * heat).clip(0, 255).astype(np.uint8)


def rank_map(values: Float[np.ndarray, " N"], grid: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """One pixel a patch, from dark (0) to pale (1)."""
    colours = matplotlib.colormaps["magma"](values.reshape(grid))[..., :3]
    return (colours * 255).round().astype(np.uint8)


def order_picture(
    picture: UInt8[np.ndarray, "H W 3"], order: Int[np.ndarray, " N"], grid: tuple[int, int], top: int
) -> UInt8[np.ndarray, "H W 3"]:
    """The first ``top`` patches clear with their numbers, the others pale; a path joins the first :data:`PATH`."""
    drawn = revealed_picture(picture, order, grid, top, pale=True)
    (height, width), cell = picture.shape[:2], picture.shape[0] // grid[0]
    rows, columns = order // grid[1], order % grid[1]
    centres = [
        (int((column + 0.5) * width / grid[1]), int((row + 0.5) * height / grid[0]))
        for row, column in zip(rows[:top].tolist(), columns[:top].tolist(), strict=True)
    ]
    for one, other in itertools.pairwise(centres[:PATH]):
        for colour, thickness in (((20, 20, 20), 4), ((255, 209, 102), 2)):
            cv2.line(drawn, one, other, colour, thickness, cv2.LINE_AA)
    if cell < _READABLE_PX:
        return drawn
    scale = min(0.8, cell / 60)
    for number, (x, y) in enumerate(centres, 1):
        (wide, tall), _ = cv2.getTextSize(str(number), cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        corner = (x - wide // 2, y + tall // 2)
        for colour, thickness in (((0, 0, 0), 4), ((255, 255, 255), 1)):
            cv2.putText(drawn, str(number), corner, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, thickness, cv2.LINE_AA)
    return drawn


def revealed_picture(
    picture: UInt8[np.ndarray, "H W 3"],
    order: Int[np.ndarray, " N"],
    grid: tuple[int, int],
    count: int,
    pale: bool = False,
) -> UInt8[np.ndarray, "H W 3"]:
    """The first ``count`` patches of a picture; the others are blank, or ``pale``."""
    shown = np.zeros(grid[0] * grid[1], np.uint8)
    shown[order[:count]] = 1
    height, width = picture.shape[:2]
    mask = cv2.resize(shown.reshape(grid), (width, height), interpolation=cv2.INTER_NEAREST)[..., None]
    behind = (0.3 * picture + 0.7 * _HIDDEN).astype(np.uint8) if pale else np.broadcast_to(_HIDDEN, picture.shape)
    return np.where(mask > 0, picture, behind)


def draw_sheet(path: Path, rows: Sequence[tuple[str, Mapping[str, UInt8[np.ndarray, "H W 3"]]]]) -> None:
    """Write a PNG: a row for each image, its name at the left, each picture under its heading.

    Args:
        path: the file.
        rows: name of an image, and heading -> picture.
    """
    columns = max(len(pictures) for _, pictures in rows)
    figure = Figure(figsize=(2.1 * columns, 2.35 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, pictures) in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        for place, (heading, picture) in enumerate(pictures.items()):
            line[place].imshow(picture)
            title = f"{_short(name)}\n{heading}" if place == 0 else heading
            line[place].set_title(title, fontsize=7, loc="left", parse_math=False).set_in_layout(place > 0)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110)
    write_atomically(path, file.getvalue())


def _short(name: str, most: int = 30) -> str:
    """The end of a long name."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
