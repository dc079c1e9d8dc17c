"""Patches off the grid: the laws they are drawn by, and their pixels."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.testing import assert_close

from smalti.errors import ConfigError
from smalti.functional.offgrid import (
    KINDS,
    PatchSampler,
    cut_windows,
    grid_boxes,
    nested_boxes,
    offgrid_boxes,
    resample_boxes,
    salient_boxes,
    scaled_boxes,
    separate_boxes,
    side_distribution,
    turn_patches,
)
from smalti.functional.patches import patchify, unpatchify

KEYS = torch.arange(200)


def smooth(batch: int = 2, size: int = 48, channels: int = 3) -> torch.Tensor:
    noise = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(noise, 7, 1, 3) * 7


def test_starts_are_uniform_and_reach_both_borders() -> None:
    boxes = offgrid_boxes(KEYS, 64, (32, 24), (4, 4))
    assert boxes.shape == (200, 64, 4)
    for axis, extent in ((0, 24), (1, 32)):  # x first
        starts = boxes[..., axis].flatten()
        assert (starts.min(), starts.max()) == (0, extent - 4)
        assert torch.equal(starts, starts.round())
        counts = torch.bincount(starts.long(), minlength=extent - 3)
        assert stats.chisquare(counts).pvalue > 1e-4
    assert torch.equal(boxes[..., 2:] - boxes[..., :2], torch.full((200, 64, 2), 4.0))


def test_x_and_y_of_a_patch_and_of_different_patches_are_unrelated() -> None:
    starts = offgrid_boxes(KEYS, 64, (32, 32), (4, 4))[..., :2]
    one, other = starts[..., 0].flatten(), starts[..., 1].flatten()
    limit = 4 / math.sqrt(len(one))
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < limit
    order = torch.arange(64.0).expand(200, -1).flatten()
    for values in (one, other):  # the order of patches says nothing about their place
        assert abs(torch.corrcoef(torch.stack([order, values]))[0, 1]) < limit


def test_subpixel_starts_fill_the_room_between_the_borders() -> None:
    starts = offgrid_boxes(KEYS, 64, (20,), (8,), subpixel=True)[..., 0].flatten()
    assert starts.min() < 0.02 and 11.98 < starts.max() <= 12
    assert stats.kstest(starts.numpy() / 12, "uniform").pvalue > 1e-4


def test_equal_keys_draw_equal_boxes_whatever_the_batch() -> None:
    images = smooth(3)
    keys = torch.tensor([5, 9, 5])
    for kind in KINDS:
        sampler = PatchSampler((8, 8), kind)
        boxes = sampler.boxes(keys, images[:1].expand(3, -1, -1, -1))
        assert torch.equal(boxes[0], boxes[2]), kind
        assert not torch.equal(boxes[0], boxes[1]), kind
        assert torch.equal(sampler.boxes(keys[1:2], images[:1]), boxes[1:2]), kind


def test_the_official_law_of_sides_is_that_of_two_uniform_pixels() -> None:  # against the bank of the released code
    g = torch.Generator().manual_seed(0)
    draws = torch.randint(0, 32, (400_000, 2), generator=g)
    side = (draws[:, 0] - draws[:, 1]).abs()
    kept = side[(side >= 2) & (side <= 8)]
    bank = torch.bincount(kept, minlength=9)[2:] / len(kept)
    assert_close(side_distribution(32, 2, 8).float(), bank, rtol=0.02, atol=0)
    assert_close(
        float((side_distribution(32, 2, 8) * torch.arange(2, 9)).sum()), 4.85, rtol=0, atol=0.01
    )  # mean side: 4.85
    assert_close(float((side_distribution(224, 8, 32) * torch.arange(8, 33)).sum()), 19.7, rtol=0, atol=0.05)


@pytest.mark.parametrize("law", ["official", "uniform", "log_uniform"])
def test_sides_follow_their_law_and_start_anywhere(law: str) -> None:
    boxes = scaled_boxes(KEYS, 100, (40, 30), (3, 9), distribution=law)
    for axis, extent in ((0, 30), (1, 40)):
        sides = (boxes[..., axis + 2] - boxes[..., axis]).flatten().long()
        expected = side_distribution(extent, 3, 9, law) * len(sides)
        assert stats.chisquare(torch.bincount(sides, minlength=10)[3:], expected).pvalue > 1e-4
        last = extent - 1 if law == "official" else extent
        assert boxes[..., axis].min() == 0 and boxes[..., axis + 2].max() == last
        starts = boxes[..., axis].flatten()[sides == 5]
        assert stats.chisquare(torch.bincount(starts.long(), minlength=last - 4)).pvalue > 1e-4
    width, height = (boxes[..., 2:] - boxes[..., :2]).flatten(0, 1).unbind(-1)
    assert abs(torch.corrcoef(torch.stack([width, height]))[0, 1]) < 4 / math.sqrt(len(width))
    square = scaled_boxes(KEYS[:2], 100, (40, 30), (3, 9), distribution=law, aspect=False)
    assert torch.equal(square[..., 2] - square[..., 0], square[..., 3] - square[..., 1])


def test_separate_patches_do_not_overlap() -> None:
    boxes = separate_boxes(KEYS, 22, (64, 64), (8, 8))
    gaps = (boxes[:, :, None, :2] - boxes[:, None, :, :2]).abs().amax(-1)
    pairs = ~torch.eye(22, dtype=torch.bool)
    assert (gaps[:, pairs] < 8).float().mean() < 1e-4
    with pytest.raises(ConfigError, match="at most 22 do"):
        separate_boxes(KEYS, 23, (64, 64), (8, 8))


def test_salient_patches_lie_where_the_gradients_are() -> None:
    images = torch.zeros(200, 1, 32, 48)
    images[:, :, 20, 30] = 1.0
    boxes = salient_boxes(KEYS, 20, images, (4, 4), uniform_ratio=0.25)
    over = (boxes[..., 0] <= 30) & (boxes[..., 2] > 29) & (boxes[..., 1] <= 20) & (boxes[..., 3] > 19)
    assert_close(float(over.float().mean()), 0.76, rtol=0, atol=0.03)
    blank = salient_boxes(KEYS, 20, torch.zeros(200, 1, 32, 48), (4, 4), uniform_ratio=0.0)
    assert stats.chisquare(torch.bincount(blank[..., 0].flatten().long(), minlength=45)).pvalue > 1e-4


def test_parts_lie_in_their_wholes() -> None:
    boxes = nested_boxes(KEYS, 20, (64, 48), (8, 8), num_wholes=3, sides=(16, 24))
    wholes, parts = boxes[:, :3], boxes[:, 3:]
    sides = wholes[..., 2:] - wholes[..., :2]
    assert (sides.min(), sides.max()) == (16, 24)
    home = wholes[:, torch.arange(17) % 3]
    assert (parts[..., :2] >= home[..., :2]).all() and (parts[..., 2:] <= home[..., 2:]).all()
    assert torch.equal(parts[..., 2:] - parts[..., :2], torch.full((200, 17, 2), 8.0))


@given(b=st.integers(1, 3), c=st.integers(1, 4), h=st.integers(5, 12), w=st.integers(5, 12), seed=st.integers(0, 2**31))
def test_windows_are_the_pixels_under_them(b: int, c: int, h: int, w: int, seed: int) -> None:
    images = torch.randn(b, c, h, w)
    boxes = offgrid_boxes(torch.arange(b) + seed, 7, (h, w), (3, 5))
    cut = cut_windows(images, boxes[..., :2], (3, 5))
    for image, its, patches in zip(images, boxes.int().tolist(), cut, strict=True):
        for (x0, y0, x1, y1), patch in zip(its, patches, strict=True):
            assert torch.equal(patch, image[:, y0:y1, x0:x1])


def test_signals_go_the_same_way() -> None:
    signal = torch.randn(2, 3, 100)
    for kind in KINDS:
        patches = PatchSampler((10,), kind)(torch.arange(2), signal)
        assert patches.pixels.shape[2:] == (3, 10) and patches.boxes.shape[2:] == (2,), kind
        assert (patches.boxes[..., 0] >= 0).all() and (patches.boxes[..., 1] <= 100).all()
    patches = PatchSampler((10,))(torch.arange(2), signal)
    start = int(patches.boxes[1, 3, 0])
    assert torch.equal(patches.pixels[1, 3], signal[1, :, start : start + 10])
    ramp = torch.arange(100.0).expand(1, 1, -1)
    scaled = PatchSampler((10,), "offgrid_scale", sides=(5, 20))(torch.arange(1), ramp)
    start, end = scaled.boxes[0].unbind(-1)
    assert_close(scaled.pixels[0, :, 0].mean(1), (start + end) / 2 - 0.5, rtol=0, atol=0.15)


def test_a_whole_box_of_the_patch_s_size_is_resampled_to_itself() -> None:
    images = smooth()
    boxes = offgrid_boxes(torch.arange(2), 20, (48, 48), (8, 8))
    for mode in ("bilinear", "nearest"):
        resampled = resample_boxes(images, boxes, (8, 8), max_side=8, mode=mode)
        assert_close(resampled, cut_windows(images, boxes[..., :2], (8, 8)), rtol=0, atol=1e-4)


def test_enlarged_boxes_are_bilinear_and_shrunk_ones_near_torch_s_antialiased_resize() -> None:  # oracle
    images = smooth(4, 64)
    boxes = scaled_boxes(torch.arange(4), 50, (64, 64), (4, 16), distribution="uniform")
    ours = resample_boxes(images, boxes, (8, 8), max_side=16)
    for image, its, patches in zip(images, boxes.int().tolist(), ours, strict=True):
        for (x0, y0, x1, y1), patch in zip(its, patches, strict=True):
            crop = image[None, :, y0:y1, x0:x1]
            theirs = F.interpolate(crop, (8, 8), mode="bilinear", antialias=True)[0]
            if max(x1 - x0, y1 - y0) <= 8:  # inside the crop's edge pixels: there a crop repeats, we look further
                theirs, patch = theirs[:, 1:-1, 1:-1], patch[:, 1:-1, 1:-1]
                inner = 0.5 * 8 / min(x1 - x0, y1 - y0) <= 1
                assert not inner or (theirs - patch).abs().max() < 1e-4
            assert (theirs - patch).square().mean().sqrt() < 0.12  # of a spread of 1


def test_halving_is_torch_s_antialiased_resize_away_from_the_edge() -> None:
    images = torch.randn(1, 2, 64, 64)
    box = torch.tensor([[[8.0, 16.0, 40.0, 48.0]]])
    ours = resample_boxes(images, box, (16, 16), max_side=32)[0, 0]
    theirs = F.interpolate(images[:, :, 16:48, 8:40], (16, 16), mode="bilinear", antialias=True)[0]
    assert_close(ours[:, 1:-1, 1:-1], theirs[:, 1:-1, 1:-1], rtol=0, atol=1e-4)
    square = resample_boxes(images, box, (16, 16), max_side=32, square=True)[0, 0]
    assert_close(square, ours, rtol=0, atol=1e-5)


def test_a_checkerboard_that_shrinks_turns_grey() -> None:  # no aliasing
    x, y = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="xy")
    board = ((x + y) % 2 * 2.0 - 1)[None, None]
    boxes = torch.tensor([[[3.0, 5, 35, 37], [0, 0, 64, 64], [10, 1, 36, 63], [9, 9, 17, 17]]])
    patches = resample_boxes(board, boxes, (8, 8), max_side=64)[0, :, 0]
    assert patches[:3, 1:-1, 1:-1].abs().max() < 0.05
    assert patches[3].abs().min() > 0.99  # kept where nothing shrinks


def test_all_images_at_once_or_one_by_one_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    images = smooth(5, 64)
    sampler = PatchSampler((8, 8), "offgrid_scale")
    boxes = sampler.boxes(torch.arange(5), images)
    whole = sampler.cut(images, boxes)
    monkeypatch.setattr("smalti.functional.offgrid._IN_CACHE", 1)
    assert torch.equal(sampler.cut(images, boxes), whole)


def test_quarter_turns_move_pixels_as_angles_do() -> None:
    images = smooth()
    boxes = offgrid_boxes(torch.arange(2), 12, (48, 48), (8, 8))
    quarters = torch.arange(12).expand(2, -1) % 4
    turned = turn_patches(cut_windows(images, boxes[..., :2], (8, 8)), quarters)
    by_angle = resample_boxes(images, boxes, (8, 8), max_side=8, angles=quarters * (math.pi / 2))
    assert_close(turned, by_angle, rtol=0, atol=1e-4)


def test_turned_patches_stay_inside_and_turn_from_x_to_y() -> None:
    ramp = torch.arange(48.0).expand(1, 1, 48, 48)  # the value is x
    sampler = PatchSampler((8, 8), max_angle=math.pi / 6)
    patches = sampler(torch.arange(1), ramp)
    assert patches.angles is not None and patches.angles.abs().max() <= math.pi / 6
    assert patches.boxes.min() == 2 and patches.boxes.max() == 46  # 4 * (cos + sin - 1) = 1.46: a margin of 2
    slope_x = patches.pixels.diff(dim=-1).mean((2, 3, 4))
    slope_y = patches.pixels.diff(dim=-2).mean((2, 3, 4))
    assert_close(slope_x, patches.angles.cos(), rtol=0, atol=1e-3)
    assert_close(slope_y, -patches.angles.sin(), rtol=0, atol=1e-3)


def test_packed_patches_embedded_by_a_convolution_are_patches_times_a_matrix() -> None:
    images = smooth(2, 32)
    pixels = PatchSampler((8, 8))(torch.arange(2), images).pixels  # 16 patches
    kernel = torch.randn(5, 3, 8, 8)
    packed = unpatchify(pixels.flatten(2), (8, 8), (4, 4))
    by_convolution = F.conv2d(packed, kernel, stride=8).flatten(2).transpose(1, 2)
    assert_close(pixels.flatten(2) @ kernel.flatten(1).T, by_convolution, rtol=1e-5, atol=1e-5)


def test_grid_cells_are_those_of_patchify_shuffled() -> None:
    images = smooth(2, 32)
    cells = grid_boxes((32, 32), (8, 8))
    assert cells[1].tolist() == [8, 0, 16, 8]
    mixed = PatchSampler((8, 8), "grid")(torch.arange(2), images)
    assert not torch.equal(mixed.boxes[0], mixed.boxes[1])
    for image in range(2):
        order = (mixed.boxes[image, :, 1] * 32 + mixed.boxes[image, :, 0]).argsort()
        assert torch.equal(mixed.boxes[image, order], cells)
        assert_close(mixed.pixels[image, order].flatten(1), patchify(images, (8, 8))[image])


def test_any_number_of_patches() -> None:
    images = smooth(2, 32)
    for kind in ("offgrid", "offgrid_scale", "saliency", "hierarchical"):
        assert PatchSampler((8, 8), kind, 13)(torch.arange(2), images).pixels.shape == (2, 13, 3, 8, 8)
    assert PatchSampler((8, 8), "nonoverlapping").count((64, 64)) == 21


def test_mistakes_are_one_line_each() -> None:
    for wrong, text in (
        ({"kind": "ofgrid"}, "sampling='ofgrid': one of grid"),
        ({"num_patches": 1}, "num_patches=1: at least 2"),
        ({"kind": "saliency", "subpixel": True}, "subpixel starts are for offgrid"),
        ({"kind": "grid", "max_angle": 0.1}, "rotation needs square patches and sampling=offgrid"),
        ({"max_angle": 9.0}, "max_angle=9"),
        ({"mode": "lanczos"}, "resample='lanczos'"),
    ):
        with pytest.raises(ConfigError, match=text):
            PatchSampler((8, 8), **wrong)
    with pytest.raises(ConfigError, match="does not fit into 6 pixels"):
        offgrid_boxes(KEYS, 2, (6, 6), (8, 8))
    with pytest.raises(ConfigError, match=r"sides 2..40 of a box in 32 pixels"):
        side_distribution(32, 2, 40)
    with pytest.raises(ConfigError, match="size_distribution='normal'"):
        side_distribution(32, 2, 8, "normal")
    with pytest.raises(ConfigError, match="at least one whole and one part"):
        nested_boxes(KEYS, 4, (32, 32), (8, 8), 4, (8, 16))
    with pytest.raises(ConfigError, match="smaller than their parts"):
        nested_boxes(KEYS, 4, (32, 32), (8, 8), 2, (4, 16))
