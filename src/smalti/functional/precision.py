"""Where half precision is not enough."""

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half types become float32, float32 and float64 stay: for softmax, logarithms and sums of many terms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
