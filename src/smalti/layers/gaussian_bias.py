"""Gaussian-augmented attention (GAug): a learned Gaussian around each patch is added to its attention logits.

Source: Hajimiri et al., "Locality-Attending Vision Transformer", ICLR 2026, arXiv:2603.04892, with the released code.
Letters: B images, H heads, d channels per head, h w the patch grid, N = h*w patches, R prefix tokens, T = R + N, D
width.
Differs from the code: grids of at least 32 are not averaged over 2x2 patches, so memory grows with N^2.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.functional.precision import at_least_float32

_FIRST_EPS, _MOST_EXPONENT, _MOST_DIST = 0.1, 32_500.0, 6_550.0  # limits of float16


class GaussianBias(nn.Module):
    """Bias of attention logits, from queries: ``alpha * exp(-1/2 sum_m dist_m^2 / (var_m + eps))``, for rows and
    columns m. Initially about ``ln 2`` high and one patch wide.

    Two small linear layers are shared by all heads and patches: ``3 d + 3`` parameters.

    Args:
        head_dim: d.
        grid: ``(h, w)`` in training; for other grids, the variance is scaled by the ratio of the shorter sides.

    Raises:
        ConfigError: for a grid of a single patch.
    """

    def __init__(self, head_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        if min(grid) < 1 or max(grid) < 2:
            raise ConfigError(f"grid of {grid[0]}x{grid[1]} patches; at least 2 patches are needed for a Gaussian bias")
        self.grid = grid
        self.var, self.height = nn.Linear(head_dim, 2), nn.Linear(head_dim, 1)
        for layer in (self.var, self.height):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        farthest = (max(grid) - 1) ** 2 / 2
        self.most = min(farthest, _MOST_DIST)
        """Upper limit of half squared distances, in patches squared."""
        self.eps = _FIRST_EPS
        """Added to variances, in patches squared."""
        while farthest / self.eps**2 > _MOST_EXPONENT:
            self.eps *= 2

    def forward(self, queries: Float[Tensor, "B H N d"], grid: tuple[int, int]) -> Float[Tensor, "B H N N"]:
        """``(B, H, N, N)`` float32 bias of the logits of query patch (row) and key patch (column), at least 0.

        Args:
            queries: queries of the patches, before scaling and rotary embedding.
            grid: ``(h, w)`` of these patches, N = h * w.
        """
        queries = at_least_float32(queries)
        widest = max(self.grid) ** 2
        with torch.autocast(queries.device.type, enabled=False):  # as in the code
            says, height = self.var(queries), F.softplus(self.height(queries))
        var = widest * torch.sigmoid(says - math.log(widest - 1))  # 1 if the layer's output is 0
        if grid != self.grid:
            var = var * (min(grid) / min(self.grid))
        rows, columns = (torch.arange(side, device=queries.device, dtype=queries.dtype) for side in grid)
        places = torch.cartesian_prod(rows, columns)  # (N, 2), raster order
        half_dist = ((places[:, None] - places[None]) ** 2 / 2).clamp(max=self.most)  # (N, N, 2)
        exponent = torch.einsum("bhnm,ntm->bhnt", 1 / (var + self.eps), half_dist)
        return height * torch.exp(-exponent)


def block_with_bias(
    block: Block, bias: GaussianBias, x: Float[Tensor, "B T D"], grid: tuple[int, int], num_prefix: int
) -> Float[Tensor, "B T D"]:
    """Run timm's plain block with the bias between patches, but not from or to prefix tokens.

    The block isn't modified: the bias is passed as ``attn_mask``. Queries are computed twice, which adds ``N D^2``
    multiplications to the block's ``12 T D^2``.

    Args:
        block: block with timm's plain attention.
        bias: bias of this block.
        x: input of the block, prefix tokens first.
        grid: ``(h, w)`` of the patches.
        num_prefix: R.
    """
    attn: Any = block.attn
    width = attn.qkv.weight.shape[0] // 3
    at_patches = block.norm1(x[:, num_prefix:])
    queries = F.linear(at_patches, attn.qkv.weight[:width], None if attn.qkv.bias is None else attn.qkv.bias[:width])
    queries = attn.q_norm(queries.reshape(*queries.shape[:2], attn.num_heads, -1).transpose(1, 2))
    return block(x, attn_mask=F.pad(bias(queries, grid), (num_prefix, 0, num_prefix, 0)).to(x.dtype))
