"""How many threads a command computes with, and how long they spin at a barrier before they sleep.

PyTorch's defaults suit a machine that nobody else uses: a thread on every core, also on cores that a container's quota
takes away, and about 300,000 turns of a waiting loop before a thread that is done with its part of the work gives its
core up. Beside other work such threads wait for one another in the time slices that they need to compute.

OpenMP reads the environment once, when torch is imported. So :func:`set_environment` runs at the start of the command
``smalti``, and never on ``import smalti``: a host program keeps its threads.
"""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

SPIN_COUNT = 10_000
"""Turns of libgomp's waiting loop (a fraction of a millisecond); measured in docs/evidence/benchmarks.md."""
BLOCK_TIME_MS = 1
"""The same for Intel's and LLVM's OpenMP, whose default is 200; not measured."""
OURS = "SMALTI_THREADS"
"""Holds the number that we wrote into OMP_NUM_THREADS, so that our own processes can tell it from a user's."""


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may keep busy: its CPU affinity, and the quota of its control groups rounded down.

    Threads beyond a quota are stopped for the rest of each period, while the others wait for them at the next barrier.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the control groups of this process allow, versions 1 and 2; None: no limit.

    The smallest quota of the group and of those around it counts. A container often sees its own group as the root of
    the mount, while ``/proc/self/cgroup`` has the host's path: folders that are not there are passed over.
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
            quotas += [_quota_v2(folder) for folder in _around(mount, group)]
        elif "cpu" in controllers.split(","):
            for name in dict.fromkeys((controllers, "cpu")):
                quotas += [_quota_v1(folder) for folder in _around(mount / name, group)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _around(mount: Path, group: str) -> list[Path]:
    """The folder of a group and of all groups around it, up to the mount."""
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
    """Choose threads and spinning for this process and those that it starts, where the user has not.

    Does nothing once torch is imported: it has read its environment, and this is somebody's Python, not the command.
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
    """Whether OMP_NUM_THREADS is what :func:`set_environment` wrote, here or in the process that started this one."""
    return os.environ.get("OMP_NUM_THREADS", "") == os.environ.get(OURS)


def chosen_by_user() -> bool:
    """Whether OMP_NUM_THREADS is a user's (or torchrun's) and has to be kept."""
    return "OMP_NUM_THREADS" in os.environ and not chosen_by_command()
