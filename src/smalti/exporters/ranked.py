"""One module that ranks the patches of an image and encodes the best of them, with the interface of a timm model.

Letters: B images, N patches, K kept ones, P prefix tokens, D embed_dim.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.exporters.timm import timm_config
from smalti.methods.ranker import DistilledRanker
from smalti.models.encoder import Encoder
from smalti.models.pooling import PatchFeatures


class RankedModel(nn.Module):
    """A vision transformer that encodes only the K patches that a ranker scores highest; its cost is that of K patches.

    The interface is timm's: ``forward_features``, ``forward_head``, ``forward``, ``num_features``, ``pretrained_cfg``
    (also for ``timm.data.resolve_model_data_config``). Inputs are normalised as for the exported timm model.

    Args:
        encoder: encodes the chosen patches; the pooling is its own.
        ranker: scores the patches of the same images; its normalisation may differ.
        keep: K.

    Raises:
        ConfigError: if ``keep`` isn't in 1..N, or the ranker takes other images or patches.

    Example:
        >>> from smalti.methods.ranker import RankerConfig
        >>> from smalti.models.build import build_encoder
        >>> tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
        >>> encoder, small = (build_encoder("vit_tiny_patch16_224", seed=seed, **tiny) for seed in (0, 1))
        >>> model = RankedModel(encoder, DistilledRanker(small, RankerConfig(order="halton")), keep=5)
        >>> model.forward_features(torch.zeros(2, 3, 32, 32)).shape  # the class token and five patches
        torch.Size([2, 6, 24])
    """

    def __init__(self, encoder: Encoder, ranker: DistilledRanker, keep: int) -> None:
        super().__init__()
        check_ranker(ranker, encoder, encoder.img_size, keep)
        self.encoder, self.ranker, self.keep = encoder, ranker, keep
        self.num_features = self.embed_dim = encoder.embed_dim
        self.num_prefix_tokens = encoder.num_prefix_tokens
        self.pretrained_cfg: dict[str, Any] = timm_config(encoder)["pretrained_cfg"]

    def choose(self, images: Float[Tensor, "B C H W"]) -> Int[Tensor, "B K"]:
        """Raster indices of the patches with the highest scores, the best first."""
        return best_patches(self.ranker, images * self.encoder._std + self.encoder._mean, self.keep)

    def forward_features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B S D"]:
        """``(B, P+K, D)`` tokens after the final norm: prefix tokens, then the chosen patches, the best first."""
        features = self.encoder.encode(images, ids_keep=self.choose(images))
        return torch.cat([features.prefix, features.patches], dim=1)

    def forward_head(self, tokens: Float[Tensor, "B S D"], pre_logits: bool = True) -> Float[Tensor, "B D"]:
        """One vector per image, pooled as the encoder is."""
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        return self.encoder.pooled(PatchFeatures(patches, prefix, self.encoder.check_size(*self.encoder.img_size)))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """One vector per image."""
        return self.forward_head(self.forward_features(images))


def best_patches(ranker: DistilledRanker, pixels: Float[Tensor, "B C H W"], keep: int) -> Int[Tensor, "B K"]:
    """Raster indices of the ``keep`` patches with the highest scores, the best first.

    Args:
        ranker: the ranker.
        pixels: images in 0..1, which the ranker normalises.
        keep: K.
    """
    return ranker.scores(ranker.encoder.normalize(pixels)).topk(keep, dim=1).indices


def check_ranker(ranker: DistilledRanker, encoder: Encoder, size: tuple[int, int], keep: int | None) -> None:
    """Check that a ranker scores the patches that an encoder takes.

    Args:
        ranker: the ranker.
        encoder: the encoder.
        size: height and width of the images in pixels.
        keep: K; None: not given.

    Raises:
        ConfigError: if ``keep`` is missing or isn't in 1..N, or the ranker takes other images or patches.
    """
    grid = encoder.check_size(*size)
    if keep is None:
        raise ConfigError("ranker needs keep=K, the number of patches to encode")
    check_keep(keep, grid, size)
    own = ranker.encoder
    if own.in_chans != encoder.in_chans or own.img_size != size or own.check_size(*size) != grid:
        theirs = own.check_size(*own.img_size)
        raise ConfigError(
            f"the ranker scores {theirs[0]}x{theirs[1]} patches of {own.img_size[0]}x{own.img_size[1]} px images with "
            f"{own.in_chans} channels, the encoder takes {grid[0]}x{grid[1]} of {size[0]}x{size[1]} px with "
            f"{encoder.in_chans}; train the ranker at that size and patch size"
        )


def check_keep(keep: int, grid: tuple[int, int], size: tuple[int, int]) -> None:
    """Check a number of patches to keep.

    Raises:
        ConfigError: if it isn't in 1..N.
    """
    if not 1 <= keep <= grid[0] * grid[1]:
        raise ConfigError(
            f"keep={keep}: an image of {size[0]}x{size[1]} pixels has {grid[0] * grid[1]} patches; "
            f"1..{grid[0] * grid[1]} is needed"
        )
