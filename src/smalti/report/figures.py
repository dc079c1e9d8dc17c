"""Figures of the report and the README: curves as SVG, maps of patch tokens, data for the nearest-patch explorer.

Letters: B images, N = h*w patches, D embed_dim, M = B*N patches of all images, K components kept.
"""

import base64
import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator
from torch import Tensor

from smalti.data.images.decode import as_picture
from smalti.files import write_atomically
from smalti.functional.colours import palette
from smalti.functional.components import reduce_patches
from smalti.models.encoder import Encoder, eval_mode

EXPLORER_DIMS = 32
"""Components kept of a patch token in the page's data, at most."""
_INK = "#010203"  # stands for the page's own text colour, see line_chart
_MUTED = "#010205"  # stands for the page's grey
_PAPER = "#010204"  # stands for the page's background
_SERIES = tuple(f"#0a0b{number:02x}" for number in range(1, 7))  # stand for the page's variables --c1..--c6
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))  # for more lines than colours
_CELL = (52, 128, 196)
"""Full cells of a confusion matrix: dark and light text are legible on it."""
FEW_CLASSES = 12
"""Up to so many classes a confusion matrix has numbers."""
_LONGEST_NAME = 22


@dataclasses.dataclass(frozen=True)
class ShownImages:
    """The images that the report shows, as the encoder sees them and as a person does."""

    names: tuple[str, ...]
    """One a image, for captions."""
    inputs: tuple[np.ndarray, ...]
    """``(H, W, C)`` uint8 or float32 in 0..1, of the encoder's size."""
    pictures: tuple[np.ndarray, ...]
    """``(H', W', 3)`` uint8 RGB: the same crop with more pixels, where the file has them."""


def crop_images(names: Sequence[str], images: Sequence[np.ndarray], size: tuple[int, int], view_px: int) -> ShownImages:
    """Centre crops of one shape.

    Args:
        names: for captions.
        images: ``(H, W, C)`` uint8 or float32 in 0..1, of any sizes.
        size: ``(height, width)`` in pixels that the encoder is given.
        view_px: the longer side of what is shown, in pixels; never more than the crop has, never less than ``size``.
    """
    inputs, pictures = [], []
    for image in images:
        crop = _centre(image, size[1] / size[0])
        inputs.append(_resize(crop, size))
        scale = max(1.0, min(view_px, max(crop.shape[:2])) / max(size))
        pictures.append(as_picture(_resize(crop, (round(size[0] * scale), round(size[1] * scale)))))
    return ShownImages(tuple(names), tuple(inputs), tuple(pictures))


@torch.inference_mode()
def patch_tokens(encoder: Encoder, inputs: Sequence[np.ndarray], batch_size: int = 8) -> tuple[Tensor, tuple[int, int]]:
    """Patch tokens of images of one size.

    Args:
        encoder: on any device; left in the mode in which it came.
        inputs: ``(H, W, C)`` arrays, uint8 or float32 in 0..1.
        batch_size: images at a time.

    Returns:
        ``(B, N, D)`` tokens on the CPU in float32, and the grid ``(h, w)``.
    """
    device = next(encoder.parameters()).device
    tokens, grid = [], (0, 0)
    with eval_mode(encoder):
        for start in range(0, len(inputs), batch_size):
            batch = [_to_float(image).transpose(2, 0, 1) for image in inputs[start : start + batch_size]]
            features = encoder.encode(encoder.normalize(torch.from_numpy(np.stack(batch)).to(device)))
            tokens.append(features.patches.float().cpu())
            grid = features.grid
    return torch.cat(tokens), grid


def pca_maps(coordinates: Float[Tensor, "B N K"], grid: tuple[int, int]) -> np.ndarray:
    """The first three principal components of all images' patches as red, green and blue.

    Args:
        coordinates: from :func:`reduce_patches`.
        grid: ``(h, w)`` of every image.

    Returns:
        ``(B, h, w, 3)`` uint8; each component runs from its 1st to its 99th percentile over all images.
    """
    first = coordinates.flatten(0, 1)[:, :3]
    low, high = (torch.quantile(first, q, dim=0) for q in (0.01, 0.99))
    spread = high - low
    scaled = ((first - low) / spread.clamp(min=1e-12)).clamp(0, 1)
    colours = torch.full((len(first), 3), 0.5)
    colours[:, : first.shape[1]] = torch.where(spread > 1e-12, scaled, 0.5)
    return (colours * 255).round().byte().view(len(coordinates), *grid, 3).numpy()


def quantise(coordinates: Float[Tensor, "B N K"]) -> Int[Tensor, "B N K"]:
    """Coordinates of :func:`reduce_patches` at unit length in steps of 1/127, as int8: enough for cosines on a page."""
    return (torch.nn.functional.normalize(coordinates, dim=-1) * 127).round().to(torch.int8)


def telling_patch(codes: Int[Tensor, "B N K"], grid: tuple[int, int]) -> tuple[int, int]:
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
    """What the page's script needs to compare any patch with all others; plain values.

    Args:
        codes: encoder -> output of :func:`quantise` and explained variance ratio; the first encoder is shown first.
        grid: ``(h, w)`` of every image.
        names: of the images.
    """
    first = next(iter(codes.values()))[0]
    return {
        "grid": list(grid),
        "names": list(names),
        "start": list(telling_patch(first, grid)),
        "encoders": [
            {
                "name": name,
                "dims": code.shape[-1],
                "share": round(share, 4),
                "codes": base64.b64encode(code.contiguous().numpy().tobytes()).decode(),
            }
            for name, (code, share) in codes.items()
        ],
    }


def image_uri(image: np.ndarray, ending: str = ".jpg") -> str:
    """An image ``(H, W, 3)`` uint8 RGB as a ``data:`` address; ``.png`` keeps every value."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 82] if ending == ".jpg" else []
    _, data = cv2.imencode(ending, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    kind = {".jpg": "jpeg", ".png": "png"}[ending]
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}"


def line_chart(
    title: str,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    size: tuple[float, float] = (3.6, 2.0),
    marks: Sequence[float] = (),
    levels: Mapping[str, float] | None = None,
    points: bool = False,
    smooth: bool = False,
    muted: Collection[str] = (),
) -> str:
    """A chart as inline SVG that takes its colours from the page, light or dark.

    Args:
        title: for readers who can't see it; the page writes the visible one.
        lines: name -> steps and values; values that aren't finite leave a gap, and so does a step back in time.
        size: ``(width, height)`` in inches.
        marks: steps at which something happened, as dotted upright lines.
        levels: name -> a value to compare with, as a dashed level line in the line's colour.
        points: draw the single values, for few of them.
        smooth: draw a running mean over a noisy line that is long enough.
        muted: names of lines that are grey, such as a baseline.
    """
    with _svg_style(title):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for number, (name, (steps, values)) in enumerate(lines.items()):
            colour = _MUTED if name in muted else _SERIES[number % len(_SERIES)]
            dashes = _DASHES[number // len(_SERIES) % len(_DASHES)]
            x, y = _with_gaps(steps, values)
            drawn_points = points or len(y) < 3
            is_smoothed = smooth and len(y) > 60
            axes.plot(
                x,
                y,
                color=colour,
                linewidth=0.7 if is_smoothed else 1.4,
                linestyle=dashes,
                alpha=0.35 if is_smoothed else 1,
                marker="o" if drawn_points else None,
                markersize=3,
                label=None if is_smoothed else name,
            )
            if is_smoothed:
                axes.plot(x, _running_mean(y), color=colour, linewidth=1.5, linestyle=dashes, label=name)
            if levels and name in levels:
                axes.axhline(levels[name], color=colour, linewidth=1.1, linestyle=(0, (4, 3)))
        for mark in marks:
            axes.axvline(mark, color=_INK, linewidth=0.8, linestyle=(0, (1, 2)), alpha=0.6)
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor=_INK, handlelength=1.2)
        axes.margins(x=0.01, y=0.12)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5), useMathText=False)
        axes.yaxis.get_offset_text().set_color(_INK)
        axes.locator_params(axis="both", nbins=5)
        axes.locator_params(axis="x", integer=True)  # steps and layers
        _plain_axes(axes)
        axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
        return _as_svg(figure, title)


class SweepPoint(NamedTuple):
    """A point of :func:`sweep_chart`."""

    share: float
    """Above 0."""
    value: float
    low: float
    """NaN if there is no interval."""
    high: float


def sweep_chart(
    title: str,
    lines: Mapping[str, Sequence[SweepPoint]],
    *,
    muted: Collection[str] = (),
    axis: Literal["shares", "rates", "speed"] = "shares",
) -> str:
    """Scores against fractions of something, with their intervals as bands, as inline SVG.

    Args:
        title: for readers who can't see it.
        lines: name -> points.
        muted: names of lines that are grey, such as a baseline.
        axis: ``shares``: few, on a logarithmic scale, each with its tick; ``rates``: many of 0..1; ``speed``: numbers
            above 0 of any size, on a logarithmic scale.
    """
    with _svg_style(title):
        figure = Figure(figsize=(9.2, 2.7), layout="constrained")
        axes = figure.subplots()
        for number, (name, points) in enumerate(lines.items()):
            colour = _MUTED if name in muted else _SERIES[number % len(_SERIES)]
            shares = [point.share for point in points]
            axes.plot(
                shares,
                [p.value for p in points],
                color=colour,
                linewidth=1.4,
                linestyle=_DASHES[number // len(_SERIES) % len(_DASHES)],
                marker="o",
                markersize=3,
                label=name,
            )
            axes.fill_between(
                shares, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.15, linewidth=0
            )
        if axis != "rates":
            axes.set_xscale("log")
        if axis == "speed":
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            shares = sorted({point.share for points in lines.values() for point in points})
            shares = [tenth / 10 for tenth in range(11)] if axis == "rates" else shares
            axes.set_xticks(shares, [f"{100 * share:g} %" for share in shares])
            axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(frameon=False, labelcolor=_INK, handlelength=1.2)
        axes.margins(x=0.02, y=0.12)
        _plain_axes(axes)
        axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
        return _as_svg(figure, title)


def hypnogram_chart(
    title: str, lines: Mapping[str, Int[np.ndarray, " n"]], names: Sequence[str], *, muted: Collection[str] = ()
) -> str:
    """Stages over a night as steps, a panel each, as inline SVG; what has no stage is a gap.

    Args:
        title: for readers who can't see it.
        lines: name -> stage of each window; numbers beyond ``names`` are no stage.
        names: of the stages; drawn downwards, the last (REM) below the first (W), as sleep laboratories do.
        muted: names of lines that are grey, such as a baseline.
    """
    order = [0, len(names) - 1, *range(1, len(names) - 1)]
    height = {stage: len(names) - 1 - place for place, stage in enumerate(order)}
    with _svg_style(title):
        figure = Figure(figsize=(9.2, 1.1 * len(lines)), layout="constrained")
        panels = figure.subplots(len(lines), 1, sharex=True, squeeze=False)[:, 0]
        for number, (axes, (name, stages)) in enumerate(zip(panels, lines.items(), strict=True)):
            colour = _MUTED if name in muted else _INK if number == 0 else _SERIES[(number - 1) % len(_SERIES)]
            levels = np.array([height.get(int(stage), np.nan) for stage in stages], dtype=np.float64)
            axes.step(np.arange(len(levels)), levels, where="mid", color=colour, linewidth=1.1)
            axes.set_yticks(range(len(names)), [names[stage] for stage in reversed(order)])
            axes.set_ylim(-0.4, len(names) - 0.6)
            axes.set_title(name, loc="left", color=_INK, fontsize=8)
            axes.margins(x=0.01)
            _plain_axes(axes)
        return _as_svg(figure, title)


def confusion_chart(title: str, matrix: Int[np.ndarray, "G P"], names: Sequence[str]) -> str:
    """Confusion matrix as inline SVG: fractions of each true class, as the opacity of blue.

    Up to a dozen classes show percentages; with more, the opacity is the square root of the fraction, so
    that small confusions are seen.

    Args:
        title: for readers who can't see it.
        matrix: counts, ground truth down, prediction across. A row without counts stays empty.
        names: of the classes; numbers replace missing names.
    """
    rows, columns = matrix.shape
    total = matrix.sum(1, keepdims=True)
    share = np.divide(matrix, total, out=np.zeros(matrix.shape), where=total > 0)
    few = max(rows, columns) <= FEW_CLASSES
    picture = np.empty((rows, columns, 4))
    picture[..., :3], picture[..., 3] = np.array(_CELL) / 255, share if few else np.sqrt(share)
    labels = [names[i] if i < len(names) else str(i) for i in range(max(rows, columns))]
    labels = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in labels]
    side = 0.42 if few else max(0.125, min(0.3, 7.2 / max(rows, columns)))  # of a cell, in inches
    margin = 0.075 * max(map(len, labels)) + 0.5
    with _svg_style(title):
        figure = Figure(figsize=(side * columns + margin, side * rows + margin), layout="constrained")
        axes = figure.subplots()
        axes.imshow(picture, interpolation="none", aspect="equal")
        axes.set_xticks(range(columns), labels[:columns], rotation=90)
        axes.set_yticks(range(rows), labels[:rows])
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel("prediction", color=_INK, alpha=0.7)
        axes.set_ylabel("truth", color=_INK, alpha=0.7)
        _plain_axes(axes)
        axes.tick_params(length=0, labelsize=8 if side > 0.14 else 7)
        axes.spines[:].set_visible(False)
        for edges, line in ((rows, axes.axhline), (columns, axes.axvline)):
            for place in range(edges + 1) if few else (0, edges):
                line(place - 0.5, color=_INK, alpha=0.15, linewidth=0.5)
        if few:
            for row, column in zip(*np.nonzero(share >= 0.005), strict=True):
                axes.text(column, row, f"{share[row, column] * 100:.0f}", ha="center", va="center", color=_INK)
        return _as_svg(figure, title)


@dataclasses.dataclass(frozen=True)
class ForestRow:
    """A line of :func:`forest_chart`; NaN if there is nothing to draw."""

    name: str
    mean: float
    low: float
    high: float
    points: tuple[float, ...] = ()
    """Single values, such as the seeds'."""
    difference: float = math.nan
    difference_low: float = math.nan
    difference_high: float = math.nan


def forest_chart(title: str, rows: Sequence[ForestRow], reference: str) -> str:
    """Means with intervals at the left, differences to the reference at the right, as inline SVG.

    A difference whose interval holds zero has a hollow mark, the others a filled one.

    Args:
        title: for readers who can't see it.
        rows: from top to bottom, the reference included.
        reference: what the differences are against.
    """
    with _svg_style(title):
        figure = Figure(figsize=(9.2, 0.62 + 0.27 * len(rows)), layout="constrained")
        means, gaps = figure.subplots(1, 2, sharey=True)
        for number, row in enumerate(rows):
            colour = _SERIES[number % len(_SERIES)]
            for axes, mean, low, high, is_full in (
                (means, row.mean, row.low, row.high, True),
                (gaps, row.difference, row.difference_low, row.difference_high, _excludes_zero(row)),
            ):
                if math.isfinite(low) and math.isfinite(high):
                    axes.plot([low, high], [number, number], color=colour, linewidth=1.8, solid_capstyle="round")
                if math.isfinite(mean):
                    face = colour if is_full else "none"
                    axes.plot([mean], [number], "o", color=colour, markerfacecolor=face, markersize=6.5)
                    if not is_full:  # the interval would show through
                        axes.plot([mean], [number], "o", color=_PAPER, markersize=4.2)
            means.plot(row.points, [number + 0.27] * len(row.points), "|", color=colour, markersize=4.5)
        means.set_yticks(range(len(rows)), [row.name for row in rows])
        means.set_ylim(len(rows) - 0.4, -0.6)
        gaps.axvline(0, color=_INK, alpha=0.5, linewidth=0.8, linestyle=(0, (4, 3)))
        for axes, label in ((means, "mean; ticks: seeds"), (gaps, f"difference to {reference}")):
            _plain_axes(axes)
            axes.locator_params(axis="x", nbins=5)
            axes.margins(x=0.06)
            axes.set_xlabel(label, color=_INK, alpha=0.7)
            axes.grid(axis="x", color=_INK, alpha=0.12, linewidth=0.6)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
        gaps.tick_params(axis="y", labelleft=False)
        return _as_svg(figure, title)


def _excludes_zero(row: ForestRow) -> bool:
    return row.difference_low > 0 or row.difference_high < 0


def overlay(picture: UInt8[np.ndarray, "H W 3"], classes: Int[np.ndarray, "M1 M2"]) -> UInt8[np.ndarray, "H W 3"]:
    """A picture in grey under the colours of its classes, with the picture's own brightness and lines between them.

    Args:
        picture: RGB.
        classes: of each pixel, by nearest pixel where the size differs; -1 counts for nothing and stays grey.
    """
    height, width = picture.shape[:2]
    rows, columns = (np.arange(side) * classes.shape[axis] // side for axis, side in enumerate((height, width)))
    classes = classes[rows[:, None], columns[None, :]]
    colours = palette(int(classes.max(initial=0)) + 1)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    known = (classes >= 0)[..., None]
    mixed = np.where(known, 0.3 * grey + 0.7 * colours[classes.clip(0)], 0.6 * grey + 100)
    edges = np.zeros(classes.shape, bool)
    edges[1:] |= classes[1:] != classes[:-1]
    edges[:, 1:] |= classes[:, 1:] != classes[:, :-1]
    mixed[edges] = 255
    return mixed.clip(0, 255).astype(np.uint8)


def boxes_picture(
    picture: UInt8[np.ndarray, "H W 3"], boxes: Float[np.ndarray, "n 4"], labels: Int[np.ndarray, " n"]
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """A pale picture twice as large, with a frame around each object in the colour of its class.

    Args:
        picture: RGB.
        boxes: x0 y0 x1 y1 as fractions of the picture's sides.
        labels: of each; class 0 has the palette's second colour, as the first is for backgrounds.
    """
    height, width = (2 * side for side in picture.shape[:2])
    pale = (0.65 * cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR) + 60).astype(np.uint8)
    colours = palette(int(labels.max(initial=0)) + 2)
    corners = (boxes.clip(0, 1) * np.array([width - 1, height - 1] * 2)).round().astype(int)
    for (x0, y0, x1, y1), label in zip(corners.tolist(), labels.tolist(), strict=True):
        for colour, thickness in (((20, 20, 20), 5), (tuple(colours[label + 1].tolist()), 3)):  # a rim on any picture
            cv2.rectangle(pale, (x0, y0), (x1, y1), colour, thickness)
    return pale


def similarity_picture(
    picture: UInt8[np.ndarray, "H W 3"], coordinates: Float[Tensor, "N K"], grid: tuple[int, int], query: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Cosine similarity of each patch to one of them, from dark (0 or less) to pale (1), over the picture.

    Args:
        picture: RGB.
        coordinates: of the image's patches, from :func:`~smalti.functional.components.reduce_patches`.
        grid: ``(h, w)``.
        query: number of the patch, which gets a frame.
    """
    unit = torch.nn.functional.normalize(coordinates.float(), dim=-1)
    sims = (unit @ unit[query]).view(grid).clamp(0, 1).numpy()
    height, width = picture.shape[:2]
    heat = matplotlib.colormaps["magma"](sims)[..., :3] * 255
    heat = cv2.resize(heat.astype(np.float32), (width, height), interpolation=cv2.INTER_NEAREST)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None]
    mixed = (0.2 * grey + 0.8 * heat).clip(0, 255).astype(np.uint8)
    return _framed(mixed, grid, query)


def _framed(picture: np.ndarray, grid: tuple[int, int], query: int) -> np.ndarray:
    down, across = divmod(query, grid[1])
    height, width = picture.shape[:2]
    top, bottom = (down * height // grid[0], (down + 1) * height // grid[0] - 1)
    left, right = (across * width // grid[1], (across + 1) * width // grid[1] - 1)
    cv2.rectangle(picture, (left, top), (right, bottom), (0, 0, 0), 4)
    cv2.rectangle(picture, (left, top), (right, bottom), (255, 255, 255), 2)
    return picture


def _svg_style(title: str) -> AbstractContextManager[None]:
    settings = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 8, "path.simplify": True}
    return matplotlib.rc_context({**settings, "text.parse_math": False})  # names of classes and images may hold $


def _plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=_INK, alpha=0.35)
    axes.tick_params(colors=_INK, length=2.5, width=0.6)


def _as_svg(figure: Figure, title: str) -> str:
    """A figure as SVG without what a page doesn't need, in the page's own colours."""
    drawn = StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # several charts of a page would share them
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = (
        svg.replace("xlink:href", "href")
        .replace(_INK, "currentColor")
        .replace(_PAPER, "var(--card)")
        .replace(_MUTED, "var(--none)")
    )
    for number, colour in enumerate(_SERIES, 1):
        svg = svg.replace(colour, f"var(--c{number})")
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def hero_figure(
    encoder: Encoder, images: Sequence[np.ndarray], out: Path, *, size: tuple[int, int] | None = None
) -> Path:
    """One row an image: the image, similarity to its most telling patch, its PCA map; a PNG for a README.

    Args:
        encoder: whose patch tokens are drawn.
        images: ``(H, W, C)`` uint8 or float32 in 0..1; PCA and mean are taken over all of them.
        out: a ``.png`` file.
        size: ``(height, width)`` in pixels that the encoder is given; None takes its native one.

    Raises:
        ConfigError: if ``out`` can't be written.
    """
    shown = crop_images([""] * len(images), images, size or encoder.img_size, view_px=448)
    patches, grid = patch_tokens(encoder, shown.inputs)
    coordinates, _ = reduce_patches(patches, EXPLORER_DIMS)
    colours = pca_maps(coordinates, grid)
    codes = quantise(coordinates)
    unit = torch.nn.functional.normalize(coordinates, dim=-1)
    figure = Figure(figsize=(6.6, 2.15 * len(images) + 0.25), layout="constrained", dpi=160)
    axes = figure.subplots(len(images), 3, squeeze=False)
    for row, picture in enumerate(shown.pictures):
        height, width = picture.shape[:2]
        extent = (0, width, height, 0)
        _, query = telling_patch(codes[row : row + 1], grid)
        sims = (unit[row] @ unit[row, query]).view(grid).numpy()
        down, across = divmod(query, grid[1])
        patch_h, patch_w = height / grid[0], width / grid[1]
        axes[row, 0].imshow(picture, extent=extent)
        axes[row, 1].imshow(picture, extent=extent)
        axes[row, 1].imshow(sims, extent=extent, cmap="magma", vmin=0, vmax=1, alpha=0.8, interpolation="nearest")
        axes[row, 1].add_patch(
            Rectangle((across * patch_w, down * patch_h), patch_w, patch_h, fill=False, color="white", linewidth=1.6)
        )
        axes[row, 2].imshow(colours[row], extent=extent, interpolation="nearest")
    for cell in axes.flat:
        cell.set_axis_off()
    for cell, title in zip(axes[0], ("image", "similarity to one patch", "PCA of patch tokens"), strict=True):
        cell.set_title(title, fontsize=9)
    drawn = BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    write_atomically(out, drawn.getvalue())
    return out


def _with_gaps(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """NaN between a step and an earlier one (the run went back), and for what isn't finite."""
    x: list[float] = []
    y: list[float] = []
    for step, value in zip(steps, values, strict=True):
        if x and step <= x[-1]:
            x.append(x[-1])
            y.append(math.nan)
        x.append(step)
        y.append(value if math.isfinite(value) else math.nan)
    return x, y


def _running_mean(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about 1/30 of the curve; restarts after a gap."""
    keep = 1 - min(1.0, 30 / len(values))
    result: list[float] = []
    mean = weight = 0.0
    for value in values:
        if math.isnan(value):
            mean = weight = 0.0
            result.append(value)
            continue
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        result.append(mean / weight)
    return result


def _centre(image: np.ndarray, aspect: float) -> np.ndarray:
    """The largest centred part of an image with ``width = aspect * height``."""
    height, width = image.shape[:2]
    crop_h = min(height, max(1, round(width / aspect)))
    crop_w = min(width, max(1, round(height * aspect)))
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    return image[top : top + crop_h, left : left + crop_w]


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    shrinks = size[0] < image.shape[0]
    way = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    planes = [cv2.resize(image[..., c], size[::-1], interpolation=way) for c in range(image.shape[2])]  # any number
    resized = np.stack(planes, axis=-1)
    return resized if resized.dtype == np.uint8 else resized.clip(0, 1)


def _to_float(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) / 255 if image.dtype == np.uint8 else image.astype(np.float32)
