"""Sharded parameters (FSDP2): the same numbers as DDP, and the same checkpoints, on two processes."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import smalti
from smalti.config import merge
from smalti.errors import ConfigError
from smalti.functional.processes import own_part
from smalti.methods.base import Method
from smalti.methods.mae import MAE
from smalti.models.loading import latest_checkpoint
from smalti.reading import read_csv
from smalti.runs import train as runs
from smalti.training.parallel import shard
from smalti.training.processes import launch

TINY: dict[str, Any] = {
    "encoder": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "data": {"image_size": 32},
    "devices": 2,
    "steps": 4,
    "batch_size": 8,
    "drop_path": 0.2,
    # some biases have no gradient but rounding, which Adam's default epsilon would scale up to full steps
    "optim": {"lr": 1e-2, "eps": 1e-3, "clip_norm": 0.1},
    "checkpoint": {"every": 2},
    "log": {"every": 1},
}
HEAD = {"num_prototypes": 15, "hidden_dim": 32, "bottleneck_dim": 8, "num_local_views": 2}  # 15: in unequal parts
METHODS: dict[str, dict[str, Any]] = {
    "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "dino": HEAD,
    "dinov2": HEAD,
    "neco": {"roi_size": 3, "hidden_dim": 32, "out_dim": 16, "num_local_views": 2, "local_size": 16}
    | {"from_scratch": True},
    "part": {},
}
KINDS = ("ddp", "fsdp")
LOGGED = {"loss": 1e-5, "grad_norm": 1e-5, "feature_std": 1e-5, "effective_rank": 1e-3}
"""Columns of the log, and how far rounding moves them; the rank takes roots of eigenvalues that are almost 0."""


def settings(name: str, **more: Any) -> dict[str, Any]:
    return merge(merge(TINY, {"method": METHODS[name]}), more)


def run_all(names: tuple[str, ...], photos: Path, folder: Path) -> None:
    """Each method with DDP and with FSDP, and each of these runs resumed after half of its steps by the other."""
    runs.shard = shard_in_halves
    for name in names:
        for kind, other in zip(KINDS, reversed(KINDS), strict=True):
            run, half = folder / f"{name}_{kind}", folder / f"{name}_{kind}_then_{other}"
            smalti.train(name, photos, run, overrides=settings(name, parallel=kind), quiet=True)
            if torch.distributed.get_rank() == 0:
                shutil.copytree(run, half, ignore=shutil.ignore_patterns("step_00000004"))
            torch.distributed.barrier()
            runs.resume(half, {"parallel": other}, quiet=True)


def run_with_trouble(photos: Path, folder: Path) -> None:
    """Evaluated at each step, with a loss that is not a number at the third: DDP, and FSDP."""
    original = MAE.forward
    for kind in KINDS:
        calls: list[float] = []

        def forward(self: MAE, views: Any, progress: float, calls: list[float] = calls) -> dict[str, torch.Tensor]:
            calls.append(progress)
            factor = math.nan if len(calls) == 3 else 1.0
            return {key: value * factor for key, value in original(self, views, progress).items()}

        MAE.forward = forward  # type: ignore[method-assign]
        judged = {"data": str(photos), "every": 1, "protocols": ["position"], "position": {"num_images": 8}}
        smalti.train("mae", photos, folder / kind, overrides=settings("mae", parallel=kind, eval=judged), quiet=True)


def shard_in_halves(method: Method, device: torch.device) -> None:
    """As in training; afterwards a process has half of all parameters."""
    before = sum(parameter.numel() for parameter in method.parameters())
    shard(method, device)
    own = sum(own_part(parameter).numel() for parameter in method.parameters())
    assert 0.4 * before < own < 0.6 * before


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = latest_checkpoint(run)
    assert folder is not None and folder.name == "step_00000004"
    return load_file(folder / "weights.safetensors")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum((a[key].double() - b[key].double()).square().sum().item() for key in a))


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("names", [("mae",), pytest.param(tuple(METHODS), marks=pytest.mark.slow)], ids=len)
def test_sharded_runs_equal_whole_ones_and_resume_as_each_other(
    names: tuple[str, ...], photos: Path, tmp_path: Path
) -> None:
    launch(run_all, (names, photos, tmp_path), 2)
    for name in names:
        whole = tmp_path / f"{name}_ddp"
        start = load_file(whole / "checkpoints" / "step_00000002" / "weights.safetensors")
        moved = distance(weights(whole), start)
        for other in ("fsdp", "ddp_then_fsdp", "fsdp_then_ddp"):
            run = tmp_path / f"{name}_{other}"
            for column, rounding in LOGGED.items():
                found, wanted = ([float(row[column]) for row in read_csv(one / "log.csv")] for one in (run, whole))
                assert found == pytest.approx(wanted, rel=rounding), (name, other, column)
            assert weights(run).keys() == weights(whole).keys()
            assert distance(weights(run), weights(whole)) < 1e-3 * moved, (name, other)


@pytest.mark.usefixtures("forked")
def test_a_sharded_run_is_evaluated_and_rolled_back(photos: Path, tmp_path: Path) -> None:
    launch(run_with_trouble, (photos, tmp_path), 2)
    found, wanted = ([numbers(path) for path in sorted((tmp_path / kind / "results").iterdir())] for kind in KINDS)
    assert len(found) == 5 and all(one == pytest.approx(two, rel=1e-4) for one, two in zip(found, wanted, strict=True))
    events = [[(row["step"], row["event"]) for row in read_csv(tmp_path / kind / "events.csv")] for kind in KINDS]
    assert events[0] == events[1] == [("2", "rolled back")]
    assert distance(*(weights(tmp_path / kind) for kind in KINDS)) < 1e-5
    kept = {path.name for path in (tmp_path / "fsdp" / "checkpoints").iterdir()}
    assert kept >= {"step_00000002", "step_00000004"} and len(kept) <= 3  # the third: the best step


def numbers(path: Path) -> list[float]:
    """Metrics of the results of a step."""
    (result,) = json.loads(path.read_text())["results"]
    return [float(value) for _, value in sorted(result["metrics"].items())]


def test_a_parameter_that_is_one_number_is_refused_before_anything_is_written(photos: Path, tmp_path: Path) -> None:
    own = {f"{net}_{what}": value for net in ("encoder", "decoder") for what, value in (("dim", 16), ("depth", 1))}
    tree = {"method": {**own, "encoder_num_heads": 2, "decoder_num_heads": 2}, "batch_size": 8, "parallel": "fsdp"}
    with pytest.raises(ConfigError, match=r"comae has a parameter that is one number \(log_temperature\); use ddp"):
        smalti.train("comae", photos, tmp_path / "a", overrides={**tree, "data": {"image_size": 32}}, quiet=True)
    assert not (tmp_path / "a").exists()
