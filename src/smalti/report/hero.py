"""The picture for a README: images, similarities of their patches, and maps of their features."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from smalti.files import write_atomically
from smalti.functional.components import reduce_patches
from smalti.models.encoder import Encoder
from smalti.report.explorer import EXPLORER_DIMS, distinctive_patch, quantise
from smalti.report.patch_pictures import crop_images, patch_tokens, pca_maps


def hero_figure(
    encoder: Encoder, images: Sequence[np.ndarray], out: Path, *, size: tuple[int, int] | None = None
) -> Path:
    """One row per image: the image, similarities to its most distinctive patch, its PCA map; a PNG for a README.

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
        _, query = distinctive_patch(codes[row : row + 1], grid)
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
