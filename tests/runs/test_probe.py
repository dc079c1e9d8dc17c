"""Probes of positions: known answers, leaks, and the way from a run to its report."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from command import smalti
from smalti.data.signals.motion_samples import write_motion
from smalti.errors import ConfigError, RunError
from smalti.methods.part import PART, PARTConfig
from smalti.models.build import build_encoder
from smalti.report.positions import draw_positions
from smalti.report.run_page import write_report
from smalti.runs.probe import (
    UNITS,
    antisymmetry,
    boxes_overlap,
    composition,
    effective_rank,
    fit_by_distance,
    measure,
    overfit,
    probe_positions,
    reconstruction_error,
    write_probe,
)
from smalti.runs.train import train

SMALL = {
    "encoder": {
        "name": "vit_tiny_patch16_224",
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 3,
    },
    "data": {"image_size": 32},
    "batch_size": 4,
    "steps": 2,
    "devices": "cpu",
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_tables_of_differences_are_consistent_and_noise_is_not() -> None:  # known answers
    places = torch.randn(4, 30, 2, generator=generator())
    true = places[:, None] - places[:, :, None]
    assert antisymmetry(true, true) == 0
    assert composition(true, generator()) < 1e-6
    assert reconstruction_error(true, true, generator()) == 0
    noise = torch.randn(4, 30, 30, 2, generator=generator())
    assert_close(antisymmetry(noise, true), math.sqrt(2), rtol=0.05, atol=0)
    assert_close(composition(noise, generator()), math.sqrt(3), rtol=0.05, atol=0)
    assert antisymmetry(torch.ones_like(true), true) == 2
    assert math.isnan(antisymmetry(torch.zeros_like(true), true))
    shifted = true + torch.tensor([3.0, 4.0])
    assert_close(reconstruction_error(shifted, true, generator()), 5.0, rtol=1e-4, atol=0)


def test_rank_and_overlap_by_hand() -> None:
    tokens = torch.zeros(8, 5)
    tokens[range(8), [0, 0, 1, 1, 2, 2, 3, 3]] = torch.tensor([1.0, -1] * 4)
    assert_close(effective_rank(tokens), 4.0, rtol=1e-4, atol=0)
    boxes = torch.tensor([[[0.0, 0, 8, 8], [7, 7, 15, 15], [8, 0, 16, 8]]])
    assert boxes_overlap(boxes)[0].tolist() == [[True, True, False], [True, True, True], [False, True, True]]


@pytest.mark.parametrize("config", [{}, {"sampling": "offgrid_scale"}, {"sampling": "hierarchical"}], ids=str)
def test_nothing_leaks_from_a_position_free_encoder(config: dict[str, object]) -> None:
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    part = PART(encoder, PARTConfig(**config)).eval()
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        probe = measure(part, images, torch.full_like(images, 90))
    assert probe.metrics["leak_order"] <= 1e-4
    for name in ("leak_blank", "leak_noise", "leak_border"):
        assert probe.metrics[name] <= 0.01, name
    assert math.isnan(probe.metrics["leak_size"]) == (not config)
    of_signals = {"rmse_samples", "identity_samples", "spread_time"}
    assert UNITS.keys() - probe.metrics.keys() == {"overfit", *of_signals}  # overfit: asked for on its own


def test_the_fit_of_tenths_by_hand() -> None:
    angle = torch.linspace(0, 2 * math.pi, 101)[:-1]
    length = torch.arange(10).repeat_interleave(10)  # ten pairs of each length 1..10
    truth = torch.stack([angle.cos(), angle.sin()], -1)[torch.arange(100) % 10 * 10] * (length + 1)[:, None]
    order = torch.randperm(100, generator=generator())
    offsets = truth * (length < 5)[:, None]  # the nearer half is known, of the others nothing is said
    distances, fits = fit_by_distance(offsets[order][None], truth[order][None])
    assert_close(distances, torch.arange(1.0, 11.0))
    assert_close(fits, torch.tensor([1.0] * 5 + [0.0] * 5), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("shuffled", "low", "high"), [(False, 0.0, 0.05), (True, 0.3, 1.5)])
def test_overfitting_tells_right_wiring_from_wrong(
    shuffled: bool, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    part = PART(encoder, PARTConfig(num_patches=6, head="pairwise_linear"))
    if shuffled:  # each pair is asked about another pair's offset
        true = part.target
        places = torch.randperm(36, generator=generator())
        monkeypatch.setattr(part, "target", lambda *words: (t := true(*words))._replace(values=t.values[:, places]))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator())
    assert low <= overfit(part, images, steps=150) <= high


def test_a_run_is_probed_and_its_report_shows_it(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train("part", photos, tmp_path / "run", overrides=SMALL, quiet=True)
    assert 'id="positions"' not in write_report(run, num_images=0).read_text()
    probe = probe_positions(run, num_images=4)
    path = write_probe(run, probe)
    draw_positions(probe, path.with_suffix(".png"))
    assert json.loads(path.read_text())["metrics"].keys() == probe.metrics.keys()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = write_report(run, num_images=0).read_text()
    assert 'id="positions"' in page and "data:image/png" in page and "antisymmetry" in page
    again = probe_positions(run, num_images=4)
    assert str(again.metrics) == str(probe.metrics)
    monkeypatch.setattr("smalti.runs.probe.OVERFIT_STEPS", 2)
    made: list[tuple[int, int]] = []
    heart = probe_positions(run, num_images=4, run_overfit=True, progress=lambda *steps: made.append(steps))
    assert made == [(1, 2), (2, 2)] and 0 < heart.metrics["overfit"] < 3
    with pytest.raises(ConfigError, match="num_images=2: at least 4"):
        probe_positions(run, num_images=2)


@pytest.mark.parametrize("config", [{}, {"sampling": "offgrid_scale", "contrastive": 0.1}], ids=str)
def test_nothing_leaks_from_windows_of_signals(config: dict[str, object]) -> None:
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": [1, 10], "mean": (0.0,), "std": (1.0,)}
    encoder = build_encoder("vit_tiny_patch16_224", img_size=(1, 80), in_chans=2, **sizes)
    part = PART(encoder, PARTConfig(normalize="image", **config)).eval()
    windows = torch.randn(4, 2, 1, 80, generator=generator())
    with torch.no_grad():
        probe = measure(part, windows, torch.full_like(windows, 0.5))
    assert probe.is_signal and probe.unit == "samples" and probe.truth.shape == (4, 8, 8, 1)
    centre = probe.boxes.mean(-1)
    assert_close(probe.truth[..., 0], centre[:, None, :] - centre[:, :, None])  # in samples: j less i
    assert_close(probe.metrics["rmse_samples"], float((probe.predicted - probe.truth).square().mean().sqrt()))
    assert probe.metrics["leak_order"] <= 1e-4
    for name in ("leak_blank", "leak_noise", "leak_border"):
        assert probe.metrics[name] <= 0.01, name
    assert math.isnan(probe.metrics["leak_size"]) == (not config)
    assert probe.metrics.keys() < UNITS.keys() | {"r2_time", "r2_duration"} and "rmse_px" not in probe.metrics


def test_offsets_in_time_that_are_known_score_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": [1, 10], "mean": (0.0,), "std": (1.0,)}
    encoder = build_encoder("vit_tiny_patch16_224", img_size=(1, 80), in_chans=1, **sizes)
    part = PART(encoder, PARTConfig(normalize="image", sampling="grid")).eval()
    windows = torch.arange(80.0).repeat(4, 1, 1, 1)  # a sample is its own place
    monkeypatch.setattr(part, "encode", lambda patches, keys: (patches.pixels.mean((-2, -1))[..., None], None))
    monkeypatch.setattr(part.head, "forward", lambda t, pairs: (t[:, pairs[0, :, 1]] - t[:, pairs[0, :, 0]]) / 80)
    probe = measure(part, windows, torch.zeros_like(windows))
    assert probe.metrics["r2"] == pytest.approx(1) and probe.metrics["rmse_samples"] == pytest.approx(0, abs=1e-3)
    assert probe.metrics["spread_time"] == pytest.approx(1) and probe.metrics["reconstruction"] < 1e-3
    assert probe.metrics["leak_slot"] < 0.9 < probe.metrics["r2_disjoint"]


def test_a_run_on_recordings_is_probed_from_the_command_line(tmp_path: Path) -> None:
    motion = write_motion(tmp_path / "motion", num_train=2, num_test=1, minutes=1)
    small = ("encoder.embed_dim=24", "encoder.depth=1", "encoder.num_heads=3", "data.signal.window_s=5")
    smalti("train", "part", "--data", motion, "--out", tmp_path / "run", "--quiet", "steps=1", "batch_size=4", *small)
    done = smalti("probe", tmp_path / "run", "--images", 4)
    assert "rmse_samples" in done.stdout and "rmse_px" not in done.stdout
    kept = json.loads((tmp_path / "run" / "probes" / "positions.json").read_text())
    assert set(kept["by_distance"][0]) == {"samples", "r2"} and kept["units"]["rmse_samples"] == "samples of the signal"
    assert (tmp_path / "run" / "probes" / "positions.png").read_bytes().startswith(b"\x89PNG")
    done = smalti("probe", tmp_path / "run", "--images", 4, "--data", tmp_path / "run", code=2)
    assert "no recordings found" in done.stderr and done.stderr.count("\n") == 1


def test_runs_of_other_methods_and_other_folders_are_refused(tmp_path: Path, photos: Path) -> None:
    small = {**SMALL, "method": {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}}
    run = train("mae", photos, tmp_path / "run", overrides=small, quiet=True)
    with pytest.raises(ConfigError, match="is a run of mae; position probes need a run of part"):
        probe_positions(run)
    with pytest.raises(RunError, match="is not a run directory with a checkpoint"):
        probe_positions(photos)
