"""The output of a transformer block for selected tokens only, which attend to all tokens.

Letters: B sequences, T tokens, D their width, Q the largest number of selected tokens of a sequence, S their total
number.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.layers import Attention, apply_rot_embed_cat
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smalti.functional.transfer import move


@dataclass(frozen=True)
class Chosen:
    """Selected tokens of B sequences, in the order of sequences and of tokens within them."""

    ids: Tensor
    """``(B, Q)`` int64 indices of the selected tokens, padded with others."""
    places: Tensor
    """``(S,)`` int64 indices of the selected ones in the flattened ``ids``."""

    @staticmethod
    def where(is_wanted: Bool[Tensor, "B T"]) -> "Chosen":
        """The marked tokens; synchronises if the marks are on a GPU."""
        counts = is_wanted.sum(1)
        most = int(counts.max())
        ids = (~is_wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]  # the selected ones first, in order
        is_real = torch.arange(most, device=counts.device) < counts[:, None]
        return Chosen(ids, is_real.flatten().nonzero()[:, 0])

    @staticmethod
    def first(batch: int, device: torch.device) -> "Chosen":
        """The first token of each sequence."""
        return Chosen(torch.zeros(batch, 1, dtype=torch.int64, device=device), torch.arange(batch, device=device))

    def to(self, device: torch.device) -> "Chosen":
        """Copy to a device, without synchronisation."""
        return Chosen(move(self.ids, device), move(self.places, device))

    def pick(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "S D"]:
        """The selected tokens of sequences."""
        batch, length = x.shape[:2]
        first = torch.arange(0, batch * length, length, device=x.device)[:, None]
        return x.flatten(0, 1)[(first + self.ids).flatten()[self.places]]


def block_at(
    block: nn.Module, x: Float[Tensor, "B T D"], chosen: Chosen, rope: Tensor | None = None
) -> Float[Tensor, "S D"]:
    """``chosen.pick(block(x))``, equal up to rounding, at a lower cost.

    Keys and values are computed for all tokens; queries, output projection and MLP only for the selected ones.
    Stochastic depth samples once per sequence, as in the full block. Blocks other than timm's plain one and those of
    ``Eva``, and blocks whose parameters are sharded (FSDP2), are run in full.

    Args:
        block: of a timm model.
        x: its input.
        chosen: which tokens.
        rope: rotary positions, for blocks that take them.
    """
    plain: Any = block  # nn.Module doesn't type its parts
    if type(block) in (EvaBlock, EvaBlockPostNorm):
        return _eva_block_at(plain, x, chosen, rope)
    if type(block) is not Block or not _is_plain(plain.attn):
        return chosen.pick(block(x) if rope is None else block(x, rope=rope))
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


def _eva_block_at(
    block: Any, x: Float[Tensor, "B T D"], chosen: Chosen, rope: Float[Tensor, "*#B P e"] | None
) -> Float[Tensor, "S D"]:
    """:func:`block_at` for a block of timm's ``Eva``, with norms before or after its branches."""
    is_post = type(block) is EvaBlockPostNorm
    attn, batch = block.attn, len(x)
    inputs = x if is_post else block.norm1(x)
    asking = inputs.gather(1, chosen.ids[..., None].expand(-1, -1, x.shape[-1]))  # (B, Q, D)
    projected = zip(_projections(attn), (asking, inputs, inputs), strict=True)
    queries, keys, values = (
        F.linear(tokens, weight, bias).reshape(batch, tokens.shape[1], -1, attn.head_dim).transpose(1, 2)
        for (weight, bias), tokens in projected
    )
    queries, keys = attn.q_norm(queries), attn.k_norm(keys)
    if rope is not None:
        whole = _with_prefix(rope, attn.num_prefix_tokens)
        half = getattr(attn, "rotate_half", False)
        queries = apply_rot_embed_cat(queries, _at(whole, chosen.ids), half=half).type_as(values)
        keys = apply_rot_embed_cat(keys, whole, half=half).type_as(values)
    shared = attn.num_heads // keys.shape[1]  # heads that share their keys and values
    keys, values = (part.repeat_interleave(shared, dim=1) for part in (keys, values))
    out = F.scaled_dot_product_attention(queries, keys, values, dropout_p=attn.attn_drop.p if attn.training else 0.0)
    out = attn.norm(out.transpose(1, 2).flatten(0, 1).flatten(1)[chosen.places])  # (B, heads, Q, d) -> (S, heads * d)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(asking.flatten(0, 1)[chosen.places]).sigmoid()
    out = attn.proj_drop(attn.proj(out))
    tokens = chosen.pick(x)
    if is_post:
        tokens = tokens + _kept(block.drop_path1, x, chosen) * block.norm1(out)
        return tokens + _kept(block.drop_path2, x, chosen) * block.norm2(block.mlp(tokens))
    out = out if block.gamma_1 is None else block.gamma_1 * out
    tokens = tokens + _kept(block.drop_path1, x, chosen) * out
    out = block.mlp(block.norm2(tokens))
    return tokens + _kept(block.drop_path2, x, chosen) * (out if block.gamma_2 is None else block.gamma_2 * out)


def _projections(attn: Any) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """Weight and bias of queries, keys and values."""
    if attn.qkv is None:
        return tuple((layer.weight, layer.bias) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
    weights = attn.qkv.weight.chunk(3)
    if getattr(attn, "q_bias", None) is not None:
        return tuple(zip(weights, (attn.q_bias, attn.k_bias, attn.v_bias), strict=True))
    biases = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    return tuple(zip(weights, biases, strict=True))


def _with_prefix(rope: Float[Tensor, "*#B P e"], num_prefix: int) -> Float[Tensor, "*#B T e"]:
    """Rotary positions with rows for the prefix tokens, which they leave as they are: sine 0, cosine 1."""
    rows = rope.new_zeros(*rope.shape[:-2], num_prefix, rope.shape[-1])
    rows[..., rope.shape[-1] // 2 :] = 1
    return torch.cat([rows, rope], dim=-2)


def _at(rope: Float[Tensor, "*#B T e"], ids: Int[Tensor, "B Q"]) -> Float[Tensor, "B #H Q e"]:
    """Rotary positions of the selected tokens of each sequence."""
    if rope.ndim == 2:
        return rope[ids][:, None]
    if rope.ndim == 3:
        return rope[:, ids].transpose(0, 1)
    return rope.gather(2, ids[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[-1]))


def _is_plain(attn: Any) -> bool:
    """Whether it is timm's attention without a gate, and its layers are linear layers without adapters."""
    return (
        type(attn) is Attention
        and getattr(attn, "gate", None) is None  # timm 1.0.26 has no gates
        and isinstance(attn.qkv, nn.Linear)
        and isinstance(attn.proj, nn.Linear)
    )


def _kept(drop_path: nn.Module, x: Float[Tensor, "B T D"], chosen: Chosen) -> Float[Tensor, "S 1"] | float:
    """The stochastic-depth factor of each selected token's sequence."""
    if isinstance(drop_path, nn.Identity) or not drop_path.training:
        return 1.0
    return drop_path(x.new_ones(len(x), 1))[chosen.places // chosen.ids.shape[1]]


def place_of(chosen: Chosen, length: int) -> Int[Tensor, "B T"]:
    """Index of each token's output in the result of :func:`block_at`; -1 for tokens that aren't selected."""
    batch = len(chosen.ids)
    places = torch.full((batch * length,), -1, dtype=torch.int64, device=chosen.ids.device)
    flat = (torch.arange(batch, device=chosen.ids.device)[:, None] * length + chosen.ids).flatten()[chosen.places]
    places[flat] = torch.arange(len(flat), device=flat.device)
    return places.reshape(batch, length)
