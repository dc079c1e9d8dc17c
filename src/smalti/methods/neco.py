"""NeCo: patch neighbour consistency, post-training on the order of nearest patches.

Paper: Pariza, Salehi, Burghouts, Locatello & Asano, "Near, far: Patch-ordering enhances vision foundation models' scene
understanding", ICLR 2025, arXiv:2408.11054v3; the numbers are those of the released code.
Letters: B images, G = 2 global views (first), V all views, P = G (V - 1) pairs of different views (g, v), g first,
n = k * k cells, R = n references per image, M candidate references, E width of the head's output.
Differs from the code: the teacher gets no gradient (there it flows, through references, into weights that no optimiser
updates); both heads start from the same weights (``head_init=independent`` is the code's way); the teacher is updated
after the optimiser's step, not before; the queue counts its tokens correctly and is saved, each image adds ten tokens
to it and samples its own references from it; references come from the batch of all processes; local views are a
multiple of the patch size; crops are bicubic; a crop without enough overlap is resampled at most 50 times.
Differs from the paper: as in the code, references are sampled per image, and may come from the image itself
(``exclude_self`` excludes it).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import Few, ImageSize, Ratio, Width, settings
from smalti.data.color import ColorConfig
from smalti.data.crops import Box, MultiCrop, ViewSpec, random_resized_crop
from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.functional.boxes import in_view, overlaps, roi_align
from smalti.functional.precision import at_least_float32
from smalti.functional.processes import of_all_processes
from smalti.functional.random import sample_uniform
from smalti.functional.sorting import check_backend, neco_loss
from smalti.functional.sorting_networks import network_layers
from smalti.layers.heads import ProjectionHead
from smalti.methods.base import EncoderMethod, MethodConfig, register
from smalti.methods.teacher import Teacher, cosine_momentum
from smalti.models.encoder import Encoder

NUM_GLOBAL = 2
GLOBAL_SCALE, LOCAL_SCALE = (0.25, 1.0), (0.05, 0.25)
"""Areas of global and local views, as fractions of the image."""
MIN_OVERLAP = 0.01
"""Smallest overlap of a view with each global one, as a fraction of the image; twice that between global views."""
QUEUE_SIZE = 8192
"""Tokens in the queue of each global view."""
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.05
"""Temperatures of the ablation without sorting; ours."""
_MAX_CROP_TRIES = 50
_PUSHED = 10  # tokens per global view that enter the queue


@settings
class NeCoConfig(MethodConfig):
    """Settings of NeCo."""

    name: str = "neco"
    from_scratch: bool = False
    """Train from random weights, without ``init``. NeCo is made for pretrained encoders; this is the control."""
    roi_size: Few = 7
    """k: the overlap of two views is pooled to k x k cells in both."""
    network: Literal["bitonic", "odd_even", "none"] = "bitonic"
    """Sorting network. ``odd_even`` is the paper's other one; ``none`` replaces sorting by the cross-entropy of two
    softmaxes over the references, to test whether sorting matters."""
    sorter: Literal["torch", "triton"] = "torch"
    """Implementation: tensor operations, or a Triton kernel (GPU, ``network=bitonic``; its speed is not yet
    measured)."""
    steepness_student: float = 100.0
    """beta of the student's comparators; the paper's ablation varies it."""
    steepness_teacher: float = 100.0
    """beta of the teacher's comparators; the paper's ablation varies it."""
    references: Literal["batch", "queue"] = "batch"
    """Reference patches: the cells of the batch, each used once, or teacher tokens of this and earlier batches (the
    released DINOv2 configurations)."""
    exclude_self: bool = False
    """``references=batch``: no references from the image itself, as the paper describes it; needs two images per
    batch."""
    num_local_views: Few = 4
    """Local views per image."""
    local_size: ImageSize | None = None
    """Pixels of a local view. None: 98, or seven sixteenths of the global views' size where that is less, rounded down
    to a multiple of the patch size."""
    hidden_dim: Width = 2048
    """Width of the head's hidden layers."""
    out_dim: Width = 256
    """E."""
    head_init: Literal["copied", "independent"] = "copied"
    """Initial teacher head: the student's weights, or its own random ones (the released code's; kept for parity)."""
    momentum: Ratio = 0.9995
    """Teacher momentum at the start; it rises to 1 along a half cosine."""
    head_lr_scale: float = 10.0
    """Learning rate of the head relative to the encoder's."""


class OverlappingCrops(MultiCrop):
    """Random views that all overlap the global ones.

    Args:
        specs: as for :class:`~smalti.data.crops.MultiCrop`, the global one first.
        min_overlap: fraction of the image that a view shares with each global view, at least.
    """

    def __init__(self, specs: Sequence[ViewSpec], min_overlap: float) -> None:
        super().__init__(specs)
        self.min_overlap = min_overlap

    def draw_boxes(self, rng: np.random.Generator, height: int, width: int) -> list[Box]:
        """Boxes that overlap each global view by more than the minimum. After 50 tries, the one with the largest
        overlap; if that is none, it is centred on the intersection of the global views."""
        boxes: list[Box] = []
        needed = int(height * width * self.min_overlap)
        for spec in self.specs:
            for _ in range(spec.count):
                anchors = boxes[:NUM_GLOBAL]
                least = needed * (2 if len(boxes) == 1 else 1)
                best, largest = (0, 0, 0, 0), -1
                for _ in range(_MAX_CROP_TRIES if anchors else 1):
                    box = random_resized_crop(rng, height, width, spec.scale, spec.aspect)
                    common = min((_common_area(box, anchor) for anchor in anchors), default=height * width)
                    if common > largest:
                        best, largest = box, common
                    if common > least:
                        break
                if largest <= 0:
                    best = _centred_on_overlap(best, anchors, height, width)
                boxes.append(best)
        return boxes


def _common_area(one: Box, other: Box) -> int:
    height = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    width = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return max(height, 0) * max(width, 0)


def _centred_on_overlap(box: Box, anchors: Sequence[Box], height: int, width: int) -> Box:
    """The box, moved so that its centre is the centre of the anchors' intersection."""
    top, left = max(anchor[0] for anchor in anchors), max(anchor[1] for anchor in anchors)
    bottom, right = (min(anchor[i] + anchor[i + 2] for anchor in anchors) for i in (0, 1))
    y, x = (top + bottom - box[2]) // 2, (left + right - box[3]) // 2
    return min(max(y, 0), height - box[2]), min(max(x, 0), width - box[3]), box[2], box[3]


class EncoderWithPatchHead(nn.Module):
    """An encoder and a projection head on its patch tokens; the outputs are unit vectors of width E."""

    def __init__(self, encoder: Encoder, config: NeCoConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = ProjectionHead(encoder.embed_dim, config.hidden_dim, config.out_dim)

    def forward(self, crops: tuple[Tensor, ...]) -> list[Tensor]:
        """Feature maps of all views, view-major, ``(VB, h, w, E)`` per crop size."""
        maps = []
        for images in crops:
            features = self.encoder.encode(self.encoder.normalize(images))
            vectors: Tensor = self.head(features.patches)
            maps.append(vectors.reshape(len(vectors), *features.grid, -1))
        return maps


def overlap_cells(
    maps: Float[Tensor, "VB h w E"], common: Float[Tensor, "A VB 4"], own: Float[Tensor, "VB 4"], out: int
) -> Float[Tensor, "A VB n E"]:
    """RoI-Align of the overlaps of views with A other views, to ``out * out`` cells.

    Args:
        maps: feature maps of the views.
        common: boxes of the overlaps, in pixels of the source image.
        own: boxes of the views, likewise.
        out: k.
    """
    height, width = maps.shape[1:3]
    return roi_align(maps, in_view(common, own, height, width), out).flatten(2, 3)


def different_pairs(x: Num[Tensor, "G V *S"]) -> Num[Tensor, "P *S"]:
    """The entries (g, v) with g != v, g first."""
    return torch.cat([part for g, row in enumerate(x) for part in (row[:g], row[g + 1 :])])


def draw_allowed(
    noise: Float[Tensor, "B P M"], allowed: Bool[Tensor, "#B #P M"], number: int
) -> Int[Tensor, "B P {number}"]:
    """Sample allowed indices without replacement; if there are too few of them, they repeat.

    Args:
        noise: uniform in 0..1.
        allowed: which of the M indices may be sampled; if none may, the result is arbitrary.
        number: how many to sample, at most M.
    """
    chosen = torch.where(allowed, noise, -1.0).topk(number, dim=-1).indices  # the allowed ones first
    count = allowed.sum(-1, keepdim=True).clamp(1, number)
    return chosen.gather(-1, (torch.arange(number, device=noise.device) % count).expand_as(chosen))


@register("neco")
class NeCo(EncoderMethod):
    """Match the student's order of reference patches to the teacher's, for each region that two views share."""

    Config = NeCoConfig
    title = "post-training that aligns the order of nearest patches between student and teacher"
    paper = "Pariza et al. 2025, arXiv:2408.11054v3"
    export_network = "student"
    is_posttraining = True
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        "teacher_agreement": LogColumn(
            "Agreement with the teacher", "Mean cosine between features of student and teacher; 1 is equal."
        ),
        "similarity_spread": LogColumn(
            "Spread of similarities",
            "Standard deviation of the teacher's similarities to the references; near 0 they define no order.",
        ),
    }
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "lr": 1e-5,
            "min_lr": 0.0,
            "warmup_ratio": 0.0,
            "betas": [0.9, 0.999],
            "weight_decay": 0.04,
            "weight_decay_end": 0.5,
            "clip_norm": None,
        },
        "drop_path": 0.1,
    }

    queue: Tensor
    """``(G, size, E)``, with ``references=queue``."""
    filled: Tensor
    """Number of valid tokens, which come first."""
    position: Tensor
    """Index of the next write."""

    def __init__(self, encoder: Encoder, config: NeCoConfig) -> None:
        super().__init__(encoder, config)
        _check(config, encoder)
        self.student = EncoderWithPatchHead(encoder, config)
        self.teacher: Teacher[EncoderWithPatchHead] = Teacher(self.student)
        if config.head_init == "independent":
            head = ProjectionHead(encoder.embed_dim, config.hidden_dim, config.out_dim)
            self.teacher.module.head = head.requires_grad_(False).eval()
        if config.references == "queue":
            self.register_buffer("queue", torch.zeros(NUM_GLOBAL, QUEUE_SIZE, config.out_dim))
            self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
            self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def make_views(self, image_size: int) -> MultiCrop:
        """Two global views and local views that overlap them; strong colour jitter, no flips."""
        config, patch = self.config, self.student.encoder.patch_size[0]
        color = ColorConfig(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_prob=0.8, gray_prob=0.2)
        local = config.local_size or max(patch, min(98, image_size * 7 // 16) // patch * patch)
        specs = []
        for count, size, scale in (
            (NUM_GLOBAL, image_size, GLOBAL_SCALE),
            (config.num_local_views, local, LOCAL_SCALE),
        ):
            if count:
                self.student.encoder.check_size(size, size)
            specs.append(ViewSpec(count=count, size=size, scale=scale, flip_prob=0.0, color=color, blur_prob=0.5))
        return OverlappingCrops(specs, MIN_OVERLAP)

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss term ``neco``."""
        config, batch = self.config, views.batch_size
        target_maps = self.teacher((views.global_crops,))[0]
        student_maps = self.student(views.crops)
        boxes = views.boxes.reshape(-1, batch, 4)  # (V, B, 4)
        common = overlaps(boxes, NUM_GLOBAL)
        with torch.autocast(boxes.device.type, enabled=False):
            # float32 from here on: similarities of neighbours differ in the third decimal
            target_maps = at_least_float32(target_maps)
            target = self._anchor_cells(target_maps, boxes, common)
            student = self._student_cells(student_maps, boxes, common)
            if config.references == "queue":
                if self.training:
                    self._push(target_maps, views.keys)
                references = self._from_queue(views.keys, boxes.shape[0] - 1)
            else:
                references = self._from_batch(target, views.keys)
            student_sims = (student @ references.mT).flatten(0, 2)  # cosines of unit vectors, (P B n, R)
            teacher_sims = (target @ references.mT).flatten(0, 2)
            self.observations = {
                "teacher_agreement": (student.detach() * target).sum(-1).mean(),
                "similarity_spread": teacher_sims.std(dim=1).mean(),
            }
            return {"neco": self.order_loss(student_sims, teacher_sims)}

    def couplings(self) -> dict[str, bool]:
        """Without a queue, the references are patches of the batch."""
        return {"references from the batch": self.config.references == "batch"}

    def order_loss(self, student_sims: Float[Tensor, "Q R"], teacher_sims: Float[Tensor, "Q R"]) -> Float[Tensor, ""]:
        """The loss of Sec. 3, or the ablation without sorting.

        Args:
            student_sims: similarities of each cell to its references.
            teacher_sims: likewise, without gradient.
        """
        config = self.config
        if config.network == "none":
            target = F.softmax(teacher_sims / TEACHER_TEMP, dim=1)
            return -(target * F.log_softmax(student_sims / STUDENT_TEMP, dim=1)).sum(1).mean()
        return neco_loss(
            student_sims,
            teacher_sims,
            config.network,
            config.steepness_student,
            config.steepness_teacher,
            backend=config.sorter,
        )

    def _anchor_cells(
        self, maps: Float[Tensor, "GB h w E"], boxes: Float[Tensor, "V B 4"], common: Float[Tensor, "G V B 4"]
    ) -> Float[Tensor, "P B n E"]:
        """For each pair, the teacher's cells of the overlap, from the global view."""
        num_views, batch = boxes.shape[:2]
        own = boxes[:NUM_GLOBAL].flatten(0, 1)
        cells = overlap_cells(maps, common.transpose(0, 1).flatten(1, 2), own, self.config.roi_size)  # (V, G B, n, E)
        cells = cells.reshape(num_views, NUM_GLOBAL, batch, *cells.shape[2:])
        return F.normalize(different_pairs(cells.transpose(0, 1)), dim=-1)  # means of unit vectors are shorter

    def _student_cells(
        self, maps: list[Tensor], boxes: Float[Tensor, "V B 4"], common: Float[Tensor, "G V B 4"]
    ) -> Float[Tensor, "P B n E"]:
        """For each pair, the student's cells of the overlap, from the other view."""
        batch, first, cells = boxes.shape[1], 0, []
        for one in maps:
            here = slice(first, first + len(one) // batch)
            first = here.stop
            cut = overlap_cells(
                at_least_float32(one), common[:, here].flatten(1, 2), boxes[here].flatten(0, 1), self.config.roi_size
            )
            cells.append(cut.reshape(NUM_GLOBAL, -1, batch, *cut.shape[2:]))  # (G, V_s, B, n, E)
        return F.normalize(different_pairs(torch.cat(cells, dim=1)), dim=-1)

    def _from_batch(self, cells: Float[Tensor, "P B n E"], keys: Int[Tensor, " B"]) -> Float[Tensor, "P B R E"]:
        """References from the teacher's cells of the same pair, of all processes' images.

        All cells in random order, R for each image; with ``exclude_self``, a separate sample for each image.
        """
        pairs, batch, number, width = cells.shape
        pool = of_all_processes(cells, 1)
        total = pool.shape[1]
        first = torch.distributed.get_rank() * batch if total > batch else 0  # index of this process's first image
        if not self.config.exclude_self:
            noise = sample_uniform(of_all_processes(keys, 0), pairs * number)
            noise = noise.reshape(total, pairs, number).transpose(0, 1).flatten(1)  # (P, B n)
            places = noise.argsort(dim=1, stable=True)[:, first * number : (first + batch) * number]
        else:
            if total < 2:
                raise ConfigError("method.exclude_self needs at least two images per batch; raise batch_size")
            image = torch.arange(total, device=keys.device)
            allowed = (image != first + image[:batch, None])[:, None, :, None].expand(-1, -1, -1, number)
            noise = sample_uniform(keys, pairs * total * number).reshape(batch, pairs, -1)
            places = draw_allowed(noise, allowed.flatten(2), number).transpose(0, 1).flatten(1)
        chosen = pool.flatten(1, 2).gather(1, places[..., None].expand(-1, -1, width))
        return chosen.reshape(cells.shape)

    def _from_queue(self, keys: Int[Tensor, " B"], num_others: int) -> Float[Tensor, "P B R E"]:
        """R different tokens from the queue of each pair's global view, sampled for each image."""
        (anchors, size, width), number = self.queue.shape, self.config.roi_size**2
        noise = sample_uniform(keys, anchors * num_others * size, stream=1).reshape(len(keys), -1, size)
        is_valid = torch.arange(size, device=keys.device) < self.filled
        places = draw_allowed(noise, is_valid[None, None], number).transpose(0, 1)  # (P, B, R)
        places = places.reshape(anchors, -1, 1).expand(-1, -1, width)
        return self.queue.gather(1, places).reshape(-1, len(keys), number, width)

    @torch.no_grad()
    def _push(self, maps: Float[Tensor, "GB h w E"], keys: Int[Tensor, " B"]) -> None:
        """Add tokens of each global view, of all processes, to its queue; they replace the oldest."""
        batch, size = len(keys), self.queue.shape[1]
        tokens = maps.flatten(1, 2).reshape(NUM_GLOBAL, batch, -1, maps.shape[-1])  # (G, B, N, E)
        count = min(_PUSHED, tokens.shape[2])
        noise = sample_uniform(keys, NUM_GLOBAL * tokens.shape[2], stream=2).reshape(batch, NUM_GLOBAL, -1)
        places = noise.topk(count, dim=2).indices.transpose(0, 1)[..., None].expand(-1, -1, -1, tokens.shape[3])
        pushed = of_all_processes(tokens.gather(2, places), 1).flatten(1, 2)[:, -size:]
        number = pushed.shape[1]
        self.queue[:, (self.position + torch.arange(number, device=keys.device)) % size] = pushed
        self.position.add_(number).remainder_(size)
        self.filled.add_(number).clamp_(max=size)

    def after_step(self, progress: float) -> None:
        """Update the teacher, head included."""
        self.teacher.update(self.student, cosine_momentum(self.config.momentum, progress))

    def networks(self) -> dict[str, Encoder]:
        """Both encoders; the published evaluations use the student."""
        return {"student": self.student.encoder, "teacher": self.teacher.module.encoder}

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters of encoder and head, the head's with a larger learning rate; decay as in :class:`Method`."""
        head = {id(parameter) for parameter in self.student.head.parameters()}
        groups = []
        for group in super().param_groups():
            for is_head, scale in ((False, 1.0), (True, self.config.head_lr_scale)):
                members = [parameter for parameter in group["params"] if (id(parameter) in head) == is_head]
                groups.append({**group, "params": members, "lr_scale": scale})
        return groups


def _check(config: NeCoConfig, encoder: Encoder) -> None:
    """Refuse settings that cannot be used."""
    size = config.roi_size**2
    if config.roi_size < 2:
        raise ConfigError(f"method.roi_size={config.roi_size}: sorting needs a grid of at least 2 x 2 cells")
    if config.network != "none":
        network_layers(config.network, size)  # refuses sizes that the network does not sort
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the method is not on its device yet
    check_backend(config.sorter, config.network, size, device)
    if min(config.steepness_student, config.steepness_teacher) <= 0:
        raise ConfigError("method.steepness_student and steepness_teacher must be above 0")
    if config.references == "queue":
        if size > QUEUE_SIZE:
            raise ConfigError(
                f"method.roi_size={config.roi_size}: an image needs {size} references, but the queue holds {QUEUE_SIZE}"
            )
        if config.exclude_self:
            raise ConfigError(
                "method.exclude_self needs method.references=batch: a queue does not record where its tokens come from"
            )
