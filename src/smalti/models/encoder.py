"""Encoder: an adapter for timm's ``VisionTransformer`` and ``Eva``, used by all of Smalti.

Letters: B images, C channels, H W pixels, h w the patch grid, N = h*w patches, R prefix tokens (class token first,
then registers), D embed_dim, L visible patches.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalti.config import to_tree
from smalti.errors import ConfigError, ShapeError
from smalti.functional.patches import patchify
from smalti.functional.positions import Resampling
from smalti.layers.attention import attention_modules, attention_weights, num_heads_of
from smalti.layers.gaussian_bias import Places, attach_bias, attention_mask
from smalti.layers.last_block import Chosen, block_at
from smalti.layers.pooling import PRRConfig
from smalti.layers.position_field import PositionField
from smalti.layers.stochastic_depth import Kept, draw_kept, run_kept, set_rates
from smalti.layers.token_pruning import TokenPruning
from smalti.models.pooling import MODULES, PatchFeatures, make_pool, pool_features
from smalti.models.positions import Positions, field_positions, field_table, table_positions
from smalti.models.rotary import Rotation, is_rotary, rotation
from smalti.models.weights import LoadConfig, LoadReport

TIMM_MODULES = ("vision_transformer", "deit", "eva")
"""timm modules whose models can be wrapped."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Origin(NamedTuple):
    """The training run that an encoder comes from."""

    checkpoint: Path
    """Folder of the checkpoint."""
    network: str
    """Name of the network in it."""
    load: LoadConfig
    """How its weights were loaded."""


class ClassHead(NamedTuple):
    """Linear classification head stored with the encoder."""

    weight: Tensor
    """``(K, D)``."""
    bias: Tensor
    """``(K,)``."""
    classes: tuple[str, ...] = ()
    """K names; empty: not stored."""
    order: str = ""
    """Patch order if it was trained on the first patches only; empty: trained on whole images."""
    orders: str = ""
    """File with these orders, if there is one."""


class Encoder(nn.Module):
    """A timm ``VisionTransformer`` or ``Eva`` with patches as input and patch tokens as output.

    Supports models with or without class token, registers, LayerScale and pre-norm, 1..N input channels, and any image
    size divisible by the patch size: position embeddings are resampled to the grid, rotary positions computed for it.

    Args:
        vit: built by :func:`build_encoder`, that is with ``dynamic_img_size=True`` and no classification head.
        name: timm's name of the architecture.
        model_args: arguments with which ``timm.create_model`` builds the same model.
        mean: per channel, of images in 0..1; a single number applies to all channels.
        std: standard deviation, in the same form.
        pretrained: whether the weights come from training; methods then leave positions and weights as they are.
        pos_antialias: antialias the resampling of positions. True as in timm; False as in the official DINO, iBOT and
            DINOv2 code. DINOv2 features change strongly with it away from the native grid.
        pos_mode: interpolation of positions, ``bicubic`` or ``bilinear``.
        pos_offset: see :class:`smalti.functional.positions.Resampling`; 0.1 in the official DINO, iBOT, DINOv2 code.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        vit: VisionTransformer | Eva,
        name: str,
        model_args: Mapping[str, Any],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        pretrained: bool = False,
        pos_antialias: bool = True,
        pos_mode: str = "bicubic",
        pos_offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.vit = vit
        self.name = name
        self.model_args = dict(model_args)
        self.pretrained = pretrained
        self.pos_mode, self.pos_antialias, self.pos_offset = Resampling(pos_mode, pos_antialias, pos_offset).check()
        self.pool = "auto"
        self.prr = PRRConfig()
        """Of ``pool=prr``."""
        self.fixed_positions = False
        """Whether positions are a fixed table; a method that starts from these weights may keep it fixed."""
        self.position_free = False
        """Whether the weights were trained without positions: the table is zero; further training initialises one."""
        self.gaug: tuple[int, int] | None = None
        """Training grid of the Gaussian bias of attention logits; None: no bias. See :meth:`attach_gaug`."""
        self.lora: int | None = None
        """Rank of the updates of the blocks' linear layers; None: there are none. See
        :mod:`smalti.models.adaptation`."""
        self.norm_eps: float | None = None
        """Epsilon of all layer norms, if it is not the architecture's; see :meth:`set_norm_eps`."""
        self.position_field: PositionField | None = None
        """Continuous positions, evaluated at any grid, instead of a table; see :meth:`attach_field`."""
        self.class_head: ClassHead | None = None
        """Classification head trained with the encoder; not a part of the network."""
        self.token_pruning: TokenPruning | None = None
        """Prediction modules trained with the encoder, which drop tokens; not a part of the network."""
        self.checkpointing = False
        """Whether blocks keep only their input for the backward pass and compute the rest again: less memory, about a
        third more time."""
        self.source = ""
        """Where the weights come from, in words: a checkpoint and its network, a file."""
        self.origin: Origin | None = None
        """The run that the weights were loaded from; None for all others."""
        self.report: LoadReport | None = None
        """What became of each tensor of the file that the weights were loaded from."""
        self.register_buffer("_mean", torch.empty(1, vit.in_chans, 1, 1), persistent=False)
        self.register_buffer("_std", torch.empty(1, vit.in_chans, 1, 1), persistent=False)
        self.set_normalization(mean, std)

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Mean and standard deviation of images in 0..1: one value per channel, or one for all.

        Raises:
            ConfigError: for another number of values, one that isn't finite, or a deviation that isn't above 0.
        """
        self.mean, self.std = (
            _per_channel(values, self.in_chans, what) for values, what in ((mean, "mean"), (std, "std"))
        )
        if min(self.std) <= 0:
            raise ConfigError(f"std={list(self.std)}: standard deviations must be above 0")
        if not all(map(math.isfinite, (*self.mean, *self.std))):
            raise ConfigError(f"mean={list(self.mean)}, std={list(self.std)}: finite numbers are needed")
        self._mean.copy_(torch.tensor(self.mean).view(1, -1, 1, 1))
        self._std.copy_(torch.tensor(self.std).view(1, -1, 1, 1))

    def set_norm_eps(self, eps: float) -> None:
        """Set epsilon of all layer norms of the transformer, for weights that were trained with another one.

        Raises:
            ConfigError: if it isn't a small number above 0.
        """
        if not 0 < eps < 1:
            raise ConfigError(f"norm_eps={eps}: a small number above 0 is needed")
        norms = [module for module in self.vit.modules() if isinstance(module, nn.LayerNorm)]
        if all(norm.eps == eps for norm in norms):
            return
        for norm in norms:
            norm.eps = eps
        self.norm_eps = eps

    def set_pos_resampling(
        self, mode: str | None = None, antialias: bool | None = None, offset: float | None = None
    ) -> None:
        """Set how positions are resampled to grids other than the native one; None: leave this part unchanged.

        Raises:
            ConfigError: for a mode or an offset that can't be used.
        """
        given = Resampling(
            self.pos_mode if mode is None else mode,
            self.pos_antialias if antialias is None else antialias,
            self.pos_offset if offset is None else offset,
        )
        self.pos_mode, self.pos_antialias, self.pos_offset = given.check()

    @property
    def pos_resampling(self) -> Resampling:
        """How positions are resampled to another grid."""
        return Resampling(self.pos_mode, self.pos_antialias, self.pos_offset)

    @property
    def embed_dim(self) -> int:
        """D, the width of a token."""
        return self.vit.embed_dim

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return len(self.vit.blocks)

    @property
    def num_heads(self) -> int:
        """Attention heads of the first block."""
        return num_heads_of(self.vit.blocks[0])

    @property
    def patch_size(self) -> tuple[int, int]:
        """``(height, width)`` of a patch in pixels."""
        height, width = self.vit.patch_embed.patch_size
        return int(height), int(width)

    @property
    def img_size(self) -> tuple[int, int]:
        """``(H, W)`` at which the position embedding has its native grid, in pixels."""
        height, width = self.vit.patch_embed.img_size
        return int(height), int(width)

    @property
    def in_chans(self) -> int:
        """Channels of an input image."""
        return self.vit.in_chans

    @property
    def num_prefix_tokens(self) -> int:
        """R: the class token, if there is one, and the registers."""
        return self.vit.num_prefix_tokens

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        return self.vit.cls_token is not None

    @property
    def is_rotary(self) -> bool:
        """Whether queries and keys are rotated by the positions of their patches (RoPE)."""
        return is_rotary(self.vit)

    @property
    def takes_signals(self) -> bool:
        """Whether images have one row: windows of signals, ``(B, C, 1, T)``."""
        return self.img_size[0] == 1 and self.patch_size[0] == 1

    def config(self) -> dict[str, Any]:
        """Plain values from which :func:`encoder_from_config` builds the same architecture."""
        return {
            "architecture": self.name,
            "model_args": {**self.model_args, "img_size": list(self.img_size), "in_chans": self.in_chans},
            "mean": list(self.mean),
            "std": list(self.std),
            "pos_mode": self.pos_mode,
            "pos_antialias": self.pos_antialias,
            "pos_offset": self.pos_offset,
            "pool": self.pool,
            **({"prr": to_tree(self.prr)} if self.prr != PRRConfig() else {}),
            "fixed_positions": self.fixed_positions,
            **({"gaug": list(self.gaug)} if self.gaug else {}),
            **({"lora": self.lora} if self.lora is not None else {}),
            **({"norm_eps": self.norm_eps} if self.norm_eps is not None else {}),
            **({"position_free": True} if self.position_free else {}),
            **({"position_field": self.position_field.config()} if self.position_field is not None else {}),
        }

    def timm_args(self) -> dict[str, Any]:
        """Arguments with which ``timm.create_model(name, ...)`` builds the same network without pooling module."""
        arguments = {
            **self.model_args,
            "img_size": list(self.img_size),
            "in_chans": self.in_chans,
            "num_classes": 0,
            **plain_pooling(type(self.vit)),
            "global_pool": "token" if self.has_class_token and self.pool != "avg" else "avg",
        }
        return {key: value for key, value in arguments.items() if key != "drop_path_rate"}

    def check_size(self, height: int, width: int) -> tuple[int, int]:
        """The patch grid ``(h, w)`` of an image.

        Raises:
            ShapeError: if the patch size does not divide the image.
        """
        ph, pw = self.patch_size
        if height % ph or width % pw or min(height, width) < 1:
            fit = f"{max(height // ph, 1) * ph}x{max(width // pw, 1) * pw}"
            size = f"{ph}" if ph == pw else f"{ph}x{pw}"
            raise ShapeError(
                f"images are {height}x{width} pixels, which patch_size={size} does not divide; "
                f"crop them to {fit} or choose another patch_size"
            )
        return height // ph, width // pw

    def normalize(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Normalise images: ``(x - mean) / std``.

        Args:
            images: ``(B, C, H, W)``, uint8 in 0..255 or float in 0..1.
        """
        if images.shape[1] != self.in_chans:
            raise ShapeError(
                f"images have {images.shape[1]} channels, {self.name} takes {self.in_chans}; "
                f"read them with data.channels={self.in_chans} or build the encoder for {images.shape[1]}"
            )
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images
        return (scaled - self._mean) / self._std

    def encode(
        self, images: Num[Tensor, "B C H W"], norm: bool = True, ids_keep: Int[Tensor, "B L"] | None = None
    ) -> PatchFeatures:
        """Patch tokens of images, without the refinement of ``prr`` pooling.

        Args:
            images: ``(B, C, H, W)`` on the encoder's device; uint8 is normalised here, float must be already
                (:meth:`normalize`). H and W are multiples of the patch size.
            norm: whether to apply the final norm, as methods and :meth:`pooled` expect.
            ids_keep: ``(B, L)`` raster indices of the patches to encode, at their own positions; the others aren't
                embedded, and ``patches`` has the kept ones in this order. None: all.

        Raises:
            ShapeError: if the patch size does not divide the images, or the channels don't fit.
        """
        if images.dtype == torch.uint8:
            images = self.normalize(images)
        tokens, grid = self.embed_patches(images, ids_keep)
        sequence = self.assemble(tokens, self.positions(grid), ids_keep)
        sequence = self.forward_tokens(sequence, norm=norm, places=Places(grid, ids_keep))
        return PatchFeatures(sequence[:, self.num_prefix_tokens :], sequence[:, : self.num_prefix_tokens], grid)

    def encode_with_attention(self, images: Num[Tensor, "B C H W"]) -> tuple[PatchFeatures, Float[Tensor, "B heads N"]]:
        """As :meth:`encode`, with the class token's attention to the patches in the last block.

        Recomputed from queries and keys, since fused attention returns no weights; a head's row sums to 1 minus the
        attention to prefix tokens. Gaussian biases don't change this row.

        Raises:
            ConfigError: without a class token, or for blocks whose attention can't be recomputed.
        """
        if not self.has_class_token:
            raise ConfigError(f"{self.name} has no class token, whose attention could be read")
        (attn,) = attention_modules(self.vit.blocks[-1:], self.name)
        if images.dtype == torch.uint8:
            images = self.normalize(images)
        tokens, grid = self.embed_patches(images)
        seen: list[tuple[Tensor, Tensor | None]] = []
        hook = attn.register_forward_pre_hook(
            lambda _, args, given: seen.append((args[0], given.get("rope"))), with_kwargs=True
        )
        try:
            sequence = self.forward_tokens(self.assemble(tokens, self.positions(grid)), places=Places(grid))
        finally:
            hook.remove()
        ((inputs, rope),) = seen
        num_prefix = self.num_prefix_tokens
        attention = attention_weights(attn, inputs, num_queries=1, rope=rope)[:, :, 0, num_prefix:].float()
        return PatchFeatures(sequence[:, num_prefix:], sequence[:, :num_prefix], grid), attention

    def set_pool(self, pool: str, prr: PRRConfig | None = None, fresh: bool = False) -> None:
        """Set how tokens after the final norm are pooled to the image vector.

        ``cls``: class token; ``avg``: mean of the patch tokens; ``auto``: class token if there is one, else the mean;
        ``prr``: as ``auto``, after parameter-free attention over all tokens (:class:`~smalti.layers.pooling.PRRPool`;
        without a class token the mean is over all tokens); ``map``: timm's attention pooling of the patches by a
        learned query. A pooling with parameters (``map``, ``prr`` with norms) is part of the network, also in the
        teacher, the optimiser and checkpoints.

        Args:
            pool: one of :data:`POOLS`.
            prr: settings of ``prr``; None: the current ones.
            fresh: allow new parameters, randomly initialised from torch's generator, that are trained later.

        Raises:
            ConfigError: for another name, ``cls`` without a class token, settings that don't fit, or untrained
                parameters.
        """
        prr = prr or (self.prr if pool == self.pool else PRRConfig())
        if pool != "prr" and prr != PRRConfig():
            raise ConfigError(f"prr.* is about pool=prr, and pool={pool}; leave one of them out")
        if (pool, prr) == (self.pool, self.prr):
            return  # what is trained stays
        self.vit.attn_pool = self._pool_module(pool, prr, fresh)
        self.pool, self.prr = pool, prr

    def _pool_module(self, pool: str, prr: PRRConfig, fresh: bool = False) -> nn.Module | None:
        attn: Any = getattr(self.vit.blocks[0], "attn", None)
        shared = {"num_kv_heads": attn.num_kv_heads} if hasattr(attn, "num_kv_heads") else {}  # else one per block
        made = make_pool(
            pool,
            prr,
            name=self.name,
            timm_args={**self.timm_args(), **shared},
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            num_prefix_tokens=self.num_prefix_tokens,
            has_class_token=self.has_class_token,
            fresh=fresh,
        )
        return made if made is None else made.to(self._mean.device)

    def pooled(self, features: PatchFeatures, pool: str = "auto") -> Float[Tensor, "B D"]:
        """Pool the output of :meth:`encode` to one vector per image.

        Args:
            features: tokens of this encoder.
            pool: as in :meth:`set_pool`; ``auto``: the pooling set there.

        Raises:
            ConfigError: as :meth:`set_pool`.
        """
        pool = self.pool if pool == "auto" else pool
        if pool not in MODULES:
            return pool_features(features, pool, self.has_class_token)
        module: Any = self.vit.attn_pool if pool == self.pool else self._pool_module(pool, PRRConfig())
        if pool == "map" and isinstance(self.vit, VisionTransformer):  # timm's way: no prefix tokens; Eva has them
            return module(features.patches)
        return module(torch.cat([features.prefix, features.patches], dim=1))

    def image_features(
        self, images: Num[Tensor, "B C H W"], ids_keep: Int[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B D"]:
        """One vector per image, pooled from :meth:`encode` as set by :meth:`set_pool`; of the patches
        ``ids_keep`` only, if given."""
        return self.pooled(self.encode(images) if ids_keep is None else self.encode(images, ids_keep=ids_keep))

    # Lower-level interface, for methods.

    def embed_patches(
        self, images: Float[Tensor, "B C H W"], ids_keep: Int[Tensor, "B L"] | None = None
    ) -> tuple[Float[Tensor, "B L D"], tuple[int, int]]:
        """Linear embedding of the patches of normalised images, without positions and prefix tokens.

        Args:
            images: ``(B, C, H, W)`` normalised.
            ids_keep: ``(B, L)`` raster indices of the patches to embed; None: all, L = N. The other patches aren't
                computed.

        Returns:
            ``(B, L, D)`` tokens, and the grid ``(h, w)`` of the whole image.
        """
        grid = self.check_size(images.shape[-2], images.shape[-1])
        embed = self.vit.patch_embed
        if ids_keep is None:
            return embed(images).flatten(1, 2), grid
        pixels = patchify(images, self.patch_size)
        return self._embed_values(pixels.gather(1, ids_keep[..., None].expand(-1, -1, pixels.shape[-1]))), grid

    def embed_crops(self, crops: Float[Tensor, "B N C P Q"]) -> Float[Tensor, "B N D"]:
        """Linear embedding of any number of patches, from any position; ``(B, N, C, ph, pw)`` normalised pixels."""
        return self._embed_values(crops.flatten(2))

    def _embed_values(self, values: Float[Tensor, "B L P"]) -> Float[Tensor, "B L D"]:
        """The patch projection as a matrix; values ordered as :func:`patchify` does."""
        embed = self.vit.patch_embed
        return embed.norm(F.linear(values, embed.proj.weight.flatten(1), embed.proj.bias))

    @torch.no_grad()
    def drop_positions(self) -> None:
        """Set positions to zero and mark these weights as trained without positions."""
        self.tabulate_field()
        if self.vit.pos_embed is not None:
            self.vit.pos_embed.zero_()
        self.position_free, self.fixed_positions = True, False

    @torch.no_grad()
    def draw_positions(self) -> None:
        """Initialise positions of position-free weights (truncated normal, 0.02); otherwise do nothing.

        Source: PART, arXiv:2506.03682: fine-tuning starts from random, learned positions on the grid.
        """
        if self.position_free and self.vit.pos_embed is not None:
            nn.init.trunc_normal_(self.vit.pos_embed, std=0.02)
            self.vit.pos_embed.requires_grad_(True)
        self.position_free = False

    @torch.no_grad()
    def draw_class_token(self) -> None:
        """Draw the class token from a truncated normal, 0.02, where timm's is normal with 1e-6; without one, or with
        pretrained weights, nothing happens.

        Source: the released code of DINO, iBOT and PART (DeiT's initialisation); DINOv2 has timm's.
        """
        if self.vit.cls_token is not None and not self.pretrained:
            nn.init.trunc_normal_(self.vit.cls_token, std=0.02)

    def attach_gaug(self, grid: tuple[int, int], seed: int) -> None:
        """Add a learned Gaussian bias to the attention logits of every block (GAug), unless there is one.

        Biases are parts of the blocks: teacher, optimiser, layer decay and checkpoints include them.

        Args:
            grid: ``(h, w)`` in training.
            seed: of the new weights; torch's global random state is unchanged.

        Raises:
            ConfigError: for blocks other than timm's plain ones, or a grid of a single patch.

        Source: Hajimiri et al., LocAtViT, arXiv:2603.04892.
        """
        if self.gaug is not None:
            return
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed % 2**63)
            for block in self.vit.blocks:
                attach_bias(block, grid)
        self.vit.blocks.to(self._mean.device)
        self.gaug = grid

    def attach_field(self, field: PositionField) -> None:
        """Read positions from a field from now on, and remove the model's own table.

        Raises:
            ConfigError: if the model has no table, so that a plain timm model of its kind could not be given one.
        """
        if self.vit.pos_embed is None and self.position_field is None:
            raise ConfigError(f"{self.name} has no position embedding, which a field would stand in for")
        self.vit.pos_embed = None
        self.position_field = field
        self.position_free = self.fixed_positions = False

    def tabulate_field(self) -> None:
        """Put a table in the field's place: what it says at the native grid. Nothing happens without a field."""
        if self.position_field is None:
            return
        self.vit.pos_embed, self.vit.cls_token = (
            nn.Parameter(value) if value is not None else None for value in self.position_table()
        )
        self.position_field = None

    def position_table(self) -> tuple[Tensor | None, Tensor | None]:
        """timm's ``pos_embed`` at the native grid, and the class token that belongs to it."""
        if self.position_field is None:
            return self.vit.pos_embed, self.vit.cls_token
        return field_table(self.vit, self.position_field, self.check_size(*self.img_size))

    def positions(self, grid: tuple[int, int], boxes: Float[Tensor, "B 4"] | None = None) -> Positions | None:
        """Learned (or fixed) positions at a grid: of the patches, and of the prefix tokens (None: they have none).

        Args:
            grid: ``(h, w)``.
            boxes: ``(B, 4)`` x0 y0 x1 y1 of crops as fractions of a field; None: the whole image.

        Returns:
            None for a model without positions.

        Raises:
            ConfigError: for boxes without a field.
        """
        if self.position_field is not None:
            return field_positions(self.position_field, grid, self.num_prefix_tokens, boxes)
        if boxes is not None:
            raise ConfigError(f"{self.name} has a position table; only a position field can be read at boxes")
        return table_positions(self.vit, grid, self.pos_resampling)

    def assemble(
        self,
        tokens: Float[Tensor, "B L D"],
        positions: Positions | None,
        ids_keep: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Prepend the prefix tokens and add positions.

        Args:
            tokens: ``(B, L, D)`` from :meth:`embed_patches`.
            positions: from :meth:`positions`, or any pair of that form (e.g. from a position field); patch
                positions may have a batch axis of B; None: no positions.
            ids_keep: ``(B, L)`` raster indices of the tokens in the grid, if they are a subset.
        """
        patch_pos, prefix_pos = positions if positions is not None else (None, None)
        if patch_pos is not None:
            if ids_keep is not None:
                patch_pos = patch_pos.expand(tokens.shape[0], -1, -1)
                patch_pos = patch_pos.gather(1, ids_keep[..., None].expand(-1, -1, patch_pos.shape[-1]))
            tokens = tokens + patch_pos
        if not self.num_prefix_tokens:
            return self.vit.pos_drop(tokens)
        prefix = torch.cat([p for p in (self.vit.cls_token, self.vit.reg_token) if p is not None], dim=1)
        if prefix_pos is not None:
            prefix = prefix + prefix_pos
        return self.vit.pos_drop(torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1))

    def rotation(self, places: Places | None) -> Rotation | None:
        """Rotary positions of a sequence; None without them, without places, and for weights that were trained without
        positions."""
        return None if self.position_free else rotation(self.vit, places)

    def _outputs(
        self,
        sequence: Float[Tensor, "B T D"],
        places: Places | None,
        is_key: Bool[Tensor, "B T"] | None = None,
        count: int | None = None,
    ) -> Iterator[Float[Tensor, "B T D"]]:
        """The normed input of the blocks (of models with a norm before them), then the output of each of the first
        ``count`` blocks; None: all."""
        sequence = self.vit.norm_pre(sequence)
        yield sequence
        turn = self.rotation(places)
        for number, block in enumerate(self.vit.blocks[:count]):
            sequence = self.run_block(block, sequence, places, is_key, None if turn is None else turn.of_block(number))
            yield sequence

    def run_block(
        self,
        block: nn.Module,
        sequence: Float[Tensor, "B T D"],
        places: Places | None,
        is_key: Bool[Tensor, "B T"] | None = None,
        rope: Tensor | None = None,
    ) -> Float[Tensor, "B T D"]:
        """One block, with its rotary positions and its Gaussian bias if it has them; with :attr:`checkpointing`, the
        backward pass recomputes its activations.

        Raises:
            ConfigError: if the bias needs places that aren't given.
        """
        if self.gaug is not None and places is None:
            raise ConfigError(
                f"{self.name} was built with gaug=true, which needs the places of the patches; the method that runs it "
                "passes none (places=Places(grid)); set gaug=false"
            )
        kept = draw_kept(block, sequence)  # outside of what is recomputed
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run_plainly, block, sequence, places, is_key, rope, kept, use_reentrant=False)
        return self._run_plainly(block, sequence, places, is_key, rope, kept)

    def _run_plainly(
        self,
        block: nn.Module,
        sequence: Tensor,
        places: Places | None,
        is_key: Tensor | None,
        rope: Tensor | None,
        kept: tuple[Kept, Kept] | None,
    ) -> Tensor:
        def mask_of(samples: Tensor, ids: Tensor | slice) -> Tensor | None:
            keys = None if is_key is None else is_key[ids]
            if places is not None and self.gaug is not None:
                return attention_mask(block, samples, places.of(ids), self.num_prefix_tokens, keys)
            return None if keys is None else keys[:, None, None]

        if kept is not None:
            return run_kept(block, sequence, kept, mask_of, rope)
        mask = mask_of(sequence, slice(None))
        return block(
            sequence, **({} if rope is None else {"rope": rope}), **({} if mask is None else {"attn_mask": mask})
        )

    def forward_tokens(
        self,
        sequence: Float[Tensor, "B T D"],
        is_key: Bool[Tensor, "B T"] | None = None,
        norm: bool = True,
        places: Places | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run the blocks and the final norm over an assembled sequence of any length T.

        Args:
            sequence: from :meth:`assemble`.
            is_key: ``(B, T)`` attention mask of all blocks, True for tokens used as keys; None: all. All are queries.
            norm: whether to apply the final norm.
            places: where the patches are; needed with ``gaug=true``. With None, rotary positions are left out.

        Raises:
            ConfigError: if ``places`` are needed and not given.
        """
        for output in self._outputs(sequence, places, is_key):
            sequence = output
        return self.vit.norm(sequence) if norm else sequence

    def forward_chosen(
        self, sequence: Float[Tensor, "B T D"], chosen: Chosen, places: Places | None = None
    ) -> Float[Tensor, "S D"]:
        """Output of :meth:`forward_tokens` at some tokens; last block and final norm are computed only for these.

        With another pooling than the class token (:meth:`set_pool`), the pooled vector replaces that token, and the
        last block is computed for all tokens; so it is with a Gaussian bias.

        Args:
            sequence: from :meth:`assemble`, with a class token if it is pooled.
            chosen: which tokens, prefix tokens counted.
            places: as in :meth:`forward_tokens`.
        """
        if self.pool not in ("auto", "cls"):
            first = self.num_prefix_tokens
            tokens = self.forward_tokens(sequence, places=places)
            features = PatchFeatures(tokens[:, first:], tokens[:, :first], (1, tokens.shape[1] - first))
            return chosen.pick(torch.cat([self.pooled(features)[:, None], tokens[:, 1:]], dim=1))
        if self.gaug is not None:
            return chosen.pick(self.forward_tokens(sequence, places=places))
        for output in self._outputs(sequence, places, count=self.depth - 1):
            sequence = output
        turn = self.rotation(places)
        rope = None if turn is None else turn.of_block(self.depth - 1)
        return self.vit.norm(block_at(self.vit.blocks[-1], sequence, chosen, rope))

    def forward_layers(
        self,
        sequence: Float[Tensor, "B T D"],
        layers: Sequence[int],
        norm: bool = True,
        places: Places | None = None,
    ) -> list[Float[Tensor, "B T D"]]:
        """Outputs of chosen blocks (0 the first, negative from the end), each through the final norm if ``norm``.

        Raises:
            ConfigError: for a layer that the encoder doesn't have.
        """
        wanted = [layer % self.depth for layer in layers if -self.depth <= layer < self.depth]
        if len(wanted) != len(layers) or not wanted:
            raise ConfigError(f"layers={list(layers)}: {self.name} has {self.depth} blocks, 0..{self.depth - 1}")
        found: dict[int, Tensor] = {}
        for number, output in enumerate(self._outputs(sequence, places, count=max(wanted) + 1), start=-1):
            if number in wanted:
                found[number] = self.vit.norm(output) if norm else output
        return [found[number] for number in wanted]

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth: the rate grows linearly from 0 in the first block to ``rate`` in the last. A block computes
        only the samples that it keeps, see :mod:`smalti.layers.stochastic_depth`.

        Raises:
            ConfigError: if ``rate`` is not in [0, 1).
        """
        if not 0 <= rate < 1:
            raise ConfigError(f"drop_path={rate}: a fraction in [0, 1) is needed")
        set_rates(self.vit.blocks, rate)


def plain_pooling(model: type[nn.Module]) -> dict[str, bool]:
    """Arguments of a timm model for its final norm on tokens, not on pooled vectors, and for means of patches alone."""
    return {"use_fc_norm": False} if issubclass(model, Eva) else {"fc_norm": False, "pool_include_prefix": False}


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Everything inside in eval mode; afterwards each submodule is again in the mode it had."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


def _per_channel(values: Sequence[float], channels: int, what: str) -> tuple[float, ...]:
    """One value per channel; a single value applies to all."""
    if len(values) not in (1, channels):
        raise ConfigError(f"{what} has {len(values)} values, the images have {channels} channels; give 1 or {channels}")
    return tuple(float(value) for value in (values if len(values) == channels else list(values) * channels))
