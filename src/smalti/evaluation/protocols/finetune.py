"""Fine-tuning: a copy of the encoder and a classifier on the mean patch token (or ``eval.pool``), trained end to end on
class labels.

Source: He et al., MAE, arXiv:2111.06377v3, App. A.1 and Table 9, in the settings of their code for each size.
Differs from it: warm-up starts at a fraction of the learning rate (theirs: at 0); batches cross epochs, so no image is
dropped; the last epoch is reported, since selecting one would need the test images. The small preset only has crops
and flips, and fewer steps.
Letters: n images, B of them in a batch, D embed_dim, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from pydantic import Field
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.charts import loss_chart
from smalti.config import BatchSize, Count, settings
from smalti.data.images.folders import ImageSample
from smalti.data.views import Skipped
from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.features import Features
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.tuning import (
    Example,
    evaluate_labels,
    normalized,
    random_view,
    rate_positions,
    seeded,
    train,
    trainable_copy,
    warm_cosine,
)
from smalti.functional.precision import has_bf16
from smalti.models.encoder import Encoder

FEWEST_STEPS = 200
"""Minimum number of steps of the small preset, for small data sets."""
BETAS = (0.9, 0.999)
_LARGE = 24  # blocks of a ViT-L; a ViT-H has 32


@dataclass(frozen=True)
class FinetuneRecipe:
    """A preset with the settings that the user changed."""

    image_size: int
    epochs: int
    batch_size: int
    base_lr: float
    """Learning rate for 256 images per step."""
    layer_decay: float
    """Layer-wise decay: factor of the learning rate from each block to the one before."""
    drop_path: float
    warmup_ratio: float
    """Warm-up, as a fraction of all steps."""
    crop_area: tuple[float, float]
    rand_augment: str = ""
    """RandAugment in timm's notation; empty: none."""
    erase_prob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    weight_decay: float = 0.05
    least_lr: float = 1e-6
    learning_rate: float | None = None
    """Peak learning rate without scaling; replaces ``base_lr``."""

    @property
    def peak_lr(self) -> float:
        """The highest learning rate."""
        return self.learning_rate or self.base_lr * self.batch_size / 256

    def num_steps(self, num_images: int) -> int:
        """Total number of steps; the last batch may contain images of the next epoch."""
        return math.ceil(self.epochs * num_images / self.batch_size)


@settings
class FinetuneConfig:
    """Settings of ``finetune``."""

    epochs: Count | None = None
    """Passes over the training images; None: the preset's."""
    batch_size: BatchSize | None = None
    """Images per training step; None: the preset's."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest learning rate; None: the preset's."""


def choose_recipe(features: Features, config: EvalConfig) -> FinetuneRecipe:
    """The preset with the user's settings.

    Raises:
        ConfigError: if the encoder's own image size isn't square and none is given, or if mixup is used with an odd
            batch size.
        ShapeError: if the patch size does not divide the image size.
    """
    own: FinetuneConfig = config.of("finetune")
    num_images, depth = len(features.data.train), features.encoder.depth
    if config.preset == "small":
        size = features.image_size(config.image_size)
        batch_size = own.batch_size or min(32, num_images)
        epochs = max(10, math.ceil(FEWEST_STEPS * batch_size / num_images))
        # The learning rate for 64 images at least: Adam's step size doesn't depend on the gradient noise.
        recipe = FinetuneRecipe(
            size, epochs, batch_size, 1e-3, 0.75, 0.0, 0.1, (0.35, 1.0), learning_rate=1e-3 * 64 / 256
        )
    else:
        size = features.image_size(config.image_size or 224)
        is_large = depth >= _LARGE
        epochs = 50 if is_large else 100
        base_lr, layer_decay = (1e-3, 0.75) if is_large else (5e-4, 0.65)
        drop_path = 0.1 if not is_large else 0.2 if depth == _LARGE else 0.3
        recipe = FinetuneRecipe(
            size,
            epochs,
            1024,
            base_lr,
            layer_decay,
            drop_path,
            5 / epochs,
            (0.08, 1.0),
            rand_augment="rand-m9-mstd0.5-inc1",
            erase_prob=0.25,
            mixup=0.8,
            cutmix=1.0,
            label_smoothing=0.1,
        )
    changed: dict[str, Any] = {
        "epochs": own.epochs,
        "batch_size": own.batch_size,
        "learning_rate": own.learning_rate,
    }
    recipe = replace(recipe, **{name: value for name, value in changed.items() if value is not None})
    if recipe.mixup and recipe.batch_size % 2:
        raise ConfigError(f"eval.finetune.batch_size={recipe.batch_size}: an even number is needed for mixup")
    return recipe


class FinetuneClassifier(nn.Module):
    """The encoder without its final norm, followed by mean pooling, layer norm and a linear layer.

    With another pooling, the final norm is kept and the linear layer takes the pooled vector. The layers are the copy's
    own ``fc_norm`` and ``head``, so that it is a timm classifier for timm's layer-wise decay.
    """

    def __init__(self, encoder: Encoder, num_classes: int, pool: str = "avg") -> None:
        """
        Args:
            encoder: a copy, modified in place.
            num_classes: K.
            pool: ``avg``, or another pooling of :meth:`~smalti.models.encoder.Encoder.set_pool`; its parameters, if
                any, are initialised from torch's generator unless the encoder has them.
        """
        super().__init__()
        self.encoder = encoder
        device = next(encoder.parameters()).device
        encoder.set_pool(pool, fresh=True)
        if pool == "avg":
            encoder.vit.norm = nn.Identity()
            encoder.vit.fc_norm = nn.LayerNorm(encoder.embed_dim, eps=1e-6, device=device)
        head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(head.weight, std=2e-5)
        nn.init.zeros_(head.bias)
        encoder.vit.head = head.to(device)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Class scores of normalised images."""
        return self.encoder.vit.head(self.encoder.vit.fc_norm(self.encoder.image_features(images)))


@dataclass(frozen=True)
class ClassificationExamples:
    """Loads and augments training images; see :func:`~smalti.evaluation.tuning.train`."""

    samples: Sequence[ImageSample]
    recipe: FinetuneRecipe
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, place: int, key: int) -> Example | Skipped:
        """``(C, S, S)`` normalised image, and its class."""
        sample = self.samples[place]
        view = random_view(sample, len(self.mean), self.recipe.image_size, self.recipe.crop_area, key)
        if isinstance(view, Skipped):
            return view
        if not self.recipe.rand_augment:
            return normalized(view, self.mean, self.std), torch.tensor(sample.label)
        with seeded(key):  # timm uses Python's, NumPy's and torch's global generators
            pixels = normalized(self._rand_augment(view, sample), self.mean, self.std)
            pixels = RandomErasing(self.recipe.erase_prob, mode="pixel", device="cpu")(pixels)
        return pixels, torch.tensor(sample.label)

    def _rand_augment(self, view: np.ndarray, sample: ImageSample) -> np.ndarray:
        channels = view.shape[2]
        if view.dtype != np.uint8 or channels not in (1, 3):
            raise DataError(
                f"{sample.path}: RandAugment needs 8-bit images of 1 or 3 channels, got {view.dtype} with "
                f"{channels}; use eval.preset=small"
            )
        mean = tuple(min(255, round(255 * value)) for value in self.mean)
        augment = rand_augment_transform(
            self.recipe.rand_augment,
            {
                "translate_const": int(self.recipe.image_size * 0.45),
                "img_mean": mean if channels == 3 else mean * 3,
                "interpolation": Image.Resampling.BICUBIC,
            },
        )
        # grey images as three equal channels: timm's fill colours have three
        changed = np.asarray(augment(Image.fromarray(np.broadcast_to(view, (*view.shape[:2], 3)).copy())))
        if channels == 3:
            return changed
        return changed.mean(2, keepdims=True).round().astype(np.uint8)  # colour operations may make channels differ


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned classifier."""

    model: FinetuneClassifier
    recipe: FinetuneRecipe
    pool: str
    losses: list[float]
    """Of each step."""


def fine_tune(features: Features, config: EvalConfig) -> FineTuned:
    """Fine-tune a copy of the encoder with a classifier on the training images.

    Args:
        features: encoder and data; the encoder isn't modified.
        config: preset, pooling, seed and the settings of ``finetune``.

    Raises:
        ConfigError, ShapeError: as :func:`choose_recipe`.
        DataError: if an image can't be augmented as the recipe asks.
    """
    recipe = choose_recipe(features, config)
    num_classes = len(features.data.classes)
    num_steps = recipe.num_steps(len(features.data.train))
    num_warmup = math.ceil(recipe.warmup_ratio * num_steps)
    encoder = features.encoder
    pool = "avg" if config.pool == "auto" else config.pool
    with seeded(config.seed, features.device):
        model = FinetuneClassifier(trainable_copy(encoder, recipe.drop_path), num_classes, pool)
        optimizer = create_optimizer_v2(
            model.encoder.vit,
            "adamw",
            lr=recipe.peak_lr,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            betas=BETAS,
        )
        rate_positions(optimizer, encoder, model.encoder)
        mix = (
            Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=num_classes)
            if recipe.mixup
            else None
        )

        def loss_of(images: Tensor, labels: Tensor) -> Tensor:
            if mix is None:
                return F.cross_entropy(model(images), labels, label_smoothing=recipe.label_smoothing)
            mixed, targets = mix(images, labels)
            return SoftTargetCrossEntropy()(model(mixed), targets)

        losses = train(
            model,
            optimizer,
            features,
            ClassificationExamples(features.data.train.samples, recipe, encoder.mean, encoder.std),
            loss_of,
            lambda step: warm_cosine(
                step, num_steps, peak=recipe.peak_lr, least=min(recipe.least_lr, recipe.peak_lr), num_warmup=num_warmup
            ),
            num_steps=num_steps,
            batch_size=recipe.batch_size,
            seed=config.seed,
            what="finetune",
        )
    return FineTuned(model, recipe, pool, losses)


@register_protocol(
    "finetune",
    need="labels",
    settings=FinetuneConfig,
    takes_pool=True,
    by_default=False,
)
def finetune(features: Features, config: EvalConfig) -> Scores:
    """Image classification, fine-tuned end to end; needs class folders."""
    tuned = fine_tune(features, config)
    encoder, recipe, pool = features.encoder, tuned.recipe, tuned.pool
    num_steps = recipe.num_steps(len(features.data.train))
    metrics, per_class, tallies, confusion = evaluate_labels(tuned.model, features, recipe.image_size)
    settings = {
        "preset": config.preset,
        "comparable": "small preset: not comparable with published numbers"
        if config.preset == "small"
        else "MAE's fine-tuning recipe, unless changed" + ("" if pool == "avg" else "; MAE pools the mean patch token"),
        "trained": "a copy of the whole encoder, including positions"
        + (" (new, as it was trained without)" if encoder.position_free else ""),
        "pool": "mean patch token, then layer norm; without the encoder's final norm"
        if pool == "avg"
        else f"{pool}, after the encoder's final norm",
        "image_size": recipe.image_size,
        "resize": "short side, then center crop",
        "epochs": recipe.epochs,
        "steps": num_steps,
        "warmup_steps": math.ceil(recipe.warmup_ratio * num_steps),
        "head_batch_size": recipe.batch_size,
        "learning_rate": recipe.peak_lr,
        "optimiser": f"AdamW, betas {BETAS}, weight decay {recipe.weight_decay} (none on vectors), cosine to "
        f"{recipe.least_lr:g}",
        "layer_decay": recipe.layer_decay,
        "drop_path": recipe.drop_path,
        "augmentation": f"random resized crop of {recipe.crop_area[0]:g}-{recipe.crop_area[1]:g} of the area, flip"
        + (f", {recipe.rand_augment}, random erasing {recipe.erase_prob:g}" if recipe.rand_augment else ""),
        "mixup": recipe.mixup,
        "cutmix": recipe.cutmix,
        "label_smoothing": recipe.label_smoothing,
        "precision": "bfloat16 in training" if has_bf16(features.device.type) else "float32",
        "reported": "last epoch",
    }
    return Scores(
        metrics,
        settings,
        per_class,
        tallies=tallies,
        confusion=confusion.matrix.numpy(),
        charts={"loss": loss_chart(tuned.losses)},
    )
