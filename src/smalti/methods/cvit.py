"""CViT: image classes told by the patches that come first in an order.

Paper: Guo et al., "The Collapse of Patches", 2025, arXiv:2511.22281; no code was released. Section 4.3 there (and RViT:
``order=random``; ViT: ``max_rate=0``).
Letters: B images, N patches, k kept ones, D embed_dim, K classes, m share of dropped patches.
The paper leaves open: how m is drawn ("cosine schedule favouring low rates": here ``m = 0.99 (1 - cos(pi u / 2))``, u
uniform, one for each batch), the optimiser (AdamW, decay 0.05), smoothing of labels, and that the published orders are
nearly one order for all images: hold ``collapse`` against ``collapse_static``, ``fixed_random`` and
``collapse_shuffled``.
Differs from it: dropped patches are never embedded, where embedding them, adding positions and dropping them then gives
the same numbers for more work; the average of weights reaches back at most over about the last tenth of the run.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.config import PathText, settings
from smalti.data.images.image_set import ImageSet
from smalti.data.order_files import TrainingOrders, check_order
from smalti.data.signals.signal_set import SignalSet
from smalti.data.views import CentreCrop, ViewMaker, Views
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
"""Stream of the random number behind a batch's rate."""


@settings
class CViTConfig(MethodConfig):
    """Settings of CViT; crops and mixing are not among them, since an order is of the whole central square."""

    name: str = "cvit"
    num_classes: int | None = None
    """K; None: as many as the data has."""
    order: str = "collapse"
    """Which patches stay: collapse, random (drawn anew for each image and step), fixed_random, halton, variance ..."""
    orders: PathText | None = None
    """The file of ``smalti rank`` with the orders of the training images, for those that a network has found."""
    max_rate: float = 0.99
    """Largest share of patches that is dropped, below 1; 0: a plain ViT on whole images."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes, in [0, 1)."""
    flip_prob: float = 0.5
    """Share of views that are mirrored left to right; orders of mirrored images are needed then."""
    ema: float = 0.9999
    """Highest momentum of the average of weights, which is what is handed on."""


def drop_rate(uniform: float, max_rate: float) -> float:
    """The share m of patches that a batch goes without, low ones more often; its mean is 0.36 ``max_rate``.

    Args:
        uniform: u, in [0, 1).
        max_rate: reached at u = 1.
    """
    return max_rate * (1 - math.cos(math.pi * uniform / 2))


class Classifier(nn.Module):
    """An encoder and a linear layer on the vector that stands for an image."""

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, images: Float[Tensor, "B C H W"], ids_keep: Int[Tensor, "B k"] | None = None
    ) -> Float[Tensor, "B K"]:
        """Class scores of normalised images, by the kept patches; their order in ``ids_keep`` does not matter."""
        return self.head(self.encoder.image_features(images, ids_keep))


@register("cvit")
class CViT(EncoderMethod):
    """Drop the last patches of an order, a new share of them in each batch, and tell the class by the rest."""

    Config = CViTConfig
    title = "supervised classification from the first patches of an order; requires labels"
    paper = "Guo et al. 2025, arXiv:2511.22281"
    pools_images = True
    needs_labels = True
    export_network = "teacher"
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
        for name in ("max_rate", "label_smoothing"):
            if not 0 <= getattr(config, name) < 1:
                raise ConfigError(f"method.{name}={getattr(config, name)}: a share in 0..1 (1 excluded) is needed")
        if not 0 <= config.flip_prob <= 1:
            raise ConfigError(f"method.flip_prob={config.flip_prob}: a share in 0..1 is needed")
        check_order(config.order)
        # a plain ViT keeps all patches and has no use for a file
        self.orders = TrainingOrders(config.order, config.orders) if config.max_rate > 0 else None
        self.student = Classifier(encoder, config.num_classes)
        self.teacher = Average(self.student, config.ema)
        self.classes: tuple[str, ...] = ()

    def make_views(self, image_size: int) -> ViewMaker:
        """The central square, mirrored or not."""
        return CentreCrop(image_size, self.config.flip_prob)

    def bind(self, images: ImageSet | SignalSet, image_size: int) -> None:
        """Read the orders of the images.

        Raises:
            DataError, ShapeError: if the file is about others, or lacks a flip state.
        """
        if isinstance(images, SignalSet):
            raise DataError("cvit learns from images, these are signals")
        self.classes = images.classes or ()
        if self.orders is not None:
            grid = self.student.encoder.check_size(image_size, image_size)
            self.orders.bind(images, grid, self.config.flip_prob > 0)

    def orders_of(self, views: Views, grid: tuple[int, int]) -> Int[Tensor, "B N"]:
        """The order of each image's patches.

        Raises:
            ShapeError: if those that were read are of another grid.
        """
        assert self.orders is not None, "a plain ViT keeps all patches"
        if self.orders.name == "variance":
            pixels = views.global_crops
            return descending(patch_variance(pixels.float(), self.student.encoder.patch_size))
        return self.orders.of(views, grid)

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """``{"class": ...}``."""
        labels = views.labels
        assert labels is not None, "the run has seen to it that there are labels"
        encoder = self.student.encoder
        images = encoder.normalize(views.global_crops)
        grid = encoder.check_size(images.shape[-2], images.shape[-1])
        num_patches = grid[0] * grid[1]
        # one rate for the batch, or its images would not make a rectangle; from the key of its first image
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
        """The average takes in the new weights."""
        self.teacher.follow(self.student)

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """The uniform guess of the class."""
        return uniform_guess(row, "class", self.config.num_classes or 0, "classes")

    def networks(self) -> dict[str, Encoder]:
        """The trained network, and the average of its weights, which is handed on."""
        return {"student": self.student.encoder, "teacher": self.teacher.module.encoder}

    def class_head(self, network: str) -> ClassHead:
        """The linear layer of either network, and by which patches it learned."""
        head = (self.student if network == "student" else self.teacher.module).head
        order = "" if self.orders is None else self.orders.name
        return ClassHead(head.weight, head.bias, self.classes, order, self.config.orders or "")
