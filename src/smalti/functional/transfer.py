"""From the CPU to the device without making the CPU wait."""

import torch
from torch import Tensor


def move(x: Tensor, device: torch.device) -> Tensor:
    """A tensor from the CPU on a device: through page-locked memory, since a copy from other memory waits until the GPU
    has done everything that it was given. ``torch.tensor(values, device=...)`` is such a copy, too."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
