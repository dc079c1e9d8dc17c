"""PRR: known answers, the paper's gradient, and the shortcut that is no approximation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from smalti.errors import ConfigError, ShapeError
from smalti.functional.refinement import prr_refine, prr_token

X = torch.tensor([[1, 0, 0, 2], [0, 1, 1, 0], [1, 1, -1, 0]], dtype=torch.float64)[None]
TWO_HEADS = torch.tensor(
    [
        [0.802224, 0.598888, 0, 1.788570],
        [0.598888, 0.802224, 0.435946, 0.567991],
        [0.751745, 0.751745, -0.435946, 0.567991],
    ],
    dtype=torch.float64,
)
ONE_HEAD = torch.tensor(
    [
        [0.932575, 0.178591, -0.043740, 1.642818],
        [0.423883, 0.788058, 0.364175, 0.423883],
        [0.859756, 0.768776, -0.488287, 0.462448],
    ],
    dtype=torch.float64,
)


def by_hand(tokens: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The formula in loops over images, heads and tokens."""
    width = tokens.shape[-1] // num_heads
    out = torch.empty_like(tokens)
    for image, refined in zip(tokens, out, strict=True):
        for head in range(num_heads):
            channels = slice(head * width, (head + 1) * width)
            own = image[:, channels]
            for place, token in enumerate(own):
                weights = torch.softmax(torch.stack([token @ other for other in own]) / math.sqrt(width), 0)
                refined[place, channels] = sum(w * other for w, other in zip(weights, own, strict=True))
    return out


@pytest.mark.parametrize(("num_heads", "expected"), [(2, TWO_HEADS), (1, ONE_HEAD)])
def test_the_small_example_has_its_known_answer(num_heads, expected):
    assert_close(prr_refine(X, num_heads)[0], expected, atol=1e-6, rtol=0)
    assert_close(prr_refine(X, num_heads), by_hand(X, num_heads))
    assert_close(prr_token(X, num_heads)[0], expected[0], atol=1e-6, rtol=0)


@given(st.integers(1, 3), st.integers(1, 6), st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(0, 2**16))
def test_it_is_the_formula_for_any_shape(batch, num_tokens, num_heads, width, seed):
    tokens = torch.randn(
        batch, num_tokens, num_heads * width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    assert_close(prr_refine(tokens, num_heads), by_hand(tokens, num_heads))


def test_fused_and_plain_attention_agree():
    tokens = F.layer_norm(torch.randn(2, 50, 24, generator=torch.Generator().manual_seed(0)), (24,))
    heads = tokens.unflatten(-1, (3, -1)).transpose(1, 2)
    plain = (heads @ heads.mT / math.sqrt(8)).softmax(-1) @ heads
    assert_close(prr_refine(tokens, 3), plain.transpose(1, 2).flatten(2), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("place", [0, 3])
def test_one_token_alone_has_the_values_and_the_gradients_of_that_token_among_all(place):
    g = torch.Generator().manual_seed(1)
    tokens, weights = (torch.randn(2, 9, 12, dtype=torch.float64, generator=g) for _ in range(2))
    whole, alone = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    refined, token = prr_refine(whole, 3)[:, place], prr_token(alone, 3, place)
    assert_close(token, refined, atol=1e-12, rtol=0)
    for out in (refined, token):
        (out * weights[:, 0]).sum().backward()
    assert_close(alone.grad, whole.grad, atol=1e-12, rtol=0)


def test_gradients_are_those_of_finite_differences():
    tokens = torch.randn(1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: prr_refine(x, 2), tokens)
    assert torch.autograd.gradcheck(lambda x: prr_token(x, 2), tokens)


def test_patches_get_unequal_gradients_where_a_class_token_alone_gives_none_and_the_mean_equal_ones():
    num_heads, width = 3, 4
    g = torch.Generator().manual_seed(3)
    tokens = torch.randn(1, 8, num_heads * width, dtype=torch.float64, generator=g)
    weights = torch.randn(num_heads * width, dtype=torch.float64, generator=g)

    def gradient(pool):
        leaf = tokens.clone().requires_grad_()
        (weights * pool(leaf)).sum().backward()
        return leaf.grad[0]

    assert torch.equal(gradient(lambda x: x[:, 0])[1:], torch.zeros(7, 12, dtype=torch.float64))
    mean = gradient(lambda x: x[:, 1:].mean(1))[1:]
    assert torch.equal(mean, mean[:1].expand_as(mean)) and mean.abs().min() > 0
    prr = gradient(lambda x: prr_token(x, num_heads))
    assert (prr[1:].abs() > 0).all() and not torch.allclose(prr[1:], prr[1:2].expand(7, -1))
    # The paper's gradient of a head: a_t g + r_t x_0 for a patch, r_t = a_t ((x_t - y) . g) / sqrt(d).
    for head in range(num_heads):
        channels = slice(head * width, (head + 1) * width)
        x, grad = tokens[0, :, channels], weights[channels]
        a = (x @ x[0] / math.sqrt(width)).softmax(0)
        r = a * ((x - a @ x) @ grad) / math.sqrt(width)
        expected = a[:, None] * grad + r[:, None] * x[0]
        expected[0] += r @ x
        assert_close(prr[:, channels], expected, atol=1e-14, rtol=1e-12)


def test_permuted_tokens_come_out_permuted():
    g = torch.Generator().manual_seed(4)
    tokens, order = torch.randn(2, 7, 12, dtype=torch.float64, generator=g), torch.randperm(7, generator=g)
    assert_close(prr_refine(tokens[:, order], 4), prr_refine(tokens, 4)[:, order])


def test_equal_tokens_and_a_lone_token_stay_as_they_are():
    token = torch.randn(1, 1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert_close(prr_refine(token, 3), token)
    assert_close(prr_refine(token.expand(1, 5, 12), 3), token.expand(1, 5, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_and_near(dtype):
    tokens = F.layer_norm(torch.randn(1, 1025, 768, generator=torch.Generator().manual_seed(6)), (768,))
    with torch.autocast("cpu", dtype=dtype):
        refined, token = prr_refine(tokens, 12), prr_token(tokens, 12)
    exact = prr_refine(tokens, 12)
    for found, expected in ((refined, exact), (token, exact[:, 0])):
        assert found.isfinite().all()
        assert_close(found.float(), expected, atol=0.05, rtol=0)
    assert_close(prr_token(tokens.to(dtype), 12).float(), exact[:, 0], atol=0.05, rtol=0)


def test_long_tokens_see_only_themselves():
    tokens = 30 * F.layer_norm(torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(7)), (64,))
    assert_close(prr_refine(tokens, 1), tokens)


def test_mistakes_are_one_line_each():
    tokens = torch.zeros(1, 3, 4)
    for num_heads in (3, 0, -1):
        with pytest.raises(ConfigError, match=f"PRR with {num_heads} heads on tokens of width 4"):
            prr_refine(tokens, num_heads)
    with pytest.raises(ShapeError, match=r"place=3: an index in 0\.\.2 is needed"):
        prr_token(tokens, 2, place=3)
