"""Copies from the CPU to a device without synchronisation."""

import torch
from torch import Tensor


def move(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device through pinned memory. A copy from other memory, such as
    ``torch.tensor(values, device=...)``, waits until the GPU has finished all queued work."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
