"""iBOT: self-distillation of the class token and of masked patch tokens.

Paper: Zhou et al., "iBOT: Image BERT pre-training with online tokenizer", 2021, arXiv:2111.07832v3; numbers that the
paper leaves open are those of the released code and its published recipe.
Letters: B images, G = 2 global views, M = G B global crops (view-major), V all views, N patches of a global crop, K
prototypes, E width of the head's bottleneck, S tokens whose output is needed.
Differs from the code: student and teacher have the same head, shared or not (there the defaults differ between them);
temperatures change per step, not per epoch; "epochs" are fractions of training; the image loss is the mean over all
pairs of views, as there; the center of patches is that of the head's output on all patches, computed from the mean
bottleneck vector (the prototypes are linear).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from smalti.charts import LogColumn
from smalti.config import Ratio, settings
from smalti.data.crops import MultiCrop
from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.functional.distillation import distill
from smalti.functional.masking import block_mask
from smalti.functional.precision import at_least_float32
from smalti.functional.processes import sum_over_processes
from smalti.functional.random import sample_uniform
from smalti.functional.transfer import move
from smalti.functional.transport import sinkhorn_offsets
from smalti.layers.last_block import Chosen
from smalti.methods.base import EncoderMethod, Reference, register, same_for_all
from smalti.methods.gram import GRAM, GRAM_COLUMNS, GramAnchor, gram_loss
from smalti.methods.masked_tokens import (
    IMAGE,
    PATCH,
    MaskedNetwork,
    MaskPlan,
    Reading,
    crop_keys,
    other_views,
    token_weights,
)
from smalti.methods.self_distillation import (
    STUDENT_TEMP,
    SelfDistillationConfig,
    entropy_columns,
    init_weights,
    multi_crop,
    resample_as_released,
    warmed_up,
)
from smalti.methods.teacher import Teacher, cosine_momentum
from smalti.models.encoder import Encoder

RATIO_STREAM, BLOCK_STREAM = 1, 10_000
SINKHORN_ITERATIONS = 3


@settings
class IBOTConfig(SelfDistillationConfig):
    """Settings of iBOT."""

    name: str = "ibot"
    separate_heads: bool = False
    """Use a separate head for patches; otherwise image and patches share one."""
    targets: Literal["centering", "sinkhorn"] = "centering"
    """Collapse prevention: DINO's centering, or Sinkhorn-Knopp over the batch of all processes."""
    patch_teacher_temp: float = 0.07
    """Temperature of the teacher's softmax on patches, after warm-up."""
    warmup_patch_teacher_temp: float = 0.04
    """Teacher temperature on patches at the start."""
    mask_sample_prob: Ratio = 0.5
    """Probability that a global crop is masked."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest fraction of masked patches in a masked crop; the sampler may mask fewer."""
    gray_prob: Ratio = 0.2
    """Probability that a view is greyscale."""
    blur_prob: tuple[Ratio, Ratio, Ratio] = (1.0, 0.1, 0.5)
    """Probabilities of blur: first global view, second, local views."""
    solarize_prob: Ratio = 0.2
    """Probability that the second global view is solarised."""


@register("ibot")
class IBOT(EncoderMethod):
    """A student matches a teacher on the image token across crops, and on masked patches within a crop.

    Variants override :meth:`make_network` and its ``embed`` (input tokens), ``token_heads`` (predictions from patch
    tokens, one loss term each), :meth:`draw_masks`, :meth:`compared` (tokens in the loss), :meth:`view_boxes` and
    :meth:`regularizers`.
    """

    Config = IBOTConfig
    title = "self-distillation of the class token and of masked patch tokens"
    paper = "Zhou et al. 2021, arXiv:2111.07832v3"
    pools_images = True
    export_network = "teacher"
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        f"{head}_{name}": column for head in (IMAGE, PATCH) for name, column in entropy_columns(head).items()
    } | GRAM_COLUMNS
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
    token_heads: tuple[str, ...] = (PATCH,)
    """Predictions from patch tokens: names of heads, masks and loss terms."""
    draws_class_token: ClassVar[bool] = True
    """Initialise the class token as the code of DINO and iBOT, or as timm."""
    centers_all_patches: ClassVar[bool] = True
    """With ``targets=centering``: the center of patches averages all patches of global views, or the masked ones."""

    def __init__(self, encoder: Encoder, config: IBOTConfig) -> None:
        super().__init__(encoder, config)
        _check(config, encoder)
        resample_as_released(encoder)
        self.student = self.make_network(encoder)
        self._draw_weights()
        self.teacher: Teacher[MaskedNetwork] = Teacher(self.student)
        if config.gram_weight:
            self.gram = GramAnchor(encoder)
        if config.targets == "centering":
            for name in (IMAGE, *self.token_heads):
                self.register_buffer(f"{name}_center", torch.zeros(config.num_prototypes))
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def make_network(self, encoder: Encoder) -> MaskedNetwork:
        """The student; the teacher is a copy of it."""
        return MaskedNetwork(encoder, self.config, self.head_names)

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the heads: image tokens, and patch predictions where their heads are separate."""
        return (IMAGE, *self.token_heads) if self.config.separate_heads else (IMAGE,)

    def make_views(self, image_size: int) -> MultiCrop:
        """Two global and several local views with colour jitter, blur and solarisation, as in DINO."""
        config = self.config
        return multi_crop(
            config, self.student.encoder, image_size, config.gray_prob, self.blur_probs(), config.solarize_prob
        )

    def blur_probs(self) -> tuple[float, float, float]:
        """Probabilities of blur: first global view, second, local views."""
        return self.config.blur_prob

    def draw_masks(self, keys: Int[Tensor, " B"], grid: tuple[int, int]) -> dict[str, Bool[Tensor, "M N"]]:
        """Masks of the global crops, on the CPU; sampled for each crop independently.

        Args:
            keys: ``(B,)`` seeds of the images, on the CPU.
            grid: of a global crop.
        """
        smallest = (min(grid) // 3) ** 2
        counts = self.counts_each(keys, grid)
        return {PATCH: block_mask(crop_keys(keys), counts, grid, smallest=smallest, stream=BLOCK_STREAM)}

    def counts_each(self, keys: Int[Tensor, " B"], grid: tuple[int, int]) -> Int[Tensor, " M"]:
        """Number of patches to mask in each global crop, sampled independently; 0 in unmasked ones."""
        noise = sample_uniform(crop_keys(keys), 2, RATIO_STREAM)
        low, high = self.config.mask_ratio
        counts = ((low + (high - low) * noise[:, 1].double()) * grid[0] * grid[1]).long()
        return torch.where(noise[:, 0] < self.config.mask_sample_prob, counts, 0)

    def compared(self, masks: dict[str, Bool[Tensor, "M N"]]) -> dict[str, Bool[Tensor, "M N"]]:
        """Patch tokens in the loss of each of ``token_heads``: the masked ones."""
        return masks

    def view_boxes(self, views: Views) -> list[Tensor | None]:
        """Boxes that :meth:`MaskedNetwork.embed` gets, for each entry of ``views.crops``."""
        return [None] * len(views.crops)

    def regularizers(self, image_tokens: Float[Tensor, "M D"]) -> dict[str, Tensor]:
        """Further loss terms, computed from the student's image tokens of the global crops."""
        return {}

    def teacher_temp(self, name: str, progress: float) -> float:
        """The teacher's temperature at a progress of training: linear warm-up, then constant."""
        config = self.config
        first, last = config.warmup_patch_teacher_temp, config.patch_teacher_temp
        if name == IMAGE:
            first, last = config.warmup_teacher_temp, config.teacher_temp
        return warmed_up(first, last, config.warmup_teacher_temp_ratio, progress)

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss terms ``image`` and ``patch``; with ``gram_weight`` also ``gram``."""
        return self.losses(views, self.plan(views), progress)

    def plan(self, views: Views) -> MaskPlan:
        """Masks and compared tokens: sampled on the CPU, sent to the device of the crops without synchronisation."""
        encoder, device = self.student.encoder, views.global_crops.device
        masks = self.draw_masks(views.cpu_keys, encoder.check_size(*views.global_crops.shape[-2:]))
        compared = self.compared(masks)
        student = teacher = Reading.of(compared, encoder.num_prefix_tokens)
        compared_rows = {}
        if self.config.targets == "centering" and self.centers_all_patches:
            whole = {name: torch.ones_like(mask) for name, mask in compared.items()}
            teacher = Reading.of(whole, encoder.num_prefix_tokens)
            compared_rows = {name: mask.flatten().nonzero()[:, 0] for name, mask in compared.items()}
        if self.config.gram_weight:
            every = torch.ones_like(next(iter(compared.values())))
            student = Reading.of({**compared, GRAM: every}, encoder.num_prefix_tokens)
        return MaskPlan(
            masks={name: move(mask, device) for name, mask in masks.items()},
            student=student.to(device),
            teacher=teacher.to(device),
            compared_rows={name: move(rows, device) for name, rows in compared_rows.items()},
            weights={name: move(token_weights(mask), device) for name, mask in compared.items()},
        )

    def losses(self, views: Views, plan: MaskPlan, progress: float) -> dict[str, Tensor]:
        """The loss terms; nothing here waits for the device."""
        images, device, boxes = views.global_crops, views.global_crops.device, self.view_boxes(views)
        teacher = self._teacher_vectors(images, boxes[0], plan)
        student = plan.student.split(self.student(images, plan.masks, boxes[0], plan.student.chosen))
        patches = student.pop(GRAM, None)  # also of masked patches, as in DINOv3
        global_tokens = student[IMAGE]
        local_tokens = [
            self.student(crops, {}, box, Chosen.first(len(crops), device))
            for crops, box in zip(views.crops[1:], boxes[1:], strict=True)
        ]
        student[IMAGE] = torch.cat([global_tokens, *local_tokens])
        vectors = self.student.project(student)

        names = (IMAGE, *self.token_heads)
        prototypes = self.student.prototypes(names)
        with torch.no_grad():
            teacher_prototypes = self.teacher.module.prototypes(names)
        sources, image_weights = other_views(views.batch_size, sum(views.num_views), device)
        losses, self.observations = {}, {}
        for name in names:
            temp = self.teacher_temp(name, progress)
            with torch.no_grad():
                logits = F.linear(teacher[name], teacher_prototypes[name])
                offsets = self._offsets(name, logits, temp)
            found = distill(
                vectors[name],
                prototypes[name],
                logits,
                offsets,
                image_weights if name == IMAGE else plan.weights[name],
                student_temp=STUDENT_TEMP,
                teacher_temp=temp,
                sources=sources if name == IMAGE else None,
            )
            losses[name] = found.loss
            self.observations[f"{name}_target_entropy"] = found.target_entropy
            self.observations[f"{name}_usage_entropy"] = torch.special.entr(found.usage).sum()
        if patches is not None:
            anchor = self.gram(images)
            gram = gram_loss(patches.reshape(anchor.shape), anchor)
            self.observations["gram_distance"] = gram.detach().sqrt()
            losses[GRAM] = self.config.gram_weight * gram
        return losses | self.regularizers(global_tokens)

    def couplings(self) -> dict[str, bool]:
        """Sinkhorn-Knopp normalises over the tokens of a batch."""
        return {"Sinkhorn-Knopp": self.config.targets == "sinkhorn"}

    def after_backward(self, progress: float) -> None:
        """Drop the prototypes' gradients at the start of training."""
        if progress < self.config.freeze_last_layer_ratio:
            for name in self.student.heads:
                for parameter in self.student.head(name).prototypes.parameters():
                    parameter.grad = None

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Update centers by the mean over all processes, and the teacher."""
        for name, (total, count) in self._sums.items():
            total, count = sum_over_processes(total), sum_over_processes(count)
            center = getattr(self, f"{name}_center")
            moved = center.lerp(total / count.clamp(min=1), 1 - self.config.center_momentum)
            center.copy_(torch.where(count > 0, moved, center))  # unchanged if no process had such tokens
        self._sums = {}
        self.teacher.update(self.student, cosine_momentum(self.config.momentum, progress))

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """The best distribution of image tokens that is the same for all images."""
        return same_for_all(row, IMAGE, f"{IMAGE}_usage_entropy")

    def networks(self) -> dict[str, Encoder]:
        """Both encoders; the teacher is exported."""
        return {"student": self.student.encoder, "teacher": self.teacher.module.encoder}

    @torch.no_grad()
    def _teacher_vectors(
        self, images: Num[Tensor, "M C H W"], boxes: Float[Tensor, "M 4"] | None, plan: MaskPlan
    ) -> dict[str, Tensor]:
        """The teacher's bottleneck vectors of unmasked crops, by name; accumulates their sums for the centers."""
        network = self.teacher.module
        vectors = network.project(plan.teacher.split(self.teacher(images, {}, boxes, plan.teacher.chosen)))
        if self.config.targets == "centering":
            self._keep_sums(vectors, network.prototypes(tuple(vectors)))
        return vectors | {name: vectors[name][rows] for name, rows in plan.compared_rows.items()}

    def _keep_sums(self, vectors: dict[str, Tensor], prototypes: dict[str, Tensor]) -> None:
        """Accumulate sums of logits for the centers, from sums of vectors: prototypes are linear."""
        for name, rows in vectors.items():
            with torch.autocast(rows.device.type, enabled=False):
                total = at_least_float32(rows).sum(0) @ at_least_float32(prototypes[name]).T
            count = torch.full((), float(len(rows)), device=rows.device)
            before = self._sums.get(name)
            self._sums[name] = (total, count) if before is None else (before[0] + total, before[1] + count)

    def _offsets(self, name: str, logits: Float[Tensor, "S K"], temp: float) -> Float[Tensor, " K"]:
        """Offsets subtracted from the teacher's ``logits / temp``: the center, or Sinkhorn-Knopp's normalisation."""
        if self.config.targets == "centering":
            return at_least_float32(getattr(self, f"{name}_center")) / temp
        return sinkhorn_offsets(logits, temp, SINKHORN_ITERATIONS)

    @torch.no_grad()
    def _draw_weights(self) -> None:
        """Initial weights and positions that differ from timm's; a pretrained encoder keeps its own."""
        encoder = self.student.encoder
        if self.draws_class_token:
            encoder.draw_class_token()
        init_weights(self.student, self.student.heads, encoder, self.config)


def _check(config: IBOTConfig, encoder: Encoder) -> None:
    """Refuse settings that cannot be used."""
    if not encoder.has_class_token:
        raise ConfigError(f"{encoder.name} has no class token, which {config.name} trains; use another encoder")
    temps = (config.teacher_temp, config.warmup_teacher_temp)
    if min(*temps, config.patch_teacher_temp, config.warmup_patch_teacher_temp) <= 0:
        raise ConfigError("all teacher temperatures (method.*teacher_temp) must be above 0")
    low, high = config.mask_ratio
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"method.mask_ratio=({low:g}, {high:g}): 0 <= smallest <= largest <= 1 is needed")
