"""Several machines, which are processes of this one: torchrun agents and tasks of srun that meet on 127.0.0.1.

One run goes through all of it and must end as a run that nothing happened to.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from command import smalti
from smalti.models.loading import latest_checkpoint
from smalti.reading import read_csv

TINY = (
    "encoder=vit_tiny_patch16_224 encoder.patch_size=8 encoder.embed_dim=24 encoder.depth=2 encoder.num_heads=3 "
    "data.image_size=32 batch_size=8 steps=240 checkpoint.every=1000 log.every=2 optim.eps=0.1 optim.lr=0.1 "
    "method.decoder_dim=16 method.decoder_depth=1 method.decoder_num_heads=2"
).split()
SECONDS = 120


def started(commands: list[list[str]], environments: list[dict[str, str]]) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(command, env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command, own in zip(commands, environments, strict=True)
    ]


def wait_for(condition: Callable[[], bool], processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)


def torchrun(words: list[str]) -> list[subprocess.Popen[str]]:
    port = free_port()
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    agent += ["--rdzv-backend=static", "--master-addr=127.0.0.1", f"--master-port={port}"]
    return started([[*agent, f"--node-rank={node}", "-m", *words] for node in (0, 1)], [{}, {}])


def srun(words: list[str]) -> list[subprocess.Popen[str]]:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "node[1-2]"}
    step |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "SLURM_LOCALID": "0"}
    tasks = [step | {"SLURM_PROCID": str(node), "SLURM_NODEID": str(node)} for node in (0, 1)]
    return started([[sys.executable, "-m", *words]] * 2, tasks)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ended(processes: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    """What they wrote to stderr."""
    deadline = time.monotonic() + seconds
    return [process.communicate(timeout=deadline - time.monotonic())[1] for process in processes]


def ours(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("smalti: ")]


@pytest.mark.slow
def test_a_run_on_two_nodes_is_stopped_killed_requeued_and_the_same(photos: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "run", ["smalti", "train", "mae", "--data", str(photos), *TINY, "--quiet"]
    job = [*words, "--out", str(out), "--resume-or-start"]

    def rows() -> int:
        return len(read_csv(out / "log.csv")) if (out / "log.csv").exists() else 0

    nodes = torchrun(job)
    wait_for(lambda: rows() > 2, nodes)
    nodes[1].send_signal(signal.SIGTERM)  # one launcher only: all processes stop after the same step
    said = ended(nodes, 60)
    stopped = latest_checkpoint(out)
    assert [ours(text) for text in said] == [
        [f"smalti: interrupted by SIGTERM; checkpoint: {stopped}; resume with: smalti train --resume {out}"],
        [],
    ]

    nodes, before = torchrun(job), rows()
    wait_for(lambda: rows() > before + 1, nodes)
    (worker,) = psutil.Process(nodes[1].pid).children()
    nodes[1].kill()  # the agent; its process ends with it
    (line,) = ours(ended(nodes[:1], 30)[0])
    assert line.startswith("smalti: another process of this run has ended or can't be reached (")
    assert line.endswith(f"; last checkpoint: {stopped}; resume with: smalti train --resume {out}")
    psutil.wait_procs([worker], timeout=30)
    assert not worker.is_running()
    nodes[1].communicate()

    nodes = srun(job)
    wait_for(lambda: (out / "events.csv").read_text().count("resumed") == 2, nodes)
    nodes[1].send_signal(signal.SIGUSR1)
    said = ended(nodes, 60)
    assert [process.returncode for process in nodes] == [128 + signal.SIGUSR1] * 2
    assert [len(ours(text)) for text in said] == [1, 0]
    assert latest_checkpoint(out) != stopped

    smalti(*job[1:])
    smalti(*words[1:], "--out", tmp_path / "undisturbed", "micro_batch=4")
    found, wanted = (
        load_file(latest_checkpoint(run) / "weights.safetensors") for run in (out, tmp_path / "undisturbed")
    )
    assert max((found[key] - wanted[key]).abs().max().item() for key in wanted) < 1e-5
    logs = [[(row["step"], row["lr"]) for row in read_csv(run / "log.csv")] for run in (out, tmp_path / "undisturbed")]
    assert logs[0] == logs[1] and len(logs[0]) == 121
