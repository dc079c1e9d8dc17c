"""How many threads a command takes: quotas, what the user has set, small models; and that an import changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smalti import threads
from smalti.methods.mae import MAE, MAEConfig
from smalti.models.build import build_encoder
from smalti.training import launch
from smalti.training.launch import layer_work, limit_threads

REPORT = """
import json, os, sys
{first}
import torch
names = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
print(json.dumps([torch.get_num_threads(), {{name: os.environ.get(name) for name in names}}]))
"""
COMMAND = """
import contextlib, io
from smalti.cli.main import run
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    run(["--version"])
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def cores(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(count)), raising=False)


V2 = "0::/app/job\n"
V1 = "9:name=systemd:/\n4:memory:/app\n3:cpu,cpuacct:/app/job\n"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": V2}, None),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/app/job/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/app/job/cpu.max": "150000 100000\n"}, 1.5),
        # the limit of a group around it
        (
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/app/job/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/app/cpu.max": "300000 100000\n",
            },
            3.0,
        ),
        # a container that sees its own group as the root of the mount
        ({"proc/self/cgroup": "0::/../host/path\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "unreadable\n"}, None),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/app/job/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/app/job/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_quotas_of_control_groups_are_read(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert threads.cpu_quota(write(tmp_path, files)) == quota


@pytest.mark.parametrize(("quota", "found"), [("max", 8), ("150000", 1), ("50000", 1), ("300000", 3), ("6400000", 8)])
def test_cores_are_the_affinity_within_the_quota(
    quota: str, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(8, monkeypatch)
    root = write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"})
    assert threads.usable_cores(root) == found


def test_threads_and_spinning_are_set_unless_the_user_has_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 3)
    plain: dict[str, str] = {}
    threads.set_environment(plain)
    assert plain == {
        "OMP_NUM_THREADS": "3",
        "SMALTI_THREADS": "3",
        "OPENCV_FOR_THREADS_NUM": "1",
        "GOMP_SPINCOUNT": str(threads.SPIN_COUNT),
        "KMP_BLOCKTIME": str(threads.BLOCK_TIME_MS),
    }
    for chosen in ({"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "0"}):
        mine = {"OMP_NUM_THREADS": "2", **chosen}
        threads.set_environment(mine)
        assert mine == {"OMP_NUM_THREADS": "2", "OPENCV_FOR_THREADS_NUM": "1", **chosen}


@pytest.mark.parametrize(
    ("first", "given", "expected"),
    [
        (COMMAND, {}, {"OMP_NUM_THREADS": str(threads.usable_cores()), "GOMP_SPINCOUNT": str(threads.SPIN_COUNT)}),
        (COMMAND, {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": None}),
        ("import smalti", {}, {"OMP_NUM_THREADS": None, "GOMP_SPINCOUNT": None, "KMP_BLOCKTIME": None}),
        ("import torch" + COMMAND, {}, {"OMP_NUM_THREADS": None, "GOMP_SPINCOUNT": None, "KMP_BLOCKTIME": None}),
    ],
    ids=["command", "command of a user who has chosen", "import", "command inside of a host program"],
)
def test_the_command_sets_them_before_torch_and_an_import_sets_nothing(
    first: str, given: dict[str, str], expected: dict[str, str | None]
) -> None:
    handled = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", threads.OURS)
    env = {key: value for key, value in os.environ.items() if key not in handled} | given
    code = REPORT.format(first=first)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    number, found = json.loads(done.stdout)
    assert {name: found[name] for name in expected} == expected
    if found["OMP_NUM_THREADS"] is not None:
        assert number == int(found["OMP_NUM_THREADS"])


def tiny_mae(width: int) -> MAE:
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=width, depth=1, num_heads=2)
    return MAE(encoder, MAEConfig(decoder_dim=16, decoder_depth=1, decoder_num_heads=2))


@pytest.mark.parametrize(
    ("environment", "width", "limited"),
    [
        ({"OMP_NUM_THREADS": "2", threads.OURS: "2"}, 32, True),
        ({"OMP_NUM_THREADS": "2", threads.OURS: "2"}, 256, False),  # there is work for two
        ({"OMP_NUM_THREADS": "2"}, 32, False),  # a user's
        ({"OMP_NUM_THREADS": "4", threads.OURS: "2"}, 32, False),  # a user's, in a process that we started
        ({}, 32, False),  # a host program's
    ],
)
def test_a_small_model_takes_one_thread_where_the_command_has_chosen(
    environment: dict[str, str], width: int, limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", threads.OURS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    limit_threads(tiny_mae(width), batch_size=8)
    assert asked == ([1] if limited else [])


def test_the_work_of_a_layer_by_hand() -> None:
    assert layer_work(tiny_mae(32).encoder, 8) == 8 * 16 * 32**2


@pytest.mark.parametrize(
    ("environment", "processes", "expected"),
    [
        ({}, 2, [3]),
        ({}, 16, [1]),
        ({"OMP_NUM_THREADS": "6", threads.OURS: "6"}, 3, [2]),
        ({"OMP_NUM_THREADS": "1"}, 2, []),
    ],
)
def test_processes_divide_the_usable_cores(
    environment: dict[str, str], processes: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", threads.OURS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "usable_cores", lambda: 6)
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    launch.share_threads(processes)
    assert asked == expected
