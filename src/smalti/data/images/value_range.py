"""Values of image files as encoders take them: uint8, or float32 in 0..1."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Num

from smalti.data.images.pixels import Range, ranges
from smalti.errors import DataError

PERCENTILES = (0.5, 99.5)
"""Of a channel's values in a sample of images, what ``data.scale=percentiles`` takes."""
_SAY_SCALE = "data.scale=[LOW,HIGH] says which values become 0 and 1, data.scale=percentiles finds them"
_FLOAT_SLACK = 1e-3  # how far a float image may leave 0..1 by rounding


def to_unit(image: Num[np.ndarray, "H W C"], scale: Range | tuple[Range, ...] | None) -> Num[np.ndarray, "H W C"]:
    """Values as encoders take them: float32 in 0..1 with a scale; without one uint8 stays, 16-bit and float become
    float32 in 0..1.

    Raises:
        DataError: for numbers that aren't finite, lie outside of 0..1 without a scale, or another number of ranges than
            channels.
    """
    if scale is not None:
        return _scaled(image, scale)
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.uint16:
        return image.astype(np.float32) / np.float32(65535)
    low, high = float(image.min()), float(image.max())
    if image.dtype not in (np.float32, np.float64):
        raise DataError(f"pixels of type {image.dtype} from {low:g} to {high:g}; {_SAY_SCALE}")
    if not (low >= -_FLOAT_SLACK and high <= 1 + _FLOAT_SLACK):  # also true of nan
        raise DataError(f"float pixels from {low:g} to {high:g}; they must lie in 0..1, or {_SAY_SCALE}")
    return np.clip(image, 0, 1).astype(np.float32)


def _scaled(image: Num[np.ndarray, "H W C"], scale: Range | tuple[Range, ...]) -> Float[np.ndarray, "H W C"]:
    ends = np.array(ranges(scale), np.float32)
    if len(ends) not in (1, image.shape[2]):
        raise DataError(f"data.scale has {len(ends)} ranges, the image has {image.shape[2]} channels")
    values = image.astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError("pixels that are not finite")
    low, high = ends[:, 0], ends[:, 1]
    return np.clip((values - low) / (high - low), 0, 1)


def percentile_ranges(images: Iterable[Num[np.ndarray, "H W C"]]) -> tuple[Range, ...]:
    """A range a channel: :data:`PERCENTILES` of its values in these images, every image with the same weight.

    Raises:
        DataError: if there is no image, or a channel has the same value everywhere.
    """
    rng = np.random.default_rng(0)
    drawn = [rng.choice(image.reshape(-1, image.shape[2]), 4096) for image in images]
    if not drawn:
        raise DataError("no image to find the range of values in")
    values = np.concatenate(drawn).astype(np.float64)
    ends = np.percentile(values[np.isfinite(values).all(1)], PERCENTILES, axis=0).T if len(values) else np.empty((0, 2))
    if not (ends[:, 0] < ends[:, 1]).all():
        raise DataError("a channel has the same value nearly everywhere; give its range as data.scale=[LOW,HIGH]")
    return tuple((float(low), float(high)) for low, high in ends)
