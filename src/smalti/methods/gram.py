"""Gram anchoring: similarities among the patches of an image stay those of the frozen weights a run began from.

Paper: Siméoni et al., DINOv3, 2025, arXiv:2508.10104; the formula is that of the released code.
Letters: M crops, N patches, D embed_dim.
Differs from the code: the anchor is the start of the run, not a teacher of an earlier iteration, and it is never
refreshed; it sees the student's crops at their own size, not clean ones of twice the size; per crop only, all patches,
negative similarities kept.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

from smalti.charts import LogColumn
from smalti.errors import ConfigError
from smalti.functional.precision import at_least_float32
from smalti.methods.teacher import Teacher
from smalti.models.encoder import Encoder

GRAM = "gram"
"""Name of the loss term, and of the student's tokens for it."""
GRAM_COLUMNS = {
    "gram_distance": LogColumn(
        "Change of similarities",
        "Root mean square change of the cosines among patches of a crop since the start of the run.",
    )
}


def gram_loss(student: Float[Tensor, "*M N D"], anchor: Float[Tensor, "*M N D"]) -> Float[Tensor, ""]:
    """Mean squared difference of cosines over all pairs of patches of a crop: computed in float32.

    Args:
        student: patch tokens.
        anchor: those of the anchor, without gradient.

    Source: DINOv3, arXiv:2508.10104, Sec. 4.2; the mean over the N^2 pairs is the code's (the paper's norm is a sum).
    """
    with torch.autocast(student.device.type, enabled=False):
        x, y = (F.normalize(at_least_float32(tokens), dim=-1) for tokens in (student, anchor))
        return (x @ x.mT - y @ y.mT).square().mean()


class GramAnchor(Teacher[Encoder]):
    """A frozen copy of the pretrained encoder that a run starts from; it is saved with checkpoints.

    Args:
        encoder: copied.

    Raises:
        ConfigError: for an encoder with random weights.
    """

    def __init__(self, encoder: Encoder) -> None:
        if not encoder.pretrained:
            raise ConfigError(
                "method.gram_weight keeps the similarities of trained weights; name these with --init, or leave it out"
            )
        super().__init__(encoder)

    @torch.no_grad()
    def forward(self, images: Num[Tensor, "M C H W"]) -> Float[Tensor, "M N D"]:
        """Patch tokens of crops, not normalised."""
        return self.module.encode(self.module.normalize(images)).patches
