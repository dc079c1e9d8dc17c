"""NeCo: patch neighbour consistency, post-training by the order of a patch's neighbours.

Paper: Pariza, Salehi, Burghouts, Locatello & Asano, "Near, far: Patch-ordering enhances vision foundation models' scene
understanding", ICLR 2025, arXiv:2408.11054v3; the numbers are those of the released code.
Letters: B images, G = 2 global views (first), V all views, P = G (V - 1) pairs of different views (g, v), g first,
n = k * k cells, R = n references an image, M places to draw references from, E width of the head's output.
Differs from the code: the teacher gets no gradient (there it flows, through references, into weights that nobody
trains); both heads start alike (``head_init=independent`` is the code's way); the teacher moves after the optimiser's
step, not before; the queue counts what it holds and is saved, each image gives it ten tokens and draws its own
references from it; references come from the batch of all processes together; masks choose references by the pair that
they belong to, and a pair without masked cells does not count; local views are a multiple of the patch; crops are
bicubic; a crop that doesn't meet the global ones is drawn at most 50 times.
Differs from the paper: as in the code, references belong to an image, and may come from it (``exclude_self``).
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from smalti.config import Count, Few, ImageSize, Width, settings
from smalti.data.views import Box, ColorConfig, MultiCrop, Views, ViewSpec, random_resized_crop
from smalti.errors import ConfigError
from smalti.functional.attention import foreground
from smalti.functional.boxes import in_view, overlaps, roi_align
from smalti.functional.precision import at_least_float32
from smalti.functional.processes import num_processes, of_all_processes
from smalti.functional.random import sample_uniform
from smalti.functional.sorting import check_backend, neco_loss
from smalti.functional.sorting_networks import network_layers
from smalti.layers.heads import ProjectionHead
from smalti.methods.base import EncoderMethod, MethodConfig, register
from smalti.methods.teacher import Teacher, cosine_momentum
from smalti.models.encoder import Encoder, PatchFeatures

NUM_GLOBAL = 2
_MOST_DRAWS = 50
_PUSHED = 10  # tokens that a global view gives to the queue
_ALL_OF_IT = 1 - 1e-4  # a cell is masked if its aligned mask is 1, but for rounding


@settings
class NeCoConfig(MethodConfig):
    """Settings of NeCo."""

    name: str = "neco"
    from_scratch: bool = False
    """Train from random weights, without ``init``. The method is made for encoders that are trained already."""
    roi_size: Few = 7
    """k: the overlap of two views is cut out of both on a grid of k x k cells."""
    network: Literal["bitonic", "odd_even", "none"] = "bitonic"
    """Sorting network; ``none`` is the ablation: cross-entropy of two softmaxes over the references."""
    sorter: Literal["torch", "triton"] = "torch"
    """The sort as tensor operations, or its matrices as a Triton kernel (GPU, ``network=bitonic``), whose speed is not
    yet measured."""
    steepness_student: float = 100.0
    """beta of the student's comparators."""
    steepness_teacher: float = 100.0
    """beta of the teacher's."""
    similarity: Literal["cosine", "euclidean"] = "cosine"
    """Of a cell to a reference: cosine, or the negative distance (the released code sorts the distance itself)."""
    references: Literal["batch", "queue"] = "batch"
    """Cells of the batch, each once, or teacher tokens of this and earlier batches."""
    queue_size: Count = 8192
    """Tokens in the queue of each global view."""
    exclude_self: bool = False
    """Take no references from the image that is compared (``references=batch``, at least two images)."""
    loss_mask: Literal["all", "fg", "bg"] = "all"
    """Compare all cells, or those of the foreground or background by the teacher's attention (``references=batch``)."""
    top_k: int | None = None
    """Only the teacher's so many nearest references count; None: all."""
    num_local_views: Few = 4
    """Local views an image."""
    local_size: ImageSize | None = None
    """Pixels of a local view; None: 98, or seven sixteenths of the global views' where that is less, down to a multiple
    of the patch."""
    global_scale: tuple[float, float] = (0.25, 1.0)
    """Area of a global view, as a share of the image."""
    local_scale: tuple[float, float] = (0.05, 0.25)
    """Area of a local view."""
    min_overlap: float = 0.01
    """Share of the image that a view has in common with each global one, at least; twice that between global ones."""
    hidden_dim: Width = 2048
    """Width of the head's hidden layers."""
    out_dim: Width = 256
    """E."""
    head_init: Literal["copied", "independent"] = "copied"
    """Whether the teacher's head starts as the student's or from a draw of its own."""
    momentum: float = 0.9995
    """Teacher momentum at the start; a half cosine takes it to 1."""
    head_lr_scale: float = 10.0
    """Learning rate of the head over that of the encoder."""
    student_temp: float = 0.1
    """Of the softmax over references, for ``network=none``."""
    teacher_temp: float = 0.05
    """Likewise."""


class OverlappingCrops(MultiCrop):
    """Views that all meet the global ones.

    Args:
        specs: as for :class:`~smalti.data.views.MultiCrop`, the global one first.
        min_overlap: share of the image.
    """

    def __init__(self, specs: Sequence[ViewSpec], min_overlap: float) -> None:
        super().__init__(specs)
        self.min_overlap = min_overlap

    def draw_boxes(self, rng: np.random.Generator, height: int, width: int) -> list[Box]:
        """Boxes with more in common with each global view than is asked for; after 50 draws the best of them, moved
        to the middle of what the global views share if it doesn't meet them at all."""
        boxes: list[Box] = []
        needed = int(height * width * self.min_overlap)
        for spec in self.specs:
            for _ in range(spec.count):
                anchors = boxes[:NUM_GLOBAL]
                least = needed * (2 if len(boxes) == 1 else 1)
                best, most = (0, 0, 0, 0), -1
                for _ in range(_MOST_DRAWS if anchors else 1):
                    box = random_resized_crop(rng, height, width, spec.scale, spec.aspect)
                    common = min((_common_area(box, anchor) for anchor in anchors), default=height * width)
                    if common > most:
                        best, most = box, common
                    if common > least:
                        break
                if most <= 0:
                    best = _moved_into(best, anchors, height, width)
                boxes.append(best)
        return boxes


def _common_area(one: Box, other: Box) -> int:
    height = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    width = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return max(height, 0) * max(width, 0)


def _moved_into(box: Box, anchors: Sequence[Box], height: int, width: int) -> Box:
    """The box with its middle on that of the part that all anchors have in common."""
    top, left = max(anchor[0] for anchor in anchors), max(anchor[1] for anchor in anchors)
    bottom, right = (min(anchor[i] + anchor[i + 2] for anchor in anchors) for i in (0, 1))
    y, x = (top + bottom - box[2]) // 2, (left + right - box[3]) // 2
    return min(max(y, 0), height - box[2]), min(max(x, 0), width - box[3]), box[2], box[3]


class EncoderWithHead(nn.Module):
    """Patch tokens of an encoder through a projection head: unit vectors of E."""

    def __init__(self, encoder: Encoder, config: NeCoConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = ProjectionHead(encoder.embed_dim, config.hidden_dim, config.out_dim)

    def forward(self, crops: tuple[Tensor, ...]) -> list[Tensor]:
        """Maps of all views, view-major, ``(VB, h, w, E)`` a size."""
        return [self.project(self.encoder.encode(self.encoder.normalize(images))) for images in crops]

    def project(self, features: PatchFeatures) -> Float[Tensor, "VB h w E"]:
        """Maps from what the encoder said."""
        vectors: Tensor = self.head(features.patches)
        return vectors.reshape(len(vectors), *features.grid, -1)


def overlap_cells(
    maps: Float[Tensor, "VB h w E"], common: Float[Tensor, "A VB 4"], own: Float[Tensor, "VB 4"], out: int
) -> Float[Tensor, "A VB n E"]:
    """What views show of their overlaps with A other views, in ``out * out`` cells.

    Args:
        maps: of the views.
        common: the overlaps, in pixels of the source image.
        own: the views' own boxes there.
        out: k.
    """
    height, width = maps.shape[1:3]
    return roi_align(maps, in_view(common, own, height, width), out).flatten(2, 3)


def different_pairs(x: Num[Tensor, "G V *S"]) -> Num[Tensor, "P *S"]:
    """The entries (g, v) with g != v, g first."""
    return torch.cat([part for g, row in enumerate(x) for part in (row[:g], row[g + 1 :])])


def similarities(
    cells: Float[Tensor, "P B n E"], references: Float[Tensor, "P B R E"], kind: str
) -> Float[Tensor, "P B n R"]:
    """Cosine of unit vectors, or their negative Euclidean distance."""
    if kind == "cosine":
        return cells @ references.mT
    return -torch.cdist(cells, references, compute_mode="donot_use_mm_for_euclid_dist")


def draw_allowed(
    noise: Float[Tensor, "B P M"], allowed: Bool[Tensor, "#B #P M"], number: int
) -> Int[Tensor, "B P {number}"]:
    """Places drawn at random, without replacement, among the allowed ones; where they are too few they serve again.

    Args:
        noise: uniform in 0..1.
        allowed: which of the M places can be drawn; where none can, the draw means nothing.
        number: to draw, at most M.
    """
    chosen = torch.where(allowed, noise, -1.0).topk(number, dim=-1).indices  # the allowed ones first
    count = allowed.sum(-1, keepdim=True).clamp(1, number)
    return chosen.gather(-1, (torch.arange(number, device=noise.device) % count).expand_as(chosen))


@register("neco")
class NeCo(EncoderMethod):
    """Student and teacher put the same references into the same order, seen from the same piece of the image."""

    Config = NeCoConfig
    title = "post-training that aligns the order of nearest patches between student and teacher"
    paper = "Pariza et al. 2025, arXiv:2408.11054v3"
    export_network = "student"
    is_posttraining = True
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
    """How many of its tokens are there: the first ones."""
    position: Tensor
    """Where the next one goes."""

    def __init__(self, encoder: Encoder, config: NeCoConfig) -> None:
        super().__init__(encoder, config)
        _check(config, encoder)
        self.student = EncoderWithHead(encoder, config)
        self.teacher: Teacher[EncoderWithHead] = Teacher(self.student)
        if config.head_init == "independent":
            head = ProjectionHead(encoder.embed_dim, config.hidden_dim, config.out_dim)
            self.teacher.module.head = head.requires_grad_(False).eval()
        if config.references == "queue":
            self.register_buffer("queue", torch.zeros(NUM_GLOBAL, config.queue_size, config.out_dim))
            self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
            self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def make_views(self, image_size: int) -> MultiCrop:
        """Two global and some local views that meet the global ones; strong colours, no flips."""
        config, patch = self.config, self.student.encoder.patch_size[0]
        color = ColorConfig(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_prob=0.8, gray_prob=0.2)
        local = config.local_size or max(patch, min(98, image_size * 7 // 16) // patch * patch)
        specs = []
        for count, size, scale in (
            (NUM_GLOBAL, image_size, config.global_scale),
            (config.num_local_views, local, config.local_scale),
        ):
            if count:
                self.student.encoder.check_size(size, size)
            specs.append(ViewSpec(count=count, size=size, scale=scale, flip_prob=0.0, color=color, blur_prob=0.5))
        return OverlappingCrops(specs, config.min_overlap)

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """``{"neco": ...}``."""
        config, batch = self.config, views.batch_size
        target_maps, is_masked = self._teacher_maps(views.global_crops)
        student_maps = self.student(views.crops)
        boxes = views.boxes.reshape(-1, batch, 4)  # (V, B, 4)
        common = overlaps(boxes, NUM_GLOBAL)
        with torch.autocast(boxes.device.type, enabled=False):
            # float32 from here on: similarities of neighbours differ in the third decimal; don't round them again
            target_maps = at_least_float32(target_maps)
            target = self._anchor_cells(target_maps, boxes, common)
            student = self._student_cells(student_maps, boxes, common)
            if config.references == "queue":
                if self.training:
                    self._push(target_maps, views.keys)
                mask, references = None, self._from_queue(views.keys, boxes.shape[0] - 1)
            else:
                mask = None if is_masked is None else self._anchor_mask(is_masked, boxes, common)
                references = self._from_batch(target, mask, views.keys)
            student_sims = similarities(student, references, config.similarity).flatten(0, 2)  # (P B n, R)
            teacher_sims = similarities(target, references, config.similarity).flatten(0, 2)
            self.observations = {
                "teacher_agreement": (student.detach() * target).sum(-1).mean(),
                "similarity_spread": teacher_sims.std(dim=1).mean(),
            }
            return {"neco": self.order_loss(student_sims, teacher_sims, None if mask is None else row_weights(mask))}

    def couplings(self) -> dict[str, bool]:
        """Without a queue, references are the patches of the batch."""
        return {"references from the batch": self.config.references == "batch"}

    def order_loss(
        self,
        student_sims: Float[Tensor, "Q R"],
        teacher_sims: Float[Tensor, "Q R"],
        rows: Float[Tensor, " Q"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of Sec. 3, or one of its ablations.

        Args:
            student_sims: of each cell to its references.
            teacher_sims: likewise, without gradient.
            rows: weights of the cells; None: the mean.
        """
        config, (num_rows, size) = self.config, teacher_sims.shape
        inputs = None if rows is None else rows[:, None].expand(-1, size)  # weights of the references, cell by cell
        if config.top_k is not None:
            nearest = teacher_sims.topk(config.top_k, dim=1).indices
            chosen = torch.zeros_like(teacher_sims).scatter_(1, nearest, 1.0)
            inputs = chosen / num_rows if inputs is None else chosen * inputs
        if config.network == "none":
            target = F.softmax(teacher_sims / config.teacher_temp, dim=1)
            cost = -target * F.log_softmax(student_sims / config.student_temp, dim=1)
            return cost.sum(1).mean() if inputs is None else (inputs * cost).sum()
        return neco_loss(
            student_sims,
            teacher_sims,
            config.network,
            config.steepness_student,
            config.steepness_teacher,
            weights=None if inputs is None else inputs / (config.top_k or size),
            backend=config.sorter,
        )

    @torch.no_grad()
    def _teacher_maps(
        self, images: Num[Tensor, "GB C H W"]
    ) -> tuple[Float[Tensor, "GB h w E"], Bool[Tensor, "GB h w"] | None]:
        """The teacher's maps of the global views, and which tokens are compared (None: all)."""
        if self.config.loss_mask == "all":
            return self.teacher((images,))[0], None
        network = self.teacher.module
        features, attention = network.encoder.encode_with_attention(network.encoder.normalize(images))
        is_foreground = foreground(attention, features.grid)
        return network.project(features), is_foreground if self.config.loss_mask == "fg" else ~is_foreground

    def _anchor_cells(
        self, maps: Float[Tensor, "GB h w E"], boxes: Float[Tensor, "V B 4"], common: Float[Tensor, "G V B 4"]
    ) -> Float[Tensor, "P B n E"]:
        """For each pair, the overlap as the teacher sees it in the global view."""
        return F.normalize(self._cut_anchors(maps, boxes, common), dim=-1)  # means of unit vectors are shorter

    def _anchor_mask(
        self, mask: Bool[Tensor, "GB h w"], boxes: Float[Tensor, "V B 4"], common: Float[Tensor, "G V B 4"]
    ) -> Bool[Tensor, "P B n"]:
        """For each pair, the cells that lie in the mask altogether."""
        return self._cut_anchors(mask[..., None].float(), boxes, common)[..., 0] >= _ALL_OF_IT

    def _cut_anchors(
        self, maps: Float[Tensor, "GB h w E"], boxes: Float[Tensor, "V B 4"], common: Float[Tensor, "G V B 4"]
    ) -> Float[Tensor, "P B n E"]:
        num_views, batch = boxes.shape[:2]
        own = boxes[:NUM_GLOBAL].flatten(0, 1)
        cells = overlap_cells(maps, common.transpose(0, 1).flatten(1, 2), own, self.config.roi_size)  # (V, G B, n, E)
        cells = cells.reshape(num_views, NUM_GLOBAL, batch, *cells.shape[2:])
        return different_pairs(cells.transpose(0, 1))

    def _student_cells(
        self, maps: list[Tensor], boxes: Float[Tensor, "V B 4"], common: Float[Tensor, "G V B 4"]
    ) -> Float[Tensor, "P B n E"]:
        """For each pair, the overlap as the student sees it in the other view."""
        batch, first, cells = boxes.shape[1], 0, []
        for one in maps:
            here = slice(first, first + len(one) // batch)
            first = here.stop
            cut = overlap_cells(
                at_least_float32(one), common[:, here].flatten(1, 2), boxes[here].flatten(0, 1), self.config.roi_size
            )
            cells.append(cut.reshape(NUM_GLOBAL, -1, batch, *cut.shape[2:]))  # (G, V_s, B, n, E)
        return F.normalize(different_pairs(torch.cat(cells, dim=1)), dim=-1)

    def _from_batch(
        self, cells: Float[Tensor, "P B n E"], mask: Bool[Tensor, "P B n"] | None, keys: Int[Tensor, " B"]
    ) -> Float[Tensor, "P B R E"]:
        """References from the teacher's cells of the same pair, of all processes' images.

        All cells in random order, cut into R for each image; or, where some can't be drawn, a draw for each image.
        """
        pairs, batch, number, width = cells.shape
        pool = of_all_processes(cells, 1)
        total = pool.shape[1]
        first = torch.distributed.get_rank() * batch if total > batch else 0  # this process's images among all
        if mask is None and not self.config.exclude_self:
            noise = sample_uniform(of_all_processes(keys, 0), pairs * number)
            noise = noise.reshape(total, pairs, number).transpose(0, 1).flatten(1)  # (P, B n)
            places = noise.argsort(dim=1, stable=True)[:, first * number : (first + batch) * number]
        else:
            allowed = torch.ones(1, 1, total, 1, dtype=torch.bool, device=keys.device).expand(-1, -1, -1, number)
            if mask is not None:
                allowed = of_all_processes(mask, 1)[None]
            if self.config.exclude_self:
                if total < 2:
                    raise ConfigError("method.exclude_self needs at least two images a batch; raise batch_size")
                image = torch.arange(total, device=keys.device)
                allowed = allowed & (image != first + image[:batch, None])[:, None, :, None]
            noise = sample_uniform(keys, pairs * total * number).reshape(batch, pairs, -1)
            places = draw_allowed(noise, allowed.flatten(2), number).transpose(0, 1).flatten(1)
        chosen = pool.flatten(1, 2).gather(1, places[..., None].expand(-1, -1, width))
        return chosen.reshape(cells.shape)

    def _from_queue(self, keys: Int[Tensor, " B"], num_others: int) -> Float[Tensor, "P B R E"]:
        """R different tokens from the queue of each pair's global view, drawn for each image among those there."""
        (anchors, size, width), number = self.queue.shape, self.config.roi_size**2
        noise = sample_uniform(keys, anchors * num_others * size, stream=1).reshape(len(keys), -1, size)
        is_there = torch.arange(size, device=keys.device) < self.filled
        places = draw_allowed(noise, is_there[None, None], number).transpose(0, 1)  # (P, B, R)
        places = places.reshape(anchors, -1, 1).expand(-1, -1, width)
        return self.queue.gather(1, places).reshape(-1, len(keys), number, width)

    @torch.no_grad()
    def _push(self, maps: Float[Tensor, "GB h w E"], keys: Int[Tensor, " B"]) -> None:
        """Some tokens of each global view, of all processes, to its queue, in place of the oldest."""
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
        """The teacher follows, head and all."""
        self.teacher.update(self.student, cosine_momentum(self.config.momentum, progress))

    def networks(self) -> dict[str, Encoder]:
        """Both encoders; the published evaluations are of the student."""
        return {"student": self.student.encoder, "teacher": self.teacher.module.encoder}

    def param_groups(self) -> list[dict[str, Any]]:
        """The encoder's parameters and the head's, whose learning rate is greater; decay as in :class:`Method`."""
        head = {id(parameter) for parameter in self.student.head.parameters()}
        groups = []
        for group in super().param_groups():
            for is_head, scale in ((False, 1.0), (True, self.config.head_lr_scale)):
                members = [parameter for parameter in group["params"] if (id(parameter) in head) == is_head]
                groups.append({**group, "params": members, "lr_scale": scale})
        return groups


def row_weights(mask: Bool[Tensor, "P B n"]) -> Float[Tensor, " Q"]:
    """Weights of cells: the mean over a pair's masked ones, and over the pairs that have some.

    The counts are those of all processes, so that the mean of their losses is the joined batch's.
    """
    count = of_all_processes(mask, 1).sum((1, 2))  # (P,)
    share = num_processes() / (count.clamp(min=1) * (count > 0).sum().clamp(min=1))
    return (mask * share[:, None, None]).flatten()


def _check(config: NeCoConfig, encoder: Encoder) -> None:
    """Settings that can't be used, before anything is built."""
    size = config.roi_size**2
    if config.roi_size < 2:
        raise ConfigError(f"method.roi_size={config.roi_size}: an order needs a grid of at least 2 x 2 cells")
    if config.network != "none":
        network_layers(config.network, size)  # finds sizes that don't sort
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # at best: the method isn't there yet
    check_backend(config.sorter, config.network, size, device)
    if min(config.steepness_student, config.steepness_teacher, config.student_temp, config.teacher_temp) <= 0:
        raise ConfigError("method.steepness_student, steepness_teacher, student_temp and teacher_temp must be above 0")
    if not 0 <= config.momentum <= 1 or not 0 <= config.min_overlap < 1:
        raise ConfigError("method.momentum and min_overlap must lie in 0..1 (min_overlap below 1)")
    if config.top_k is not None and not 1 <= config.top_k <= size:
        raise ConfigError(f"method.top_k={config.top_k}: there are {size} references (roi_size^2)")
    if config.references == "queue":
        if config.queue_size < size:
            raise ConfigError(f"method.queue_size={config.queue_size}: an image draws {size} (roi_size^2) from it")
        for option, value in (("exclude_self", config.exclude_self), ("loss_mask", config.loss_mask != "all")):
            if value:
                raise ConfigError(f"method.{option} needs method.references=batch: a queue doesn't know where from")
    if config.loss_mask != "all" and not encoder.has_class_token:
        raise ConfigError(
            f"method.loss_mask={config.loss_mask} needs a class token, which {encoder.name} does not have"
        )
