"""Autoencoder: a small convolutional network with a Gaussian latent per patch; its latents are tokens of other methods.

Paper: Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, arXiv:1312.6114v11, in the form that Rombach et al.,
"High-Resolution Image Synthesis with Latent Diffusion Models", 2022, arXiv:2112.10752v2, App. G: absolute pixel error,
and so little KL regularisation that the latents are almost free of noise.
Letters: B images, d values per latent, h w the grid of patches.
Differs from the paper: no adversarial and no perceptual loss (which needs a network trained with labels), so fine
texture is smoothed; no attention; both terms are means over pixel values, which keeps their ratio and makes them
comparable between image sizes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.charts import LogColumn
from smalti.config import DepthFromZero, Width, settings
from smalti.data.crops import MultiCrop, ViewSpec
from smalti.data.views import ViewMaker, Views
from smalti.errors import ConfigError
from smalti.functional.patches import patchify
from smalti.functional.precision import at_least_float32
from smalti.layers.autoencoder import kl_to_standard_normal
from smalti.layers.tokens import CodeTokenSource, TokenConfig, TokenSource, build_tokens, draw_codes
from smalti.methods.base import Findings, MethodConfig, TokenMethod, register

_WARN_FROM = 0.9
"""Fraction of training after which a comparison with principal components may warn."""
_FEWEST_PATCHES = 4
"""Fewest patches per value of a patch for the comparison; below, principal components overfit the batch."""


@settings
class AutoencoderConfig(MethodConfig):
    """Settings of the autoencoder; ``tokens.patch_size`` and ``tokens.dim`` set the size of its latents."""

    name: str = "autoencoder"
    width: Width = 32
    """Channels at full resolution; 2 and 4 times as many at lower levels."""
    num_blocks: DepthFromZero = 1
    """Residual blocks per level."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence from a standard normal, in nats per pixel value; 1e-6 in the paper."""
    l2_weight: float = 0.0
    """Weight of the squared error, in addition to the absolute error."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Area of the random crop, as a fraction of the image."""


def reconstruction_loss(
    prediction: Float[Tensor, "B C H W"], images: Float[Tensor, "B C H W"], l2_weight: float
) -> Float[Tensor, ""]:
    """Mean absolute error plus weighted mean squared error, of images in -1..1."""
    difference = at_least_float32(prediction) - at_least_float32(images)
    return difference.abs().mean() + l2_weight * difference.square().mean()


@torch.no_grad()
def pca_psnr(images: Float[Tensor, "B C H W"], patch_size: tuple[int, int], dim: int) -> Float[Tensor, ""]:
    """PSNR in decibels of images reconstructed from the first principal components of their own patches.

    Args:
        images: in 0..1.
        patch_size: ``(height, width)`` of a patch.
        dim: components per patch.
    """
    with torch.autocast(images.device.type, enabled=False):
        patches = patchify(images, patch_size).flatten(0, 1).double()
        centred = patches - patches.mean(0)
        left = torch.linalg.eigvalsh(centred.mT @ centred / len(patches)).flip(0)[dim:]  # lost variances
        return -10 * (left.sum() / patches.shape[1]).clamp(min=1e-12).log10()


@register("autoencoder")
class Autoencoder(TokenMethod):
    """Encode each patch as a few numbers, and decode the image from a sample of them."""

    Config = AutoencoderConfig
    title = "convolutional autoencoder with KL regularisation; its latents are the tokens of other methods"
    paper = "Kingma and Welling 2013, arXiv:1312.6114v11; Rombach et al. 2022, arXiv:2112.10752v2"
    next_command = "smalti train mar --data IMAGES --out RUN tokens.kind=autoencoder tokens.path={run}"
    fit_images = 0
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        "psnr": LogColumn("PSNR", "Peak signal-to-noise ratio of the reconstructed images in dB; higher is better."),
        "psnr_pca": LogColumn(
            "PSNR of principal components",
            "What as many principal components per patch reach on the same batch, in dB; aim for more.",
        ),
        "kl_per_value": LogColumn(
            "KL divergence", "Nats per value of the code, to a standard normal; a code at 0 holds no information."
        ),
        "code_std": LogColumn("Standard deviation of codes", "Over all values of a batch; near 0 they have collapsed."),
    }
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": {"kind": "autoencoder"},
        "optim": {
            "lr": 1e-3,
            "betas": [0.9, 0.99],
            "weight_decay": 0.0,
            "warmup_ratio": 0.05,
            "min_lr": 0.0,
            "clip_norm": 1.0,
        },
    }

    def __init__(self, tokens: TokenSource, config: AutoencoderConfig) -> None:
        super().__init__(tokens, config)
        for name in ("kl_weight", "l2_weight"):
            if getattr(config, name) < 0:
                raise ConfigError(f"method.{name}={getattr(config, name)}: at least 0 is needed")
        assert isinstance(tokens, CodeTokenSource), type(tokens)
        self.tokens: CodeTokenSource = tokens.requires_grad_(True)

    @classmethod
    def make_tokens(cls, config: TokenConfig, own: AutoencoderConfig, image_size: int, in_chans: int) -> TokenSource:
        """An untrained autoencoder.

        Raises:
            ConfigError: for another kind of tokens, or trained ones.
        """
        if config.kind != "autoencoder" or config.path is not None:
            name = f"path={config.path}" if config.path is not None else f"kind={config.kind}"
            raise ConfigError(
                f"tokens.{name}: autoencoder trains its own tokens; set only tokens.patch_size and tokens.dim"
            )
        shape = {"width": own.width, "num_blocks": own.num_blocks}
        return build_tokens(dataclasses.replace(config, network=shape), image_size, in_chans)

    def make_views(self, image_size: int) -> ViewMaker:
        """A random resized crop and a flip."""
        return MultiCrop([ViewSpec(count=1, size=image_size, scale=self.config.crop_scale, flip_prob=0.5)])

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss terms ``reconstruction`` and ``kl``, weighted."""
        images = self.tokens.as_float(views.global_crops) * 2 - 1
        mean, log_variance = self.tokens.network.moments(images)
        prediction = self.tokens.network.decode(draw_codes(mean, log_variance, views.keys))
        kl = kl_to_standard_normal(mean, log_variance)
        error = (at_least_float32(prediction.detach()).clamp(-1, 1) - images).square().mean() / 4  # of 0..1
        self.observations = {
            "psnr": -10 * error.clamp(min=1e-12).log10(),
            "kl_per_value": kl.detach().mean(),
            "code_std": mean.detach().std(),
        }
        return {
            "reconstruction": reconstruction_loss(prediction, images, self.config.l2_weight),
            "kl": self.config.kl_weight * kl.sum() / images.numel(),
        }

    def diagnose(self, views: Views, progress: float) -> Findings:
        """``psnr_pca``: PSNR of as many principal components of the batch's own patches. Warns near the end of training
        if the autoencoder's PSNR on this batch is lower."""
        images, (rows, columns) = self.tokens.as_float(views.global_crops), self.tokens.grid
        size = (images.shape[-2] // rows, images.shape[-1] // columns)
        best = float(pca_psnr(images, size, self.tokens.token_dim))
        own = float(self.observations.get("psnr", best))
        num_patches, num_values = len(images) * rows * columns, images.shape[1] * size[0] * size[1]
        if progress < _WARN_FROM or num_patches < _FEWEST_PATCHES * num_values or own >= best:
            return Findings({"psnr_pca": best})
        text = (
            f"{self.tokens.token_dim} principal components per patch reach {best:.1f} dB on a batch, this run reaches "
            f"{own:.1f} dB: use tokens.kind=pca, or train longer"
        )
        return Findings({"psnr_pca": best}, {"worse than pca": text})
