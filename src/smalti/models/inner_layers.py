"""An encoder read at inner layers: patch tokens of one block or of several, concatenated, for evaluation only."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from smalti.errors import ConfigError
from smalti.layers.gaussian_bias import Places
from smalti.models.encoder import Encoder
from smalti.models.pooling import PatchFeatures, pool_features


class InnerLayers(Encoder):
    """The tokens of chosen blocks of an encoder, each after its final norm, concatenated along the last axis.

    Shares the weights of the encoder. Image vectors are the class tokens of these blocks, or their mean patches
    without class tokens; of the last block alone, those of the encoder's own pooling.

    Args:
        encoder: whose blocks are read; unchanged.
        layers: numbers of the blocks, 1 the first, ``depth`` the last.

    Raises:
        ConfigError: for a block that the encoder does not have, or none.
    """

    def __init__(self, encoder: Encoder, layers: Sequence[int]) -> None:
        if not layers or not all(1 <= layer <= encoder.depth for layer in layers):
            raise ConfigError(f"layers={list(layers)}: {encoder.name} has the blocks 1 to {encoder.depth}")
        super().__init__(
            encoder.vit,
            encoder.name,
            encoder.model_args,
            encoder.mean,
            encoder.std,
            encoder.pretrained,
            encoder.pos_antialias,
            encoder.pos_mode,
            encoder.pos_offset,
        )
        self.layers = tuple(layers)
        self.gaug, self.norm_eps, self.lora = encoder.gaug, encoder.norm_eps, encoder.lora
        self.fixed_positions, self.position_free = encoder.fixed_positions, encoder.position_free
        self.position_field = encoder.position_field
        self.source, self.origin, self.report = encoder.source, encoder.origin, encoder.report
        if self.layers == (encoder.depth,):
            self.pool, self.prr = encoder.pool, encoder.prr
        self.to(next(encoder.parameters()).device).eval()

    @property
    def embed_dim(self) -> int:
        """Width of the concatenated tokens."""
        return len(self.layers) * self.vit.embed_dim

    def read_layers(self, images: Num[Tensor, "B C H W"], norm: bool = True) -> list[PatchFeatures]:
        """Patch tokens of each of the layers, in one pass; images as in :meth:`encode`."""
        if images.dtype == torch.uint8:
            images = self.normalize(images)
        tokens, grid = self.embed_patches(images)
        sequence = self.assemble(tokens, self.positions(grid))
        first = self.num_prefix_tokens
        outputs = self.forward_layers(sequence, [layer - 1 for layer in self.layers], norm, Places(grid))
        return [PatchFeatures(output[:, first:], output[:, :first], grid) for output in outputs]

    def encode(
        self, images: Num[Tensor, "B C H W"], norm: bool = True, ids_keep: Int[Tensor, "B L"] | None = None
    ) -> PatchFeatures:
        """Patch tokens of images; as in :class:`Encoder`, but all patches are needed.

        Raises:
            ConfigError: if only some patches are to be encoded.
        """
        if ids_keep is not None:
            raise ConfigError("tokens of inner layers are computed for whole images only")
        return joined(self.read_layers(images, norm))

    def pooled(self, features: PatchFeatures, pool: str = "auto") -> Float[Tensor, "B D"]:
        """One vector per image; as in :class:`Encoder`, but ``map`` and ``prr`` are for the last block alone.

        Raises:
            ConfigError: for one of these at inner layers, or without the class token that ``cls`` needs.
        """
        if self.layers == (self.depth,):
            return super().pooled(features, pool)
        if pool in ("map", "prr"):
            raise ConfigError(f"pool={pool} reads the last block of an encoder, not its inner layers; take avg or cls")
        return pool_features(features, pool, self.has_class_token)


def joined(features: Sequence[PatchFeatures]) -> PatchFeatures:
    """Tokens of the same patches side by side along the last axis."""
    if len(features) == 1:
        return features[0]
    patches, prefix = (
        torch.cat(parts, dim=-1) for parts in zip(*((one.patches, one.prefix) for one in features), strict=True)
    )
    return PatchFeatures(patches, prefix, features[0].grid)
