"""PART on signals: one offset in time, all channels of a patch together, everything else as for images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from smalti.config import read_yaml
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import open_signals
from smalti.data.signals.sleep_samples import write_nights
from smalti.data.views import Views
from smalti.errors import ConfigError, DataError, ShapeError
from smalti.functional.offgrid import PatchSampler, cut_windows, offgrid_boxes
from smalti.functional.pairs import offset_floor, select_pairs
from smalti.layers.relative_encoder import RelativeEncoder
from smalti.methods.mae import MAE, MAEConfig
from smalti.methods.part import PART, PARTConfig, pair_loss
from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder, eval_mode
from smalti.models.loading import latest_checkpoint, load
from smalti.runs.train import resume, train
from smalti.training.logs import read_csv

TINY = {"patch_size": 20, "embed_dim": 24, "depth": 2, "num_heads": 3}


def encoder(channels: int = 2, window: int = 200, **arguments: object) -> Encoder:
    settings = {**TINY, "patch_size": [1, 20], **arguments}
    return build_encoder(
        "vit_tiny_patch16_224", img_size=(1, window), in_chans=channels, seed=0, mean=(0.0,), std=(1.0,), **settings
    )


def part(channels: int = 2, **settings: object) -> PART:
    torch.manual_seed(0)
    return PART(encoder(channels), PARTConfig(**{"normalize": "image", **settings}))


def batch(count: int = 4, channels: int = 2, window: int = 200, seed: int = 0) -> Views:
    signals = torch.randn(count, channels, 1, window, generator=torch.Generator().manual_seed(seed))
    return Views(
        crops=(signals,),
        boxes=torch.tensor([[0.0, 0.0, window, 1.0]]).repeat(count, 1),
        flips=torch.zeros(count, dtype=torch.bool),
        source_size=torch.tensor([[1, window]] * count),
        index=torch.arange(count),
        keys=torch.arange(count) + 11,
    )


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nights(tmp_path_factory.mktemp("signals") / "nights", num_train=3, num_test=2, epochs=3)


def test_floor_in_patches_of_half_a_second_in_half_a_minute_is_in_the_hundreds():
    assert abs(offset_floor(3000, 50) - 580.6) < 0.1  # why offsets are counted in windows by default
    boxes = offgrid_boxes(torch.arange(400), 60, (3000,), (50,))
    offsets = (boxes[:, :, None, 0] - boxes[:, None, :, 0]) / 50
    assert abs(offsets.square().mean().item() / offset_floor(3000, 50, 60) - 1) < 0.03


def test_a_relative_encoder_with_one_channel_has_as_many_weights_as_computed():
    count = sum(parameter.numel() for parameter in RelativeEncoder(384, 1).parameters())
    assert count == 887_426 - (384 + 1)  # the published number for two channels, less one row and its bias


def test_starts_reach_both_ends_and_are_uniform():
    starts = offgrid_boxes(torch.arange(3000), 20, (60,), (20,))[..., 0].flatten().long()
    counts = torch.bincount(starts, minlength=41).double()
    assert len(counts) == 41 and counts.min() > 0
    expected = len(starts) / 41
    assert ((counts - expected).square() / expected).sum() < 74  # chi-squared, 40 degrees, p = 0.001


def test_patches_are_the_samples_of_all_channels_at_their_starts():
    signals = torch.randn(2, 3, 100)
    patches = PatchSampler((20,), num_patches=7)(torch.tensor([1, 2]), signals)
    assert patches.pixels.shape == (2, 7, 3, 20) and patches.boxes.shape == (2, 7, 2)
    for b in range(2):
        for n in range(7):
            start = int(patches.boxes[b, n, 0])
            assert_close(patches.pixels[b, n], signals[b, :, start : start + 20])
    assert_close(patches.pixels, cut_windows(signals, patches.boxes[..., :1], (20,)))


def test_a_grid_of_patches_is_embedded_as_the_whole_signal_is():
    vit, signals = encoder(), torch.randn(2, 2, 1, 200)
    whole, grid = vit.embed_patches(signals)
    cut = PatchSampler((20,), "grid")(torch.tensor([1, 2]), signals[:, :, 0])
    order = cut.boxes[..., 0].argsort()
    pixels = cut.pixels[torch.arange(2)[:, None], order]
    assert grid == (1, 10)
    assert_close(vit.embed_crops(pixels.unsqueeze(-2)), whole, atol=1e-5, rtol=1e-5)


def test_targets_are_starts_subtracted_and_divided_by_the_window():
    method = part()
    patches = method.sampler(torch.tensor([5, 6]), torch.randn(2, 2, 200))
    pairs = select_pairs(torch.tensor([0]), 10, 100)
    values = method.target(patches, pairs, (200,)).values[..., 0].view(2, 10, 10)
    starts = patches.boxes[..., 0]
    assert_close(values, (starts[:, None, :] - starts[:, :, None]) / 200)  # j less i
    assert_close(values, -values.mT, atol=0, rtol=0)
    assert_close(values[:, 0, 2], values[:, 0, 1] + values[:, 1, 2], atol=1e-6, rtol=0)
    assert values.dtype == torch.float32 and values.abs().max() <= 1


def test_durations_are_a_second_channel_of_scaled_patches():
    method = part(sampling="offgrid_scale")
    assert method.channels == ("time", "duration") and part().channels == ("time",)
    losses = method(batch(), 0.5)
    assert set(losses) == {"offsets", "sizes"} and all(loss.isfinite() for loss in losses.values())
    patches = method.sampler(torch.tensor([5]), torch.randn(1, 2, 200))
    pairs = select_pairs(torch.tensor([0]), 10, 100)
    sizes = method.target(patches, pairs, (200,)).values[..., 1].view(10, 10)
    length = patches.boxes[0, :, 1] - patches.boxes[0, :, 0]
    assert_close(sizes, (length[None] / length[:, None]).log())


def test_the_encoder_does_not_know_where_patches_are_unless_it_is_told():
    def miss(method: PART) -> float:
        with torch.no_grad(), eval_mode(method):
            keys = torch.tensor([5, 6])
            patches = method.sampler(keys, torch.randn(2, 2, 200))
            order = torch.randperm(patches.pixels.shape[1])
            moved = patches._replace(pixels=patches.pixels[:, order])  # boxes stay: places swap
            tokens, swapped = method.encode(patches, keys)[0], method.encode(moved, keys)[0]
            return float((swapped - tokens[:, order]).abs().max() / tokens.abs().max())

    assert miss(part()) < 1e-4
    assert miss(part(positions="sincos")) > 1e-2  # by design


def test_gradient_reaches_every_trainable_parameter():
    method = part()
    sum(method(batch(), 0.3).values()).backward()
    idle = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


def test_the_loss_of_offsets_has_the_gradient_it_says():
    prediction = torch.randn(2, 5, 1, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 5, 1, dtype=torch.float64)
    for loss in ("mse", "huber"):
        assert torch.autograd.gradcheck(lambda p, kind=loss: pair_loss(p, target, kind).sum(), prediction)


def test_a_batch_can_be_overfit():
    method = part(num_patches=6)
    views = batch(count=2)
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3, weight_decay=0.0)
    scores = []
    for _ in range(150):
        losses = method(views, 0.5)  # the same keys and progress: the same patches and pairs
        optimizer.zero_grad()
        losses["offsets"].backward()
        optimizer.step()
        scores.append(float(method.observations["r2"]))
    assert scores[0] < 0.05 and scores[-1] > 0.9
    assert method.observations["r2_time"] == method.observations["r2"]


def test_signals_refuse_what_only_images_have():
    with pytest.raises(ConfigError, match="rotation needs square patches"):
        part(max_angle=30.0)
    with pytest.raises(ConfigError, match=r"crop_scale=.* applies to images, but the data are signals; leave it out"):
        part(crop_scale=(0.5, 1.0))
    method = part()
    assert method.make_views(0).num_views == 1 and part(contrastive=0.1).make_views(0).num_views == 2


SETTINGS = {
    "encoder": {**TINY, "patch_size": 100},
    "data": {"signal": {"window_s": 10}},
    "steps": 6,
    "batch_size": 2,
    "log": {"every": 2},
    "checkpoint": {"every": 3, "keep": 9},
    "devices": "cpu",
}


def test_a_run_learns_from_the_training_nights_and_says_what_it_read(nights, tmp_path):
    run = train("part", nights, tmp_path / "run", overrides=SETTINGS, quiet=True)
    config = read_yaml(run / "config.yaml")
    assert config["data"]["signal"]["channels"] == ["C3-M2"] and config["data"]["channels"] == 1
    assert config["method"]["normalize"] == "image" and config["optim"]["warmup_ratio"] == 0.05
    rows = read_csv(run / "log.csv")
    assert len(rows) == 4 and "r2_time" in rows[0] and "r2_x" not in rows[0]
    vit = load(run, quiet=True)
    assert vit.takes_signals and vit.img_size == (1, 1000) and vit.position_free
    signals = open_signals(nights, SignalConfig(window_s=10))
    window = torch.from_numpy(signals.read(0)).permute(2, 0, 1)[None]
    assert vit.encode(vit.normalize(window)).patches.shape == (1, 10, 24)
    assert_close(vit.normalize(window), window)


def test_mae_learns_from_signals_as_they_are(nights, tmp_path):
    decoder = {"method": {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}}
    run = train("mae", nights, tmp_path / "run", overrides={**SETTINGS, **decoder}, quiet=True)
    vit = load(run, quiet=True)
    assert vit.takes_signals and not vit.position_free and vit.fixed_positions
    assert float(read_csv(run / "log.csv")[-1]["loss/reconstruction"]) > 0
    method = MAE(encoder(), MAEConfig(decoder_dim=16, decoder_depth=1, decoder_num_heads=2))
    window = np.random.default_rng(0).normal(size=(1, 200, 2)).astype(np.float32)
    assert_close(method.make_views(0)(window, np.random.default_rng(1)).crops[0][0], window)
    losses = method(batch(), 0.0)
    losses["reconstruction"].backward()
    idle = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


def test_a_stopped_run_goes_on_with_the_same_bits(nights, tmp_path):
    whole = train("part", nights, tmp_path / "whole", overrides=SETTINGS, quiet=True)
    run = train("part", nights, tmp_path / "stopped", overrides=SETTINGS, quiet=True)
    for folder in (run / "checkpoints").glob("step_00000006"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resume(run, quiet=True)
    first, second = (load(path, quiet=True).state_dict() for path in (whole, run))
    assert str(latest_checkpoint(run)).endswith("6")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    ("method", "overrides", "error", "match"),
    [
        ("dino", {}, ConfigError, "dino learns from images, but the data are signals; use droppos, mae, mp3, part"),
        ("part", {"encoder": {"patch_size": 70}}, ShapeError, "windows are 3000 samples .* patches of 70"),
        ("part", {"encoder": {"patch_size": [16, 16]}}, ConfigError, "a number of samples, at least 1, is needed"),
        ("part", {"data": {"channels": 2}}, ConfigError, r"data.channels=2: the signals have 1 \(C3-M2\)"),
        ("part", {"data": {"signal": {"channels": ["C9"]}}}, DataError, "has no channel C9; it has: C3-M2"),
        ("part", {"data": {"signal": {"window": 5}}}, ConfigError, "did you mean 'window_s'"),
        ("part", {"method": {"flip_prob": 0.0}}, ConfigError, "flip_prob=0.0 applies to images"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(nights, tmp_path, method, overrides, error, match):
    with pytest.raises(error, match=match):
        train(method, nights, tmp_path / "run", overrides={"steps": 1, "devices": "cpu", **overrides}, quiet=True)
    assert not (tmp_path / "run").exists()


def test_settings_of_signals_are_refused_for_images(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"data.signal.\* only applies to signals"):
        train("part", tmp_path, tmp_path / "run", overrides={"data": {"signal": {"window_s": 5}}}, quiet=True)


def test_amplitudes_of_a_batch_differ():
    views = part().make_views(0)
    window = np.ones((1, 50, 1), np.float32)
    values = {float(views(window, np.random.default_rng(seed)).crops[0].max()) for seed in range(5)}
    assert len(values) == 5 and 0.8 <= min(values) and max(values) <= 1.2
