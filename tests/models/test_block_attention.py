"""Attention of single blocks is what their attention modules compute."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from smalti.errors import ConfigError
from smalti.functional.attention import to_patches
from smalti.layers.attention import attention_weights
from smalti.models.block_attention import block_attention
from smalti.models.build import build_encoder


def small(**options):
    return build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, seed=0, **options).eval()


@pytest.mark.parametrize(
    "options", [{}, {"reg_tokens": 2, "qk_norm": True}, {"class_token": False, "global_pool": "avg"}]
)
@torch.no_grad()
def test_rows_are_of_the_class_token_and_then_of_patches(options):
    encoder = small(**options)
    image = torch.randn(1, 3, 32, 32)
    found = list(block_attention(encoder, image))
    prefix = encoder.num_prefix_tokens
    sequence = encoder.vit.norm_pre(encoder.assemble(encoder.embed_patches(image)[0], encoder.positions((4, 4))))
    for ours, block in zip(found, encoder.vit.blocks, strict=True):
        weights = to_patches(attention_weights(block.attn, block.norm1(sequence))[0], prefix)
        expected = [0] * encoder.has_class_token + list(range(prefix, prefix + 16))
        assert_close(ours, weights[:, expected])
        assert_close(ours.sum(-1), torch.ones(ours.shape[:2]))
        sequence = block(sequence)
    assert_close(next(block_attention(encoder, image, [2])), found[2])
    assert not any(block.attn._forward_pre_hooks for block in encoder.vit.blocks)


def test_other_attention_is_refused():
    encoder = small()
    encoder.vit.blocks[1].attn = nn.Identity()
    with pytest.raises(ConfigError, match="Identity, whose attention weights can't be computed"):
        next(block_attention(encoder, torch.zeros(1, 3, 32, 32)))
