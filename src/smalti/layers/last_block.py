"""The output of a transformer block at some tokens only: all are looked at, only those wanted look.

Letters: B sequences, T tokens, D their width, Q wanted tokens of the sequence that has most of them, S wanted in all.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smalti.functional.transfer import move


@dataclass(frozen=True)
class Chosen:
    """Some tokens of B sequences, in the order of sequences and of tokens within them."""

    ids: Tensor
    """``(B, Q)`` int64 numbers of the wanted tokens, filled up with others."""
    places: Tensor
    """``(S,)`` int64 places of the wanted ones in the flattened ``ids``."""

    @staticmethod
    def where(is_wanted: Bool[Tensor, "B T"]) -> "Chosen":
        """The tokens that are marked; where the marks lie on a GPU, this waits for it."""
        counts = is_wanted.sum(1)
        most = int(counts.max())
        ids = (
            (~is_wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        )  # the wanted ones first, in their order
        is_real = torch.arange(most, device=counts.device) < counts[:, None]
        return Chosen(ids, is_real.flatten().nonzero()[:, 0])

    @staticmethod
    def first(batch: int, device: torch.device) -> "Chosen":
        """The first token of each sequence."""
        return Chosen(torch.zeros(batch, 1, dtype=torch.int64, device=device), torch.arange(batch, device=device))

    def to(self, device: torch.device) -> "Chosen":
        """On a device, without waiting for it."""
        return Chosen(move(self.ids, device), move(self.places, device))

    def pick(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "S D"]:
        """The wanted tokens of sequences."""
        batch, length = x.shape[:2]
        first = torch.arange(0, batch * length, length, device=x.device)[:, None]
        return x.flatten(0, 1)[(first + self.ids).flatten()[self.places]]


def block_at(block: nn.Module, x: Float[Tensor, "B T D"], chosen: Chosen) -> Float[Tensor, "S D"]:
    """``chosen.pick(block(x))``, equal up to rounding, at a lower cost.

    Keys and values are made of all tokens; queries, output projection and perceptron of the wanted ones. Stochastic
    depth draws once a sequence, as in the whole block. Blocks other than timm's plain one are run whole.
    """
    plain: Any = block  # nn.Module doesn't type its parts
    if type(block) is not Block or type(plain.attn) is not Attention or plain.attn.gate is not None:
        return chosen.pick(block(x))
    attn = plain.attn
    batch, length, width = x.shape
    normed = plain.norm1(x)
    weight, bias, heads = attn.qkv.weight, attn.qkv.bias, attn.num_heads
    inner = len(weight) // 3
    queries = normed.gather(1, chosen.ids[..., None].expand(-1, -1, width))
    queries = F.linear(queries, weight[:inner], None if bias is None else bias[:inner])
    queries = queries.reshape(batch, -1, heads, inner // heads).transpose(1, 2)  # (B, heads, Q, D / heads)
    both = F.linear(normed, weight[inner:], None if bias is None else bias[inner:])
    keys, values = both.reshape(batch, length, 2, heads, -1).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(
        attn.q_norm(queries), attn.k_norm(keys), values, dropout_p=attn.attn_drop.p if attn.training else 0.0
    )
    out = out.transpose(1, 2).reshape(-1, inner)[chosen.places]  # (B, heads, Q, D / heads) -> (S, D)
    tokens = chosen.pick(x) + _kept(plain.drop_path1, x, chosen) * plain.ls1(attn.proj_drop(attn.proj(attn.norm(out))))
    return tokens + _kept(plain.drop_path2, x, chosen) * plain.ls2(plain.mlp(plain.norm2(tokens)))


def _kept(drop_path: nn.Module, x: Float[Tensor, "B T D"], chosen: Chosen) -> Float[Tensor, "S 1"] | float:
    """The factor of a sequence's residual branch at each wanted token."""
    if isinstance(drop_path, nn.Identity) or not drop_path.training:
        return 1.0
    return drop_path(x.new_ones(len(x), 1))[chosen.places // chosen.ids.shape[1]]


def place_of(chosen: Chosen, length: int) -> Int[Tensor, "B T"]:
    """Where each token's output stands among those of :func:`block_at`; -1 for tokens that aren't wanted."""
    batch = len(chosen.ids)
    places = torch.full((batch * length,), -1, dtype=torch.int64, device=chosen.ids.device)
    flat = (torch.arange(batch, device=chosen.ids.device)[:, None] * length + chosen.ids).flatten()[chosen.places]
    places[flat] = torch.arange(len(flat), device=flat.device)
    return places.reshape(batch, length)
