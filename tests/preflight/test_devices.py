import torch

from smalti.preflight import devices as devices_file
from smalti.preflight.devices import find_devices


def test_the_devices_are_those_of_this_machine():
    devices = find_devices()
    assert devices.processor and devices.cores >= 1
    assert 0 < devices.free_mib <= devices.total_mib
    assert len(devices.gpus) == torch.cuda.device_count()
    assert len(devices.lines()) == 2 + max(len(devices.gpus), 1)


def test_a_containers_limit_bounds_the_memory(tmp_path, monkeypatch):
    (tmp_path / "max").write_text(f"{600 * 2**20}\n")
    (tmp_path / "current").write_text(f"{400 * 2**20}\n")
    monkeypatch.setattr(devices_file, "_CGROUP_FILES", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    devices = find_devices()
    assert devices.total_mib == 600 and devices.free_mib == 200
    (tmp_path / "max").write_text("max\n")
    assert find_devices().total_mib > 600
