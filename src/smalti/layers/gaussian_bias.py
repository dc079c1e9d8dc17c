"""Gaussian-augmented attention (GAug): a learned Gaussian around each patch is added to its attention logits.

Source: Hajimiri et al., "Locality-Attending Vision Transformer", ICLR 2026, arXiv:2603.04892, with the released code.
Letters: B images, H heads, d channels per head, h w the patch grid, N = h*w patches, R prefix tokens, T = R + N, D
width.
Differs from the code: grids of at least 32 are not averaged over 2x2 patches, so memory grows with N^2.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.functional.precision import at_least_float32

_FIRST_EPS, _MOST_EXPONENT, _MOST_DIST = 0.1, 32_500.0, 6_550.0  # limits of float16


class Places(NamedTuple):
    """Where the patches of a sequence are."""

    grid: tuple[int, int]
    """``(h, w)`` of the whole image."""
    ids_keep: Tensor | None = None
    """``(B, L)`` raster indices of the patches; None: all, in raster order."""
    boxes: Tensor | None = None
    """``(B, 4)`` x0 y0 x1 y1 of each image within a larger one, as fractions of it, from which rotary positions are
    read; None: each is an image of its own."""

    def of(self, samples: Tensor | slice) -> "Places":
        """The places of some of the sequences, by their indices or a slice."""
        return Places(self.grid, *(None if part is None else part[samples] for part in (self.ids_keep, self.boxes)))


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

    def forward(self, queries: Float[Tensor, "B H N d"], places: Places) -> Float[Tensor, "B H N N"]:
        """``(B, H, N, N)`` float32 bias of the logits of query patch (row) and key patch (column), at least 0.

        Args:
            queries: queries of the patches, before scaling and rotary embedding.
            places: where they are.
        """
        queries, grid = at_least_float32(queries), places.grid
        widest = max(self.grid) ** 2
        with torch.autocast(queries.device.type, enabled=False):  # as in the code
            says, height = self.var(queries), F.softplus(self.height(queries))
        var = widest * torch.sigmoid(says - math.log(widest - 1))  # 1 if the layer's output is 0
        if grid != self.grid:
            var = var * (min(grid) / min(self.grid))
        row, column = self._half_dists(places, queries)  # (1 or B, 1, N, N) each
        narrow = 1 / (var + self.eps)  # (B, H, N, 2)
        return height * torch.exp(-narrow[..., :1] * row - narrow[..., 1:] * column)

    def _half_dists(self, places: Places, like: Tensor) -> tuple[Tensor, Tensor]:
        """Half squared distances of rows and of columns, ``(1 or B, 1, N, N)``."""
        height, width = places.grid
        ids = torch.arange(height * width, device=like.device)[None] if places.ids_keep is None else places.ids_keep
        parts = (ids // width, ids % width)
        apart = ((part[:, None, :, None] - part[:, None, None, :]).to(like.dtype) for part in parts)
        row, column = ((dist**2 / 2).clamp(max=self.most) for dist in apart)
        return row, column


def attach_bias(block: nn.Module, grid: tuple[int, int]) -> None:
    """Add a bias to a block, as its part ``gaug``, which :func:`biased_block` reads.

    Args:
        block: timm's plain block.
        grid: ``(h, w)`` in training.

    Raises:
        ConfigError: for another kind of block, or a grid of a single patch.
    """
    attn: Any = getattr(block, "attn", None)
    if type(block) is not Block or type(attn) is not Attention:
        raise ConfigError(
            f"gaug=true: {type(block).__name__} is not timm's plain block and attention; use another encoder"
        )
    block.gaug = GaussianBias(attn.head_dim, grid)


def biased_block(
    block: nn.Module,
    x: Float[Tensor, "B T D"],
    places: Places,
    num_prefix: int,
    is_key: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T D"]:
    """Run a block with its bias between patches, but not from or to prefix tokens; arguments as of
    :func:`attention_mask`."""
    return block(x, attn_mask=attention_mask(block, x, places, num_prefix, is_key))


def attention_mask(
    block: nn.Module,
    x: Float[Tensor, "B T D"],
    places: Places,
    num_prefix: int,
    is_key: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B H T T"]:
    """The bias of a block, 0 for prefix tokens, as its ``attn_mask``.

    Queries are computed twice, which adds ``N D^2`` multiplications to the block's ``12 T D^2``.

    Args:
        block: with a bias, see :func:`attach_bias`.
        x: input of the block, prefix tokens first.
        places: where the patches are.
        num_prefix: R.
        is_key: True for tokens used as keys; None: all.
    """
    part: Any = block  # nn.Module doesn't type its parts
    attn = part.attn
    width = attn.qkv.weight.shape[0] // 3
    at_patches = part.norm1(x[:, num_prefix:])
    queries = F.linear(at_patches, attn.qkv.weight[:width], None if attn.qkv.bias is None else attn.qkv.bias[:width])
    queries = attn.q_norm(queries.reshape(*queries.shape[:2], attn.num_heads, -1).transpose(1, 2))
    bias = F.pad(part.gaug(queries, places), (num_prefix, 0, num_prefix, 0))
    if is_key is not None:
        bias = bias.masked_fill(~is_key[:, None, None], -math.inf)
    return bias.to(x.dtype)
