"""Where there is half precision, and where it is not enough."""

import torch
from jaxtyping import Float
from torch import Tensor


def has_bf16(kind: str) -> bool:
    """Whether a kind of device computes in bfloat16 itself; GPUs that emulate it are slower than in float32.

    Args:
        kind: ``cuda`` or ``cpu``, as ``torch.device.type``; of a CPU this is False, as bfloat16 seldom pays there.
    """
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half types become float32, float32 and float64 stay: for softmax, logarithms and sums of many terms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
