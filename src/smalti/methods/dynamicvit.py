"""DynamicViT: image classification by a network that learns which tokens it can drop, stage by stage.

Paper: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021,
arXiv:2106.02034v2, Sec. 3.2 to 3.4, and the released code.
Letters: B images, N patches, R prefix tokens, T = R + N, H heads, D embed_dim, K classes, S stages, rho the keep ratio.
Differs from both: the distillation of tokens is a mean over the kept tokens of an image, then over images (theirs: over
all kept tokens of the batch); the softmax has no epsilon; class token and positions are trained; the learning rate of
the pretrained network follows the same schedule as that of the prediction modules, a hundredth of it (theirs: nearly
constant). The views are those of ``supervised``. Prediction modules and inference: :mod:`smalti.layers.token_pruning`,
:mod:`smalti.models.pruning`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import NonNegative, PositiveRatio, settings
from smalti.data.dataset import Dataset
from smalti.data.views import Views
from smalti.errors import ConfigError, DataError
from smalti.functional.precision import at_least_float32
from smalti.functional.random import sample_uniform
from smalti.layers.gaussian_bias import Places
from smalti.layers.token_pruning import PredictionModule, TokenPruning, stage_blocks
from smalti.methods.base import register
from smalti.methods.supervised import Supervised, SupervisedConfig
from smalti.methods.teacher import Teacher
from smalti.models.encoder import Encoder
from smalti.models.pooling import PatchFeatures, pool_features

_DECISIONS = 41
"""Random stream of the first stage's decisions; further stages have the following ones."""


@settings
class DynamicViTConfig(SupervisedConfig):
    """Settings of DynamicViT; views, mixing and label smoothing are those of ``supervised``."""

    name: str = "dynamicvit"
    keep_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """rho: stage s keeps rho^s of the patches; with 0.7 these are 70, 49 and 34 %."""
    ratio_weight: NonNegative = 2.0
    """Weight of the ratio loss."""
    distill: bool = True
    """With ``init``: keep a copy of the classifier that training starts from as teacher. Without ``init`` there is
    none."""
    kl_weight: NonNegative = 0.5
    """Weight of the KL divergence from the teacher's classes."""
    distill_weight: NonNegative = 0.5
    """Weight of the distillation of the kept patch tokens."""
    encoder_lr_scale: PositiveRatio = 0.01
    """With ``init``: learning rate of the network, as a fraction of that of the prediction modules."""


def gumbel_keep(log_probs: Float[Tensor, "B N 2"], uniform: Float[Tensor, "B N 2"]) -> Float[Tensor, "B N"]:
    """D: 1 for tokens to keep and 0 for the others, sampled; its gradient is that of the probability of keeping.

    Straight-through Gumbel-softmax with temperature 1.

    Args:
        log_probs: of dropping and keeping.
        uniform: random numbers, above 0 and below 1.

    Source: Sec. 3.2; Jang et al., arXiv:1611.01144v5, Sec. 2.2 (straight-through).
    """
    noise = -(-uniform.log()).log()
    soft = (log_probs + noise.to(log_probs.dtype)).softmax(-1)[..., 1]
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())  # the bracket is exactly 0


def masked_softmax(logits: Float[Tensor, "B H T T"], keep: Float[Tensor, "B T"]) -> Float[Tensor, "B H T T"]:
    """Attention weights ``exp(P_ij) G_ij / sum_k exp(P_ik) G_ik`` with ``G_ij = keep_j``, ``G_ii = 1``: only a dropped
    token itself attends to it. Unlike a mask of infinities, this has a gradient at ``keep = 0``.

    Args:
        logits: P, scaled products of queries (rows) and keys; computed in float32.
        keep: 1 for tokens that are kept, else 0.

    Source: Sec. 3.3.
    """
    logits = at_least_float32(logits)
    seen = keep[:, None, None, :].to(logits.dtype)  # (B, 1, 1, T)
    seen = seen + (1 - seen) * torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)  # (B, 1, T, T)
    weights = (logits - logits.amax(-1, keepdim=True).detach()).exp() * seen
    # where a dropped token's logit is so large that all others vanish, the sum would be 0
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)


def masked_block(
    block: nn.Module, x: Float[Tensor, "B T D"], keep: Float[Tensor, "B T"], places: Places, num_prefix: int
) -> Float[Tensor, "B T D"]:
    """One of timm's plain blocks, with :func:`masked_softmax`; a Gaussian bias is added to the logits, if it has one.

    Args:
        block: checked by :class:`DynamicViT`.
        x: input of the block, prefix tokens first.
        keep: 1 for tokens that are kept, else 0; prefix tokens are always kept.
        places: where the patches are.
        num_prefix: R.
    """
    part: Any = block  # nn.Module doesn't type its parts
    attn = part.attn
    qkv = attn.qkv(part.norm1(x)).reshape(*x.shape[:2], 3, attn.num_heads, -1)
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D / H) each
    queries, keys = attn.q_norm(queries), attn.k_norm(keys)
    logits = (queries * attn.scale) @ keys.mT
    if hasattr(part, "gaug"):
        logits = logits + F.pad(part.gaug(queries[:, :, num_prefix:], places), (num_prefix, 0, num_prefix, 0))
    weights = attn.attn_drop(masked_softmax(logits, keep))
    out = (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)  # (B, H, T, D / H) -> (B, T, D)
    x = x + part.drop_path1(part.ls1(attn.proj_drop(attn.proj(attn.norm(out)))))
    return x + part.drop_path2(part.ls2(part.mlp(part.norm2(x))))


class Masked(NamedTuple):
    """Result of :func:`encode_masked`."""

    features: PatchFeatures
    """All tokens, also the dropped ones."""
    decisions: tuple[Tensor, ...]
    """For each stage ``(B, N)``: 1 for tokens that are kept, else 0."""


def encode_masked(
    encoder: Encoder,
    images: Float[Tensor, "B C H W"],
    pruning: TokenPruning,
    decide: Callable[[int, Tensor], Tensor],
) -> Masked:
    """Tokens of images as in training: dropped tokens stay in the sequence, and no other token attends to them.

    Args:
        encoder: of timm's plain blocks.
        images: normalised.
        pruning: prediction modules, and the blocks before which they decide.
        decide: ``decide(s, log_probs)`` of stage s = 0..S-1 and ``(B, N, 2)`` log-probabilities: ``(B, N)`` D. What an
            earlier stage dropped stays dropped, whatever it says.
    """
    tokens, grid = encoder.embed_patches(images)
    num_prefix = encoder.num_prefix_tokens
    x = encoder.vit.norm_pre(encoder.assemble(tokens, encoder.positions(grid)))
    keep = at_least_float32(tokens).new_ones(tokens.shape[:2])
    decisions: list[Tensor] = []
    for number, block in enumerate(encoder.vit.blocks):
        if number in pruning.blocks:
            stage = len(decisions)
            keep = keep * decide(stage, pruning.predictors[stage](x[:, num_prefix:], keep))
            decisions.append(keep)
        if decisions:
            x = masked_block(block, x, F.pad(keep, (num_prefix, 0), value=1.0), Places(grid), num_prefix)
        else:
            x = encoder.run_block(block, x, Places(grid))
    x = encoder.vit.norm(x)
    return Masked(PatchFeatures(x[:, num_prefix:], x[:, :num_prefix], grid), tuple(decisions))


def ratio_loss(decisions: Sequence[Float[Tensor, "B N"]], keep_ratio: float) -> Float[Tensor, ""]:
    """Squared difference between rho^s and the fraction of tokens that stage s keeps: mean over stages and images.

    Source: Sec. 3.4 (ratio loss).
    """
    each = [(keep_ratio**stage - keep.mean(1)).square().mean() for stage, keep in enumerate(decisions, start=1)]
    return torch.stack(each).mean()


def kept_distillation(
    tokens: Float[Tensor, "B N D"], taught: Float[Tensor, "B N D"], keep: Float[Tensor, "B N"]
) -> Float[Tensor, ""]:
    """Squared difference between a token and the teacher's, mean over D, the kept tokens of an image, and images.

    Args:
        tokens: after the last block and the final norm.
        taught: the teacher's, which drops none.
        keep: the last stage's decision; has no gradient here. An image without kept tokens counts 0.

    Source: Sec. 3.4 (distillation).
    """
    keep = keep.detach()
    each = (at_least_float32(tokens) - at_least_float32(taught)).square().mean(-1)
    return ((each * keep).sum(1) / keep.sum(1).clamp(min=1)).mean()


def class_divergence(logits: Float[Tensor, "B K"], taught: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    """KL divergence of the predicted classes from the teacher's: mean over images.

    Source: Sec. 3.4; the direction is that of the released code, KL(teacher || student).
    """
    ours, theirs = (at_least_float32(values).log_softmax(-1) for values in (logits, taught))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


@register("dynamicvit")
class DynamicViT(Supervised):
    """A classifier whose prediction modules learn, with it, which patch tokens later blocks do not need."""

    Config = DynamicViTConfig
    title = "supervised classification with learned token pruning; requires labels"
    paper = "Rao et al. 2021, arXiv:2106.02034v2"
    pools_images = False
    runs_parts_of_blocks = True
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        **Supervised.log_columns,
        "kept": LogColumn("Kept patches", "Fraction of the patches that the last stage keeps; the target is rho^S."),
    }
    posttrain_defaults: ClassVar[dict[str, Any]] = {
        "optim": {"warmup_ratio": 0.0, "min_lr": 1e-5, "freeze_encoder_ratio": 0.167},
        "drop_path": 0.0,
    }

    def __init__(self, encoder: Encoder, config: DynamicViTConfig) -> None:
        super().__init__(encoder, config)
        if encoder.pool not in ("auto", "cls", "avg"):
            raise ConfigError(
                f"pool={encoder.pool}: dynamicvit classifies the class token or the mean of the kept patches; choose "
                "auto, cls or avg"
            )
        blocks = stage_blocks(encoder.depth)
        if not blocks:
            raise ConfigError(f"{encoder.name} has {encoder.depth} block; dynamicvit drops tokens between blocks")
        for block in encoder.vit.blocks:
            attn: Any = getattr(block, "attn", None)
            if type(block) is not Block or type(attn) is not Attention or getattr(attn, "gate", None) is not None:
                raise ConfigError(
                    f"{encoder.name} has blocks or attention other than timm's plain ones; dynamicvit masks attention "
                    "itself; use another encoder"
                )
        self.predictors = nn.ModuleList(PredictionModule(encoder.embed_dim) for _ in blocks)
        self.pruning = TokenPruning(blocks, config.keep_ratio, self.predictors)
        self.start = encoder.class_head
        """The classifier that training starts from; None: none, or a checkpoint will fill in all weights."""
        self.teacher: Teacher[Encoder] | None = None
        self.teacher_head: Teacher[nn.Linear] | None = None
        if config.distill and encoder.report is not None:
            self._check_start(encoder)
        if self.start is not None and self.start.weight.shape == self.head.weight.shape:
            with torch.no_grad():
                self.head.weight.copy_(self.start.weight)
                self.head.bias.copy_(self.start.bias)
        if config.distill and encoder.pretrained:
            self.teacher, self.teacher_head = Teacher(encoder), Teacher(self.head)

    def _check_start(self, encoder: Encoder) -> None:
        """Refuse initial weights that aren't a classifier of as many classes.

        Raises:
            ConfigError: names what to do.
        """
        count = 0 if self.start is None else len(self.start.weight)
        if count == self.config.num_classes:
            return
        has = f"classifies {count} classes, the data have {self.config.num_classes}" if count else "is no classifier"
        raise ConfigError(
            f"init: {encoder.source} {has}, so there is no teacher to distil from; start from a run of supervised on "
            "these classes, or set method.distill=false"
        )

    def bind(self, images: Dataset, image_size: int) -> None:
        """Store the names of the classes; the teacher's must be the same.

        Raises:
            DataError: if they aren't.
        """
        super().bind(images, image_size)
        names = self.start.classes if self.start is not None and self.teacher is not None else ()
        if names and self.classes and names != self.classes:
            ours, theirs = next(pair for pair in zip(self.classes, names, strict=True) if pair[0] != pair[1])
            raise DataError(
                f"{images.root}: has a class '{ours}' where the classifier of init has '{theirs}', so it can't be the "
                "teacher; set method.distill=false"
            )

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss terms ``class`` and ``ratio``; with a teacher also ``kl`` and ``distill``."""
        config = self.config
        images, labels, targets = self.inputs(views)

        def decide(stage: int, log_probs: Tensor) -> Tensor:
            return gumbel_keep(log_probs, self.noise(views.keys, stage, log_probs.shape[1]))

        features, decisions = encode_masked(self.encoder, images, self.pruning, decide)
        keep = decisions[-1]
        logits = self.head(self.pooled_kept(features, keep))
        losses = {
            "class": self.class_term(logits, labels, targets),
            "ratio": config.ratio_weight * ratio_loss(decisions, config.keep_ratio),
        }
        if self.teacher is not None and self.teacher_head is not None:
            with torch.no_grad():
                taught = self.teacher.module.encode(images)
                taught_logits = self.teacher_head(self.teacher.module.pooled(taught))
            losses["kl"] = config.kl_weight * class_divergence(logits, taught_logits)
            losses["distill"] = config.distill_weight * kept_distillation(features.patches, taught.patches, keep)
        self.observations = {
            "train_top1": (logits.detach().argmax(-1) == labels).float().mean(),
            "kept": keep.detach().mean(),
        }
        return losses

    def noise(self, keys: Int[Tensor, " B"], stage: int, num_patches: int) -> Float[Tensor, "B N 2"]:
        """Uniform numbers of a stage's decisions, above 0 and below 1, in float64."""
        drawn = sample_uniform(keys, 2 * num_patches, _DECISIONS + stage).double() + 2.0**-25
        return drawn.view(len(keys), num_patches, 2)

    def pooled_kept(self, features: PatchFeatures, keep: Float[Tensor, "B N"]) -> Float[Tensor, "B D"]:
        """The class token, or the mean of the kept patches, as the run's ``pool`` says."""
        if self.encoder.has_class_token and self.encoder.pool != "avg":
            return pool_features(features, "cls", True)
        weight = keep[..., None].to(features.patches.dtype)
        return (features.patches * weight).sum(1) / weight.sum(1).clamp(min=1)

    def token_pruning(self, network: str) -> TokenPruning:
        """The prediction modules."""
        return self.pruning

    def param_groups(self) -> list[dict[str, Any]]:
        """Prediction modules have the full learning rate; a network that starts from weights ``encoder_lr_scale``."""
        groups = super().param_groups()
        if not self.encoder.pretrained:
            return groups
        ours = {id(parameter) for parameter in self.predictors.parameters()}
        return [
            {
                **group,
                "params": [one for one in group["params"] if (id(one) in ours) == is_ours],
                "lr_scale": 1.0 if is_ours else self.config.encoder_lr_scale,
            }
            for group in groups
            for is_ours in (False, True)
        ]
