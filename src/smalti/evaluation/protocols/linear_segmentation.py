"""Linear segmentation: a 1x1 convolution on frozen patch tokens.

Source: Ziegler & Asano, Leopart, arXiv:2204.13101, and Pariza et al., NeCo, arXiv:2408.11054, in the settings of
their code: tokens after the final norm, SGD, masks of 100x100 pixels.
Differs from them: the head comes before the bilinear upsampling instead of after it, which is equivalent (both are
linear, over different axes) and upsamples K logits instead of D features; training images are shuffled; all test
images count; the last epoch is reported, since selecting one would need the test images. The small preset also selects
its learning rate on held-out training images: with their 0.01, a head on tokens of unit length underfits in few steps.
With ``hidden_dim``: the head and optimiser of Hajimiri et al., LocAtViT, arXiv:2603.04892, as in their code.
Letters: n images, B of them in a batch, N = h*w patches, D embed_dim, K classes, M side of the masks,
F width of a hidden layer.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.config import BatchSize, Count, ImageSize, settings
from smalti.data.loader import epoch_order
from smalti.errors import DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.dense import (
    augmented_tokens,
    crop_and_flip,
    ignored_value,
    read_masks,
    unlabelled_of,
    upsampling,
)
from smalti.evaluation.features import Features
from smalti.evaluation.metrics import Absent, ConfusionMatrix, accuracy, class_iou, mean_iou
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.tally import PixelTally

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
_AT_ONCE = 16  # images whose pixel logits are in memory at a time
GRID = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Learning rates of the small preset."""
HELD_OUT = 0.2
HIDDEN_LEARNING_RATE, HIDDEN_WEIGHT_DECAY = 1e-3, 0.01
WARMUP_RATIO, FLOOR = 0.25, 1e-4
FEWEST_STEPS = 300
"""Minimum number of steps of the small preset, for small data sets."""


@dataclass(frozen=True)
class LinearSegmentationRecipe:
    """A preset with the settings that the user changed."""

    image_size: int
    mask_size: int
    epochs: int
    batch_size: int
    augment: bool
    absent: Absent
    learning_rates: tuple[float, ...]
    """If several, the best on held-out training images is used."""
    hidden_dim: int | None = None

    def decay(self, epoch: int) -> float:
        """Factor of the learning rate: 0.1 in the last 20 % of the epochs."""
        return 0.1 if epoch >= 0.8 * self.epochs else 1.0

    def optimizer(self, head: "Head", rate: float) -> torch.optim.Optimizer:
        """SGD; AdamW for a head with a hidden layer."""
        if self.hidden_dim is None:
            return torch.optim.SGD(head.parameters, rate, MOMENTUM, weight_decay=WEIGHT_DECAY)
        return torch.optim.AdamW(head.parameters, rate, weight_decay=HIDDEN_WEIGHT_DECAY)


def one_cycle(progress: float) -> float:
    """Factor of the learning rate of heads with a hidden layer: linear up to 1 in the first quarter, then linear down.

    Args:
        progress: 0 in the first step, 1 in the last; there the factor is 1e-4.
    """
    rise = progress / WARMUP_RATIO if progress < WARMUP_RATIO else (1 - progress) / (1 - WARMUP_RATIO)
    return FLOOR + (1 - FLOOR) * rise


class HiddenLayer(nn.Module):
    """A 1x1 convolution, normalisation over the tokens and channels of an image, and GELU."""

    def __init__(self, embed_dim: int, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Linear(embed_dim, width), nn.GroupNorm(1, width)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N F"]:
        """Inputs of the classifier."""
        return F.gelu(self.norm(self.conv(tokens).mT).mT)


class Head:
    """A 1x1 convolution with bias, followed by bilinear upsampling; with ``hidden_dim`` after a :class:`HiddenLayer`.

    The initial weights are torch's default for convolutions, from a separate generator.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        grid: tuple[int, int],
        mask_size: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        hidden_dim: int | None = None,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.hidden: HiddenLayer | None = None
        if hidden_dim is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                self.hidden = HiddenLayer(embed_dim, hidden_dim).to(device)
            embed_dim = hidden_dim
        bound = embed_dim**-0.5
        self.weight = torch.empty(num_classes, embed_dim).uniform_(-bound, bound, generator=g).to(device)
        self.bias = torch.empty(num_classes).uniform_(-bound, bound, generator=g).to(device)
        self._grid = grid
        self._rows, self._columns = (upsampling(side, mask_size).to(device) for side in grid)

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters."""
        return [self.weight, self.bias, *([] if self.hidden is None else self.hidden.parameters())]

    def logits(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B M M K"]:
        """Class scores of each pixel of the masks."""
        return self._classified(tokens if self.hidden is None else self.hidden(tokens))

    def _classified(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B M M K"]:
        """Class scores of each pixel from the classifier's inputs."""
        h, w = self._grid
        scores = F.linear(tokens, self.weight, self.bias)
        up = torch.matmul(self._rows, scores.view(len(tokens), h, -1))  # (B, h, w*K) -> (B, M, w*K)
        return torch.matmul(self._columns, up.view(*up.shape[:2], w, -1))  # (B, M, w, K) -> (B, M, M, K)

    def loss(self, tokens: Float[Tensor, "B N D"], target: Integer[Tensor, "B M M"], ignore: int) -> float:
        """Sum of the cross-entropy over the labelled pixels; infinite if NaN."""
        logits = self.logits(tokens).flatten(0, 2)
        loss = float(F.cross_entropy(logits, target.flatten().long(), ignore_index=ignore, reduction="sum"))
        return loss if loss == loss else math.inf

    @torch.no_grad()
    def backward(self, tokens: Float[Tensor, "B N D"], target: Integer[Tensor, "B M M"], ignore: int) -> None:
        """Set ``grad`` of all parameters for the mean cross-entropy of a batch's labelled pixels.

        For the classifier in closed form, since autograd would store three tensors of ``(B, M, M, K)`` instead of one;
        and in chunks of the batch.
        """
        num_labelled = (target != ignore).sum().clamp(min=1)  # a batch may have no labelled pixel
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        assert self.weight.grad is not None and self.bias.grad is not None, "set above"
        for part, truth in zip(torch.split(tokens, _AT_ONCE), torch.split(target, _AT_ONCE), strict=True):
            inputs = part
            if self.hidden is not None:
                with torch.enable_grad():
                    inputs = self.hidden(part)
            error = self._classified(inputs).softmax(-1)  # softmax - one_hot is the gradient of the logits
            flat, classes = error.view(-1, error.shape[-1]), truth.flatten().long()
            is_ignored = classes == ignore
            flat[torch.arange(len(flat), device=flat.device), classes.masked_fill(is_ignored, 0)] -= 1
            flat[is_ignored] = 0
            down = torch.matmul(self._columns.T, error).flatten(2)  # (B, M, M, K) -> (B, M, w*K)
            down = torch.matmul(self._rows.T, down).view(-1, error.shape[-1]) / num_labelled  # -> (B*N, K)
            self.weight.grad += down.T @ inputs.flatten(0, 1)
            self.bias.grad += down.sum(0)
            if self.hidden is not None:
                torch.autograd.backward(inputs, (down @ self.weight).view_as(inputs))


@settings
class LinearSegmentationConfig:
    """Settings of ``linear-segmentation``."""

    epochs: Count | None = None
    """Passes over the training images; None: the preset's."""
    batch_size: BatchSize | None = None
    """Images per training step; None: the preset's."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest learning rate; None: the preset's (the small preset selects it on held-out training images)."""
    augment: bool | None = None
    """Random crops and flips of the training images; None: the preset's."""
    mask_size: ImageSize | None = None
    """Side of the masks in pixels; None: the preset's."""
    absent: Absent | None = None
    """mIoU: a class in neither masks nor predictions counts zero, or is skipped; None: the preset's."""
    hidden_dim: Count | None = None
    """Width of a hidden layer before the classifier (1x1 convolution, group norm, GELU), trained with AdamW and one
    cycle of the learning rate; 512 is LocAtViT's head. None: a linear head."""


def choose_recipe(features: Features, config: EvalConfig) -> LinearSegmentationRecipe:
    """The preset with the user's settings.

    Raises:
        ConfigError: if the encoder's own image size isn't square and none is given.
        ShapeError: if the patch size does not divide the image size.
    """
    own: LinearSegmentationConfig = config.of("linear-segmentation")
    if config.preset != "small":
        size = features.image_size(config.image_size or 448)
        absent: Absent = "zero" if config.preset == "paper" else "skip"
        recipe = LinearSegmentationRecipe(size, 100, 25, 128, True, absent, (LEARNING_RATE,))
    else:
        size = features.dense_size(config.image_size)
        batch_size = own.batch_size or 16
        epochs = max(20, math.ceil(FEWEST_STEPS / math.ceil(len(features.data.train) / batch_size)))
        recipe = LinearSegmentationRecipe(size, min(100, size), epochs, batch_size, False, "skip", GRID)
    changed: dict[str, Any] = {
        "mask_size": own.mask_size,
        "epochs": own.epochs,
        "batch_size": own.batch_size,
        "augment": own.augment,
        "absent": own.absent,
        "learning_rates": (own.learning_rate,)
        if own.learning_rate
        else (HIDDEN_LEARNING_RATE,)
        if own.hidden_dim
        else None,
        "hidden_dim": own.hidden_dim,
    }
    return replace(recipe, **{name: value for name, value in changed.items() if value is not None})


def train_heads(
    features: Features,
    recipe: LinearSegmentationRecipe,
    learning_rates: Sequence[float],
    chosen: Sequence[int],
    masks: Integer[Tensor, "n M M"],
    seed: int,
    what: str,
) -> list[Head]:
    """Train one head per learning rate on the same batches: SGD, cross-entropy over all labelled pixels.

    Args:
        features: features of the training images.
        recipe: all settings except the learning rates.
        learning_rates: initial learning rate of each head.
        chosen: indices of the images to train with.
        masks: masks of all training images, at the size of the heads' logits.
        seed: seed of the initial weights, the same for all heads, and of the order of images and their augmentation.
        what: label of the progress.
    """
    encoder, num_classes, size = features.encoder, len(features.data.classes), masks.shape[-1]
    grid = encoder.check_size(recipe.image_size, recipe.image_size)
    heads = [
        Head(encoder.embed_dim, num_classes, grid, size, seed, features.device, recipe.hidden_dim)
        for _ in learning_rates
    ]
    optimizers = [recipe.optimizer(head, rate) for head, rate in zip(heads, learning_rates, strict=True)]
    tokens = None if recipe.augment else features.tokens("train", recipe.image_size)
    num_steps = recipe.epochs * math.ceil(len(chosen) / recipe.batch_size)
    step = 0
    for epoch in range(recipe.epochs):
        for optimizer, rate in zip(optimizers, learning_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * recipe.decay(epoch)
        order = [chosen[i] for i in epoch_order(seed, epoch, len(chosen))]
        batches: Iterator[tuple[Tensor, Tensor]]
        if tokens is None:
            crop = partial(crop_and_flip, size=recipe.image_size, mask_size=size)
            made = augmented_tokens(features, order, recipe.batch_size, seed, epoch, crop)
            batches = ((x, target) for x, target, _ in made)
        else:
            batches = ((x, masks[torch.tensor(at)]) for x, at in tokens.batches(order, recipe.batch_size))
        for inputs, target in batches:
            for head, optimizer, rate in zip(heads, optimizers, learning_rates, strict=True):
                if recipe.hidden_dim is not None:
                    optimizer.param_groups[0]["lr"] = rate * one_cycle(step / max(num_steps - 1, 1))
                head.backward(inputs, target.to(inputs.device), ignored_value(num_classes))
                optimizer.step()
            step += 1
            features.progress(what, step, num_steps)
    return heads


def choose_learning_rate(
    features: Features, recipe: LinearSegmentationRecipe, masks: Integer[Tensor, "n M M"], seed: int
) -> tuple[float, dict[str, float]]:
    """The learning rate with the highest mIoU on 20 % of the training images, and the mIoU of each.

    Ties go to the lowest cross-entropy. Masks have one pixel per patch here, which is far cheaper and selects the same
    learning rate.

    Raises:
        DataError: if there is only one training image.
    """
    images = features.data.train
    if len(images) < 2:
        raise DataError(
            f"{images.root}: only one training image, so no learning rate can be selected; set "
            "eval.linear-segmentation.learning_rate"
        )
    ignore = ignored_value(len(features.data.classes))
    grid = features.encoder.check_size(recipe.image_size, recipe.image_size)
    coarse = F.interpolate(masks[:, None].float(), max(grid), mode="nearest")[:, 0].to(masks.dtype)
    order = epoch_order(seed, 0, len(images)).tolist()
    num_held_out = max(1, round(HELD_OUT * len(images)))
    held_out, rest = sorted(order[:num_held_out]), sorted(order[num_held_out:])
    heads = train_heads(features, recipe, recipe.learning_rates, rest, coarse, seed, "learning rates")
    batches = list(features.tokens("train", recipe.image_size).batches(held_out))
    scores = [mean_iou(matrix) for matrix in _confusion_matrices(heads, features, iter(batches), coarse)]
    losses = [sum(head.loss(x, coarse[torch.tensor(at)].to(x.device), ignore) for x, at in batches) for head in heads]
    best = min(range(len(heads)), key=lambda i: (-scores[i], losses[i]))
    reached = {f"{rate:g}": score for rate, score in zip(recipe.learning_rates, scores, strict=True)}
    return recipe.learning_rates[best], reached


def _confusion_matrices(
    heads: Sequence[Head],
    features: Features,
    batches: Iterator[tuple[Tensor, list[int]]],
    masks: Integer[Tensor, "n M M"],
) -> list[Tensor]:
    """The confusion matrix of each head on images."""
    num_classes = len(features.data.classes)
    counts = [ConfusionMatrix(num_classes, ignore=ignored_value(num_classes), device=features.device) for _ in heads]
    for tokens, positions in batches:
        targets = masks[torch.tensor(positions)].to(tokens.device)
        for part, target in zip(torch.split(tokens, _AT_ONCE), torch.split(targets, _AT_ONCE), strict=True):
            for head, confusion in zip(heads, counts, strict=True):
                confusion.update(target, head.logits(part).argmax(-1))
    return [confusion.matrix for confusion in counts]


@register_protocol(
    "linear-segmentation",
    need="masks",
    settings=LinearSegmentationConfig,
    takes_norm=True,
    priority=60,
)
@torch.no_grad()
def linear_segmentation(features: Features, config: EvalConfig) -> Scores:
    """Semantic segmentation with a linear head on frozen patch tokens; needs masks."""
    recipe = choose_recipe(features, config)
    images, classes = features.data.test, features.data.classes
    ignore = ignored_value(len(classes))
    masks = read_masks(images, len(classes), recipe.mask_size)
    unlabelled = unlabelled_of(images, masks, ignore, features.evaluated)
    train_masks = read_masks(features.data.train, len(classes), recipe.mask_size)
    rate, reached = recipe.learning_rates[0], dict[str, float]()
    if len(recipe.learning_rates) > 1:
        rate, reached = choose_learning_rate(features, recipe, train_masks, config.seed)
    everything = range(len(features.data.train))
    heads = train_heads(features, recipe, [rate], everything, train_masks, config.seed, "linear-segmentation")
    tally = PixelTally(len(classes), len(images), ignore, features.device)
    predictions: dict[int, np.ndarray] = {}
    for tokens, positions in features.tokens("test", recipe.image_size).batches(batch_size=_AT_ONCE):
        target = masks[torch.tensor(positions)].to(tokens.device)
        pred = heads[0].logits(tokens).argmax(-1)
        tally.update(target, pred, positions)
        predictions |= {
            place: one.cpu().numpy().astype(np.int32)
            for place, one in zip(positions, pred, strict=True)
            if place in features.shown
        }
    matrix = tally.confusion.matrix
    settings = {
        "preset": config.preset,
        "comparable": "small preset: not comparable with published numbers"
        if config.preset == "small"
        else "LocAtViT's head; all else Leopart's and NeCo's settings, unless changed"
        if recipe.hidden_dim
        else "Leopart's and NeCo's settings, unless changed"
        + ("" if config.preset == "paper" else "; absent classes skipped"),
        "image_size": recipe.image_size,
        "resize": "to a square, aspect ratio ignored",
        "mask_size": recipe.mask_size,
        "augment": recipe.augment,
        "epochs": recipe.epochs,
        "head_batch_size": recipe.batch_size,
        "learning_rate": rate,
        "learning_rate_chosen_by": "mIoU at one pixel per patch on held-out 20 % of the training images; then "
        "refitted on all"
        if reached
        else "preset or eval.linear-segmentation.learning_rate",
        "learning_rates_tried": reached,
        "learning_rate_is_at_edge_of_grid": len(reached) > 1 and rate in (min(GRID), max(GRID)),
        **({"hidden_dim": recipe.hidden_dim} if recipe.hidden_dim else {}),
        "optimiser": f"AdamW, weight decay {HIDDEN_WEIGHT_DECAY}, lr linear up in the first quarter, then down"
        if recipe.hidden_dim
        else f"SGD, momentum {MOMENTUM}, weight decay {WEIGHT_DECAY}, lr / 10 in the last 20 %",
        "reported": "last epoch",
        "absent": recipe.absent,
        "matching": "direct",
        "ignored_value": ignore if ignore >= 0 else None,
        "num_unlabelled": len(unlabelled),
        "cache_dtype": config.cache_dtype,
    }
    iou = dict(zip(classes, class_iou(matrix).tolist(), strict=True))
    metrics = {"miou": mean_iou(matrix, recipe.absent), "pixel_accuracy": accuracy(matrix)}
    return Scores(
        metrics,
        settings,
        {"iou": iou},
        tallies={"miou": tally.iou(recipe.absent), "pixel_accuracy": tally.pixel_accuracy()},
        confusion=matrix.cpu().numpy(),
        predictions=predictions,
    )
