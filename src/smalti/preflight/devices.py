"""Processor, memory and GPUs of this machine, within the limits of a container."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from smalti.preflight.dataset import fact_line
from smalti.runs.machine import describe_machine
from smalti.threads import usable_cores

MARGIN = 0.1
"""Fraction of the free memory kept in reserve, since the memory of a step varies."""
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """A GPU."""

    name: str
    total_mib: float
    free_mib: float
    bf16: bool
    """Whether it supports bfloat16."""


@dataclass(frozen=True)
class Hardware:
    """Processor, memory and GPUs available to this process."""

    processor: str
    cores: int
    """Number of cores that this process may use."""
    total_mib: float
    free_mib: float
    """Main memory available to a run; within a container's limit, if there is one."""
    gpus: tuple[Gpu, ...]

    def lines(self) -> list[str]:
        """One line per device."""
        result = [
            fact_line("processor", f"{self.processor}, {self.cores} core{'s' * (self.cores != 1)}"),
            fact_line("memory", f"{self.free_mib / 1024:.1f} of {self.total_mib / 1024:.1f} GiB free"),
        ]
        for number, gpu in enumerate(self.gpus):
            memory = f"{gpu.free_mib / 1024:.1f} of {gpu.total_mib / 1024:.1f} GiB free"
            result.append(fact_line(f"GPU {number}", f"{gpu.name}, {memory}, {'bf16' if gpu.bf16 else 'no bf16'}"))
        return result if self.gpus else [*result, fact_line("GPU", "none")]


def find_devices() -> Hardware:
    """Processor, memory and GPUs of this machine, as this process may use them."""
    machine: dict[str, Any] = describe_machine()["machine"]
    gpus = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        with torch.cuda.device(number):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        gpus.append(Gpu(torch.cuda.get_device_name(number), total / _MIB, free / _MIB, bf16))
    total, free = main_memory()
    return Hardware(machine["processor"], usable_cores(), total / _MIB, free / _MIB, tuple(gpus))


def free_bytes(device: torch.device) -> float:
    """Memory of a device available to this process, less :data:`MARGIN`."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) * (1 - MARGIN)
    return main_memory()[1] * (1 - MARGIN)


def main_memory() -> tuple[int, int]:
    """Total and free main memory in bytes, within the limit of a container."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit_file, used_file in _CGROUP_FILES:
        try:
            limit, used = (int(Path(file).read_text(encoding="ascii")) for file in (limit_file, used_file))
        except (OSError, ValueError):  # no container, or one without a limit ("max")
            continue
        return min(total, limit), max(min(free, limit - used), 0)
    return total, free
