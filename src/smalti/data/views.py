"""Views of an image: random crops with flips, color jitter and blur, and their boxes in the image.

Colour jitter and greyscale are composed into one affine map of RGB. That differs from a chain of 8-bit operations in
two ways: values are clipped once, at the end, and hue rotates about the grey axis of RGB instead of changing in HSV.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from smalti.config import settings
from smalti.errors import ConfigError

Box = tuple[int, int, int, int]
"""A crop in pixels of the source image: top, left, height, width."""

_LUMINANCE = np.array([0.299, 0.587, 0.114])
_ORDERS = tuple(itertools.permutations(range(4)))
_CROP_TRIES, _HEIGHT_TRIES = 10, 100
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


class Skipped(NamedTuple):
    """An image that couldn't be read, and why."""

    path: Path
    reason: str


@dataclass
class SampleViews:
    """The views of one image."""

    crops: tuple[np.ndarray, ...]
    """One a ViewSpec: ``(count, S, S, C)``, uint8 or float32 in 0..1."""
    boxes: np.ndarray
    """``(V, 4)`` float32, x0 y0 x1 y1 in pixels of the source image."""
    flips: np.ndarray
    """``(V,)`` bool."""
    source_size: tuple[int, int]
    """Height and width of the source image."""
    index: int = 0
    """Place in the image set."""
    key: int = 0
    """Random key of the sample."""
    label: int | None = None
    """Its class, if the layout has one."""


@dataclass
class Views:
    """A batch of views, view-major: view 0 of all images, then view 1 of all images, ..."""

    crops: tuple[Tensor, ...]
    """One a ViewSpec: ``(V_s * B, C, S, S)`` in channels-last memory, uint8 0..255 or float32 0..1."""
    boxes: Tensor
    """``(V * B, 4)`` float32, x0 y0 x1 y1 in pixels of the source image."""
    flips: Tensor
    """``(V * B,)`` bool."""
    source_size: Tensor
    """``(B, 2)`` int64, height and width."""
    index: Tensor
    """``(B,)`` int64, place in the image set."""
    keys: Tensor
    """``(B,)`` int64, a hash of (seed, epoch, index): the sample's own randomness."""
    skipped: tuple[Skipped, ...] = ()
    """Unreadable images that were replaced while this batch was made."""
    labels: Tensor | None = None
    """``(B,)`` int64, class of each image; None if the layout has none."""
    host_keys: Tensor | None = None
    """``keys`` where they were before :meth:`to`: on the CPU, for draws that need no device."""

    @property
    def cpu_keys(self) -> Tensor:
        """``keys`` on the CPU; without a wait for the device, if the batch came from there."""
        return self.keys.cpu() if self.keys.device.type == "cpu" or self.host_keys is None else self.host_keys

    @property
    def batch_size(self) -> int:
        """Images in the batch."""
        return self.index.shape[0]

    @property
    def num_views(self) -> tuple[int, ...]:
        """Views per image in each entry of ``crops``."""
        return tuple(crops.shape[0] // self.batch_size for crops in self.crops)

    @property
    def global_crops(self) -> Tensor:
        """The first entry of ``crops``."""
        return self.crops[0]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Views":
        """The same batch on a device."""
        return replace(
            self,
            crops=tuple(crops.to(device, non_blocking=non_blocking) for crops in self.crops),
            boxes=self.boxes.to(device, non_blocking=non_blocking),
            flips=self.flips.to(device, non_blocking=non_blocking),
            source_size=self.source_size.to(device, non_blocking=non_blocking),
            index=self.index.to(device, non_blocking=non_blocking),
            keys=self.keys.to(device, non_blocking=non_blocking),
            host_keys=self.keys if self.keys.device.type == "cpu" else self.host_keys,
            labels=None if self.labels is None else self.labels.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Views":
        """The same batch in page-locked memory, from which copies to a GPU overlap with computation."""
        return replace(
            self,
            crops=tuple(crops.pin_memory() for crops in self.crops),
            boxes=self.boxes.pin_memory(),
            flips=self.flips.pin_memory(),
            source_size=self.source_size.pin_memory(),
            index=self.index.pin_memory(),
            keys=self.keys.pin_memory(),
            labels=None if self.labels is None else self.labels.pin_memory(),
        )


@runtime_checkable
class ViewMaker(Protocol):
    """How an image, or a window of a signal, becomes a training sample; it is sent to workers, so it is picklable."""

    @property
    def num_views(self) -> int:
        """Views per image, of all sizes."""

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> SampleViews:
        """The views of one image, all randomness from ``rng``."""


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


def collate(samples: Sequence[SampleViews], skipped: Sequence[Skipped] = ()) -> Views:
    """A batch of samples, view-major; uint8 if all images are, else float32 in 0..1."""
    batch = len(samples)
    crops = []
    for place, first in enumerate(samples[0].crops):
        is_uint8 = all(sample.crops[place].dtype == np.uint8 for sample in samples)
        # (V_s * B, S, S, C) in memory, seen as (V_s * B, C, S, S): channels-last costs nothing this way
        stack = torch.empty(len(first) * batch, *first.shape[1:], dtype=torch.uint8 if is_uint8 else torch.float32)
        target = stack.numpy()
        for b, sample in enumerate(samples):
            views = sample.crops[place]
            if not is_uint8 and views.dtype == np.uint8:
                views = views.astype(np.float32) / np.float32(255)
            target[b::batch] = views
        crops.append(stack.permute(0, 3, 1, 2))
    boxes = np.stack([sample.boxes for sample in samples], axis=1)  # (V, B, 4)
    flips = np.stack([sample.flips for sample in samples], axis=1)
    labels = [sample.label for sample in samples if sample.label is not None]
    return Views(
        crops=tuple(crops),
        boxes=torch.from_numpy(boxes.reshape(-1, 4)),
        flips=torch.from_numpy(flips.reshape(-1)),
        source_size=torch.tensor([sample.source_size for sample in samples], dtype=torch.int64),
        index=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        keys=torch.tensor([sample.key for sample in samples], dtype=torch.int64),
        skipped=tuple(skipped),
        labels=torch.tensor(labels, dtype=torch.int64) if len(labels) == batch else None,
    )


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
