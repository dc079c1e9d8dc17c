"""Color augmentation of a crop: jitter, greyscale, blur and solarization.

Color jitter and greyscale are composed into one affine map of RGB. That differs from a chain of 8-bit operations in
two ways: values are clipped once, at the end, and hue rotates about the grey axis of RGB instead of changing in HSV.
"""

import itertools
import math

import cv2
import numpy as np

from smalti.config import settings

_LUMINANCE = np.array([0.299, 0.587, 0.114])


_ORDERS = tuple(itertools.permutations(range(4)))


_SIGMA_WITHOUT_EFFECT = 0.2  # below it the neighbours' weight is under 1/255 / 1000


@settings
class ColorConfig:
    """Colour jitter in random order, then greyscale."""

    brightness: float = 0.4
    """b: brightness is multiplied by a factor in 1 - b .. 1 + b."""
    add_brightness: bool = False
    """Change brightness by adding -b .. b times white instead, as TensorFlow does."""
    contrast: float = 0.4
    """c: the distance from the crop's mean grey is multiplied by a factor in 1 - c .. 1 + c."""
    saturation: float = 0.2
    """s: the distance from each pixel's grey is multiplied by a factor in 1 - s .. 1 + s; three channels only."""
    hue: float = 0.1
    """h: hue is rotated by -h .. h of a full circle; three channels only."""
    jitter_prob: float = 0.8
    """Probability of color jitter."""
    gray_prob: float = 0.2
    """Probability of greyscale; three channels only."""


def color_map(
    config: ColorConfig, mean: np.ndarray, rng: np.random.Generator, white: float = 255.0
) -> np.ndarray | None:
    """Random colour jitter as an affine map: ``(C, C + 1)``, the last column the offset; None if nothing was drawn.

    Args:
        config: strengths and probabilities.
        mean: ``(C,)`` mean of each channel, about which contrast is changed; three channels are RGB and have one mean,
            their grey.
        rng: source of randomness.
        white: the largest value of the image's type, for ``add_brightness``.
    """
    channels = len(mean)
    is_rgb = channels == 3
    is_jittered = rng.random() < config.jitter_prob
    is_gray = rng.random() < config.gray_prob and is_rgb
    if not is_jittered and not is_gray:
        return None
    # Every step maps grey to grey, so the offset stays one number (a number a channel where channels aren't colours).
    matrix, offset = np.eye(channels), np.zeros(channels)
    if is_jittered:
        order = _ORDERS[int(rng.random() * len(_ORDERS))]
        strengths = (config.brightness, config.contrast, config.saturation, config.hue)
        draws = [2 * rng.random() - 1 for _ in strengths]
        for step in order:
            if not strengths[step] or (step >= 2 and not is_rgb):
                continue
            amount = strengths[step] * draws[step]
            factor = max(0.0, 1 + amount)
            if step == 0 and config.add_brightness:
                offset = offset + amount * white
            elif step == 0:
                matrix, offset = factor * matrix, factor * offset
            elif step == 1:
                level = matrix @ mean + offset
                if is_rgb:
                    level = np.full(3, _LUMINANCE @ level)
                matrix, offset = factor * matrix, factor * offset + (1 - factor) * level
            elif step == 2:
                matrix = factor * matrix + (1 - factor) * (_LUMINANCE @ matrix)
            else:
                matrix = _turn_hue(amount) @ matrix
    if is_gray:
        matrix = np.tile(_LUMINANCE @ matrix, (3, 1))
    return np.concatenate([matrix, offset[:, None]], axis=1)


def _turn_hue(turns: float) -> np.ndarray:
    """``(3, 3)`` rotation about the grey axis; a third of a turn takes red to green."""
    angle = 2 * math.pi * turns
    near, side = (1 - math.cos(angle)) / 3, math.sin(angle) / math.sqrt(3)
    keep = math.cos(angle) + near
    a, b = near - side, near + side
    return np.array([[keep, a, b], [b, keep, a], [a, b, keep]])


def recolor(view: np.ndarray, config: ColorConfig, rng: np.random.Generator) -> np.ndarray:
    """An image ``(H, W, C)`` through a random :func:`color_map`, in its type; OpenCV drops a single channel's axis."""
    channels = 1 if view.ndim == 2 else view.shape[2]
    mean = np.array(cv2.mean(view)[:channels]) if channels <= 4 else view.mean(axis=(0, 1), dtype=np.float64)
    affine = color_map(config, mean, rng, 255.0 if view.dtype == np.uint8 else 1.0)
    if affine is None:
        return view
    if channels <= 4:
        mapped = cv2.transform(view, affine.astype(np.float32))
    else:  # no mixing of channels there
        mapped = view * affine.diagonal().astype(np.float32) + affine[:, -1].astype(np.float32)
        if view.dtype == np.uint8:
            mapped = np.clip(np.rint(mapped), 0, 255).astype(np.uint8)
    return mapped if view.dtype == np.uint8 else np.clip(mapped, 0, 1)


def blur(view: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of a standard deviation in pixels, cut at three of them."""
    if sigma < _SIGMA_WITHOUT_EFFECT:
        return view
    kernel = cv2.getGaussianKernel(2 * math.ceil(3 * sigma) + 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(view, -1, kernel, kernel)


def solarize(view: np.ndarray) -> np.ndarray:
    """Invert what is brighter than half: ``min(x, 1 - x)``."""
    return np.minimum(view, ~view) if view.dtype == np.uint8 else np.minimum(view, 1 - view)
