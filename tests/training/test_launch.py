"""What devices, precision and trackers mean."""

import pytest
import torch

from smalti.errors import ConfigError, MissingExtraError, SmaltiError
from smalti.training import launch
from smalti.training.launch import Devices, check_trackers, resolve_devices, resolve_precision


def test_devices_mean_gpus_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_devices("auto") == Devices("cpu", 1)
    assert resolve_devices(3) == Devices("cpu", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_devices("auto") == Devices("cuda", 1)
    assert resolve_devices(2) == Devices("cuda", 2)
    assert resolve_devices("cpu") == Devices("cpu", 1)
    with pytest.raises(ConfigError, match="devices=3: this machine has 2 GPUs"):
        resolve_devices(3)
    with pytest.raises(ConfigError, match="auto, cpu or a number of devices"):
        resolve_devices("tpu")


def test_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_precision("auto", "cpu") == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve_precision("auto", "cuda") == "bf16"
    with pytest.raises(ConfigError, match="one of auto, fp32, bf16"):
        resolve_precision("fp16", "cpu")


def test_trackers_must_exist_and_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="there is no tracker 'wandd'; did you mean 'wandb'"):
        check_trackers(("wandd",))
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "smalti\[wandb\]"'):
        check_trackers(("wandb",))
    assert issubclass(MissingExtraError, SmaltiError)
