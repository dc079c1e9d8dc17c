"""A ranker: a small network that predicts in one pass the patch order that an expensive teacher gives.

Not from a paper. Guo et al., "The Collapse of Patches", 2025, arXiv:2511.22281, find the order of an image's patches by
N passes of CoMAE and PageRank, which costs more than dropping patches saves. Here a vision transformer of a few blocks
reads the image once and regresses each patch's rank in such an order; the conditional mean of the rank is the best
prediction under Spearman's correlation. Any file of ``smalti rank`` can be the teacher.
What it can learn may be one order for all images: the log compares its error with that of the mean rank of each patch
position, and ``smalti rank RUN`` prints the correlation with the teacher beside that of the static order.
Letters: B images, N patches, D embed_dim.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.charts import LogColumn
from smalti.config import PathText, Ratio, settings
from smalti.data.crops import CentreCrop
from smalti.data.dataset import Dataset
from smalti.data.order_files import TrainingOrders
from smalti.data.views import ViewMaker, Views
from smalti.errors import ConfigError
from smalti.functional.graphs import descending, ranks_of
from smalti.functional.orders import rank_correlation
from smalti.functional.transfer import move
from smalti.methods.base import EncoderMethod, MethodConfig, Reference, register
from smalti.models.encoder import Encoder


@settings
class RankerConfig(MethodConfig):
    """Settings of ``ranker``. There are no random crops, since an order covers the whole central square."""

    name: str = "ranker"
    orders: PathText | None = None
    """File from ``smalti rank`` with the teacher's orders of the training images."""
    order: str = "collapse"
    """Name of the teacher's order in the file: collapse, coverage, in_strength, attention ..."""
    flip_prob: Ratio = 0.5
    """Probability of a horizontal flip, in 0..1; above 0, orders of flipped images are needed."""


def standardise(ranks: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N"]:
    """Regression target of each patch: minus its rank, with mean 0 and variance 1 over an image; higher is earlier.

    Args:
        ranks: 0..N-1, or means of them.
    """
    num = ranks.shape[-1]
    deviation = math.sqrt((num**2 - 1) / 12)  # of 0..N-1, each once
    return ((num - 1) / 2 - ranks) / max(deviation, 1e-6)


@register("ranker")
class DistilledRanker(EncoderMethod):
    """Regress the rank of each patch in a teacher's order from the patch tokens of a small encoder."""

    Config = RankerConfig
    title = "a small network that predicts a patch order in one pass; requires a file of orders"
    paper = "ours, after Guo et al. 2025, arXiv:2511.22281"
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        "spearman": LogColumn(
            "Agreement with the teacher",
            "Mean Spearman correlation of the predicted and the teacher's orders; at most 1.",
        ),
        "static_spearman": LogColumn(
            "Agreement of the static order",
            "The same for one order for all images, by the mean rank of each position; a ranker should exceed it.",
        ),
        "static_error": LogColumn(
            "Error of the static order",
            "Squared error of the mean rank of each position; the loss should fall below it.",
        ),
    }
    next_command = "smalti rank {run} --data IMAGES --out ORDERS"
    defaults: ClassVar[dict[str, Any]] = {
        "encoder": {"name": "vit_tiny_patch16_224", "embed_dim": 96, "depth": 2, "num_heads": 3},
        "optim": {"lr": 1e-3, "weight_decay": 0.05, "warmup_ratio": 0.05},
        "drop_path": 0.0,
    }

    def __init__(self, encoder: Encoder, config: RankerConfig) -> None:
        super().__init__(encoder, config)
        self.encoder = encoder
        if config.order in ("random", "variance"):
            raise ConfigError(f"method.order={config.order}: a ranker can learn nothing from it; choose another order")
        self.teacher = TrainingOrders(config.order, config.orders)
        self.head = nn.Linear(encoder.embed_dim, 1)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self._static = torch.zeros(0)  # in no buffer: it is about the data, not learned

    def make_views(self, image_size: int) -> ViewMaker:
        """The central square, flipped at random."""
        return CentreCrop(image_size, self.config.flip_prob)

    def bind(self, data: Dataset, image_size: int) -> None:
        """Read the teacher's orders.

        Raises:
            DataError, ShapeError: if the file belongs to other images, or lacks orders of flipped images.
        """
        self.teacher.bind(data, self.encoder.check_size(image_size, image_size), self.config.flip_prob > 0)

    def scores(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B N"]:
        """Score of each patch, higher comes earlier.

        Args:
            images: uint8, or normalised.
        """
        return self.head(self.encoder.encode(images).patches)[..., 0]

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss term ``rank``: mean squared error of the standardised rank."""
        images = self.encoder.normalize(views.global_crops)
        grid = self.encoder.check_size(images.shape[-2], images.shape[-1])
        orders = self.teacher.of(views, grid)
        targets = standardise(ranks_of(orders).float())
        scores = self.scores(images)
        with torch.no_grad():
            if not len(self._static):
                self._static = move(standardise(self.teacher.mean_ranks(grid)), targets.device)
            static = self._static.expand_as(targets)
            self.observations = {
                "spearman": rank_correlation(descending(scores.float()), orders).mean(),
                "static_spearman": rank_correlation(descending(static), orders).mean(),
                "static_error": F.mse_loss(static, targets),
            }
        return {"rank": F.mse_loss(scores.float(), targets)}

    def networks(self) -> dict[str, Encoder]:
        """The small encoder."""
        return {"encoder": self.encoder}

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """The error of the mean rank of each patch position; None if all images have the same order."""
        if not {"loss/rank", "static_error"} <= row.keys() or not row["static_error"] > 0:
            return None
        predictor = "the mean rank of each patch position"
        return Reference("the squared error of the rank", row["loss/rank"], row["static_error"], predictor)
