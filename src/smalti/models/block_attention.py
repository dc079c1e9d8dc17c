"""Attention of the class token and of all patches in any block, of one image at a time.

Letters: H heads, Q queries, N = h*w patches.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Num
from torch import Tensor

from smalti.functional.attention import to_patches
from smalti.layers.attention import AnyAttention, attention_modules, attention_weights
from smalti.models.encoder import Encoder


def block_attention(
    encoder: Encoder, image: Num[Tensor, "1 C H W"], blocks: Sequence[int] | None = None
) -> Iterator[Float[Tensor, "heads Q N"]]:
    """Attention to the patches, block by block.

    Args:
        encoder: in eval mode.
        image: normalised, on the encoder's device.
        blocks: which blocks; None: all.

    Yields:
        Rows of the class token, if there is one, and then of all patches; prefix keys (class token and registers) are
        left out and rows sum to 1.

    Raises:
        ConfigError: if the attention weights of a block can't be computed.

    Cost: a forward pass, and heads * N * N weights for each block.
    """
    modules = attention_modules(encoder.vit.blocks, encoder.name)
    chosen = range(len(modules)) if blocks is None else blocks
    inputs: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}

    def keep(number: int, tokens: Tensor, bias: Tensor | None, rope: Tensor | None) -> None:
        inputs[number] = tokens, bias, rope

    hooks = [
        modules[number].register_forward_pre_hook(
            lambda module, args, given, n=number: keep(n, args[0], given.get("attn_mask"), given.get("rope")),
            with_kwargs=True,
        )
        for number in chosen
    ]
    try:
        with torch.no_grad():
            encoder.encode(image)
    finally:
        for hook in hooks:
            hook.remove()
    for number in chosen:
        yield _of_block(modules[number], *inputs.pop(number), encoder)


@torch.no_grad()
def _of_block(
    module: AnyAttention,
    tokens: Float[Tensor, "1 T D"],
    bias: Float[Tensor, "1 #heads T T"] | None,
    rope: Tensor | None,
    encoder: Encoder,
) -> Float[Tensor, "heads Q N"]:
    num_prefix = encoder.num_prefix_tokens
    weights = to_patches(attention_weights(module, tokens, bias=bias, rope=rope)[0], num_prefix)
    prefix = weights[:, : int(encoder.has_class_token)]  # the class token comes before registers
    return torch.cat([prefix, weights[:, num_prefix:]], dim=1)
