"""PaKA against its definition: boxes, cells, loss and gradient."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from smalti.data.crops import ViewSpec
from smalti.data.views import Views, collate
from smalti.errors import ConfigError
from smalti.methods.paka import NestedCrops, PaKA, PaKAConfig, alignment_loss
from smalti.models.build import build_encoder
from smalti.runs.train import train

SMALL = {"hidden_dim": 32, "out_dim": 16, "num_local_views": 4, "local_size": 24}


def tiny(name: str = "vit_tiny_patch16_224", **config: object) -> PaKA:
    torch.manual_seed(0)
    encoder = build_encoder(name, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, seed=0)
    return PaKA(encoder, PaKAConfig(**{**SMALL, **config}))


def batch(method: PaKA, count: int = 3, size: int = 48) -> Views:
    crops, samples = method.make_views(size), []
    for place in range(count):
        rng = np.random.default_rng(place)
        samples.append(crops(rng.integers(0, 256, (60, 70, 3), dtype=np.uint8), rng))
    return collate(samples)


# Views


@given(seed=st.integers(0, 10_000), height=st.integers(1, 80), width=st.integers(1, 80))
def test_every_local_view_lies_in_its_global_view(seed: int, height: int, width: int) -> None:
    specs = [ViewSpec(count=2, size=8, scale=(0.25, 1.0)), ViewSpec(count=4, size=8, scale=(0.05, 0.4))]
    boxes = NestedCrops(specs).draw_boxes(np.random.default_rng(seed), height, width)
    assert len(boxes) == 6
    for local, (top, left, h, w) in enumerate(boxes[2:]):
        y, x, high, wide = boxes[local % 2]
        assert h > 0 and w > 0
        assert y <= top and top + h <= y + high and x <= left and left + w <= x + wide


def test_only_the_student_sees_other_colours() -> None:
    for clean, sees in ((True, False), (False, True)):
        teacher, student = tiny(clean_teacher=clean).make_views(32).specs
        assert (teacher.count, teacher.size, student.count, student.size) == (2, 32, 4, 24)
        assert (teacher.color is not None, teacher.blur_prob > 0) == (sees, sees)
        assert student.color is not None and student.blur_prob == 0.5
    assert tiny(local_size=None).make_views(64).specs[1].size == 24  # seven sixteenths, rounded down to patches
    assert tiny(local_size=None).make_views(32).specs[1].size == 16  # two patches at least


# Cells and loss


def test_cells_of_student_and_teacher_show_the_same_places() -> None:
    """The feature map of a view is replaced by the places of its patches in the image, mirrored as the view is."""
    method, views = tiny(normalize=False), batch(tiny(), count=2, size=64)

    def places(box: Tensor, flip: Tensor, grid: tuple[int, int]) -> Tensor:
        y, x = ((torch.arange(length) + 0.5) / length for length in grid)
        x = (1 - x) if flip else x
        x, y = box[0] + x * (box[2] - box[0]), box[1] + y * (box[3] - box[1])
        return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)

    seen: list[Tensor] = []
    for network, rows in ((method.teacher.module, slice(0, 4)), (method.student, slice(4, None))):
        network.head.mlp = torch.nn.Identity()
        encode, boxes, flips = network.encoder.encode, views.boxes[rows], views.flips[rows]

        def fake(images: Tensor, encode=encode, boxes=boxes, flips=flips) -> object:
            found = encode(images)
            spots = [places(box, flip, found.grid) for box, flip in zip(boxes, flips, strict=True)]
            return found._replace(patches=torch.stack(spots))

        network.encoder.encode = fake
        network.register_forward_hook(lambda module, inputs, output: seen.append(output))
    method(views, 0.5)
    assert views.flips.any() and not views.flips.all()
    teacher, student = seen[0].flatten(0, 1), seen[1]
    # RoI-Align repeats the outer half patch of a map at its edges, 64 / 8 patches over at most 70 pixels
    inside = ((student - teacher).abs() < 1e-3).all(-1)
    assert inside.float().mean() > 0.8 and (student - teacher).abs().max() < 70 / 8
    assert_close(inside[:, 4], torch.ones_like(inside[:, 4]))  # the centre of 3 x 3


def test_the_loss_is_one_minus_the_alignment_with_its_gradient() -> None:
    student = torch.tensor([[1.0, 0], [0, 1], [1, 1]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 0], [0, 2], [0, 0]], dtype=torch.float64)
    loss = alignment_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0.093155, abs=1e-6)
    assert student.grad is not None
    expected = torch.tensor([[0, -0.32646], [0.32646, 0], [-0.32646, 0.32646]], dtype=torch.float64)
    assert_close(student.grad, expected, rtol=0, atol=1e-5)
    assert_close(student.grad.sum(0), torch.zeros(2, dtype=torch.float64))
    assert (student.grad * student.detach()).sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("unbiased", [False, True])
def test_equal_cells_cost_nothing_and_constant_ones_are_left_out(unbiased: bool) -> None:
    cells = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    alignment_loss(cells, cells.detach(), unbiased).sum().backward()
    assert_close(cells.grad, torch.zeros_like(cells), rtol=0, atol=1e-12)
    equal = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)
    loss = alignment_loss(equal, cells[0].detach(), unbiased)
    loss.backward()
    assert loss.item() == 0 and equal.grad is not None and not equal.grad.any()


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_the_method_s_loss_is_the_mean_over_views_and_images(estimator: str) -> None:
    method = tiny(estimator=estimator)
    views = batch(method)
    with torch.no_grad():
        for parameter in method.student.parameters():  # away from the teacher
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    losses = []
    for local in range(4):
        for image in range(3):
            inner, outer = local * 3 + image, local % 2 * 3 + image  # rows among the local and the global views
            own, box = views.boxes[outer], views.boxes[6 + inner]
            size = torch.cat([own[2:] - own[:2]] * 2)
            part = ((box - own[:2].repeat(2)) / size)[None, None]
            student = method.student(views.crops[1][inner][None], views.flips[6 + inner][None])[0]
            teacher = method.teacher(views.crops[0][outer][None], views.flips[outer][None], part, 3)[0, 0]
            losses.append(alignment_loss(student, teacher, estimator == "unbiased"))
    assert_close(method(views, 0.5)["paka"], torch.stack(losses).mean(), rtol=1e-4, atol=1e-6)


def test_kernels_are_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    method, kinds = tiny(), []
    views = batch(method)

    def spy(student: Tensor, teacher: Tensor, unbiased: bool) -> Tensor:
        kinds.extend([student.dtype, teacher.dtype, (student @ student.mT).dtype])
        return alignment_loss(student, teacher, unbiased)

    monkeypatch.setattr("smalti.methods.paka.alignment_loss", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        method(views, 0.5)
    assert kinds == [torch.float32] * 3


def test_an_encoder_with_rotary_positions_is_trained() -> None:
    method = tiny("vit_small_patch16_rope_224")
    assert method.student.encoder.is_rotary
    method(batch(method), 0.5)["paka"].backward()
    assert all(p.grad is not None for p in method.student.encoder.vit.blocks.parameters() if p.requires_grad)


# Refusals


def test_a_run_needs_weights_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="paka is a post-training method; name the initial weights with --init"):
        train("paka", tmp_path, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"num_local_views": 3}, "num_local_views=3: an even number, at least 2"),
        ({"num_local_views": 0}, "num_local_views=0: an even number, at least 2"),
        ({"local_size": 8}, "local views of 8 pixels hold 1 of the 4 patches that a kernel needs; raise"),
        ({"head_lr_scale": 0.0}, "head_lr_scale=0.0: more than 0 is needed"),
    ],
    ids=str,
)
def test_settings_that_can_not_be_used_are_refused(config: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        tiny(**config).make_views(32)
