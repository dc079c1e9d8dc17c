"""SLURM: processes that srun starts, and batch scripts.

``srun`` starts one process per task and describes the step in variables of its own; torch reads those of torchrun.
"""

import os
import re
from collections.abc import MutableMapping

import torch

_FIRST_PORT, _NUM_PORTS = 20_000, 20_000


def join_step(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set torch's variables (``RANK``, ``WORLD_SIZE`` and others) from those of a step of several tasks that srun
    started. Nothing happens without such a step, or if another launcher has set them.

    The batch script itself is not in a step, although it has the number of tasks of its job (``SLURM_NTASKS``).

    Args:
        environment: changed in place.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1 or "WORLD_SIZE" in environment:
        return
    node, local = int(environment.get("SLURM_NODEID", "0")), environment["SLURM_LOCALID"]
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    own = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": "0" if torch.cuda.device_count() == 1 else local,  # --gpus-per-task hides those of other tasks
        "LOCAL_WORLD_SIZE": str(tasks_of_nodes(environment["SLURM_STEP_TASKS_PER_NODE"])[node]),
    }
    environment.update(own)
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + (job * 31 + step) % _NUM_PORTS))


def tasks_of_nodes(text: str) -> list[int]:
    """Numbers of tasks of the nodes of a step, as SLURM writes them.

    Example:
        >>> tasks_of_nodes("2(x3),1")
        [2, 2, 2, 1]
    """
    counts: list[int] = []
    for part in text.split(","):
        count, _, repeated = part.partition("(x")
        counts += [int(count)] * int(repeated.rstrip(")") or 1)
    return counts


def first_host(text: str) -> str:
    """The first name of a list of hosts, as SLURM writes it.

    Example:
        >>> first_host("gpu[007-009,012],login"), first_host("a1,a2"), first_host("rack1-[3,5]-ib")
        ('gpu007', 'a1', 'rack1-3-ib')
    """
    parts = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", text)
    assert parts is not None, text
    return "".join(part or "" for part in parts.groups())
