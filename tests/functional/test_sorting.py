"""Differentiable sorting: the spec's known answers, the reference library, and gradients."""

import math

import jaxtyping
import pytest
import torch
from diffsort import DiffSortNet
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from smalti.errors import ConfigError, ShapeError
from smalti.functional.sorting import DISTRIBUTIONS, _rows_at_once, neco_loss, soft_sort
from smalti.functional.sorting_networks import NETWORKS, network_layers

UNSORTED = (22, 38, 42, 43, 44, 45, 46, 54)


def sims(rows, size, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return tuple(0.3 + 0.15 * torch.randn(rows, size, generator=g, dtype=dtype) for _ in range(2))


def plain_loss(student, teacher, network="bitonic", beta_s=100.0, beta_t=100.0, distribution="cauchy"):
    pred = soft_sort(student, network, beta_s, distribution)[1]
    target = soft_sort(teacher, network, beta_t, distribution)[1].detach()
    return -(target * pred.clamp_min(1e-30).log()).sum(2).mean()


def test_two_numbers_are_sorted_as_by_hand():
    values, weights = soft_sort(torch.tensor([[0.3, 0.1]]))
    assert_close(values, torch.tensor([[0.103180, 0.296820]]), atol=1e-6, rtol=0)
    assert_close(weights[0], torch.tensor([[0.015902, 0.984098], [0.984098, 0.015902]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("network", "values", "weights"),
    [
        (
            "odd_even",
            [0.156053, 0.205758, 0.438190],
            [[0.231373, 0.674832, 0.093795], [0.082288, 0.095686, 0.822025], [0.686339, 0.229482, 0.084180]],
        ),
        (
            "bitonic",
            [0.152396, 0.209448, 0.438156],
            [[0.308160, 0.618717, 0.073123], [0.053949, 0.118942, 0.827109], [0.637891, 0.262341, 0.099768]],
        ),
    ],
)
def test_three_numbers_are_sorted_as_by_hand(network, values, weights):
    found, matrix = soft_sort(torch.tensor([[0.2, 0.5, 0.1]]), network, 10.0)
    assert_close(found[0], torch.tensor(values), atol=1e-6, rtol=0)
    assert_close(matrix[0], torch.tensor(weights), atol=1e-6, rtol=0)


def test_four_numbers_are_sorted_as_by_hand():
    values, weights = soft_sort(torch.tensor([[0.2, 0.5, 0.1, 0.4]]), "bitonic", 10.0)
    assert_close(values[0], torch.tensor([0.186360, 0.233613, 0.366387, 0.413640]), atol=1e-6, rtol=0)
    assert_close(weights[0, 0], torch.tensor([0.190645, 0.537682, 0.156761, 0.114913]), atol=1e-6, rtol=0)
    assert_close(weights[0, 2], torch.tensor([0.612389, 0.223516, 0.082041, 0.082053]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("student", "teacher", "loss", "gradient"),
    [
        ([0.2, 0.5], [0.4, 0.1], 2.0563972, [-2.753367, 2.753367]),
        ([0.2, 0.5, 0.1], [0.4, 0.1, 0.3], 1.9778461, [-0.566422, 1.472184, -0.905762]),
    ],
)
def test_loss_and_gradient_of_a_row_are_those_by_hand(student, teacher, loss, gradient):
    row = torch.tensor([student], requires_grad=True)
    found = neco_loss(row, torch.tensor([teacher]), "bitonic", 10.0, 10.0)
    found.backward()
    assert_close(found.item(), loss, atol=2e-6, rtol=0)
    assert_close(row.grad[0], torch.tensor(gradient), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("network", "size", "num_layers", "num_comparators"),
    [
        ("bitonic", 16, 10, 80),
        ("bitonic", 32, 15, 240),
        ("bitonic", 49, 21, 483),
        ("bitonic", 64, 21, 672),
        ("bitonic", 128, 28, 1792),
        ("bitonic", 196, 36, 3402),
        ("bitonic", 256, 36, 4608),
        ("odd_even", 16, 16, 120),
        ("odd_even", 49, 49, 1176),
        ("odd_even", 128, 128, 8128),
        ("odd_even", 196, 196, 19110),
    ],
)
def test_networks_have_the_papers_size(network, size, num_layers, num_comparators):
    layers = network_layers(network, size)
    counts = [layer.groups * layer.width if layer.sign is None else int(layer.sign.abs().sum()) for layer in layers]
    assert len(layers) == num_layers
    assert sum(counts) == num_comparators


@pytest.mark.parametrize("size", [n for n in range(2, 65) if n not in UNSORTED])
def test_hard_comparators_sort(size):
    rows = torch.rand(64, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    for network in NETWORKS:
        values, weights = soft_sort(rows, network, 1e12)
        assert_close(values, rows.sort(dim=1).values, atol=1e-7, rtol=0)
        assert_close(weights.argmax(1), rows.argsort(dim=1))


@pytest.mark.parametrize("size", UNSORTED)
def test_networks_that_do_not_sort_are_refused(size):
    rows = torch.rand(2, size)
    with pytest.raises(ConfigError, match=f"bitonic network can't sort {size} numbers; use network='odd_even'"):
        neco_loss(rows, rows)
    assert neco_loss(rows, rows, "odd_even").isfinite()


@pytest.mark.parametrize("size", [2, 3, 5, 16, 49, 64])
@pytest.mark.parametrize("network", NETWORKS)
def test_loss_and_gradient_equal_the_reference_sorters(network, size):
    student, teacher = sims(40, size)
    student = student.requires_grad_()
    found = neco_loss(student, teacher, network)
    (ours,) = torch.autograd.grad(found, student)

    exact, other = (x.detach().double() for x in (student, teacher))
    exact.requires_grad_()
    sorter = DiffSortNet(network, size, steepness=100.0, distribution="cauchy")
    sorter.sorting_network = [tuple(part.double() for part in layer) for layer in sorter.sorting_network]
    pred, target = sorter(exact)[1], sorter(other)[1]
    expected = -(target * pred.clamp_min(1e-30).log()).sum(2).mean()
    (theirs,) = torch.autograd.grad(expected, exact)
    assert math.isclose(found.item(), expected.item(), rel_tol=1e-6)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("distribution", ["logistic", "gaussian", "reciprocal"])
def test_other_distributions_equal_the_reference_sorters(distribution):
    student, teacher = sims(10, 8, dtype=torch.float64)
    sorter = DiffSortNet("bitonic", 8, steepness=10.0, distribution=distribution)
    sorter.sorting_network = [tuple(part.double() for part in layer) for layer in sorter.sorting_network]
    assert_close(soft_sort(student, "bitonic", 10.0, distribution)[1], sorter(student)[1], atol=1e-9, rtol=0)
    plain = plain_loss(student, teacher, "bitonic", 10.0, 10.0, distribution)
    assert_close(neco_loss(student, teacher, "bitonic", 10.0, 10.0, distribution=distribution), plain)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("network", "size"), [("bitonic", 2), ("bitonic", 5), ("bitonic", 8), ("odd_even", 6)])
def test_the_loss_has_the_right_gradient(network, size, distribution):
    student, teacher = sims(3, size, dtype=torch.float64)

    def loss(x):
        return neco_loss(x, teacher, network, 7.0, 5.0, distribution=distribution, chunk=2)

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


@given(seed=st.integers(0, 1000), rows=st.integers(1, 300), chunk=st.integers(1, 400), size=st.sampled_from([3, 7, 16]))
def test_chunks_do_not_change_the_result(seed, rows, chunk, size):
    student, teacher = sims(rows, size, seed)
    student.requires_grad_()
    one, two = (neco_loss(student, teacher, chunk=c) for c in (None, chunk))
    assert_close(one, two)
    assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (one, two)))


@given(seed=st.integers(0, 1000), size=st.integers(2, 40), network=st.sampled_from(NETWORKS))
def test_weights_are_doubly_stochastic_and_give_the_values(seed, size, network):
    if network == "bitonic" and size in UNSORTED:
        return
    rows, _ = sims(4, size, seed, torch.float64)
    values, weights = soft_sort(rows, network)
    for dim in (1, 2):
        assert_close(weights.sum(dim), torch.ones(4, size, dtype=torch.float64))
    assert_close((rows[:, None] @ weights)[:, 0], values)


def test_float32_weights_sum_to_one_and_give_the_values():
    rows, _ = sims(200, 49)
    for network in NETWORKS:
        values, weights = soft_sort(rows, network)
        for dim in (1, 2):
            assert_close(weights.sum(dim), torch.ones(200, 49), rtol=0, atol=5e-7)
        assert_close((rows[:, None] @ weights)[:, 0], values, rtol=0, atol=5e-7)


def test_equal_numbers_leave_an_order_that_is_not_uniform():
    rows = torch.full((2, 49), 0.4, requires_grad=True)
    weights = soft_sort(rows)[1].detach()
    assert_close((weights.min().item(), weights.max().item()), (1 / 64, 0.1328125))
    assert_close(-(weights * weights.log()).sum(2).mean().item(), 3.862307, atol=1e-5, rtol=0)
    loss = neco_loss(rows, rows.detach())
    loss.backward()
    assert loss.isfinite() and rows.grad.isfinite().all()
    three = soft_sort(torch.zeros(1, 3))[1][0]
    assert_close(three, torch.tensor([[2, 1, 1], [1, 1.5, 1.5], [1, 1.5, 1.5]]) / 4)
    assert_close(soft_sort(torch.zeros(1, 4))[1][0], torch.full((4, 4), 0.25))


def test_equal_student_and_teacher_cost_the_entropy_and_have_no_gradient():
    student, other = sims(64, 49)
    student.requires_grad_()
    loss = neco_loss(student, student.detach())
    target = soft_sort(student.detach())[1]
    assert_close(loss.detach(), -(target * target.log()).sum(2).mean(), atol=1e-5, rtol=0)
    (at_rest,) = torch.autograd.grad(loss, student)
    (pulled,) = torch.autograd.grad(neco_loss(student, other), student)
    assert at_rest.abs().max() < 1e-4 * pulled.abs().max()


@pytest.mark.parametrize("distribution", ["cauchy", "logistic"])
def test_weights_that_underflow_do_no_harm(distribution):
    student = (torch.arange(60.0)[None] / 10).requires_grad_()
    loss = neco_loss(student, student.detach().flip(1), "odd_even", 1000.0, 1000.0, distribution=distribution)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_weights_below_the_smallest_have_no_gradient():
    student = torch.tensor([[0.0, 0.70]], dtype=torch.float64, requires_grad=True)  # exp(-70) is 4e-31
    teacher = torch.tensor([[0.01, 0.0]], dtype=torch.float64)
    loss = neco_loss(student, teacher, distribution="logistic")
    plain = plain_loss(student, teacher, distribution="logistic")
    assert_close(loss, plain)
    (ours,), (theirs,) = (torch.autograd.grad(one, student) for one in (loss, plain))
    assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
    assert ours.abs().max() < 1e-6


def test_a_gpu_takes_as_many_rows_as_fit_into_its_share_of_memory():
    for network, size in (("bitonic", 49), ("bitonic", 256), ("odd_even", 49)):
        layers = network_layers(network, size)
        padded = 2 * layers[0].groups if layers[0].merge else size
        chunk, rows = _rows_at_once(layers, padded, torch.empty(1, size, device="meta"))
        assert chunk == rows
        per_row = 4 * 2**20 if size == 256 else 2**20
        assert 768 * 2**20 / per_row < chunk < 768 * 2**20 / (4 * 5 * padded**2)
        double, _ = _rows_at_once(layers, padded, torch.empty(1, size, dtype=torch.float64, device="meta"))
        assert double == chunk // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_is_used_whatever_the_autocast_says(dtype):
    student, teacher = sims(30, 49)
    student.requires_grad_()
    expected = neco_loss(student, teacher)
    with torch.autocast("cpu", dtype=dtype):
        found = neco_loss(student, teacher)
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=0, atol=0)
    half = neco_loss(student.detach().to(dtype), teacher.to(dtype))
    assert half.dtype == torch.float32


def test_no_gradient_flows_to_the_teacher():
    student, teacher = (x.requires_grad_() for x in sims(4, 8))
    neco_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"network": "quick"}, "network='quick': one of bitonic, odd_even"),
        ({"distribution": "normal"}, "distribution='normal': one of cauchy"),
        ({"steepness_student": 0.0}, "steepness=0.0: a number above 0"),
        ({"steepness_teacher": float("nan")}, "steepness=nan: a number above 0"),
    ],
)
def test_settings_that_can_not_be_used_are_refused(arguments, line):
    rows = torch.rand(2, 4)
    with pytest.raises(ConfigError, match=line):
        neco_loss(rows, rows, **arguments)


def test_shapes_that_do_not_fit_are_refused():
    jaxtyping.config.update("jaxtyping_disable", True)  # the tests' own check of shapes comes first
    try:
        with pytest.raises(ShapeError, match=r"student_sims is \(2, 4\), teacher_sims \(2, 5\)"):
            neco_loss(torch.rand(2, 4), torch.rand(2, 5))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    with pytest.raises(ConfigError, match="1 numbers can't be sorted"):
        neco_loss(torch.rand(2, 1), torch.rand(2, 1))
