"""DINOv2: iBOT with untied heads, Sinkhorn-Knopp centering, KoLeo, and mask ratios stratified over the batch.

Paper: Oquab et al., "DINOv2: Learning robust visual features without supervision", 2023, arXiv:2304.07193v2, Sec. 4;
numbers that the paper leaves open are those of the released code's configuration for ImageNet. Registers: Darcet et
al., arXiv:2309.16588v2 (``encoder.reg_tokens=4``).
Letters: B images, M = 2 B global crops (view-major), N patches of a global crop, K prototypes, D width of a token.
Differs from the code: see the table in ``docs/methods/dinov2.md``; the defaults of ``num_prototypes`` and
``targets`` suit tens of thousands of images on one device (the recipes have the published ones).
"""

from collections import defaultdict
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from smalti.config import Count, Few, PositiveRatio, Ratio, settings
from smalti.errors import ConfigError, ShapeError
from smalti.functional.masking import block_mask, stratified_counts
from smalti.functional.precision import at_least_float32
from smalti.functional.random import sample_uniform
from smalti.methods.base import register
from smalti.methods.ibot import BLOCK_STREAM, IBOT, RATIO_STREAM, IBOTConfig
from smalti.methods.masked_tokens import PATCH, crop_keys
from smalti.methods.self_distillation import NUM_GLOBAL

SMALLEST_BLOCK = 4


@settings
class DINOv2Config(IBOTConfig):
    """Settings of DINOv2: iBOT's, some with other defaults, and its own."""

    name: str = "dinov2"
    num_prototypes: Count = 4096
    """K; the paper's is 65536 for ImageNet-1k, 131072 for more."""
    separate_heads: bool = True
    """Use a separate head for patches (the paper's large models); otherwise image and patches share one."""
    targets: Literal["centering", "sinkhorn"] = "sinkhorn"
    """Collapse prevention: DINO's centering, or Sinkhorn-Knopp over the batch of all processes."""
    momentum: Ratio = 0.992
    """Teacher momentum at the start; it rises to 1 along a half cosine."""
    koleo_weight: float = 0.1
    """Weight of the KoLeo term, which is summed over both global views."""
    mask_sampling: Literal["stratified", "independent"] = "stratified"
    """``stratified``: exactly ``mask_sample_prob`` of a batch's global crops are masked, with stratified mask ratios
    (the code's). ``independent``: each crop is sampled alone, as in iBOT, so that a step does not depend on
    ``micro_batch``."""
    num_local_views: Few = 8
    """Local views per image."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Area of a global view, as a fraction of the image."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Area of a local view, as a fraction of the image."""
    dinov2_compat_blur: bool = False
    """Official code's blur, whose probabilities are ``1 - blur_prob``: never the first view, 0.9 for the second; kept
    for parity."""
    dinov2_compat_blocks: bool = False
    """Official code's largest block, ``(h // 2) * w`` patches: less than half of a grid with an odd number of rows;
    kept for parity."""
    layer_decay: PositiveRatio = 1.0
    """Factor on the learning rate from each block to the one below; the published value is 0.9."""
    patch_embed_lr_scale: PositiveRatio = 1.0
    """Further factor on the patch embedding's learning rate; the published value is 0.2."""


def koleo(tokens: Float[Tensor, "B D"], eps: float = 1e-8) -> Float[Tensor, ""]:
    """Mean of ``-log`` of the distance between each unit vector and its nearest neighbour: Sec. 4, "KoLeo".

    Args:
        tokens: at least two, of any length; computed in float32.
        eps: added to the distance.

    Raises:
        ShapeError: for fewer than two.

    Source: Sablayrolles et al., arXiv:1806.03198v3, Eq. (2); DINOv2 for the unit vectors.
    """
    if len(tokens) < 2:
        raise ShapeError(
            f"KoLeo needs at least 2 images, got {len(tokens)}; raise micro_batch, or set method.koleo_weight=0"
        )
    with torch.autocast(tokens.device.type, enabled=False):
        unit = F.normalize(at_least_float32(tokens), dim=-1)
        with torch.no_grad():
            sim = unit @ unit.T
            nearest = sim.fill_diagonal_(-1).argmax(dim=1)
        return -((unit - unit[nearest]).norm(dim=-1) + eps).log().mean()


@register("dinov2")
class DINOv2(IBOT):
    """iBOT's two losses, and KoLeo, which spreads the images of a batch."""

    Config = DINOv2Config
    title = "iBOT with untied heads, Sinkhorn-Knopp centering and KoLeo"
    paper = "Oquab et al. 2023, arXiv:2304.07193v2"
    draws_class_token = False  # 1e-6 in the released code, as in timm
    centers_all_patches = False
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "base_lr": 4e-3,
            "lr_scaling": "sqrt",
            "betas": [0.9, 0.999],
            "weight_decay": 0.04,
            "weight_decay_end": 0.4,
            "warmup_ratio": 0.1,
            "min_lr": 1e-6,
            "clip_norm": 3.0,
        },
        "drop_path": 0.1,
    }

    def check_batch(self, micro_batch: int) -> None:
        """KoLeo needs at least two images."""
        if self.config.koleo_weight and micro_batch < 2:
            raise ConfigError(
                f"micro_batch={micro_batch}: KoLeo needs at least 2 images; raise it, or set method.koleo_weight=0"
            )

    def couplings(self) -> dict[str, bool]:
        """Sinkhorn-Knopp, nearest neighbours in the batch, mask ratios stratified over the batch."""
        stratified = self.config.mask_sampling != "independent"
        return super().couplings() | {"KoLeo": self.config.koleo_weight > 0, "stratified mask ratios": stratified}

    def blur_probs(self) -> tuple[float, float, float]:
        """As set, or as in the released code."""
        first, second, local = self.config.blur_prob
        return (1 - first, 1 - second, 1 - local) if self.config.dinov2_compat_blur else (first, second, local)

    def draw_masks(self, keys: Int[Tensor, " B"], grid: tuple[int, int]) -> dict[str, Bool[Tensor, "M N"]]:
        """Masks of the global crops, on the CPU: ``mask_sample_prob`` of them, with ratios stratified over the batch.

        Args:
            keys: ``(B,)`` seeds of the images, on the CPU.
            grid: of a global crop.
        """
        if self.config.mask_sampling == "independent":
            counts = self.counts_each(keys, grid)
        else:
            counts = self.counts_dealt(keys, int(NUM_GLOBAL * len(keys) * self.config.mask_sample_prob), grid)
        return {PATCH: self.blocks(keys, counts, grid)}

    def counts_dealt(
        self, keys: Int[Tensor, " B"], num_masked: int, grid: tuple[int, int], from_end: bool = False
    ) -> Int[Tensor, " M"]:
        """Number of patches to mask in each global crop, in ``num_masked`` of them: the first of a random order of
        crops, or the last (``from_end``), for a variant that masks something else in the others."""
        noise = sample_uniform(crop_keys(keys), 2, RATIO_STREAM)
        return stratified_counts(noise, num_masked, self.config.mask_ratio, grid[0] * grid[1], from_end)

    def blocks(self, keys: Int[Tensor, " B"], counts: Int[Tensor, " M"], grid: tuple[int, int]) -> Bool[Tensor, "M N"]:
        """Masks of rectangles, each at most half of the grid."""
        largest = grid[0] // 2 * grid[1] if self.config.dinov2_compat_blocks else grid[0] * grid[1] // 2
        return block_mask(crop_keys(keys), counts, grid, smallest=SMALLEST_BLOCK, largest=largest, stream=BLOCK_STREAM)

    def regularizers(self, image_tokens: Float[Tensor, "M D"]) -> dict[str, Tensor]:
        """KoLeo of each global view, over the images of this process."""
        if not self.config.koleo_weight:
            return {}
        terms = [koleo(view) for view in image_tokens.chunk(NUM_GLOBAL)]
        return {"koleo": self.config.koleo_weight * torch.stack(terms).sum()}

    def param_groups(self) -> list[dict[str, Any]]:
        """As in :class:`~smalti.methods.base.Method`, with layer-wise learning-rate decay (``layer_decay``): everything
        before the first block counts as one layer; final norm and heads have the full rate."""
        encoder, config = self.student.encoder, self.config
        heads = set(self.student.heads.parameters())
        below = [parameter for parameter in self.student.parameters() if parameter not in heads]
        scales = dict.fromkeys(below, config.layer_decay ** (encoder.depth + 1))
        for number, block in enumerate(encoder.vit.blocks):
            scales |= {parameter: config.layer_decay ** (encoder.depth - number) for parameter in block.parameters()}
        behind = [encoder.vit.norm, *([] if encoder.vit.attn_pool is None else [encoder.vit.attn_pool])]
        scales |= {parameter: 1.0 for module in behind for parameter in module.parameters()}
        for parameter in encoder.vit.patch_embed.parameters():
            scales[parameter] *= config.patch_embed_lr_scale
        groups = []
        for group in super().param_groups():
            members: dict[float, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                members[scales.get(parameter, 1.0)].append(parameter)
            groups += [{**group, "params": params, "lr_scale": scale} for scale, params in members.items()]
        return groups
