"""Attention on a page: what the page decodes is the attention of the encoder, and never more than its limit."""

import base64

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from smalti.errors import ConfigError
from smalti.models.block_attention import block_attention
from smalti.models.build import build_encoder
from smalti.report.attention_data import (
    AttentionPlan,
    attention_data,
    cells,
    merge_patches,
    plan_attention,
    quantise_rows,
)
from smalti.report.patch_pictures import to_input


def small(**options):
    return build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, seed=0, **options).eval()


def decoded(data, number=0):
    """``(F, L, H, Q, M)`` weights, as the page's script computes them."""
    own = data["encoders"][number]
    scales = np.frombuffer(base64.b64decode(own["scales"]), "<f4")
    scales = scales.reshape(len(data["images"]), own["blocks"], own["heads"], -1, 1)
    codes = np.frombuffer(base64.b64decode(own["codes"]), np.uint8).reshape(*scales.shape[:-1], -1)
    return (codes / 255) ** 2 * scales


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
def test_the_page_has_the_attention_of_every_patch_in_every_block_and_head(options):
    encoder = small(**options)
    with torch.no_grad():
        for block in encoder.vit.blocks:
            block.attn.qkv.weight *= 20  # not all alike
    inputs = [np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8) for n in range(4)]
    data = attention_data({"trained": encoder, "before": small()}, inputs, (4, 4), 2)
    assert (data["images"], data["query_step"], data["key_step"]) == ([0, 1, 2, 3], 1, 1)
    found = decoded(data)
    assert found.shape == (4, 2, 3, 16 + encoder.has_class_token, 16)
    for slot, image in enumerate(inputs):
        for layer, weights in enumerate(block_attention(encoder, encoder.normalize(to_input(image)[None]))):
            largest = weights.amax(-1, keepdim=True)
            limit = (weights * largest).sqrt() / 255 + largest / 255**2 + 1e-7
            assert ((torch.from_numpy(found[slot, layer]) - weights).abs() <= limit).all()
    assert found.max() > 0.2 and found.min() < 0.02


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 24),
    st.integers(1, 12),
    st.sampled_from([2**12, 2**18, 2**23]),
)
def test_a_page_never_holds_more_than_its_limit(height, width, depth, num_images, limit):
    plan = plan_attention(2 * 6 * depth, (height, width), num_images, num_images - 1, limit)
    queries, keys = (int(cells((height, width), step).max()) + 1 for step in (plan.query_step, plan.key_step))
    assert num_images - 1 in plan.images and len(set(plan.images)) == len(plan.images) <= num_images
    assert plan.images == tuple(sorted(plan.images)) and plan.images[-1] < num_images
    size = 2 * 6 * depth * len(plan.images) * (1 + queries) * keys
    assert size <= limit or (keys == 1 and len(plan.images) == 1)
    assert len(plan.images) >= min(3, num_images) or keys == 1


def test_cells_are_squares_that_are_smaller_at_the_border():
    assert cells((3, 5), 2).view(3, 5).tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]


def test_merged_attention_is_the_mean_over_queries_and_the_sum_over_keys():
    attention = torch.rand(2, 1 + 15, 15)
    attention /= attention.sum(-1, keepdim=True)
    merged = merge_patches(attention, (3, 5), AttentionPlan((0,), 3, 2))
    assert merged.shape == (2, 1 + 2, 6)
    assert_close(merged.sum(-1), torch.ones(2, 3))
    keys, queries = cells((3, 5), 2), cells((3, 5), 3)
    assert_close(merged[:, 0, 4], attention[:, 0, keys == 4].sum(-1))
    assert_close(merged[:, 2, 1], attention[:, 1:][:, queries == 1][..., keys == 1].sum(-1).mean(-1))
    assert_close(merge_patches(attention, (3, 5), AttentionPlan((0,), 1, 1)), attention)


def test_equal_weights_are_exact_and_zero_stays_zero():
    codes, scales = quantise_rows(torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[255] * 4, [255, 0, 0, 0]] and scales.tolist() == [0.25, 1.0]


def test_an_encoder_without_plain_attention_is_named():
    encoder = small()
    encoder.vit.blocks[0].attn = nn.Identity()
    with pytest.raises(ConfigError, match="whose attention weights can't be computed"):
        attention_data({"trained": encoder}, [np.zeros((32, 32, 3), np.uint8)], (4, 4), 0)
