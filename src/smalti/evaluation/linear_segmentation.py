"""Linear segmentation: what a 1x1 convolution reads from frozen patch tokens.

Source: Ziegler & Asano, Leopart, arXiv:2204.13101v2, and Pariza et al., NeCo, arXiv:2408.11054v4, in the settings of
their code: tokens after the final norm, SGD, masks of 100x100 pixels.
Differs from them: the head comes before the bilinear upsampling instead of behind it, which is the same (both are
linear, over different axes) and upsamples K logits instead of D features; training images are shuffled; all test
images count; the last epoch is reported, since choosing one would need the judged images.
Letters: n images, B of them in a batch, N = h*w patches, D embed_dim, K classes, M side of the masks.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F

from smalti.data.folders import ImageSample, ImageSet, read_image
from smalti.data.images import image_size
from smalti.data.labelled import eval_mask, read_mask
from smalti.data.loader import epoch_order, sample_key
from smalti.data.views import Skipped, random_resized_crop, resize
from smalti.errors import DataError
from smalti.evaluation.features import Features
from smalti.evaluation.metrics import IGNORE, Absent, ConfusionMatrix, accuracy, class_iou, mean_iou
from smalti.evaluation.protocol import EvalConfig, Scores, register_protocol

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
FEWEST_STEPS = 300
"""The small preset goes through few images more often, until its head has made so many steps."""
CROP_AREA, CROP_ASPECT, FLIP_PROB = (0.8, 1.0), (3 / 4, 4 / 3), 0.5
_AT_ONCE = 16  # images whose pixels' logits are in memory


@dataclass(frozen=True)
class Recipe:
    """A preset with the settings that the user changed."""

    image_size: int
    mask_size: int
    epochs: int
    batch_size: int
    augment: bool
    absent: Absent

    def learning_rate(self, epoch: int) -> float:
        """0.01, and a tenth of it in the last fifth of the epochs."""
        return LEARNING_RATE * (0.1 if epoch >= 0.8 * self.epochs else 1.0)


class Head:
    """A 1x1 convolution with bias and the bilinear upsampling behind it.

    The initial weights are a convolution's default ones, from a generator of their own.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        grid: tuple[int, int],
        mask_size: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        bound = embed_dim**-0.5
        self.weight = torch.empty(num_classes, embed_dim).uniform_(-bound, bound, generator=g).to(device)
        self.bias = torch.empty(num_classes).uniform_(-bound, bound, generator=g).to(device)
        self._grid = grid
        self._rows, self._columns = (upsampling(side, mask_size).to(device) for side in grid)

    def logits(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B M M K"]:
        """Class scores of each pixel of the masks."""
        h, w = self._grid
        scores = F.linear(tokens, self.weight, self.bias)
        up = torch.matmul(self._rows, scores.view(len(tokens), h, -1))  # (B, h, w*K) -> (B, M, w*K)
        return torch.matmul(self._columns, up.view(*up.shape[:2], w, -1))  # (B, M, w, K) -> (B, M, M, K)

    def accumulate(self, tokens: Float[Tensor, "B N D"], target: Integer[Tensor, "B M M"], ignore: int) -> None:
        """Add to ``grad`` of weight and bias the gradient of the mean cross-entropy of a batch's labelled pixels.

        In closed form, since autograd would keep three tensors of ``(B, M, M, K)`` where one is enough; and in parts
        of the batch.
        """
        num_labelled = (target != ignore).sum().clamp(min=1)  # a batch may hold no labelled pixel
        self.weight.grad, self.bias.grad = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        for part, truth in zip(torch.split(tokens, _AT_ONCE), torch.split(target, _AT_ONCE), strict=True):
            error = self.logits(part).softmax(-1)  # softmax - one_hot is the gradient for the logits
            flat, classes = error.view(-1, error.shape[-1]), truth.flatten().long()
            is_ignored = classes == ignore
            flat[torch.arange(len(flat), device=flat.device), classes.masked_fill(is_ignored, 0)] -= 1
            flat[is_ignored] = 0
            down = torch.matmul(self._columns.T, error).flatten(2)  # (B, M, M, K) -> (B, M, w*K)
            down = torch.matmul(self._rows.T, down).view(-1, error.shape[-1]) / num_labelled  # -> (B*N, K)
            self.weight.grad += down.T @ part.flatten(0, 1)
            self.bias.grad += down.sum(0)


def upsampling(side: int, size: int) -> Float[Tensor, "M h"]:
    """Bilinear upsampling along one axis as a matrix: ``F.interpolate`` without aligned corners."""
    return F.interpolate(torch.eye(side)[None], size=size, mode="linear", align_corners=False)[0].T.contiguous()


def choose_recipe(features: Features, config: EvalConfig) -> Recipe:
    """The preset with what the user changed.

    Raises:
        ConfigError: if the encoder's own image size isn't square and none is given.
        ShapeError: if the patch size does not divide the image size.
    """
    if config.preset == "leopart":
        size = features.image_size(config.image_size or 448)
        recipe = Recipe(size, 100, 25, 128, augment=True, absent="zero")
    else:
        size = features.image_size(config.image_size)
        batch_size = config.head_batch_size or 16
        epochs = max(20, -(-FEWEST_STEPS // -(-len(features.data.train) // batch_size)))
        recipe = Recipe(size, min(100, size), epochs, batch_size, augment=False, absent="skip")
    changed: dict[str, Any] = {
        "mask_size": config.mask_size,
        "epochs": config.epochs,
        "batch_size": config.head_batch_size,
        "augment": config.augment,
        "absent": config.absent,
    }
    return replace(recipe, **{name: value for name, value in changed.items() if value is not None})


def train_head(features: Features, recipe: Recipe, seed: int, ignore: int) -> Head:
    """A head fitted on the training images: cross-entropy over all labelled pixels of a batch, SGD."""
    images, num_classes = features.data.train, len(features.data.classes)
    grid = features.encoder.check_size(recipe.image_size, recipe.image_size)
    head = Head(features.encoder.embed_dim, num_classes, grid, recipe.mask_size, seed, features.device)
    optimizer = torch.optim.SGD([head.weight, head.bias], LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    if not recipe.augment:
        tokens = features.tokens("train", recipe.image_size)
        masks = read_masks(images, num_classes, recipe.mask_size)
    num_steps = recipe.epochs * -(-len(images) // recipe.batch_size)
    step = 0
    for epoch in range(recipe.epochs):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate(epoch)
        order = epoch_order(seed, epoch, len(images)).tolist()
        if recipe.augment:
            batches = _augmented(features, recipe, order, seed, epoch)
        else:
            batches = ((x, masks[torch.tensor(at)]) for x, at in tokens.batches(order, recipe.batch_size))
        for inputs, target in batches:
            head.accumulate(inputs, target.to(inputs.device), ignore)
            optimizer.step()
            step += 1
            features.progress("linear-segmentation", step, num_steps)
    return head


@register_protocol(
    "linear-segmentation",
    need="masks",
    heeds=("preset", "epochs", "head_batch_size", "augment", "mask_size", "absent", "cache_mib", "cache_dtype"),
)
@torch.no_grad()
def linear_segmentation(features: Features, config: EvalConfig) -> Scores:
    """Classes of pixels by a 1x1 convolution on frozen patch tokens; needs masks."""
    recipe = choose_recipe(features, config)
    images, classes = features.data.test, features.data.classes
    ignore = ignored_value(len(classes))
    masks = read_masks(images, len(classes), recipe.mask_size)
    if (masks == ignore).all():
        raise DataError(f"{images.root}: no labelled pixel in the masks of all {len(images)} test images")
    head = train_head(features, recipe, config.seed, ignore)
    confusion = ConfusionMatrix(len(classes), ignore=ignore, device=features.device)
    test = features.tokens("test", recipe.image_size, keep=False)
    for tokens, positions in test.batches(batch_size=features.batch_size):
        targets = masks[torch.tensor(positions)].to(tokens.device)
        for part, target in zip(torch.split(tokens, _AT_ONCE), torch.split(targets, _AT_ONCE), strict=True):
            confusion.update(target, head.logits(part).argmax(-1))
    matrix = confusion.matrix
    settings = {
        "preset": config.preset,
        "comparable": "small preset: not comparable with published numbers"
        if config.preset == "small"
        else "Leopart's and NeCo's settings, as far as none was changed",
        "image_size": recipe.image_size,
        "resize": "to a square, aspect ratio ignored",
        "mask_size": recipe.mask_size,
        "augment": recipe.augment,
        "epochs": recipe.epochs,
        "head_batch_size": recipe.batch_size,
        "optimiser": f"SGD, lr {LEARNING_RATE}, momentum {MOMENTUM}, weight decay {WEIGHT_DECAY}, "
        "a tenth of the lr in the last fifth",
        "reported": "last epoch",
        "absent": recipe.absent,
        "matching": "direct",
        "ignored_value": ignore if ignore >= 0 else None,
        "num_unlabelled": int((masks == ignore).flatten(1).all(1).sum()),
        "cache_dtype": config.cache_dtype,
    }
    iou = dict(zip(classes, class_iou(matrix).tolist(), strict=True))
    metrics = {"miou": mean_iou(matrix, recipe.absent), "pixel_accuracy": accuracy(matrix)}
    return Scores(metrics, settings, {"iou": iou})


def ignored_value(num_classes: int) -> int:
    """The value of pixels that count for nothing: 255, or -1 (none) where 255 is a class."""
    return IGNORE if num_classes <= IGNORE else -1


def read_masks(images: ImageSet, num_classes: int, size: int) -> Integer[Tensor, "n M M"]:
    """Masks of all images by nearest pixel; those of unreadable images are never looked at and hold zeros.

    Raises:
        DataError: if the mask of a readable image is missing, damaged, or holds a value beyond the classes.
    """
    masks = torch.zeros(len(images), size, size, dtype=torch.uint8 if num_classes <= IGNORE else torch.int64)
    for place, sample in enumerate(images.samples):
        mask = _mask_of_readable(sample, num_classes)
        if mask is not None:
            masks[place] = torch.from_numpy(eval_mask(mask, size))
    return masks


def _mask_of_readable(sample: ImageSample, num_classes: int) -> np.ndarray | None:
    """The mask, or None where it is the image that can't be read."""
    try:
        return read_mask(sample, num_classes)
    except DataError:
        try:
            image_size(sample.path)
        except DataError:
            return None
        raise


def _augmented(
    features: Features, recipe: Recipe, order: Sequence[int], seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and masks of cropped and flipped training images; each image's luck depends on (seed, epoch, image)."""
    images, num_classes = features.data.train, len(features.data.classes)
    channels = features.encoder.in_chans

    def make(position: int) -> tuple[Tensor, Tensor] | Skipped:
        sample = images.samples[position]
        try:
            image = read_image(sample.path, channels)
        except DataError as error:
            return Skipped(sample.path, str(error).removeprefix(f"{sample.path}: "))
        mask = read_mask(sample, num_classes)
        rng = np.random.default_rng(sample_key(seed, epoch, position))
        pixels, mask = crop_and_flip(image, mask, recipe.image_size, recipe.mask_size, rng)
        scaled = torch.from_numpy(pixels).permute(2, 0, 1).float()
        return scaled / 255 if pixels.dtype == np.uint8 else scaled, torch.from_numpy(mask)

    with ThreadPoolExecutor(max(1, features.num_workers)) as pool:
        for start in range(0, len(order), recipe.batch_size):
            made = list(pool.map(make, order[start : start + recipe.batch_size]))
            features.skipped.update({str(item.path): item.reason for item in made if isinstance(item, Skipped)})
            pairs = [item for item in made if not isinstance(item, Skipped)]
            if not pairs:
                continue
            parts = [
                features.patches(torch.stack([pixels for pixels, _ in pairs[i : i + features.batch_size]]))
                for i in range(0, len(pairs), features.batch_size)
            ]
            yield torch.cat(parts).float(), torch.stack([mask for _, mask in pairs])


def crop_and_flip(
    image: np.ndarray, mask: np.ndarray, size: int, mask_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The same random part of an image and its mask, mirrored half of the time.

    Args:
        image: ``(H, W, C)``.
        mask: ``(H, W)``.
        size: side of the image that comes out; resized by area average, or bicubic where it grows.
        mask_size: side of the mask that comes out; by nearest pixel.
        rng: source of randomness.
    """
    top, left, height, width = random_resized_crop(rng, mask.shape[0], mask.shape[1], CROP_AREA, CROP_ASPECT)
    window = np.s_[top : top + height, left : left + width]
    pixels = resize(image[window], size).reshape(size, size, -1)  # OpenCV drops a single channel's axis
    labels = eval_mask(mask[window], mask_size)
    if rng.random() < FLIP_PROB:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    return np.ascontiguousarray(pixels), np.ascontiguousarray(labels)
