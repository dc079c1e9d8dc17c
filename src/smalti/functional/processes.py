"""Statistics over the joint batch of all processes of a run.

Without a process group, or with a group of one, the functions return the value of the one process. All processes must
make the same calls in the same order. No gradients cross between processes: each has its own part, scaled so that the
mean of gradients over processes, which data-parallel training takes, is that of the joint batch.
"""

import torch
import torch.distributed
from jaxtyping import Float, Num, Shaped
from torch import Tensor


def num_processes() -> int:
    """Number of processes that train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def of_all_processes(x: Shaped[Tensor, "*S"], dim: int) -> Shaped[Tensor, "*T"]:
    """Concatenate the tensors of all processes, which have equal shapes; without gradient."""
    if num_processes() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(num_processes())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=dim)


def own_part(x: Tensor) -> Tensor:
    """This process's part of a tensor that is sharded over processes (FSDP2), sharing its memory; any other tensor as
    it is."""
    return x.to_local() if hasattr(x, "to_local") else x  # a DTensor, whose module takes a second to import


def sum_over_processes(x: Num[Tensor, "*S"]) -> Num[Tensor, "*S"]:
    """Sum over processes, without gradient."""
    return _reduced(x, torch.distributed.ReduceOp.SUM) if num_processes() > 1 else x.detach()


def max_over_processes(x: Num[Tensor, "*S"]) -> Num[Tensor, "*S"]:
    """Element-wise maximum over processes, without gradient."""
    return _reduced(x, torch.distributed.ReduceOp.MAX) if num_processes() > 1 else x.detach()


def mean_over_processes(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Mean over processes; the gradient is that of the process's own part, as if it were all."""
    if num_processes() == 1:
        return x
    return x + (sum_over_processes(x) / num_processes() - x.detach())


def weighted_mean(values: Float[Tensor, "*S"], weights: Num[Tensor, "*S"]) -> Float[Tensor, ""]:
    """``sum(weights * values) / sum(weights)``, with the sum of weights over the joint batch, so that the mean of the
    processes' results is that of the joint batch; 0 if all weights are 0.

    Args:
        values: of any shape.
        weights: at least 0; float or int.
    """
    total = sum_over_processes(weights.sum().to(values.dtype))
    total = torch.where(total > 0, total, 1.0)  # all weights are 0: 0 / 1
    return (values * weights.detach()).sum() * num_processes() / total


def _reduced(x: Tensor, operation: torch.distributed.ReduceOp.RedOpType) -> Tensor:
    own = x.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(own, operation)
    return own
