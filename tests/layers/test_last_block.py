"""A block's output at some tokens is that of the whole block there."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import Block, ParallelScalingBlock
from torch import nn
from torch.testing import assert_close

from smalti.layers.last_block import Chosen, block_at, place_of
from smalti.models.build import build_encoder

VARIANTS = ({}, {"qk_norm": True}, {"init_values": 0.3}, {"scale_attn_norm": True, "qkv_bias": True})


def wanted(seed: int, batch: int = 3, length: int = 7) -> torch.Tensor:
    marks = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.4
    marks[0, 0] = True
    return marks


@given(seed=st.integers(0, 10**6))
def test_the_chosen_are_the_marked_in_order(seed: int) -> None:
    marks, x = wanted(seed), torch.randn(3, 7, 2)
    chosen = Chosen.where(marks)
    assert torch.equal(chosen.pick(x), x[marks])
    places = torch.full((3, 7), -1)
    places[marks] = torch.arange(int(marks.sum()))
    assert torch.equal(place_of(chosen, 7), places)
    first = Chosen.first(3, torch.device("cpu"))
    assert torch.equal(first.pick(x), x[:, 0])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_outputs_and_gradients_are_the_whole_block_s(options: dict[str, object], drop_path: float) -> None:
    torch.manual_seed(0)
    block = Block(12, 3, drop_path=drop_path, norm_layer=nn.LayerNorm, **options).double().train()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    marks = wanted(1)
    chosen = Chosen.where(marks)
    x = torch.randn(3, 7, 12, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    results = []
    for way in (lambda: block_at(block, x, chosen), lambda: block(x)[marks]):
        torch.manual_seed(5)  # one draw a sequence in both
        out = way()
        # where stochastic depth drops a branch everywhere, gradients are zeros here and none there
        found = torch.autograd.grad((out * torch.arange(12)).sum(), leaves, allow_unused=True)
        results.append(
            [out, *(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True))]
        )
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


def test_blocks_of_another_kind_run_whole() -> None:
    block = ParallelScalingBlock(12, 3).eval()
    x, marks = torch.randn(3, 7, 12), wanted(2)
    assert_close(block_at(block, x, Chosen.where(marks)), block(x)[marks])


@pytest.mark.parametrize("registers", [0, 2])
def test_an_encoder_says_the_same_of_chosen_tokens(registers: int) -> None:
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        reg_tokens=registers,
        seed=0,
    ).eval()
    tokens, grid = encoder.embed_patches(torch.randn(3, 3, 32, 32))
    sequence = encoder.assemble(tokens, encoder.positions(grid))
    marks = wanted(3, length=sequence.shape[1])
    assert_close(encoder.forward_chosen(sequence, Chosen.where(marks)), encoder.forward_tokens(sequence)[marks])
