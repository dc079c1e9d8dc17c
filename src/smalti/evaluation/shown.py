"""The few test images shown on pages: pictures, masks, and patch tokens.

Stored with the details of a result, so that a page can be drawn without the data and the weights.
Letters: B images, N = h*w patches, K components kept.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float16
from torch import Tensor

from smalti.data.images.decode import as_picture, image_size
from smalti.data.images.labelled import eval_image, eval_mask, read_mask
from smalti.errors import DataError
from smalti.evaluation.features import Features
from smalti.functional.components import reduce_patches

PICTURE_PX = 224
"""Side of the stored pictures and masks in pixels."""
COMPONENTS = 16
"""Maximum number of principal components stored per patch token."""


@dataclass(frozen=True)
class Shown:
    """A few test images, resized to a square as in dense protocols."""

    places: tuple[int, ...]
    """Indices in the test set, one per image of the tokens."""
    aspects: tuple[float, ...]
    """Aspect ratio (width / height) of each image before resizing."""
    pictures: Mapping[int, np.ndarray]
    """Index -> ``(224, 224, 3)`` uint8 RGB."""
    truths: Mapping[int, np.ndarray]
    """Index -> ``(224, 224)`` int32 class of each pixel, -1: ignored; empty without masks."""
    coordinates: Float16[Tensor, "B N K"]
    """Patch tokens projected on their first principal components over these images; see ``reduce_patches``."""
    share: float
    """Fraction of the tokens' variance explained by these components."""
    grid: tuple[int, int]
    """``(h, w)``."""
    image_size: int
    """Image size in pixels at the encoder's input."""


def show(features: Features, wanted: int | None) -> Shown | None:
    """Images, masks and patch tokens of ``features.shown`` for pages; one more pass over these few images.

    Args:
        features: features of one encoder on one data set.
        wanted: side of the images in pixels; None: that of dense protocols. If the encoder's own size isn't square,
            squares of its longer side are used.

    Returns:
        None if no image can be read, or there are fewer than two patches.
    """
    encoder, images = features.encoder, features.data.test
    size = wanted or max(encoder.img_size)
    if wanted is None and encoder.img_size[0] == encoder.img_size[1]:
        size = features.dense_size(None)
    if size % encoder.patch_size[0] or size % encoder.patch_size[1]:
        return None
    grid = encoder.check_size(size, size)
    subset = dataclasses.replace(images, samples=tuple(images.samples[place] for place in features.shown))
    tokens, places = [], list[int]()
    for found, positions in features.encode(
        subset, size, "squash", features.batch_size, "images to show", norm=features.norm
    ):
        tokens.append(found.patches.float().cpu())
        places += [features.shown[position] for position in positions]
    if not places or grid[0] * grid[1] < 2:
        return None
    coordinates, share = reduce_patches(torch.cat(tokens), COMPONENTS)
    longest = (
        coordinates.abs().max().clamp(min=1e-30)
    )  # scale: coordinates of length 1 fit into float16 for any encoder
    pictures, truths, aspects = {}, {}, []
    num_classes = len(features.data.classes)
    for place in places:
        sample = images.samples[place]
        pictures[place] = as_picture(eval_image(sample.path, PICTURE_PX, encoder.in_chans, "squash", sample.pixels))
        height, width = image_size(sample.path)
        aspects.append(width / height)
        if num_classes and (sample.mask is not None or sample.instances is not None):
            try:
                truth = eval_mask(read_mask(sample, num_classes), PICTURE_PX).astype(np.int32)
            except DataError:  # protocols that need the mask raise it; a page omits the mask
                continue
            truths[place] = np.where(truth >= num_classes, -1, truth)  # 255 is ignored unless it is a class
    return Shown(tuple(places), tuple(aspects), pictures, truths, (coordinates / longest).half(), share, grid, size)
