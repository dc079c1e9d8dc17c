"""The picture of a probe of positions: offsets predicted and true, patches put where they are said to be."""

from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from smalti.config import write_atomically
from smalti.study.probe import PositionProbe

_POINTS = 2000


def draw_positions(probe: PositionProbe, path: Path) -> None:
    """Write a PNG: a row for each image, with tables of x offsets (predicted, true; patches sorted by x), all offsets
    against the truth, and the patches at their true places and where the offsets from the first one put them."""
    rows = len(probe.boxes)
    figure = Figure(figsize=(15, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, 5, squeeze=False)
    for row in range(rows):
        boxes, predicted, truth = probe.boxes[row], probe.predicted[row], probe.truth[row]
        order = boxes[:, 0].argsort()
        limit = float(truth.abs().max())
        for place, (name, table) in enumerate((("predicted", predicted), ("true", truth))):
            values = table[order][:, order, 0].numpy()
            axes[row, place].imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            axes[row, place].set(title=f"x offset, {name} (px)", xticks=[], yticks=[])
        flat = np.linspace(0, truth[..., 0].numel() - 1, _POINTS).astype(int)
        for axis, colour in enumerate(("#2a6f97", "#b9472a")):
            true, said = truth[..., axis].flatten().numpy()[flat], predicted[..., axis].flatten().numpy()[flat]
            axes[row, 2].plot(true, said, ".", color=colour, markersize=2, label="xy"[axis])
        axes[row, 2].plot([-limit, limit], [-limit, limit], color="0.6", linewidth=0.8)
        axes[row, 2].set(title="offset: predicted against true (px)", aspect="equal")
        axes[row, 2].legend(loc="upper left", frameon=False, markerscale=4)
        corner = boxes[:1, :2]
        sides = (boxes[:, 2:] - boxes[:, :2]) / 2
        for place, (name, table) in enumerate(
            (("true places", truth), ("by offsets from one patch", predicted)), start=3
        ):
            centres = corner + sides[:1] + table[0]
            ax = axes[row, place]
            for patch, centre, half in zip(probe.pixels[row], centres, sides, strict=True):
                (x0, y0), (x1, y1) = (centre - half).tolist(), (centre + half).tolist()
                picture = patch.permute(1, 2, 0).numpy()
                picture = picture if picture.shape[2] == 3 else picture.mean(2)
                ax.imshow(picture, extent=(x0, x1, y1, y0), cmap="gray", vmin=0, vmax=1, zorder=2)
            extent = float(boxes.max())
            ax.set(title=name, xlim=(-extent / 2, 1.5 * extent), ylim=(1.5 * extent, -extent / 2), xticks=[], yticks=[])
    file = BytesIO()
    figure.savefig(file, format="png", dpi=70)
    write_atomically(path, file.getvalue())
