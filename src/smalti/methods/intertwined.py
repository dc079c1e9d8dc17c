"""Intertwined content and positional features: DINOv2 whose crops read image-level positional embeddings.

Paper: Liu, Suganuma & Okatani, "Self-Supervised Learning of Intertwined Content and Positional Features for Object
Detection", ICML 2025, PMLR 267:39552-39567. We had the review version; there is no public code.
Letters: B images, V views, M = 2 B global crops (view-major), N = h*w patches of a crop, D width of a token, P the
position field, A the bounding box of an image's global crops, s its fraction of the field's area.
Differs from the paper, or is left open there (full table: ``docs/methods/intertwined.md``): the loss covers masked
tokens, not all; local crops must fit into the field, too; a flipped crop keeps the positions of the unflipped one
(``flip``); the sampling of cross-shaped masks. The defaults of ``num_prototypes``, ``targets`` and ``koleo_weight``
suit tens of thousands of images on one device (the recipes have the published ones).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import settings
from smalti.data.crops import MultiCrop
from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.functional.boxes import normalize_boxes, place_in_field
from smalti.functional.masking import cross_mask, stratified_counts
from smalti.functional.random import sample_beta, sample_uniform
from smalti.layers.position_field import PositionField
from smalti.methods.base import register
from smalti.methods.dinov2 import DINOv2, DINOv2Config
from smalti.methods.ibot import RATIO_STREAM
from smalti.methods.masked_tokens import IMAGE, MaskedNetwork, crop_keys
from smalti.methods.self_distillation import NUM_GLOBAL, entropy_columns
from smalti.models.encoder import Encoder
from smalti.models.rotary import reads_boxes

CONTENT, POSITION = "content", "position"
SCALE_STREAM, SHIFT_STREAM, CROSS_STREAM = 2, 3, 4
_BETA = (2, 5)


@settings
class IntertwinedConfig(DINOv2Config):
    """Settings: DINOv2's, some with other defaults, and its own. ``mask_sample_prob`` is f_c, the fraction of global
    crops whose content is masked; in the others, positions are masked."""

    name: str = "intertwined"
    field: bool = True
    """Crops read their positions from a field over the image; otherwise every crop has the same position table. Rotary
    positions (DINOv3's) are a field of their own: with ``position_loss=false``, crops read their coordinates."""
    position_loss: bool = True
    """Mask positions in the crops whose content isn't masked, and predict the teacher's tokens there; otherwise these
    crops are not masked."""
    field_grid: tuple[int, int] = (50, 50)
    """Rows and columns of the field."""
    scale_distribution: Literal["beta", "uniform", "const"] = "beta"
    """Distribution of s: Beta(2, 5) or uniform over ``scale_range``; ``const``: crops are read at their true position
    and scale. The paper compares all three."""
    scale_range: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest s."""
    anchor: Literal["crops", "image"] = "crops"
    """Box that gets the area s: A (the paper's text), or the whole image (its figure's caption)."""
    flip: Literal["box", "image", "field"] = "box"
    """Horizontal flips, on which the paper is silent. ``box``: pixels are flipped, positions not; ``image``: all crops
    of an image are flipped, or none; ``field``: positions are flipped with the crop."""
    position_mask: Literal["cross", "box"] = "cross"
    """Shape of position masks. The paper compares them and uses crosses; content masks are boxes."""
    position_mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest fraction of positions that are masked."""
    loss_tokens: Literal["masked", "all"] = "masked"
    """Tokens of a masked crop that enter the loss; ``all`` follows the paper's formulas literally."""
    norm_last_layer: bool = True
    """Fix the gain of each prototype at 1."""
    teacher_temp: float = 0.04
    """Temperature of the teacher's softmax on image tokens; constant."""
    warmup_teacher_temp: float = 0.04
    """Teacher temperature on image tokens at the start."""
    patch_teacher_temp: float = 0.04
    """Temperature of the teacher's softmax on patches, for content and positions; constant."""
    warmup_patch_teacher_temp: float = 0.04
    """Teacher temperature on patches at the start."""
    koleo_weight: float = 0.1
    """Weight of the KoLeo term, which is summed over both global views; the paper's is 1."""


class IntertwinedNetwork(MaskedNetwork):
    """A :class:`MaskedNetwork` that masks content and positions separately before adding them.

    Args:
        encoder: encoder with positions.
        config: settings of the method.
        heads: as for :class:`MaskedNetwork`.
    """

    def __init__(self, encoder: Encoder, config: IntertwinedConfig, heads: tuple[str, ...]) -> None:
        super().__init__(encoder, config, heads)
        self.position_token = nn.Parameter(torch.zeros(1, encoder.embed_dim)) if config.position_loss else None

    def embed(
        self, images: Num[Tensor, "V C H W"], masks: Mapping[str, Tensor], boxes: Float[Tensor, "V 4"] | None
    ) -> Float[Tensor, "V T D"]:
        """Input sequence of the blocks: content plus position, each with its own mask token where masked.

        Args:
            images: of views, not normalised.
            masks: ``(V, N)`` by name, ``content`` and ``position``, or nothing.
            boxes: of the crops, in fractions of the field; None: all read the whole field, or the table.
        """
        encoder = self.encoder
        tokens, grid = encoder.embed_patches(encoder.normalize(images))
        if encoder.is_rotary:  # the blocks read the boxes, and positions aren't masked
            if CONTENT in masks:
                tokens = torch.where(masks[CONTENT][..., None], self.mask_token.to(tokens.dtype), tokens)
            return encoder.assemble(tokens, None)
        positions = encoder.positions(grid, boxes)
        assert positions is not None, "refused when the method was built"
        places, prefix = positions
        if CONTENT in masks:
            tokens = torch.where(masks[CONTENT][..., None], self.mask_token.to(tokens.dtype), tokens)
        if POSITION in masks:
            assert self.position_token is not None, "positions are masked only with position_loss"
            places = torch.where(masks[POSITION][..., None], self.position_token.to(places.dtype), places)
        return encoder.assemble(tokens, (places, prefix))


@register("intertwined")
class Intertwined(DINOv2):
    """DINOv2 with a position field that crops read from, and with masked positions to predict."""

    Config = IntertwinedConfig
    title = "DINOv2 with image-level positional embeddings; masks a patch's content or its position"
    paper = "Liu et al. 2025, ICML (PMLR 267)"
    hides_positions = True
    reads_field = True
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        f"{head}_{name}": column
        for head in (IMAGE, CONTENT, POSITION)
        for name, column in entropy_columns(head).items()
    }
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "base_lr": 2e-3,
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

    def __init__(self, encoder: Encoder, config: IntertwinedConfig) -> None:
        _check(config, encoder)
        self.token_heads = (CONTENT, POSITION) if config.position_loss else (CONTENT,)
        super().__init__(encoder, config)

    def make_network(self, encoder: Encoder) -> IntertwinedNetwork:
        """The student; the teacher is a copy of it, field included."""
        return IntertwinedNetwork(encoder, self.config, self.head_names)

    def make_views(self, image_size: int) -> MultiCrop:
        """DINOv2's; with ``flip=image`` the image is flipped before it is cropped, not each crop."""
        views = super().make_views(image_size)
        if self.config.flip != "image":
            return views
        return MultiCrop([replace(spec, flip_prob=0.0) for spec in views.specs], flip_image_prob=0.5)

    def view_boxes(self, views: Views) -> list[Tensor | None]:
        """Boxes of the crops in the field, by crop size; one scale and one shift for all views of an image."""
        if not self.config.field:
            return [None] * len(views.crops)
        boxes = self.field_boxes(views)
        return list(torch.split(boxes, [len(crops) for crops in views.crops]))

    def field_boxes(self, views: Views) -> Float[Tensor, "VB 4"]:
        """Boxes of all views in fractions of the field; x0 and x1 are exchanged where positions are flipped."""
        config = self.config
        boxes = normalize_boxes(views.boxes, views.source_size)
        if config.scale_distribution != "const":
            draw = sample_beta(views.keys, *_BETA, stream=SCALE_STREAM)
            if config.scale_distribution == "uniform":
                draw = sample_uniform(views.keys, 1, SCALE_STREAM)[:, 0]
            low, high = config.scale_range
            shift = sample_uniform(views.keys, 2, SHIFT_STREAM)
            by_view = boxes.reshape(-1, views.batch_size, 4)
            boxes = place_in_field(by_view, NUM_GLOBAL, low + (high - low) * draw, shift, config.anchor).flatten(0, 1)
        if config.flip == "field":
            boxes = torch.where(views.flips[:, None], boxes[:, [2, 1, 0, 3]], boxes)
        return boxes

    def draw_masks(self, keys: Int[Tensor, " B"], grid: tuple[int, int]) -> dict[str, Bool[Tensor, "M N"]]:
        """Masks of the global crops, on the CPU: content in ``mask_sample_prob`` of them, positions in the others,
        never both in one.

        Args:
            keys: ``(B,)`` seeds of the images, on the CPU.
            grid: of a global crop.
        """
        content, position = self.mask_counts(keys, grid)
        masks = {CONTENT: self.blocks(keys, content, grid)}
        if self.config.position_loss:
            if self.config.position_mask == "cross":
                masks[POSITION] = cross_mask(crop_keys(keys), position, grid, stream=CROSS_STREAM)
            else:
                masks[POSITION] = self.blocks(keys, position, grid)
        return masks

    def mask_counts(
        self, keys: Int[Tensor, " B"], grid: tuple[int, int]
    ) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"]]:
        """Numbers of patches of each global crop with masked content, and with masked position."""
        config, num_patches = self.config, grid[0] * grid[1]
        noise = sample_uniform(crop_keys(keys), 2, RATIO_STREAM)
        if config.mask_sampling == "independent":
            counts = [
                ((low + (high - low) * noise[:, 1].double()) * num_patches).long()
                for low, high in (config.mask_ratio, config.position_mask_ratio)
            ]
            is_content = noise[:, 0] < config.mask_sample_prob
            return torch.where(is_content, counts[0], 0), torch.where(is_content, 0, counts[1])
        num_content = int(len(noise) * config.mask_sample_prob)
        content = stratified_counts(noise, num_content, config.mask_ratio, num_patches)
        position = stratified_counts(
            noise, len(noise) - num_content, config.position_mask_ratio, num_patches, from_end=True
        )
        return content, position

    def compared(self, masks: dict[str, Bool[Tensor, "M N"]]) -> dict[str, Bool[Tensor, "M N"]]:
        """Tokens in the content loss and in the position loss."""
        if self.config.loss_tokens == "masked":
            return masks
        return {name: mask.any(1, keepdim=True).expand_as(mask) for name, mask in masks.items()}

    @torch.no_grad()
    def _draw_weights(self) -> None:
        """DINOv2's initialisation; then the field replaces the position table."""
        super()._draw_weights()
        encoder, config = self.student.encoder, self.config
        if encoder.is_rotary:
            return
        if not config.field:
            encoder.tabulate_field()
            return
        if encoder.position_field is None:
            encoder.attach_field(self._field_from_table(encoder))
        field = encoder.position_field
        assert field is not None, "attached above"
        if tuple(field.grid) != config.field_grid != IntertwinedConfig().field_grid:  # the default gives way
            raise ConfigError(
                f"method.field_grid={list(config.field_grid)}, but the initial weights have a field of "
                f"{list(field.grid)}; leave the setting out, or start from other weights"
            )

    def _field_from_table(self, encoder: Encoder) -> PositionField:
        """A field initialised like the encoder's table, or interpolated from the table of a pretrained encoder."""
        config, grid = self.config, encoder.check_size(*encoder.img_size)
        field = PositionField(encoder.embed_dim, config.field_grid, encoder.has_class_token)
        positions = encoder.positions(grid)
        assert positions is not None, "refused when the method was built"
        patches, prefix = positions
        if encoder.pretrained:
            field.init_table(patches, grid)
        elif config.position_init == "sincos":
            field.init_sincos(grid)
            field.set_rms(patches.square().mean().sqrt().item())
        if field.class_position is not None and prefix is not None:
            field.class_position.copy_(prefix[:, :1])
        return field


def _check(config: IntertwinedConfig, encoder: Encoder) -> None:
    """Refuse settings that cannot be used."""
    if encoder.is_rotary:
        _check_rotary(config, encoder)
    elif encoder.vit.pos_embed is None and encoder.position_field is None:
        raise ConfigError(f"{encoder.name} has no positional embeddings, which this method needs; use another encoder")
    if config.gram_weight:
        raise ConfigError(
            "method.gram_weight: intertwined changes what positions mean, so patches can't keep the similarities of "
            "the start; leave it out"
        )
    low, high = config.position_mask_ratio
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"method.position_mask_ratio=({low:g}, {high:g}): 0 <= smallest <= largest <= 1 is needed")
    low, high = config.scale_range
    if not 0 < low <= high <= 1:
        raise ConfigError(f"method.scale_range=({low:g}, {high:g}): 0 < smallest <= largest <= 1 is needed")


def _check_rotary(config: IntertwinedConfig, encoder: Encoder) -> None:
    """Refuse rotary positions that can't be read at the places of crops, and masked ones."""
    if not reads_boxes(encoder.vit) or encoder.vit.pos_embed is not None:
        raise ConfigError(
            f"{encoder.name} has rotary positions that can't be read at the place of a crop, as DINOv3's can; use "
            "another encoder, such as vit_small_patch16_dinov3 or vit_small_patch16_224"
        )
    if config.position_loss:
        raise ConfigError(
            f"method.position_loss: {encoder.name} has rotary positions, and masked positions need a table or a field; "
            "set method.position_loss=false"
        )
