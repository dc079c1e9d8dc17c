"""The KL autoencoder of latent diffusion in diffusers' format, as a token source.

The architecture is diffusers' (extra ``gen``).
"""

import inspect
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from smalti.errors import ConfigError, MissingExtraError

CLASS = "AutoencoderKL"


class KLVAE(nn.Module):
    """Encodes images in -1..1 to one Gaussian per patch, and decodes codes to images.

    Args:
        shape: fields of its ``config.json``.

    Raises:
        MissingExtraError: without diffusers.
        ConfigError: if ``shape`` isn't the configuration of such an autoencoder.
    """

    def __init__(self, shape: Mapping[str, Any]) -> None:
        super().__init__()
        known = _arguments(shape)
        try:
            self.vae = _diffusers_class()(**known)
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"tokens.network: not the configuration of an {CLASS} ({error})") from error
        self.patch_size = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.code_dim: int = self.vae.config.latent_channels
        self.in_chans: int = self.vae.config.in_channels

    def moments(self, images: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B d h w"], Float[Tensor, "B d h w"]]:
        """Mean and log-variance of the codes of images in -1..1, float32."""
        posterior = self.vae.encode(images).latent_dist
        return posterior.mean.float(), posterior.logvar.float()

    def decode(self, codes: Float[Tensor, "B d h w"]) -> Float[Tensor, "B C H W"]:
        """Images, approximately in -1..1, not clamped."""
        return self.vae.decode(codes).sample


def _arguments(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a configuration that diffusers' class accepts; other versions have more."""
    takes = inspect.signature(_diffusers_class().__init__).parameters
    return {key: value for key, value in shape.items() if key in takes and key != "self"}


def _diffusers_class() -> Any:
    try:
        from diffusers.models import AutoencoderKL
    except ImportError:
        raise MissingExtraError('tokens.kind=vae needs diffusers: pip install "smalti[gen]"') from None
    return AutoencoderKL
