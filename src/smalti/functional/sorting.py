"""Differentiable sorting networks, and a memory-efficient form of NeCo's loss on the order of neighbours.

Papers: Petersen et al., "Differentiable Sorting Networks for Scalable Sorting and Ranking Supervision",
arXiv:2105.04019v1 (relaxed comparators), and "Monotonic Differentiable Sorting Networks", arXiv:2203.09630v1 (Cauchy);
Pariza et al., NeCo, arXiv:2408.11054v3, Sec. 3 (the loss on permutation matrices).
Letters: Q rows to sort, R numbers per row, K the power of two at or above R, W wires, a comparator's wires a and b.

A relaxed comparator moves the fraction ``gamma`` of the difference: ``a -= gamma (a - b)``, ``b += gamma (a - b)``,
where gamma is the probability that the two are in the wrong order, ``F(beta (a - b))`` for a distribution function F.
The permutation matrix is updated with the same gammas, which depend on the numbers only. So the numbers are sorted
first; then, for a few rows at a time, matrix, loss and gradient are computed together, and only the gradient for the
numbers is kept. Matrices grow with the network: before two sequences of n wires are merged, a wire of one has no weight
on the inputs of the other.

On a GPU, a kernel can process the matrices (``backend="triton"``): :mod:`smalti.functional.sorting_kernel`.
"""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.errors import ConfigError, ShapeError
from smalti.functional.sorting_networks import SMALLEST, Layer, layers_for

DISTRIBUTIONS = ("cauchy", "logistic", "gaussian", "reciprocal")
BACKENDS = ("torch", "triton")
LARGEST_KERNEL_SIZE = 256
"""Largest R of the Triton backend; above, too little of a row fits into registers."""
_MATRIX_ELEMENTS = 2**19  # of a chunk's matrices on a CPU: fits into its cache
_FEWEST_ROWS = 16  # fewer rows leave vector units idle
_ROWS_AT_ONCE = 256  # rows whose gates are in memory on a CPU
_GPU_BYTES = 768 * 2**20  # memory of a chunk on a GPU: few, large kernels


def _swap_probability(
    difference: Tensor, steepness: float, distribution: str, needs_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """``F(steepness * difference)`` and, with ``needs_slope``, its derivative with respect to the difference."""
    scaled = difference * steepness
    slope: Tensor | None = None
    if distribution == "cauchy":
        probability = scaled.atan().div_(math.pi).add_(0.5)
        if needs_slope:
            slope = scaled.square_().add_(1).reciprocal_().mul_(steepness / math.pi)
    elif distribution == "logistic":
        probability = scaled.sigmoid()
        if needs_slope:
            slope = probability * (1 - probability) * steepness
    elif distribution == "gaussian":
        probability = torch.special.ndtr(scaled)
        if needs_slope:
            slope = scaled.square_().mul_(-0.5).exp_().mul_(steepness / math.sqrt(2 * math.pi))
    else:
        probability = scaled / (scaled.abs() + 2) / 2 + 0.5
        if needs_slope:
            slope = scaled.abs_().add_(2).square_().reciprocal_().mul_(steepness)
    return probability, slope


@dataclass(frozen=True)
class _Gates:
    """Comparator values of a layer for some rows; all tensors are ``(groups, width, Q)``."""

    gamma: Tensor
    delta: Tensor | None
    """``a - b`` before the layer; like its slope, only if gradients are needed."""
    slope: Tensor | None
    """Derivative of gamma with respect to delta."""


def _sort_numbers(
    wires: Float[Tensor, "W Q"],
    layers: tuple[Layer, ...],
    steepness: float,
    distribution: str,
    needs_grad: bool,
) -> list[_Gates]:
    """Sort in place; returns the gates of each layer."""
    gates = []
    for layer in layers:
        a, b = layer.split(wires)
        delta = a - b
        if layer.sign is None:
            gamma, slope = _swap_probability(delta, steepness, distribution, needs_grad)
        else:
            sign = layer.sign[..., None]
            gamma, slope = _swap_probability(delta * sign, steepness, distribution, needs_grad)
            gamma *= sign.abs()  # 0 without a comparator
            if slope is not None:
                slope *= sign
        a.addcmul_(gamma, delta, value=-1)
        b.addcmul_(gamma, delta)
        gates.append(_Gates(gamma, delta if needs_grad else None, slope))
    return gates


def _sort_matrix(
    layers: tuple[Layer, ...],
    gates: list[_Gates],
    rows: slice,
    size: int,
    kept: list[Tensor] | None,
) -> Float[Tensor, "W I q"]:
    """Weights of the inputs on the sorted wires for some rows.

    Args:
        layers: layers of the network.
        gates: gates from :func:`_sort_numbers`.
        rows: slice of the rows.
        size: R.
        kept: list to which tensors for the backward pass are appended; None: keep nothing.

    Returns:
        ``(W, I, q)``; a bitonic network has W = I = K, of which the first K - R are padding.
    """
    first = gates[0].gamma[..., rows]
    number = first.shape[-1]
    if layers[0].merge:
        padded = 2 * layers[0].groups
        matrix = first.new_ones(padded, 1, number)  # each wire has all weight on its own input
    else:
        matrix = torch.eye(size, dtype=first.dtype, device=first.device)[..., None].repeat(1, 1, number)
    for layer, gate in zip(layers, gates, strict=True):
        gamma = gate.gamma[..., rows].unsqueeze(2)  # (groups, width, 1, q)
        if layer.merge:
            width = layer.width
            half = matrix.view(layer.groups, 2, width, width, number)
            a, b = half[:, 0], half[:, 1]
            grown = matrix.new_empty(layer.groups, 2, width, 2, width, number)
            torch.mul(gamma, a, out=grown[:, 1, :, 0])
            torch.mul(gamma, b, out=grown[:, 0, :, 1])
            torch.sub(a, grown[:, 1, :, 0], out=grown[:, 0, :, 0])
            torch.sub(b, grown[:, 0, :, 1], out=grown[:, 1, :, 1])
            if kept is not None:
                kept.append(matrix)
            matrix = grown.view(layer.groups * 2 * width, 2 * width, number)
            continue
        a, b = layer.split(matrix)
        difference = a - b
        a.addcmul_(gamma, difference, value=-1)
        b.addcmul_(gamma, difference)
        if kept is not None:
            kept.append(difference)
    return matrix


def _matrix_backward(
    layers: tuple[Layer, ...], gates: list[_Gates], rows: slice, kept: list[Tensor], grad: Float[Tensor, "W I q"]
) -> list[Tensor]:
    """Gradients of the gammas by layer, from the gradient of the matrix, which is overwritten."""
    number = grad.shape[-1]
    result: list[Tensor] = [grad] * len(layers)
    for place in range(len(layers) - 1, -1, -1):
        layer, gamma, before = layers[place], gates[place].gamma[..., rows].unsqueeze(2), kept[place]
        if layer.merge:
            width = layer.width
            parts = grad.view(layer.groups, 2, width, 2, width, number)
            half = before.view(layer.groups, 2, width, width, number)
            of_a = parts[:, 0, :, 0] - parts[:, 1, :, 0]
            of_b = parts[:, 1, :, 1] - parts[:, 0, :, 1]
            shrunk = grad.new_empty(layer.groups, 2, width, width, number)
            torch.addcmul(parts[:, 0, :, 0], gamma, of_a, value=-1, out=shrunk[:, 0])
            torch.addcmul(parts[:, 1, :, 1], gamma, of_b, value=-1, out=shrunk[:, 1])
            of_a.mul_(half[:, 0]).addcmul_(of_b, half[:, 1])
            result[place] = of_a.sum(2).neg_()
            grad = shrunk.view(layer.groups * 2 * width, width, number)
            continue
        a, b = layer.split(grad)
        difference = a - b
        a.addcmul_(gamma, difference, value=-1)
        b.addcmul_(gamma, difference)
        result[place] = difference.mul_(before).sum(2).neg_()
    return result


def _numbers_backward(layers: tuple[Layer, ...], gates: list[_Gates], of_gammas: list[Tensor], wires: Tensor) -> None:
    """Gradient of the numbers, written to ``wires``, which must be zero: the loss doesn't depend on the sorted
    numbers."""
    for place in range(len(layers) - 1, -1, -1):
        gate = gates[place]
        assert gate.delta is not None and gate.slope is not None
        a, b = layers[place].split(wires)
        difference = a - b  # a' = a - gamma delta, b' = b + gamma delta
        of_gamma = of_gammas[place].addcmul_(gate.delta, difference, value=-1)
        of_delta = of_gamma.mul_(gate.slope).addcmul_(gate.gamma, difference, value=-1)
        a += of_delta
        b -= of_delta


def _rows_at_once(layers: tuple[Layer, ...], padded: int, rows: Tensor) -> tuple[int, int]:
    """Number of rows whose matrices, and of rows whose gates, are in memory at a time.

    On a CPU, matrices fit into its cache; elsewhere a memory budget covers both, so that kernels are few and large.
    """
    if rows.device.type == "cpu":
        chunk = max(_FEWEST_ROWS, _MATRIX_ELEMENTS // (padded * padded))
        return chunk, max(_ROWS_AT_ONCE, chunk)
    kept, width = 0, 1  # inputs that a wire can have weight on
    for layer in layers:
        wires = layer.groups * layer.width * (2 if layer.merge else 1)  # a merge keeps its matrix, others a difference
        kept += wires * (width if layers[0].merge else padded)
        width *= 2 if layer.merge else 1
    gates = 7 * sum(
        layer.groups * layer.width for layer in layers
    )  # gamma of both; delta, slope, gradient; two passing
    number = _GPU_BYTES // (rows.element_size() * (kept + gates + 5 * padded * padded))  # P, Q and three passing
    return max(1, number), max(1, number)


def _add_order_cost(
    total: Float[Tensor, ""],
    layers: tuple[Layer, ...],
    student: list[_Gates],
    teacher: list[_Gates],
    size: int,
    chunk: int,
    needs_grad: bool,
) -> list[Tensor]:
    """Subtract the sum of ``Q log P`` from a total, in place; returns its gradients for the student's gammas.

    The matrices of ``chunk`` rows are in memory at a time.
    """
    dead, number = (2 * layers[0].groups - size if layers[0].merge else 0), student[0].gamma.shape[-1]
    of_gammas = [torch.empty_like(gate.gamma) for gate in student] if needs_grad else []
    for first in range(0, number, chunk):
        rows = slice(first, min(first + chunk, number))
        target = _sort_matrix(layers, teacher, rows, size, None)
        kept: list[Tensor] | None = [] if needs_grad else None
        pred = _sort_matrix(layers, student, rows, size, kept)
        alive = pred[dead:, dead:].clamp_(min=SMALLEST)
        target = target[dead:, dead:]
        total -= torch.mul(target, alive.log()).sum(dtype=torch.float64)
        if kept is not None:
            is_clamped = alive == SMALLEST
            torch.div(target, alive, out=alive).masked_fill_(is_clamped, 0)
            if dead:
                pred[:dead].zero_()
                pred[:, :dead].zero_()
            for place, one in enumerate(_matrix_backward(layers, student, rows, kept, pred)):
                of_gammas[place][..., rows] = one
    return of_gammas


class _OrderLoss(torch.autograd.Function):
    """Cross-entropy between two soft orders; the gradient is computed in the forward pass, a few rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        layers: tuple[Layer, ...],
        distribution: str,
        steepness: tuple[float, float],
        chunk: int | None,
        backend: str,
    ) -> Tensor:
        number, size = student.shape
        needs_grad = ctx.needs_input_grad[0]
        padded = 2 * layers[0].groups if layers[0].merge else size
        dead = padded - size
        count = number * size
        if backend == "triton":
            from smalti.functional import sorting_kernel  # not at the top: triton is optional

            chunk = rows_at_once = chunk or sorting_kernel.rows_at_once(layers, size, _GPU_BYTES)
        elif chunk:
            rows_at_once = max(_ROWS_AT_ONCE, chunk)
        else:
            chunk, rows_at_once = _rows_at_once(layers, padded, student)
        total = student.new_zeros((), dtype=torch.float64)
        gradient = torch.empty_like(student) if needs_grad else None
        for start in range(0, number, rows_at_once):
            here = slice(start, min(start + rows_at_once, number))
            wires, gates = [], []
            for numbers, beta, keep in ((student, steepness[0], needs_grad), (teacher, steepness[1], False)):
                one = numbers.new_zeros(padded, here.stop - here.start)
                one[dead:] = numbers[here].T
                wires.append(one)
                gates.append(_sort_numbers(one, layers, beta, distribution, keep))
            if backend == "triton":
                pred, target = ([gate.gamma for gate in one] for one in gates)
                of_gammas = sorting_kernel.add_order_cost(total, layers, pred, target, size, needs_grad)
            else:
                of_gammas = _add_order_cost(total, layers, gates[0], gates[1], size, chunk, needs_grad)
            if gradient is not None:
                wires[0].zero_()
                _numbers_backward(layers, gates[0], of_gammas, wires[0])
                gradient[here] = wires[0][dead:].T
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(-1 / count))
        return (total * (1 / count)).to(student.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * incoming, None, None, None, None, None, None


def neco_loss(
    student_sims: Float[Tensor, "Q R"],
    teacher_sims: Float[Tensor, "Q R"],
    network: str = "bitonic",
    steepness_student: float = 100.0,
    steepness_teacher: float = 100.0,
    *,
    distribution: str = "cauchy",
    chunk: int | None = None,
    backend: str = "torch",
) -> Float[Tensor, ""]:
    """Cross-entropy between the student's and the teacher's soft order of the same references.

    ``- mean over rows q and inputs i of  sum over ranks j of  Q[q, i, j] log P[q, i, j]``, where P and Q are the
    weights of input i at rank j in the student's and the teacher's differentiable sort, ascending.

    Args:
        student_sims: ``(Q, R)`` similarities of Q queries to their R references; any float type, computed in float32
            (float64 for float64), also under autocast.
        teacher_sims: ``(Q, R)`` similarities to the references in the same order, since networks aren't permutation
            equivariant; without gradient.
        network: ``bitonic`` or ``odd_even``.
        steepness_student: beta of the student's comparators, above 0.
        steepness_teacher: beta of the teacher's.
        distribution: distribution of the comparators: ``cauchy`` (NeCo's), ``logistic``, ``gaussian`` or
            ``reciprocal``.
        chunk: rows whose matrices are in memory (``triton``: whose gates); doesn't change the result. None: what fits
            into a CPU's cache, or less than 1 GB on a GPU.
        backend: ``torch``: tensor operations; ``triton``: one kernel for the matrices, with another summation order,
            for GPUs, bitonic networks and up to 256 references, in float32.

    Returns:
        The loss; ``log R`` for a uniform order. Time grows as ``Q R^2 log^2 R`` (bitonic) or ``Q R^3``; only one
        gradient of ``(Q, R)`` is stored.

    Raises:
        ConfigError: for an unknown name, a steepness that isn't above 0, an R that the network can't sort, or an
            unavailable backend.
        ShapeError: if the two differ in shape.

    Example:
        >>> round(neco_loss(torch.tensor([[0.2, 0.5]]), torch.tensor([[0.4, 0.1]]), "bitonic", 10.0, 10.0).item(), 4)
        2.0564

    Source: Pariza et al., NeCo, arXiv:2408.11054v3, Sec. 3; the memory layout is ours.
    """
    if student_sims.shape != teacher_sims.shape:
        raise ShapeError(
            f"student_sims is {tuple(student_sims.shape)}, teacher_sims {tuple(teacher_sims.shape)}; "
            "equal shapes (queries, references) are needed"
        )
    _check(distribution, steepness_student, steepness_teacher)
    dtype = torch.float64 if student_sims.dtype == torch.float64 else torch.float32
    layers = layers_for(network, student_sims.shape[1], student_sims.device, dtype)
    check_backend(backend, network, student_sims.shape[1], student_sims.device, dtype)
    with torch.autocast(student_sims.device.type, enabled=False):
        return _OrderLoss.apply(
            student_sims.to(dtype),
            teacher_sims.detach().to(dtype),
            layers,
            distribution,
            (steepness_student, steepness_teacher),
            chunk,
            backend,
        )


def check_backend(
    backend: str, network: str, size: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Check that a backend of :func:`neco_loss` is available.

    Args:
        backend: ``torch``, which is always available, or ``triton``.
        network: sorting network.
        size: R.
        device: device of the similarities.
        dtype: type of the computation.

    Raises:
        ConfigError: for an unknown name; for ``triton`` with another network than the bitonic one, too many numbers,
            float64, a device that isn't a GPU, or without the package.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r}: one of {', '.join(BACKENDS)} is needed")
    if backend == "torch":
        return
    limit = None
    if network != "bitonic":
        limit = f"network='bitonic', not {network!r}"
    elif size > LARGEST_KERNEL_SIZE:
        limit = f"up to {LARGEST_KERNEL_SIZE} numbers, not {size}"
    elif dtype != torch.float32:
        limit = f"float32, not {str(dtype).removeprefix('torch.')}"
    if limit:
        raise ConfigError(f"backend='triton' supports only {limit}; use backend='torch'")
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "backend='triton' needs the package triton, which comes with PyTorch's CUDA builds for Linux; "
            "install one of them, or use backend='torch'"
        )
    if device.type != "cuda":
        from triton import knobs

        if not knobs.runtime.interpret:
            raise ConfigError(f"backend='triton' needs a GPU, not the device {device}; use backend='torch'")


def soft_sort(
    numbers: Float[Tensor, "Q R"],
    network: str = "bitonic",
    steepness: float = 100.0,
    distribution: str = "cauchy",
) -> tuple[Float[Tensor, "Q R"], Float[Tensor, "Q R R"]]:
    """Rows soft-sorted in ascending order, and the weight of each input at each rank.

    Plain tensor operations with autograd, for inspection and small rows; :func:`neco_loss` needs less memory.

    Args:
        numbers: ``(Q, R)``.
        network: ``bitonic`` or ``odd_even``.
        steepness: beta, above 0; large values approach hard sorting.
        distribution: distribution of the comparators.

    Returns:
        ``(Q, R)`` sorted values and ``(Q, R, R)`` weights P: ``P[q, i, j]`` is that of input i at rank j; rows and
        columns sum to 1, and ``values = numbers @ P``.

    Raises:
        ConfigError: as :func:`neco_loss`.
    """
    _check(distribution, steepness)
    size = numbers.shape[1]
    layers = layers_for(network, size, numbers.device, numbers.dtype)
    padded = 2 * layers[0].groups if layers[0].merge else size
    dead = padded - size
    eye = torch.eye(padded, dtype=numbers.dtype, device=numbers.device)[..., None].expand(-1, -1, len(numbers))
    values = torch.nn.functional.pad(numbers, (dead, 0)).T
    matrix = eye
    for layer in layers:
        stop = layer.start + 2 * layer.groups * layer.width
        sign = None if layer.sign is None else layer.sign[..., None]
        a, b = layer.split(values)
        delta = a - b
        gamma, _ = _swap_probability(delta if sign is None else delta * sign, steepness, distribution, False)
        gamma = gamma if sign is None else gamma * sign.abs()

        def move(wires: Tensor, probability: Tensor, layer: Layer = layer, stop: int = stop) -> Tensor:
            a, b = layer.split(wires)
            step = probability * (a - b)
            moved = torch.stack([a - step, b + step], dim=1).flatten(0, 2)
            return torch.cat([wires[: layer.start], moved, wires[stop:]])

        values, matrix = move(values, gamma), move(matrix, gamma.unsqueeze(2))
    return values[dead:].T, matrix[dead:, dead:].permute(2, 1, 0)


def _check(distribution: str, *steepness: float) -> None:
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(f"distribution={distribution!r}: one of {', '.join(DISTRIBUTIONS)} is needed")
    for beta in steepness:
        if not beta > 0:
            raise ConfigError(f"steepness={beta}: a number above 0 is needed")
