"""PART: relative composition of off-grid patches.

Paper: Ayoughi et al., "How PARTs assemble into wholes: Learning the relative composition of images", 2025,
arXiv:2506.03682. We had its abstract and public summaries, not its full text. What they leave open follows the released
code; where that is silent, too, the choice is ours. ``docs/methods/part.md`` lists the source of each choice.
Letters: B images, V views, N patches, D embed_dim, K pairs, C channels of a target, A axes, E = 2*A numbers per box. In
a pair (i, j), i is the reference patch.
Differs from the released code: offsets in the scale mode keep their fractions; size targets are log ratios by default;
the pairs of a step are derived from training progress, so all processes use the same ones; augmentation is crop, flip
and colour jitter, without RandAugment. Signals are images of one row: patches are sampled along time only, with all
channels together, and there is one offset.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import NumHeads, Ratio, RatioBelowOne, Width, settings
from smalti.data.color import ColorConfig
from smalti.data.crops import MultiCrop, ViewSpec
from smalti.data.signals.signal_views import SignalViews
from smalti.data.views import ViewMaker, Views
from smalti.errors import ConfigError
from smalti.functional.masking import random_mask
from smalti.functional.offgrid import NUM_WHOLES, Patches, PatchSampler
from smalti.functional.pairs import (
    gather_pairs,
    offset_units,
    r_squared,
    relative_angles,
    relative_offsets,
    relative_sizes,
    select_pairs,
    turn_offsets,
)
from smalti.functional.positions import sincos_at, sincos_positions
from smalti.functional.precision import at_least_float32
from smalti.functional.random import fork_keys, sample_uniform, step_key
from smalti.functional.transfer import move
from smalti.layers.heads import ProjectionHead
from smalti.layers.relative_encoder import DifferenceHead, PairwiseLinear, RelativeEncoder
from smalti.methods.base import EncoderMethod, MethodConfig, Reference, refuse_changed, register
from smalti.models.encoder import Encoder

COLOR_JITTER = 0.4
"""Strength of brightness, contrast and saturation jitter; the released code's."""
HALF_OF_PAIRS_UP_TO = 100
"""Default K: half of all pairs up to this many patches, an eighth above: 2048 for 64 patches, 4802 for 196."""
SIZES_AFTER = 0.2
"""Fraction of training after which ``weighting=schedule`` adds the size loss."""
LEAST_VARIANCE = 1e-3
VARIANCE_MOMENTUM = 0.99
CONTRASTIVE_TEMP = 0.2
CONTRASTIVE_DIM = 128
_MASK = 32  # random stream of a sample
_OFFSETS, _SIZES, _ANGLES = ("x", "y", "time"), ("width", "height", "duration"), ("cos", "sin")


@settings
class PARTConfig(MethodConfig):
    """Settings of PART; defaults are the values of the paper or its code where they are known."""

    name: str = "part"
    sampling: Literal["grid", "offgrid", "offgrid_scale", "nonoverlapping", "saliency", "hierarchical"] = "offgrid"
    """How patches are sampled: ``grid`` takes the cells of the grid in random order, ``offgrid`` any position (the
    paper's), ``offgrid_scale`` random sizes and aspect ratios, ``nonoverlapping`` positions that don't overlap,
    ``saliency`` positions with large gradients, ``hierarchical`` large boxes and patches inside them. The paper
    compares the first three; the others test whether overlap and content matter."""
    num_patches: int | None = None
    """N. None: as many as the grid has, a third of that for ``nonoverlapping``."""
    subpixel: bool = False
    """Sample positions in continuous space, as the paper describes it; the released code uses whole pixels."""
    sides: tuple[int, int] | None = None
    """Smallest and largest side in pixels. ``offgrid_scale``: None takes half and twice the patch size; the released
    code's CIFAR sweep varies it. ``hierarchical``, for the large boxes: None takes a quarter and half of the image."""
    size_distribution: Literal["official", "log_uniform"] = "official"
    """``offgrid_scale``: distribution of sides. The released code's favours small ones; ``log_uniform`` tests that."""
    resample: Literal["bilinear", "nearest"] = "bilinear"
    """Interpolation where patches are resized. ``nearest``, without antialiasing, measures how much the interpolation
    itself reveals of a patch's size (``smalti probe``)."""
    max_angle: Annotated[float, Field(ge=0, le=180)] = 0.0
    """``offgrid``: largest rotation of a patch in degrees, 0..180. An open question: can rotation be learned, too?"""
    angles: Literal["continuous", "quad"] = "continuous"
    """``quad`` rotates by multiples of 90 degrees, whatever ``max_angle``, so that no pixel is interpolated."""
    supervise_angles: bool = True
    """Rotated patches: also predict the cosine and sine of the angle between two patches. ``false`` separates the
    effect of rotated inputs from that of the target."""
    frame: Literal["image", "patch"] = "image"
    """Rotated patches: axes of the offsets, those of the image or of the reference patch."""
    positions: Literal["none", "sincos"] = "none"
    """``sincos`` gives the encoder the position of each patch, which makes the task trivial: a control for the leak
    probes of ``smalti probe``."""
    key_mask_ratio: RatioBelowOne = 0.0
    """Fraction of patches, in [0, 1), that no patch can attend to; the loss covers all. Official code's option (0.5 in
    its early grid runs, after MP3); kept for parity."""
    head: Literal["cross_attention", "pairwise_linear", "difference"] = "cross_attention"
    """Prediction head: the paper's relative encoder, one linear layer (the paper's baseline and the head of the public
    checkpoint), or the difference of two predicted positions (a reference that is antisymmetric by construction)."""
    query: Literal["patch_cat", "positional"] = "patch_cat"
    """``cross_attention``: query from the two tokens of a pair (the paper's), or fixed codes of their indices (the
    released code's default; kept for parity)."""
    head_num_heads: NumHeads = 1
    """``cross_attention``: number of attention heads; the released code has 1."""
    head_dim: Width | None = None
    """``cross_attention``: width to which the head projects the tokens first; None: the encoder's, without a
    projection."""
    head_residual: bool = False
    """``cross_attention``: add the query to the output of attention; short runs need it (docs/evidence/part.md)."""
    head_norm: bool = False
    """``cross_attention``: layer norms before attention; short runs need it (docs/evidence/part.md)."""
    head_mlp: bool = False
    """``cross_attention``: an MLP after attention, for the ablation of relative encoders."""
    num_pairs: int | None = None
    """K. None: half of all pairs for up to 100 patches (the paper's best), an eighth above (the code's)."""
    replacement: bool = False
    """Sample pairs with replacement. Official code's default for the linear head; kept for parity."""
    normalize: Literal["patch", "image"] = "patch"
    """Unit of offsets: the side of the reference patch (the paper's) or of the image (EEG)."""
    scale_target: Literal["log_ratio", "ratio"] = "log_ratio"
    """Size target where patches differ in size. ``ratio`` is the released code's; kept for parity."""
    loss: Literal["mse", "huber"] = "mse"
    """Regression loss; ``huber`` (linear above 1) is an open question for the size targets."""
    weighting: Literal["fixed", "variance", "uncertainty", "schedule"] = "fixed"
    """Weights of offsets, sizes and angles, an open question of the scale mode: equal (the code's), by the running
    variance of the targets, by a learned variance, or without sizes for the first fifth of training."""
    contrastive: float = 0.0
    """Weight of InfoNCE between the class tokens of two views (0: one view). An open question: the offset loss alone
    trains the class token only through attention."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a fraction of the image."""
    flip_prob: Ratio = 0.5
    """Probability of a horizontal flip, in 0..1."""


class Target(NamedTuple):
    """Regression targets of pairs."""

    values: Float[Tensor, "B K C"]
    units: Float[Tensor, "B K A"]
    """Pixels per unit of an offset."""


def pair_loss(
    prediction: Float[Tensor, "B K C"], target: Float[Tensor, "B K C"], loss: str = "mse"
) -> Float[Tensor, " C"]:
    """Mean error of each channel over images and pairs, in float32.

    Args:
        prediction: any float type.
        target: the same shape.
        loss: ``mse`` or ``huber`` (linear above 1).
    """
    error = at_least_float32(prediction) - at_least_float32(target)
    if loss == "mse":
        return error.square().mean((0, 1))
    return F.huber_loss(error, torch.zeros_like(error), reduction="none").mean((0, 1))


def info_nce(first: Float[Tensor, "B D"], second: Float[Tensor, "B D"], temp: float) -> Float[Tensor, ""]:
    """InfoNCE between two views of a batch, symmetric, of unit vectors.

    Source: van den Oord et al., arXiv:1807.03748v2, Eq. (4), in the symmetric form of Radford et al., arXiv:2103.00020.
    """
    with torch.autocast(first.device.type, enabled=False):  # float32: cosines are divided by a small temperature
        logits = at_least_float32(first) @ at_least_float32(second).T / temp
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@register("part")
class PART(EncoderMethod):
    """Encode patches without positions; for pairs of patches, regress the offset of one from the other."""

    Config = PARTConfig
    title = "predicts relative offsets between off-grid patches, without positional embeddings"
    paper = "Ayoughi et al. 2025, arXiv:2506.03682"
    hides_positions = True
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        "r2": LogColumn(
            "R² of offsets", "Fraction of the variance of offsets that is explained; 0 is chance, 1 is exact."
        ),
        "mean_predictor_mse": LogColumn(
            "Error of the mean offset",
            "Mean squared error of always predicting the mean offset; the method must get below it.",
        ),
        **{
            f"r2_{name}": LogColumn(
                f"R² of {name}", f"Fraction of the variance of {name} that is explained; 0 is chance, 1 is exact."
            )
            for name in (*_OFFSETS, *_SIZES, *_ANGLES)
        },
        **{
            f"r2_{pair}": LogColumn(
                f"R² of {text} pairs",
                f"Fraction of the variance of offsets that is explained in {text} pairs; 0 is chance, 1 is exact.",
            )
            for pair, text in (("whole_whole", "whole-whole"), ("part_whole", "part-whole"), ("part_part", "part-part"))
        },
    }
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "base_lr": 5e-4,
            "betas": [0.9, 0.999],
            "weight_decay": 0.05,
            "warmup_ratio": 0.1,
            "min_lr": 1e-5,
            "clip_norm": None,
        },
        "drop_path": 0.1,
    }

    no_weight_decay = ("cls_token",)  # as in the released code, which is DeiT's
    takes_signals: ClassVar[bool] = True
    signal_defaults: ClassVar[dict[str, Any]] = {
        "method": {
            "normalize": "image"
        },  # in units of a patch of half a second, offsets would have a variance of hundreds
        "optim": {"base_lr": 2.5e-4, "warmup_ratio": 0.05, "min_lr": 0.0},
        "drop_path": 0.0,
    }

    target_variance: Tensor
    """``(C,)`` running variance, with ``weighting=variance``."""

    def __init__(self, encoder: Encoder, config: PARTConfig) -> None:
        super().__init__(encoder, config)
        _check(config, encoder)
        self.encoder = encoder
        self.is_signal = encoder.takes_signals
        self.sampler = PatchSampler(
            encoder.patch_size[1:] if self.is_signal else encoder.patch_size,
            config.sampling,
            num_patches=config.num_patches,
            subpixel=config.subpixel,
            sides=config.sides,
            size_distribution=config.size_distribution,
            max_angle=math.radians(config.max_angle) if config.angles == "continuous" else 0.0,
            quarters=config.angles == "quad",
            mode=config.resample,
        )
        self.is_turned = config.angles == "quad" or config.max_angle > 0
        self.channels = _channels(self.sampler.has_sizes, self.is_turned and config.supervise_angles, self.is_signal)
        self.head = _make_head(config, encoder.embed_dim, len(self.channels))
        self.log_variance = nn.Parameter(torch.zeros(len(self.channels))) if config.weighting == "uncertainty" else None
        if config.weighting == "variance":
            self.register_buffer("target_variance", torch.ones(len(self.channels)))
        self._variance_now: Tensor | None = None
        self.projection = (
            ProjectionHead(encoder.embed_dim, encoder.embed_dim, CONTRASTIVE_DIM) if config.contrastive else None
        )
        encoder.draw_class_token()
        self._set_positions()

    @property
    def num_views(self) -> int:
        """V: two for the contrastive term, else one."""
        return 2 if self.config.contrastive else 1

    def make_views(self, image_size: int) -> ViewMaker:
        """Random resized crops, flips and colour jitter. No padding and no rotation: their borders would reveal
        positions. For signals: channel dropout and amplitude jitter."""
        if self.is_signal:
            return SignalViews(count=self.num_views)
        color = ColorConfig(
            brightness=COLOR_JITTER,
            contrast=COLOR_JITTER,
            saturation=COLOR_JITTER,
            hue=0.0,
            jitter_prob=1.0,
            gray_prob=0.0,
        )
        return MultiCrop(
            [
                ViewSpec(
                    count=self.num_views,
                    size=image_size,
                    scale=self.config.crop_scale,
                    flip_prob=self.config.flip_prob,
                    color=color,
                )
            ]
        )

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss terms: ``offsets``, and ``sizes``, ``angles`` and ``contrastive`` where the settings add them."""
        config = self.config
        images = self.encoder.normalize(views.global_crops)  # (V * B, C, S, S)
        keys = torch.cat([fork_keys(views.keys, view) for view in range(self.num_views)])
        source = images.squeeze(-2) if self.is_signal else images  # (V * B, C, T) of signals
        patches = self.sampler(keys, source)
        tokens, prefix = self.encode(patches, keys)
        pairs = self.draw_pairs(tokens.shape[1], progress, tokens.device)
        target = self.target(patches, pairs, source.shape[2:])
        prediction = at_least_float32(self.head(tokens, pairs))

        errors = pair_loss(prediction, target.values, config.loss) * self.num_views  # summed over views
        losses = self._weigh(errors, target.values, progress)
        if self.projection is not None:
            first, second = self.projection(prefix[:, 0]).chunk(2)
            losses["contrastive"] = config.contrastive * info_nce(first, second, CONTRASTIVE_TEMP)
        self._observe(prediction.detach(), target.values, pairs)
        return losses

    def encode(self, patches: Patches, keys: Int[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        """``(B, N, D)`` tokens of the patches after the final norm, and ``(B, R, D)`` prefix tokens.

        Args:
            patches: from the sampler, of normalised images.
            keys: ``(B,)`` seeds of the samples, for key masking in training.
        """
        tokens = self.encoder.embed_crops(patches.pixels.unsqueeze(-2) if self.is_signal else patches.pixels)
        if self.config.positions == "sincos":
            tokens = tokens + self._box_code(patches.boxes).to(tokens.dtype)
        num_prefix, is_key = self.encoder.num_prefix_tokens, None
        if self.config.key_mask_ratio and self.training:
            num_patches = tokens.shape[1]
            num_keep = int(num_patches * (1 - self.config.key_mask_ratio))
            _, mask, _ = random_mask(sample_uniform(keys, num_patches, _MASK), num_keep)
            is_key = F.pad(~mask, (num_prefix, 0), value=True)  # prefix tokens are never masked
        sequence = self.encoder.forward_tokens(self.encoder.assemble(tokens, None), is_key)
        return sequence[:, num_prefix:], sequence[:, :num_prefix]

    def draw_pairs(self, num_patches: int, progress: float, device: torch.device) -> Int[Tensor, "1 K 2"]:
        """The pairs of a step, shared by all images and all processes: drawn from the progress of training."""
        return select_pairs(
            step_key(progress, device), num_patches, self.num_pairs(num_patches), replacement=self.config.replacement
        )

    def num_pairs(self, num_patches: int) -> int:
        """K for images of N patches."""
        if self.config.num_pairs is not None:
            return self.config.num_pairs
        return max(1, round(num_patches**2 / (2 if num_patches <= HALF_OF_PAIRS_UP_TO else 8)))

    @torch.no_grad()
    def target(self, patches: Patches, pairs: Int[Tensor, "1 K 2"], size: tuple[int, ...]) -> Target:
        """Targets of pairs in float32: offsets, then sizes, then angles, in the order of :attr:`channels`.

        Args:
            patches: from the sampler; only boxes and angles are used.
            pairs: from :meth:`draw_pairs`.
            size: ``(H, W)`` of the images, or ``(T,)`` of signals.
        """
        config, boxes = self.config, patches.boxes.float()
        units = offset_units(boxes, pairs, config.normalize, tuple(size))
        offsets = relative_offsets(boxes, pairs, units)
        if patches.angles is not None and config.frame == "patch":
            offsets = turn_offsets(offsets, -gather_pairs(patches.angles, pairs)[0])
        values = [offsets]
        if self.sampler.has_sizes:
            values.append(relative_sizes(boxes, pairs, config.scale_target == "log_ratio"))
        if patches.angles is not None and config.supervise_angles:
            values.append(relative_angles(patches.angles, pairs))
        return Target(torch.cat(values, dim=-1), units)

    def pixel_offsets(
        self, prediction: Float[Tensor, "B K C"], patches: Patches, pairs: Int[Tensor, "1 K 2"], units: Tensor
    ) -> Float[Tensor, "B K A"]:
        """Offsets of a prediction or target in pixels, along the axes of the image."""
        offsets = prediction[..., : units.shape[-1]]
        if patches.angles is not None and self.config.frame == "patch":
            offsets = turn_offsets(offsets, gather_pairs(patches.angles, pairs)[0])
        return offsets * units

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """Predicts the mean offset of all pairs."""
        if not {"r2", "mean_predictor_mse"} <= row.keys():
            return None
        constant = row["mean_predictor_mse"]
        value = (1 - row["r2"]) * constant
        return Reference("the mean squared error of offsets", value, constant, "the mean offset of all pairs")

    def couplings(self) -> dict[str, bool]:
        """The contrastive term compares images; the variance of targets is a batch statistic."""
        config = self.config
        return {"the contrastive term": config.contrastive > 0, "weighting=variance": config.weighting == "variance"}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Update the running variance of the targets, over all processes."""
        if self.config.weighting != "variance" or self._variance_now is None:
            return
        variance = self._variance_now
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(variance)
            variance /= torch.distributed.get_world_size()
        self.target_variance.lerp_(variance, 1 - VARIANCE_MOMENTUM)

    def networks(self) -> dict[str, Encoder]:
        """The encoder; its position table stays zero until fine-tuning replaces it."""
        return {"encoder": self.encoder}

    def _weigh(self, errors: Float[Tensor, " C"], target: Float[Tensor, "B K C"], progress: float) -> dict[str, Tensor]:
        """Loss terms whose sum is the weighted mean of the channels' errors."""
        config, weights = self.config, errors.new_ones(len(self.channels))
        if config.weighting == "variance":
            self._variance_now = target.flatten(0, 1).var(0)
            errors = errors / self.target_variance.clamp(min=LEAST_VARIANCE)
        elif self.log_variance is not None:
            errors = errors * torch.exp(-self.log_variance) + self.log_variance
        elif config.weighting == "schedule" and progress < SIZES_AFTER:
            weights = weights * move(torch.tensor([name not in _SIZES for name in self.channels]), weights.device)
        weighted = errors * weights / len(self.channels)
        groups = {"offsets": _OFFSETS, "sizes": _SIZES, "angles": _ANGLES}
        members = {
            term: [self.channels.index(n) for n in names if n in self.channels] for term, names in groups.items()
        }
        # one by one: indexing with a list copies it to the device, and the CPU waits for that
        return {term: torch.stack([weighted[i] for i in places]).sum() for term, places in members.items() if places}

    @torch.no_grad()
    def _observe(self, prediction: Tensor, target: Tensor, pairs: Tensor) -> None:
        """``r2`` of the offsets and of each channel; ``mean_predictor_mse``: the offsets' variance, the MSE of the best
        constant."""
        scores, axes = r_squared(prediction, target), len(self.sampler.patch_size)
        floor = target[..., :axes].flatten(0, 1).var(0, correction=0).mean()
        self.observations = {"r2": scores[:axes].mean(), "mean_predictor_mse": floor}
        self.observations |= {f"r2_{name}": score for name, score in zip(self.channels, scores.unbind(), strict=True)}
        if self.config.sampling == "hierarchical":
            is_whole = pairs[0] < NUM_WHOLES  # (K, 2)
            for name, number in (("whole_whole", 2), ("part_whole", 1), ("part_part", 0)):
                chosen = is_whole.sum(-1) == number
                errors = (prediction - target)[..., :axes].square() * chosen[:, None]
                spread = (target - target.mean((0, 1)))[..., :axes].square() * chosen[:, None]
                self.observations[f"r2_{name}"] = 1 - errors.sum() / spread.sum()

    def _box_code(self, boxes: Float[Tensor, "B N E"]) -> Float[Tensor, "B N D"]:
        """Sine-cosine embedding of box centres in units of the patch size; on the grid, that of the cell."""
        ph, pw = self.encoder.patch_size
        if self.is_signal:  # an image of one row
            start, end = boxes.unbind(-1)
            boxes = torch.stack([start, torch.zeros_like(start), end, torch.ones_like(end)], dim=-1)
        centres = (boxes[..., :2] + boxes[..., 2:]) / 2
        return sincos_at(centres / move(torch.tensor([pw, ph]), boxes.device) - 0.5, self.encoder.embed_dim)

    @torch.no_grad()
    def _set_positions(self) -> None:
        """Fill the encoder's position table, which only whole images use: zeros, or the control's sine-cosine code."""
        encoder, table = self.encoder, self.encoder.vit.pos_embed
        encoder.drop_positions()
        if table is None:
            return
        table.requires_grad_(False)
        if self.config.positions == "sincos":
            code = sincos_positions(encoder.embed_dim, encoder.vit.patch_embed.grid_size)
            table[:, -len(code) :] = code
            encoder.position_free, encoder.fixed_positions = False, True


def _channels(has_sizes: bool, has_angles: bool, is_signal: bool = False) -> tuple[str, ...]:
    """Names of the target channels: two offsets and two sizes for images, one of each for signals."""
    axes = slice(2, None) if is_signal else slice(2)
    return (*_OFFSETS[axes], *(_SIZES[axes] if has_sizes else ()), *(_ANGLES if has_angles else ()))


def _make_head(config: PARTConfig, dim: int, num_outputs: int) -> nn.Module:
    if config.head == "cross_attention":
        return RelativeEncoder(
            dim,
            num_outputs,
            config.head_num_heads,
            config.query,
            config.head_residual,
            config.head_norm,
            config.head_mlp,
            config.head_dim,
        )
    heads = {"pairwise_linear": PairwiseLinear, "difference": DifferenceHead}
    return heads[config.head](dim, num_outputs)


def _check(config: PARTConfig, encoder: Encoder) -> None:
    """Refuse settings that don't fit together.

    Raises:
        ConfigError: names the settings.
    """
    if encoder.takes_signals:
        refuse_changed(config, ("crop_scale", "flip_prob"), "applies to images, but the data are signals")
    if config.angles == "quad" and config.max_angle:
        raise ConfigError("method.angles=quad rotates by multiples of 90 degrees; leave max_angle out")
    if config.weighting == "schedule" and config.sampling not in ("offgrid_scale", "hierarchical"):
        raise ConfigError(
            "method.weighting=schedule delays the size loss, which only sampling=offgrid_scale and hierarchical have"
        )
    if config.head == "difference" and (
        (config.sampling in ("offgrid_scale", "hierarchical") and config.scale_target == "ratio")
        or ((config.max_angle or config.angles == "quad") and config.supervise_angles)
    ):
        raise ConfigError(
            "method.head=difference cannot predict size ratios or angles; use scale_target=log_ratio or another head"
        )
    if config.contrastive and not encoder.has_class_token:
        raise ConfigError("method.contrastive compares class tokens, but this encoder has none")
    if config.contrastive < 0:
        raise ConfigError(f"method.contrastive={config.contrastive:g}: a weight of at least 0 is needed")
