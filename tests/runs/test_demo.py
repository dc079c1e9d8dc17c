"""The demo, made small."""

from pathlib import Path

import pytest

from smalti.errors import ConfigError
from smalti.runs import demo


def test_the_demo_ends_with_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = {"num_train": 12, "num_val": 4, "num_objects_train": 3, "num_objects_val": 2, "size": 32}
    monkeypatch.setattr(demo, "SCENES", scenes)
    small = {"encoder": {"embed_dim": 24, "depth": 1, "num_heads": 3}, "data": {"image_size": 32}, "steps": 4}
    done = demo.run_demo(tmp_path / "demo", {**small, "batch_size": 4, "method": {"decoder_dim": 16}}, quiet=True)
    assert [result.protocol for result in done.results] == ["linear-probe"] * 2 + ["linear-segmentation"] * 2
    assert [result.is_baseline for result in done.results] == [False, True, False, True]
    assert "untrained network: linear-probe top1" in done.verdict and "linear-segmentation miou" in done.verdict
    assert (done.run / "results" / "evaluate_demo.json").is_file()
    with pytest.raises(ConfigError, match="is not empty; choose another --out"):
        demo.run_demo(tmp_path / "demo")
