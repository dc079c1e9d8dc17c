"""What the processes of a run have in common: numbers over the joined batch of all of them.

Without a process group, or with a group of one, everything here is what it is on one process. All processes must make
the same calls in the same order. No gradient crosses from one process to another: each has its own share, scaled so
that the mean of the gradients over processes, which data-parallel training takes, is that of the joined batch.
"""

import torch
import torch.distributed
from jaxtyping import Float, Num, Shaped
from torch import Tensor


def num_processes() -> int:
    """Processes that train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def of_all_processes(x: Shaped[Tensor, "*S"], dim: int) -> Shaped[Tensor, "*T"]:
    """The tensors of all processes, of one shape, joined in their order; without gradient."""
    if num_processes() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(num_processes())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=dim)


def sum_over_processes(x: Num[Tensor, "*S"]) -> Num[Tensor, "*S"]:
    """The sum of the processes' tensors, without gradient."""
    return _reduced(x, torch.distributed.ReduceOp.SUM) if num_processes() > 1 else x.detach()


def max_over_processes(x: Num[Tensor, "*S"]) -> Num[Tensor, "*S"]:
    """The largest of the processes' values, each on its own, without gradient."""
    return _reduced(x, torch.distributed.ReduceOp.MAX) if num_processes() > 1 else x.detach()


def mean_over_processes(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """The mean of the processes' tensors; the gradient is that of the own part, as if it were all."""
    if num_processes() == 1:
        return x
    return x + (sum_over_processes(x) / num_processes() - x.detach())


def weighted_mean(values: Float[Tensor, "*S"], weights: Num[Tensor, "*S"]) -> Float[Tensor, ""]:
    """``sum(weights * values) / sum(weights)``, the lower sum over the joined batch, so that the mean of what the
    processes return is the joined batch's; 0 where no weight is.

    Args:
        values: of any shape.
        weights: at least 0; bool or int serve, too.
    """
    total = sum_over_processes(weights.sum().to(values.dtype))
    total = torch.where(total > 0, total, 1.0)  # no weight anywhere: 0 / 1
    return (values * weights.detach()).sum() * num_processes() / total


def _reduced(x: Tensor, operation: torch.distributed.ReduceOp.RedOpType) -> Tensor:
    own = x.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(own, operation)
    return own
