"""The picture of a probe of positions: offsets predicted and true, patches at their predicted places."""

import math
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from smalti.files import write_atomically
from smalti.runs.probe import GATES, PositionProbe

_POINTS = 2000
_LEAST = 1e-8  # where bars begin


def draw_positions(probe: PositionProbe, path: Path) -> None:
    """Write a PNG: a row for each image or window, with tables of offsets along its first axis (predicted, true;
    patches sorted along it), all offsets against the truth, and the patches at their true places and where the offsets
    from the first one put them. Above them what leaks, and how well offsets fit by distance."""
    rows, unit, axes_names = len(probe.boxes), probe.unit, ("time",) if probe.is_signal else ("x", "y")
    figure = Figure(figsize=(15, 3 * rows + 2.6), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(2.6, 3 * rows))[:, 0]
    leaks, distances = above.subplots(1, 2, width_ratios=(3, 2))
    _draw_leaks(leaks, probe)
    _draw_distances(distances, probe)
    axes = below.subplots(rows, 5, squeeze=False)
    for row in range(rows):
        boxes, predicted, truth = probe.boxes[row], probe.predicted[row], probe.truth[row]
        order = boxes[:, 0].argsort()
        limit = float(truth.abs().max())
        for place, (name, table) in enumerate((("predicted", predicted), ("true", truth))):
            values = table[order][:, order, 0].numpy()
            axes[row, place].imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            axes[row, place].set(title=f"{axes_names[0]} offset, {name} ({unit})", xticks=[], yticks=[])
        flat = np.linspace(0, truth[..., 0].numel() - 1, _POINTS).astype(int)
        for axis, (name, colour) in enumerate(zip(axes_names, ("#2a6f97", "#b9472a"), strict=False)):
            true, guess = truth[..., axis].flatten().numpy()[flat], predicted[..., axis].flatten().numpy()[flat]
            axes[row, 2].plot(true, guess, ".", color=colour, markersize=2, label=name)
        axes[row, 2].plot([-limit, limit], [-limit, limit], color="0.6", linewidth=0.8)
        axes[row, 2].set(title=f"offset: predicted against true ({unit})", aspect="equal")
        axes[row, 2].legend(loc="upper left", frameon=False, markerscale=4)
        start, end = boxes.chunk(2, dim=-1)
        half = (end - start) / 2
        for place, (name, table) in enumerate(
            (("true places", truth), ("by offsets from one patch", predicted)), start=3
        ):
            ax, centres, extent = axes[row, place], start[:1] + half[:1] + table[0], float(boxes.max())
            draw = _draw_waves if probe.is_signal else _draw_patches
            draw(ax, probe.pixels[row], centres, half)
            ax.set(title=name, xlim=(-extent / 2, 1.5 * extent), xticks=[], yticks=[])
            if not probe.is_signal:
                ax.set(ylim=(1.5 * extent, -extent / 2))
    file = BytesIO()
    figure.savefig(file, format="png", dpi=70)
    write_atomically(path, file.getvalue())


def _draw_patches(
    ax: Axes, pixels: Float[Tensor, "N C h w"], centres: Float[Tensor, "N 2"], half: Float[Tensor, "N 2"]
) -> None:
    for patch, centre, side in zip(pixels, centres, half, strict=True):
        (x0, y0), (x1, y1) = (centre - side).tolist(), (centre + side).tolist()
        picture = patch.permute(1, 2, 0).numpy()
        picture = picture if picture.shape[2] == 3 else picture.mean(2)
        ax.imshow(picture, extent=(x0, x1, y1, y0), cmap="gray", vmin=0, vmax=1, zorder=2)


def _draw_waves(
    ax: Axes, pixels: Float[Tensor, "N C P"], centres: Float[Tensor, "N 1"], half: Float[Tensor, "N 1"]
) -> None:
    """The first channel of each patch; patches that share samples lie on each other where they are placed rightly."""
    for patch, centre, side in zip(pixels[:, 0], centres[:, 0].tolist(), half[:, 0].tolist(), strict=True):
        ax.plot(np.linspace(centre - side, centre + side, len(patch)), patch.numpy(), linewidth=0.7)


def _draw_leaks(ax: Axes, probe: PositionProbe) -> None:
    """A bar for each leak on a logarithmic axis, red above its gate; what has no gate is grey."""
    names = [name for name in probe.metrics if name.startswith("leak_") and not math.isnan(probe.metrics[name])]
    for place, name in enumerate(names):
        value, gate = probe.metrics[name], GATES.get(name)
        colour = "0.6" if gate is None else "#3a7d44" if value <= gate else "#b3261e"
        ax.barh(place, max(value, _LEAST), color=colour, height=0.6)
        if gate is not None:
            ax.plot([gate, gate], [place - 0.45, place + 0.45], color="0.1", linewidth=1.5)
        ax.text(1.2, place, f"{value:.2g}", va="center", fontsize=8)
    ax.set_yticks(range(len(names)), [name.removeprefix("leak_") for name in names])
    ax.set(xscale="log", xlim=(_LEAST, 1), title="leaks; the line is the upper limit, red is above it")
    ax.invert_yaxis()


def _draw_distances(ax: Axes, probe: PositionProbe) -> None:
    ax.plot(probe.distances.numpy(), probe.fits.numpy(), "o-", color="#2a6f97", markersize=4)
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set(title="fit of tenths of the pairs, by distance", xlabel=f"true distance ({probe.unit})", ylabel="R²")
