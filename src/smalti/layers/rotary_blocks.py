"""Transformer blocks that know where tokens lie relative to one another, whichever of them are there."""

from functools import partial

import torch
from jaxtyping import Float, Int
from timm.layers import build_rotary_pos_embed
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from smalti.errors import ConfigError


class RotaryBlocks(nn.Module):
    """Pre-norm blocks with two-dimensional rotary positions on queries and keys; one token in front is not turned.

    Half of a head's dimensions turn with the row, half with the column of a token, with base 10,000. timm's blocks:
    keys have no bias.

    Args:
        dim: D.
        depth: number of blocks.
        num_heads: attention heads; D over their number must be a multiple of 4.
        grid: rows and columns of places.
        mlp_ratio: hidden width of the perceptrons over D.

    Raises:
        ConfigError: if the heads don't fit the width.

    Source: Su et al., RoFormer, arXiv:2104.09864v5, Eq. (15), along two axes as in Heo et al., arXiv:2403.13298v2,
    "axial".
    """

    def __init__(self, dim: int, depth: int, num_heads: int, grid: tuple[int, int], mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if num_heads < 1 or depth < 1 or dim % num_heads or dim // num_heads % 4:
            raise ConfigError(
                f"{depth} blocks of width {dim} with {num_heads} heads: at least one block is needed, and a width "
                "that is a multiple of 4 times the heads"
            )
        self.blocks = nn.ModuleList(
            EvaBlock(dim, num_heads, mlp_ratio=mlp_ratio, norm_layer=partial(nn.LayerNorm, eps=1e-6))
            for _ in range(depth)
        )
        turns = build_rotary_pos_embed(list(grid), dim=dim // num_heads, temperature=10000.0, in_pixels=False)
        self.register_buffer("turns", torch.cat(turns, dim=-1), persistent=False)
        self.turns: Tensor

    def forward(self, sequence: Float[Tensor, "B S D"], places: Int[Tensor, "B L"]) -> Float[Tensor, "B S D"]:
        """The sequence after the blocks.

        Args:
            sequence: ``(B, 1+L, D)``; the first token has no place.
            places: of the others, as raster numbers of the grid, in any order.
        """
        turns = self.turns[places][:, None]  # (B, 1, L, 2 * D / heads): alike for all heads
        for block in self.blocks:
            sequence = block(sequence, rope=turns)
        return sequence
