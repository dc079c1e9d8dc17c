"""ViTDet's simple feature pyramid: maps of several strides from a plain transformer's last map."""

from jaxtyping import Float
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

SCALES = (4, 2, 1, 1 / 2, 1 / 4)
"""Scales of the maps relative to the patch grid; the last map is computed from the one before it."""


class SimpleFeaturePyramid(nn.Module):
    """Five maps of equal width from one map of patch tokens, from 4 times to 1/4 of its resolution.

    Scale 4 by two transposed convolutions with norm and GELU in between, scale 2 by one, scale 1 unchanged, scale 1/2
    by max-pooling; then a 1x1 and a 3x3 convolution, both with layer norm over channels. The fifth map subsamples the
    fourth by 2, for proposals of large objects. If a side of the grid is odd, coarser maps are rounded up to include
    the last row and column.

    Args:
        embed_dim: D, width of the tokens, a multiple of 4.
        channels: E, width of the maps.

    Source: Li et al., ViTDet, arXiv:2203.16527, Sec. 3 "Simple feature pyramid" and App. A.2.
    """

    def __init__(self, embed_dim: int, channels: int) -> None:
        super().__init__()
        half, quarter = embed_dim // 2, embed_dim // 4
        self.scale = nn.ModuleList(
            (
                nn.Sequential(
                    nn.ConvTranspose2d(embed_dim, half, 2, 2),
                    LayerNorm2d(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, 2),
                ),
                nn.ConvTranspose2d(embed_dim, half, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, 2, ceil_mode=True),
            )
        )
        self.mix = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for width in (quarter, half, embed_dim, embed_dim)
        )

    def forward(self, tokens: Float[Tensor, "B D h w"]) -> list[Tensor]:
        """Five maps ``(B, E, h*s, w*s)`` of the :data:`SCALES` s, rounded up."""
        maps = [mix(scale(tokens)) for scale, mix in zip(self.scale, self.mix, strict=True)]
        return [*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2)]


def pyramid_sizes(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """``(h, w)`` of each map over a patch grid.

    Example:
        >>> pyramid_sizes((5, 8))
        [(20, 32), (10, 16), (5, 8), (3, 4), (2, 2)]
    """
    h, w = grid
    return [(4 * h, 4 * w), (2 * h, 2 * w), (h, w), (-(-h // 2), -(-w // 2)), (-(-h // 4), -(-w // 4))]
