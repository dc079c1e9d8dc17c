"""DINO: self-distillation with no labels.

Paper: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021, arXiv:2104.14294v2; equation
numbers are those of v2.
Letters: B images, G global views, V all views (the global ones first), K prototypes.
Differs from the paper: the loss is the mean over pairs of views, where Eq. (3) sums, so the number of crops does not
scale it; the defaults of ``num_prototypes`` and ``num_local_views`` suit tens of thousands of images on one device (the
field docs and the recipe have the paper's values); "epochs" are fractions of training.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import Count, Few, settings
from smalti.data.crops import MultiCrop
from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.functional.precision import at_least_float32
from smalti.layers.heads import ProjectionHead, Prototypes
from smalti.methods.base import EncoderMethod, Reference, register, same_for_all
from smalti.methods.gram import GRAM, GRAM_COLUMNS, GramAnchor, gram_loss
from smalti.methods.self_distillation import (
    STUDENT_TEMP,
    SelfDistillationConfig,
    init_weights,
    multi_crop,
    resample_as_released,
    warmed_up,
)
from smalti.methods.teacher import Teacher, cosine_momentum
from smalti.models.encoder import Encoder


@settings
class DINOConfig(SelfDistillationConfig):
    """Settings of DINO."""

    name: str = "dino"
    num_prototypes: Count = 4096
    """K; the paper's is 65536, for a million images."""
    norm_last_layer: bool = True
    """Fix the gain of each prototype at 1."""
    teacher_temp: float = 0.04
    """tau_t in Eq. (1), after warm-up."""
    num_local_views: Few = 6
    """Local views per image; the paper's ViT runs use 8 or 10."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Area of a global view, as a fraction of the image."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Area of a local view, as a fraction of the image."""


def cross_view_entropy(
    teacher: Float[Tensor, "G B K"],
    student: Float[Tensor, "V B K"],
    center: Float[Tensor, " K"],
    student_temp: float,
    teacher_temp: float,
) -> Float[Tensor, ""]:
    """Mean of H(P_t(x), P_s(x')) over all pairs of different views: Eq. (3).

    Args:
        teacher: ``(G, B, K)`` logits, without gradient.
        student: ``(V, B, K)`` logits, the first G of the same views.
        center: ``(K,)`` subtracted from the teacher's logits.
        student_temp: tau_s > 0.
        teacher_temp: tau_t > 0.
    """
    target = F.softmax((at_least_float32(teacher) - center) / teacher_temp, dim=-1)  # Eq. (1), centred
    log_pred = F.log_softmax(at_least_float32(student) / student_temp, dim=-1)  # Eq. (1)
    with torch.autocast(target.device.type, enabled=False):  # bf16 has two digits, and K may be 65536
        per_pair = -torch.einsum("gbk,vbk->gvb", target, log_pred).mean(dim=-1)  # Eq. (2), (G, V)
    different = ~torch.eye(*per_pair.shape, dtype=torch.bool, device=per_pair.device)
    return (per_pair * different).sum() / different.sum()


class EncoderWithHead(nn.Module):
    """An encoder, a projection head and prototypes: the network ``g = h . f`` of Sec. 3.1."""

    def __init__(self, encoder: Encoder, config: DINOConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = ProjectionHead(encoder.embed_dim, config.hidden_dim, config.bottleneck_dim)
        self.prototypes = Prototypes(config.bottleneck_dim, config.num_prototypes, not config.norm_last_layer)

    def forward(self, crops: tuple[Tensor, ...]) -> tuple[Float[Tensor, "VB K"], Float[Tensor, "GB N D"]]:
        """Logits of all views, view-major, and patch tokens of the global ones; one pass of the encoder per crop size,
        one of the head."""
        features = [self.encoder.encode(self.encoder.normalize(images)) for images in crops]
        tokens = torch.cat([self.encoder.pooled(one) for one in features])
        return self.prototypes(self.head(tokens)), features[0].patches


@register("dino")
class DINO(EncoderMethod):
    """A student predicts, from any crop, the output of its moving average on the large crops."""

    Config = DINOConfig
    title = "self-distillation of the class token across multi-crop views"
    paper = "Caron et al. 2021, arXiv:2104.14294v2"
    pools_images = True
    export_network = "teacher"
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        **GRAM_COLUMNS,
        "target_entropy": LogColumn(
            "Entropy of targets", "Mean entropy of the teacher's outputs in nats; at 0 each picks one prototype."
        ),
        "prototype_usage_entropy": LogColumn(
            "Entropy of prototype usage",
            "Entropy of the mean teacher output in nats; at ln(prototypes) all are used equally, near 0 one is.",
        ),
    }
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "base_lr": 5e-4,
            "betas": [0.9, 0.999],
            "weight_decay": 0.04,
            "weight_decay_end": 0.4,
            "warmup_ratio": 0.1,
            "min_lr": 1e-6,
            "clip_norm": 3.0,
            "clip": "tensor",
        },
        "drop_path": 0.1,
    }
    posttrain_defaults: ClassVar[dict[str, Any]] = {  # ours: the paper trains from random weights only
        "optim": {"lr": 1e-5, "weight_decay_end": 0.04, "freeze_encoder_ratio": 0.1},
    }

    center: Tensor

    def __init__(self, encoder: Encoder, config: DINOConfig) -> None:
        super().__init__(encoder, config)
        if min(config.teacher_temp, config.warmup_teacher_temp) <= 0:
            raise ConfigError("method.teacher_temp and method.warmup_teacher_temp must be above 0")
        resample_as_released(encoder)
        self.student = EncoderWithHead(encoder, config)
        encoder.draw_class_token()
        init_weights(self.student, self.student.head, encoder, config)
        self.teacher: Teacher[EncoderWithHead] = Teacher(self.student)
        if config.gram_weight:
            self.gram = GramAnchor(encoder)
        self.register_buffer("center", torch.zeros(config.num_prototypes))
        self._teacher_sum: Tensor | None = None
        self._teacher_count = 0

    def make_views(self, image_size: int) -> MultiCrop:
        """Two global and several local views with colour jitter, blur and solarisation: Sec. 3.2, after BYOL."""
        return multi_crop(self.config, self.student.encoder, image_size)

    def teacher_temp(self, progress: float) -> float:
        """tau_t at a progress of training: linear warm-up, then constant."""
        config = self.config
        return warmed_up(config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_ratio, progress)

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss term ``dino``; with ``gram_weight`` also ``gram``."""
        batch = views.batch_size
        teacher, _ = self.teacher((views.global_crops,))
        student, patches = self.student(views.crops)
        teacher_temp = self.teacher_temp(progress)
        loss = cross_view_entropy(
            teacher.unflatten(0, (-1, batch)),
            student.unflatten(0, (-1, batch)),
            self.center,
            STUDENT_TEMP,
            teacher_temp,
        )
        with torch.no_grad():
            teacher = at_least_float32(teacher)
            self._teacher_sum = teacher.sum(0) + (0 if self._teacher_sum is None else self._teacher_sum)
            self._teacher_count += len(teacher)
            targets = F.softmax((teacher - self.center) / teacher_temp, dim=-1)
            self.observations = {
                "target_entropy": torch.special.entr(targets).sum(-1).mean(),
                "prototype_usage_entropy": torch.special.entr(targets.mean(0)).sum(),
            }
        if not self.config.gram_weight:
            return {"dino": loss}
        gram = gram_loss(patches, self.gram(views.global_crops))
        self.observations["gram_distance"] = gram.detach().sqrt()
        return {"dino": loss, GRAM: self.config.gram_weight * gram}

    def after_backward(self, progress: float) -> None:
        """Drop the prototypes' gradients at the start of training."""
        if progress < self.config.freeze_last_layer_ratio:
            for parameter in self.student.prototypes.parameters():
                parameter.grad = None

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Update the center, Eq. (4), over all processes, and the teacher, Sec. 3.1 "Teacher network"."""
        assert self._teacher_sum is not None, "after_step without a forward"
        mean = self._teacher_sum / self._teacher_count
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        self.center.lerp_(mean, 1 - self.config.center_momentum)
        self._teacher_sum, self._teacher_count = None, 0
        self.teacher.update(self.student, cosine_momentum(self.config.momentum, progress))

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """The best distribution that is the same for all images."""
        return same_for_all(row, "dino", "prototype_usage_entropy")

    def networks(self) -> dict[str, Encoder]:
        """Both encoders; the teacher is better (Fig. 6) and is exported."""
        return {"student": self.student.encoder, "teacher": self.teacher.module.encoder}
