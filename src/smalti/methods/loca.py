"""LOCA: where the patches of small views lie in a reference view that is hardly shown.

Paper: Caron, Houlsby & Schmid, "Location-Aware Self-Supervised Transformers for Semantic Segmentation", 2022,
arXiv:2212.02400. Its text was not at hand: what is said of the code is the released one.
Letters: B images, V views of a kind, N patches of the reference and R of them that are shown, Q query tokens an image,
D embed_dim, K prototypes.
Differs from the code: the teacher is in eval mode (no stochastic depth in targets) and moves after the optimiser's
step; which tokens are kept is drawn from the progress of training, alike in all processes; means over labelled tokens
are those of all processes together; crops are bicubic, jitter is one affine map; biases of attention are not decayed;
GELU is exact in the projection head (in the encoder, as the encoder is built). A patch's label is the reference cell in
which its centre lies; the code reads it half a pixel of the view further right and down, from a map of numbers that is
resized twice by the nearest pixel: about 5 % of the labels differ.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from smalti.config import Count, Few, ImageSize, Width, settings
from smalti.data.views import ColorConfig, MultiCrop, Views, ViewSpec
from smalti.errors import ConfigError
from smalti.functional.boxes import reference_cells
from smalti.functional.masking import random_mask
from smalti.functional.precision import at_least_float32
from smalti.functional.processes import mean_over_processes, weighted_mean
from smalti.functional.random import sample_uniform, step_key
from smalti.functional.transport import sinkhorn
from smalti.layers.cross_attention import CrossAttentionBlock
from smalti.layers.heads import ProjectionHead, Prototypes
from smalti.methods.base import EncoderMethod, MethodConfig, Reference, register, uniform_guess
from smalti.methods.teacher import Teacher, cosine_momentum
from smalti.models.encoder import Encoder

_REFERENCE, _LARGE = 0, 1  # streams of random numbers
_TINY = 1e-12
_ASPECT = (0.75, 1.33)  # of crops, TensorFlow's default
_TRUNCATED_STD = 0.87962566103423978  # of a standard normal that is cut at two standard deviations


@settings
class LOCAConfig(MethodConfig):
    """Settings of LOCA; the values of the released preset for ViT-B."""

    name: str = "loca"
    num_small_queries: Few = 9
    """Small query views, beside the large one."""
    small_size: ImageSize | None = None
    """Pixels of a small query; None: three sevenths of the reference, to the next multiple of the patch."""
    large_scale: tuple[float, float] = (0.32, 1.0)
    """Area of the reference and of the large query, as a share of the image."""
    small_scale: tuple[float, float] = (0.05, 0.32)
    """Area of a small query."""
    blur: Literal["released", "intended"] = "released"
    """``released``: none, since the preset's blur has a kernel of one pixel; ``intended``: with probability 1 the
    reference, 0.5 the small queries, 0.1 the large one, sigma 0.1 to 2 pixels."""
    reference_keep_ratio: float = 0.2
    """Share of the reference's patches that queries may look at, ``int(N * it)``: consecutive ones in raster order."""
    query_keep_ratio: float = 5 / 14
    """Share of the large query's patches that are encoded, 70 of 196."""
    per_image: bool = False
    """Each image draws its kept tokens; otherwise all images of a step share them."""
    token_mean: Literal["batch", "image"] = "batch"
    """Whether each labelled token of the batch counts alike, or each image."""
    cluster: bool = True
    """The cluster loss and its teacher. Without it the student encodes the kept patches of the reference, too, and
    queries have no positions."""
    num_prototypes: Count = 4096
    """K."""
    hidden_dim: Width = 2048
    """Width of the projection head's hidden layers."""
    bottleneck_dim: Width = 256
    """Width of the unit vectors in front of the prototypes."""
    student_temp: float = 0.1
    """Temperature of the student's softmax over prototypes."""
    teacher_temp: float = 0.05
    """Temperature of the teacher's."""
    sinkhorn_iterations: Few = 3
    """Rounds that spread the teacher's assignments over the prototypes."""
    momentum: float = 0.996
    """Teacher momentum at the start; a half cosine takes it to 1."""


def position_loss(
    logits: Float[Tensor, "B Q K"], labels: Int[Tensor, "B Q"], weights: Float[Tensor, "B Q"]
) -> Float[Tensor, ""]:
    """Cross-entropy of the reference's cells, the weighted mean over the tokens of all processes.

    Args:
        logits: any float type; compared in float32.
        labels: -1 where there is none; such tokens must have weight 0.
        weights: from :func:`token_weights`.
    """
    cost = F.cross_entropy(at_least_float32(logits).mT, labels.clamp(min=0), reduction="none")
    return weighted_mean(cost, weights)


def cluster_loss(
    student: Float[Tensor, "B Q K"], target: Float[Tensor, "B N K"], cells: Int[Tensor, "B Q"], weights: Tensor
) -> Float[Tensor, ""]:
    """Cross-entropy of a query token's prototypes and those of the reference patch it lies in.

    Args:
        student: log-probabilities.
        target: the teacher's assignments of all patches of the reference.
        cells: of the reference's grid, -1 where there is none; such tokens must have weight 0.
        weights: ``(B, Q)`` from :func:`token_weights`.
    """
    chosen = target.gather(1, cells.clamp(min=0)[..., None].expand(-1, -1, target.shape[-1]))
    return weighted_mean(-(chosen * student).sum(-1), weights)


def me_max(student: Float[Tensor, "B Q K"]) -> Float[Tensor, ""]:
    """Negative entropy of the mean assignment over all query tokens of all processes: ``sum(p log p)``, least where
    all prototypes are used alike, ``-log K``.

    Args:
        student: log-probabilities.
    """
    mean = mean_over_processes(student.exp().mean((0, 1)))
    return (mean * mean.clamp(min=_TINY).log()).sum()


def token_weights(labels: Int[Tensor, "B Q"], per: str) -> Float[Tensor, "B Q"]:
    """1 for each token with a label (``batch``), or what makes each image with labels sum to 1 (``image``)."""
    is_labelled = (labels >= 0).float()
    return is_labelled if per == "batch" else is_labelled / is_labelled.sum(1, keepdim=True).clamp(min=1)


def init_transformer(module: nn.Module) -> None:
    """Xavier uniform for linear layers (queries, keys and values each on its own), biases 0, or normal 1e-6 in
    perceptrons: the released code's initialisation of blocks."""
    weight: Tensor | None
    bias: Tensor | None
    for name, layer in module.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            weight, bias, parts = layer.in_proj_weight, layer.in_proj_bias, 3
        elif isinstance(layer, nn.Linear):
            weight, bias, parts = layer.weight, layer.bias, 3 if name.endswith("qkv") else 1
        else:
            continue
        assert weight is not None, "one width for queries, keys and values"
        for part in weight.chunk(parts):
            nn.init.xavier_uniform_(part)
        if bias is not None:
            nn.init.normal_(bias, std=1e-6 if "mlp" in name.split(".") else 0.0)


@torch.no_grad()
def lecun_normal_(weight: Tensor) -> None:
    """Truncated normal of variance 1 / inputs, cut at two standard deviations, in place: the default of Flax.

    Args:
        weight: ``(outputs, ...)``.
    """
    std = weight[0].numel() ** -0.5 / _TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class EncoderWithClusters(nn.Module):
    """An encoder and, for the cluster loss, a projection head and prototypes on its patch tokens."""

    def __init__(self, encoder: Encoder, config: LOCAConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = self.prototypes = None
        if config.cluster:
            self.head = ProjectionHead(encoder.embed_dim, config.hidden_dim, config.bottleneck_dim)
            self.prototypes = Prototypes(config.bottleneck_dim, config.num_prototypes)
            for layer in self.head.mlp:
                if isinstance(layer, nn.Linear):
                    lecun_normal_(layer.weight)
            lecun_normal_(self.prototypes.weight)
            self.prototypes.weight.data = F.normalize(self.prototypes.weight.data, dim=-1)

    def forward(self, images: Num[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N K"]]:
        """Patch tokens of whole images, and their logits."""
        tokens = self.encode(images)
        return tokens, self.logits(tokens)

    def encode(
        self, images: Num[Tensor, "B C H W"], ids_keep: Int[Tensor, "B L"] | None = None, positions: bool = True
    ) -> Float[Tensor, "B L D"]:
        """Patch tokens.

        Args:
            images: as views have them.
            ids_keep: which patches; None: all.
            positions: whether the network is told where they are.
        """
        encoder = self.encoder
        tokens, grid = encoder.embed_patches(encoder.normalize(images), ids_keep)
        sequence = encoder.assemble(tokens, encoder.positions(grid) if positions else None, ids_keep)
        return encoder.forward_tokens(sequence)[:, encoder.num_prefix_tokens :]

    def logits(self, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B L K"]:
        """Cosine to each prototype."""
        assert self.head is not None and self.prototypes is not None, "there is no cluster loss"
        return self.prototypes(self.head(tokens))


@register("loca")
class LOCA(EncoderMethod):
    """Queries look at a few patches of a reference view, and say where in it they lie and to what clusters they go."""

    Config = LOCAConfig
    title = "predicts positions and cluster assignments of query patches in a reference view"
    paper = "Caron et al. 2022, arXiv:2212.02400"
    export_network = "student"
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "base_lr": 2.5e-4,
            "betas": [0.9, 0.999],
            "weight_decay": 0.1,
            "warmup_ratio": 0.15,
            "min_lr": 1e-5,
            "clip_norm": 1.0,
            "clip": "global",
        },
        "drop_path": 0.1,
    }

    def __init__(self, encoder: Encoder, config: LOCAConfig) -> None:
        super().__init__(encoder, config)
        _check(config, encoder)
        if not encoder.pretrained:
            encoder.set_pos_resampling(mode="bilinear")
            nn.init.normal_(encoder.vit.pos_embed, std=encoder.embed_dim**-0.5)
            init_transformer(encoder.vit)
            lecun_normal_(encoder.vit.patch_embed.proj.weight)
            if encoder.vit.patch_embed.proj.bias is not None:
                nn.init.zeros_(encoder.vit.patch_embed.proj.bias)
        self.head_grid = encoder.check_size(*encoder.img_size)
        """Grid of the places that are told apart: the encoder's native one."""
        self.student = EncoderWithClusters(encoder, config)
        self.teacher: Teacher[EncoderWithClusters] | None = Teacher(self.student) if config.cluster else None
        self.relative = CrossAttentionBlock(encoder.embed_dim, encoder.num_heads)
        self.norm = nn.LayerNorm(encoder.embed_dim, eps=1e-6)
        self.position_head = nn.Linear(encoder.embed_dim, self.head_grid[0] * self.head_grid[1])
        init_transformer(self.relative)
        lecun_normal_(self.position_head.weight)
        nn.init.zeros_(self.position_head.bias)

    def make_views(self, image_size: int) -> MultiCrop:
        """A reference (never mirrored), a large query and small ones, with colour jitter."""
        config, patch = self.config, self.student.encoder.patch_size[0]
        blurs = (1.0, 0.1, 0.5) if config.blur == "intended" else (0.0, 0.0, 0.0)
        color = ColorConfig(
            brightness=0.4,
            add_brightness=True,
            contrast=0.4,
            saturation=0.2,
            hue=0.1,
            jitter_prob=0.8,
            gray_prob=0.2,
        )
        small = config.small_size or -(-image_size * 3 // 7 // patch) * patch
        specs = []
        for count, size, scale, flip, blur, solarize in (
            (1, image_size, config.large_scale, 0.0, blurs[0], 0.0),
            (1, image_size, config.large_scale, 0.5, blurs[1], 0.2),
            (config.num_small_queries, small, config.small_scale, 0.5, blurs[2], 0.0),
        ):
            if count:
                self.student.encoder.check_size(size, size)
            specs.append(
                ViewSpec(
                    count=count,
                    size=size,
                    scale=scale,
                    aspect=_ASPECT,
                    uniform="height",
                    flip_prob=flip,
                    color=color,
                    blur_prob=blur,
                    solarize_prob=solarize,
                )
            )
        return MultiCrop(specs)

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """``{"position": ...}``, and ``cluster`` and ``me_max`` where there is a cluster loss."""
        config, batch = self.config, views.batch_size
        keys = self._keys(views, progress)
        reference_grid = self.student.encoder.check_size(*views.global_crops.shape[-2:])
        kept = self._draw_reference(keys, reference_grid[0] * reference_grid[1]).expand(batch, -1)
        if self.teacher is not None:
            reference, reference_logits = self.teacher(views.global_crops)
            shown = reference.gather(1, kept[..., None].expand(-1, -1, reference.shape[-1]))  # late drop
        else:
            shown = self.student.encode(views.global_crops, kept)  # early drop

        queries, cells, labels = self._queries(views, keys, reference_grid)
        logits = self.position_head(self.norm(self.relative(queries, shown)))
        weights = token_weights(labels, config.token_mean)
        losses = {"position": position_loss(logits, labels, weights)}
        with torch.no_grad():
            correct = (logits.argmax(-1) == labels).float()
            self.observations = {
                "position_accuracy": weighted_mean(correct, weights),
                "labelled_ratio": (labels >= 0).float().mean(),
            }
        if self.teacher is not None:
            student = (at_least_float32(self.student.logits(queries)) / config.student_temp).log_softmax(-1)
            target = sinkhorn(
                reference_logits.flatten(0, 1), config.teacher_temp, config.sinkhorn_iterations, softmax_first=True
            ).reshape(batch, -1, config.num_prototypes)
            losses["cluster"] = cluster_loss(student, target, cells, weights)
            losses["me_max"] = me_max(student)
            self.observations |= {
                "target_entropy": torch.special.entr(target).sum(-1).mean(),
                "prototype_usage_entropy": -losses["me_max"].detach(),
            }
        return losses

    def couplings(self) -> dict[str, bool]:
        """Cluster targets and their entropy are those of a batch; so is the mean over labelled tokens."""
        clusters = self.config.cluster
        pooled = self.config.token_mean != "image"
        return {"Sinkhorn-Knopp": clusters, "mean-entropy maximisation": clusters, "the mean over all tokens": pooled}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The teacher follows, clusters and all."""
        if self.teacher is not None:
            self.teacher.update(self.student, cosine_momentum(self.config.momentum, progress))

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """The uniform guess of the cell."""
        return uniform_guess(row, "position", self.position_head.out_features, "cells")

    def networks(self) -> dict[str, Encoder]:
        """The student, which is handed on, and the teacher, where there is one."""
        networks = {"student": self.student.encoder}
        return networks if self.teacher is None else {**networks, "teacher": self.teacher.module.encoder}

    def _queries(
        self, views: Views, keys: Int[Tensor, " S"], reference_grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "B Q D"], Int[Tensor, "B Q"], Int[Tensor, "B Q"]]:
        """Tokens of all queries; the cells they lie in, of the reference's grid and of the head's (-1: none)."""
        batch, encoder = views.batch_size, self.student.encoder
        boxes, flips = views.boxes.reshape(-1, batch, 4), views.flips.reshape(-1, batch)
        first, parts = 1, []
        for crops in views.crops[1:]:
            here = slice(first, first + len(crops) // batch)
            grid = encoder.check_size(*crops.shape[-2:])
            found = [
                reference_cells(boxes[here], flips[here], boxes[:1], grid, other)  # (V, B, n)
                for other in (reference_grid, self.head_grid)
            ]
            ids_keep = None
            if first == 1:  # the large query, one view
                ids_keep = self._draw_large(keys, grid[0] * grid[1]).expand(batch, -1)
                found = [cells.gather(2, ids_keep[None]) for cells in found]
            tokens = self.student.encode(crops, ids_keep, positions=self.config.cluster)
            # views stand first; each image's tokens of all its views become one sequence
            parts.append(
                [x.transpose(0, 1).flatten(1, 2) for x in (tokens.reshape(-1, batch, *tokens.shape[1:]), *found)]
            )
            first = here.stop
        queries, cells, labels = (torch.cat(kind, dim=1) for kind in zip(*parts, strict=True))
        return queries, cells, labels

    def _keys(self, views: Views, progress: float) -> Int[Tensor, " S"]:
        """What token drops are drawn from: a key an image, or one for all, the same in every process."""
        if self.config.per_image:
            return views.keys
        return step_key(progress, views.keys.device)

    def _draw_reference(self, keys: Int[Tensor, " S"], num_patches: int) -> Int[Tensor, "S R"]:
        """Consecutive patches of the reference from a random one on."""
        number = int(num_patches * self.config.reference_keep_ratio)
        if not number:
            raise ConfigError(
                f"method.reference_keep_ratio={self.config.reference_keep_ratio} keeps 0 of {num_patches} patches"
            )
        start = sample_uniform(keys, 1, _REFERENCE) * (num_patches - number + 1)
        return start.long() + torch.arange(number, device=keys.device)

    def _draw_large(self, keys: Int[Tensor, " S"], num_patches: int) -> Int[Tensor, "S L"]:
        """Random patches of the large query."""
        number = max(1, round(num_patches * self.config.query_keep_ratio))
        return random_mask(sample_uniform(keys, num_patches, _LARGE), number)[0]


def _check(config: LOCAConfig, encoder: Encoder) -> None:
    """Settings that can't be used, before anything is built."""
    for name in ("reference_keep_ratio", "query_keep_ratio"):
        if not 0 < getattr(config, name) <= 1:
            raise ConfigError(f"method.{name}={getattr(config, name)}: a share in 0..1 (0 excluded) is needed")
    if min(config.student_temp, config.teacher_temp) <= 0:
        raise ConfigError("method.student_temp and method.teacher_temp must be above 0")
    if not 0 <= config.momentum <= 1:
        raise ConfigError(f"method.momentum={config.momentum}: it must lie in 0..1")
    if config.sinkhorn_iterations < 1 or config.num_small_queries < 0:
        raise ConfigError("method.sinkhorn_iterations must be at least 1, num_small_queries at least 0")
    if encoder.vit.pos_embed is None:
        raise ConfigError(f"{encoder.name} has no position embedding, without which a reference shows no places")
