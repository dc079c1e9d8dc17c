"""Transformer blocks with rotary positions, for any subset of tokens."""

from functools import partial

import torch
from jaxtyping import Float, Int
from timm.layers import build_rotary_pos_embed
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from smalti.errors import ConfigError


class RotaryBlocks(nn.Module):
    """Pre-norm blocks with 2-D rotary positions on queries and keys, except for one prefix token.

    Half of a head's dimensions rotate with the row, half with the column of a token, with base 10,000. timm's blocks:
    keys have no bias.

    Args:
        dim: D.
        depth: number of blocks.
        num_heads: attention heads; D over their number must be a multiple of 4.
        grid: rows and columns of positions.
        mlp_ratio: hidden width of the MLPs relative to D.

    Raises:
        ConfigError: if the width isn't a multiple of 4 times the heads.

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
            sequence: ``(B, 1+L, D)``; the first token has no position.
            places: raster indices of the others in the grid, in any order.
        """
        turns = self.turns[places][:, None]  # (B, 1, L, 2 * D / heads): the same for all heads
        for block in self.blocks:
            sequence = block(sequence, rope=turns)
        return sequence
