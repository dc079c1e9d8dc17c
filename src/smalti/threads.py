"""Number of compute threads of a command, and how long they spin at a barrier before they sleep.

PyTorch's defaults suit a machine without other load: one thread per core, even for cores excluded by a container's
quota, and about 300,000 iterations of a spin loop before an idle thread releases its core. Under other load, spinning
threads use up the time slices that the computing ones need.

OpenMP reads the environment once, when torch is imported. So :func:`set_environment` runs at the start of the command
``smalti``, and never on ``import smalti``: a host program keeps its threads.
"""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

SPIN_COUNT = 10_000
"""Iterations of libgomp's spin loop (a fraction of a millisecond); measured in docs/evidence/benchmarks.md."""
BLOCK_TIME_MS = 1
"""The same for Intel's and LLVM's OpenMP, whose default is 200; not measured."""
OURS = "SMALTI_THREADS"
"""Variable with the number that we wrote into OMP_NUM_THREADS, so that child processes can distinguish it from a
user's."""


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its CPU affinity, and the quota of its control groups rounded down.

    Threads beyond the quota are suspended for the rest of each period, while the others wait for them at the next
    barrier.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPU quota, in cores, of this process's control groups (versions 1 and 2); None: no limit.

    The smallest quota of the group and its parents counts. A container often sees its own group as the root of the
    mount, while ``/proc/self/cgroup`` has the host's path: missing folders are skipped.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    mount = root / "sys/fs/cgroup"
    quotas = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:  # version 2
            quotas += [_quota_v2(folder) for folder in _with_parents(mount, group)]
        elif "cpu" in controllers.split(","):
            for name in dict.fromkeys((controllers, "cpu")):
                quotas += [_quota_v1(folder) for folder in _with_parents(mount / name, group)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _with_parents(mount: Path, group: str) -> list[Path]:
    """The folders of a group and of its parents, up to the mount."""
    parts = [part for part in group.split("/") if part and part != ".."]
    return [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota, period = (
            int((folder / name).read_text(encoding="utf-8")) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def set_environment(environment: MutableMapping[str, str] | None = None) -> None:
    """Set threads and spinning for this process and its children, unless the user has set them.

    Does nothing once torch is imported: it has read its environment, and the process is a host program, not the
    command.
    """
    if environment is None:
        if "torch" in sys.modules:
            return
        environment = os.environ
    if "OMP_NUM_THREADS" not in environment:
        environment["OMP_NUM_THREADS"] = environment[OURS] = str(usable_cores())
    environment.setdefault("OPENCV_FOR_THREADS_NUM", "1")  # data workers are processes
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
        environment.setdefault("KMP_BLOCKTIME", str(BLOCK_TIME_MS))


def chosen_by_command() -> bool:
    """Whether OMP_NUM_THREADS was set by :func:`set_environment`, here or in the parent process."""
    return os.environ.get("OMP_NUM_THREADS", "") == os.environ.get(OURS)


def chosen_by_user() -> bool:
    """Whether OMP_NUM_THREADS was set by the user (or torchrun) and must be kept."""
    return "OMP_NUM_THREADS" in os.environ and not chosen_by_command()
