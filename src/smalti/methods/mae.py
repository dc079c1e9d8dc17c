"""MAE: masked autoencoders.

Paper: He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021, arXiv:2111.06377v3.
Letters: B images, N patches, L visible and M masked ones, D embed_dim, P = C*ph*pw values per patch.
Differs from the paper: the values of a patch are ordered (channel, row, column), not (row, column, channel), which does
not change the loss; masked patches are not embedded, and the prediction head runs on masked patches only: equal numbers
for less work.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import DepthFromZero, NumHeads, Width, settings
from smalti.data.crops import MultiCrop, ViewSpec
from smalti.data.signals.signal_views import SignalViews
from smalti.data.views import ViewMaker, Views
from smalti.errors import ConfigError
from smalti.functional.masking import random_mask
from smalti.functional.patches import patchify, standardize_patches
from smalti.functional.positions import sincos_positions
from smalti.functional.precision import at_least_float32
from smalti.functional.random import sample_uniform
from smalti.layers.decoder import MaskedDecoder, decoder_width, hidden_ids
from smalti.layers.gaussian_bias import Places
from smalti.methods.base import EncoderMethod, MethodConfig, Reference, refuse_changed, register
from smalti.models.encoder import Encoder


@settings
class MAEConfig(MethodConfig):
    """Settings of MAE; the paper's values for ViT-B, except that the decoder's width depends on the encoder's."""

    name: str = "mae"
    mask_ratio: float = 0.75
    """Fraction of masked patches, in (0, 1); ``int(N * (1 - mask_ratio))`` stay visible."""
    norm_pix_loss: bool = True
    """Standardise the pixels of each target patch."""
    decoder_dim: Width | None = None
    """Width of the decoder; None: 512 (the paper's) for encoders of width 768 or more, else two thirds of theirs."""
    decoder_depth: DepthFromZero = 8
    """Blocks of the decoder."""
    decoder_num_heads: NumHeads | None = None
    """Attention heads of the decoder; None: width / 32 (16 at 512, the paper's)."""
    positions: Literal["sincos", "learned"] = "sincos"
    """``sincos`` (fixed, the paper's) or ``learned``; pretrained encoders keep their positions."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crop, as a fraction of the image."""


class Visible(NamedTuple):
    """Which patches of each image are visible."""

    ids_keep: Int[Tensor, "B L"]
    """Indices of the visible patches."""
    ids_masked: Int[Tensor, "B M"]
    """Indices of the masked patches, ascending."""
    ids_restore: Int[Tensor, "B N"]
    """Order that puts visible and masked tokens back into raster order."""


def reconstruction_loss(
    prediction: Float[Tensor, "B M P"], target: Float[Tensor, "B M P"], norm_pix: bool
) -> Float[Tensor, ""]:
    """Mean squared error over the masked patches: Sec. 3 "Reconstruction target".

    Args:
        prediction: ``(B, M, P)``, any float type; compared in float32.
        target: ``(B, M, P)`` normalised pixels of the masked patches.
        norm_pix: standardise each target patch by its mean and unbiased variance, eps 1e-6.
    """
    target = at_least_float32(target)
    if norm_pix:
        target = standardize_patches(target)
    return (
        (at_least_float32(prediction) - target).square().mean()
    )  # one mean is enough: every image has as many masked patches


@torch.no_grad()
def mean_patch_error(target: Float[Tensor, "B M P"], norm_pix: bool) -> Float[Tensor, ""]:
    """The :func:`reconstruction_loss` of predicting every masked patch by the mean of all masked patches."""
    target = at_least_float32(target)
    target = standardize_patches(target) if norm_pix else target
    return target.flatten(0, 1).var(0, correction=0).mean()


@register("mae")
class MAE(EncoderMethod):
    """Mask most patches, encode the visible ones, reconstruct the pixels of the masked ones."""

    Config = MAEConfig
    title = "masked autoencoder: reconstructs the pixels of masked patches"
    paper = "He et al. 2021, arXiv:2111.06377v3"
    takes_signals: ClassVar[bool] = True
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        "mean_predictor_mse": LogColumn(
            "Error of the mean patch", "Loss of always predicting the mean patch; the method must get below it."
        ),
    }
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "base_lr": 1.5e-4,
            "betas": [0.9, 0.95],
            "weight_decay": 0.05,
            "warmup_ratio": 0.05,
            "min_lr": 0.0,
            "clip_norm": None,
        }
    }

    def __init__(self, encoder: Encoder, config: MAEConfig) -> None:
        super().__init__(encoder, config)
        if not 0 < config.mask_ratio < 1:
            raise ConfigError(f"method.mask_ratio={config.mask_ratio}: must be strictly between 0 and 1")
        if encoder.takes_signals:
            refuse_changed(config, ("crop_scale",), "applies to images, but the data are signals")
        self.encoder = encoder
        width = encoder.embed_dim
        dim = config.decoder_dim or decoder_width(width)
        values = encoder.in_chans * encoder.patch_size[0] * encoder.patch_size[1]
        self.decoder = MaskedDecoder(
            width,
            dim,
            config.decoder_depth,
            config.decoder_num_heads or max(dim // 32, 1),
            values,
            encoder.num_prefix_tokens,
        )
        init_linear_layers(self.decoder)
        nn.init.normal_(self.decoder.mask_token, std=0.02)
        if not encoder.pretrained:
            init_encoder(encoder, fixed_positions=config.positions == "sincos")
        elif encoder.fixed_positions and encoder.vit.pos_embed is not None:
            encoder.vit.pos_embed.requires_grad_(config.positions != "sincos")

    def make_views(self, image_size: int) -> ViewMaker:
        """One random resized crop and a flip: Table 8 of the paper. Windows of signals are unchanged."""
        if self.encoder.takes_signals:
            return SignalViews(channel_dropout=0.0, amplitude=(1.0, 1.0))
        return MultiCrop([ViewSpec(count=1, size=image_size, scale=self.config.crop_scale, flip_prob=0.5)])

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss term ``reconstruction``."""
        images = self.encoder.normalize(views.global_crops)
        visible = self.draw_visible(images, views.keys)
        prediction = self.predict(images, visible)
        target = self.target(images, visible)
        self.observations = {"mean_predictor_mse": mean_patch_error(target, self.config.norm_pix_loss)}
        return {"reconstruction": reconstruction_loss(prediction, target, self.config.norm_pix_loss)}

    def draw_visible(self, images: Float[Tensor, "B C H W"], keys: Int[Tensor, " B"]) -> Visible:
        """Step 1: choose the visible patches of each image.

        Args:
            images: normalised.
            keys: ``(B,)`` seeds of the images.
        """
        num_patches = images.shape[-2] * images.shape[-1] // (self.encoder.patch_size[0] * self.encoder.patch_size[1])
        num_keep = int(num_patches * (1 - self.config.mask_ratio))
        ids_keep, mask, ids_restore = random_mask(sample_uniform(keys, num_patches), num_keep)
        return Visible(ids_keep, hidden_ids(mask, num_patches - num_keep), ids_restore)

    def predict(self, images: Float[Tensor, "B C H W"], visible: Visible) -> Float[Tensor, "B M P"]:
        """Step 2: encode the visible patches, and decode the pixels of the masked ones."""
        tokens, grid = self.encoder.embed_patches(images, visible.ids_keep)
        sequence = self.encoder.assemble(tokens, self.encoder.positions(grid), visible.ids_keep)
        sequence = self.encoder.forward_tokens(sequence, places=Places(grid, visible.ids_keep))
        return self.decoder(sequence, visible.ids_masked, visible.ids_restore, grid)

    def target(self, images: Float[Tensor, "B C H W"], visible: Visible) -> Float[Tensor, "B M P"]:
        """Step 3: the pixels of the masked patches."""
        pixels = patchify(images, self.encoder.patch_size)
        return pixels.gather(1, visible.ids_masked[..., None].expand(-1, -1, pixels.shape[-1]))

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """Predicts the mean of all masked patches."""
        if not {"loss/reconstruction", "mean_predictor_mse"} <= row.keys():
            return None
        value, constant = row["loss/reconstruction"], row["mean_predictor_mse"]
        return Reference("the reconstruction loss", value, constant, "the mean of all masked patches")

    def networks(self) -> dict[str, Encoder]:
        """The encoder; the decoder is dropped."""
        return {"encoder": self.encoder}


def init_linear_layers(module: nn.Module) -> None:
    """Xavier uniform for linear layers, biases 0: App. A.1."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def init_encoder(encoder: Encoder, fixed_positions: bool) -> None:
    """The paper's initialisation (App. A.1): patch projection as a matrix, class token normal 0.02, fixed positions."""
    vit = encoder.vit
    init_linear_layers(vit)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.flatten(1))
    if vit.cls_token is not None:
        nn.init.normal_(vit.cls_token, std=0.02)
    if fixed_positions and vit.pos_embed is not None:
        table = sincos_positions(encoder.embed_dim, vit.patch_embed.grid_size)[None]
        vit.pos_embed.zero_()  # positions of prefix tokens stay zero
        vit.pos_embed[:, -table.shape[1] :] = table
        vit.pos_embed.requires_grad_(False)
        encoder.fixed_positions = True
