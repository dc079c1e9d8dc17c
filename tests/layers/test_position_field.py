"""The position field: what crops read, by known answers, torch's own interpolation, and gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from smalti.errors import ConfigError
from smalti.functional.positions import interpolation_weights, patch_centres, sincos_positions
from smalti.layers.position_field import MODES, PositionField

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


def coordinates(nodes: tuple[int, int] = (50, 50), **options: object) -> PositionField:
    """A field of two channels that hold x and y at its nodes, corners on the corners of the image."""
    field = PositionField(2, nodes, has_class_token=False, **options)
    rows, columns = torch.meshgrid(*(torch.linspace(0, 1, n) for n in nodes), indexing="ij")
    with torch.no_grad():
        field.field.copy_(torch.stack([columns, rows]))
    return field


def noise(nodes: tuple[int, int] = (9, 12), seed: int = 0, **options: object) -> PositionField:
    torch.manual_seed(seed)
    field = PositionField(5, nodes, **options)
    field.init_normal(1.0)
    return field


def some_boxes(count: int = 7, seed: int = 0) -> torch.Tensor:
    ends = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(dim=1).values
    return ends.flatten(1)  # x0 y0 x1 y1


@given(
    box=st.tuples(*(st.floats(0, 1, width=32) for _ in range(4))),
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_a_field_of_coordinates_tells_each_patch_its_centre(box, grid):  # known answer
    boxes = torch.tensor([box])
    across, down = patch_centres(boxes, grid)
    read = coordinates(mode="bilinear")(boxes, grid).unflatten(1, grid)
    assert_close(read[..., 0], across[:, None].expand(-1, grid[0], -1), rtol=0, atol=1e-6)
    assert_close(read[..., 1], down[..., None].expand(-1, -1, grid[1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("nodes", "worst", "inside"), [(50, 2e-3, 1e-3), (24, 4.2e-3, 2.1e-3)])
def test_bicubic_coordinates_are_off_by_a_twentieth_of_a_node_inside_and_a_tenth_at_the_border(nodes, worst, inside):
    # known answer; torch's cubic, with a = -0.75, bends straight lines a little
    field, grid = coordinates((nodes, nodes)), (200, 200)
    across, _ = patch_centres(WHOLE, grid)
    off = (field.whole(grid).unflatten(1, grid)[0, :, :, 0] - across).abs().amax(0)
    is_inside = (across[0] > 1 / (nodes - 1)) & (across[0] < 1 - 1 / (nodes - 1))
    assert 0.9 * worst < off.max().item() <= worst
    assert 0.9 * inside < off[is_inside].max().item() <= inside


def test_a_whole_image_is_read_in_raster_order():  # known answer
    read = coordinates(mode="bilinear").whole((14, 14))[0]
    for number, (x, y) in {0: (1, 1), 1: (3, 1), 14: (1, 3)}.items():
        assert_close(read[number], torch.tensor([x / 28, y / 28]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [14, 32, 50, 64])
def test_half_a_node_inside_it_is_torch_s_resizing(mode, n):
    field = noise((50, 50), mode=mode, align_corners=False).double()
    expected = F.interpolate(field.field, size=(n, n), mode=mode, antialias=False)
    assert_close(field.whole((n, n)), expected.flatten(2).mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("mode", "align_corners"), list(itertools.product(MODES, (True, False))))
def test_one_call_for_all_views_equals_a_field_for_each(mode, align_corners):
    field, boxes, grid = noise(mode=mode, align_corners=align_corners), some_boxes(), (3, 4)
    across, down = patch_centres(boxes, grid)
    places = torch.stack(
        [across[:, None].expand(-1, grid[0], -1), down[..., None].expand(-1, -1, grid[1])], dim=-1
    )  # (M, h, w, 2)
    expanded = F.grid_sample(field.field.expand(len(boxes), -1, -1, -1), 2 * places - 1, mode, "border", align_corners)
    assert_close(field(boxes, grid), expanded.flatten(2).mT, rtol=0, atol=1e-5)


def test_exchanged_edges_read_the_columns_in_reverse():
    field, boxes, grid = noise(), some_boxes(), (3, 4)
    reversed_ = field(boxes[:, [2, 1, 0, 3]], grid).unflatten(1, grid)
    assert_close(reversed_, field(boxes, grid).unflatten(1, grid).flip(2), rtol=0, atol=1e-5)


def test_reading_has_the_right_gradient():
    field = noise((4, 5)).double()
    boxes = some_boxes(2).double()

    def read(table: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(field, {"field": table}, (boxes, (2, 3)))

    assert gradcheck(read, field.field.detach().clone().requires_grad_())


@given(length=st.integers(1, 30), places=st.lists(st.floats(0, 1), min_size=1, max_size=5), mode=st.sampled_from(MODES))
def test_weights_between_nodes_sum_to_one(length, places, mode):
    weights = interpolation_weights(torch.tensor(places), length, mode)
    assert_close(weights.sum(-1), torch.ones(len(places)), rtol=0, atol=1e-5)


def test_sines_and_cosines_are_those_of_the_table_at_its_grid():
    field = PositionField(32, (50, 50))
    field.init_sincos((7, 9))
    assert field.field.square().mean().sqrt().item() == pytest.approx(0.5**0.5)
    # between nodes a fifth of a patch apart, a cubic is off by about (1/5)^2 / 8 of the fastest wave, twice at borders
    assert_close(field.whole((7, 9))[0], sincos_positions(32, (7, 9)), rtol=0, atol=0.02)
    field.set_rms(0.1)
    assert field.field.square().mean().sqrt().item() == pytest.approx(0.1)


def test_a_table_is_read_back_at_its_grid():
    table = sincos_positions(32, (6, 5))[None]
    field = PositionField(32, (50, 50))
    field.init_table(table, (6, 5))
    assert (field.whole((6, 5)) - table).abs().max().item() < 0.05
    assert (field.whole((6, 5)) - table).square().mean().sqrt().item() < 0.02


def test_a_field_that_cannot_be_read_is_refused():
    with pytest.raises(ConfigError, match="bicubic or bilinear"):
        PositionField(4, mode="nearest")
    with pytest.raises(ConfigError, match="at least 2x2"):
        PositionField(4, (1, 8))
