"""What srun's variables mean to torch, and the batch scripts that are written for it."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from command import smalti
from smalti.errors import ConfigError
from smalti.training.slurm import join_step, parse_slurm

STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_tasks_of_a_step_become_the_processes_of_a_run() -> None:
    found = dict(STEP)
    join_step(found)
    port = found.pop("MASTER_PORT")
    assert {key: value for key, value in found.items() if key not in STEP} == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
    }
    ports = []
    for job, step in (("1234567", "0"), ("1234567", "1"), ("1234568", "0")):
        other = STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}
        join_step(other)
        ports.append(other["MASTER_PORT"])
    assert ports[0] == port and len(set(ports)) == 3 and all(1024 < int(one) < 2**16 for one in ports)


def test_a_batch_script_a_single_task_and_another_launcher_are_left_alone() -> None:
    script = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for environment in (script, STEP | {"SLURM_STEP_NUM_TASKS": "1"}, STEP | {"WORLD_SIZE": "2", "RANK": "0"}):
        found = dict(environment)
        join_step(found)
        assert found == environment


def test_an_address_that_the_user_sets_stays() -> None:
    found = STEP | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
    join_step(found)
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.7", "29500")


def test_a_job_is_printed_as_a_script_that_bash_runs_and_requeues(photos: Path, tmp_path: Path) -> None:
    words = [
        "train",
        "mae",
        "steps=10",
        "batch_size=64",
        "--data",
        photos / "a b",
        "--out",
        tmp_path / "run",
        "--quiet",
    ]
    script = smalti(*words, "--slurm", "partition=gpu,nodes=2,gpus=8,cpus=6,time=1-00:00:00", "--dry-run").stdout
    options = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert set(options) == {
        *("job-name=run", f"output={tmp_path}/run-%j.log", "open-mode=append", "nodes=2", "ntasks-per-node=8"),
        *("gpus-per-node=8", "cpus-per-task=6", "partition=gpu", "time=1-00:00:00", "signal=USR1@120", "requeue"),
    }
    assert not list(tmp_path.iterdir())
    for code, calls in ((128 + signal.SIGUSR1, 2), (143, 1)):
        log = tmp_path / f"calls_{code}"
        for name, ending in (("srun", f"exit {code}"), ("scontrol", "exit 0")):
            (tmp_path / name).write_text(f'#!/bin/bash\nprintf "%q " {name} "$@" >>{log}; echo >>{log}; {ending}\n')
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17"}
        assert subprocess.run(["bash"], input=script, text=True, env=environment).returncode == code
        found = [shlex.split(line) for line in log.read_text().splitlines()]
        assert len(found) == calls and found[1:] == [["scontrol", "requeue", "17"]] * (calls - 1)
        assert found[0][:6] == ["srun", "--cpus-per-task=6", "--wait=60", sys.executable, "-m", "smalti"]
        assert sorted(found[0][6:]) == sorted([*map(str, words), "--resume-or-start"])


def test_a_script_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "--resume", tmp_path / "runs" / "a", "--slurm", "gpus=0"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--dry-run prints the script" in smalti(*words, code=2).stderr
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\n/bin/cat >{tmp_path}/job\necho Submitted batch job 17\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert smalti(*words).stdout == "Submitted batch job 17\n"
    job = (tmp_path / "job").read_text()
    assert (tmp_path / "runs").is_dir()
    assert f"smalti train --resume {tmp_path}/runs/a\n" in job and "ntasks-per-node=1" in job and "gpus-per" not in job
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho sbatch: error: invalid partition >&2; exit 1\n")
    assert "refused the job: sbatch: error: invalid partition" in smalti(*words, code=2).stderr


def test_a_job_that_cannot_run_is_one_line(tmp_path: Path) -> None:
    for text, line in (
        ("node=2", "did you mean 'nodes'"),
        ("nodes", "not of the form KEY=VALUE"),
        ("nodes=two", "nodes"),
        ("mem=1 G", "mem"),
    ):
        with pytest.raises(ConfigError, match=line):
            parse_slurm(text)
    words = ["train", "mae", "--data", tmp_path, "batch_size=10", "--slurm", "gpus=4"]
    assert "did you mean 'steps'" in smalti(*words, "--out", tmp_path / "a", "step=5", code=2).stderr
    assert "batch_size=8 or batch_size=12" in smalti(*words, "--out", tmp_path / "a", code=2).stderr
    assert "no run directory is given" in smalti(*words, code=2).stderr
    assert "without blanks" in smalti(*words[:4], *words[5:], "--out", tmp_path / "a b", code=2).stderr
    assert "give both" in smalti(*words[:5], "--out", tmp_path / "a", "--dry-run", code=2).stderr
