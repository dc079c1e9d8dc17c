"""Cross-entropy in chunks against the same without."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from smalti.errors import ConfigError
from smalti.functional.distillation import distill, distill_reference
from smalti.functional.transport import sinkhorn, sinkhorn_offsets


def data(n: int = 5, m: int = 5, k: int = 7, e: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((n, e), (k, e), (m, k), (k,))
    tensors = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]
    return (*tensors, torch.rand(n, generator=g, dtype=torch.float64))


def by_plain_loops(
    student: torch.Tensor,
    prototypes: torch.Tensor,
    teacher: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    sources: list[list[int]],
) -> torch.Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for i, rows in enumerate(sources):
        log_pred = (prototypes @ student[i] / 0.1).log_softmax(0)
        for row in rows:
            loss = loss - weights[i] / len(rows) * ((teacher[row] / 0.5 - offsets).softmax(0) * log_pred).sum()
    return loss


@pytest.mark.parametrize("chunk", [1, 2, 5, None])
def test_the_chunked_form_equals_the_reference_and_so_do_its_gradients(chunk: int | None) -> None:
    student, prototypes, teacher, offsets, weights = data(m=6)
    leaves = [student.requires_grad_(), prototypes.requires_grad_()]
    sources = torch.randint(6, (5, 2), generator=torch.Generator().manual_seed(0))
    rest = (student, prototypes, teacher, offsets, weights)
    expected = distill_reference(*rest, student_temp=0.1, teacher_temp=0.5, sources=sources)
    found = distill(*rest, student_temp=0.1, teacher_temp=0.5, sources=sources, chunk=chunk).loss
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))


@given(n=st.integers(0, 6), chunk=st.integers(1, 7), paired=st.booleans(), seed=st.integers(0, 99))
def test_loss_and_gradients_are_those_of_plain_loops(n: int, chunk: int, paired: bool, seed: int) -> None:
    student, prototypes, teacher, offsets, weights = data(n=n, m=6 if paired else n, seed=seed)
    sources = [[i] for i in range(n)]
    if paired:
        sources = torch.randint(6, (n, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    leaves = [student.requires_grad_(), prototypes.requires_grad_()]
    expected = by_plain_loops(student, prototypes, teacher, offsets, weights, sources)
    found = distill(
        student,
        prototypes,
        teacher,
        offsets,
        weights,
        student_temp=0.1,
        teacher_temp=0.5,
        sources=torch.tensor(sources, dtype=torch.int64).reshape(n, 2) if paired else None,
        chunk=chunk,
    )
    assert_close(found.loss, expected)
    gradients = torch.autograd.grad(3 * found.loss, leaves)
    if n:
        for ours, theirs in zip(gradients, torch.autograd.grad(3 * expected, leaves), strict=True):
            assert_close(ours, theirs)
        targets = torch.stack([(teacher[rows] / 0.5 - offsets).softmax(-1).mean(0) for rows in sources])
        assert_close(found.usage, targets.mean(0))
        assert_close(found.target_entropy, torch.special.entr(targets).sum(1).mean())
    else:
        assert all((gradient == 0).all() for gradient in gradients) and found.target_entropy == 0


def test_gradients_are_right() -> None:
    student, prototypes, teacher, offsets, weights = data()

    def loss(student: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        options = {"student_temp": 0.7, "teacher_temp": 0.5, "chunk": 2}
        return distill(student, prototypes, teacher, offsets, weights, **options).loss

    assert gradcheck(loss, (student.requires_grad_(), prototypes.requires_grad_()))


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    student, prototypes, teacher, offsets, weights = data()
    options = {"student_temp": 0.1, "teacher_temp": 0.5}
    with torch.no_grad():
        without = distill(student, prototypes.requires_grad_(), teacher, offsets, weights, **options)
    found = distill(student, prototypes, teacher, offsets, weights, **options)
    assert not without.loss.requires_grad and not found.usage.requires_grad and not found.target_entropy.requires_grad
    assert_close(without.loss, found.loss.detach())


def test_no_tensor_of_all_logits_is_made_for_the_student() -> None:
    student, prototypes = torch.randn(64, 4, requires_grad=True), torch.randn(4096, 4, requires_grad=True)
    teacher, largest = torch.randn(64, 4096), 0
    original = torch.Tensor.log_softmax

    def spy(x: torch.Tensor, *args: int) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return original(x, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "log_softmax", spy)
        distill(
            student, prototypes, teacher, torch.zeros(4096), torch.ones(64), student_temp=0.1, teacher_temp=0.1, chunk=8
        )
    assert largest == 8 * 4096


def test_half_precision_changes_little() -> None:
    student, prototypes, teacher, offsets, weights = (x.float() for x in data(n=40, m=40))
    options = {"student_temp": 0.1, "teacher_temp": 0.5, "chunk": 16}
    leaves = [student.requires_grad_(), prototypes.requires_grad_()]
    exact = distill(student, prototypes, teacher, offsets, weights, **options).loss
    with torch.autocast("cpu", torch.bfloat16):
        half = distill(student, prototypes, teacher.bfloat16(), offsets, weights, **options).loss
    assert half.dtype == torch.float32
    assert_close(half, exact, rtol=0.02, atol=0)
    for ours, theirs in zip(torch.autograd.grad(half, leaves), torch.autograd.grad(exact, leaves), strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.05 * theirs.norm()


@given(m=st.integers(1, 9), k=st.integers(1, 6), iterations=st.integers(1, 5), chunk=st.integers(1, 10))
def test_sinkhorn_s_assignments_are_a_softmax_with_offsets(m: int, k: int, iterations: int, chunk: int) -> None:
    logits = torch.randn(m, k, dtype=torch.float64)
    offsets = sinkhorn_offsets(logits, 0.2, iterations, chunk)
    assert_close((logits / 0.2 - offsets).softmax(1), sinkhorn(logits, 0.2, iterations))


def test_offsets_are_finite_where_prototypes_are_out_of_reach_and_autocast_changes_nothing() -> None:
    offsets = sinkhorn_offsets(torch.tensor([[1.0, 0.0], [0.9, 0.0]]) * 100, 0.01)
    assert offsets.isfinite().all()
    assert sinkhorn_offsets(torch.zeros(0, 3), 0.1).isfinite().all()
    logits = torch.randn(64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = sinkhorn_offsets(logits, 0.1)
    assert_close(found, sinkhorn_offsets(logits, 0.1))
    assert sinkhorn_offsets(logits.bfloat16(), 0.1).dtype == torch.float32
    with pytest.raises(ConfigError, match=r"Sinkhorn-Knopp offsets with temp=0\.0 and iterations=3"):
        sinkhorn_offsets(logits, 0.0)


def test_sinkhorn_by_hand() -> None:  # known answers
    logits = torch.tensor([[2.0, 0, 0], [2, 1, 0], [2, 0, 1], [2, 1, 1]])
    expected = [
        [0.461829, 0.269086, 0.269086],
        [0.315809, 0.500183, 0.184007],
        [0.315809, 0.184007, 0.500183],
        [0.239945, 0.380028, 0.380028],
    ]
    small = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    for found in (sinkhorn(logits, 1.0), (logits - sinkhorn_offsets(logits, 1.0, chunk=3)).softmax(1)):
        assert_close(found, torch.tensor(expected), rtol=0, atol=2e-6)
    for found in (sinkhorn(small, 1.0), (small - sinkhorn_offsets(small, 1.0)).softmax(1)):
        assert_close(found, torch.tensor([[0.731059, 0.268941], [0.268941, 0.731059], [0.5, 0.5]]), rtol=0, atol=1e-6)


def test_equal_logits_cost_log_k() -> None:
    zeros = torch.zeros(2, 8)
    found = distill(
        torch.zeros(2, 3), torch.randn(8, 3), zeros, zeros[0], torch.ones(2) / 2, student_temp=1, teacher_temp=1
    )
    assert_close(found.loss.item(), math.log(8), rtol=1e-6, atol=0)
