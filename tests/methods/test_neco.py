"""NeCo against its definition, by plain loops and other libraries."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffsort import DiffSortNet
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close
from torchvision.ops import roi_align as torchvision_roi_align

from smalti.config import merge
from smalti.data.crops import ViewSpec
from smalti.data.images.folders import open_images
from smalti.data.loader import TrainLoader
from smalti.data.views import Views, collate
from smalti.errors import ConfigError
from smalti.functional.sorting import soft_sort
from smalti.methods.neco import (
    NeCo,
    NeCoConfig,
    OverlappingCrops,
    different_pairs,
    draw_allowed,
    overlap_cells,
)
from smalti.methods.teacher import cosine_momentum
from smalti.models.build import build_encoder
from smalti.runs.config import check_start, resolve
from smalti.runs.train import train
from smalti.training.optim import OptimConfig, apply_schedules, build_optimizer, weight_decay

SMALL = {"roi_size": 3, "hidden_dim": 32, "out_dim": 16, "num_local_views": 2, "local_size": 16}


@pytest.fixture
def queue_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the size of queues."""
    return lambda size: monkeypatch.setattr("smalti.methods.neco.QUEUE_SIZE", size)


def tiny(**config: object) -> NeCo:
    torch.manual_seed(0)
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, seed=0
    )
    return NeCo(encoder, NeCoConfig(**{**SMALL, **config}))


def batch(method: NeCo, count: int = 3, size: int = 48, seed: int = 0) -> Views:
    crops, samples = method.make_views(size), []
    for place in range(count):
        rng = np.random.default_rng([seed, place])
        samples.append(crops(rng.integers(0, 256, (60, 70, 3), dtype=np.uint8), rng))
    views = collate(samples)
    views.keys = torch.arange(count) + 100 * seed
    return views


def different_student(method: NeCo) -> NeCo:
    """A student that no longer equals its teacher."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter += 0.1 * parameter.std().nan_to_num(0.1) * torch.randn(parameter.shape, generator=g)
    return method


# Schedules and views


def test_momentum_and_weight_decay_follow_half_cosines() -> None:  # known answer
    momenta = [cosine_momentum(NeCoConfig().momentum, step / 4) for step in range(4)]
    assert momenta == pytest.approx([0.9995, 0.999573, 0.99975, 0.999927], abs=5e-7)
    optim = OptimConfig(**{**NeCo.defaults["optim"], "betas": (0.9, 0.999)})
    assert [weight_decay(optim, step / 4) for step in range(4)] == pytest.approx(
        [0.04, 0.107365, 0.27, 0.432635], abs=5e-7
    )


def test_views_are_two_global_and_four_local_ones_without_flips() -> None:
    for patch, name, local in ((14, "vit_small_patch14_dinov2", 98), (16, "vit_small_patch16_224", 96)):
        encoder = build_encoder(name, img_size=224, embed_dim=24, depth=1, num_heads=3)
        crops = NeCo(encoder, NeCoConfig(hidden_dim=8, out_dim=4)).make_views(224)
        assert [(spec.count, spec.size, spec.flip_prob) for spec in crops.specs] == [(2, 224, 0.0), (4, local, 0.0)]
        assert local % patch == 0
    assert [spec.count for spec in tiny(num_local_views=0).make_views(32).specs] == [2]


@given(seed=st.integers(0, 10_000), height=st.integers(1, 80), width=st.integers(1, 80), share=st.floats(0, 0.5))
def test_every_view_meets_every_global_one(seed: int, height: int, width: int, share: float) -> None:
    specs = [ViewSpec(count=2, size=8, scale=(0.25, 1.0)), ViewSpec(count=4, size=8, scale=(0.05, 0.25))]
    boxes = OverlappingCrops(specs, share).draw_boxes(np.random.default_rng(seed), height, width)
    pixels = np.zeros((6, height, width), dtype=bool)
    for place, (top, left, h, w) in enumerate(boxes):
        assert 0 <= top <= height - h and 0 <= left <= width - w
        pixels[place, top : top + h, left : left + w] = True
    for g in range(2):
        assert all((pixels[g] & pixels[v]).any() for v in range(6))


def test_common_areas_are_larger_than_asked_for() -> None:
    specs = [ViewSpec(count=2, size=8, scale=(0.25, 1.0)), ViewSpec(count=4, size=8, scale=(0.05, 0.25))]
    for seed in range(50):
        boxes = OverlappingCrops(specs, 0.02).draw_boxes(np.random.default_rng(seed), 100, 100)
        pixels = np.zeros((6, 100, 100), dtype=bool)
        for place, (top, left, h, w) in enumerate(boxes):
            pixels[place, top : top + h, left : left + w] = True
        assert (pixels[0] & pixels[1]).sum() > 400
        assert all((pixels[g] & pixels[v]).sum() > 200 for g in range(2) for v in range(2, 6))


# Cells


def test_a_cell_shows_the_same_piece_of_the_image_in_both_views() -> None:
    boxes = torch.tensor([[[0.0, 0, 80, 80]], [[40.0, 20, 100, 120]]])  # (V, B, 4)
    common = torch.tensor([[[48.0, 32, 72, 68]]])  # inside both, (A, B, 4)
    cells = []
    for own, grid in zip(boxes, (8, 10), strict=True):
        places = (torch.arange(grid) + 0.5) / grid
        x = own[0, 0] + places * (own[0, 2] - own[0, 0])
        y = own[0, 1] + places * (own[0, 3] - own[0, 1])
        maps = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)[None]  # each token says where it lies
        cells.append(overlap_cells(maps, common, own, 3))
    assert_close(cells[0], cells[1], rtol=0, atol=1e-4)
    assert_close(cells[0][0, 0, :, 1].tolist(), [52.0, 60.0, 68.0] * 3, rtol=0, atol=1e-4)
    assert_close(cells[0][0, 0, :, 0].tolist(), [38.0] * 3 + [50.0] * 3 + [62.0] * 3, rtol=0, atol=1e-4)


def test_pairs_are_of_different_views() -> None:
    numbers = torch.arange(8).reshape(2, 4)
    assert different_pairs(numbers).tolist() == [1, 2, 3, 4, 6, 7]


def plain_cells(maps: Tensor, box: Tensor, own: Tensor, out: int) -> Tensor:
    """Torchvision's cells of one map, ``(n, E)`` of unit length."""
    h, w = maps.shape[:2]
    x0, y0, x1, y1 = own.tolist()
    scale = torch.tensor([w / (x1 - x0), h / (y1 - y0)] * 2, dtype=maps.dtype)
    roi = (box - torch.tensor([x0, y0, x0, y0])) * scale
    cut = torchvision_roi_align(maps.permute(2, 0, 1)[None], [roi[None]], out, sampling_ratio=-1, aligned=True)
    return F.normalize(cut[0].flatten(1).T, dim=-1)


def plain_terms(method: NeCo, views: Views, references: Tensor) -> list[list[Tensor]]:
    """``[pair][image]`` losses by loops over views and images, torchvision's cells and diffsort's sort."""
    config, count = method.config, views.batch_size
    teacher = method.teacher((views.global_crops,))[0]
    student = [one for maps in method.student(views.crops) for one in maps]  # view-major
    boxes = views.boxes.reshape(-1, count, 4)
    size = config.roi_size**2
    sorters = [
        DiffSortNet(config.network, size, steepness=beta, distribution="cauchy")
        for beta in (config.steepness_student, config.steepness_teacher)
    ]
    terms: list[list[Tensor]] = []
    for g in range(2):
        for v in range(boxes.shape[0]):
            if v == g:
                continue
            terms.append([])
            for b in range(count):
                one, other = boxes[g, b], boxes[v, b]
                common = torch.cat([torch.maximum(one[:2], other[:2]), torch.minimum(one[2:], other[2:])])
                query = plain_cells(student[v * count + b], common, other, config.roi_size)
                target = plain_cells(teacher[g * count + b], common, one, config.roi_size)
                anchors = references[len(terms) - 1, b]
                pred, wanted = sorters[0](query @ anchors.T)[1], sorters[1](target @ anchors.T)[1]
                terms[-1].append(-(wanted * pred.log()).sum(2).mean(1))  # (n,)
    return terms


def spied_references(method: NeCo, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the method takes as references, while it is called."""
    seen: list[Tensor] = []
    for name in ("_from_batch", "_from_queue"):
        original = getattr(method, name)

        def spy(*arguments: object, original: object = original) -> Tensor:
            seen.append(original(*arguments))
            return seen[-1]

        monkeypatch.setattr(method, name, spy)
    return seen


@pytest.mark.parametrize("references", ["batch", "queue"])
def test_the_loss_is_the_papers_by_plain_loops(
    references: str, queue_of: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_of(40)
    method = different_student(tiny(references=references))
    views = batch(method)
    seen = spied_references(method, monkeypatch)
    method.train()
    loss = method(views, 0.5)["neco"]
    loss.backward()
    ours = [parameter.grad.clone() for parameter in method.student.parameters()]
    method.zero_grad()
    expected = torch.stack([torch.stack(images).mean() for images in plain_terms(method, views, seen[0])]).mean()
    expected.backward()
    assert_close(loss, expected, rtol=1e-5, atol=0)
    for one, parameter in zip(ours, method.student.parameters(), strict=True):
        assert_close(one, parameter.grad, rtol=1e-2, atol=1e-4 * float(parameter.grad.abs().max()) + 1e-6)


# References


def test_each_cell_of_the_batch_is_a_reference_once() -> None:
    method = tiny()
    cells = torch.arange(6 * 4 * 9.0).reshape(6, 4, 9, 1)
    references = method._from_batch(cells, torch.arange(4))
    assert references.shape == cells.shape
    assert references.flatten(1).sort(dim=1).values.equal(cells.flatten(1))
    orders = {tuple((row - row.min()).tolist()) for row in references.flatten(1)}
    assert len(orders) == 6  # each pair has an order of its own
    assert not references.equal(method._from_batch(cells, torch.arange(4) + 9))


def test_references_of_other_images_only() -> None:
    method = tiny(exclude_self=True)
    image = torch.arange(4.0)[None, :, None, None].expand(6, 4, 9, 1)
    cells = image * 100 + torch.arange(9.0)[:, None]
    references = method._from_batch(cells, torch.arange(4))
    assert not ((references // 100) == torch.arange(4.0)[None, :, None, None]).any()
    assert all(len(row.unique()) == 9 for row in references.flatten(0, 1))
    with pytest.raises(ConfigError, match="needs at least two images"):
        method._from_batch(cells[:, :1], torch.arange(1))


@given(seed=st.integers(0, 1000), number=st.integers(1, 12), share=st.floats(0, 1))
def test_draws_are_different_allowed_places(seed: int, number: int, share: float) -> None:
    g = torch.Generator().manual_seed(seed)
    noise, allowed = torch.rand(3, 2, 12, generator=g), torch.rand(1, 2, 12, generator=g) < share
    places = draw_allowed(noise, allowed, number)
    for b in range(3):
        for p in range(2):
            count = int(allowed[0, p].sum())
            if count:
                assert allowed[0, p][places[b, p]].all()
                assert len(places[b, p].unique()) == min(number, count)


def test_draws_reach_all_places_equally_often() -> None:
    noise = torch.rand(4000, 1, 10, generator=torch.Generator().manual_seed(0))
    allowed = torch.ones(1, 1, 10, dtype=torch.bool)
    allowed[..., :2] = False
    counts = draw_allowed(noise, allowed, 4).flatten().bincount(minlength=10)
    assert counts[:2].sum() == 0
    assert ((counts[2:] - 2000).abs() < 5 * math.sqrt(2000 * 0.5)).all()  # binomial, 5 standard deviations


def test_the_queue_counts_each_token_once_and_forgets_the_oldest(queue_of: Callable[[int], None]) -> None:
    queue_of(50)
    method = tiny(references="queue")
    keys = torch.arange(2)
    for number in range(1, 5):  # two images give 20 tokens a step
        method._push(torch.full((4, 6, 6, 16), float(number)), keys)
        assert int(method.filled) == min(20 * number, 50)
        assert int(method.position) == 20 * number % 50
    for held in method.queue[..., 0]:
        assert held.int().bincount(minlength=5).tolist() == [0, 0, 10, 20, 20]


def test_what_is_pushed_are_tokens_of_the_queues_own_view(queue_of: Callable[[int], None]) -> None:
    queue_of(50)
    method = tiny(references="queue")
    maps = torch.arange(4 * 36.0).reshape(4, 6, 6, 1).expand(-1, -1, -1, 16)  # view-major: images 0 1, then 0 1
    method._push(maps, torch.arange(2))
    for g in range(2):
        held = method.queue[g, :20, 0]
        assert len(held.unique()) == 20
        assert ((held >= g * 72) & (held < g * 72 + 72)).all()
        assert ((held < g * 72 + 36).sum()) == 10


def test_a_batch_larger_than_the_queue_fills_it(queue_of: Callable[[int], None]) -> None:
    queue_of(9)
    method = tiny(references="queue")
    method._push(torch.randn(4, 6, 6, 16), torch.arange(2))
    assert int(method.filled) == 9 and int(method.position) == 0
    assert (method.queue.abs().sum(-1) > 0).all()


def test_references_from_the_queue_are_there_and_different(queue_of: Callable[[int], None]) -> None:
    queue_of(60)
    method = tiny(references="queue")
    method._push(torch.randn(2, 6, 6, 16), torch.arange(1))  # 10 of 60
    references = method._from_queue(torch.arange(3), 3)
    assert references.shape == (6, 3, 9, 16)
    assert (references.abs().sum(-1) > 0).all()  # no empty slot
    assert all(len(row.unique(dim=0)) == 9 for row in references.flatten(0, 1))
    for p in range(6):
        assert torch.isin(references[p, ..., 0], method.queue[p // 3, :10, 0]).all()  # of the pair's own global view


def test_the_queue_is_saved_and_stays_as_it_is_in_evaluation(queue_of: Callable[[int], None]) -> None:
    queue_of(40)
    method = tiny(references="queue").train()
    method(batch(method), 0.5)
    state = {key: value.clone() for key, value in method.state_dict().items()}
    assert int(state["filled"]) == 30 and state["queue"].shape == (2, 40, 16)
    method.eval()
    method(batch(method, seed=1), 0.5)
    assert method.queue.equal(state["queue"]) and int(method.filled) == 30
    other = tiny(references="queue")
    other.load_state_dict(state)
    views = batch(method, seed=2)
    assert other.train()(views, 0.5)["neco"].equal(method.train()(views, 0.5)["neco"])
    assert not any("queue" in key for key in tiny().state_dict())


# Teacher


def test_no_gradient_reaches_the_teacher_and_the_student_does_not_miss_it(monkeypatch: pytest.MonkeyPatch) -> None:
    method = different_student(tiny())
    views = batch(method)
    method(views, 0.5)["neco"].backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    ours = [parameter.grad.clone() for parameter in method.student.parameters()]
    method.zero_grad()
    network = method.teacher.module.requires_grad_(True)
    monkeypatch.setattr(method.teacher, "forward", lambda crops: network(crops))
    method(views, 0.5)["neco"].backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    for one, parameter in zip(ours, method.student.parameters(), strict=True):
        assert_close(one, parameter.grad, rtol=0, atol=0)


def test_heads_start_alike_or_not() -> None:
    alike, apart = tiny(), tiny(head_init="independent")
    assert alike.student.head.mlp[0].weight.equal(alike.teacher.module.head.mlp[0].weight)
    assert not apart.student.head.mlp[0].weight.equal(apart.teacher.module.head.mlp[0].weight)
    assert not any(parameter.requires_grad for parameter in apart.teacher.parameters())
    for key, value in apart.student.encoder.state_dict().items():
        assert value.equal(apart.teacher.module.encoder.state_dict()[key])


def test_the_teacher_moves_towards_the_student() -> None:
    method = different_student(tiny(momentum=0.9))
    before = [parameter.clone() for parameter in method.teacher.parameters()]
    method.after_step(0.0)
    for old, now, student in zip(before, method.teacher.parameters(), method.student.parameters(), strict=True):
        assert_close(now, 0.9 * old + 0.1 * student)


def test_an_equal_student_in_an_equal_view_costs_the_entropy_of_the_order() -> None:
    method = tiny()
    sims = 0.3 + 0.15 * torch.randn(30, 9, generator=torch.Generator().manual_seed(0))
    weights = soft_sort(sims)[1]
    assert_close(method.order_loss(sims, sims), -(weights * weights.log()).sum(2).mean(), rtol=1e-5, atol=0)


# Ablations


def test_a_run_needs_weights_to_start_from(tmp_path: Path) -> None:
    for how in ({}, {"recipe": "neco_small224.yaml"}):
        with pytest.raises(
            ConfigError, match=r"neco is a post-training method; name the initial weights .* --init .*from_scratch=true"
        ):
            train("neco", tmp_path, tmp_path / "run", **how)
    both = {"method": {"from_scratch": True}}
    with pytest.raises(ConfigError, match=r"method\.from_scratch=true contradicts init=.* leave one out"):
        train("neco", tmp_path, tmp_path / "run", init="random:vit_tiny_patch16_224", overrides=both)
    for tree in ({"init": "RUN"}, both):
        check_start(resolve(merge({"method": {"name": "neco"}}, tree)))
    assert not list(tmp_path.iterdir())


def test_without_a_sort_two_softmaxes_are_compared() -> None:
    student, teacher = torch.randn(5, 9), torch.randn(5, 9)
    method = tiny(network="none")
    expected = F.cross_entropy(student / 0.1, (teacher / 0.05).softmax(1))
    assert_close(method.order_loss(student, teacher), expected)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"network": "odd_even"},
        {"network": "none"},
        {"steepness_teacher": 30.0},
    ],
    ids=str,
)
def test_the_loss_has_the_right_gradient(config: dict[str, object]) -> None:
    method = tiny(**{"steepness_student": 7.0, "steepness_teacher": 5.0, "roi_size": 2, **config})
    g = torch.Generator().manual_seed(3)
    student, teacher = (0.3 + 0.15 * torch.randn(3, 4, dtype=torch.float64, generator=g) for _ in range(2))
    student.requires_grad_()
    assert gradcheck(lambda s: method.order_loss(s, teacher), student)


def test_cells_to_loss_have_the_right_gradient() -> None:
    method = tiny(steepness_student=7.0, steepness_teacher=5.0, roi_size=2)
    g = torch.Generator().manual_seed(4)
    maps = torch.randn(2, 3, 3, 3, dtype=torch.float64, generator=g, requires_grad=True)
    target, references = torch.randn(2, 1, 2, 4, 3, dtype=torch.float64, generator=g)
    common = torch.tensor([[[1.0, 0, 3, 2.5], [0.5, 0.5, 2, 3]]], dtype=torch.float64)
    own = torch.tensor([[0.0, 0, 3, 3]] * 2, dtype=torch.float64)

    def loss(maps: Tensor) -> Tensor:
        cells = F.normalize(overlap_cells(maps, common, own, 2), dim=-1)
        sims = [(one @ references.mT).flatten(0, 2) for one in (cells, target)]
        return method.order_loss(sims[0], sims[1])

    assert gradcheck(loss, maps)


def test_autocast_ends_where_cells_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    method = different_student(tiny())
    views = batch(method)
    fixed = (
        [maps.detach().requires_grad_() for maps in method.student(views.crops)],
        method.teacher((views.global_crops,)),
    )
    monkeypatch.setattr(method.teacher, "forward", lambda crops: fixed[1])
    monkeypatch.setattr(method.student, "forward", lambda crops: fixed[0])
    losses, gradients = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(method(views, 0.5)["neco"])
        gradients.append(torch.autograd.grad(losses[-1], fixed[0]))
    assert losses[0].equal(losses[1]) and losses[1].dtype == torch.float32
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))


def test_half_precision_maps_are_sorted_in_float32() -> None:
    method = different_student(tiny())
    views = batch(method)
    exact = method(views, 0.5)["neco"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(views, 0.5)["neco"]
    assert half.dtype == torch.float32
    assert_close(half, exact, rtol=0.05, atol=0)
    half.backward()
    assert all(parameter.grad.isfinite().all() for parameter in method.student.parameters())


# Training


def test_the_head_learns_faster_than_the_encoder() -> None:
    method = tiny()
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    for group in method.param_groups():
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr_scale"] == (10.0 if ".head." in name else 1.0)
            assert group["weight_decay_scale"] == (0.0 if parameter.ndim == 1 else 1.0)
    decayed = {names[id(p)] for group in method.param_groups() if group["weight_decay_scale"] for p in group["params"]}
    assert {"student.encoder.vit.pos_embed", "student.encoder.vit.cls_token"} <= decayed


@pytest.mark.parametrize("references", ["batch", "queue"])
def test_a_short_training_run_learns_the_teachers_order(references: str, photos: Path) -> None:
    method = different_student(tiny(references=references, momentum=1.0)).train()
    config = OptimConfig(lr=3e-4, warmup_ratio=0.0, clip_norm=None)
    optimizer = build_optimizer(method.param_groups(), config)
    losses = []
    loader = TrainLoader(open_images(photos), method.make_views(48), batch_size=6, seed=0)
    for number, views in zip(range(40), loader, strict=False):
        apply_schedules(optimizer, config, peak=3e-4, progress=number / 40)
        loss = method(views, number / 40)["neco"]
        loss.backward()
        method.after_backward(number / 40)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(number / 40)
        losses.append(loss.item())
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"roi_size": 1}, "roi_size=1: sorting needs"),
        ({"roi_size": 15}, None),
        ({"roi_size": 92, "network": "none", "references": "queue"}, "needs 8464 references, but the queue holds 8192"),
        ({"exclude_self": True, "references": "queue"}, "exclude_self needs method.references=batch"),
        ({"steepness_student": 0.0}, "must be above 0"),
        ({"momentum": 1.5}, "NeCoConfig.momentum=1.5: at most 1 is needed"),
        ({"sorter": "triton", "network": "odd_even"}, "network='bitonic', not 'odd_even'"),
        ({"sorter": "triton", "network": "none"}, "network='bitonic', not 'none'"),
        ({"sorter": "triton", "roi_size": 17}, "up to 256 numbers, not 289"),
    ],
    ids=str,
)
def test_settings_that_can_not_be_used_are_refused(config: dict[str, object], line: str | None) -> None:
    if line is None:
        tiny(**config)
        return
    with pytest.raises(ConfigError, match=line):
        tiny(**config)


def test_local_views_need_the_patch_grid() -> None:
    with pytest.raises(ValueError, match="which patch_size=8 does not divide"):
        tiny(local_size=15).make_views(32)
