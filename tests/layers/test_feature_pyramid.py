"""The simple feature pyramid: sizes by a closed form, what each map is made of, odd grids, gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from smalti.layers.feature_pyramid import SCALES, SimpleFeaturePyramid, pyramid_sizes


@given(h=st.integers(1, 9), w=st.integers(1, 9))
def test_sizes_are_the_grids_times_the_scales_rounded_up(h, w):
    pyramid = SimpleFeaturePyramid(8, 4)
    maps = pyramid(torch.randn(2, 8, h, w))
    assert [tuple(one.shape) for one in maps] == [(2, 4, *size) for size in pyramid_sizes((h, w))]
    for one, scale in zip(maps, SCALES, strict=True):
        for side, patches in zip(one.shape[-2:], (h, w), strict=True):
            assert patches * scale <= side < patches * scale + 1 + (scale == 0.25)


def test_the_number_of_weights_is_that_of_the_paper():
    dim, width = 16, 8
    half, quarter = dim // 2, dim // 4
    up4 = dim * half * 4 + half + 2 * half + half * quarter * 4 + quarter
    up2 = dim * half * 4 + half
    mix = sum(c * width + 2 * width + width * width * 9 + 2 * width for c in (quarter, half, dim, dim))
    assert sum(p.numel() for p in SimpleFeaturePyramid(dim, width).parameters()) == up4 + up2 + mix


def test_a_token_reaches_only_its_own_surroundings():
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(8, 4).eval()
    tokens = torch.randn(1, 8, 6, 6)
    changed = tokens.clone()
    changed[..., 0, 0] += 1
    for one, other, scale in zip(pyramid(tokens), pyramid(changed), SCALES, strict=True):
        rows, columns = ((one - other).abs().sum((0, 1)) > 1e-6).nonzero().T
        assert int(max(rows.max(), columns.max())) <= max(scale, 1) - 1 + 1  # its own places and a 3x3 kernel's reach
    assert_close(pyramid(tokens)[4], pyramid(tokens)[3][..., ::2, ::2])


@pytest.mark.parametrize("grid", [(5, 5), (4, 6)])
def test_gradient_reaches_the_tokens_and_every_weight(grid):
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(8, 4)
    tokens = torch.randn(1, 8, *grid, requires_grad=True)
    sum((one * torch.randn_like(one)).sum() for one in pyramid(tokens)).backward()
    assert (tokens.grad.abs().sum(1) > 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pyramid.parameters())
