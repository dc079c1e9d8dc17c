"""Common parts of DINO, iBOT and their variants: settings, multi-crop views, temperature warm-up, initial weights.

Source: Caron et al., DINO, arXiv:2104.14294v2, Sec. 3.2 and its released code; views after Grill et al., BYOL,
arXiv:2006.07733v3.
"""

from typing import Literal

import torch
from torch import nn

from smalti.charts import LogColumn
from smalti.config import Count, Few, ImageSize, NonNegative, Ratio, Width, settings
from smalti.data.color import ColorConfig
from smalti.data.crops import MultiCrop, ViewSpec
from smalti.errors import ConfigError
from smalti.functional.positions import sincos_positions
from smalti.methods.base import MethodConfig
from smalti.models.encoder import Encoder

NUM_GLOBAL = 2
STUDENT_TEMP = 0.1
"""Temperature of the student's softmax, the same in all these papers."""


def entropy_columns(tokens: str) -> dict[str, LogColumn]:
    """Columns of the log that show how a head uses its prototypes.

    Args:
        tokens: name of the head, such as ``patch``.
    """
    return {
        "target_entropy": LogColumn(
            f"Entropy of {tokens} targets",
            f"Mean entropy of the teacher's outputs for {tokens} tokens in nats; at 0 each picks one prototype.",
        ),
        "usage_entropy": LogColumn(
            f"Entropy of {tokens} prototypes",
            f"Entropy of the mean {tokens} target in nats; at ln(prototypes) all are used equally, near 0 one is.",
        ),
    }


@settings
class SelfDistillationConfig(MethodConfig):
    """Settings that DINO, iBOT and their variants share."""

    num_prototypes: Count = 8192
    """K."""
    hidden_dim: Width = 2048
    """Width of the projection head's hidden layers."""
    bottleneck_dim: Width = 256
    """E: width of the unit vectors before the prototypes."""
    norm_last_layer: bool = False
    """Fix the gain of each prototype at 1."""
    teacher_temp: float = 0.07
    """Temperature of the teacher's softmax (for iBOT, on image tokens) after warm-up."""
    warmup_teacher_temp: float = 0.04
    """Teacher temperature at the start; it changes linearly to ``teacher_temp``."""
    warmup_teacher_temp_ratio: Ratio = 0.3
    """Fraction of training that the warm-up of the teacher's temperature takes."""
    momentum: Ratio = 0.996
    """Teacher momentum at the start; it rises to 1 along a half cosine."""
    center_momentum: Ratio = 0.9
    """Momentum of the centers."""
    freeze_last_layer_ratio: Ratio = 0.01
    """Fraction of training during which the prototypes are frozen (one epoch of a hundred)."""
    num_local_views: Few = 10
    """Local views per image."""
    local_size: ImageSize | None = None
    """Pixels of a local view. None: three sevenths of the global views' size, rounded up to a multiple of the patch."""
    global_scale: tuple[float, float] = (0.25, 1.0)
    """Area of a global view, as a fraction of the image."""
    local_scale: tuple[float, float] = (0.05, 0.25)
    """Area of a local view, as a fraction of the image."""
    color_strength: float = 1.0
    """Factor on the four strengths of colour jitter (0.4, 0.4, 0.2, 0.1); less than 1 helps short runs on few
    images."""
    linear_init: Literal["0.02", "fan_in"] = "0.02"
    """Standard deviation of initial linear weights, heads included: 0.02, or 1 / sqrt(inputs), also for the patch
    embedding. Networks narrower than a ViT-S need ``fan_in`` to learn in short runs."""
    position_init: Literal["learned", "sincos"] = "learned"
    """Initial values of the learned positions: timm's, or sine-cosine with the magnitude of embedded patches."""
    gram_weight: NonNegative = 0.0
    """With ``init``: weight of Gram anchoring, which keeps similarities among patches as they were at the start; 2 in
    DINOv3."""


def multi_crop(
    config: SelfDistillationConfig,
    encoder: Encoder,
    image_size: int,
    gray_prob: float = 0.2,
    blur_probs: tuple[float, float, float] = (1.0, 0.1, 0.5),
    solarize_prob: float = 0.2,
) -> MultiCrop:
    """Two global and several local views with colour jitter, blur and solarisation.

    Args:
        config: numbers, sizes and areas of the views.
        encoder: whose patch size the local views must fit.
        image_size: pixels of a global view.
        gray_prob: probability of greyscale.
        blur_probs: probabilities of blur: first global view, second, local views.
        solarize_prob: probability of solarisation in the second global view.
    """
    color = color_jitter(config.color_strength, gray_prob)
    first, second, local = blur_probs
    views = [
        ViewSpec(
            count=NUM_GLOBAL,
            size=image_size,
            scale=config.global_scale,
            flip_prob=0.5,
            color=color,
            blur_prob=(first, second),
            solarize_prob=(0.0, solarize_prob),
        )
    ]
    if config.num_local_views:
        patch = encoder.patch_size[0]
        size = config.local_size or -(-image_size * 3 // 7 // patch) * patch
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


def color_jitter(strength: float, gray_prob: float = 0.2) -> ColorConfig:
    """BYOL's colour jitter, with each of its four strengths multiplied by ``strength``.

    Raises:
        ConfigError: for a negative strength.
    """
    if strength < 0:
        raise ConfigError(f"method.color_strength={strength}: a factor of at least 0 is needed")
    brightness, contrast, saturation, hue = (strength * full for full in (0.4, 0.4, 0.2, 0.1))
    return ColorConfig(
        brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, jitter_prob=0.8, gray_prob=gray_prob
    )


def warmed_up(first: float, last: float, ratio: float, progress: float) -> float:
    """A value that changes linearly from ``first`` to ``last`` over the fraction ``ratio`` of training, then stays."""
    done = min(progress / ratio, 1.0) if ratio else 1.0
    return first + done * (last - first)


def resample_as_released(encoder: Encoder) -> None:
    """Resample positions for local crops as the code of DINO, iBOT and DINOv2: bicubic without antialiasing, by the
    factor ``(n + 0.1) / m``. A pretrained encoder keeps the resampling it was loaded with (``load.pos_*``)."""
    if not encoder.pretrained:
        encoder.set_pos_resampling(mode="bicubic", antialias=False, offset=0.1)


@torch.no_grad()
def init_weights(network: nn.Module, heads: nn.Module, encoder: Encoder, config: SelfDistillationConfig) -> None:
    """Initial weights and positions that differ from timm's; a pretrained encoder keeps its own.

    Args:
        network: encoder and heads.
        heads: the heads of ``network``.
        encoder: the encoder of ``network``.
        config: ``linear_init`` and ``position_init``.

    Raises:
        ConfigError: for ``position_init=sincos`` with an encoder without positions.
    """
    if config.linear_init == "fan_in":
        for module in (heads if encoder.pretrained else network).modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    if config.position_init == "sincos" and not encoder.pretrained:
        table, grid = encoder.vit.pos_embed, encoder.check_size(*encoder.img_size)
        if table is None:
            raise ConfigError(f"method.position_init=sincos: {encoder.name} has no positional embeddings; leave it out")
        rms = encoder.vit.patch_embed.proj.weight.flatten(1).norm(dim=1).square().mean().sqrt()  # of embedded patches
        positions = sincos_positions(encoder.embed_dim, grid)
        table[:, -len(positions) :] = positions * (rms / positions.square().mean().sqrt())
