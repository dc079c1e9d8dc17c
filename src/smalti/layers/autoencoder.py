"""A small convolutional autoencoder with a Gaussian code, one code vector per patch.

The form is that of the autoencoders behind latent diffusion (Rombach et al., arXiv:2112.10752v2, App. E.1): residual
blocks with group norm and SiLU, half the resolution at each level, mean and log-variance from one convolution. It is
smaller and has no attention, so it can encode any image size that is a multiple of the patch size.
Letters: B images, d values per code vector, h w the grid of patches.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.errors import ConfigError

_GROUPS = 8
_WIDEST = 4
"""Width of the lower levels, as multiples of ``width``."""
_FIRST_LOG_VARIANCE = -4.0
"""Initial log-variance; ours: codes that start with unit noise carry no information for the first hundred steps."""
LOG_VARIANCE = (-30.0, 20.0)
"""Bounds of a code's log-variance, as published."""


class ConvResidualBlock(nn.Module):
    """Group norm, SiLU, 3x3 convolution, twice; plus the input, or a 1x1 convolution of it."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(_GROUPS, in_chans), nn.Conv2d(in_chans, out_chans, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(_GROUPS, out_chans), nn.Conv2d(out_chans, out_chans, 3, padding=1)
        self.skip = nn.Conv2d(in_chans, out_chans, 1) if in_chans != out_chans else nn.Identity()

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        """Features at the same resolution."""
        inner = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(inner)))


class ConvAutoencoder(nn.Module):
    """Encodes images in -1..1 to one Gaussian per patch, and decodes codes to images.

    Args:
        in_chans: channels of the images.
        patch_size: side of a patch, a power of two: each factor of two is a level.
        code_dim: d.
        width: channels at full size, a multiple of 8; the levels below have 2 and 4 times as many.
        num_blocks: residual blocks per level.

    Raises:
        ConfigError: for incompatible sizes.
    """

    def __init__(self, in_chans: int, patch_size: int, code_dim: int, width: int = 32, num_blocks: int = 1) -> None:
        super().__init__()
        if patch_size < 2 or patch_size & (patch_size - 1):
            raise ConfigError(f"tokens.patch_size={patch_size}: a power of 2, at least 2, is needed for an autoencoder")
        if code_dim < 1 or num_blocks < 1:
            raise ConfigError(
                f"tokens.dim={code_dim}, method.num_blocks={num_blocks}: at least 1 is needed for an autoencoder"
            )
        if width < 1 or width % _GROUPS:
            raise ConfigError(
                f"method.width={width}: a multiple of {_GROUPS}, the number of groups of the group norm, is needed"
            )
        levels = patch_size.bit_length()  # full size, and one more per factor of 2
        widths = [width * min(2**level, _WIDEST) for level in range(levels)]
        down: list[nn.Module] = [nn.Conv2d(in_chans, width, 3, padding=1)]
        for level, chans in enumerate(widths):
            before = widths[max(level - 1, 0)]
            if level:
                down.append(nn.Conv2d(before, before, 3, stride=2, padding=1))
            down += [ConvResidualBlock(before if n == 0 else chans, chans) for n in range(num_blocks)]
        down += [ConvResidualBlock(widths[-1], widths[-1]), nn.GroupNorm(_GROUPS, widths[-1]), nn.SiLU()]
        self.down = nn.Sequential(*down, last := nn.Conv2d(widths[-1], 2 * code_dim, 3, padding=1))
        assert last.bias is not None
        nn.init.constant_(last.bias[code_dim:], _FIRST_LOG_VARIANCE)

        up: list[nn.Module] = [nn.Conv2d(code_dim, widths[-1], 3, padding=1), ConvResidualBlock(widths[-1], widths[-1])]
        for level in reversed(range(levels)):
            chans, after = widths[level], widths[max(level - 1, 0)]
            up += [ConvResidualBlock(chans, chans) for _ in range(num_blocks)]
            if level:
                up += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(chans, after, 3, padding=1)]
        up += [nn.GroupNorm(_GROUPS, width), nn.SiLU(), nn.Conv2d(width, in_chans, 3, padding=1)]
        self.up = nn.Sequential(*up)

    def moments(self, images: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B d h w"], Float[Tensor, "B d h w"]]:
        """Mean and log-variance of the codes of images in -1..1, float32."""
        mean, log_variance = self.down(images).float().chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def decode(self, codes: Float[Tensor, "B d h w"]) -> Float[Tensor, "B C H W"]:
        """Images, approximately in -1..1, not clamped."""
        return self.up(codes)


def kl_to_standard_normal(mean: Float[Tensor, "*S"], log_variance: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """``KL(N(mean, variance) || N(0, 1))`` in nats per value.

    Source: Kingma and Welling, arXiv:1312.6114v11, App. B.
    """
    return 0.5 * (mean.square() + torch.expm1(log_variance) - log_variance)
