"""Attention weights of timm's blocks, recomputed, since fused attention doesn't return them.

Letters: B sequences, H heads, T tokens, D their width, Q queries.
"""

from collections.abc import Iterable

from jaxtyping import Float
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.functional.precision import at_least_float32


def attention_weights(
    module: Attention,
    tokens: Float[Tensor, "B T D"],
    num_queries: int | None = None,
    bias: Float[Tensor, "B #H T T"] | None = None,
) -> Float[Tensor, "B H Q T"]:
    """Attention weights of a timm attention module.

    Args:
        module: in eval mode; its queries and keys may be normalised.
        tokens: input of the module, after the block's norm.
        num_queries: Q, the first tokens only; None: all T.
        bias: added to the logits, as ``attn_mask`` of the module; None: nothing.

    Returns:
        Weights over the keys, rows sum to 1, at least float32.
    """
    batch, length, _ = tokens.shape
    qkv = module.qkv(tokens).reshape(batch, length, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
    queries, keys = module.q_norm(qkv[0, :, :, :num_queries]), module.k_norm(qkv[1])
    logits = at_least_float32(queries * module.scale @ keys.mT)
    return (logits if bias is None else logits + bias[:, :, :num_queries]).softmax(-1)


def attention_modules(blocks: Iterable[nn.Module], name: str) -> list[Attention]:
    """The attention module of each block.

    Args:
        blocks: blocks of a transformer.
        name: name of the encoder, for errors.

    Raises:
        ConfigError: if a block doesn't have timm's plain attention.
    """
    found = []
    for block in blocks:
        module = getattr(block, "attn", None)
        if not isinstance(module, Attention):
            kind = type(module or block).__name__
            raise ConfigError(f"{name} has blocks with {kind}; attention weights need timm's plain Attention")
        found.append(module)
    return found
