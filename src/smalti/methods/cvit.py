"""CViT: image classification from the first patches of an order.

Paper: Guo et al., "The Collapse of Patches", 2025, arXiv:2511.22281; no code was released. Section 4.3 there (and RViT:
``order=random``; ViT: ``max_rate=0``).
Letters: B images, N patches, k kept ones, D embed_dim, K classes, m fraction of dropped patches.
The paper leaves open: how m is drawn ("cosine schedule favouring low rates": here ``m = 0.99 (1 - cos(pi u / 2))``, u
uniform, one per batch), the optimiser (AdamW, decay 0.05) and label smoothing. The published orders are nearly the same
for all images: compare ``collapse`` with ``collapse_static``, ``fixed_random`` and ``collapse_shuffled``.
Differs from it: dropped patches are not embedded, which gives the same numbers for less work; the weight average covers
at most about the last tenth of the run.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import PathText, Ratio, RatioBelowOne, settings
from smalti.data.crops import CentreCrop
from smalti.data.dataset import Dataset
from smalti.data.order_files import TrainingOrders, check_order
from smalti.data.views import ViewMaker, Views
from smalti.errors import ConfigError, DataError
from smalti.functional.graphs import descending
from smalti.functional.orders import num_kept
from smalti.functional.patches import patch_variance
from smalti.functional.random import sample_uniform
from smalti.methods.base import EncoderMethod, MethodConfig, Reference, register, uniform_guess
from smalti.methods.supervised import class_loss
from smalti.methods.teacher import Average
from smalti.models.encoder import ClassHead, Encoder

_RATE = 17
"""Random stream of a batch's rate."""


@settings
class CViTConfig(MethodConfig):
    """Settings of CViT. There are no random crops or mixing, since an order covers the whole central square."""

    name: str = "cvit"
    num_classes: int | None = None
    """K; None: as many as the data has."""
    order: str = "collapse"
    """Order whose first patches are kept: collapse, random (new for each image and step), fixed_random, halton,
    variance ..."""
    orders: PathText | None = None
    """File from ``smalti rank`` with the orders of the training images, for orders that a network computes."""
    max_rate: RatioBelowOne = 0.99
    """Largest fraction of dropped patches, below 1; 0: a plain ViT on whole images."""
    label_smoothing: RatioBelowOne = 0.1
    """Label smoothing: fraction of the target that is spread evenly over all classes, in [0, 1)."""
    flip_prob: Ratio = 0.5
    """Probability of a horizontal flip, in 0..1; above 0, orders of flipped images are needed."""
    ema: RatioBelowOne = 0.9999
    """Largest momentum of the weight average, which is exported."""


def drop_rate(uniform: float, max_rate: float) -> float:
    """m: fraction of patches that a batch drops, more often small; its mean is 0.36 ``max_rate``.

    Args:
        uniform: u, in [0, 1).
        max_rate: reached at u = 1.
    """
    return max_rate * (1 - math.cos(math.pi * uniform / 2))


class Classifier(nn.Module):
    """An encoder and a linear classifier on its image vector."""

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, images: Float[Tensor, "B C H W"], ids_keep: Int[Tensor, "B k"] | None = None
    ) -> Float[Tensor, "B K"]:
        """Class logits of normalised images from the kept patches; the order of ``ids_keep`` does not matter."""
        return self.head(self.encoder.image_features(images, ids_keep))


@register("cvit")
class CViT(EncoderMethod):
    """Drop the last patches of an order, a new fraction in each batch, and classify the image from the rest."""

    Config = CViTConfig
    title = "supervised classification from the first patches of an order; requires labels"
    paper = "Guo et al. 2025, arXiv:2511.22281"
    pools_images = True
    needs_labels = True
    export_network = "teacher"
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        "train_top1": LogColumn(
            "Training accuracy", "Fraction of training images classified correctly from kept patches; higher is better."
        ),
        "kept": LogColumn("Kept patches", "Fraction of the patches that the encoder sees in a step, drawn at random."),
    }
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "base_lr": 2.5e-4,
            "betas": [0.9, 0.999],
            "weight_decay": 0.05,
            "warmup_ratio": 0.083,
            "min_lr": 0.0,
            "clip_norm": 5.0,
        },
        "drop_path": 0.1,
    }
    posttrain_defaults: ClassVar[dict[str, Any]] = {
        "optim": {"base_lr": 1e-4, "warmup_ratio": 0.0},
        "drop_path": 0.0,
    }

    def __init__(self, encoder: Encoder, config: CViTConfig) -> None:
        super().__init__(encoder, config)
        if config.num_classes is None or config.num_classes < 2:
            raise ConfigError(f"method.num_classes={config.num_classes}: cvit needs at least 2 classes")
        check_order(config.order)
        # a plain ViT keeps all patches and needs no file
        self.orders = TrainingOrders(config.order, config.orders) if config.max_rate > 0 else None
        self.student = Classifier(encoder, config.num_classes)
        self.teacher = Average(self.student, config.ema)
        self.classes: tuple[str, ...] = ()

    def make_views(self, image_size: int) -> ViewMaker:
        """The central square, flipped at random."""
        return CentreCrop(image_size, self.config.flip_prob)

    def bind(self, images: Dataset, image_size: int) -> None:
        """Read the orders of the images.

        Raises:
            DataError, ShapeError: if the file belongs to other images, or lacks orders of flipped images.
        """
        if images.kind == "signals":
            raise DataError("cvit trains on images, but the data are signals")
        self.classes = images.classes or ()
        if self.orders is not None:
            grid = self.student.encoder.check_size(image_size, image_size)
            self.orders.bind(images, grid, self.config.flip_prob > 0)

    def orders_of(self, views: Views, grid: tuple[int, int]) -> Int[Tensor, "B N"]:
        """The order of each image's patches.

        Raises:
            ShapeError: if the orders have another grid.
        """
        assert self.orders is not None, "a plain ViT keeps all patches"
        if self.orders.name == "variance":
            pixels = views.global_crops
            return descending(patch_variance(pixels.float(), self.student.encoder.patch_size))
        return self.orders.of(views, grid)

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss term ``class``."""
        labels = views.labels
        assert labels is not None, "the run checks that there are labels"
        encoder = self.student.encoder
        images = encoder.normalize(views.global_crops)
        grid = encoder.check_size(images.shape[-2], images.shape[-1])
        num_patches = grid[0] * grid[1]
        # one rate per batch, so that all images keep as many patches; from the key of its first image
        rate = drop_rate(float(sample_uniform(views.cpu_keys[:1], 1, _RATE)), self.config.max_rate)
        num_keep = num_kept(num_patches, rate)
        ids_keep = self.orders_of(views, grid)[:, :num_keep] if num_keep < num_patches else None
        logits = self.student(images, ids_keep)
        self.observations = {
            "train_top1": (logits.detach().argmax(-1) == labels).float().mean(),
            "kept": logits.new_full((), num_keep / num_patches),
        }
        return {"class": class_loss(logits, labels, self.config.label_smoothing)}

    def couplings(self) -> dict[str, bool]:
        """All images of a batch keep the same number of patches."""
        return {"one keep ratio per batch": self.config.max_rate > 0}

    def after_step(self, progress: float) -> None:
        """Update the weight average."""
        self.teacher.follow(self.student)

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """The uniform guess over classes."""
        return uniform_guess(row, "class", self.config.num_classes or 0, "classes")

    def networks(self) -> dict[str, Encoder]:
        """The trained network, and its weight average, which is exported."""
        return {"student": self.student.encoder, "teacher": self.teacher.module.encoder}

    def class_head(self, network: str) -> ClassHead:
        """The linear classifier of either network, with the order it was trained with."""
        head = (self.student if network == "student" else self.teacher.module).head
        order = "" if self.orders is None else self.orders.name
        return ClassHead(head.weight, head.bias, self.classes, order, self.config.orders or "")
