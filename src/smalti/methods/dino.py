"""DINO: self-distillation with no labels.

Paper: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021, arXiv:2104.14294v2; equation
numbers are those of v2.
Letters: B images, G global views, V all views (the global ones first), K prototypes.
Differs from the paper: the mean over pairs of views, where Eq. (3) sums: crops do not scale the loss; the defaults of
``num_prototypes`` and ``num_local_views`` are for tens of thousands of images on one device (the paper's values stand
beside them and in the recipe); "epochs" are shares of training.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti.config import Count, Few, ImageSize, Width, settings
from smalti.data.views import ColorConfig, MultiCrop, Views, ViewSpec
from smalti.errors import ConfigError
from smalti.functional.positions import sincos_positions
from smalti.functional.precision import at_least_float32
from smalti.layers.heads import ProjectionHead, Prototypes
from smalti.methods.base import EncoderMethod, MethodConfig, Reference, register, same_for_all
from smalti.methods.teacher import Teacher, cosine_momentum
from smalti.models.encoder import Encoder


@settings
class DINOConfig(MethodConfig):
    """Settings of DINO."""

    name: str = "dino"
    num_prototypes: Count = 4096
    """K; the paper's is 65536, for a million images."""
    hidden_dim: Width = 2048
    """Width of the projection head's hidden layers."""
    bottleneck_dim: Width = 256
    """Width of the unit vectors in front of the prototypes."""
    norm_last_layer: bool = True
    """Keep the gain of each prototype at 1."""
    student_temp: float = 0.1
    """tau_s in Eq. (1)."""
    teacher_temp: float = 0.04
    """tau_t in Eq. (1), after warm-up."""
    warmup_teacher_temp: float = 0.04
    """tau_t at the start; it grows linearly to ``teacher_temp``."""
    warmup_teacher_temp_ratio: float = 0.3
    """Share of training over which it grows."""
    momentum: float = 0.996
    """Teacher momentum at the start; a half cosine takes it to 1."""
    center_momentum: float = 0.9
    """m in Eq. (4)."""
    freeze_last_layer_ratio: float = 0.01
    """Share of training in which the prototypes stay fixed (one epoch of a hundred)."""
    num_local_views: Few = 6
    """Local views an image; the paper's ViT runs use 8 or 10."""
    local_size: ImageSize | None = None
    """Pixels of a local view; None: three sevenths of the global views', to the next multiple of the patch."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Area of a global view, as a share of the image."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Area of a local view."""
    color_strength: float = 1.0
    """Factor of the colour jitter's four strengths (0.4, 0.4, 0.2, 0.1); short runs on few images want it mild."""
    linear_init: Literal["0.02", "fan_in"] = "0.02"
    """Standard deviation of linear layers at the start, heads included: 0.02, or 1 / sqrt(inputs) (patch embedding,
    too), without which networks narrower than a ViT-S learn little in a short run."""
    position_init: Literal["learned", "sincos"] = "learned"
    """Positions at the start, which are learned: as timm draws them, or sine-cosine, as large as embedded patches."""


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


def resample_as_released(encoder: Encoder) -> None:
    """Resample positions for local crops as the code of DINO, iBOT and DINOv2: bicubic without antialiasing, by the
    factor ``(n + 0.1) / m``. A pretrained encoder keeps the resampling that it was loaded with (``load.pos_*``)."""
    if not encoder.pretrained:
        encoder.set_pos_resampling(mode="bicubic", antialias=False, offset=0.1)


@torch.no_grad()
def draw_weights(network: nn.Module, heads: nn.Module, encoder: Encoder, linear_init: str, position_init: str) -> None:
    """Weights and positions at the start, where they aren't timm's; a pretrained encoder keeps its own.

    Args:
        network: encoder and heads.
        heads: alone.
        encoder: alone.
        linear_init: as in :class:`DINOConfig`.
        position_init: likewise.

    Raises:
        ConfigError: for ``position_init=sincos`` without positions.
    """
    if linear_init == "fan_in":
        for module in (heads if encoder.pretrained else network).modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    if position_init == "sincos" and not encoder.pretrained:
        table, grid = encoder.vit.pos_embed, encoder.check_size(*encoder.img_size)
        if table is None:
            raise ConfigError(f"method.position_init=sincos: {encoder.name} has no positions")
        like = encoder.vit.patch_embed.proj.weight.flatten(1).norm(dim=1).square().mean().sqrt()  # RMS of a patch
        positions = sincos_positions(encoder.embed_dim, grid)
        table[:, -len(positions) :] = positions * (like / positions.square().mean().sqrt())


def color_jitter(strength: float, gray_prob: float = 0.2) -> ColorConfig:
    """BYOL's colour jitter, each of its four strengths times ``strength``.

    Raises:
        ConfigError: for a negative strength.
    """
    if strength < 0:
        raise ConfigError(f"method.color_strength={strength}: a factor of at least 0 is needed")
    brightness, contrast, saturation, hue = (strength * full for full in (0.4, 0.4, 0.2, 0.1))
    return ColorConfig(
        brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, jitter_prob=0.8, gray_prob=gray_prob
    )


class EncoderWithHead(nn.Module):
    """An encoder, a projection head and prototypes: the network ``g = h . f`` of Sec. 3.1."""

    def __init__(self, encoder: Encoder, config: DINOConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = ProjectionHead(encoder.embed_dim, config.hidden_dim, config.bottleneck_dim)
        self.prototypes = Prototypes(config.bottleneck_dim, config.num_prototypes, not config.norm_last_layer)

    def forward(self, crops: tuple[Tensor, ...]) -> Float[Tensor, "VB K"]:
        """Logits of all views, view-major; one pass of the encoder per crop size, one of the head."""
        tokens = [self.encoder.image_features(self.encoder.normalize(images)) for images in crops]
        return self.prototypes(self.head(torch.cat(tokens)))


@register("dino")
class DINO(EncoderMethod):
    """A student matches, from any crop, what its moving average says of the large crops."""

    Config = DINOConfig
    title = "self-distillation of the class token across multi-crop views"
    paper = "Caron et al. 2021, arXiv:2104.14294v2"
    pools_images = True
    export_network = "teacher"
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
        if min(config.student_temp, config.teacher_temp, config.warmup_teacher_temp) <= 0:
            raise ConfigError("method.student_temp, teacher_temp and warmup_teacher_temp must be above 0")
        if not 0 <= config.momentum <= 1 or not 0 <= config.center_momentum <= 1:
            raise ConfigError("method.momentum and method.center_momentum must lie in 0..1")
        resample_as_released(encoder)
        self.student = EncoderWithHead(encoder, config)
        encoder.draw_class_token()
        draw_weights(self.student, self.student.head, encoder, config.linear_init, config.position_init)
        self.teacher: Teacher[EncoderWithHead] = Teacher(self.student)
        self.register_buffer("center", torch.zeros(config.num_prototypes))
        self._teacher_sum: Tensor | None = None
        self._teacher_count = 0

    def make_views(self, image_size: int) -> MultiCrop:
        """Two global and some local views with colour jitter, blur and solarisation: Sec. 3.2, after BYOL."""
        config, patch = self.config, self.student.encoder.patch_size[0]
        color = color_jitter(config.color_strength)
        views = [
            ViewSpec(
                count=2,
                size=image_size,
                scale=config.global_scale,
                flip_prob=0.5,
                color=color,
                blur_prob=(1.0, 0.1),
                solarize_prob=(0.0, 0.2),
            )
        ]
        if config.num_local_views:
            size = config.local_size or -(-image_size * 3 // 7 // patch) * patch
            self.student.encoder.check_size(size, size)
            views.append(
                ViewSpec(
                    count=config.num_local_views,
                    size=size,
                    scale=config.local_scale,
                    flip_prob=0.5,
                    color=color,
                    blur_prob=0.5,
                )
            )
        return MultiCrop(views)

    def teacher_temp(self, progress: float) -> float:
        """tau_t at this point of training: linear warm-up, then constant."""
        config = self.config
        share = min(progress / config.warmup_teacher_temp_ratio, 1.0) if config.warmup_teacher_temp_ratio else 1.0
        return config.warmup_teacher_temp + share * (config.teacher_temp - config.warmup_teacher_temp)

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """``{"dino": ...}``."""
        batch = views.batch_size
        teacher = self.teacher((views.global_crops,))
        student = self.student(views.crops)
        teacher_temp = self.teacher_temp(progress)
        loss = cross_view_entropy(
            teacher.unflatten(0, (-1, batch)),
            student.unflatten(0, (-1, batch)),
            self.center,
            self.config.student_temp,
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
        return {"dino": loss}

    def after_backward(self, progress: float) -> None:
        """The prototypes get no gradient in the first moments of training."""
        if progress < self.config.freeze_last_layer_ratio:
            for parameter in self.student.prototypes.parameters():
                parameter.grad = None

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Centre: Eq. (4), over all processes; teacher: Sec. 3.1 "Teacher network"."""
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
        """Both encoders; the teacher is the better one (Fig. 6) and is handed on."""
        return {"student": self.student.encoder, "teacher": self.teacher.module.encoder}
