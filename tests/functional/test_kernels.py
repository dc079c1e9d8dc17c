"""Kernels of tokens and their alignment, against numbers by hand and plain formulas."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from smalti.functional.kernels import centred_kernel, kernel_alignment, kernel_rank

S = torch.tensor([[1.0, 0], [0, 1], [1, 1]], dtype=torch.float64)
T = torch.tensor([[1.0, 0], [0, 2], [0, 0]], dtype=torch.float64)
FIVE_S = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 0], [0, 0]], dtype=torch.float64)
FIVE_T = torch.tensor([[1.0, 0], [0, 2], [0, 0], [1, 1], [-1, 0]], dtype=torch.float64)


def cka(one: Tensor, other: Tensor, unbiased: bool = False) -> Tensor:
    return kernel_alignment(centred_kernel(one, unbiased), centred_kernel(other, unbiased))[0]


def test_centred_kernels_and_their_alignment_are_those_by_hand() -> None:
    kernel, other = centred_kernel(S), centred_kernel(T)
    assert_close(9 * kernel, torch.tensor([[5.0, -4, -1], [-4, 5, -1], [-1, -1, 2]], dtype=torch.float64))
    assert_close(9 * other, torch.tensor([[8.0, -10, 2], [-10, 17, -7], [2, -7, 5]], dtype=torch.float64))
    sums = [(a * b).sum().item() for a, b in ((kernel, other), (kernel, kernel), (other, other))]
    assert sums == pytest.approx([2.777778, 1.111111, 8.444444], abs=1e-6)
    assert cka(S, T).item() == pytest.approx(0.906845, abs=1e-6)


def test_products_of_features_give_the_same_alignment() -> None:
    g = torch.Generator().manual_seed(0)
    one, other = (torch.randn(7, width, dtype=torch.float64, generator=g) for width in (3, 5))
    x, y = one - one.mean(0), other - other.mean(0)
    expected = (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    assert_close(cka(one, other), expected, rtol=0, atol=1e-12)


def test_rotation_scale_and_shift_change_nothing() -> None:
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    moved = 3 * S @ rotation + torch.tensor([5.0, -2], dtype=torch.float64)
    assert cka(S, moved).item() == pytest.approx(1, abs=1e-12)
    for scale in (0.03, 0.01, 1e-6):  # no lower bound on the norm of a kernel
        small = (scale * S).float()
        assert cka(small, small).item() == pytest.approx(1, abs=1e-5)
    stretched = S * torch.tensor([[1.0], [2], [1]], dtype=torch.float64)
    assert cka(S, stretched).item() < 0.99  # a scale per token does


def test_the_unbiased_estimate_is_that_by_hand() -> None:
    assert cka(FIVE_S, FIVE_T, unbiased=True).item() == pytest.approx(-0.132453, abs=1e-6)
    assert cka(FIVE_S, FIVE_T).item() == pytest.approx(0.427582, abs=1e-6)
    assert cka(FIVE_S, FIVE_S, unbiased=True).item() == pytest.approx(1, abs=1e-12)


def test_inner_products_of_u_centred_kernels_are_the_unbiased_hsic() -> None:
    n = len(FIVE_S)
    k, m = (x @ x.T * (1 - torch.eye(n, dtype=x.dtype)) for x in (FIVE_S, FIVE_T))
    expected = (k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()
    found = (centred_kernel(FIVE_S, unbiased=True) * centred_kernel(FIVE_T, unbiased=True)).sum()
    assert_close(found, expected, rtol=0, atol=1e-12)


def test_unrelated_wide_features_score_high_unless_unbiased() -> None:
    g = torch.Generator().manual_seed(1)
    one, other = torch.randn(2, 20, 49, 256, generator=g)
    assert cka(one, other).mean().item() == pytest.approx(0.839, abs=0.01)
    assert cka(one, other, unbiased=True).mean().item() == pytest.approx(0.0, abs=0.05)


def test_equal_tokens_have_no_alignment_and_no_gradient() -> None:
    equal = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    alignment, is_defined = kernel_alignment(centred_kernel(equal), centred_kernel(FIVE_T[:4]))
    alignment.backward()
    assert (alignment.item(), is_defined.item()) == (0, 0)
    assert equal.grad is not None and not equal.grad.any()


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_alignment_has_the_right_gradient(unbiased: bool) -> None:
    assert gradcheck(lambda x: cka(x, FIVE_T, unbiased), FIVE_S.clone().requires_grad_())


def test_the_rank_counts_directions() -> None:
    assert kernel_rank(centred_kernel(torch.eye(5, dtype=torch.float64))).item() == pytest.approx(4)  # less the mean
    line = torch.tensor([[1.0, 2], [2, 4], [3, 6]], dtype=torch.float64)
    assert kernel_rank(centred_kernel(line)).item() == pytest.approx(1)
    assert kernel_rank(centred_kernel(torch.ones(3, 2))).item() == 0
