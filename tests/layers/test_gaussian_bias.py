"""Gaussian bias: its known answer, its cost in parameters, and a block that is timm's."""

import math

import pytest
import torch
from timm.models.vision_transformer import Block, ResPostBlock
from torch.testing import assert_close

from smalti.errors import ConfigError
from smalti.layers.attention import attention_weights
from smalti.layers.gaussian_bias import GaussianBias, Places, attach_bias, biased_block


def zeroed(grid: tuple[int, int], head_dim: int = 4) -> GaussianBias:
    bias = GaussianBias(head_dim, grid)
    for parameter in bias.parameters():
        torch.nn.init.zeros_(parameter)
    return bias


def test_the_two_by_two_grid_has_its_known_answer() -> None:
    bias = zeroed((2, 2))
    found = bias(torch.randn(1, 3, 4, 4), Places((2, 2)))[0, 1]
    edge, corner = 0.439966, 0.279262
    expected = torch.tensor(
        [
            [math.log(2), edge, edge, corner],
            [edge, math.log(2), corner, edge],
            [edge, corner, math.log(2), edge],
            [corner, edge, edge, math.log(2)],
        ]
    )
    assert_close(found, expected, atol=1e-6, rtol=0)
    assert sum(p.numel() for p in bias.parameters()) == 3 * 4 + 3


@pytest.mark.parametrize(("side", "eps"), [(2, 0.1), (14, 0.1), (26, 0.1), (27, 0.2), (32, 0.2)])
def test_eps_keeps_exponents_within_half_precision(side: int, eps: float) -> None:
    assert GaussianBias(4, (side, side)).eps == eps


def test_it_is_the_formula_at_another_grid_by_loops() -> None:
    torch.manual_seed(0)
    bias, queries = GaussianBias(4, (3, 4)), 5 * torch.randn(2, 2, 6, 4)
    found = bias(queries, Places((2, 3)))
    for b, h, p, t in ((0, 0, 0, 0), (0, 1, 0, 5), (1, 0, 4, 2), (1, 1, 3, 1)):
        query = queries[b, h, p]
        var = 16 * torch.sigmoid(bias.var(query) - math.log(15)) * 2 / 3
        apart = [(p // 3 - t // 3) ** 2, (p % 3 - t % 3) ** 2]
        exponent = sum(min(d / 2, 4.5) / (v + 0.1) for d, v in zip(apart, var, strict=True))
        expected = torch.nn.functional.softplus(bias.height(query))[0] * torch.exp(-torch.as_tensor(exponent))
        assert_close(found[b, h, p, t], expected)


def test_the_block_adds_it_to_its_logits_among_patches_alone() -> None:
    torch.manual_seed(1)
    block, x, places = Block(12, 3, qkv_bias=True).eval(), torch.randn(2, 8, 12), Places((2, 3))
    plain = block(x)
    attach_bias(block, (2, 3))
    bias = block.gaug
    attn, normed = block.attn, block.norm1(x)
    queries, keys, values = attn.qkv(normed).reshape(2, 8, 3, 3, 4).permute(2, 0, 3, 1, 4)
    logits = queries @ keys.mT / 2
    logits[:, :, 2:, 2:] += bias(queries[:, :, 2:], places)
    mixed = attn.proj((logits.softmax(-1) @ values).transpose(1, 2).flatten(2))
    expected = x + mixed
    expected = expected + block.mlp(block.norm2(expected))
    found = biased_block(block, x, places, num_prefix=2)
    assert_close(found, expected)
    assert not torch.allclose(found, plain, atol=1e-4)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in bias.parameters())
    torch.nn.init.constant_(bias.height.bias, -100.0)  # no height, no hill
    assert_close(biased_block(block, x, places, num_prefix=2), plain)


def test_some_patches_have_the_rows_and_columns_of_the_whole_grid() -> None:
    torch.manual_seed(2)
    bias, queries = GaussianBias(4, (3, 3)), torch.randn(2, 2, 12, 4)
    ids_keep = torch.tensor([[7, 0, 11], [3, 4, 5]])
    few = queries.gather(2, ids_keep[:, None, :, None].expand(-1, 2, -1, 4))
    whole = bias(queries, Places((3, 4)))
    found = bias(few, Places((3, 4), ids_keep))
    for b, ids in enumerate(ids_keep):
        assert_close(found[b], whole[b][:, ids][:, :, ids])


def test_recomputed_attention_weights_have_the_bias() -> None:
    torch.manual_seed(4)
    block, x = Block(12, 3).eval(), torch.randn(2, 7, 12)
    attach_bias(block, (2, 3))
    seen: list[torch.Tensor] = []
    block.attn.register_forward_pre_hook(
        lambda module, args, given: seen.extend((args[0], given["attn_mask"])), with_kwargs=True
    )
    found = biased_block(block, x, Places((2, 3)), 1)
    weights = attention_weights(block.attn, seen[0], bias=seen[1])
    values = block.attn.qkv(seen[0]).reshape(2, 7, 3, 3, 4).permute(2, 0, 3, 1, 4)[2]
    expected = x + block.attn.proj((weights @ values).transpose(1, 2).flatten(2))
    assert_close(found, expected + block.mlp(block.norm2(expected)))
    assert_close(attention_weights(block.attn, seen[0], 1, seen[1]), weights[:, :, :1])


def test_tokens_that_are_no_keys_have_no_influence() -> None:
    torch.manual_seed(3)
    block, x, is_key = Block(12, 3).eval(), torch.randn(2, 7, 12), torch.ones(2, 7, dtype=torch.bool)
    attach_bias(block, (2, 3))
    is_key[:, 4] = False
    other = torch.cat([x[:, :4], torch.randn(2, 1, 12), x[:, 5:]], dim=1)
    seen, again = (biased_block(block, tokens, Places((2, 3)), 1, is_key) for tokens in (x, other))
    assert_close(seen[is_key], again[is_key])


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(precision: torch.dtype) -> None:
    block, x = Block(12, 3), 30 * torch.randn(1, 65, 12)
    attach_bias(block, (8, 8))
    with torch.autocast("cpu", precision):
        biased_block(block, x, Places((8, 8)), 1).float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.gaug.parameters())


def test_other_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="gaug=true: ResPostBlock is not timm's plain block"):
        attach_bias(ResPostBlock(12, 3), (2, 2))
    with pytest.raises(ConfigError, match="gaug=true: Identity is not"):
        attach_bias(torch.nn.Identity(), (2, 2))


def test_a_single_patch_is_refused() -> None:
    with pytest.raises(ConfigError, match="grid of 1x1 patches; at least 2 patches are needed"):
        GaussianBias(4, (1, 1))
