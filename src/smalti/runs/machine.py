"""Description of the machine: versions, processor, memory, GPU, commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("smalti", "torch", "torchvision", "timm", "accelerate", "opencv-python-headless", "numpy", "scikit-learn")


def describe_machine() -> dict[str, Any]:
    """Metadata stored with every result: ``versions``, ``machine``, ``commit`` (of a checkout of Smalti)."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in PACKAGES},
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": gpus,
            "system": platform.platform(),
        },
        "commit": source_commit(),
    }


def package_version(name: str) -> str:
    """Installed version of a distribution, or ``not installed``."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def processor_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def source_commit() -> str | None:
    """Commit of the checkout that Smalti runs from, with ``+`` if files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short", "HEAD")
        return f"{commit}{'+' if _git(folder, 'status', '--porcelain', '--untracked-files=no') else ''}"
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
