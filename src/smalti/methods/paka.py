"""PaKA: patch kernel alignment, post-training on which patches are similar to which.

Paper: Yeo, Jang & Kim, "Patch-Level Kernel Alignment for Dense Self-Supervised Learning", 2025, arXiv:2509.05606v2.
Letters: B images, G = 2 global views, L local views, A = L / G local views per global one, n cells (patches of a local
view), E width of the head's output.
The paper's text and code were not at hand: numbers are those of the re-implementation in lightly-train, which names the
paper as their source, or ours; ``docs/methods/paka.md`` says which. Ours: the loss is this term alone; each kernel is
divided by its own norm (no lower bound on it); optimiser and teacher momentum are NeCo's.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import Few, ImageSize, Positive, Ratio, Width, settings
from smalti.data.crops import Box, MultiCrop, ViewSpec, random_resized_crop
from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.functional.boxes import in_view, roi_align
from smalti.functional.kernels import centred_kernel, kernel_alignment, kernel_rank
from smalti.functional.precision import at_least_float32
from smalti.layers.heads import ProjectionHead
from smalti.methods.base import EncoderMethod, MethodConfig, register
from smalti.methods.self_distillation import color_jitter
from smalti.methods.teacher import Teacher, cosine_momentum
from smalti.models.encoder import Encoder

NUM_GLOBAL = 2
GLOBAL_SCALE = (0.25, 1.0)
"""Area of a global view, as a fraction of the image."""
LEAST_CELLS = 4
"""Fewer cells have no unbiased alignment."""


@settings
class PaKAConfig(MethodConfig):
    """Settings of PaKA."""

    name: str = "paka"
    from_scratch: bool = False
    """Train from random weights, without ``init``. PaKA is made for pretrained encoders; this is the control."""
    estimator: Literal["biased", "unbiased"] = "biased"
    """Alignment of kernels: the usual one, or one without the diagonals, whose value for unrelated tokens is 0 (the
    usual one is high there when E is larger than n)."""
    num_local_views: Few = 8
    """L, the student's views; even, half of them in each global view."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Area of a local view, as a fraction of its global view."""
    local_size: ImageSize | None = None
    """Pixels of a local view. None: 98, or seven sixteenths of the global views' size where that is less, rounded down
    to a multiple of the patch size; at least two patches."""
    clean_teacher: bool = True
    """The teacher's views keep their colours; otherwise they get the student's jitter and blur."""
    normalize: bool = True
    """Unit vectors: cosines of cells; otherwise cells of large norm dominate the kernel."""
    hidden_dim: Width = 2048
    """Width of the head's hidden layers."""
    out_dim: Width = 256
    """E."""
    momentum: Ratio = 0.9995
    """Teacher momentum at the start; it rises to 1 along a half cosine."""
    head_lr_scale: Positive = 10.0
    """Learning rate of the head relative to the encoder's."""


class NestedCrops(MultiCrop):
    """Random global views, and local views inside them: local view l in global view l mod G.

    Args:
        specs: the global views, then the local ones, whose ``scale`` is a fraction of their global view.
    """

    def __init__(self, specs: Sequence[ViewSpec]) -> None:
        super().__init__(specs)

    def draw_boxes(self, rng: np.random.Generator, height: int, width: int) -> list[Box]:
        """Boxes of the global views, then of the local ones."""
        outer, inner = self.specs
        boxes = [random_resized_crop(rng, height, width, outer.scale, outer.aspect) for _ in range(outer.count)]
        for place in range(inner.count):
            top, left, high, wide = boxes[place % outer.count]
            y, x, h, w = random_resized_crop(rng, high, wide, inner.scale, inner.aspect)
            boxes.append((top + y, left + x, h, w))
        return boxes


class EncoderWithCellHead(nn.Module):
    """An encoder and a projection head on the cells of its feature maps."""

    def __init__(self, encoder: Encoder, config: PaKAConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = ProjectionHead(encoder.embed_dim, config.hidden_dim, config.out_dim)
        self.normalize = config.normalize

    def forward(
        self,
        crops: Num[Tensor, "VB C S S"],
        flips: Bool[Tensor, " VB"],
        boxes: Float[Tensor, "A VB 4"] | None = None,
        grid: int = 0,
    ) -> Float[Tensor, "*A VB n E"]:
        """Vectors of cells, in the orientation of the image.

        Args:
            crops: views of one size, not normalised.
            flips: True where a view is mirrored.
            boxes: ``(A, VB, 4)`` parts of each view in fractions of it, pooled by RoI-Align; None: all patches.
            grid: cells of a part along each side.
        """
        features = self.encoder.encode(self.encoder.normalize(crops))
        maps = features.patches.reshape(len(crops), *features.grid, -1)  # (VB, h, w, D)
        maps = torch.where(flips[:, None, None, None], maps.flip(2), maps)
        if boxes is None:
            cells = maps.flatten(1, 2)
        else:
            with torch.autocast(maps.device.type, enabled=False):
                side = features.grid[0]  # views and patches are square
                cells = roi_align(at_least_float32(maps), boxes * side, grid).flatten(2, 3)
        vectors = self.head.mlp(cells)
        return F.normalize(vectors, dim=-1) if self.normalize else vectors


def alignment_loss(
    student: Float[Tensor, "*B n E"], teacher: Float[Tensor, "*B n E"], unbiased: bool = False
) -> Float[Tensor, "*B"]:
    """``1 - CKA`` of the kernels of cells; 0 without gradient where all cells of one side are equal.

    Args:
        student: cells of the student, in float32 or float64 outside autocast.
        teacher: the same cells of the teacher, without gradient.
        unbiased: estimate without the diagonals, see :func:`~smalti.functional.kernels.centred_kernel`.

    Source: arXiv:2509.05606v2; the linear kernel.
    """
    kernels = [centred_kernel(cells, unbiased) for cells in (student, teacher)]
    alignment, is_defined = kernel_alignment(*kernels)
    return is_defined - alignment


@register("paka")
class PaKA(EncoderMethod):
    """Match the student's kernel of a local view to the teacher's of the same part of a global view."""

    Config = PaKAConfig
    title = "post-training that aligns the kernels of patches between student and teacher"
    paper = "Yeo et al. 2025, arXiv:2509.05606v2"
    export_network = "student"
    is_posttraining = True
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        "unbiased_alignment": LogColumn(
            "Alignment of kernels", "Unbiased CKA of student and teacher: 0 for unrelated cells, 1 for equal kernels."
        ),
        "kernel_rank": LogColumn(
            "Rank of the teacher's kernel",
            "How many directions the teacher's cells of a part fill (participation ratio); near 1 they hardly differ.",
        ),
    }
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "lr": 1e-5,
            "min_lr": 0.0,
            "warmup_ratio": 0.1,
            "freeze_encoder_ratio": 0.05,
            "betas": [0.9, 0.999],
            "weight_decay": 0.04,
            "weight_decay_end": 0.5,
            "clip_norm": None,
        },
        "drop_path": 0.1,
    }

    def __init__(self, encoder: Encoder, config: PaKAConfig) -> None:
        super().__init__(encoder, config)
        if config.num_local_views < NUM_GLOBAL or config.num_local_views % NUM_GLOBAL:
            raise ConfigError(
                f"method.num_local_views={config.num_local_views}: an even number, at least {NUM_GLOBAL}, is needed"
            )
        if encoder.patch_size[0] != encoder.patch_size[1]:
            raise ConfigError(
                f"paka pools parts of an image to square grids of patches, but {encoder.name} has patches of "
                f"{encoder.patch_size[0]}x{encoder.patch_size[1]}; use another encoder"
            )
        self.student = EncoderWithCellHead(encoder, config)
        self.teacher: Teacher[EncoderWithCellHead] = Teacher(self.student)

    def make_views(self, image_size: int) -> NestedCrops:
        """Two global views for the teacher, local views inside them for the student, all randomly mirrored."""
        config, encoder = self.config, self.student.encoder
        patch = encoder.patch_size[0]
        local = config.local_size or max(2 * patch, min(98, image_size * 7 // 16) // patch * patch)
        encoder.check_size(image_size, image_size)
        h, w = encoder.check_size(local, local)
        if h * w < LEAST_CELLS:
            raise ConfigError(
                f"local views of {local} pixels hold {h * w} of the {LEAST_CELLS} patches that a kernel needs; "
                "raise method.local_size, or data.image_size"
            )
        color = color_jitter(1.0)
        clean = config.clean_teacher
        return NestedCrops(
            [
                ViewSpec(
                    count=NUM_GLOBAL,
                    size=image_size,
                    scale=GLOBAL_SCALE,
                    color=None if clean else color,
                    blur_prob=0.0 if clean else 0.5,
                ),
                ViewSpec(
                    count=config.num_local_views, size=local, scale=config.local_scale, color=color, blur_prob=0.5
                ),
            ]
        )

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss term ``paka``."""
        num_global = NUM_GLOBAL * views.batch_size
        outer, inner = views.boxes[:num_global], views.boxes[num_global:]
        parts = in_view(inner.reshape(-1, num_global, 4), outer, 1, 1)  # (A, G B, 4): fractions of the global view
        crops = views.crops[1]
        grid = crops.shape[-1] // self.student.encoder.patch_size[1]
        teacher = self.teacher(views.global_crops, views.flips[:num_global], parts, grid).flatten(0, 1)
        student = self.student(crops, views.flips[num_global:])
        with torch.autocast(crops.device.type, enabled=False):  # autocast would also make float32 kernels bfloat16
            student, teacher = at_least_float32(student), at_least_float32(teacher)
            with torch.no_grad():
                kernels = [centred_kernel(cells, unbiased=True) for cells in (student, teacher)]
                self.observations = {
                    "unbiased_alignment": kernel_alignment(*kernels)[0].mean(),
                    "kernel_rank": kernel_rank(centred_kernel(teacher)).mean(),
                }
            return {"paka": alignment_loss(student, teacher, self.config.estimator == "unbiased").mean()}

    def after_step(self, progress: float) -> None:
        """Update the teacher, head included."""
        self.teacher.update(self.student, cosine_momentum(self.config.momentum, progress))

    def networks(self) -> dict[str, Encoder]:
        """Both encoders; the student is exported, as in NeCo."""
        return {"student": self.student.encoder, "teacher": self.teacher.module.encoder}

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters of encoder and head, the head's with a larger learning rate; decay as in :class:`Method`."""
        head = set(self.student.head.parameters())
        groups = []
        for group in super().param_groups():
            for is_head, scale in ((False, 1.0), (True, self.config.head_lr_scale)):
                members = [parameter for parameter in group["params"] if (parameter in head) == is_head]
                groups.append({**group, "params": members, "lr_scale": scale})
        return groups
