"""Heads on pairs of patches against their definitions on the concatenated tokens."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from smalti.errors import ConfigError
from smalti.functional.pairs import select_pairs
from smalti.functional.positions import sincos_at
from smalti.layers.relative_encoder import DifferenceHead, PairwiseLinear, RelativeEncoder

TOKENS = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))
PAIRS = select_pairs(torch.arange(1), 6, 11)


def side_by_side() -> torch.Tensor:
    """``(B, K, 2D)``, made the plain way."""
    return torch.stack([torch.stack([torch.cat([its[i], its[j]]) for i, j in PAIRS[0].tolist()]) for its in TOKENS])


def louder(head: nn.Module) -> nn.Module:
    """Weights large enough that a wrong one shows."""
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("extras", [{}, {"residual": True, "norm": True, "mlp": True}], ids=["plain", "extras"])
def test_the_relative_encoder_is_attention_of_concatenated_pairs(num_heads: int, extras: dict[str, bool]) -> None:
    head = louder(RelativeEncoder(16, 4, num_heads, **extras))
    assert head.input_project is not None
    query = head.input_project(side_by_side())
    tokens = head.token_norm(TOKENS)
    found, _ = head.multihead_attn(head.query_norm(query), tokens, tokens)
    if extras:
        found = found + query
        found = found + head.mlp(found)
    assert_close(head(TOKENS, PAIRS), head.output_project(found), rtol=1e-4, atol=1e-4)


def test_a_width_of_its_own_is_a_projection_of_the_tokens() -> None:
    head = louder(RelativeEncoder(16, 2, width=8))
    narrow = louder(RelativeEncoder(8, 2))
    narrow.load_state_dict({name: value for name, value in head.state_dict().items() if "token_project" not in name})
    assert_close(head(TOKENS, PAIRS), narrow(head.token_project(TOKENS), PAIRS))
    with pytest.raises(ConfigError, match=r"head_num_heads=3 does not divide method\.head_dim 8"):
        RelativeEncoder(16, 2, 3, width=8)


def test_positional_queries_are_codes_of_the_numbers_of_a_pair() -> None:
    head = louder(RelativeEncoder(16, 2, query="positional"))
    tokens = TOKENS + sincos_at(torch.arange(6.0)[:, None], 16)
    query = sincos_at(PAIRS.double(), 16).expand(3, -1, -1)
    found, _ = head.multihead_attn(query, tokens, tokens)
    assert_close(head(TOKENS, PAIRS), head.output_project(found), rtol=1e-4, atol=1e-4)


def test_the_other_heads_are_layers_on_concatenated_pairs() -> None:
    both = side_by_side()
    linear, difference = louder(PairwiseLinear(16, 2)), louder(DifferenceHead(16, 2))
    assert_close(linear(TOKENS, PAIRS), linear.linear(both), rtol=1e-4, atol=1e-5)
    own, other = both.chunk(2, dim=-1)
    assert_close(difference(TOKENS, PAIRS), difference.linear(other - own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dim", "count"), [(384, 887_426), (768, 3_544_322)])  # known answers
def test_the_relative_encoder_has_the_paper_s_number_of_weights(dim: int, count: int) -> None:
    assert sum(p.numel() for p in RelativeEncoder(dim, 2).parameters()) == count


def test_the_pairwise_layer_has_3074_weights() -> None:  # known answer
    assert sum(p.numel() for p in PairwiseLinear(768, 2).parameters()) == 3074


@pytest.mark.parametrize("make", [RelativeEncoder, PairwiseLinear, DifferenceHead])
def test_heads_have_the_right_gradient(make: type[nn.Module]) -> None:
    head = louder(make(4, 2)).double()
    tokens = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    pairs = select_pairs(torch.arange(1), 3, 5)
    parameters = tuple(head.parameters())
    assert gradcheck(lambda x, *weights: head(x, pairs), (tokens, *parameters))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="head_num_heads=3 does not divide the encoder's width 16"):
        RelativeEncoder(16, 2, 3)
