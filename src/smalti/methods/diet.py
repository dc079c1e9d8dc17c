"""DIET: each image is its own class.

Papers: Balestriero, "Unsupervised Learning on a DIET", 2023, arXiv:2302.10260; Rodas et al., DIET-CP, 2025,
arXiv:2509.06990, which continues a published encoder on about 1,000 images; the defaults are those of its run scripts.
Letters: B images of a batch, N images in all, D embed_dim.
The papers' texts were not at hand, only code. Differs from it: the head's learning rate is ten times the encoder's
(rows of W must grow for the loss to reach its floor); crops come from the image, not from a squashed square; schedules
change per step; images are normalised as the encoder expects, not by the data's own statistics; no mixup.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import Count, Positive, RatioBelowOne, settings
from smalti.data.color import ColorConfig
from smalti.data.crops import MultiCrop, ViewSpec
from smalti.data.dataset import Dataset
from smalti.data.views import Views
from smalti.errors import ConfigError, DataError
from smalti.functional.precision import at_least_float32
from smalti.methods.base import EncoderMethod, MethodConfig, Reference, register, uniform_guess
from smalti.models.encoder import Encoder

LARGEST_HEAD = 200_000_000
"""Numbers in W; more would need over 3 GiB with gradient and AdamW's moments."""


@settings
class DIETConfig(MethodConfig):
    """Settings of DIET; the run's ``pool`` selects the vector that is classified."""

    name: str = "diet"
    num_images: Count | None = None
    """N; None: as many as the data has."""
    label_smoothing: RatioBelowOne = 0.2
    """Fraction of the target that is spread evenly over all images, in [0, 1); DIET from random weights: 0.8."""
    normalize: bool = True
    """Unit vectors before W, so that the length of a row acts as an inverse temperature; DIET from random weights:
    false."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a fraction of the image."""
    head_lr_scale: Positive = 10.0
    """Learning rate of W relative to the encoder's; 1 in the released code."""


def index_loss(
    vectors: Float[Tensor, "B D"], weight: Float[Tensor, "N D"], index: Int[Tensor, " B"], smoothing: float
) -> tuple[Float[Tensor, ""], Float[Tensor, "B N"]]:
    """Cross-entropy of the images' indices, and the logits.

    Args:
        vectors: z, in float32 or float64 outside autocast; the caller has normalised them, if at all.
        weight: W, a row per image; no bias, no temperature.
        index: ``(B,)`` in 0..N-1.
        smoothing: epsilon: 1 - epsilon + epsilon / N of the target is on the image, epsilon / N on each other one.
    """
    logits = vectors @ weight.T
    return F.cross_entropy(logits, index, label_smoothing=smoothing), logits


@register("diet")
class DIET(EncoderMethod):
    """A linear layer tells, from an augmented image, which image of the training set it is."""

    Config = DIETConfig
    title = "classification of each image as its own class, for about 1,000 images"
    paper = "Balestriero 2023, arXiv:2302.10260; Rodas et al. 2025, arXiv:2509.06990"
    pools_images = True
    needs_num_images = True
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        "index_accuracy": LogColumn(
            "Images recognised",
            "Fraction of augmented images classified as themselves; near 1 early in training, crops are too easy.",
        ),
        "row_norm": LogColumn("Length of the rows of W", "Mean norm of a row: the inverse temperature of its image."),
    }
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.05, "warmup_ratio": 0.1, "clip_norm": None},
        "drop_path": 0.0,
    }
    posttrain_defaults: ClassVar[dict[str, Any]] = {  # DIET-CP; its code also freezes the final norm
        "optim": {"lr": 1e-4, "min_lr": 1e-5, "freeze_encoder_ratio": 0.05},
        "adapt": "last:2",
    }

    def __init__(self, encoder: Encoder, config: DIETConfig) -> None:
        super().__init__(encoder, config)
        if config.num_images is None or config.num_images < 2:
            raise ConfigError(f"method.num_images={config.num_images}: diet needs at least 2 images")
        if config.num_images * encoder.embed_dim > LARGEST_HEAD:
            gib = 16 * config.num_images * encoder.embed_dim / 2**30  # float32: weights, gradient, two moments
            raise ConfigError(
                f"diet has a row of {encoder.embed_dim} weights for each of {config.num_images} images, {gib:.1f} GiB "
                "in training; it is made for thousands of images, so name fewer"
            )
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, config.num_images, bias=False)

    def make_views(self, image_size: int) -> MultiCrop:
        """A random resized crop, a flip, and in three of ten images colour jitter: level 2 of DIET-CP's code."""
        color = ColorConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2, jitter_prob=0.3, gray_prob=0.2)
        return MultiCrop([ViewSpec(size=image_size, scale=self.config.crop_scale, color=color)])

    def bind(self, images: Dataset, image_size: int) -> None:
        """Check that there is a row for each image. The run checks that a resumed run has the same images.

        Raises:
            DataError: for signals, or another number of images.
        """
        if images.kind == "signals":
            raise DataError("diet trains on images, but the data are signals")
        if len(images) != self.config.num_images:
            raise DataError(
                f"{images.root}: has {len(images)} training images, but method.num_images={self.config.num_images}; "
                "leave it out"
            )

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss term ``index``."""
        vectors = self.encoder.image_features(self.encoder.normalize(views.global_crops))
        weight = self.head.weight
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = at_least_float32(vectors)
            if self.config.normalize:
                vectors = F.normalize(vectors, dim=-1)
            loss, logits = index_loss(vectors, weight, views.index, self.config.label_smoothing)
        self.observations = {
            "index_accuracy": (logits.detach().argmax(-1) == views.index).float().mean(),
            "row_norm": weight.detach().norm(dim=-1).mean(),
        }
        return {"index": loss}

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """The uniform guess over images."""
        return uniform_guess(row, "index", self.config.num_images or 0, "images")

    def networks(self) -> dict[str, Encoder]:
        """The encoder."""
        return {"encoder": self.encoder}

    def param_groups(self) -> list[dict[str, Any]]:
        """As in :class:`~smalti.methods.base.Method`, with a larger learning rate for W, which is decayed, too."""
        groups = []
        for group in super().param_groups():
            for is_head, scale in ((False, 1.0), (True, self.config.head_lr_scale)):
                members = [parameter for parameter in group["params"] if (parameter is self.head.weight) == is_head]
                groups.append({**group, "params": members, "lr_scale": scale})
        return groups
