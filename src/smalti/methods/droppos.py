"""DropPos: predict the dropped positions of visible patches.

Paper: Wang et al., "DropPos: Pre-Training Vision Transformers by Reconstructing Dropped Positions", NeurIPS 2023,
arXiv:2309.03576. We had the released code, not the text; "the code" below is
that.
Letters: B images, N patches, L visible ones, M of these without position, D embed_dim, K = h*w cells of the head.
Differs from the code: the table of smoothed labels has the labels' own grid, and its rows sum to 1
(``legacy_smoothing`` is the code's); the width of smoothing shrinks every step, not every epoch; the weights of
attentive reconstruction come from an encoder in eval mode, and are summed over all processes; the head runs only on
tokens without position: equal numbers for less work. Tokens are not shuffled, as no network here sees their order.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import DepthFromZero, NonNegative, NumHeads, Positive, PositiveRatio, RatioBelowOne, Width, settings
from smalti.data.crops import MultiCrop, ViewSpec
from smalti.data.signals.signal_views import SignalViews
from smalti.data.views import ViewMaker, Views
from smalti.errors import ConfigError
from smalti.functional.masking import random_mask
from smalti.functional.patches import patchify
from smalti.functional.positions import matching_cells
from smalti.functional.precision import at_least_float32
from smalti.functional.processes import weighted_mean
from smalti.functional.random import sample_uniform
from smalti.layers.decoder import MaskedDecoder, decoder_width, hidden_ids
from smalti.methods.base import EncoderMethod, MethodConfig, Reference, refuse_changed, register
from smalti.methods.mae import init_encoder, init_linear_layers, reconstruction_loss
from smalti.models.encoder import Encoder, eval_mode
from smalti.models.pooling import PatchFeatures

_POSITIONS = 1  # random stream of a sample; 0 masks patches, as in MAE
ATTENTIVE_TEMP = 0.1
_NO_SPREAD = 0.01  # in cells: the next cell's weight, exp(-1e4), is 0 in float32 well before


@settings
class DropPosConfig(MethodConfig):
    """Settings of DropPos; the published values for ViT-B, except that the decoder's width depends on the encoder's."""

    name: str = "droppos"
    mask_ratio: RatioBelowOne = 0.75
    """Fraction of masked patches, in [0, 1); ``int(N * (1 - mask_ratio))`` stay visible."""
    pos_mask_ratio: PositiveRatio = 0.75
    """Fraction of visible patches without position, in (0, 1]; ``int(L * (1 - pos_mask_ratio))`` keep theirs."""
    pos_token: Literal["learned", "zeros", "shuffled"] = "learned"
    """Replacement of a dropped position: a learned vector, zeros, or the position of another such patch. The code
    offers all three."""
    sigma: NonNegative = 1.0
    """Width of label smoothing in cells at the start; 0: one-hot labels."""
    sigma_decay: bool = True
    """Shrink the width of smoothing linearly to 0."""
    legacy_smoothing: bool = False
    """Official code's smoothing: distances on a grid with as many cells per side as a patch has pixels, rows that don't
    sum to 1; kept for parity."""
    attentive: bool = True
    """Weight patches by their similarity to the class token, from a forward pass of the whole image with positions."""
    ignore_confident: bool = False
    """Exclude patches whose true cell has a higher probability than in the smoothed label. Official code's option,
    off there; kept for parity."""
    reconstruct: bool = False
    """Add MAE's reconstruction of the masked patches. Official code's option, off there; kept for parity."""
    pos_weight: Positive = 0.05
    """Weight of the position loss with ``reconstruct`` (0.1 for ViT-L)."""
    norm_pix_loss: bool = True
    """``reconstruct``: standardise the pixels of each target patch."""
    decoder_dim: Width | None = None
    """Width of the decoder; None: 512 (published) for encoders of width 768 or more, else two thirds of theirs."""
    decoder_depth: DepthFromZero = 2
    """Blocks of the position decoder, and of the decoder of ``reconstruct``."""
    decoder_num_heads: NumHeads | None = None
    """Attention heads of the decoders; None: width / 32 (16 at 512, the published number)."""
    positions: Literal["sincos", "learned"] = "sincos"
    """``sincos`` (fixed, as published) or ``learned``; pretrained encoders keep their positions."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crop, as a fraction of the image."""


def smoothed_labels(grid: tuple[int, int], sigma: float, device: torch.device | None = None) -> Float[Tensor, "K K"]:
    """For each cell of a grid, a distribution over all cells: ``exp(-dist^2 / sigma^2)``, normalised.

    Args:
        grid: ``(h, w)``, K = h * w.
        sigma: width in cells; 0 gives the identity matrix.
        device: device of the result.

    Returns:
        ``(K, K)`` float32; rows sum to 1.
    """
    closeness = _closeness(grid, sigma, device)
    return closeness / closeness.sum(1, keepdim=True)


def legacy_labels(
    grid: tuple[int, int], side: int, sigma: float, device: torch.device | None = None
) -> Float[Tensor, "K K"]:
    """The released code's table: the first K cells of a grid of ``side`` x ``side``, normalised by columns.

    At 224 pixels the labels' grid is 14 x 14, the table's 16 x 16 (``side``: the pixels of a patch), so the cells above
    and below are shifted by two. Rows at the borders don't sum to 1.

    Args:
        grid: ``(h, w)`` of the labels, K = h * w.
        side: at least the square root of K.
        sigma: as in :func:`smoothed_labels`.
        device: where to.
    """
    closeness = _closeness((side, side), sigma, device)
    num_cells = grid[0] * grid[1]
    return (closeness / closeness.sum(1))[:num_cells, :num_cells]


def _closeness(grid: tuple[int, int], sigma: float, device: torch.device | None) -> Float[Tensor, "K K"]:
    """``exp(-dist^2 / sigma^2)``, as the Kronecker product of rows and columns."""
    axes = []
    for length in grid:
        places = torch.arange(length, device=device, dtype=torch.float32)
        dist = places - places[:, None]
        axes.append(torch.exp(-(dist / sigma).square()) if sigma > _NO_SPREAD else torch.eye(length, device=device))
    return torch.kron(*axes)


def position_loss(
    logits: Float[Tensor, "B M K"], target: Float[Tensor, "B M K"], weights: Float[Tensor, "B M"]
) -> Float[Tensor, ""]:
    """Cross-entropy over cells: weighted mean over all tokens of the joint batch.

    Args:
        logits: any float type; compared in float32.
        target: distributions over cells.
        weights: at least 0, with any sum.
    """
    cost = -(target * F.log_softmax(at_least_float32(logits), dim=-1)).sum(-1)
    return weighted_mean(cost, weights)


def similarity_to_class(features: PatchFeatures) -> Float[Tensor, "B N"]:
    """Softmax over an image's patches of their cosine similarity to its class token."""
    similarity = F.cosine_similarity(at_least_float32(features.patches), at_least_float32(features.prefix[:, :1]), -1)
    return F.softmax(similarity / ATTENTIVE_TEMP, dim=-1)


class PositionDecoder(nn.Module):
    """A few blocks without positions, and a linear classifier over cells.

    Args:
        in_dim: width of the encoder's tokens.
        dim: width of the blocks, a multiple of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        num_cells: K.
    """

    def __init__(self, in_dim: int, dim: int, depth: int, num_heads: int, num_cells: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"decoder_dim={dim} must be a multiple of decoder_num_heads={num_heads}")
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(in_dim, dim)
        self.blocks = nn.Sequential(
            *(Block(dim, num_heads, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth))
        )
        self.norm = norm_layer(dim)
        self.head = nn.Linear(dim, num_cells)

    def forward(self, sequence: Float[Tensor, "B T D"], places: Int[Tensor, "B M"]) -> Float[Tensor, "B M K"]:
        """Logits of the tokens at some indices of the sequence; all tokens take part in the blocks."""
        tokens = self.blocks(self.embed(sequence))
        tokens = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
        return self.head(self.norm(tokens))


@register("droppos")
class DropPos(EncoderMethod):
    """Mask most patches, drop the positions of most visible ones, and predict these positions."""

    Config = DropPosConfig
    title = "predicts the positions of visible patches whose positional embeddings were dropped"
    paper = "Wang et al. 2023, arXiv:2309.03576"
    hides_positions = True
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        "position_accuracy": LogColumn(
            "Position accuracy", "Fraction of dropped positions that are predicted correctly; higher is better."
        ),
    }
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "base_lr": 1.5e-4,
            "betas": [0.9, 0.95],
            "weight_decay": 0.05,
            "warmup_ratio": 0.05,
            "min_lr": 0.0,
            "clip_norm": 5.0,
            "clip": "tensor",
        }
    }
    takes_signals: ClassVar[bool] = True
    signal_defaults: ClassVar[dict[str, Any]] = {"method": {"mask_ratio": 0.5}}
    """Windows may have few patches: of 8, a mask ratio of 0.75 leaves 2 visible, and none of them with its position."""

    def __init__(self, encoder: Encoder, config: DropPosConfig) -> None:
        super().__init__(encoder, config)
        _check(config, encoder)
        self.encoder = encoder
        self.head_grid = encoder.check_size(*encoder.img_size)
        """Grid of the position classes: the encoder's native one."""
        width, num_cells = encoder.embed_dim, self.head_grid[0] * self.head_grid[1]
        dim = config.decoder_dim or decoder_width(width)
        num_heads = config.decoder_num_heads or max(dim // 32, 1)
        self.decoder = PositionDecoder(width, dim, config.decoder_depth, num_heads, num_cells)
        init_linear_layers(self.decoder)
        self.pos_token = nn.Parameter(torch.empty(1, 1, width)) if config.pos_token == "learned" else None
        if self.pos_token is not None:
            nn.init.normal_(self.pos_token, std=0.02)
        self.pixel_decoder: MaskedDecoder | None = None
        if config.reconstruct:
            values = encoder.in_chans * encoder.patch_size[0] * encoder.patch_size[1]
            self.pixel_decoder = MaskedDecoder(
                width, dim, config.decoder_depth, num_heads, values, encoder.num_prefix_tokens
            )
            init_linear_layers(self.pixel_decoder)
            nn.init.normal_(self.pixel_decoder.mask_token, std=0.02)
        if not encoder.pretrained:
            init_encoder(encoder, fixed_positions=config.positions == "sincos")
        elif encoder.fixed_positions and encoder.vit.pos_embed is not None:
            encoder.vit.pos_embed.requires_grad_(config.positions != "sincos")

    def make_views(self, image_size: int) -> ViewMaker:
        """One random resized crop and a flip. Windows of signals are unchanged."""
        if self.encoder.takes_signals:
            return SignalViews(channel_dropout=0.0, amplitude=(1.0, 1.0))
        return MultiCrop([ViewSpec(count=1, size=image_size, scale=self.config.crop_scale, flip_prob=0.5)])

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss terms ``position`` and, with ``reconstruct``, ``reconstruction``."""
        config, encoder = self.config, self.encoder
        images = encoder.normalize(views.global_crops)
        grid = encoder.check_size(images.shape[-2], images.shape[-1])
        num_patches = grid[0] * grid[1]
        num_keep = int(num_patches * (1 - config.mask_ratio))
        ids_keep, mask, ids_restore = random_mask(sample_uniform(views.keys, num_patches), num_keep)
        dropped = self._draw_dropped(views, num_keep)
        is_dropped = torch.zeros_like(ids_keep, dtype=torch.bool).scatter(1, dropped, True)

        tokens, _ = encoder.embed_patches(images, ids_keep)
        positions = self._positions_with_gaps(grid, ids_keep, dropped, is_dropped)
        sequence = encoder.forward_tokens(encoder.assemble(tokens, positions))

        logits = at_least_float32(self.decoder(sequence, dropped + encoder.num_prefix_tokens))
        cells = matching_cells(grid, self.head_grid, ids_keep.device)
        labels = cells[ids_keep.gather(1, dropped)]  # (B, M)
        target = self.label_table(progress, logits.device)[labels]
        weights = torch.ones_like(logits[..., 0])
        if config.attentive:
            weights = self._attentive_weights(images, ids_keep).gather(1, dropped)
        if config.ignore_confident:
            likelihood = logits.detach().softmax(-1).gather(-1, labels[..., None])[..., 0]
            weights = weights * (likelihood <= target.amax(-1))
        losses = {"position": position_loss(logits, target, weights)}
        self.observations = {"position_accuracy": (logits.detach().argmax(-1) == labels).float().mean()}

        if self.pixel_decoder is not None:
            hidden = hidden_ids(mask, num_patches - num_keep)
            prediction = self.pixel_decoder(sequence, hidden, ids_restore, grid)
            pixels = patchify(images, encoder.patch_size)
            pixels = pixels.gather(1, hidden[..., None].expand(-1, -1, pixels.shape[-1]))
            losses["position"] = config.pos_weight * losses["position"]
            losses["reconstruction"] = reconstruction_loss(prediction, pixels, config.norm_pix_loss)
        return losses

    def couplings(self) -> dict[str, bool]:
        """The loss is normalised by the sum of the weights over the batch."""
        config = self.config
        return {"attentive weights": config.attentive, "confident patches left out": config.ignore_confident}

    def label_table(self, progress: float, device: torch.device | None = None) -> Float[Tensor, "K K"]:
        """Smoothed labels of all cells at a progress of training."""
        config = self.config
        sigma = config.sigma * (1 - progress) if config.sigma_decay else config.sigma
        if config.legacy_smoothing:
            return legacy_labels(self.head_grid, self.encoder.patch_size[0], sigma, device)
        return smoothed_labels(self.head_grid, sigma, device)

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """The uniform guess over cells; for the accuracy, since the loss may leave out confident patches."""
        num_cells, accuracy = self.decoder.head.out_features, row.get("position_accuracy")
        if accuracy is None:
            return None
        guess = f"the uniform guess among {num_cells} cells"
        return Reference("the accuracy of positions", accuracy, 1 / num_cells, guess, higher_is_better=True)

    def networks(self) -> dict[str, Encoder]:
        """The encoder; the decoders are dropped."""
        return {"encoder": self.encoder}

    def _draw_dropped(self, views: Views, num_visible: int) -> Int[Tensor, "B M"]:
        """Visible tokens that lose their position, as indices into them."""
        num_known = int(num_visible * (1 - self.config.pos_mask_ratio))
        order = sample_uniform(views.keys, num_visible, _POSITIONS).argsort(dim=1, stable=True)
        return order[:, num_known:]

    def _positions_with_gaps(
        self,
        grid: tuple[int, int],
        ids_keep: Int[Tensor, "B L"],
        dropped: Int[Tensor, "B M"],
        is_dropped: Bool[Tensor, "B L"],
    ) -> tuple[Tensor, Tensor | None]:
        """Positions of the visible patches, ``(B, L, D)``, with replacements for the dropped ones; and the prefix's."""
        positions = self.encoder.positions(grid)
        assert positions is not None, "refused when the method was built"
        if self.config.pos_token == "shuffled":  # each gets the next one's: never its own, if there are two
            wrong = ids_keep.gather(1, dropped).roll(1, dims=1)
            ids_keep = ids_keep.scatter(1, dropped, wrong)
        patch_pos = positions[0].expand(len(ids_keep), -1, -1)
        patch_pos = patch_pos.gather(1, ids_keep[..., None].expand(-1, -1, patch_pos.shape[-1]))
        if self.pos_token is not None:
            patch_pos = torch.where(is_dropped[..., None], self.pos_token.to(patch_pos.dtype), patch_pos)
        elif self.config.pos_token == "zeros":
            patch_pos = patch_pos * ~is_dropped[..., None]
        return patch_pos, positions[1]

    @torch.no_grad()
    def _attentive_weights(
        self, images: Float[Tensor, "B C H W"], ids_keep: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B L"]:
        """Weights of the visible patches: similarity to the class token of the whole image; they sum to 1 per image."""
        with eval_mode(self.encoder):
            weights = similarity_to_class(self.encoder.encode(images)).gather(1, ids_keep)
        return weights / weights.sum(1, keepdim=True)


def _check(config: DropPosConfig, encoder: Encoder) -> None:
    """Refuse settings that cannot be used."""
    if encoder.takes_signals:
        refuse_changed(config, ("crop_scale",), "applies to images, but the data are signals")
        if config.legacy_smoothing:
            raise ConfigError(
                "method.legacy_smoothing=True: the released code's table is of a square grid, but the patches of "
                "signals lie in a row; leave it out"
            )
    if config.reconstruct and not config.mask_ratio:
        raise ConfigError("method.reconstruct needs masked patches; raise method.mask_ratio above 0")
    if encoder.is_rotary:
        raise ConfigError(
            f"{encoder.name} has rotary positions, which can't be dropped for some patches of an image; use another "
            "encoder, such as vit_small_patch16_224"
        )
    if encoder.vit.pos_embed is None:
        raise ConfigError(f"{encoder.name} has no positional embeddings to drop; use another encoder")
    if config.attentive and not encoder.has_class_token:
        raise ConfigError(
            f"method.attentive needs a class token, which {encoder.name} lacks; use method.attentive=false"
        )
    height, width = encoder.check_size(*encoder.img_size)
    side = encoder.patch_size[0]
    if config.legacy_smoothing and side * side < height * width:
        raise ConfigError(
            f"method.legacy_smoothing: the released code's table has {side}x{side} cells (a patch's pixels), fewer "
            f"than the {height}x{width} patches; it is for 224 px with patches of 16"
        )
