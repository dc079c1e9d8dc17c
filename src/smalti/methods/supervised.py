"""Supervised image classification from one vector per image.

Paper: Touvron et al., "Training data-efficient image transformers", DeiT, 2020, arXiv:2012.12877v2, Table 9 for the
recipe, without distillation; in the form in which Hajimiri et al., arXiv:2603.04892, train LocAtViT.
Letters: B images, D embed_dim, K classes.
Differs from both: no RandAugment, random erasing or repeated augmentation, only crops, flips and colour jitter; the
learning rate follows half a cosine, as DeiT's (LocAtViT's is linear).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import NonNegative, Ratio, RatioBelowOne, settings
from smalti.data.color import ColorConfig
from smalti.data.crops import MultiCrop, ViewSpec
from smalti.data.dataset import Dataset
from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.functional.precision import at_least_float32
from smalti.methods.base import EncoderMethod, MethodConfig, Reference, register, uniform_guess
from smalti.models.encoder import ClassHead, Encoder


@settings
class SupervisedConfig(MethodConfig):
    """Settings of supervised pretraining; the run's ``pool`` selects the vector that is classified."""

    name: str = "supervised"
    num_classes: int | None = None
    """K; None: as many as the data has."""
    label_smoothing: RatioBelowOne = 0.1
    """Label smoothing: fraction of the target that is spread evenly over all classes, in [0, 1)."""
    mixup: NonNegative = 0.0
    """Parameter of mixup's Beta distribution, 0.8 in the papers; 0: none."""
    cutmix: NonNegative = 0.0
    """Parameter of CutMix's Beta distribution, 1.0 in the papers; with mixup, each gets half of the batches."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a fraction of the image."""
    flip_prob: Ratio = 0.5
    """Probability of a horizontal flip, in 0..1."""
    color_jitter: NonNegative = 0.4
    """Strength of brightness, contrast and saturation jitter; 0: none."""


def class_loss(logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"], smoothing: float) -> Float[Tensor, ""]:
    """Cross-entropy with label smoothing: mean over images, in float32.

    Args:
        logits: ``(B, K)``.
        labels: ``(B,)`` in 0..K-1.
        smoothing: fraction of the target spread evenly over all K classes, including the true one.
    """
    return F.cross_entropy(at_least_float32(logits), labels, label_smoothing=smoothing)


@register("supervised")
class Supervised(EncoderMethod):
    """A linear classifier on the pooled vector of an image."""

    Config = SupervisedConfig
    title = "supervised image classification; requires labels"
    paper = "Touvron et al. 2020, arXiv:2012.12877v2"
    pools_images = True
    needs_labels = True
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        "train_top1": LogColumn(
            "Training accuracy", "Fraction of augmented training images classified correctly; higher is better."
        ),
    }
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "base_lr": 2.5e-4,
            "betas": [0.9, 0.999],
            "weight_decay": 0.05,
            "warmup_ratio": 0.067,
            "min_lr": 1e-7,
            "clip_norm": 5.0,
        },
        "drop_path": 0.1,
    }

    def __init__(self, encoder: Encoder, config: SupervisedConfig) -> None:
        super().__init__(encoder, config)
        if config.num_classes is None or config.num_classes < 2:
            raise ConfigError(f"method.num_classes={config.num_classes}: {self.name} needs at least 2 classes")
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, config.num_classes)
        self.classes: tuple[str, ...] = ()
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.mix: Mixup | None = None
        if config.mixup or config.cutmix:
            self.mix = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=config.num_classes
            )

    def make_views(self, image_size: int) -> MultiCrop:
        """A random resized crop, a flip and colour jitter."""
        config, strength = self.config, self.config.color_jitter
        color = ColorConfig(
            brightness=strength, contrast=strength, saturation=strength, hue=0.0, jitter_prob=1.0, gray_prob=0.0
        )
        view = ViewSpec(
            count=1,
            size=image_size,
            scale=config.crop_scale,
            flip_prob=config.flip_prob,
            color=color if strength else None,
        )
        return MultiCrop([view])

    def bind(self, images: Dataset, image_size: int) -> None:
        """Store the names of the classes."""
        self.classes = images.classes or ()

    def class_head(self, network: str) -> ClassHead:
        """The linear layer."""
        return ClassHead(self.head.weight, self.head.bias, self.classes)

    def check_batch(self, micro_batch: int) -> None:
        """Mixup and CutMix need an even number of images."""
        if self.mix is not None and micro_batch % 2:
            raise ConfigError(f"micro_batch={micro_batch}: mixup and cutmix mix pairs of images; make it even")

    def couplings(self) -> dict[str, bool]:
        """Mixup and CutMix mix pairs of the batch."""
        return {"mixup and cutmix": self.mix is not None}

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss term ``class``."""
        images, labels, targets = self.inputs(views)
        logits = self.head(self.encoder.image_features(images))
        self.observations = {"train_top1": (logits.detach().argmax(-1) == labels).float().mean()}
        return {"class": self.class_term(logits, labels, targets)}

    def inputs(self, views: Views) -> tuple[Float[Tensor, "B C H W"], Int[Tensor, " B"], Float[Tensor, "B K"] | None]:
        """Normalised images and their classes; of mixed images the class with the larger part, and soft targets."""
        labels = views.labels
        assert labels is not None, "the run checks that there are labels"
        images = self.encoder.normalize(views.global_crops)
        if self.mix is None or not self.training:
            return images, labels, None
        mixed, targets = self.mixed(images, labels, views.cpu_keys)
        return mixed, targets.argmax(-1), targets

    def class_term(
        self, logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"], targets: Float[Tensor, "B K"] | None
    ) -> Float[Tensor, ""]:
        """Cross-entropy with the soft targets of mixed images, else with smoothed labels."""
        if targets is None:
            return class_loss(logits, labels, self.config.label_smoothing)
        return SoftTargetCrossEntropy()(at_least_float32(logits), targets)

    def mixed(
        self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"], keys: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """Images mixed with those of the batch in reverse order, and their soft targets.

        timm uses NumPy's global generator: it is seeded by the samples' keys, and restored afterwards.

        Raises:
            ConfigError: for an odd number of images.
        """
        self.check_batch(len(images))
        assert self.mix is not None
        state = np.random.get_state()  # noqa: NPY002
        try:
            np.random.seed(int(keys.sum()) % 2**32)  # noqa: NPY002
            mixed, targets = self.mix(images.clone(memory_format=torch.contiguous_format), labels)
        finally:
            np.random.set_state(state)  # noqa: NPY002
        return mixed, targets

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """The uniform guess over classes."""
        return uniform_guess(row, "class", self.config.num_classes or 0, "classes")

    def networks(self) -> dict[str, Encoder]:
        """The encoder; its patch tokens are exported, whatever the pooling."""
        return {"encoder": self.encoder}
