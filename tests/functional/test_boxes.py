"""Boxes and RoI-Align: the known answers, torchvision, and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.ops import roi_align as torchvision_roi_align

from smalti.functional.boxes import in_view, normalize_boxes, overlaps, place_in_field, roi_align


def test_boxes_become_shares_of_their_own_image():
    boxes = torch.tensor([[0.0, 0.0, 50.0, 40.0], [10, 20, 20, 40], [25, 10, 50, 20], [0, 0, 5, 80]])  # 2 views of 2
    source_size = torch.tensor([[40, 50], [80, 20]])  # height, width
    expected = torch.tensor([[0, 0, 1, 1], [0.5, 0.25, 1, 0.5], [0.5, 0.25, 1, 0.5], [0, 0, 0.25, 1]])
    assert_close(normalize_boxes(boxes, source_size), expected)


VIEWS = torch.tensor([[0.1, 0.2, 0.6, 0.8], [0.3, 0.1, 0.9, 0.7], [0.05, 0.5, 0.25, 0.75]])[:, None]


def test_views_are_scaled_and_shifted_together():  # known answer
    placed = place_in_field(VIEWS, 2, torch.tensor([0.35]), torch.tensor([[0.5, 0.25]]))[:, 0]
    expected = [
        [0.203536, 0.190707, 0.598821, 0.665049],
        [0.361650, 0.111650, 0.835992, 0.585992],
        [0.164008, 0.427878, 0.322122, 0.625520],
    ]
    assert_close(placed, torch.tensor(expected), rtol=0, atol=1e-6)
    size = placed[:2, 2:].amax(0) - placed[:2, :2].amin(0)
    assert size.prod().item() == pytest.approx(0.35)


def test_the_scale_is_cut_where_views_would_not_fit():  # known answer
    wide = torch.tensor([[0.0, 0.3, 1.0, 0.7], [0.2, 0.4, 0.5, 0.6]])[:, None]
    placed = place_in_field(wide, 2, torch.tensor([0.9]), torch.tensor([[0.7, 0.0]]))[:, 0]
    assert_close(placed, torch.tensor([[0.0, 0.0, 1.0, 0.4], [0.2, 0.1, 0.5, 0.3]]), rtol=0, atol=1e-6)


def test_the_image_itself_may_be_what_gets_the_area():
    placed = place_in_field(VIEWS, 2, torch.tensor([0.36]), torch.zeros(1, 2), anchor="image")[:, 0]
    assert_close(placed[:, 2:] - placed[:, :2], 0.6 * (VIEWS[:, 0, 2:] - VIEWS[:, 0, :2]))


@given(seed=st.integers(0, 2**32), anchor=st.sampled_from(["crops", "image"]))
def test_views_stay_inside_and_keep_their_geometry(seed, anchor):
    generator = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(5, 3, 2, generator=generator), torch.rand(5, 3, 2, generator=generator) * 0.9 + 0.1
    boxes = torch.cat([corner * (1 - size), corner * (1 - size) + size], dim=2)
    area, shift = 0.2 + 0.8 * torch.rand(3, generator=generator), torch.rand(3, 2, generator=generator)
    placed = place_in_field(boxes, 2, area, shift, anchor)
    assert placed.min().item() >= 0 and placed.max().item() <= 1
    before, after = ((x[..., 2:] - x[..., :2]) for x in (boxes, placed))
    ratio = after / before  # one scale for all views of an image, on both axes
    assert_close(ratio, ratio[:1, :, :1].expand_as(ratio), rtol=1e-4, atol=1e-5)


def test_overlaps_are_told_in_the_pixels_of_either_view():  # known answer
    views = torch.tensor([[0.0, 0, 100, 100], [20, 40, 120, 140], [60, 60, 100, 80]])[:, None]  # (V, B, 4)
    common = overlaps(views, 2)
    sizes = (224, 224, 98)
    in_anchor = {
        (g, v): in_view(common[g, v], views[g], sizes[g], sizes[g])[0].tolist() for g in range(2) for v in range(3)
    }
    in_other = {
        (v, g): in_view(common[g, v], views[v], sizes[v], sizes[v])[0].tolist() for g in range(2) for v in range(3)
    }
    assert in_anchor[0, 1] == pytest.approx([44.8, 89.6, 224, 224])
    assert in_other[1, 0] == pytest.approx([0, 0, 179.2, 134.4])
    assert in_anchor[0, 2] == pytest.approx([134.4, 134.4, 224, 179.2])
    assert in_other[2, 0] == pytest.approx([0, 0, 98, 98])
    assert in_anchor[1, 2] == pytest.approx([89.6, 44.8, 179.2, 89.6])
    assert in_anchor[0, 0] == [0, 0, 224, 224]


@pytest.mark.parametrize(
    ("box", "cells"),
    [
        ([0, 0, 4, 4], [2.5, 4.5, 10.5, 12.5]),
        ([1, 1, 3, 3], [5.0, 6.0, 9.0, 10.0]),
        ([0.5, 0, 2.5, 3], [1.75, 2.75, 7.5, 8.5]),
    ],
)
def test_cells_of_a_four_by_four_map(box, cells):  # known answer
    maps = torch.arange(16.0).reshape(1, 4, 4, 1)
    assert_close(roi_align(maps, torch.tensor([[box]], dtype=torch.float32), 2).flatten().tolist(), cells)


def test_the_whole_of_a_map_on_its_own_grid_is_the_map():
    maps = torch.randn(2, 7, 7, 3)
    assert_close(roi_align(maps, torch.tensor([0.0, 0, 7, 7]).expand(1, 2, 4), 7)[0], maps, rtol=0, atol=0)


@given(seed=st.integers(0, 10_000), h=st.integers(1, 20), w=st.integers(1, 20), out=st.integers(1, 8))
def test_cells_equal_torchvisions(seed, h, w, out):
    g = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, h, w, 3, generator=g, dtype=torch.float64)
    ends = torch.rand(3, 2, 2, 2, generator=g, dtype=torch.float64).sort(dim=2).values  # (A, B, low high, x y)
    boxes = (ends * torch.tensor([w, h])).flatten(2)
    ours = roi_align(maps, boxes, out)
    for place in range(3):
        rois = torch.cat([torch.arange(2.0)[:, None], boxes[place]], dim=1)
        theirs = torchvision_roi_align(maps.permute(0, 3, 1, 2), rois, out, sampling_ratio=-1, aligned=True)
        assert_close(ours[place].permute(0, 3, 1, 2), theirs, rtol=0, atol=1e-9)
    assert_close(roi_align(maps.float(), boxes.float(), out), ours.float(), rtol=0, atol=1e-4)


def test_float32_cells_equal_torchvisions_to_a_millionth():
    g = torch.Generator().manual_seed(0)
    maps = torch.nn.functional.normalize(torch.randn(4, 16, 16, 32, generator=g), dim=-1)
    boxes = (torch.rand(6, 4, 2, 2, generator=g).sort(dim=2).values * 16).flatten(2)
    for place, ours in enumerate(roi_align(maps, boxes, 7)):
        rois = torch.cat([torch.arange(4.0)[:, None], boxes[place]], dim=1)
        theirs = torchvision_roi_align(maps.permute(0, 3, 1, 2), rois, 7, sampling_ratio=-1, aligned=True)
        assert_close(ours, theirs.permute(0, 2, 3, 1), rtol=0, atol=1e-6)


def test_cells_have_the_right_gradient():
    maps = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[[0.3, 0.2, 3.1, 2.9], [1.0, 0.0, 4.0, 1.0]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: roi_align(x, boxes, 3), (maps,))
