"""Several processes: each has all of the method (DDP), or a slice of every parameter, gradient and moment (FSDP2).

With FSDP2 the parameters of a transformer block are gathered just before it runs and freed after it; those outside of
blocks are gathered while the method runs. Between steps, a parameter is a ``DTensor`` that holds this process's rows.

Source: torch's ``fully_shard``; Zhao et al., PyTorch FSDP, arXiv:2304.11277.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from smalti.errors import ConfigError
from smalti.layers.stochastic_depth import StochasticDepth
from smalti.methods.base import Method

K = TypeVar("K")
Parallel = Literal["ddp", "fsdp"]


def check_parallel(method: Method, kind: Parallel) -> None:
    """Refuse to shard a method that can't be.

    Raises:
        ConfigError: for a parameter without dimensions, which has no rows.
    """
    scalars = [name for name, parameter in method.named_parameters() if parameter.ndim == 0]
    if kind == "fsdp" and scalars:
        raise ConfigError(f"parallel=fsdp: {method.name} has a parameter that is one number ({scalars[0]}); use ddp")


def shard(method: Method, device: torch.device) -> None:
    """Replace the parameters of a method by this process's rows of them, in place; blocks become units of their own.

    All processes call this, with equal parameters, before the optimiser is built.

    Args:
        method: on its device, not wrapped.
        device: of this process.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for unit in _units(method):
        fully_shard(unit, mesh=mesh)
    fully_shard(method, mesh=mesh)


def _units(method: Method) -> Iterator[nn.Module]:
    """What is gathered at a time: blocks that are only run as a whole, and the two branches of those with stochastic
    depth, which is run branch by branch. The parts of other blocks are called from outside and would not be there."""
    if method.runs_parts_of_blocks:
        return
    apart = {
        block for encoder in method.networks().values() if encoder.gaug is not None for block in encoder.vit.blocks
    }
    for module in [*method.modules()]:
        if isinstance(module, (Block, EvaBlock, EvaBlockPostNorm)) and module not in apart:
            is_whole = not isinstance(module.drop_path1, StochasticDepth)
            yield from (module,) if is_whole else (module.attn, module.mlp)


def is_sharded(method: nn.Module) -> bool:
    """Whether :func:`shard` was called."""
    return isinstance(method, FSDPModule)


def prepare(accelerator: Accelerator, method: Method, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """The method wrapped for autocast, and for DDP unless it is sharded; and the wrapped optimiser."""
    if is_sharded(method):
        return accelerator.prepare_model(method, evaluation_mode=True), accelerator.prepare(optimizer)
    return accelerator.prepare(method, optimizer)


@contextlib.contextmanager
def callable_parts(method: Method) -> Iterator[None]:
    """Within the block, parts of a sharded method can be called other than through its forward pass, for example an
    encoder. All processes make the same calls, without gradient."""
    if not isinstance(method, FSDPModule):
        yield
        return
    method.unshard()
    try:
        yield
    finally:
        method.reshard()


def gathered(values: Mapping[K, Any], keep: bool) -> dict[K, Any]:
    """A state dict with whole tensors, on the CPU where they were sharded; nested mappings and lists are copied.

    All processes call this together, with the same keys.

    Args:
        values: of a method or an optimiser.
        keep: whether this process needs the result; without, sharded tensors become empty.
    """
    return {key: _gathered(value, keep) for key, value in values.items()}


def _gathered(value: Any, keep: bool) -> Any:
    if isinstance(value, Mapping):
        return gathered(value, keep)
    if isinstance(value, list):
        return [_gathered(part, keep) for part in value]
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor().detach()
    return whole.cpu() if keep else whole.new_empty(0)


def rows_like(whole: Any, own: Tensor) -> Any:
    """This process's rows of a whole tensor, if ``own`` is sharded and of its shape; anything else as it is."""
    if not isinstance(own, DTensor) or not isinstance(whole, Tensor) or whole.shape != own.shape:
        return whole
    moved = whole.to(own.device)
    return distribute_tensor(moved, own.device_mesh, own.placements, src_data_rank=None)  # no communication


def optimizer_rows(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state dict of an optimiser, with the moments cut as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {key: rows_like(value, parameters[number]) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}
