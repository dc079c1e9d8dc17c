"""Crops of an image: random and central crops with flips, and their boxes in the image."""

import math
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from smalti.config import settings
from smalti.data.color import ColorConfig, blur, recolor, solarize
from smalti.data.views import SampleViews
from smalti.errors import ConfigError

Box = tuple[int, int, int, int]
"""A crop in pixels of the source image: top, left, height, width."""


_CROP_TRIES, _HEIGHT_TRIES = 10, 100


@settings
class ViewSpec:
    """Views with the same size and augmentation."""

    count: int = 1
    """Views of this kind per image."""
    size: int = 224
    """Side length of the square view in pixels."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest crop area, as a fraction of the image's area."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of the crop."""
    uniform: Literal["area", "height"] = "area"
    """What is sampled uniformly: the crop's area (:func:`random_resized_crop`, as in torchvision), or its height for a
    given aspect ratio (:func:`random_height_crop`, as in TensorFlow), which yields more large crops."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip."""
    color: ColorConfig | None = None
    """Colour jitter and greyscale; None: colours unchanged."""
    blur_prob: float | tuple[float, ...] = 0.0
    """Probability of blur: one number, or one per view."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the view."""
    solarize_prob: float | tuple[float, ...] = 0.0
    """Probability of solarisation: one number, or one per view."""


def random_resized_crop(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> Box:
    """A crop of random area and aspect ratio: ``(top, left, height, width)`` in pixels.

    Area, log aspect ratio and position are uniform. After ten tries that don't fit: the largest central crop of an
    allowed aspect ratio.

    Source: distribution of torchvision's ``RandomResizedCrop.get_params`` (Szegedy et al., arXiv:1409.4842, Sec. 6).
    """
    area = height * width
    log_low, log_high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(_CROP_TRIES):
        target = area * (scale[0] + (scale[1] - scale[0]) * rng.random())
        ratio = math.exp(log_low + (log_high - log_low) * rng.random())
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1)), h, w
    h, w = height, width
    if width / height < aspect[0]:
        h = min(height, max(1, round(width / aspect[0])))
    elif width / height > aspect[1]:
        w = min(width, max(1, round(height * aspect[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def random_height_crop(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> Box:
    """A crop of random aspect ratio and height: ``(top, left, height, width)`` in pixels.

    The aspect ratio is uniform, then the height is uniform between those of the smallest and of the largest area that
    fits, then the place is uniform, without the last one down and across; after 100 tries that don't fit, the whole
    image.

    Source: TensorFlow's ``sample_distorted_bounding_box`` without a minimum of covered object.
    """
    least, most = (part * height * width for part in scale)
    for _ in range(_HEIGHT_TRIES):
        ratio = aspect[0] + (aspect[1] - aspect[0]) * rng.random()
        high = min(round(math.sqrt(most / ratio)), height, int((width + 0.5) / ratio))
        low = min(round(math.sqrt(least / ratio)), high)
        h = low + int(rng.random() * (high - low + 1))
        if h * round(h * ratio) < least:  # by rounding
            h += 1
        if h * round(h * ratio) > most:
            h -= 1
        w = round(h * ratio)
        if 0 < h <= height and 0 < w <= width and least <= h * w <= most:
            return int(rng.random() * (height - h)), int(rng.random() * (width - w)), h, w
    return 0, 0, height, width


_CROPS = {"area": random_resized_crop, "height": random_height_crop}


class MultiCrop:
    """Create the views of an image that a method requests.

    Crops are resized by antialiased bicubic interpolation; images smaller than a view are enlarged. Then, in this
    order: flip, colour, blur, solarise.
    """

    def __init__(self, specs: Sequence[ViewSpec], flip_image_prob: float = 0.0):
        """
        Args:
            specs: kinds of views, global ones first; those of count 0 are left out.
            flip_image_prob: probability of flipping the whole image before cropping, the same for all its views;
                boxes then refer to the flipped image, and ``flips`` doesn't include this flip.

        Raises:
            ConfigError: if there is no view, or the numbers of a spec contradict each other.
        """
        self.specs = tuple(spec for spec in specs if spec.count)
        if not self.specs:
            raise ConfigError("no views: at least one ViewSpec with count >= 1 is needed")
        for spec in self.specs:
            _check(spec)
        self._blur = [_per_view(spec, spec.blur_prob, "blur_prob") for spec in self.specs]
        self._solarize = [_per_view(spec, spec.solarize_prob, "solarize_prob") for spec in self.specs]
        self.flip_image_prob = flip_image_prob

    @property
    def num_views(self) -> int:
        """Views per image, of all sizes."""
        return sum(spec.count for spec in self.specs)

    @property
    def effective_views(self) -> float:
        """Pixels of all views of an image, in those of one of the first size: how many plain epochs one is worth."""
        return sum(spec.count * (spec.size / self.specs[0].size) ** 2 for spec in self.specs)

    def draw_boxes(self, rng: np.random.Generator, height: int, width: int) -> list[Box]:
        """Where the views come from, in the order of the specs; a method that wants overlapping ones overrides this."""
        return [
            _CROPS[spec.uniform](rng, height, width, spec.scale, spec.aspect)
            for spec in self.specs
            for _ in range(spec.count)
        ]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> SampleViews:
        """The views of one image.

        Args:
            image: ``(H, W, C)`` uint8, or float32 in 0..1.
            rng: source of all randomness.
        """
        height, width, channels = image.shape
        if self.flip_image_prob and rng.random() < self.flip_image_prob:  # nothing is drawn where it is off
            image = cv2.flip(image, 1).reshape(image.shape)
        boxes = self.draw_boxes(rng, height, width)
        flips = np.zeros(len(boxes), dtype=bool)
        crops = []
        place = 0
        for spec, blur_probs, solarize_probs in zip(self.specs, self._blur, self._solarize, strict=True):
            out = np.empty((spec.count, spec.size, spec.size, channels), dtype=image.dtype)
            for i in range(spec.count):
                top, left, h, w = boxes[place]
                flips[place] = rng.random() < spec.flip_prob
                view = resize(image[top : top + h, left : left + w], spec.size)
                if flips[place]:
                    view = cv2.flip(view, 1)
                if spec.color is not None:
                    view = recolor(view, spec.color, rng)
                if rng.random() < blur_probs[i]:
                    low, high = spec.blur_sigma
                    view = blur(view, low + (high - low) * rng.random())
                if rng.random() < solarize_probs[i]:
                    view = solarize(view)
                out[i] = view.reshape(spec.size, spec.size, channels)  # OpenCV drops a single channel's axis
                place += 1
            crops.append(out)
        corners = np.array(boxes, dtype=np.float32)
        xy = corners[:, [1, 0]]
        return SampleViews(
            crops=tuple(crops),
            boxes=np.concatenate([xy, xy + corners[:, [3, 2]]], axis=1),
            flips=flips,
            source_size=(height, width),
        )


class CentreCrop:
    """The central square of an image, randomly flipped. Without random crops, an order of the image's patches also
    applies to its view.

    Args:
        size: side of the view in pixels.
        flip_prob: probability of a horizontal flip.
    """

    num_views = 1

    def __init__(self, size: int, flip_prob: float = 0.5) -> None:
        self.size, self.flip_prob = size, flip_prob

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> SampleViews:
        """The view of one image ``(H, W, C)``, uint8 or float32 in 0..1."""
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        view = centre_crop(image, self.size)
        flipped = bool(rng.random() < self.flip_prob)
        return SampleViews(
            crops=((view[:, ::-1] if flipped else view)[None],),
            boxes=np.array([[left, top, left + side, top + side]], dtype=np.float32),
            flips=np.array([flipped]),
            source_size=(height, width),
        )


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """``(size, size, C)``: the largest central square of an image, resized by :func:`resize`."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side], size)


def resize(image: np.ndarray, size: int, mode: Literal["bicubic", "bilinear"] = "bicubic") -> np.ndarray:
    """``(size, size, C)``: antialiased where it shrinks, as Pillow and torchvision do.

    Through torch: the same pixels as Pillow's in a fifth of the time; OpenCV has no antialiased bicubic.
    """
    if image.shape[:2] == (size, size):
        return image
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    planes = F.interpolate(pixels, (size, size), mode=mode, antialias=True)[0].numpy()
    resized = cv2.merge(list(planes)) if len(planes) > 1 else planes[0][:, :, None]
    return resized if resized.dtype == np.uint8 else np.clip(resized, 0, 1)  # bicubic overshoots at edges


def _check(spec: ViewSpec) -> None:
    if spec.count < 0 or spec.size < 1:
        raise ConfigError(f"views of count {spec.count} and size {spec.size}; both must be positive")
    for name, (low, high) in (("scale", spec.scale), ("aspect", spec.aspect)):
        if not 0 < low <= high:
            raise ConfigError(f"{name}=({low:g}, {high:g}) of a view; it needs 0 < smallest <= largest")
    low, high = spec.blur_sigma
    if not 0 <= low <= high:
        raise ConfigError(f"blur_sigma=({low:g}, {high:g}) of a view; it needs 0 <= smallest <= largest")


def _per_view(spec: ViewSpec, prob: float | tuple[float, ...], name: str) -> tuple[float, ...]:
    probs = prob if isinstance(prob, tuple) else (prob,) * spec.count
    if len(probs) != spec.count:
        raise ConfigError(f"{name} has {len(probs)} values for {spec.count} views; give one number, or one a view")
    return probs
