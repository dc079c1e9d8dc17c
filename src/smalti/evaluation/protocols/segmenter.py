"""Segmenter with its linear decoder: a copy of the encoder and a linear layer on its patches, trained end to end.

Source: Strudel et al., Segmenter, arXiv:2105.05633, Sec. 3.2 and 4.1, and its code (preset paper). Preset full is our
own: AdamW at 3e-5 with weight decay 0.01, warm-up, decay to 10 % of the learning rate, batches of 16, windows that
overlap by a third. Its sweep is that of Liu et al., "Self-Supervised Learning of Intertwined Content and Positional
Features for Object Detection", ICML 2025, for ADE20K.
Differs from the code: masks are downsampled by nearest pixel and images by antialiased bilinear interpolation; hue and
saturation are changed in floating point; batches cross epochs; one scale, last step.
Letters: B images, C channels, h x w the patch grid, D embed_dim, K classes, S side of a crop in pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from smalti.charts import loss_chart
from smalti.config import BatchSize, Count, NonNegative, Positive, settings
from smalti.data.crops import Box
from smalti.data.images.folders import ImageSample, ImageSet
from smalti.data.images.labelled import read_mask
from smalti.data.loader import epoch_order
from smalti.data.views import Skipped
from smalti.errors import ConfigError, DataError, SmaltiError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.dense import ignored_value, upsampling, warn_unlabelled
from smalti.evaluation.features import Features
from smalti.evaluation.metrics import Absent, accuracy, class_iou, mean_iou
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.tally import PixelTally
from smalti.evaluation.tuning import (
    Example,
    check_micro_batch,
    normalized,
    seeded,
    stream,
    train,
    trainable_copy,
    warm_poly,
    with_linear_head,
)
from smalti.functional.precision import has_bf16
from smalti.models.encoder import Encoder

FLIP_PROB, DISTORT_PROB = 0.5, 0.5
CROP_TRIES = 10
LONGEST_TEST = 64
"""Maximum aspect ratio of test images; each is resized so that its short side fills the crop."""
LONGEST = 4
"""Maximum ratio of long side to crop side before the random scale: 2048 to 512."""
MOMENTUM = 0.9
SHOWN_PX = 256
"""Predictions stored for figures are downsampled to this size (nearest)."""
HELD_OUT = 0.2
"""Fraction of the training images on which a sweep chooses."""
_AT_ONCE = 2**26  # upsampled logits in memory at a time


@dataclass(frozen=True)
class SegmenterRecipe:
    """A preset with the settings that the user changed."""

    crop: int
    """S in pixels; also the short side of test images, and the side of their windows."""
    stride: int
    """Stride of the sliding windows in pixels."""
    steps: int
    batch_size: int
    optimizer: Literal["adamw", "sgd"]
    learning_rate: float
    least_lr: float
    weight_decay: float
    num_warmup: int
    """Number of warm-up steps."""
    drop_path: float
    cat_max_ratio: float
    """Maximum fraction of a crop that one class may cover; otherwise another crop is tried."""
    distort: bool
    """Photometric distortion."""
    absent: Absent
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random scale before cropping."""

    def at(self, learning_rate: float, weight_decay: float) -> "SegmenterRecipe":
        """With another learning rate and weight decay. AdamW's rate falls to a tenth; SGD's lowest stays."""
        least = 0.1 * learning_rate if self.optimizer == "adamw" else min(self.least_lr, learning_rate)
        return replace(self, learning_rate=learning_rate, weight_decay=weight_decay, least_lr=least)


@settings
class SegmenterConfig:
    """Settings of ``segmenter``."""

    steps: Count | None = None
    """Training steps; None: the preset's."""
    batch_size: BatchSize | None = None
    """Images per training step; None: the preset's."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest learning rate; None: the preset's."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of matrices; None: the preset's."""
    sweep: bool = False
    """Choose learning rate and weight decay of AdamW: train with each pair on 80 % of the training images, take the
    pair with the highest mIoU on the others, and train with it on all. One training more than there are pairs."""
    learning_rates: tuple[Positive, ...] = (8e-5, 3e-5, 1e-5, 8e-6)
    """Learning rates of the sweep."""
    weight_decays: tuple[NonNegative, ...] = (1e-2, 1e-4)
    """Weight decays of the sweep."""
    micro_batch: BatchSize | None = None
    """Images per forward pass in training, a divisor of the batch; gradients are accumulated. None: the whole batch."""
    checkpointing: bool = False
    """Recompute the encoder's activations in the backward pass: less memory, more time, the same numbers."""
    absent: Absent | None = None
    """mIoU: a class in neither masks nor predictions counts zero, or is skipped; None: the preset's."""


def choose_recipe(features: Features, config: EvalConfig) -> SegmenterRecipe:
    """The preset with the user's settings.

    Raises:
        ConfigError: if the encoder's own image size isn't square and none is given, ``micro_batch`` doesn't divide the
            batch, or the settings of the sweep contradict each other.
        ShapeError: if the patch size does not divide the image size that was given.
    """
    own: SegmenterConfig = config.of("segmenter")
    changed: dict[str, Any] = {
        "batch_size": own.batch_size,
        "learning_rate": own.learning_rate,
        "weight_decay": own.weight_decay,
        "absent": own.absent,
    }
    given = {name: value for name, value in changed.items() if value is not None}
    if config.preset == "small":
        crop, steps = features.dense_size(config.image_size), own.steps or 300
        # A stride of two thirds of the crop, as 341 of 512. Few steps need a higher learning rate.
        recipe = SegmenterRecipe(
            crop, max(1, crop * 2 // 3), steps, 8, "adamw", 1e-4, 0.0, 0.01, steps // 10, 0.1, 1.0, False, "skip"
        )
    else:
        crop = 512 if config.image_size is None else features.image_size(config.image_size)
        steps = own.steps or 160_000
        if config.preset == "full":
            num_warmup = min(1500, steps // 10)
            recipe = SegmenterRecipe(
                crop, max(1, crop * 2 // 3), steps, 16, "adamw", 3e-5, 0.0, 0.01, num_warmup, 0.1, 0.75, True, "skip"
            )
        else:
            recipe = SegmenterRecipe(crop, crop, steps, 8, "sgd", 1e-3, 1e-5, 0.0, 0, 0.1, 0.75, True, "skip")
    recipe = replace(recipe, **given)
    check_micro_batch("segmenter", recipe.batch_size, own.micro_batch)
    check_sweep(own, recipe)
    return recipe.at(recipe.learning_rate, recipe.weight_decay)


def check_sweep(own: SegmenterConfig, recipe: SegmenterRecipe) -> None:
    """Refuse settings of the sweep that contradict each other.

    Raises:
        ConfigError: for the first one.
    """
    if not own.sweep:
        for name in ("learning_rates", "weight_decays"):
            if getattr(own, name) != getattr(SegmenterConfig(), name):
                raise ConfigError(f"eval.segmenter.{name} only applies to eval.segmenter.sweep=true; leave it out")
        return
    if recipe.optimizer != "adamw":
        raise ConfigError(
            "eval.segmenter.sweep=true: the sweep is over AdamW; use eval.preset=full or small, not paper"
        )
    for name, several in (("learning_rate", "learning_rates"), ("weight_decay", "weight_decays")):
        if getattr(own, name) is not None:
            raise ConfigError(
                f"eval.segmenter.{name}={getattr(own, name)}: sweep=true chooses it; leave it out, or set {several}"
            )
        if not getattr(own, several):
            raise ConfigError(f"eval.segmenter.{several}=[]: at least one is needed")


class Segmenter(nn.Module):
    """The encoder and a linear layer, the copy's own ``head``; logits are upsampled to pixels."""

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        """
        Args:
            encoder: a copy, modified in place.
            num_classes: K.
        """
        super().__init__()
        self.encoder = with_linear_head(encoder, num_classes)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H W K"]:
        """Class scores of each pixel, float32.

        Args:
            images: normalised; zero-padded on the right and at the bottom if the patch size does not divide them.
        """
        height, width = images.shape[-2:]
        ph, pw = self.encoder.patch_size
        padded = F.pad(images, (0, -width % pw, 0, -height % ph))
        tokens, _, (h, w) = self.encoder.encode(padded)
        scores = self.encoder.vit.head(tokens).float().view(len(images), h, w, -1)
        with torch.autocast(images.device.type, enabled=False):
            # as matrices, since the gradient of torch's upsampling is not deterministic on GPUs
            rows = upsampling(h, padded.shape[-2])[:height].to(scores.device)
            columns = upsampling(w, padded.shape[-1])[:width].to(scores.device)
            scores = torch.matmul(rows, scores.flatten(2))  # (B, h, w*K) -> (B, H, w*K)
            return torch.matmul(columns, scores.view(len(images), height, w, -1))  # (B, H, w, K) -> (B, H, W, K)


def pixel_loss(logits: Float[Tensor, "B H W K"], target: Int[Tensor, "B H W"], ignore: int) -> Float[Tensor, ""]:
    """Mean cross-entropy of the labelled pixels of a batch; 0 if there are none."""
    loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), ignore_index=ignore, reduction="sum")
    return loss / (target != ignore).sum().clamp(min=1)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Start positions of windows that cover a side; the last window ends at the border."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def sliding_logits(
    model: Callable[[Tensor], Tensor], image: Float[Tensor, "C H W"], window: int, stride: int, batch_size: int
) -> Float[Tensor, "K H W"]:
    """Class scores of each pixel of a normalised image: the mean over the square windows that contain it.

    Args:
        model: ``(B, C, S, S)`` -> ``(B, S, S, K)``.
        image: both sides at least ``window``.
        window: S.
        stride: stride of the windows, at most S.
        batch_size: windows per batch.
    """
    _, height, width = image.shape
    corners = [
        (top, left) for top in window_starts(height, window, stride) for left in window_starts(width, window, stride)
    ]
    total, count = torch.empty(0), image.new_zeros(height, width)
    for first in range(0, len(corners), batch_size):
        places = [np.s_[top : top + window, left : left + window] for top, left in corners[first : first + batch_size]]
        for place, logits in zip(places, model(torch.stack([image[:, *place] for place in places])), strict=True):
            if not total.numel():
                total = image.new_zeros(logits.shape[-1], height, width)
            total[:, *place] += logits.permute(2, 0, 1)
            count[place] += 1
    return total / count


def label_map(logits: Float[Tensor, "K h w"], size: tuple[int, int]) -> Int[Tensor, "H W"]:
    """The class of each pixel of an image of ``size``, from bilinearly resized scores; in chunks of classes."""
    best = logits.new_full(size, -math.inf)
    labels = torch.zeros(size, dtype=torch.int64, device=logits.device)
    at_once = max(1, _AT_ONCE // math.prod(size))
    for first in range(0, len(logits), at_once):
        part = logits[first : first + at_once]
        score, label = F.interpolate(part[None], size, mode="bilinear", align_corners=False)[0].max(0)
        better = score > best
        best, labels = torch.where(better, score, best), torch.where(better, label + first, labels)
    return labels


def resize_to(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """``(height, width, C)`` by bilinear interpolation, antialiased for downsampling; uint8 stays uint8."""
    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    return F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def nearest_to(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """``(height, width)`` by nearest pixel."""
    rows, columns = (np.arange(new) * old // new for new, old in zip((height, width), mask.shape, strict=True))
    return mask[np.ix_(rows, columns)]


def draw_crop(mask: np.ndarray, size: int, cat_max_ratio: float, ignore: int, rng: np.random.Generator) -> Box:
    """A random crop (smaller if the image is) in which no class covers more than ``cat_max_ratio``.

    Args:
        mask: ``(H, W)``.
        size: side in pixels.
        cat_max_ratio: maximum fraction of the labelled pixels; after ten failed tries the first crop is used, and with
            1.
        ignore: ignored value.
        rng: source of randomness.
    """
    height, width = (min(size, side) for side in mask.shape)
    box = (0, 0, height, width)
    for _ in range(CROP_TRIES):
        top, left = (int(rng.integers(side - part + 1)) for side, part in zip(mask.shape, (height, width), strict=True))
        box = (top, left, height, width)
        if cat_max_ratio >= 1:
            break
        part = mask[top : top + height, left : left + width]
        counts = np.unique(part[part != ignore], return_counts=True)[1]
        if len(counts) > 1 and counts.max() < cat_max_ratio * counts.sum():
            break
    return box


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each changed with probability 0.5.

    Args:
        image: ``(H, W, C)`` uint8, or float32 in 0..1; saturation and hue only with three channels.
        rng: source of randomness.

    Returns:
        ``(H, W, C)`` float32 in 0..1.

    Source: PhotoMetricDistortion of mmsegmentation, with the strengths used by Segmenter; after Liu et al.,
    SSD, arXiv:1512.02325.
    """
    pixels = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image

    def is_drawn() -> bool:
        return bool(rng.random() < DISTORT_PROB)

    if is_drawn():
        pixels = np.clip(pixels + np.float32(rng.uniform(-32, 32) / 255), 0, 1)
    contrast_first = is_drawn()
    contrast = np.float32(rng.uniform(0.5, 1.5)) if is_drawn() else None
    if contrast is not None and contrast_first:
        pixels = np.clip(pixels * contrast, 0, 1)
    if image.shape[2] == 3:
        saturation = np.float32(rng.uniform(0.5, 1.5)) if is_drawn() else None
        turn = np.float32(rng.uniform(-36, 36)) if is_drawn() else None  # degrees
        if saturation is not None or turn is not None:
            hsv = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2HSV)
            hsv[..., 0] = (hsv[..., 0] + (turn or 0)) % 360
            hsv[..., 1] = np.clip(hsv[..., 1] * (1 if saturation is None else saturation), 0, 1)
            pixels = np.clip(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), 0, 1)
    if contrast is not None and not contrast_first:
        pixels = np.clip(pixels * contrast, 0, 1)
    return pixels


@dataclass(frozen=True)
class SegmentationExamples:
    """Loads and augments training images and masks; see :func:`~smalti.evaluation.tuning.train`."""

    samples: Sequence[ImageSample]
    recipe: SegmenterRecipe
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, place: int, key: int) -> Example | Skipped:
        """``(C, S, S)`` normalised image and its ``(S, S)`` mask: scaled, cropped, flipped, distorted, padded."""
        sample, crop, ignore = self.samples[place], self.recipe.crop, ignored_value(self.num_classes)
        try:
            image = sample.read(len(self.mean))
        except DataError as error:
            return Skipped(sample.path, str(error).removeprefix(f"{sample.path}: "))
        mask = read_mask(sample, self.num_classes)
        rng = np.random.default_rng(key)
        short, long = sorted(image.shape[:2])
        factor = rng.uniform(*self.recipe.scale) * min(crop / short, LONGEST * crop / long)
        height, width = (max(1, round(side * factor)) for side in image.shape[:2])
        image, mask = resize_to(image, height, width), nearest_to(mask, height, width)
        top, left, height, width = draw_crop(mask, crop, self.recipe.cat_max_ratio, ignore, rng)
        window = np.s_[top : top + height, left : left + width]
        image, mask = image[window], mask[window]
        if rng.random() < FLIP_PROB:
            image, mask = image[:, ::-1], mask[:, ::-1]
        if self.recipe.distort:
            image = photometric_distortion(image, rng)
        beyond = (0, crop - width, 0, crop - height)
        pixels = F.pad(normalized(image, self.mean, self.std), beyond)
        target = F.pad(torch.from_numpy(mask.astype(np.int64)), beyond, value=ignore)
        return pixels, target


class _ResizedImages(Dataset[Any]):
    """Test images, resized by their short side to the crop size and normalised, and their original masks."""

    def __init__(self, images: ImageSet, crop: int, num_classes: int, encoder: Encoder) -> None:
        self._samples, self._crop, self._num_classes = images.samples, crop, num_classes
        self._mean, self._std = encoder.mean, encoder.std

    def __getitem__(self, place: int) -> Example | Skipped | SmaltiError:
        sample = self._samples[place]
        try:
            image = sample.read(len(self._mean))
        except DataError as error:
            return Skipped(sample.path, str(error).removeprefix(f"{sample.path}: "))
        try:
            mask = read_mask(sample, self._num_classes)
        except DataError as error:
            return error
        short, long = sorted(image.shape[:2])
        if long > LONGEST_TEST * short:
            return Skipped(sample.path, f"a strip of {long}x{short} pixels, longer than {LONGEST_TEST} times its width")
        factor = self._crop / short
        height, width = (max(self._crop, round(side * factor)) for side in image.shape[:2])
        pixels = normalized(resize_to(image, height, width), self._mean, self._std)
        return pixels, torch.from_numpy(mask.astype(np.int64))


def train_segmenter(
    features: Features, config: EvalConfig, recipe: SegmenterRecipe, images: ImageSet, what: str
) -> tuple[Segmenter, list[float]]:
    """A trained copy of the encoder with its linear layer, in eval mode, and the loss at each of its steps.

    Random numbers come from torch's global generator; see :func:`~smalti.evaluation.tuning.seeded`.

    Args:
        features: the encoder, classes and progress.
        config: seed, and settings that don't change what is learned.
        recipe: all others.
        images: training images with masks, all or some of those in ``features``.
        what: label of the progress.
    """
    own: SegmenterConfig = config.of("segmenter")
    encoder, num_classes = features.encoder, len(features.data.classes)
    ignore = ignored_value(num_classes)
    model = Segmenter(trainable_copy(encoder, recipe.drop_path), num_classes)
    model.encoder.checkpointing = own.checkpointing
    optimizer = create_optimizer_v2(
        model.encoder.vit,
        recipe.optimizer,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        **({"momentum": MOMENTUM} if recipe.optimizer == "sgd" else {}),
    )
    curve = train(
        model,
        optimizer,
        features,
        SegmentationExamples(images.samples, recipe, num_classes, encoder.mean, encoder.std),
        lambda images, target: pixel_loss(model(images), target, ignore),
        lambda step: warm_poly(
            step, recipe.steps, peak=recipe.learning_rate, least=recipe.least_lr, num_warmup=recipe.num_warmup
        ),
        num_steps=recipe.steps,
        batch_size=recipe.batch_size,
        seed=config.seed,
        what=what,
        num_images=len(images),
        micro_batch=own.micro_batch,
        weight_of=lambda target: (target != ignore).double().mean(),
    )
    return model, curve


def choose_by_sweep(
    features: Features, config: EvalConfig, recipe: SegmenterRecipe
) -> tuple[SegmenterRecipe, dict[str, Any]]:
    """The recipe with the learning rate and weight decay of the highest mIoU on held-out training images.

    Each pair is trained from the same random numbers on the same 80 % of the training images, for all steps. Of equal
    pairs the first is chosen. The evaluated images are not read.

    Returns:
        The recipe, and what is reported: pairs with their mIoU, the chosen pair, and the number of held-out images.

    Raises:
        DataError: for a single training image, or if no held-out image can be read.
    """
    own: SegmenterConfig = config.of("segmenter")
    images = features.data.train
    if len(images) < 2:
        raise DataError(f"{images.root}: only one training image, so a sweep can't choose; set sweep=false")
    order = epoch_order(config.seed, 0, len(images)).tolist()
    num_held_out = max(1, round(HELD_OUT * len(images)))
    held_out, rest = (
        replace(images, samples=tuple(images.samples[place] for place in sorted(places)))
        for places in (order[:num_held_out], order[num_held_out:])
    )
    for called, part in (("held-out train images", held_out), ("train images that are not held out", rest)):
        _check_labelled(part, called, len(features.data.classes))
    pairs = [(rate, decay) for rate in own.learning_rates for decay in own.weight_decays]
    scores: dict[tuple[float, float], float] = {}
    for number, pair in enumerate(pairs, start=1):
        what = f"segmenter: sweep {number} of {len(pairs)}"
        with seeded(config.seed, features.device):
            model, _ = train_segmenter(features, config, recipe.at(*pair), rest, what)
            tally, _, _ = _evaluate_segmenter(model, features, recipe.at(*pair), held_out, f"{what}, held-out images")
        scores[pair] = mean_iou(tally.confusion.matrix, recipe.absent)
    best = max(pairs, key=lambda pair: scores[pair])
    about = {
        "held_out": f"{num_held_out} of {len(images)} training images",
        "miou": {f"learning rate {r:g}, weight decay {d:g}": round(scores[r, d], 5) for r, d in pairs},
        "chosen": {"learning_rate": best[0], "weight_decay": best[1]},
    }
    return recipe.at(*best), about


@register_protocol(
    "segmenter",
    need="masks",
    settings=SegmenterConfig,
    by_default=False,
    priority=50,
)
def segmenter(features: Features, config: EvalConfig) -> Scores:
    """Semantic segmentation with a linear decoder, fine-tuned end to end; needs masks."""
    recipe = choose_recipe(features, config)
    classes = features.data.classes
    ignore = ignored_value(len(classes))
    for called, images in (("train images", features.data.train), (features.evaluated, features.data.test)):
        _check_labelled(images, called, len(classes))
    own: SegmenterConfig = config.of("segmenter")
    swept: dict[str, Any] | None = None
    if own.sweep:
        recipe, swept = choose_by_sweep(features, config, recipe)
    with seeded(config.seed, features.device):
        model, curve = train_segmenter(features, config, recipe, features.data.train, "segmenter")
        tally, predictions, unlabelled = _evaluate_segmenter(
            model, features, recipe, features.data.test, f"segmenter: {features.evaluated}"
        )
    warn_unlabelled(features.data.test, unlabelled, features.evaluated)
    matrix = tally.confusion.matrix
    settings = {
        "preset": config.preset,
        "comparable": {
            "small": "small preset: not comparable with published numbers",
            "full": "our own settings: not comparable with published numbers",
            "paper": "Segmenter's settings at one scale, unless changed",
        }[config.preset],
        "trained": "a copy of the whole encoder, including positions",
        "image_size": recipe.crop,
        "resize": f"short side to {recipe.crop}, then windows of {recipe.crop} every {recipe.stride} pixels, whose "
        "logits are averaged",
        "mask_size": "original size of each mask",
        "predictions_shown": f"downsampled to at most {SHOWN_PX} pixels by nearest pixel",
        "steps": recipe.steps,
        "warmup_steps": recipe.num_warmup,
        "head_batch_size": recipe.batch_size,
        "micro_batch": own.micro_batch or recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "optimiser": f"{'AdamW' if recipe.optimizer == 'adamw' else f'SGD, Nesterov momentum {MOMENTUM}'}, weight "
        f"decay {recipe.weight_decay:g} (none on vectors), polynomial 0.9 to {recipe.least_lr:g}",
        **({"sweep": swept} if swept else {}),
        "layer_decay": None,
        "drop_path": recipe.drop_path,
        "augmentation": f"scale {recipe.scale[0]:g}-{recipe.scale[1]:g}, crop, flip"
        + (", photometric distortion" if recipe.distort else ""),
        "cat_max_ratio": recipe.cat_max_ratio,
        "precision": "bfloat16 in training" if has_bf16(features.device.type) else "float32",
        "reported": "last step",
        "absent": recipe.absent,
        "matching": "direct",
        "ignored_value": ignore if ignore >= 0 else None,
        "num_unlabelled": len(unlabelled),
    }
    return Scores(
        {"miou": mean_iou(matrix, recipe.absent), "pixel_accuracy": accuracy(matrix)},
        settings,
        {"iou": dict(zip(classes, class_iou(matrix).tolist(), strict=True))},
        tallies={"miou": tally.iou(recipe.absent), "pixel_accuracy": tally.pixel_accuracy()},
        confusion=matrix.numpy(),
        predictions=predictions,
        charts={"loss": loss_chart(curve)},
    )


@torch.no_grad()
def _evaluate_segmenter(
    model: Segmenter, features: Features, recipe: SegmenterRecipe, images: ImageSet, what: str
) -> tuple[PixelTally, dict[int, np.ndarray], list[int]]:
    """Tally of images at the size of their masks; predictions for figures; indices of images without labels.

    Raises:
        DataError: if no image can be read.
    """
    num_classes = len(features.data.classes)
    tally = PixelTally(num_classes, len(images), ignored_value(num_classes))
    predictions: dict[int, np.ndarray] = {}
    num_read, unlabelled = 0, list[int]()
    items = _ResizedImages(images, recipe.crop, num_classes, features.encoder)
    for place, item in enumerate(stream(items, len(images), features.num_workers)):
        features.progress(what, place + 1, len(images))
        if isinstance(item, Skipped):
            features.skipped[str(item.path)] = item.reason
            continue
        num_read += 1
        pixels, mask = item
        if (mask == ignored_value(num_classes)).all():
            unlabelled.append(place)
        logits = sliding_logits(model, pixels.to(features.device), recipe.crop, recipe.stride, features.batch_size)
        pred = label_map(logits, (mask.shape[0], mask.shape[1])).cpu()
        tally.update(mask[None], pred[None], [place])
        if place in features.shown:
            factor = min(1.0, SHOWN_PX / max(mask.shape))
            predictions[place] = nearest_to(
                pred.numpy().astype(np.int32), *(max(1, round(side * factor)) for side in mask.shape)
            )
    if not num_read:
        raise DataError(f"{images.root}: none of the {len(images)} {features.evaluated} can be read")
    return tally, predictions, unlabelled


def _check_labelled(images: ImageSet, called: str, num_classes: int) -> None:
    """Check before training that a split has labels; stops at the first labelled mask."""
    ignore = ignored_value(num_classes)
    for sample in images.samples:
        try:
            sample.read()
        except DataError:
            continue
        if (read_mask(sample, num_classes) != ignore).any():
            return
    raise DataError(f"{images.root}: no labelled pixel in the masks of the {len(images)} {called}")
