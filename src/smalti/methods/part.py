"""PART: relative composition of off-grid patches.

Paper: Ayoughi et al., "How PARTs assemble into wholes: Learning the relative composition of images", 2025,
arXiv:2506.03682. Its full text was not at hand: what the paper's abstract and public summaries leave open follows the
released code, and what neither says is ours; ``docs/methods/part.md`` tells which is which.
Letters: B images, V views, N patches, D embed_dim, K pairs, C channels of a target, A axes, E = 2*A numbers a box. In a
pair (i, j), i is the patch of reference.
Differs from the paper's code: offsets in the scale mode keep their fractions; sizes are log ratios by default; a weight
of a channel never changes the scale of the others; which pairs are asked follows from the progress of training, so that
all processes ask the same; views are cropped, flipped and jittered in colour, without RandAugment. Signals are images
of one row: patches are drawn along time alone, all channels together, and there is one offset.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.config import Few, NumHeads, Width, settings
from smalti.data.signals.signal_views import SignalViews
from smalti.data.views import ColorConfig, MultiCrop, ViewMaker, Views, ViewSpec
from smalti.errors import ConfigError
from smalti.functional.masking import random_mask
from smalti.functional.offgrid import Patches, PatchSampler
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
from smalti.layers.relative_encoder import DifferenceHead, PairMLP, PairwiseLinear, RelativeEncoder
from smalti.methods.base import EncoderMethod, MethodConfig, Reference, refuse_changed, register
from smalti.models.encoder import Encoder

ALL_PAIRS_BELOW = 100
"""Up to so many patches half of all pairs are asked, above it an eighth: 2048 of 64 patches, 4802 of 196."""
SIZES_AFTER = 0.2
"""Share of training after which ``weighting=schedule`` lets sizes into the loss."""
LEAST_VARIANCE = 1e-3
VARIANCE_MOMENTUM = 0.99
_MASK = 32  # stream of a sample's random numbers


@settings
class PARTConfig(MethodConfig):
    """Settings of PART; the paper's or its code's values where they are known."""

    name: str = "part"
    sampling: Literal["grid", "offgrid", "offgrid_scale", "nonoverlapping", "saliency", "hierarchical"] = "offgrid"
    """Where patches are drawn: ``grid`` the cells of the grid, ``offgrid`` anywhere (the paper's), ``offgrid_scale`` of
    random sides and aspect, ``nonoverlapping`` anywhere but on each other, ``saliency`` where gradients are,
    ``hierarchical`` large wholes and parts inside them."""
    num_patches: int | None = None
    """N; None: as many as the grid has (a third of that for ``nonoverlapping``)."""
    shuffle: bool = True
    """``grid``: cells in random order; in raster order a patch's number says where it is."""
    subpixel: bool = False
    """Starts of patches are real numbers; the code's are whole pixels."""
    sides: tuple[int, int] | None = None
    """Smallest and largest side in pixels: of ``offgrid_scale`` (None: half and twice the patch) or of the wholes of
    ``hierarchical`` (None: a quarter and half of the image)."""
    size_distribution: Literal["official", "uniform", "log_uniform"] = "official"
    """Law of the sides of ``offgrid_scale``; the code's favours small ones."""
    aspect: bool = True
    """``offgrid_scale``: width and height are independent."""
    num_wholes: Few = 4
    """Wholes of ``hierarchical``, among the N."""
    uniform_ratio: float = 0.2
    """``saliency``: share of patches drawn uniformly."""
    resample: Literal["bilinear", "nearest", "bicubic"] = "bilinear"
    """How patches are resized where they must be; only ``bilinear`` is antialiased."""
    max_angle: float = 0.0
    """Largest angle in degrees by which patches are turned, 0..180; ``offgrid`` only."""
    angles: Literal["continuous", "quad"] = "continuous"
    """``quad`` turns by whole quarters of a circle, whatever ``max_angle``; no pixel is interpolated."""
    supervise_angles: bool = True
    """Turned patches: the angle between two is a target, too, as its cosine and sine."""
    frame: Literal["image", "patch"] = "image"
    """Turned patches: offsets along the axes of the image, or of the patch of reference."""
    positions: Literal["none", "sincos"] = "none"
    """``sincos`` tells the encoder where each patch is: a control that must make the task trivial."""
    key_mask_ratio: float = 0.0
    """Share of patches that no patch may look at (MP3's masking), in [0, 1); all are still asked about."""
    head: Literal["cross_attention", "pairwise_linear", "pair_mlp", "difference"] = "cross_attention"
    """Who answers: the paper's relative encoder, one linear layer (its baseline), a perceptron, or a difference of
    places."""
    query: Literal["patch_cat", "positional"] = "patch_cat"
    """``cross_attention``: what asks, the tokens of a pair or codes of their numbers."""
    head_num_heads: NumHeads = 1
    """``cross_attention``: attention heads."""
    head_residual: bool = False
    """``cross_attention``: add the query to the answer."""
    head_norm: bool = False
    """``cross_attention``: layer norms in front."""
    head_mlp: bool = False
    """``cross_attention``: a perceptron behind it."""
    num_pairs: int | None = None
    """K; None: half of all pairs for up to 100 patches, an eighth above."""
    replacement: bool = False
    """Pairs may repeat."""
    per_image: bool = False
    """Every image has pairs of its own; otherwise all images of a step share them."""
    exclude_diagonal: bool = False
    """No patch is paired with itself."""
    normalize: Literal["patch", "image", "none"] = "patch"
    """Offsets in sides of the patch of reference, sides of the image, or pixels."""
    centered: bool = True
    """Offsets between centres; otherwise between upper left corners."""
    scale_target: Literal["log_ratio", "ratio"] = "log_ratio"
    """Target for sizes, where patches have several: the code's is ``ratio``."""
    loss: Literal["mse", "l1", "huber"] = "mse"
    """Error of a prediction; ``huber`` turns from square to linear at 1."""
    channel_weights: tuple[float, ...] | None = None
    """A weight for each channel (offsets, sizes, angles); None: 1."""
    weighting: Literal["fixed", "variance", "uncertainty", "schedule"] = "fixed"
    """How channels are balanced beyond that: not, by the running variance of their targets, by a learned variance, or
    with sizes left out for the first fifth of training."""
    symmetry: float = 0.0
    """Weight of the term that wants the pair (j, i) to mirror (i, j)."""
    contrastive: float = 0.0
    """Weight of InfoNCE between the class tokens of two views; 0: one view."""
    contrastive_temp: float = 0.2
    """Its temperature."""
    contrastive_dim: Width = 128
    """Width of the vectors that are compared."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a share of the image."""
    color_jitter: float = 0.4
    """Strength of jitter of brightness, contrast and saturation; 0: none."""
    flip_prob: float = 0.5
    """Fraction of views that are mirrored left to right, in 0..1."""
    channel_dropout: float = 0.1
    """Signals: chance that a channel is zero."""
    amplitude: tuple[float, float] = (0.8, 1.2)
    """Signals: smallest and largest factor of a window."""


class Target(NamedTuple):
    """What is asked about pairs."""

    values: Float[Tensor, "B K C"]
    units: Float[Tensor, "B K A"]
    """Pixels of one unit of an offset."""


def pair_loss(
    prediction: Float[Tensor, "B K C"], target: Float[Tensor, "B K C"], loss: str = "mse"
) -> Float[Tensor, " C"]:
    """Mean error of each channel over images and pairs, in float32.

    Args:
        prediction: any float type.
        target: the same shape.
        loss: ``mse``, ``l1`` or ``huber`` (turning linear at 1).
    """
    error = at_least_float32(prediction) - at_least_float32(target)
    if loss == "mse":
        return error.square().mean((0, 1))
    if loss == "l1":
        return error.abs().mean((0, 1))
    return F.huber_loss(error, torch.zeros_like(error), reduction="none").mean((0, 1))


def info_nce(first: Float[Tensor, "B D"], second: Float[Tensor, "B D"], temp: float) -> Float[Tensor, ""]:
    """Cross-entropy of finding one's own second view among all, and the other way round; unit vectors.

    Source: van den Oord et al., arXiv:1807.03748v2, Eq. (4), in the symmetric form of Radford et al., arXiv:2103.00020.
    """
    with torch.autocast(first.device.type, enabled=False):  # cosines are divided by a small temperature
        logits = at_least_float32(first) @ at_least_float32(second).T / temp
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@register("part")
class PART(EncoderMethod):
    """Encode patches from anywhere without a word on where they are; say for pairs how one lies to the other."""

    Config = PARTConfig
    title = "predicts relative offsets between off-grid patches, without positional embeddings"
    paper = "Ayoughi et al. 2025, arXiv:2506.03682"
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
        "method": {"normalize": "image"},  # in patches, offsets of half a second's would have a variance of hundreds
        "optim": {"base_lr": 2.5e-4, "warmup_ratio": 0.05, "min_lr": 0.0},
        "drop_path": 0.0,
    }

    channel_weights: Tensor
    target_variance: Tensor

    def __init__(self, encoder: Encoder, config: PARTConfig) -> None:
        super().__init__(encoder, config)
        _check(config, encoder)
        self.encoder = encoder
        self.is_signal = encoder.takes_signals
        self.sampler = PatchSampler(
            encoder.patch_size[1:] if self.is_signal else encoder.patch_size,
            config.sampling,
            num_patches=config.num_patches,
            shuffle=config.shuffle,
            subpixel=config.subpixel,
            sides=config.sides,
            size_distribution=config.size_distribution,
            aspect=config.aspect,
            num_wholes=config.num_wholes,
            uniform_ratio=config.uniform_ratio,
            max_angle=math.radians(config.max_angle) if config.angles == "continuous" else 0.0,
            quarters=config.angles == "quad",
            mode=config.resample,
        )
        self.is_turned = config.angles == "quad" or config.max_angle > 0
        self.channels = _channels(self.sampler.has_sizes, self.is_turned and config.supervise_angles, self.is_signal)
        if config.channel_weights is not None and len(config.channel_weights) != len(self.channels):
            raise ConfigError(
                f"method.channel_weights has {len(config.channel_weights)} values for the channels "
                f"{', '.join(self.channels)}"
            )
        weights = torch.tensor(config.channel_weights or [1.0] * len(self.channels))
        self.register_buffer("channel_weights", weights, persistent=False)
        self.head = _make_head(config, encoder.embed_dim, len(self.channels))
        self.log_variance = nn.Parameter(torch.zeros(len(self.channels))) if config.weighting == "uncertainty" else None
        if config.weighting == "variance":
            self.register_buffer("target_variance", torch.ones(len(self.channels)))
        self._variance_now: Tensor | None = None
        self.projection = (
            ProjectionHead(encoder.embed_dim, encoder.embed_dim, config.contrastive_dim) if config.contrastive else None
        )
        encoder.draw_class_token()
        self._set_positions()

    @property
    def num_views(self) -> int:
        """V: two where class tokens are compared."""
        return 2 if self.config.contrastive else 1

    def make_views(self, image_size: int) -> ViewMaker:
        """Random resized crops, flips and colour jitter: no padding, no rotation, nothing that leaves a frame. Of
        signals: channels dropped, amplitude changed."""
        if self.is_signal:
            return SignalViews(self.config.channel_dropout, self.config.amplitude, self.num_views)
        strength = self.config.color_jitter
        color = ColorConfig(
            brightness=strength, contrast=strength, saturation=strength, hue=0.0, jitter_prob=1.0, gray_prob=0.0
        )
        return MultiCrop(
            [
                ViewSpec(
                    count=self.num_views,
                    size=image_size,
                    scale=self.config.crop_scale,
                    flip_prob=self.config.flip_prob,
                    color=color if strength else None,
                )
            ]
        )

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """``{"offsets": ...}``, and ``sizes``, ``angles``, ``symmetry``, ``contrastive`` where they are asked for."""
        config = self.config
        images = self.encoder.normalize(views.global_crops)  # (V * B, C, S, S)
        keys = torch.cat([fork_keys(views.keys, view) for view in range(self.num_views)])
        source = images.squeeze(-2) if self.is_signal else images  # (V * B, C, T) of signals
        patches = self.sampler(keys, source)
        tokens, prefix = self.encode(patches, keys)
        pairs = self.draw_pairs(keys, tokens.shape[1], progress)
        target = self.target(patches, pairs, source.shape[2:])
        asked = torch.cat([pairs, pairs.flip(-1)], dim=1) if config.symmetry else pairs
        prediction = at_least_float32(self.head(tokens, asked))
        count = pairs.shape[1]

        errors = pair_loss(prediction[:, :count], target.values, config.loss) * self.num_views  # a sum over views
        losses = self._weigh(errors, target.values, progress)
        if config.symmetry:
            there, back = prediction[:, :count], prediction[:, count:]
            losses["symmetry"] = config.symmetry * self.asymmetry(there, back, patches, pairs, target.units)
        if self.projection is not None:
            first, second = self.projection(prefix[:, 0]).chunk(2)
            losses["contrastive"] = config.contrastive * info_nce(first, second, config.contrastive_temp)
        self._observe(prediction[:, :count].detach(), target.values, pairs)
        return losses

    def encode(self, patches: Patches, keys: Int[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        """``(B, N, D)`` tokens of the patches after the final norm, and ``(B, R, D)`` prefix tokens.

        Args:
            patches: from the sampler, of normalised images.
            keys: ``(B,)``, for the masking of keys in training.
        """
        tokens = self.encoder.embed_crops(patches.pixels.unsqueeze(-2) if self.is_signal else patches.pixels)
        if self.config.positions == "sincos":
            tokens = tokens + self._box_code(patches.boxes).to(tokens.dtype)
        num_prefix, is_key = self.encoder.num_prefix_tokens, None
        if self.config.key_mask_ratio and self.training:
            num_patches = tokens.shape[1]
            num_keep = int(num_patches * (1 - self.config.key_mask_ratio))
            _, mask, _ = random_mask(sample_uniform(keys, num_patches, _MASK), num_keep)
            is_key = F.pad(~mask, (num_prefix, 0), value=True)  # prefix tokens are always seen
        sequence = self.encoder.forward_tokens(self.encoder.assemble(tokens, None), is_key)
        return sequence[:, num_prefix:], sequence[:, :num_prefix]

    def draw_pairs(self, keys: Int[Tensor, " B"], num_patches: int, progress: float) -> Int[Tensor, "P K 2"]:
        """The pairs of a step: a set for all images, drawn from the progress of training, or one for each."""
        config = self.config
        if not config.per_image:
            keys = step_key(progress, keys.device)
        return select_pairs(
            keys,
            num_patches,
            self.num_pairs(num_patches),
            replacement=config.replacement,
            exclude_diagonal=config.exclude_diagonal,
        )

    def num_pairs(self, num_patches: int) -> int:
        """K for images of so many patches."""
        if self.config.num_pairs is not None:
            return self.config.num_pairs
        return max(1, round(num_patches**2 / (2 if num_patches <= ALL_PAIRS_BELOW else 8)))

    @torch.no_grad()
    def target(self, patches: Patches, pairs: Int[Tensor, "P K 2"], size: tuple[int, ...]) -> Target:
        """The truth about pairs, float32: offsets, then sizes, then angles, as :attr:`channels` names them.

        Args:
            patches: boxes and angles are looked at.
            pairs: from :meth:`draw_pairs`.
            size: of the images, ``(H, W)``, or of signals ``(T,)``.
        """
        config, boxes = self.config, patches.boxes.float()
        units = offset_units(boxes, pairs, config.normalize, tuple(size))
        offsets = relative_offsets(boxes, pairs, units, config.centered)
        if patches.angles is not None and config.frame == "patch":
            offsets = turn_offsets(offsets, -gather_pairs(patches.angles, pairs)[0])
        values = [offsets]
        if self.sampler.has_sizes:
            values.append(relative_sizes(boxes, pairs, config.scale_target == "log_ratio"))
        if patches.angles is not None and config.supervise_angles:
            values.append(relative_angles(patches.angles, pairs))
        return Target(torch.cat(values, dim=-1), units)

    def pixel_offsets(
        self, prediction: Float[Tensor, "B K C"], patches: Patches, pairs: Int[Tensor, "P K 2"], units: Tensor
    ) -> Float[Tensor, "B K A"]:
        """The offsets of a prediction (or a target) in pixels along the axes of the image."""
        offsets = prediction[..., : units.shape[-1]]
        if patches.angles is not None and self.config.frame == "patch":
            offsets = turn_offsets(offsets, gather_pairs(patches.angles, pairs)[0])
        return offsets * units

    def asymmetry(
        self,
        there: Float[Tensor, "B K C"],
        back: Float[Tensor, "B K C"],
        patches: Patches,
        pairs: Int[Tensor, "P K 2"],
        units: Float[Tensor, "B K A"],
    ) -> Float[Tensor, ""]:
        """Mean square by which the answers for (i, j) and (j, i) miss mirroring one another; each channel on its own.

        Offsets in pixels must cancel (true sizes turn both to pixels; the miss is in units of patch i), log ratios must
        cancel, ratios multiply to 1, the cosine of an angle stays and its sine cancels.
        """
        axes, back_units = units.shape[-1], units
        if self.config.normalize == "patch":
            back_units = offset_units(patches.boxes, pairs.flip(-1), "patch", ())
        forth = self.pixel_offsets(there, patches, pairs, units)
        misses = [(forth + self.pixel_offsets(back, patches, pairs.flip(-1), back_units)) / units]
        place = axes
        if self.sampler.has_sizes:
            a, b = there[..., place : place + axes], back[..., place : place + axes]
            misses.append(a + b if self.config.scale_target == "log_ratio" else a * b - 1)
            place += axes
        if place < len(self.channels):
            misses.append(there[..., place : place + 1] - back[..., place : place + 1])
            misses.append(there[..., place + 1 :] + back[..., place + 1 :])
        return torch.cat(misses, dim=-1).square().mean()

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """The mean offset of all pairs."""
        if not {"r2", "mean_predictor_mse"} <= row.keys():
            return None
        constant = row["mean_predictor_mse"]
        value = (1 - row["r2"]) * constant
        return Reference("the mean squared error of offsets", value, constant, "the mean offset of all pairs")

    def couplings(self) -> dict[str, bool]:
        """The contrastive term compares images; the variance of targets is that of a batch."""
        config = self.config
        return {"the contrastive term": config.contrastive > 0, "weighting=variance": config.weighting == "variance"}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The running variance of the targets, over all processes."""
        if self.config.weighting != "variance" or self._variance_now is None:
            return
        variance = self._variance_now
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(variance)
            variance /= torch.distributed.get_world_size()
        self.target_variance.lerp_(variance, 1 - VARIANCE_MOMENTUM)

    def networks(self) -> dict[str, Encoder]:
        """The encoder is all that is handed on: without positions, until it is fine-tuned."""
        return {"encoder": self.encoder}

    def _weigh(self, errors: Float[Tensor, " C"], target: Float[Tensor, "B K C"], progress: float) -> dict[str, Tensor]:
        """Named terms: their sum is the weighted mean of the channels' errors, whichever are there."""
        config, weights = self.config, self.channel_weights
        if config.weighting == "variance":
            self._variance_now = target.flatten(0, 1).var(0)
            errors = errors / self.target_variance.clamp(min=LEAST_VARIANCE)
        elif self.log_variance is not None:
            errors = errors * torch.exp(-self.log_variance) + self.log_variance
        elif config.weighting == "schedule" and progress < SIZES_AFTER:
            weights = weights * move(torch.tensor([name not in _SIZES for name in self.channels]), weights.device)
        shares = errors * weights / len(self.channels)
        groups = {"offsets": _OFFSETS, "sizes": _SIZES, "angles": _ANGLES}
        members = {
            term: [self.channels.index(n) for n in names if n in self.channels] for term, names in groups.items()
        }
        # picked one by one: a list as index is a copy to the device, for which the CPU waits
        return {term: torch.stack([shares[i] for i in places]).sum() for term, places in members.items() if places}

    @torch.no_grad()
    def _observe(self, prediction: Tensor, target: Tensor, pairs: Tensor) -> None:
        """``r2`` of the offsets, of each channel, and what the best constant would pay for the offsets."""
        scores, axes = r_squared(prediction, target), len(self.sampler.patch_size)
        floor = target[..., :axes].flatten(0, 1).var(0, correction=0).mean()
        self.observations = {"r2": scores[:axes].mean(), "mean_predictor_mse": floor}
        self.observations |= {f"r2_{name}": score for name, score in zip(self.channels, scores.unbind(), strict=True)}
        if self.config.sampling == "hierarchical" and len(pairs) == 1:
            is_whole = pairs[0] < self.config.num_wholes  # (K, 2)
            for name, number in (("whole_whole", 2), ("part_whole", 1), ("part_part", 0)):
                chosen = is_whole.sum(-1) == number
                errors = (prediction - target)[..., :axes].square() * chosen[:, None]
                spread = (target - target.mean((0, 1)))[..., :axes].square() * chosen[:, None]
                self.observations[f"r2_{name}"] = 1 - errors.sum() / spread.sum()

    def _box_code(self, boxes: Float[Tensor, "B N E"]) -> Float[Tensor, "B N D"]:
        """Sine-cosine code of where the centre of a box is, in patches: on the grid, that of the cell."""
        ph, pw = self.encoder.patch_size
        if self.is_signal:  # in one row
            start, end = boxes.unbind(-1)
            boxes = torch.stack([start, torch.zeros_like(start), end, torch.ones_like(end)], dim=-1)
        centres = (boxes[..., :2] + boxes[..., 2:]) / 2
        return sincos_at(centres / move(torch.tensor([pw, ph]), boxes.device) - 0.5, self.encoder.embed_dim)

    @torch.no_grad()
    def _set_positions(self) -> None:
        """What stands in the encoder's own table, which only whole images read: nothing, or the control's code."""
        encoder, table = self.encoder, self.encoder.vit.pos_embed
        encoder.drop_positions()
        if table is None:
            return
        table.requires_grad_(False)
        if self.config.positions == "sincos":
            code = sincos_positions(encoder.embed_dim, encoder.vit.patch_embed.grid_size)
            table[:, -len(code) :] = code
            encoder.position_free, encoder.fixed_positions = False, True


_OFFSETS, _SIZES, _ANGLES = ("x", "y", "time"), ("width", "height", "duration"), ("cos", "sin")


def _channels(has_sizes: bool, has_angles: bool, is_signal: bool = False) -> tuple[str, ...]:
    """Names of what is asked: two offsets and two sizes of images, the last of each of signals."""
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
        )
    heads = {"pairwise_linear": PairwiseLinear, "pair_mlp": PairMLP, "difference": DifferenceHead}
    return heads[config.head](dim, num_outputs)


def _check(config: PARTConfig, encoder: Encoder) -> None:
    """Refuse settings that don't fit together.

    Raises:
        ConfigError: naming them.
    """
    if encoder.takes_signals:
        refuse_changed(config, ("crop_scale", "color_jitter", "flip_prob"), "is for images, these are signals")
    else:
        refuse_changed(config, ("channel_dropout", "amplitude"), "is for signals, these are images")
    if not 0 <= config.key_mask_ratio < 1:
        raise ConfigError(f"method.key_mask_ratio={config.key_mask_ratio}: a share in 0..1 (1 excluded) is needed")
    if not 0 <= config.flip_prob <= 1:
        raise ConfigError(f"method.flip_prob={config.flip_prob}: it must lie in 0..1")
    if config.query == "positional" and config.sampling == "grid" and not config.shuffle:
        raise ConfigError("method.query=positional sees a patch's number, which shuffle=false makes its place")
    if config.angles == "quad" and config.max_angle:
        raise ConfigError("method.angles=quad turns by whole quarters; leave max_angle out")
    if not 0 <= config.max_angle <= 180:
        raise ConfigError(f"method.max_angle={config.max_angle:g}: degrees in 0..180 are needed")
    if config.weighting == "schedule" and config.sampling not in ("offgrid_scale", "hierarchical"):
        raise ConfigError("method.weighting=schedule is for sizes; sampling=offgrid_scale or hierarchical has them")
    if config.head == "difference" and (
        (config.sampling in ("offgrid_scale", "hierarchical") and config.scale_target == "ratio")
        or ((config.max_angle or config.angles == "quad") and config.supervise_angles)
    ):
        raise ConfigError("method.head=difference can't say ratios of sizes or angles; use log_ratio, or another head")
    if config.contrastive and not encoder.has_class_token:
        raise ConfigError("method.contrastive compares class tokens, which this encoder does not have")
    if config.contrastive < 0 or config.symmetry < 0 or config.contrastive_temp <= 0:
        raise ConfigError("method.contrastive and symmetry must not be negative, contrastive_temp must be above 0")
    if not 0 <= config.uniform_ratio <= 1:
        raise ConfigError(f"method.uniform_ratio={config.uniform_ratio}: a share in 0..1 is needed")
