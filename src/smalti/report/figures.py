"""Figures of the report and the README: curves as SVG, maps of patch tokens, data for the nearest-patch explorer.

Letters: B images, N = h*w patches, D embed_dim, M = B*N patches of all images, K components kept.
"""

import base64
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from smalti.config import write_atomically
from smalti.data.images import as_picture
from smalti.functional.components import reduce_patches
from smalti.models.encoder import Encoder, eval_mode

EXPLORER_DIMS = 32
"""Components kept of a patch token in the page's data, at most."""
_INK = "#010203"  # stands for the page's own text colour, see line_chart
_SERIES = tuple(f"#0a0b{number:02x}" for number in range(1, 7))  # stand for the page's variables --c1..--c6


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
    """The patch ``(image, number)`` whose similarities to all others differ most: something stands out there.

    Looked for in the middle of the images, where their subject mostly is.
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
        codes: encoder -> what :func:`quantise` gave and the share of the variance; the first encoder is shown first.
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
    """
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 8, "path.simplify": True}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for number, (name, (steps, values)) in enumerate(lines.items()):
            colour = _SERIES[number % len(_SERIES)]
            x, y = _with_gaps(steps, values)
            drawn_points = points or len(y) < 3
            is_smoothed = smooth and len(y) > 60
            axes.plot(
                x,
                y,
                color=colour,
                linewidth=0.7 if is_smoothed else 1.4,
                alpha=0.35 if is_smoothed else 1,
                marker="o" if drawn_points else None,
                markersize=3,
                label=None if is_smoothed else name,
            )
            if is_smoothed:
                axes.plot(x, _running_mean(y), color=colour, linewidth=1.5, label=name)
            if levels and name in levels:
                axes.axhline(levels[name], color=colour, linewidth=1.1, linestyle=(0, (4, 3)))
        for mark in marks:
            axes.axvline(mark, color=_INK, linewidth=0.8, linestyle=(0, (1, 2)), alpha=0.6)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=7.5, labelcolor=_INK, handlelength=1.2)
        axes.margins(x=0.01, y=0.12)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5), useMathText=False)
        axes.yaxis.get_offset_text().set_color(_INK)
        axes.locator_params(axis="both", nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set(color=_INK, alpha=0.35)
        axes.tick_params(colors=_INK, length=2.5, width=0.6)
        axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
        drawn = StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # several charts of a page would share them
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = svg.replace("xlink:href", "href").replace(_INK, "currentColor")
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
    """Mean that forgets over about a thirtieth of the curve; starts anew after a gap."""
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
