"""Half precision: where it is available, and where float32 is needed."""

import torch
from jaxtyping import Float
from torch import Tensor


def has_bf16(kind: str) -> bool:
    """Whether a device type supports bfloat16 natively; GPUs that emulate it are slower than in float32.

    Args:
        kind: ``cuda`` or ``cpu``, as ``torch.device.type``; False for a CPU, where bfloat16 is rarely faster.
    """
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def multiplies_bf16(kind: str) -> bool:
    """Whether torch multiplies matrices in bfloat16 under autocast on a device type, natively or not.

    Args:
        kind: ``cuda`` or ``cpu``.
    """
    ones = torch.ones(2, 2, device=kind)
    try:
        with torch.autocast(kind, torch.bfloat16):
            return (ones @ ones).dtype == torch.bfloat16
    except RuntimeError:  # this build of torch has no such product
        return False


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Convert half types to float32, keep float32 and float64: for softmax, logarithms and sums of many terms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
