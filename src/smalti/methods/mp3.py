"""MP3: masked patch position prediction.

Paper: Zhai et al., "Position Prediction as an Effective Pretraining Strategy", ICML 2022, arXiv:2207.07611. We
did not have its text; "the code" is that of PART, which builds on this method.
Letters: B images, N patches, M those whose position is predicted, D embed_dim, K cells of the head.
Differs from the code: the class token is first, which makes no difference without positions; augmentation is crop, flip
and colour jitter, without RandAugment, whose fill colour marks the border.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import NonNegative, RatioBelowOne, settings
from smalti.data.color import ColorConfig
from smalti.data.crops import MultiCrop, ViewSpec
from smalti.data.signals.signal_views import SignalViews
from smalti.data.views import ViewMaker, Views
from smalti.errors import ConfigError
from smalti.functional.masking import random_mask
from smalti.functional.positions import matching_cells
from smalti.functional.precision import at_least_float32
from smalti.functional.random import sample_uniform
from smalti.layers.decoder import hidden_ids
from smalti.layers.relative_encoder import init_linear
from smalti.methods.base import EncoderMethod, MethodConfig, Reference, refuse_changed, register, uniform_guess
from smalti.models.encoder import Encoder


@settings
class MP3Config(MethodConfig):
    """Settings of MP3; the released values for CIFAR."""

    name: str = "mp3"
    key_mask_ratio: RatioBelowOne = 0.5
    """eta: fraction of patches, in [0, 1), that no patch can attend to in training; ``int(N * (1 - eta))``
    remain keys."""
    loss_patches: Literal["all", "hidden"] = "all"
    """Patches in the loss: all (the code's), or those masked from keys and values (a variant in the code)."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a fraction of the image."""
    color_jitter: NonNegative = 0.4
    """Strength of brightness, contrast and saturation jitter; 0: none."""


def position_loss(logits: Float[Tensor, "B M K"], labels: Int[Tensor, "B M"]) -> Float[Tensor, ""]:
    """Cross-entropy over cells: mean over images and patches, in float32."""
    return F.cross_entropy(at_least_float32(logits).flatten(0, 1), labels.flatten())


@register("mp3")
class MP3(EncoderMethod):
    """Encode the patches of the grid without positions, and classify the cell of each."""

    Config = MP3Config
    title = "predicts the grid position of each patch, without positional embeddings"
    paper = "Zhai et al. 2022, arXiv:2207.07611"
    hides_positions = True
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        "position_accuracy": LogColumn(
            "Position accuracy", "Fraction of patches whose position is predicted correctly; higher is better."
        ),
    }
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "base_lr": 2.5e-4,
            "betas": [0.9, 0.999],
            "weight_decay": 0.05,
            "warmup_ratio": 0.05,
            "min_lr": 1e-5,
            "clip_norm": None,
        },
        "drop_path": 0.1,
    }

    no_weight_decay = ("cls_token",)  # as in the released code, which is DeiT's
    takes_signals: ClassVar[bool] = True
    signal_defaults: ClassVar[dict[str, Any]] = {"optim": {"min_lr": 0.0}, "drop_path": 0.0}
    """Those of PART, whose task is close to this one."""

    def __init__(self, encoder: Encoder, config: MP3Config) -> None:
        super().__init__(encoder, config)
        if config.loss_patches == "hidden" and not config.key_mask_ratio:
            raise ConfigError("method.loss_patches=hidden needs method.key_mask_ratio above 0")
        if encoder.takes_signals:
            refuse_changed(config, ("crop_scale", "color_jitter"), "applies to images, but the data are signals")
        self.encoder = encoder
        self.head_grid = encoder.check_size(*encoder.img_size)
        """Grid of the position classes: the encoder's native one."""
        self.head = nn.Linear(encoder.embed_dim, self.head_grid[0] * self.head_grid[1])
        init_linear(self.head)
        encoder.draw_class_token()
        encoder.drop_positions()
        if encoder.vit.pos_embed is not None:
            encoder.vit.pos_embed.requires_grad_(False)

    def make_views(self, image_size: int) -> ViewMaker:
        """A random resized crop, a flip and colour jitter: no padding, no rotation, nothing that leaves a frame. For
        signals: channel dropout and amplitude jitter, as in PART."""
        if self.encoder.takes_signals:
            return SignalViews()
        strength = self.config.color_jitter
        color = ColorConfig(
            brightness=strength, contrast=strength, saturation=strength, hue=0.0, jitter_prob=1.0, gray_prob=0.0
        )
        view = ViewSpec(
            count=1,
            size=image_size,
            scale=self.config.crop_scale,
            flip_prob=0.5,
            color=color if strength else None,
        )
        return MultiCrop([view])

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """``{"position": ...}``."""
        encoder = self.encoder
        images = encoder.normalize(views.global_crops)
        grid = encoder.check_size(images.shape[-2], images.shape[-1])
        cells = matching_cells(grid, self.head_grid, images.device)
        mask = self.draw_mask(views, len(cells))
        tokens = self.encode(images, mask)
        labels = cells.expand(len(tokens), -1)
        if mask is not None and self.config.loss_patches == "hidden":
            hidden = hidden_ids(mask, len(cells) - self._num_keys(len(cells)))
            tokens = tokens.gather(1, hidden[..., None].expand(-1, -1, tokens.shape[-1]))
            labels = labels.gather(1, hidden)
        logits = self.head(tokens)
        self.observations = {"position_accuracy": (logits.detach().argmax(-1) == labels).float().mean()}
        return {"position": position_loss(logits, labels)}

    def draw_mask(self, views: Views, num_patches: int) -> Bool[Tensor, "B N"] | None:
        """Patches that are masked as keys; None: no masking (in eval mode, or with a ratio of 0)."""
        if not self.training or not self.config.key_mask_ratio:
            return None
        return random_mask(sample_uniform(views.keys, num_patches), self._num_keys(num_patches))[1]

    def encode(self, images: Num[Tensor, "B C H W"], mask: Bool[Tensor, "B N"] | None = None) -> Float[Tensor, "B N D"]:
        """Tokens of all patches, in raster order, which the network does not see.

        Args:
            images: normalised.
            mask: True where a patch is masked as key, in all blocks; prefix tokens never are.
        """
        tokens, _ = self.encoder.embed_patches(images)
        num_prefix = self.encoder.num_prefix_tokens
        is_key = None if mask is None else F.pad(~mask, (num_prefix, 0), value=True)
        return self.encoder.forward_tokens(self.encoder.assemble(tokens, None), is_key)[:, num_prefix:]

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """The uniform guess over cells."""
        return uniform_guess(row, "position", self.head.out_features, "cells")

    def networks(self) -> dict[str, Encoder]:
        """The encoder, without positions until it is fine-tuned."""
        return {"encoder": self.encoder}

    def _num_keys(self, num_patches: int) -> int:
        return int(num_patches * (1 - self.config.key_mask_ratio))
