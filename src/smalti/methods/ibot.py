"""iBOT: masked patches learn what a teacher, who sees them, says of them.

Paper: Zhou et al., "iBOT: Image BERT pre-training with online tokenizer", 2021, arXiv:2111.07832v3; numbers that the
paper leaves open are those of the released code and its published recipe.
Letters: B images, G = 2 global views, M = G B global crops (view-major), V all views, N patches of a global crop, K
prototypes, E width of the head's bottleneck, S tokens whose output is needed.
Differs from the code: the student has the teacher's head, shared or not (there defaults differ between both); a step's
temperatures are its own, not its epoch's; "epochs" are shares of training; the mean over all pairs of views is taken,
where cross terms of global and of local views are one sum there, too; the centre of patches is that of the head's
output on all patches, computed from the mean bottleneck vector (the prototypes are linear).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from smalti.config import Count, Few, ImageSize, Width, settings
from smalti.data.views import MultiCrop, Views, ViewSpec
from smalti.errors import ConfigError
from smalti.functional.distillation import distill
from smalti.functional.masking import block_mask
from smalti.functional.precision import at_least_float32
from smalti.functional.processes import sum_over_processes
from smalti.functional.random import fork_keys, sample_uniform
from smalti.functional.transfer import move
from smalti.functional.transport import sinkhorn_offsets
from smalti.layers.heads import PrototypeHead
from smalti.layers.last_block import Chosen, place_of
from smalti.methods.base import EncoderMethod, MethodConfig, Reference, register, same_for_all
from smalti.methods.dino import color_jitter, draw_weights, resample_as_released
from smalti.methods.teacher import Teacher, cosine_momentum
from smalti.models.encoder import Encoder

NUM_GLOBAL = 2
IMAGE, PATCH = "image", "patch"
RATIO_STREAM, BLOCK_STREAM = 1, 10_000


@settings
class IBOTConfig(MethodConfig):
    """Settings of iBOT."""

    name: str = "ibot"
    num_prototypes: Count = 8192
    """K."""
    hidden_dim: Width = 2048
    """Width of the projection heads' hidden layers."""
    bottleneck_dim: Width = 256
    """E."""
    separate_heads: bool = False
    """A head of their own for patches; otherwise image and patches share one."""
    norm_last_layer: bool = False
    """Keep the gain of each prototype at 1."""
    targets: Literal["centering", "sinkhorn"] = "centering"
    """How targets stay spread: DINO's centre, or Sinkhorn's rounds over the batch of all processes."""
    sinkhorn_iterations: Few = 3
    """Rounds."""
    patch_center: Literal["all", "masked"] = "all"
    """Whose mean the centre of patches follows: that of all patches of the global views, or of the masked ones."""
    student_temp: float = 0.1
    """Temperature of the student's softmax."""
    teacher_temp: float = 0.07
    """Temperature of the teacher's on images, after warm-up."""
    warmup_teacher_temp: float = 0.04
    """At the start; it grows linearly."""
    patch_teacher_temp: float = 0.07
    """Temperature of the teacher's on patches, after warm-up."""
    warmup_patch_teacher_temp: float = 0.04
    """At the start."""
    warmup_teacher_temp_ratio: float = 0.3
    """Share of training over which both grow."""
    momentum: float = 0.996
    """Teacher momentum at the start; a half cosine takes it to 1."""
    center_momentum: float = 0.9
    """Of the centre of images."""
    patch_center_momentum: float = 0.9
    """Of the centre of patches."""
    freeze_last_layer_ratio: float = 0.01
    """Share of training in which the prototypes stay fixed (one epoch of a hundred)."""
    image_weight: float = 1.0
    """lambda_1, of the image token's loss."""
    patch_weight: float = 1.0
    """lambda_2, of the patches'."""
    mask_sample_prob: float = 0.5
    """Probability that patches of a global crop are masked."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest fraction of patches that are masked there; the sampler may fall short."""
    num_local_views: Few = 10
    """Local views an image."""
    local_size: ImageSize | None = None
    """Pixels of a local view; None: three sevenths of the global views', to the next multiple of the patch."""
    global_scale: tuple[float, float] = (0.25, 1.0)
    """Area of a global view, as a share of the image."""
    local_scale: tuple[float, float] = (0.05, 0.25)
    """Area of a local view."""
    color_strength: float = 1.0
    """Factor of the colour jitter's four strengths (0.4, 0.4, 0.2, 0.1); short runs on few images want it mild."""
    gray_prob: float = 0.2
    """Share of views that become grey."""
    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Share of blurred views: of the first global, the second, the local ones."""
    solarize_prob: float = 0.2
    """Share of second global views whose bright half is inverted."""
    linear_init: Literal["0.02", "fan_in"] = "0.02"
    """Standard deviation of linear layers at the start, heads included: 0.02, or 1 / sqrt(inputs) (patch embedding,
    too), without which networks narrower than a ViT-S learn nothing in a short run."""
    position_init: Literal["learned", "sincos"] = "learned"
    """Positions at the start, which are learned: as timm draws them, or sine-cosine, as large as embedded patches."""


class MaskedNetwork(nn.Module):
    """An encoder with a mask token, and heads on its image and patch tokens.

    Args:
        encoder: with a class token.
        config: of the method.
        token_heads: names of what is asked of patch tokens; each has a head, if heads are separate.
    """

    def __init__(self, encoder: Encoder, config: IBOTConfig, token_heads: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, encoder.embed_dim))
        names = (IMAGE, *token_heads) if config.separate_heads else (IMAGE,)
        sizes = (encoder.embed_dim, config.hidden_dim, config.bottleneck_dim, config.num_prototypes)
        self.heads = nn.ModuleDict({name: PrototypeHead(*sizes, not config.norm_last_layer) for name in names})

    def head_name(self, name: str) -> str:
        """Which head answers: the one of that name, or the one that all share."""
        return name if name in self.heads else IMAGE

    def head(self, name: str) -> PrototypeHead:
        """The head that answers."""
        head = self.heads[self.head_name(name)]
        assert isinstance(head, PrototypeHead)
        return head

    def embed(
        self, images: Num[Tensor, "V C H W"], masks: Mapping[str, Tensor], boxes: Float[Tensor, "V 4"] | None
    ) -> Float[Tensor, "V T D"]:
        """The sequence that goes into the blocks: Sec. 3.1, masked patches are replaced, then positions are added.

        Args:
            images: as views have them.
            masks: ``(V, N)`` by name, True where something is hidden; here ``patch``, or nothing.
            boxes: where the crops come from; not needed here, see :meth:`IBOT.view_boxes`.
        """
        tokens, grid = self.encoder.embed_patches(self.encoder.normalize(images))
        if PATCH in masks:
            tokens = torch.where(masks[PATCH][..., None], self.mask_token.to(tokens.dtype), tokens)
        return self.encoder.assemble(tokens, self.encoder.positions(grid))

    def forward(
        self,
        images: Num[Tensor, "V C H W"],
        masks: Mapping[str, Tensor],
        boxes: Float[Tensor, "V 4"] | None,
        chosen: Chosen,
    ) -> Float[Tensor, "S D"]:
        """The chosen tokens of crops of one size."""
        return self.encoder.forward_chosen(self.embed(images, masks, boxes), chosen)

    def project(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bottleneck vectors of tokens by name, one call a head."""
        vectors: dict[str, Tensor] = {}
        for head in self.heads:
            names = [name for name in tokens if self.head_name(name) == head]
            joined = self.head(head).projection(torch.cat([tokens[name] for name in names]))
            vectors |= dict(zip(names, joined.split([len(tokens[name]) for name in names]), strict=True))
        return vectors

    def prototypes(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The matrix of prototypes by name, made once a head."""
        matrices = {head: self.head(head).prototypes.matrix() for head in self.heads}
        return {name: matrices[self.head_name(name)] for name in names}


@dataclass(frozen=True)
class Reading:
    """Which tokens of the global crops are read, and for what."""

    chosen: Chosen
    rows: dict[str, Tensor]
    """By name, which of the chosen tokens; those of ``image`` are the class tokens of all crops."""

    @staticmethod
    def of(compared: Mapping[str, Bool[Tensor, "M N"]], num_prefix: int) -> "Reading":
        """Class tokens, and by name the patches that are marked."""
        num_crops, num_patches = next(iter(compared.values())).shape
        wanted = torch.zeros(num_crops, num_prefix + num_patches, dtype=torch.bool)
        wanted[:, 0] = True
        for mask in compared.values():
            wanted[:, num_prefix:] |= mask
        chosen = Chosen.where(wanted)
        place = place_of(chosen, wanted.shape[1])
        return Reading(
            chosen, {IMAGE: place[:, 0], **{name: place[:, num_prefix:][mask] for name, mask in compared.items()}}
        )

    def to(self, device: torch.device) -> "Reading":
        """On a device."""
        return Reading(self.chosen.to(device), {name: move(rows, device) for name, rows in self.rows.items()})

    def split(self, tokens: Float[Tensor, "S D"]) -> dict[str, Tensor]:
        """Chosen tokens by name."""
        return {name: tokens[rows] for name, rows in self.rows.items()}


@dataclass(frozen=True)
class Plan:
    """What is hidden and what is read in a step: settled on the CPU, so that the step itself has known shapes."""

    masks: dict[str, Tensor]
    """``(M, N)`` by name, True where something is hidden from the student."""
    student: Reading
    """Which tokens of the global crops the student gives."""
    teacher: Reading
    """Which the teacher gives: the same, or all patches where its centre follows all."""
    compared_rows: dict[str, Tensor]
    """By name, which of the teacher's rows are compared, where they aren't all."""
    weights: dict[str, Tensor]
    """By name, of the compared tokens."""


def crop_keys(keys: Int[Tensor, " B"]) -> Int[Tensor, " M"]:
    """A key for each global crop of each image, view-major."""
    return torch.cat([fork_keys(keys, view) for view in range(NUM_GLOBAL)])


def token_weights(compared: Bool[Tensor, "M N"]) -> Float[Tensor, " S"]:
    """Weights of the marked tokens: the mean over those of a crop, then over all crops, also those without any."""
    share = 1 / (len(compared) * compared.sum(1, keepdim=True).clamp(min=1))
    return share.expand_as(compared)[compared]


def other_views(batch: int, num_views: int, device: torch.device) -> tuple[Int[Tensor, "VB 2"], Float[Tensor, " VB"]]:
    """With which of the two global views each view is compared, and with what weight.

    Returns:
        ``(V B, 2)`` rows of the teacher's ``(2 B, ...)``: the other one twice for a global view, both for a local one;
        ``(V B,)`` weights, such that the sum is the mean over all pairs of different views and over images.
    """
    one = torch.arange(batch, device=device)
    first, second = one, one + batch
    local = torch.stack([first, second], 1).repeat(num_views - NUM_GLOBAL, 1)
    sources = torch.cat([torch.stack([second, second], 1), torch.stack([first, first], 1), local])
    pairs = torch.full((num_views * batch,), 2.0, device=device)  # of each view
    pairs[: NUM_GLOBAL * batch] = 1.0
    return sources, pairs / (NUM_GLOBAL * (num_views - 1) * batch)


@register("ibot")
class IBOT(EncoderMethod):
    """A student matches a teacher on the image token across crops, and on masked patches within a crop.

    For variants, each its own method to override: :meth:`make_network` and its ``embed`` (how tokens are put together),
    ``token_heads`` (what is asked of patch tokens, a loss term each), :meth:`draw_masks` (what is hidden where),
    :meth:`compared` (which tokens are judged), :meth:`view_boxes`, :meth:`regularizers`.
    """

    Config = IBOTConfig
    title = "self-distillation of the class token and of masked patch tokens"
    paper = "Zhou et al. 2021, arXiv:2111.07832v3"
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
    token_heads: tuple[str, ...] = (PATCH,)
    """What is asked of patch tokens; the names of heads, masks and loss terms."""
    draws_class_token: ClassVar[bool] = True
    """Whether the class token starts as in the code of DINO and iBOT, or as timm draws it."""

    def __init__(self, encoder: Encoder, config: IBOTConfig) -> None:
        super().__init__(encoder, config)
        _check(config, encoder)
        resample_as_released(encoder)
        self.student = self.make_network(encoder)
        self._draw_weights()
        self.teacher: Teacher[MaskedNetwork] = Teacher(self.student)
        if config.targets == "centering":
            for name in (IMAGE, *self.token_heads):
                self.register_buffer(f"{name}_center", torch.zeros(config.num_prototypes))
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def make_network(self, encoder: Encoder) -> MaskedNetwork:
        """The student; the teacher is its copy."""
        return MaskedNetwork(encoder, self.config, self.token_heads)

    def make_views(self, image_size: int) -> MultiCrop:
        """Two global and some local views with colour jitter, blur and solarisation, as in DINO."""
        config, encoder = self.config, self.student.encoder
        color = color_jitter(config.color_strength, config.gray_prob)
        first, second, local = self.blur_probs()
        views = [
            ViewSpec(
                count=NUM_GLOBAL,
                size=image_size,
                scale=config.global_scale,
                flip_prob=0.5,
                color=color,
                blur_prob=(first, second),
                solarize_prob=(0.0, config.solarize_prob),
            )
        ]
        if config.num_local_views:
            size = config.local_size or -(-image_size * 3 // 7 // encoder.patch_size[0]) * encoder.patch_size[0]
            encoder.check_size(size, size)
            views.append(
                ViewSpec(
                    count=config.num_local_views,
                    size=size,
                    scale=config.local_scale,
                    flip_prob=0.5,
                    color=color,
                    blur_prob=local,
                )
            )
        return MultiCrop(views)

    def blur_probs(self) -> tuple[float, float, float]:
        """Of the first global view, the second, local ones."""
        return self.config.blur_prob

    def draw_masks(self, keys: Int[Tensor, " B"], grid: tuple[int, int]) -> dict[str, Bool[Tensor, "M N"]]:
        """What is hidden in the global crops, on the CPU: each crop draws whether and how much for itself.

        Args:
            keys: the images', on the CPU.
            grid: of a global crop.
        """
        smallest = (min(grid) // 3) ** 2
        counts = self.counts_each(keys, grid)
        return {PATCH: block_mask(crop_keys(keys), counts, grid, smallest=smallest, stream=BLOCK_STREAM)}

    def counts_each(self, keys: Int[Tensor, " B"], grid: tuple[int, int]) -> Int[Tensor, " M"]:
        """How many patches to hide in each global crop, which draws it for itself; 0 in those that aren't masked."""
        noise = sample_uniform(crop_keys(keys), 2, RATIO_STREAM)
        low, high = self.config.mask_ratio
        counts = ((low + (high - low) * noise[:, 1].double()) * grid[0] * grid[1]).long()
        return torch.where(noise[:, 0] < self.config.mask_sample_prob, counts, 0)

    def compared(self, masks: dict[str, Bool[Tensor, "M N"]]) -> dict[str, Bool[Tensor, "M N"]]:
        """Which patch tokens each of ``token_heads`` judges: the masked ones."""
        return masks

    def view_boxes(self, views: Views) -> list[Tensor | None]:
        """What :meth:`MaskedNetwork.embed` learns of where crops come from, for each entry of ``views.crops``."""
        return [None] * len(views.crops)

    def regularizers(self, image_tokens: Float[Tensor, "M D"]) -> dict[str, Tensor]:
        """Further loss terms, from the student's image tokens of the global crops."""
        return {}

    def weight(self, name: str) -> float:
        """Of a loss term."""
        return self.config.image_weight if name == IMAGE else self.config.patch_weight

    def teacher_temp(self, name: str, progress: float) -> float:
        """The teacher's temperature at this point of training: linear warm-up, then constant."""
        config = self.config
        share = min(progress / config.warmup_teacher_temp_ratio, 1.0) if config.warmup_teacher_temp_ratio else 1.0
        first, last = config.warmup_patch_teacher_temp, config.patch_teacher_temp
        if name == IMAGE:
            first, last = config.warmup_teacher_temp, config.teacher_temp
        return first + share * (last - first)

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """``{"image": ..., "patch": ...}``."""
        return self.losses(views, self.plan(views), progress)

    def plan(self, views: Views) -> Plan:
        """What is hidden and read, drawn on the CPU and sent to the device of the crops without a wait."""
        encoder, device = self.student.encoder, views.global_crops.device
        masks = self.draw_masks(views.cpu_keys, encoder.check_size(*views.global_crops.shape[-2:]))
        compared = self.compared(masks)
        student = teacher = Reading.of(compared, encoder.num_prefix_tokens)
        compared_rows = {}
        if self.config.targets == "centering" and self.config.patch_center == "all":
            whole = {name: torch.ones_like(mask) for name, mask in compared.items()}
            teacher = Reading.of(whole, encoder.num_prefix_tokens)
            compared_rows = {name: mask.flatten().nonzero()[:, 0] for name, mask in compared.items()}
        return Plan(
            masks={name: move(mask, device) for name, mask in masks.items()},
            student=student.to(device),
            teacher=teacher.to(device),
            compared_rows={name: move(rows, device) for name, rows in compared_rows.items()},
            weights={name: move(token_weights(mask), device) for name, mask in compared.items()},
        )

    def losses(self, views: Views, plan: Plan, progress: float) -> dict[str, Tensor]:
        """The loss terms; nothing in here waits for the device."""
        images, device, boxes = views.global_crops, views.global_crops.device, self.view_boxes(views)
        teacher = self._teacher_vectors(images, boxes[0], plan)
        student = plan.student.split(self.student(images, plan.masks, boxes[0], plan.student.chosen))
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
                student_temp=self.config.student_temp,
                teacher_temp=temp,
                sources=sources if name == IMAGE else None,
            )
            losses[name] = self.weight(name) * found.loss
            self.observations[f"{name}_target_entropy"] = found.target_entropy
            self.observations[f"{name}_usage_entropy"] = torch.special.entr(found.usage).sum()
        return losses | self.regularizers(global_tokens)

    def couplings(self) -> dict[str, bool]:
        """Sinkhorn-Knopp normalises over the tokens of a batch."""
        return {"Sinkhorn-Knopp": self.config.targets == "sinkhorn"}

    def after_backward(self, progress: float) -> None:
        """Prototypes get no gradient in the first moments of training."""
        if progress < self.config.freeze_last_layer_ratio:
            for name in self.student.heads:
                for parameter in self.student.head(name).prototypes.parameters():
                    parameter.grad = None

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Centres follow the mean over all processes, the teacher follows the student."""
        for name, (total, count) in self._sums.items():
            total, count = sum_over_processes(total), sum_over_processes(count)
            center = getattr(self, f"{name}_center")
            momentum = self.config.center_momentum if name == IMAGE else self.config.patch_center_momentum
            moved = center.lerp(total / count.clamp(min=1), 1 - momentum)
            center.copy_(torch.where(count > 0, moved, center))  # no token anywhere: it stays
        self._sums = {}
        self.teacher.update(self.student, cosine_momentum(self.config.momentum, progress))

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """The best distribution of image tokens that is the same for all images."""
        return same_for_all(row, IMAGE, f"{IMAGE}_usage_entropy", self.weight(IMAGE))

    def networks(self) -> dict[str, Encoder]:
        """Both encoders; the teacher is handed on."""
        return {"student": self.student.encoder, "teacher": self.teacher.module.encoder}

    @torch.no_grad()
    def _teacher_vectors(
        self, images: Num[Tensor, "M C H W"], boxes: Float[Tensor, "M 4"] | None, plan: Plan
    ) -> dict[str, Tensor]:
        """Bottleneck vectors of the teacher, who sees everything, by name; their sums are kept for the centres."""
        network = self.teacher.module
        vectors = network.project(plan.teacher.split(self.teacher(images, {}, boxes, plan.teacher.chosen)))
        if self.config.targets == "centering":
            self._keep_sums(vectors, network.prototypes(tuple(vectors)))
        return vectors | {name: vectors[name][rows] for name, rows in plan.compared_rows.items()}

    def _keep_sums(self, vectors: dict[str, Tensor], prototypes: dict[str, Tensor]) -> None:
        """Sums of logits for the centres; through the sum of the vectors, since prototypes are linear."""
        for name, rows in vectors.items():
            with torch.autocast(rows.device.type, enabled=False):
                total = at_least_float32(rows).sum(0) @ at_least_float32(prototypes[name]).T
            count = torch.full((), float(len(rows)), device=rows.device)
            before = self._sums.get(name)
            self._sums[name] = (total, count) if before is None else (before[0] + total, before[1] + count)

    def _offsets(self, name: str, logits: Float[Tensor, "S K"], temp: float) -> Float[Tensor, " K"]:
        """What is taken from the teacher's logits over ``temp``: a centre, or what Sinkhorn's rounds take."""
        if self.config.targets == "centering":
            return at_least_float32(getattr(self, f"{name}_center")) / temp
        return sinkhorn_offsets(logits, temp, self.config.sinkhorn_iterations)

    @torch.no_grad()
    def _draw_weights(self) -> None:
        """Weights and positions at the start, where they aren't timm's; an encoder that was trained keeps its own."""
        encoder, config = self.student.encoder, self.config
        if self.draws_class_token:
            encoder.draw_class_token()
        draw_weights(self.student, self.student.heads, encoder, config.linear_init, config.position_init)


def _check(config: IBOTConfig, encoder: Encoder) -> None:
    """Settings that can't be used, before anything is built."""
    if not encoder.has_class_token:
        raise ConfigError(f"{encoder.name} has no class token, whose assignments are learned; use another encoder")
    temps = (config.student_temp, config.teacher_temp, config.warmup_teacher_temp)
    if min(*temps, config.patch_teacher_temp, config.warmup_patch_teacher_temp) <= 0:
        raise ConfigError("method.student_temp and all teacher temperatures must be above 0")
    for name in ("num_prototypes", "hidden_dim", "bottleneck_dim"):
        if getattr(config, name) < 1:
            raise ConfigError(f"method.{name}={getattr(config, name)}: at least 1 is needed")
    shares = ("momentum", "center_momentum", "patch_center_momentum", "mask_sample_prob", "warmup_teacher_temp_ratio")
    for name in (*shares, "freeze_last_layer_ratio", "gray_prob", "solarize_prob"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"method.{name}={getattr(config, name)}: it must lie in 0..1")
    if not all(0 <= probability <= 1 for probability in config.blur_prob):
        raise ConfigError(f"method.blur_prob={config.blur_prob}: all must lie in 0..1")
    low, high = config.mask_ratio
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"method.mask_ratio=({low:g}, {high:g}): it needs 0 <= smallest <= largest <= 1")
    if config.sinkhorn_iterations < 1:
        raise ConfigError(f"method.sinkhorn_iterations={config.sinkhorn_iterations}: at least 1 is needed")
