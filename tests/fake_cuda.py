"""Tensors that claim to be on a GPU, on a machine that has none: device mismatches raise, waits for the GPU are listed.

A training step can be run with them as far as shapes, types and devices go; there are no numbers.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import smalti
from smalti.functional.sorting_networks import layers_for

HALF = (torch.bfloat16, torch.float16)
FULL_PRECISION_ONLY = frozenset(
    "cholesky cholesky_ex cholesky_inverse cholesky_solve cond det eig eigh eigvals eigvalsh householder_product inv "
    "inv_ex inverse ldl_factor ldl_factor_ex ldl_solve logdet lstsq lu lu_factor lu_factor_ex lu_solve matrix_exp "
    "matrix_power matrix_rank orgqr pca_lowrank pinv pinverse polar qr slogdet solve solve_ex solve_triangular svd "
    "svd_lowrank svdvals tensorinv tensorsolve triangular_solve cdist".split()
)
"""Functions of torch and torch.linalg that have no half precision on a GPU."""
_TAKES_CPU = frozenset(("copy_", "fill_", "index", "index_put", "index_put_", "masked_fill", "masked_fill_"))
"""Operations beside the pointwise ones that take a tensor on the CPU for one on the GPU."""
_PACKAGE = Path(smalti.__file__).parent


class FakeCuda(FakeTensorMode):
    """While this is active, tensors made on or moved to ``cuda`` are fake; those on the CPU are real.

    Masks and plans are drawn on the CPU from real numbers, so a batch is real until it is moved.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=False)
        self.waits: list[str] = []
        """Where the host would wait for the GPU: ``file:line what``."""
        self.may_wait = True
        """Waits are not listed: while a run is set up, and at the moments when the log is written."""
        self._pinned: list[Tensor] = []

    def __enter__(self) -> "FakeCuda":
        layers_for.cache_clear()  # keeps tensors by device
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        layers_for.cache_clear()

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation: with real tensors as it is, otherwise without numbers."""
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        name = func._schema.name.removeprefix("aten::")
        if name in ("is_pinned", "_pin_memory"):
            return self._pin(name, args[0])
        target = next((x for x in leaves if isinstance(x, torch.device)), None)
        on_gpu = target is not None and target.type == "cuda"
        if not fakes and not on_gpu:
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            self._wait("a number is read")
            return _any_number(args[0].dtype)
        if name == "_to_copy" and on_gpu and not fakes:
            is_pinned = any(args[0] is other for other in self._pinned)
            if not (is_pinned and kwargs.get("non_blocking")):
                self._wait("a copy to the GPU, not from pinned memory or not non_blocking")
        elif name == "_to_copy" and target is not None and not on_gpu:
            self._wait("a copy to the CPU")
        elif name in ("index", "index_put", "index_put_", "copy_") and any(
            x.device.type == "cpu" and x.ndim for x in tensors
        ):
            self._wait(f"{name} with a tensor on the CPU")
        if name.removeprefix("_").removeprefix("linalg_") in FULL_PRECISION_ONLY:
            _refuse_half(name, tensors)
        devices = {x.device for x in tensors}
        if len(devices) > 1 and torch.Tag.pointwise not in func.tags and name not in _TAKES_CPU:
            raise RuntimeError(f"{name} of tensors on {sorted(map(str, devices))}")
        # a number on the CPU takes part in pointwise operations; longer tensors raise in there
        args, kwargs = tree_map(
            lambda x: self.from_tensor(x) if isinstance(x, Tensor) and not isinstance(x, FakeTensor) else x,
            (args, kwargs),
        )
        try:
            return super().dispatch(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise AssertionError(f"{_place()}: the host must wait for the result of {name}") from error

    @contextmanager
    def waits_are_listed(self) -> Iterator[None]:
        """The part of a step in which the host must not wait."""
        self.may_wait = False
        try:
            yield
        finally:
            self.may_wait = True

    def _pin(self, name: str, x: Tensor) -> Any:
        is_pinned = any(x is other for other in self._pinned)
        if name == "is_pinned":
            return is_pinned
        self._pinned.append(x if is_pinned else x.clone())
        return self._pinned[-1]

    def _wait(self, what: str) -> None:
        if self.may_wait:
            return
        self.waits.append(f"{_place()}: {what}")


class HalfLinalgRefused(TorchFunctionMode):
    """While this is active, decompositions and solvers refuse half precision, which a GPU does not have for them.

    It sees a call before autocast does: on the CPU, autocast runs these functions in float32, on a GPU it does not.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").removeprefix("linalg_")
        if name in FULL_PRECISION_ONLY:
            _refuse_half(name, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)])
        return func(*args, **(kwargs or {}))


@contextmanager
def bf16_autocast(device_type: str) -> Iterator[None]:
    """What Accelerate wraps around a forward; for ``cuda`` torch is made to believe that there is a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        with torch.autocast(device_type, torch.bfloat16):
            yield


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """``loss.backward()`` along the recorded graph: torch's own engine wants a real GPU for tensors that claim one.

    Raises:
        AssertionError: where a gradient is on another device than what it belongs to.
    """
    grads: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    for node in _in_order(loss.grad_fn):
        found = grads.pop(node, {})
        if not found:
            continue
        if hasattr(node, "variable"):  # a leaf
            leaf, grad = node.variable, found[0]
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad
            continue
        given = [found.get(place, _zeros(meta)) for place, meta in enumerate(node._input_metadata)]
        edges = node.next_functions
        if isinstance(node, torch.autograd.function.BackwardCFunction):  # written in Python
            results = _as_tuple(node.apply(*given))
            results = tuple(x for x, is_needed in zip(results, node.needs_input_grad, strict=True) if is_needed)
            edges = tuple(edge for edge in edges if edge[0] is not None)
        else:
            results = _as_tuple(node(*given))
        for (follower, place), grad in zip(edges, results, strict=True):
            if follower is None or grad is None:
                continue
            meta = follower._input_metadata[place]
            assert grad.device == meta.device, f"{node.name()}: a gradient on {grad.device} of what is on {meta.device}"
            grad = grad.sum_to_size(meta.shape).to(meta.dtype)
            held = grads.setdefault(follower, {})
            held[place] = grad if place not in held else held[place] + grad


def _as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def _in_order(root: Any) -> list[Any]:
    """All nodes of a graph, each before those that its gradients go to."""
    order: list[Any] = []
    seen, stack = {root}, [(root, iter(root.next_functions))]
    while stack:
        node, rest = stack[-1]
        for follower, _ in rest:
            if follower is not None and follower not in seen:
                seen.add(follower)
                stack.append((follower, iter(follower.next_functions)))
                break
        else:
            order.append(node)
            stack.pop()
    return order[::-1]


def _zeros(meta: Any) -> Tensor:
    return torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)


def _place() -> str:
    """The line of Smalti that is being run."""
    frames = [frame for frame in traceback.extract_stack() if _PACKAGE in Path(frame.filename).parents]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside of smalti"


def _any_number(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 0.5 if dtype.is_floating_point else 1


def _refuse_half(name: str, tensors: list[Tensor]) -> None:
    if any(x.dtype in HALF for x in tensors):
        raise RuntimeError(f"{name} of {[x.dtype for x in tensors]}: a GPU has no half precision for this")
