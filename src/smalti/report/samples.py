"""Pictures of images that were drawn: a grid of them, a film strip of the steps, and a classifier's certainty.

Letters: B images, F of them in a film, S frames, N tokens.
"""

from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from smalti.data.images.decode import as_picture
from smalti.files import write_atomically
from smalti.runs.certainty import Certainty
from smalti.runs.generate import Film

FOLDER = "samples"
"""In a run directory: the grid and the strip that were drawn last."""
_SMALLEST, _GAP, _PAPER, _STRIP = 64, 4, 255, 18


def picture_grid(images: Float[Tensor, "B C H W"], columns: int | None = None) -> np.ndarray:
    """Images row by row on white, each at least 64 pixels wide: ``(H', W', 3)`` uint8.

    Args:
        images: in 0..1.
        columns: images in a row; None: as many as make the grid about square.
    """
    columns = columns or max(1, round(len(images) ** 0.5))
    return _tiles([[_enlarged(image) for image in row] for row in torch.split(images, columns)])


def film_strip(film: Film, certainty: Float[Tensor, "F S"] | None = None) -> np.ndarray:
    """A row an image: its frames from left to right, at the end a map of when each place was drawn, dark first.

    Args:
        film: the frames.
        certainty: a probability for each frame, written below it with a bar.
    """
    rows = []
    for number, (frames, ranks) in enumerate(zip(film.frames, film.ranks, strict=True)):
        shade = ranks.view(film.grid).numpy() / max(ranks.numel() - 1, 1)
        colours = (matplotlib.colormaps["viridis"](shade)[..., :3] * 255).round().astype(np.uint8)
        tiles = [_enlarged(frame) for frame in frames]
        size = tiles[0].shape[1::-1]
        row = [*tiles, cv2.resize(colours, size, interpolation=cv2.INTER_NEAREST)]
        if certainty is not None:
            row = [_with_bar(tile, value) for tile, value in zip(row, [*certainty[number].tolist(), None], strict=True)]
        rows.append(row)
    return _tiles(rows)


def certainty_picture(certainty: Certainty) -> np.ndarray:
    """The certainty of each image (thin) and their mean (bold) against the fraction that is drawn, ``(H, W, 3)``."""
    figure = Figure(figsize=(5.2, 3.4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    drawn = [100 * fraction for fraction in certainty.fractions]
    axes.plot(drawn, 100 * certainty.values.T.numpy(), color="#9a948c", linewidth=0.6, alpha=0.5)
    axes.plot(drawn, 100 * certainty.values.mean(0).numpy(), color="#0072b2", linewidth=2.2, marker="o", markersize=4)
    axes.axhline(100 / certainty.num_classes, color="#6b665f", linewidth=1.1, linestyle=(0, (4, 3)))
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="drawn (%)", ylabel="certainty (%)")
    title = f"{len(certainty.values)} images and their mean; dashed: chance"
    axes.set_title(title, fontsize=9, loc="left", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


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


def _with_bar(tile: np.ndarray, value: float | None) -> np.ndarray:
    """A tile above a strip with a probability as number and bar; None: an empty strip."""
    width = tile.shape[1]
    strip = np.full((_STRIP, width, 3), _PAPER, np.uint8)
    if value is not None:
        cv2.rectangle(strip, (0, 1), (width - 1, 4), (222, 218, 212), cv2.FILLED)
        if (length := round(value * width)) > 0:
            cv2.rectangle(strip, (0, 1), (length - 1, 4), (0, 114, 178), cv2.FILLED)
        place = (0, _STRIP - 2)
        cv2.putText(strip, f"{100 * value:.0f} %", place, cv2.FONT_HERSHEY_SIMPLEX, 0.36, (40, 38, 35), 1, cv2.LINE_AA)
    return np.concatenate([tile, strip])


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
