"""Convert images to tokens, one per patch, with unit mean variance, and back.

Methods that predict or generate tokens (CoMAE, MAR) add noise relative to their scale. A source therefore estimates the
scale from images before training (:meth:`TokenSource.fit`) and stores it with the weights. Letters: B images, N tokens,
d values per token, P pixel values per patch.
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
"""Kinds whose tokens are the latents of a network."""
KINDS = ("pixels", "pca", *CODED)
DEFAULT_DIM = 16
_STREAM = 0x70C
"""Random stream of samples from a posterior."""
_ENOUGH_CODES = 2**17
"""Number of images for mean and scale; encoding with a large network is slow."""


@settings
class TokenConfig:
    """How images are turned into tokens."""

    kind: str = "pca"
    """``pixels``: raw patches; ``pca``: the first principal components of patches; ``autoencoder``: latents of an
    autoencoder trained with ``smalti train autoencoder``; ``vae``: latents of a KL autoencoder in diffusers' format."""
    patch_size: int = 16
    """Patch size in pixels."""
    dim: int | None = None
    """Token dimension d. None: all values of a patch for ``pixels``; at most 16 for ``pca``."""
    path: PathText | None = None
    """``autoencoder``: the run directory; ``vae``: the folder with ``config.json`` and
    ``diffusion_pytorch_model.safetensors``, or that file."""
    network: dict[str, Any] | None = None
    """Architecture of the network at ``path``; filled in, so that a checkpoint is complete without ``path``."""


class TokenSource(nn.Module, ABC):
    """Images to tokens and back. Not trained, except by the method that trains an autoencoder.

    Args:
        image_size: side of the square images in pixels.
        in_chans: their channels.
        grid: grid of tokens, height and width.
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
        """Estimate the statistics of tokens from images, before training.

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
            keys: seeds for drawing from the distribution of tokens of an image, if there is one; None: its mean.

        Raises:
            ShapeError: for images of another size or with other channels.
        """

    @abstractmethod
    def decode(self, tokens: Float[Tensor, "B N d"]) -> Float[Tensor, "B C S S"]:
        """Images in 0..1, reconstructed from tokens."""

    def as_float(self, images: Num[Tensor, "B C S S"]) -> Float[Tensor, "B C S S"]:
        """Images in 0..1.

        Raises:
            ShapeError: for images of another size or with other channels.
        """
        if images.shape[1:] != (self.in_chans, self.image_size, self.image_size):
            raise ShapeError(
                f"images of shape {tuple(images.shape[1:])}; tokens need ({self.in_chans}, {self.image_size}, "
                f"{self.image_size})"
            )
        return images.float() / 255 if images.dtype == torch.uint8 else images.float()


class PatchTokenSource(TokenSource):
    """Patches, centred, projected to ``token_dim`` orthonormal directions and divided by one scalar.

    Args:
        image_size: side of the images in pixels; a multiple of ``patch_size``.
        in_chans: their channels.
        patch_size: side of a patch in pixels.
        token_dim: directions kept; None: all values, without projection.

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
        # until fitted: grey is 0, a quarter of the range is 1
        self.register_buffer("mean", torch.full((num_values,), 0.5))
        self.register_buffer("basis", torch.eye(num_values, self.token_dim))
        self.register_buffer("scale", torch.tensor(0.25))
        self.mean: Tensor
        self.basis: Tensor
        self.scale: Tensor

    @torch.no_grad()
    def fit(self, images: Iterable[Num[Tensor, "_ C S S"]]) -> None:
        """Estimate the mean patch, principal directions if any, and the root of the mean variance along them."""
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
            # Signs depend on the solver: make the largest entry positive
            largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
            self.basis.copy_(directions * largest.sign())
        basis = self.basis.double()
        variance = torch.einsum("pd,pq,qd->d", basis, covariance, basis).mean()
        if not variance > 1e-10:
            raise DataError("all patches of the images are equal; tokens need images with variation")
        self.mean.copy_(mean + 0.5)
        self.scale.copy_(variance.sqrt())

    @torch.no_grad()
    def encode(self, images: Num[Tensor, "B C S S"], keys: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B N d"]:
        """See :meth:`TokenSource.encode`; tokens are deterministic, ``keys`` have no effect."""
        with torch.autocast(images.device.type, enabled=False):
            patches = patchify(self.as_float(images), self.patch_size) - self.mean
            return (patches @ self.basis if self.turns else patches) / self.scale

    def decode(self, tokens: Float[Tensor, "B N d"]) -> Float[Tensor, "B C S S"]:
        """See :meth:`TokenSource.decode`."""
        scaled = tokens.float() * self.scale
        patches = (scaled @ self.basis.mT if self.turns else scaled) + self.mean
        return unpatchify(patches, self.patch_size, self.grid).clamp(0, 1)


class CodeTokenSource(TokenSource):
    """Latents of an autoencoder, one per patch, centred and divided by one scalar.

    The scale is estimated, as for any other source: the published factors of known autoencoders are valid only for
    their latents and data. Centring is our addition; it is the same for every patch and undone when decoding.

    Args:
        network: has ``moments`` and ``decode``, such as :class:`~smalti.layers.autoencoder.ConvAutoencoder`.
        image_size: side of the images in pixels; a multiple of ``patch_size``.
        in_chans: their channels.
        patch_size: side of the pixels that one latent encodes.
        token_dim: d.

    Raises:
        ConfigError: if patches don't fit into the image.
    """

    def __init__(
        self, network: ConvAutoencoder | KLVAE, image_size: int, in_chans: int, patch_size: int, token_dim: int
    ) -> None:
        if image_size % patch_size:
            raise ConfigError(
                f"data.image_size={image_size}: a multiple of {patch_size}, the autoencoder's patch size, is needed"
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
        """Estimate the mean, and the root of the mean variance of sampled latents: of the means plus of the
        posteriors."""
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
            raise DataError("all codes of the images are equal; tokens need images with variation")
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
        """Mean and log-variance of the codes, not centred or scaled, with gradients."""
        return self.network.moments(self.as_float(images) * 2 - 1)


def draw_codes(
    mean: Float[Tensor, "B d h w"],
    log_variance: Float[Tensor, "B d h w"],
    keys: Int[Tensor, " B"],
    stream: int = _STREAM,
) -> Float[Tensor, "B d h w"]:
    """Sample from each posterior, seeded by the samples' keys."""
    noise = sample_normal(keys, mean[0].numel(), stream).view_as(mean)
    return mean + (log_variance / 2).exp() * noise


def build_tokens(config: TokenConfig, image_size: int, in_chans: int) -> TokenSource:
    """The token source for these settings, not fitted yet; weights of its network, if it has one, aren't loaded yet.

    Args:
        config: ``tokens.*``.
        image_size: side of the images in pixels.
        in_chans: their channels.

    Raises:
        ConfigError: for an unknown kind, or incompatible sizes.
        MissingExtraError: for ``vae`` without diffusers.
    """
    if config.kind not in KINDS:
        raise ConfigError(f"tokens.kind={config.kind}: one of {', '.join(KINDS)} is needed")
    if config.kind in CODED:
        return _build_codes(config, image_size, in_chans)
    if config.path is not None or config.network is not None:
        raise ConfigError(f"tokens.path={config.path}: only applies to tokens.kind={' or '.join(CODED)}; leave it out")
    if config.kind == "pixels":
        if config.dim is not None:
            raise ConfigError(f"tokens.dim={config.dim}: tokens.kind=pixels uses all values of a patch; leave it out")
        return PatchTokenSource(image_size, in_chans, config.patch_size)
    dim = min(DEFAULT_DIM, in_chans * config.patch_size**2) if config.dim is None else config.dim
    return PatchTokenSource(image_size, in_chans, config.patch_size, dim)


def _build_codes(config: TokenConfig, image_size: int, in_chans: int) -> CodeTokenSource:
    """Tokens of an autoencoder whose architecture is in the settings.

    Raises:
        ConfigError: if it is missing, or is for other channels, patches or widths.
    """
    if config.network is None:
        what = "a run of smalti train autoencoder" if config.kind == "autoencoder" else "a folder in diffusers' format"
        raise ConfigError(f"tokens.kind={config.kind}: set tokens.path to {what}")
    if config.kind == "autoencoder":
        dim = config.dim or DEFAULT_DIM
        network: ConvAutoencoder | KLVAE = ConvAutoencoder(in_chans, config.patch_size, dim, **config.network)
        return CodeTokenSource(network, image_size, in_chans, config.patch_size, dim)
    network = KLVAE(config.network)
    for name, wanted, found in (
        ("data.channels", in_chans, network.in_chans),
        ("tokens.patch_size", config.patch_size, network.patch_size),
        ("tokens.dim", config.dim or network.code_dim, network.code_dim),
    ):
        if wanted != found:
            raise ConfigError(f"{name}={wanted}: the autoencoder at tokens.path has {found}; make them equal")
    return CodeTokenSource(network, image_size, in_chans, network.patch_size, network.code_dim)
