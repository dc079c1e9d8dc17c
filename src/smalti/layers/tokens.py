"""Images as tokens, one a patch, of unit mean variance; and back.

What predicts or generates tokens (CoMAE, MAR) measures its noise against them, so they share one scale: a source learns
it from images before training (:meth:`TokenSource.fit`) and keeps it with the weights. Letters: B images, N tokens,
d values a token, P pixel values a patch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from smalti.config import PathText, settings
from smalti.errors import ConfigError, DataError, ShapeError
from smalti.functional.patches import patchify, unpatchify
from smalti.functional.random import sample_normal
from smalti.layers.autoencoder import ConvAutoencoder
from smalti.layers.kl_vae import KLVAE

CODED = ("autoencoder", "vae")
"""Kinds whose tokens are the codes of a network."""
KINDS = ("pixels", "pca", *CODED)
DEFAULT_DIM = 16
_STREAM = 0x70C
"""Of the draws from a posterior."""
_ENOUGH_CODES = 2**17
"""For a mean and a scale; a large network takes its time for each image."""


@settings
class TokenConfig:
    """What a token is."""

    kind: str = "pca"
    """``pixels``: a patch as it is; ``pca``: its first principal components; ``autoencoder``: the codes of one that
    ``smalti train autoencoder`` made; ``vae``: those of a KL autoencoder in diffusers' form."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    dim: int | None = None
    """d, values a token; None: all of a patch for ``pixels``, 16 (or all, if those are fewer) for ``pca``."""
    path: PathText | None = None
    """Of ``autoencoder`` the run, of ``vae`` the folder with ``config.json`` and
    ``diffusion_pytorch_model.safetensors``, or that file."""
    network: dict[str, Any] | None = None
    """Shape of the network that ``path`` names; filled in, so that a checkpoint is whole without it."""


class TokenSource(nn.Module, ABC):
    """Images to tokens and back; nothing in it is trained, but by the method that makes an autoencoder.

    Args:
        image_size: side of the square images in pixels.
        in_chans: their channels.
        grid: tokens down and across.
        token_dim: d.
    """

    def __init__(self, image_size: int, in_chans: int, grid: tuple[int, int], token_dim: int) -> None:
        super().__init__()
        self.image_size, self.in_chans, self.grid, self.token_dim = image_size, in_chans, grid, token_dim

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @abstractmethod
    def fit(self, images: Iterable[Num[Tensor, "_ C S S"]]) -> None:
        """Measure what the tokens of such images are like, before training.

        Args:
            images: batches, uint8 or float in 0..1.

        Raises:
            DataError: if they don't vary at all.
        """

    @abstractmethod
    def encode(self, images: Num[Tensor, "B C S S"], keys: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B N d"]:
        """Tokens in raster order, float32, without gradients.

        Args:
            images: uint8, or float in 0..1.
            keys: where an image has a distribution of tokens, draw from it by these; None: its mean.

        Raises:
            ShapeError: for images of another size or with other channels.
        """

    @abstractmethod
    def decode(self, tokens: Float[Tensor, "B N d"]) -> Float[Tensor, "B C S S"]:
        """Images in 0..1 of tokens, as near as they go."""

    def as_float(self, images: Num[Tensor, "B C S S"]) -> Float[Tensor, "B C S S"]:
        """Images in 0..1.

        Raises:
            ShapeError: for images of another size or with other channels.
        """
        if images.shape[1:] != (self.in_chans, self.image_size, self.image_size):
            raise ShapeError(
                f"images of {tuple(images.shape[1:])}; tokens are cut from ({self.in_chans}, {self.image_size}, "
                f"{self.image_size})"
            )
        return images.float() / 255 if images.dtype == torch.uint8 else images.float()


class PatchTokens(TokenSource):
    """Patches, centred, turned to ``token_dim`` orthonormal directions and divided by one number.

    Args:
        image_size: side of the images in pixels; a multiple of ``patch_size``.
        in_chans: their channels.
        patch_size: side of a patch in pixels.
        token_dim: directions kept; None: all, and the patch isn't turned at all.

    Raises:
        ConfigError: if patches don't fit into the image, or have fewer values than ``token_dim``.
    """

    def __init__(self, image_size: int, in_chans: int, patch_size: int, token_dim: int | None = None) -> None:
        if patch_size < 1 or image_size % patch_size:
            raise ConfigError(f"tokens.patch_size={patch_size}: must divide data.image_size={image_size}")
        num_values = in_chans * patch_size**2
        if token_dim is not None and not 1 <= token_dim <= num_values:
            raise ConfigError(f"tokens.dim={token_dim}: a patch of {patch_size} pixels has {num_values} values")
        side = image_size // patch_size
        super().__init__(image_size, in_chans, (side, side), token_dim or num_values)
        self.patch_size = (patch_size, patch_size)
        self.turns = token_dim is not None
        # Until it is fitted: grey is zero, and a quarter of the range is one
        self.register_buffer("mean", torch.full((num_values,), 0.5))
        self.register_buffer("basis", torch.eye(num_values, self.token_dim))
        self.register_buffer("scale", torch.tensor(0.25))
        self.mean: Tensor
        self.basis: Tensor
        self.scale: Tensor

    @torch.no_grad()
    def fit(self, images: Iterable[Num[Tensor, "_ C S S"]]) -> None:
        """The mean patch, principal directions where there are any, and the root of the mean variance along them."""
        count = 0
        total = torch.zeros_like(self.mean, dtype=torch.float64)
        products = total.new_zeros(len(total), len(total))
        for batch in images:
            patches = patchify(self.as_float(batch), self.patch_size).flatten(0, 1).double() - 0.5
            count += len(patches)
            total += patches.sum(0)
            products += patches.mT @ patches
        if not count:
            raise DataError("no images to measure tokens on")
        mean = total / count
        covariance = products / count - mean[:, None] * mean
        if self.turns:
            directions = torch.linalg.eigh(covariance).eigenvectors.flip(-1)[:, : self.token_dim]
            # A sign is a matter of the solver: the largest entry is made positive
            largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
            self.basis.copy_(directions * largest.sign())
        basis = self.basis.double()
        variance = torch.einsum("pd,pq,qd->d", basis, covariance, basis).mean()
        if not variance > 1e-10:
            raise DataError("all patches of the images are alike; tokens need images that differ")
        self.mean.copy_(mean + 0.5)
        self.scale.copy_(variance.sqrt())

    @torch.no_grad()
    def encode(self, images: Num[Tensor, "B C S S"], keys: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B N d"]:
        """See :meth:`TokenSource.encode`; a patch has one token, ``keys`` draw nothing."""
        with torch.autocast(images.device.type, enabled=False):
            patches = patchify(self.as_float(images), self.patch_size) - self.mean
            return (patches @ self.basis if self.turns else patches) / self.scale

    def decode(self, tokens: Float[Tensor, "B N d"]) -> Float[Tensor, "B C S S"]:
        """See :meth:`TokenSource.decode`."""
        scaled = tokens.float() * self.scale
        patches = (scaled @ self.basis.mT if self.turns else scaled) + self.mean
        return unpatchify(patches, self.patch_size, self.grid).clamp(0, 1)


class CodeTokens(TokenSource):
    """Codes of an autoencoder, one a patch, centred and divided by one number.

    The scale is measured, as is that of any other source: the published factors of known autoencoders belong to their
    codes and their data alone. Centring is ours; it is the same for every patch and lost on the way back.

    Args:
        network: with ``moments`` and ``decode``, as :class:`~smalti.layers.autoencoder.ConvAutoencoder` has them.
        image_size: side of the images in pixels; a multiple of ``patch_size``.
        in_chans: their channels.
        patch_size: side of what becomes one code.
        token_dim: d.

    Raises:
        ConfigError: if patches don't fit into the image.
    """

    def __init__(
        self, network: ConvAutoencoder | KLVAE, image_size: int, in_chans: int, patch_size: int, token_dim: int
    ) -> None:
        if image_size % patch_size:
            raise ConfigError(
                f"data.image_size={image_size}: the autoencoder makes a token of {patch_size}x{patch_size} pixels; a "
                f"multiple of {patch_size} is needed"
            )
        side = image_size // patch_size
        super().__init__(image_size, in_chans, (side, side), token_dim)
        self.network = network
        self.register_buffer("mean", torch.zeros(token_dim))
        self.register_buffer("scale", torch.tensor(1.0))
        self.mean: Tensor
        self.scale: Tensor

    @torch.no_grad()
    def fit(self, images: Iterable[Num[Tensor, "_ C S S"]]) -> None:
        """The mean code, and the root of the mean variance of drawn codes: that of the means, and the posteriors'."""
        count = 0
        total = torch.zeros_like(self.mean, dtype=torch.float64)
        squares, inner = torch.zeros_like(total), torch.zeros_like(total)
        was_training = self.network.training
        self.network.eval()
        for batch in images:
            mean, log_variance = (moment.movedim(1, -1).flatten(0, 2) for moment in self.moments(batch))
            count += len(mean)
            total += mean.double().sum(0)
            squares += mean.double().square().sum(0)
            inner += log_variance.double().exp().sum(0)
            if count >= _ENOUGH_CODES:
                break
        self.network.train(was_training)
        if not count:
            raise DataError("no images to measure tokens on")
        spread = (squares / count - (total / count).square()).mean()
        if not spread > 1e-10:
            raise DataError("all codes of the images are alike; tokens need images that differ")
        self.mean.copy_(total / count)
        self.scale.copy_((spread + (inner / count).mean()).sqrt())

    @torch.no_grad()
    def encode(self, images: Num[Tensor, "B C S S"], keys: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B N d"]:
        """See :meth:`TokenSource.encode`; drawn from the posterior with ``keys``, else its mean."""
        with torch.autocast(images.device.type, enabled=False):
            mean, log_variance = self.moments(images)
            codes = mean if keys is None else draw_codes(mean, log_variance, keys)
            return (codes.flatten(2).mT - self.mean) / self.scale

    def decode(self, tokens: Float[Tensor, "B N d"]) -> Float[Tensor, "B C S S"]:
        """See :meth:`TokenSource.decode`."""
        codes = (tokens.float() * self.scale + self.mean).mT.reshape(len(tokens), self.token_dim, *self.grid)
        return (self.network.decode(codes).float() / 2 + 0.5).clamp(0, 1)

    def moments(self, images: Num[Tensor, "B C S S"]) -> tuple[Float[Tensor, "B d h w"], Float[Tensor, "B d h w"]]:
        """Mean and log-variance of the codes, neither centred nor scaled, with gradients."""
        return self.network.moments(self.as_float(images) * 2 - 1)


def draw_codes(
    mean: Float[Tensor, "B d h w"],
    log_variance: Float[Tensor, "B d h w"],
    keys: Int[Tensor, " B"],
    stream: int = _STREAM,
) -> Float[Tensor, "B d h w"]:
    """A draw from each posterior, by the samples' keys."""
    noise = sample_normal(keys, mean[0].numel(), stream).view_as(mean)
    return mean + (log_variance / 2).exp() * noise


def build_tokens(config: TokenConfig, image_size: int, in_chans: int) -> TokenSource:
    """The token source that settings name, neither fitted nor, where it has a network, filled with its weights.

    Args:
        config: ``tokens.*``.
        image_size: side of the images in pixels.
        in_chans: their channels.

    Raises:
        ConfigError: for an unknown kind, or numbers that don't fit together.
        MissingExtraError: for ``vae`` without diffusers.
    """
    if config.kind not in KINDS:
        raise ConfigError(f"tokens.kind={config.kind}: one of {', '.join(KINDS)} is needed")
    if config.kind in CODED:
        return _build_codes(config, image_size, in_chans)
    if config.path is not None or config.network is not None:
        raise ConfigError(
            f"tokens.path={config.path}: tokens.kind={config.kind} reads none; kinds that do: {', '.join(CODED)}"
        )
    if config.kind == "pixels":
        if config.dim is not None:
            raise ConfigError(f"tokens.dim={config.dim}: tokens.kind=pixels keeps all values of a patch; leave it out")
        return PatchTokens(image_size, in_chans, config.patch_size)
    dim = min(DEFAULT_DIM, in_chans * config.patch_size**2) if config.dim is None else config.dim
    return PatchTokens(image_size, in_chans, config.patch_size, dim)


def _build_codes(config: TokenConfig, image_size: int, in_chans: int) -> CodeTokens:
    """Tokens of an autoencoder whose shape stands in the settings.

    Raises:
        ConfigError: if it doesn't, or is for other channels, patches or widths.
    """
    if config.network is None:
        what = "a run of smalti train autoencoder" if config.kind == "autoencoder" else "a folder of diffusers' form"
        raise ConfigError(f"tokens.kind={config.kind}: give tokens.path={what}")
    if config.kind == "autoencoder":
        dim = config.dim or DEFAULT_DIM
        network: ConvAutoencoder | KLVAE = ConvAutoencoder(in_chans, config.patch_size, dim, **config.network)
        return CodeTokens(network, image_size, in_chans, config.patch_size, dim)
    network = KLVAE(config.network)
    for name, wanted, found in (
        ("data.channels", in_chans, network.in_chans),
        ("tokens.patch_size", config.patch_size, network.patch_size),
        ("tokens.dim", config.dim or network.code_dim, network.code_dim),
    ):
        if wanted != found:
            raise ConfigError(f"{name}={wanted}: the autoencoder of tokens.path has {found}")
    return CodeTokens(network, image_size, in_chans, network.patch_size, network.code_dim)
