"""The light decoder of masked autoencoders, built from timm's transformer blocks."""

from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.functional.masking import restore_order
from smalti.functional.positions import sincos_positions
from smalti.functional.transfer import move


class MaskedDecoder(nn.Module):
    """Maps visible tokens to predictions for the masked patches.

    Mask tokens are inserted, fixed sine-cosine positions are added, a few blocks run on all tokens, and the norm and
    the linear head run on the masked ones only.

    Args:
        in_dim: width of the encoder's tokens.
        dim: width of the decoder, a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        out_dim: values predicted per patch.
        num_prefix_tokens: prefix tokens in front of the visible ones; part of attention, dropped at the end.

    Source: He et al., MAE, arXiv:2111.06377v3, Sec. 3 "MAE decoder" and App. A.1.
    """

    def __init__(self, in_dim: int, dim: int, depth: int, num_heads: int, out_dim: int, num_prefix_tokens: int) -> None:
        super().__init__()
        if dim % num_heads or dim % 4:
            raise ConfigError(f"decoder_dim={dim} must be a multiple of 4 and of decoder_num_heads={num_heads}")
        self.num_prefix_tokens = num_prefix_tokens
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(Block(dim, num_heads, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth))
        )
        self.norm = norm_layer(dim)
        self.head = nn.Linear(dim, out_dim)
        self._positions: dict[tuple[int, int], Tensor] = {}

    def forward(
        self,
        sequence: Float[Tensor, "B T D"],
        hidden: Int[Tensor, "B M"],
        ids_restore: Int[Tensor, "B N"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "B M P"]:
        """Predictions for the masked patches.

        Args:
            sequence: ``(B, R+L, D)`` encoder output, prefix tokens first.
            hidden: ``(B, M)`` raster indices of the masked patches.
            ids_restore: ``(B, N)`` from :func:`smalti.functional.masking.random_mask`.
            grid: ``(h, w)`` of the whole image.
        """
        tokens = self.embed(sequence)
        prefix, visible = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        masks = self.mask_token.to(visible.dtype).expand(len(visible), hidden.shape[1], -1)
        tokens = restore_order(visible, masks, ids_restore) + self._grid_positions(grid, visible)
        tokens = self.blocks(torch.cat([prefix, tokens], dim=1))[:, self.num_prefix_tokens :]
        tokens = tokens.gather(1, hidden[..., None].expand(-1, -1, tokens.shape[-1]))
        return self.head(self.norm(tokens))

    def _grid_positions(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """Fixed positions ``(N, dim)``, cached by grid; those of prefix tokens are zero."""
        table = self._positions.get(grid)
        if table is None or table.device != like.device:
            table = move(sincos_positions(like.shape[-1], grid), like.device)
            self._positions[grid] = table
        return table.to(like.dtype)


def hidden_ids(mask: Bool[Tensor, "B N"], num_hidden: int) -> Int[Tensor, "B M"]:
    """Raster indices of the masked patches, ascending, the same number M in every image; no synchronisation."""
    return mask.int().argsort(dim=1, descending=True, stable=True)[:, :num_hidden]


def decoder_width(embed_dim: int) -> int:
    """512 (MAE's) for encoders of width 768 or more, else two thirds of theirs, rounded down to a multiple of 32."""
    return 512 if embed_dim >= 768 else max(embed_dim * 2 // 3 // 32, 1) * 32
