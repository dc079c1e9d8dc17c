"""Gaussian bias: its known answer, its cost in parameters, and a block that is timm's."""

import math

import pytest
import torch
from timm.models.vision_transformer import Block
from torch.testing import assert_close

from smalti.errors import ConfigError
from smalti.layers.gaussian_bias import GaussianBias, block_with_bias


def zeroed(grid: tuple[int, int], head_dim: int = 4) -> GaussianBias:
    bias = GaussianBias(head_dim, grid)
    for parameter in bias.parameters():
        torch.nn.init.zeros_(parameter)
    return bias


def test_the_two_by_two_grid_has_its_known_answer() -> None:
    bias = zeroed((2, 2))
    found = bias(torch.randn(1, 3, 4, 4), (2, 2))[0, 1]
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
    found = bias(queries, (2, 3))
    for b, h, p, t in ((0, 0, 0, 0), (0, 1, 0, 5), (1, 0, 4, 2), (1, 1, 3, 1)):
        query = queries[b, h, p]
        var = 16 * torch.sigmoid(bias.var(query) - math.log(15)) * 2 / 3
        apart = [(p // 3 - t // 3) ** 2, (p % 3 - t % 3) ** 2]
        exponent = sum(min(d / 2, 4.5) / (v + 0.1) for d, v in zip(apart, var, strict=True))
        expected = torch.nn.functional.softplus(bias.height(query))[0] * torch.exp(-torch.as_tensor(exponent))
        assert_close(found[b, h, p, t], expected)


def test_the_block_adds_it_to_its_logits_among_patches_alone() -> None:
    torch.manual_seed(1)
    block, bias, x = Block(12, 3, qkv_bias=True).eval(), GaussianBias(4, (2, 3)), torch.randn(2, 8, 12)
    attn, normed = block.attn, block.norm1(x)
    queries, keys, values = attn.qkv(normed).reshape(2, 8, 3, 3, 4).permute(2, 0, 3, 1, 4)
    logits = queries @ keys.mT / 2
    logits[:, :, 2:, 2:] += bias(queries[:, :, 2:], (2, 3))
    mixed = attn.proj((logits.softmax(-1) @ values).transpose(1, 2).flatten(2))
    expected = x + mixed
    expected = expected + block.mlp(block.norm2(expected))
    found = block_with_bias(block, bias, x, (2, 3), num_prefix=2)
    assert_close(found, expected)
    assert not torch.allclose(found, block(x), atol=1e-4)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in bias.parameters())
    torch.nn.init.constant_(bias.height.bias, -100.0)  # no height, no hill
    assert_close(block_with_bias(block, bias, x, (2, 3), num_prefix=2), block(x))


def test_a_single_patch_is_refused() -> None:
    with pytest.raises(ConfigError, match="grid of 1x1 patches; at least 2 patches are needed"):
        GaussianBias(4, (1, 1))
