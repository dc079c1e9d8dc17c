"""Cross-entropy between teacher and student assignments to many prototypes, in chunks that save memory.

Letters: n student rows, m teacher rows, E width of the bottleneck, K prototypes, G teacher rows per student row.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from smalti.functional.precision import at_least_float32

_CHUNK_ELEMENTS = 1 << 24  # logits in a chunk, 64 MiB in float32


class Distillation(NamedTuple):
    """Result of :func:`distill`."""

    loss: Tensor
    """Scalar."""
    usage: Tensor
    """``(K,)`` mean of the targets, without gradient; zeros if there are no rows."""
    target_entropy: Tensor
    """Mean entropy of the targets, without gradient; 0 if there are no rows."""


def distill(
    student: Float[Tensor, "n E"],
    prototypes: Float[Tensor, "K E"],
    teacher_logits: Float[Tensor, "m K"],
    offsets: Float[Tensor, " K"],
    weights: Float[Tensor, " n"],
    *,
    student_temp: float,
    teacher_temp: float,
    sources: Int[Tensor, "n G"] | None = None,
    chunk: int | None = None,
) -> Distillation:
    """``sum_i weights_i H(target_i, softmax(student_i . prototypes / student_temp))``.

    A target is the mean over its sources of ``softmax(teacher_logits / teacher_temp - offsets)``. The forward pass also
    computes the gradients, one chunk of rows at a time, so no ``(n, K)`` tensor is kept: three matrix products, as
    without chunks. Memory besides the arguments: ``chunk * K``, and one ``(K, E)`` for the gradient.
    :func:`distill_reference` is the same loss without chunks.

    Args:
        student: bottleneck vectors.
        prototypes: prototype matrix, including gains.
        teacher_logits: logits without gradient, any float type.
        offsets: center / teacher_temp (DINO), or :func:`smalti.functional.transport.sinkhorn_offsets`.
        weights: weights of the student rows, without gradient.
        student_temp: above 0.
        teacher_temp: above 0.
        sources: teacher rows that are averaged for each student row's target; None: row i for row i.
        chunk: student rows at a time; None: 2**24 logits.

    Source: the loss is that of Caron et al., DINO, arXiv:2104.14294v2, Eq. (1) and (2).
    """
    rows = chunk or max(1, _CHUNK_ELEMENTS // len(prototypes))
    return Distillation(
        *_Distill.apply(
            student, prototypes, teacher_logits, offsets, weights, sources, student_temp, teacher_temp, rows
        )
    )


def distill_reference(
    student: Float[Tensor, "n E"],
    prototypes: Float[Tensor, "K E"],
    teacher_logits: Float[Tensor, "m K"],
    offsets: Float[Tensor, " K"],
    weights: Float[Tensor, " n"],
    *,
    student_temp: float,
    teacher_temp: float,
    sources: Int[Tensor, "n G"],
) -> Float[Tensor, ""]:
    """Reference implementation of :func:`distill` with autograd and all ``(n, G, K)`` targets in memory."""
    logits = at_least_float32(teacher_logits)[sources]  # (n, G, K)
    target = (logits / teacher_temp - offsets).softmax(-1).mean(1)
    log_pred = (at_least_float32(F.linear(student, prototypes)) / student_temp).log_softmax(-1)
    return -(weights[:, None] * target * log_pred).sum()


class _Distill(torch.autograd.Function):
    """Computes loss and gradients in the forward pass; backward multiplies by the scalar gradient of the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        prototypes: Tensor,
        teacher_logits: Tensor,
        offsets: Tensor,
        weights: Tensor,
        sources: Tensor | None,
        student_temp: float,
        teacher_temp: float,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_student, wants_prototypes = ctx.needs_input_grad[:2]
        usage = torch.zeros_like(offsets)
        loss, entropy = usage.new_zeros(()), usage.new_zeros(())
        grad_student = torch.zeros_like(student) if wants_student else None
        grad_prototypes = torch.zeros_like(prototypes) if wants_prototypes else None
        for start in range(0, len(student), rows):
            here = slice(start, start + rows)
            if sources is None:
                target = (at_least_float32(teacher_logits[here]) / teacher_temp - offsets).softmax(-1)
            else:
                logits = at_least_float32(teacher_logits[sources[here].T])  # (G, rows, K)
                target = (logits / teacher_temp - offsets).softmax(-1).mean(0)
            weight = weights[here, None]
            log_pred = (at_least_float32(F.linear(student[here], prototypes)) / student_temp).log_softmax(-1)
            loss -= (weight * target * log_pred).sum()
            usage += target.sum(0)
            entropy += torch.special.entr(target).sum()
            if wants_student or wants_prototypes:
                grad = log_pred.exp_().sub_(target).mul_(weight / student_temp)  # gradient of the products
                if grad_student is not None:
                    grad_student[here] = F.linear(grad, prototypes.T)
                if grad_prototypes is not None:
                    grad_prototypes += F.linear(grad.T, student[here].T)
        ctx.save_for_backward(grad_student, grad_prototypes)
        usage /= max(len(student), 1)
        entropy /= max(len(student), 1)
        ctx.mark_non_differentiable(usage, entropy)
        return loss, usage, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        scaled = (None if one is None else one * grad.to(one.dtype) for one in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None, None, None)
