"""What devices, precision and trackers mean."""

import pytest
import torch

from smalti.errors import ConfigError, MissingExtraError, SmaltiError
from smalti.training import launch
from smalti.training.launch import Devices, check_trackers, resolve_devices, resolve_precision, split_batch


def test_devices_mean_gpus_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_devices("auto") == Devices("cpu", 1)
    assert resolve_devices(3) == Devices("cpu", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_devices("auto") == Devices("cuda", 1)
    assert resolve_devices(2) == Devices("cuda", 2)
    assert resolve_devices("cpu") == Devices("cpu", 1)
    with pytest.raises(ConfigError, match="devices=3: this machine has only 2 GPUs"):
        resolve_devices(3)
    with pytest.raises(ConfigError, match="auto, cpu or a number of at least 1"):
        resolve_devices("tpu")


def test_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_precision("auto", "cpu") == "fp32"
    for is_emulated, precision in ((False, "bf16"), (True, "fp32")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, e=is_emulated: including_emulation or not e
        )
        assert resolve_precision("auto", "cuda") == precision
    assert resolve_precision("bf16", "cuda") == "bf16", "as asked for, even where it is emulated"
    with pytest.raises(ConfigError, match="one of auto, fp32, bf16"):
        resolve_precision("fp16", "cpu")


def test_bf16_on_a_cpu_without_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_precision("bf16", "cpu") == "bf16"

    def refuse(*args: object) -> None:
        raise RuntimeError("not implemented for 'BFloat16'")

    monkeypatch.setattr(torch.Tensor, "__matmul__", refuse)
    with pytest.raises(ConfigError, match="this torch can't multiply matrices in bfloat16 on this CPU; use fp32"):
        resolve_precision("bf16", "cpu")
    assert resolve_precision("auto", "cpu") == "fp32"


def test_trackers_must_exist_and_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="there is no tracker 'wandd'; did you mean 'wandb'"):
        check_trackers(("wandd",))
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "smalti\[wandb\]"'):
        check_trackers(("wandb",))
    assert issubclass(MissingExtraError, SmaltiError)


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "processes", "split"),
    [(64, None, 1, (64, 1)), (64, None, 4, (16, 1)), (64, 8, 2, (8, 4)), (1, 1, 1, (1, 1))],
)
def test_a_step_is_divided_evenly(
    batch_size: int, micro_batch: int | None, processes: int, split: tuple[int, int]
) -> None:
    assert split_batch(batch_size, micro_batch, processes) == split
    assert split[0] * split[1] * processes == batch_size


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "processes", "line"),
    [
        (10, 4, 1, "batch_size=10 is not a multiple of micro_batch=4; use micro_batch=2 or micro_batch=5"),
        (64, None, 3, "over devices=3; use batch_size=63 or batch_size=66, or devices=2"),
        (64, 24, 2, "batch_size=64 on devices=2 .32 each. is not a multiple of micro_batch=24; use micro_batch=16 or"),
        (64, 0, 1, "micro_batch=0: at least 1"),
        (2, None, 4, "devices=4; use batch_size=4 or batch_size=8, or devices=2"),
    ],
)
def test_what_cannot_be_divided_names_numbers_that_can(
    batch_size: int, micro_batch: int | None, processes: int, line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        split_batch(batch_size, micro_batch, processes)
