"""LOCA: locate the patches of query views in a reference view of which only a few patches are visible.

Paper: Caron, Houlsby & Schmid, "Location-Aware Self-Supervised Transformers for Semantic Segmentation", 2022,
arXiv:2212.02400. We had the released code, not the paper's full text; "the code" below is that.
Letters: B images, V views of a kind, N patches of the reference, R of them visible, Q query tokens per image, D
embed_dim, K prototypes.
Differs from the code: the teacher is in eval mode (no stochastic depth in targets) and is updated after the optimiser's
step; the kept tokens are derived from training progress, so all processes keep the same; means over labelled tokens are
taken over all processes; crops are bicubic, jitter is one affine map; biases of attention are not decayed; GELU is
exact in the projection head (in the encoder, as the encoder is built). A patch's label is the reference cell that
contains its centre; the code reads it half a view pixel further right and down, from an index map that is resized twice
by nearest neighbour: about 5 % of the labels differ.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import Count, Few, ImageSize, PositiveRatio, Ratio, Width, settings
from smalti.data.color import ColorConfig
from smalti.data.crops import MultiCrop, ViewSpec
from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.functional.boxes import reference_cells
from smalti.functional.masking import random_mask
from smalti.functional.precision import at_least_float32
from smalti.functional.processes import mean_over_processes, weighted_mean
from smalti.functional.random import sample_uniform, step_key
from smalti.functional.transport import sinkhorn
from smalti.layers.cross_attention import CrossAttentionBlock
from smalti.layers.gaussian_bias import Places
from smalti.layers.heads import ProjectionHead, Prototypes
from smalti.methods.base import EncoderMethod, MethodConfig, Reference, register, uniform_guess
from smalti.methods.teacher import Teacher, cosine_momentum
from smalti.models.encoder import Encoder

LARGE_SCALE, SMALL_SCALE = (0.32, 1.0), (0.05, 0.32)
"""Areas of the reference and the large query, and of the small queries, as fractions of the image."""
QUERY_KEEP_RATIO = 5 / 14
"""Fraction of the large query's patches that are encoded: 70 of 196."""
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.05
SINKHORN_ITERATIONS = 3
_REFERENCE, _LARGE = 0, 1  # random streams
_TINY = 1e-12
_ASPECT = (0.75, 1.33)  # of crops, TensorFlow's default
_TRUNCATED_STD = 0.87962566103423978  # of a standard normal that is cut at two standard deviations


@settings
class LOCAConfig(MethodConfig):
    """Settings of LOCA; defaults are the values of the released preset for ViT-B."""

    name: str = "loca"
    num_small_queries: Few = 9
    """Small query views, in addition to the large one."""
    small_size: ImageSize | None = None
    """Pixels of a small query. None: three sevenths of the reference, rounded up to a multiple of the patch size."""
    blur: Literal["released", "intended"] = "released"
    """``released``: no blur, because the preset's blur has a kernel of one pixel (parity). ``intended``: probability 1
    for the reference, 0.5 for small queries, 0.1 for the large one, sigma 0.1 to 2 pixels."""
    reference_keep_ratio: PositiveRatio = 0.2
    """Fraction of the reference's patches that queries can attend to: ``int(N * ratio)`` consecutive ones in raster
    order."""
    cluster: bool = True
    """Add the cluster loss and its teacher. ``false`` is the code's position-only variant: the student also encodes the
    kept patches of the reference, and queries have no positions."""
    num_prototypes: Count = 4096
    """K."""
    hidden_dim: Width = 2048
    """Width of the projection head's hidden layers."""
    bottleneck_dim: Width = 256
    """Width of the unit vectors before the prototypes."""
    momentum: Ratio = 0.996
    """Teacher momentum at the start; it rises to 1 along a half cosine."""


def position_loss(logits: Float[Tensor, "B Q K"], labels: Int[Tensor, "B Q"]) -> Float[Tensor, ""]:
    """Cross-entropy over the reference's cells: mean over the labelled tokens of all processes.

    Args:
        logits: any float type; compared in float32.
        labels: -1 for tokens outside the reference, which don't count.
    """
    cost = F.cross_entropy(at_least_float32(logits).mT, labels.clamp(min=0), reduction="none")
    return weighted_mean(cost, (labels >= 0).float())


def cluster_loss(
    student: Float[Tensor, "B Q K"], target: Float[Tensor, "B N K"], cells: Int[Tensor, "B Q"]
) -> Float[Tensor, ""]:
    """Cross-entropy between a query token's prototypes and those of the reference patch that contains it.

    Args:
        student: log-probabilities.
        target: the teacher's assignments of all patches of the reference.
        cells: indices into the reference's patches, -1 for tokens outside, which don't count.
    """
    chosen = target.gather(1, cells.clamp(min=0)[..., None].expand(-1, -1, target.shape[-1]))
    return weighted_mean(-(chosen * student).sum(-1), (cells >= 0).float())


def me_max(student: Float[Tensor, "B Q K"]) -> Float[Tensor, ""]:
    """Negative entropy of the mean assignment over all query tokens of all processes: ``sum(p log p)``. Its minimum,
    ``-log K``, is reached when all prototypes are used equally.

    Args:
        student: log-probabilities.
    """
    mean = mean_over_processes(student.exp().mean((0, 1)))
    return (mean * mean.clamp(min=_TINY).log()).sum()


def init_transformer(module: nn.Module) -> None:
    """The released code's initialisation of blocks: Xavier uniform for linear layers (queries, keys and values as
    separate matrices), biases 0, or normal 1e-6 in MLPs."""
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
            images: of views, not normalised.
            ids_keep: which patches; None: all.
            positions: use positional embeddings and rotary positions.
        """
        encoder = self.encoder
        tokens, grid = encoder.embed_patches(encoder.normalize(images), ids_keep)
        sequence = encoder.assemble(tokens, encoder.positions(grid) if positions else None, ids_keep)
        places = Places(grid, ids_keep) if positions else None
        return encoder.forward_tokens(sequence, places=places)[:, encoder.num_prefix_tokens :]

    def logits(self, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B L K"]:
        """Cosine similarities to the prototypes."""
        assert self.head is not None and self.prototypes is not None, "cluster=False"
        return self.prototypes(self.head(tokens))


@register("loca")
class LOCA(EncoderMethod):
    """Query tokens attend to a few patches of a reference view and predict their position and cluster in it."""

    Config = LOCAConfig
    title = "predicts positions and cluster assignments of query patches in a reference view"
    paper = "Caron et al. 2022, arXiv:2212.02400"
    hides_positions = True
    export_network = "student"
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        "position_accuracy": LogColumn(
            "Position accuracy", "Fraction of query patches whose position is predicted correctly; higher is better."
        ),
        "labelled_ratio": LogColumn(
            "Labelled queries", "Fraction of query patches inside the reference view, which have a position there."
        ),
        "target_entropy": LogColumn(
            "Entropy of targets", "Mean entropy of the cluster targets in nats; at 0 each patch belongs to one cluster."
        ),
        "prototype_usage_entropy": LogColumn(
            "Entropy of prototype usage",
            "Entropy of the mean assignment in nats; at ln(prototypes) all are used equally, near 0 it has collapsed.",
        ),
    }
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
            if encoder.vit.pos_embed is not None:
                nn.init.normal_(encoder.vit.pos_embed, std=encoder.embed_dim**-0.5)
            init_transformer(encoder.vit)
            lecun_normal_(encoder.vit.patch_embed.proj.weight)
            if encoder.vit.patch_embed.proj.bias is not None:
                nn.init.zeros_(encoder.vit.patch_embed.proj.bias)
        self.head_grid = encoder.check_size(*encoder.img_size)
        """Grid of the position classes: the encoder's native one."""
        self.student = EncoderWithClusters(encoder, config)
        self.teacher: Teacher[EncoderWithClusters] | None = Teacher(self.student) if config.cluster else None
        self.relative = CrossAttentionBlock(encoder.embed_dim, encoder.num_heads)
        self.norm = nn.LayerNorm(encoder.embed_dim, eps=1e-6)
        self.position_head = nn.Linear(encoder.embed_dim, self.head_grid[0] * self.head_grid[1])
        init_transformer(self.relative)
        lecun_normal_(self.position_head.weight)
        nn.init.zeros_(self.position_head.bias)

    def make_views(self, image_size: int) -> MultiCrop:
        """A reference (never flipped), a large query and small queries, with colour jitter."""
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
            (1, image_size, LARGE_SCALE, 0.0, blurs[0], 0.0),
            (1, image_size, LARGE_SCALE, 0.5, blurs[1], 0.2),
            (config.num_small_queries, small, SMALL_SCALE, 0.5, blurs[2], 0.0),
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
        """Loss terms ``position`` and, with the cluster loss, ``cluster`` and ``me_max``."""
        config, batch = self.config, views.batch_size
        key = step_key(progress, views.keys.device)  # all images of a step keep the same tokens
        reference_grid = self.student.encoder.check_size(*views.global_crops.shape[-2:])
        kept = self._draw_reference(key, reference_grid[0] * reference_grid[1]).expand(batch, -1)
        if self.teacher is not None:
            reference, reference_logits = self.teacher(views.global_crops)
            visible = reference.gather(1, kept[..., None].expand(-1, -1, reference.shape[-1]))  # late drop
        else:
            visible = self.student.encode(views.global_crops, kept)  # early drop

        queries, cells, labels = self._queries(views, key, reference_grid)
        logits = self.position_head(self.norm(self.relative(queries, visible)))
        losses = {"position": position_loss(logits, labels)}
        with torch.no_grad():
            correct = (logits.argmax(-1) == labels).float()
            self.observations = {
                "position_accuracy": weighted_mean(correct, (labels >= 0).float()),
                "labelled_ratio": (labels >= 0).float().mean(),
            }
        if self.teacher is not None:
            student = (at_least_float32(self.student.logits(queries)) / STUDENT_TEMP).log_softmax(-1)
            target = sinkhorn(
                reference_logits.flatten(0, 1), TEACHER_TEMP, SINKHORN_ITERATIONS, softmax_first=True
            ).reshape(batch, -1, config.num_prototypes)
            losses["cluster"] = cluster_loss(student, target, cells)
            losses["me_max"] = me_max(student)
            self.observations |= {
                "target_entropy": torch.special.entr(target).sum(-1).mean(),
                "prototype_usage_entropy": -losses["me_max"].detach(),
            }
        return losses

    def couplings(self) -> dict[str, bool]:
        """Cluster targets and their entropy are batch statistics; so is the mean over labelled tokens."""
        clusters = self.config.cluster
        return {"Sinkhorn-Knopp": clusters, "mean-entropy maximisation": clusters, "the mean over all tokens": True}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Update the teacher, cluster head included."""
        if self.teacher is not None:
            self.teacher.update(self.student, cosine_momentum(self.config.momentum, progress))

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """The uniform guess over cells."""
        return uniform_guess(row, "position", self.position_head.out_features, "cells")

    def networks(self) -> dict[str, Encoder]:
        """The student, which is exported, and the teacher if there is one."""
        networks = {"student": self.student.encoder}
        return networks if self.teacher is None else {**networks, "teacher": self.teacher.module.encoder}

    def _queries(
        self, views: Views, key: Int[Tensor, " 1"], reference_grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "B Q D"], Int[Tensor, "B Q"], Int[Tensor, "B Q"]]:
        """Tokens of all queries, and their cells in the reference's grid and the head's (-1: none)."""
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
                ids_keep = self._draw_large(key, grid[0] * grid[1]).expand(batch, -1)
                found = [cells.gather(2, ids_keep[None]) for cells in found]
            tokens = self.student.encode(crops, ids_keep, positions=self.config.cluster)
            # (V, B, n, ...) -> (B, V * n, ...): one sequence per image
            parts.append(
                [x.transpose(0, 1).flatten(1, 2) for x in (tokens.reshape(-1, batch, *tokens.shape[1:]), *found)]
            )
            first = here.stop
        queries, cells, labels = (torch.cat(kind, dim=1) for kind in zip(*parts, strict=True))
        return queries, cells, labels

    def _draw_reference(self, key: Int[Tensor, " S"], num_patches: int) -> Int[Tensor, "S R"]:
        """Indices of consecutive reference patches, from a random start."""
        number = int(num_patches * self.config.reference_keep_ratio)
        if not number:
            raise ConfigError(
                f"method.reference_keep_ratio={self.config.reference_keep_ratio} keeps 0 of {num_patches} patches; "
                "raise it"
            )
        start = sample_uniform(key, 1, _REFERENCE) * (num_patches - number + 1)
        return start.long() + torch.arange(number, device=key.device)

    def _draw_large(self, key: Int[Tensor, " S"], num_patches: int) -> Int[Tensor, "S L"]:
        """Indices of random patches of the large query."""
        number = max(1, round(num_patches * QUERY_KEEP_RATIO))
        return random_mask(sample_uniform(key, num_patches, _LARGE), number)[0]


def _check(config: LOCAConfig, encoder: Encoder) -> None:
    """Refuse settings that cannot be used."""
    if encoder.vit.pos_embed is None and not encoder.is_rotary:
        raise ConfigError(
            f"{encoder.name} has no positional embeddings, which LOCA needs for the reference; use another encoder"
        )
