"""Attention weights of timm's blocks, recomputed, since fused attention doesn't return them.

Letters: B sequences, H heads, T tokens, D their width, Q queries.
"""

from collections.abc import Iterable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.functional.precision import at_least_float32

AnyAttention: TypeAlias = Attention | EvaAttention | AttentionRope
"""timm's attention modules whose weights can be recomputed."""


def num_heads_of(block: nn.Module) -> int:
    """Attention heads of a block of any of timm's vision transformers."""
    found = (getattr(module, "num_heads", None) for module in block.modules())
    return next(heads for heads in found if isinstance(heads, int))


def attention_weights(
    module: AnyAttention,
    tokens: Float[Tensor, "B T D"],
    num_queries: int | None = None,
    bias: Float[Tensor, "B #H T T"] | None = None,
    rope: Float[Tensor, "*#B P e"] | None = None,
) -> Float[Tensor, "B H Q T"]:
    """Attention weights of a timm attention module.

    Args:
        module: in eval mode; its queries and keys may be normalised.
        tokens: input of the module, after the block's norm.
        num_queries: Q, the first tokens only; None: all T.
        bias: added to the logits, as ``attn_mask`` of the module; None: nothing.
        rope: sines and cosines of the P patches, as the module takes them; None: nothing is rotated.

    Returns:
        Weights over the keys, rows sum to 1, at least float32.
    """
    queries, keys = _queries_and_keys(module, tokens)
    queries, keys = module.q_norm(queries), module.k_norm(keys)
    if rope is not None:
        queries, keys = (_rotated(part, rope, module) for part in (queries, keys))
    keys = keys.repeat_interleave(module.num_heads // keys.shape[1], dim=1)
    logits = at_least_float32(queries[:, :, :num_queries] * module.scale @ keys.mT)
    return (logits if bias is None else logits + bias[:, :, :num_queries]).softmax(-1)


def _queries_and_keys(
    module: AnyAttention, tokens: Float[Tensor, "B T D"]
) -> tuple[Float[Tensor, "B H T d"], Float[Tensor, "B G T d"]]:
    """Queries of all heads, and keys, which groups of heads may share."""
    batch, length, _ = tokens.shape
    if module.qkv is None:
        found = (module.q_proj(tokens), module.k_proj(tokens))
        heads = (module.num_heads, getattr(module, "num_kv_heads", module.num_heads))
        queries, keys = (x.reshape(batch, length, count, -1) for x, count in zip(found, heads, strict=True))
        return queries.transpose(1, 2), keys.transpose(1, 2)
    if getattr(module, "q_bias", None) is None:
        qkv = module.qkv(tokens)
    else:
        qkv = F.linear(tokens, module.qkv.weight, torch.cat([module.q_bias, module.k_bias, module.v_bias]))
    queries, keys, _ = qkv.reshape(batch, length, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
    return queries, keys


def _rotated(x: Float[Tensor, "B H T d"], rope: Tensor, module: AnyAttention) -> Float[Tensor, "B H T d"]:
    """Queries or keys with those of the patches rotated; prefix tokens stay."""
    first = module.num_prefix_tokens
    turned = apply_rot_embed_cat(x[:, :, first:], rope, half=getattr(module, "rotate_half", False))
    return torch.cat([x[:, :, :first], turned], dim=2).type_as(x)


def attention_modules(blocks: Iterable[nn.Module], name: str) -> list[AnyAttention]:
    """The attention module of each block.

    Args:
        blocks: blocks of a transformer.
        name: name of the encoder, for errors.

    Raises:
        ConfigError: if a block has another kind of attention than :data:`AnyAttention`.
    """
    found = []
    for block in blocks:
        module = getattr(block, "attn", None)
        if not isinstance(module, AnyAttention):
            kind = type(module or block).__name__
            raise ConfigError(f"{name} has blocks with {kind}, whose attention weights can't be computed")
        found.append(module)
    return found
