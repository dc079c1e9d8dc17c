"""Pictures of images that were drawn: a grid of them, and a film strip of how they came about.

Letters: B images, F of them in a film, S frames, N tokens.
"""

from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from smalti.data.images.decode import as_picture
from smalti.files import write_atomically
from smalti.runs.generate import Film

FOLDER = "samples"
"""In a run directory: the grid and the strip that were drawn last."""
_SMALLEST, _GAP, _PAPER = 64, 4, 255


def picture_grid(images: Float[Tensor, "B C H W"], columns: int | None = None) -> np.ndarray:
    """Images row by row on white, each at least 64 pixels wide: ``(H', W', 3)`` uint8.

    Args:
        images: in 0..1.
        columns: images in a row; None: as many as make the grid about square.
    """
    columns = columns or max(1, round(len(images) ** 0.5))
    return _tiles([[_enlarged(image) for image in row] for row in torch.split(images, columns)])


def film_strip(film: Film) -> np.ndarray:
    """A row an image: its frames from left to right, at the end a map of when each place was drawn, dark first."""
    rows = []
    for frames, ranks in zip(film.frames, film.ranks, strict=True):
        shade = ranks.view(film.grid).numpy() / max(ranks.numel() - 1, 1)
        colours = (matplotlib.colormaps["viridis"](shade)[..., :3] * 255).round().astype(np.uint8)
        tiles = [_enlarged(frame) for frame in frames]
        size = tiles[0].shape[1::-1]
        rows.append([*tiles, cv2.resize(colours, size, interpolation=cv2.INTER_NEAREST)])
    return _tiles(rows)


def write_png(path: Path, picture: np.ndarray) -> None:
    """``(H, W, 3)`` RGB or ``(H, W)``, uint8: whole file or none."""
    colour = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR) if picture.ndim == 3 and picture.shape[2] == 3 else picture
    done, encoded = cv2.imencode(".png", colour)
    assert done, "PNG takes any uint8 picture"
    write_atomically(path, encoded.tobytes())


def as_pixels(image: Float[Tensor, "C H W"]) -> np.ndarray:
    """``(H, W, C)`` uint8, rounded, of an image in 0..1."""
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def _enlarged(image: Tensor) -> np.ndarray:
    picture = as_picture(as_pixels(image))
    scale = -(-_SMALLEST // picture.shape[1])
    return np.kron(picture, np.ones((scale, scale, 1), dtype=np.uint8))


def _tiles(rows: list[list[np.ndarray]]) -> np.ndarray:
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    shape = (len(rows) * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3)
    page = np.full(shape, _PAPER, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            top, left = _GAP + i * (height + _GAP), _GAP + j * (width + _GAP)
            page[top : top + height, left : left + width] = tile
    return page
