"""SLURM: processes that srun starts, and batch scripts.

``srun`` starts one process per task and describes the step in variables of its own; torch reads those of torchrun.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from smalti.config import Count, CountFromZero, build, settings
from smalti.errors import ConfigError, RunError, exit_code

Word = Annotated[str, Field(pattern=r"^[^\s'\"\\]+$")]
"""Text without blanks and quotes, as a batch script takes it."""
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


@settings
class SlurmConfig:
    """What a job asks SLURM for; None: the cluster's default."""

    nodes: Count = 1
    """Machines."""
    gpus: CountFromZero = 1
    """GPUs per machine, with a process each; 0: one process per machine, on its CPU."""
    cpus: Count | None = None
    """Cores per process."""
    mem: Word | None = None
    """Memory per machine, such as 128G."""
    time: Word | None = None
    """Time limit, such as 12:00:00 or 2-00:00:00; the job is requeued before it."""
    partition: Word | None = None
    """Partition."""
    account: Word | None = None
    """Account."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Features of the machines."""
    warning_s: Count = 120
    """Seconds before the time limit at which SLURM sends SIGUSR1; a step and a checkpoint must fit."""

    @property
    def processes(self) -> int:
        """Number of processes of the run."""
        return self.nodes * max(self.gpus, 1)


def parse_slurm(text: str) -> SlurmConfig:
    """Read ``partition=gpu,nodes=2,gpus=8``.

    Raises:
        ConfigError: for an unknown key, or a value that can't be used.
    """
    pairs = [part.partition("=") for part in text.split(",") if part]
    for key, equals, value in pairs:
        if not equals or not value:
            raise ConfigError(f"--slurm: '{key}' is not of the form KEY=VALUE; write for example nodes=2,gpus=8")
    return build(SlurmConfig, {key: value for key, _, value in pairs}, "--slurm")


def batch_script(config: SlurmConfig, command: Sequence[str], log: Path) -> str:
    """A script for ``sbatch`` that runs a command in every process of a job, and requeues the job near its time limit.

    Args:
        config: what the job asks for.
        command: the command, in words, which continues where it was interrupted.
        log: file for what it prints, without suffix; the number of the job is appended.

    Raises:
        ConfigError: for a log whose path SLURM would read differently.
    """
    if re.search(r"[\s'\"\\%]", str(log)):
        raise ConfigError(f"{log}: a path without blanks, quotes and % is needed for the log of a SLURM job")
    options = {
        "job-name": log.name,
        "output": f"{log}-%j.log",
        "open-mode": "append",
        "nodes": config.nodes,
        "ntasks-per-node": max(config.gpus, 1),
        "gpus-per-node": config.gpus or None,
        "cpus-per-task": config.cpus,
        "mem": config.mem,
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "signal": f"USR1@{config.warning_s}",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    cpus = f"--cpus-per-task={config.cpus} " if config.cpus else ""  # srun doesn't take it from sbatch
    script = f"""\
srun {cpus}--wait=60 {shlex.join(command)}
code=$?
if [ $code -eq {exit_code(signal.SIGUSR1)} ]; then  # SIGUSR1: the time limit is near
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""
    return "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue", "", script])


def submit(script: str) -> str:
    """Hand a batch script to ``sbatch``; returns what it prints, with the number of the job.

    Raises:
        RunError: on a machine without ``sbatch``, or if SLURM refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise RunError("sbatch isn't installed on this machine; --dry-run prints the script for another one")
    done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"sbatch refused the job: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip()
