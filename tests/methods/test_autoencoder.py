"""The autoencoder: its loss by hand, that it learns, and its codes as tokens of another run, whole without it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from smalti.config import read_yaml, settings
from smalti.data.crops import CentreCrop
from smalti.data.images.folders import open_images
from smalti.data.images.labelled import load_images
from smalti.data.views import ViewMaker, Views
from smalti.errors import ConfigError, WeightsError
from smalti.functional.patches import patchify
from smalti.layers.tokens import TokenConfig
from smalti.methods import base
from smalti.methods.autoencoder import Autoencoder, AutoencoderConfig, pca_psnr, reconstruction_loss
from smalti.methods.base import MethodConfig, TokenMethod
from smalti.runs.build import load_method
from smalti.runs.train import resume, train

SMALL = {
    "method": {"width": 8},
    "tokens": {"patch_size": 4, "dim": 6},
    "data": {"image_size": 16},
    "batch_size": 4,
    "devices": "cpu",
    "checkpoint": {"every": 2},
}


@settings
class ReaderConfig(MethodConfig):
    """None of its own."""

    name: str = "reader"

    name: str = "reader"


class Reader(TokenMethod):
    """Learns the mean token: the least that can be learned of tokens."""

    Config = ReaderConfig
    title = "mean token"
    paper = "none, arXiv:0"

    def __init__(self, tokens, config) -> None:
        super().__init__(tokens, config)
        self.guess = nn.Parameter(torch.ones(tokens.token_dim))

    def make_views(self, image_size: int) -> ViewMaker:
        return CentreCrop(image_size)

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        return {"guess": (self.tokens.encode(views.global_crops, views.keys) - self.guess).square().mean()}


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(base._REGISTRY, "reader", Reader)
    monkeypatch.setattr(Reader, "name", "reader", raising=False)
    return "reader"


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    return train(
        "autoencoder", photos, tmp_path_factory.mktemp("ae") / "run", overrides={**SMALL, "steps": 4}, quiet=True
    )


def test_the_loss_by_hand() -> None:
    images, prediction = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, -1.0], [0.5, 0.0]]]])
    assert_close(reconstruction_loss(prediction, images, 0.0), torch.tensor(2.5 / 4))
    assert_close(reconstruction_loss(prediction, images, 2.0), torch.tensor(2.5 / 4 + 2 * 2.25 / 4))


def test_terms_are_means_over_pixel_values(photos: Path) -> None:
    method = Autoencoder(
        Autoencoder.make_tokens(
            base.TokenConfig(kind="autoencoder", patch_size=4, dim=6), AutoencoderConfig(width=8), 16, 3
        ),
        AutoencoderConfig(width=8, kl_weight=0.5),
    )
    pixels = load_images(open_images(photos).paths[:4], 16)
    views = Views(
        crops=(pixels,),
        boxes=torch.zeros(4, 4),
        flips=torch.zeros(4, dtype=torch.bool),
        source_size=torch.ones(4, 2, dtype=torch.int64),
        index=torch.arange(4),
        keys=torch.arange(4),
        skipped=(),
        labels=None,
    )
    losses = method(views, 0.0)
    mean, log_variance = method.tokens.moments(pixels)
    nats = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    assert_close(losses["kl"], 0.5 * nats.flatten(1).sum(1).mean() / (3 * 16 * 16))
    assert method.observations["psnr"] > 0


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"kind": "pca"}, "tokens.kind=pca: autoencoder trains its own tokens"),
        ({"patch_size": 3}, "tokens.patch_size=3: a power of 2"),
        ({"patch_size": 32}, "data.image_size=16: a multiple of 32, the autoencoder's patch size"),
    ],
)
def test_tokens_that_it_cannot_make(tmp_path: Path, photos: Path, tokens: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train("autoencoder", photos, tmp_path / "run", overrides={**SMALL, "tokens": tokens}, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_short_run_learns_to_draw_the_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(16):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((16, 16), Image.Resampling.BILINEAR).save(tmp_path / f"{number}.png")
    overrides = {**SMALL, "steps": 120, "batch_size": 16, "checkpoint": {"every": 120}, "optim": {"lr": 4e-3}}
    overrides["method"] = {"width": 8, "crop_scale": [1.0, 1.0]}
    run = train("autoencoder", tmp_path, tmp_path / "run", overrides=overrides, quiet=True)
    tokens = load_method(run).tokens
    pixels = load_images(sorted(tmp_path.glob("*.png")), 16, mode="centre")
    truth = pixels.float() / 255
    with torch.no_grad():
        error = (tokens.decode(tokens.encode(pixels)) - truth).square().mean()
    assert error < truth.var((2, 3)).mean() / 2  # half of what is left once each image's mean colour is known


def test_codes_are_tokens_of_another_run_that_needs_the_first_no_more(
    tmp_path: Path, photos: Path, coder: Path, reader: str
) -> None:
    source = shutil.copytree(coder, tmp_path / "coder")
    overrides = {
        "tokens": {"kind": "autoencoder", "path": str(source)},
        **{key: SMALL[key] for key in ("data", "batch_size", "devices", "checkpoint")},
    }
    whole = train(reader, photos, tmp_path / "whole", overrides={**overrides, "steps": 4}, quiet=True)
    assert read_yaml(whole / "config.yaml")["tokens"] == {
        "kind": "autoencoder", "patch_size": 4, "dim": 6, "path": str(source.resolve()),
        "network": {"width": 8, "num_blocks": 1},
    }  # fmt: skip
    method, taught = load_method(whole), load_method(source)
    pixels = load_images(open_images(photos).paths[:8], 16)
    centred = method.tokens.encode(pixels) * method.tokens.scale + method.tokens.mean
    assert_close(centred, taught.tokens.encode(pixels), atol=1e-5, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in method.tokens.parameters())
    assert method.tokens.scale != 1.0 and method.tokens.mean.any()

    broken = train(reader, photos, tmp_path / "broken", overrides={**overrides, "steps": 4}, quiet=True)
    for step in (broken / "checkpoints").glob("step_00000004"):
        shutil.rmtree(step)
    shutil.rmtree(source)
    resume(broken, quiet=True)
    again, known = load_method(broken).state_dict(), method.state_dict()
    assert all(torch.equal(again[key], known[key]) for key in known)
    onward = train(
        reader, photos, tmp_path / "onward", init=str(whole), overrides={"steps": 1, "devices": "cpu"}, quiet=True
    )
    assert torch.equal(load_method(onward).tokens.scale, method.tokens.scale)


@pytest.mark.parametrize(
    ("tokens", "data", "message"),
    [
        ({"patch_size": 8}, {}, r"tokens.patch_size=8: .* makes tokens of 4; leave it out"),
        ({"dim": 16}, {}, r"tokens.dim=16: .* makes tokens of 6; leave it out"),
        ({}, {"image_size": 18}, "data.image_size=18: a multiple of 4, the autoencoder's patch size"),
        ({}, {"channels": 1}, r"data.channels=1: .* takes images of 3 channels"),
        ({"kind": "pca"}, {}, "tokens.kind=pca reads none"),
    ],
)
def test_a_run_that_an_autoencoder_does_not_fit(
    tmp_path: Path,
    photos: Path,
    coder: Path,
    reader: str,
    tokens: dict[str, object],
    data: dict[str, object],
    message: str,
) -> None:
    overrides = {
        **SMALL, "method": {}, "tokens": {"kind": "autoencoder", "path": str(coder), **tokens},
        "data": {"image_size": 16, **data}, "steps": 1,
    }  # fmt: skip
    del overrides["method"]
    with pytest.raises(ConfigError, match=message):
        train(reader, photos, tmp_path / "run", overrides=overrides, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_path_without_an_autoencoder(tmp_path: Path, photos: Path, reader: str) -> None:
    run = train(
        reader,
        photos,
        tmp_path / "run",
        overrides={"data": {"image_size": 16}, "steps": 1, "devices": "cpu"},
        quiet=True,
    )
    for path, error, message in (
        (tmp_path, WeightsError, "is not a run directory"),
        (run, ConfigError, "is a run of reader; one of autoencoder is needed"),
    ):
        with pytest.raises(error, match=message):
            train(
                reader,
                photos,
                tmp_path / "x",
                overrides={"tokens": {"kind": "autoencoder", "path": str(path)}},
                quiet=True,
            )


def test_principal_components_are_measured_as_by_a_singular_value_decomposition() -> None:
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    patches = patchify(images, (4, 4)).flatten(0, 1).double()
    u, s, v = torch.linalg.svd(patches - patches.mean(0), full_matrices=False)
    rebuilt = u[:, :10] * s[:10] @ v[:10] + patches.mean(0)
    expected = -10 * (rebuilt - patches).square().mean().log10()
    assert_close(pca_psnr(images, (4, 4), 10), expected)
    assert pca_psnr(images[:, :, :1, :1].expand(-1, -1, 16, 16), (4, 4), 10) > 100  # three numbers say all


def test_a_run_that_principal_components_beat_says_so_near_its_end() -> None:
    torch.manual_seed(0)
    config = AutoencoderConfig(width=8)
    tokens = Autoencoder.make_tokens(TokenConfig(kind="autoencoder", patch_size=4, dim=6), config, 16, 3)
    method, smooth = Autoencoder(tokens, config), torch.rand(16, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    images = (F.interpolate(smooth, (16, 16), mode="bilinear") * 255).to(torch.uint8)
    views = Views((images,), *(torch.zeros(16),) * 3, torch.arange(16), torch.arange(16))
    method(views, 0.5)
    assert method.diagnose(views, 0.5).warnings == {}
    found = method.diagnose(views, 0.95)
    assert found.numbers["psnr_pca"] > method.observations["psnr"]
    assert "6 principal components per patch reach" in found.warnings["worse than pca"]
    method.observations["psnr"] = torch.tensor(99.0)
    assert method.diagnose(views, 0.95).warnings == {}
