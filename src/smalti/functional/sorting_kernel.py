"""Triton kernel for the matrices of NeCo's sorting loss, which are never written to the GPU's memory.

Letters: those of :mod:`smalti.functional.sorting`; L layers of H = K / 2 comparators (each layer of a bitonic network
has as many), q rows at a time, T inputs per program.

The numbers are sorted by tensor operations on ``(H, q)``, which compute the gammas and receive their gradients. A
program processes one row and T of its inputs. Given the gammas, the weights of an input on the wires are independent of
the other inputs, so a program runs all layers: the teacher's weights, the student's, the loss, and back through the
student's layers. It keeps the differences ``a - b`` of each layer in registers and writes one gradient per comparator,
summed over its inputs. Programs are independent, and their sums are added in a fixed order, so results are
deterministic. Unlike in the torch backend, blocks of the matrices that are zero before a merge are also processed.

With ``TRITON_INTERPRET=1`` in the environment, the kernel runs in Triton's interpreter, also on a CPU, for tests.
No GPU has run it yet (``benchmarks/sorting_gpu.py`` measures it).
"""

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from smalti.functional.sorting_networks import SMALLEST, Layer

_KEPT = 96  # differences per thread, which has at most 255 registers


@triton.jit
@no_type_check
def _split(wires, INPUTS: tl.constexpr, WIRES: tl.constexpr, WIDTH: tl.constexpr):
    """Wires a and b of a layer's comparators: (T, K) -> twice (T, groups, width)."""
    pairs = tl.reshape(wires, [INPUTS, WIRES // (2 * WIDTH), 2, WIDTH])
    return tl.split(tl.permute(pairs, (0, 1, 3, 2)))


@triton.jit
@no_type_check
def _join(a, b, INPUTS: tl.constexpr, WIRES: tl.constexpr):
    """The inverse: twice (T, groups, width) -> (T, K)."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 1, 3, 2)), [INPUTS, WIRES])


@triton.jit
@no_type_check
def _gammas(layer_start, WIRES: tl.constexpr, WIDTH: tl.constexpr):
    """A layer's gammas, for all inputs: (1, groups, width)."""
    gammas = tl.load(layer_start + tl.arange(0, WIRES // 2))
    return tl.reshape(gammas, [1, WIRES // (2 * WIDTH), WIDTH])


@triton.jit
@no_type_check
def _order_kernel(
    student,  # (q, L, H) gammas
    teacher,  # (q, L, H)
    costs,  # (blocks, q)
    of_gammas,  # (blocks, q, L, H), or None without gradient
    SIZE: tl.constexpr,
    WIRES: tl.constexpr,
    WIDTHS: tl.constexpr,  # widths of the layers
    INPUTS: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    LAYERS: tl.constexpr = len(WIDTHS)
    HALF: tl.constexpr = WIRES // 2
    DEAD: tl.constexpr = WIRES - SIZE
    row, block = tl.program_id(0), tl.program_id(1)
    of_row = row * (LAYERS * HALF)
    place = block * tl.num_programs(0) + row  # index in the outputs
    inputs = block * INPUTS + tl.arange(0, INPUTS)
    wires = tl.arange(0, WIRES)
    is_real = (wires[None, :] >= DEAD) & (inputs[:, None] < SIZE)
    start = tl.where(wires[None, :] == inputs[:, None] + DEAD, 1.0, 0.0)  # all weight on an input's own wire

    target = start
    for layer in tl.static_range(LAYERS):
        gamma = _gammas(teacher + of_row + layer * HALF, WIRES, WIDTHS[layer])
        a, b = _split(target, INPUTS, WIRES, WIDTHS[layer])
        moved = gamma * (a - b)
        target = _join(a - moved, b + moved, INPUTS, WIRES)
    target = tl.where(is_real, target, 0.0)

    pred = start
    kept = ()
    for layer in tl.static_range(LAYERS):
        gamma = _gammas(student + of_row + layer * HALF, WIRES, WIDTHS[layer])
        a, b = _split(pred, INPUTS, WIRES, WIDTHS[layer])
        difference = a - b
        moved = gamma * difference
        pred = _join(a - moved, b + moved, INPUTS, WIRES)
        if of_gammas is not None:
            kept = kept + (difference,)  # noqa: RUF005 (Triton's compiler doesn't support it)
    is_clamped = pred <= SMALLEST  # False for NaN, which propagates to loss and gradient
    alive = tl.where(is_clamped, SMALLEST, pred)
    tl.store(costs + place, tl.sum(tl.sum(target * tl.log(alive), axis=1), axis=0))

    if of_gammas is not None:
        grad = tl.where(is_clamped, 0.0, target / alive)
        for layer in tl.static_range(LAYERS - 1, -1, -1):
            gamma = _gammas(student + of_row + layer * HALF, WIRES, WIDTHS[layer])
            a, b = _split(grad, INPUTS, WIRES, WIDTHS[layer])
            difference = a - b
            moved = gamma * difference
            grad = _join(a - moved, b + moved, INPUTS, WIRES)
            of_gamma = tl.reshape(tl.sum(difference * kept[layer], axis=0), [HALF])
            tl.store(of_gammas + (place * LAYERS + layer) * HALF + tl.arange(0, HALF), -of_gamma)


def program_shape(layers: tuple[Layer, ...]) -> tuple[int, int]:
    """Inputs and warps per program, such that what the backward pass needs fits into registers."""
    wires = 2 * layers[0].groups
    warps = max(4, wires // 16)
    kept = len(layers) * wires // 2  # per input
    most = _KEPT * 32 * warps // kept
    return min(wires, 1 << (most.bit_length() - 1)), warps


def rows_at_once(layers: tuple[Layer, ...], size: int, budget: int) -> int:
    """Number of rows whose gates and partial gradients need at most ``budget`` bytes, at least 1."""
    comparators = len(layers) * layers[0].groups
    blocks = triton.cdiv(size, program_shape(layers)[0])
    gates = 7  # gamma of both; delta, slope, gradient; two passing
    copies = 5  # gammas of both with rows first, and a temporary; summed gradients, with rows first and last
    return max(1, budget // (4 * comparators * (gates + copies + blocks)))


def add_order_cost(
    total: Float[Tensor, ""],
    layers: tuple[Layer, ...],
    student: Sequence[Float[Tensor, "_ _ q"]],
    teacher: Sequence[Float[Tensor, "_ _ q"]],
    size: int,
    needs_grad: bool,
) -> list[Tensor]:
    """Subtract the sum of ``Q log P`` of some rows from a total.

    Args:
        total: float64; modified in place.
        layers: layers of a bitonic network.
        student: the student's gammas of each layer, ``(groups, width, q)``, float32.
        teacher: the teacher's gammas.
        size: R, up to 256.
        needs_grad: compute the gradient.

    Returns:
        Gradients **of the sum** (not of the cost, which is its negative) for the student's gammas; else nothing.
    """
    wires, number = 2 * layers[0].groups, student[0].shape[-1]
    inputs, warps = program_shape(layers)
    blocks = triton.cdiv(size, inputs)
    gammas = [_rows_first(one) for one in (student, teacher)]
    costs = gammas[0].new_empty(blocks, number)
    parts = gammas[0].new_empty(blocks, *gammas[0].shape) if needs_grad else None
    with torch.cuda.device_of(costs):  # type: ignore[no-untyped-call]  # Triton launches there; no effect on a CPU
        _order_kernel[(number, blocks)](
            *gammas,
            costs,
            parts,
            SIZE=size,
            WIRES=wires,
            WIDTHS=tuple(layer.width for layer in layers),
            INPUTS=inputs,
            SMALLEST=SMALLEST,
            num_warps=warps,
        )
    total -= costs.sum(dtype=torch.float64)
    if parts is None:
        return []
    of_gammas = parts.sum(0).permute(1, 2, 0).contiguous()  # (L, H, q)
    return [one.unflatten(0, (layer.groups, layer.width)) for one, layer in zip(of_gammas, layers, strict=True)]


def _rows_first(gammas: Sequence[Float[Tensor, "_ _ q"]]) -> Float[Tensor, "q L H"]:
    """Gammas of all layers in one contiguous tensor."""
    return torch.stack([one.flatten(0, 1) for one in gammas]).permute(2, 0, 1).contiguous()
