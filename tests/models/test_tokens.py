"""KL autoencoders in diffusers' form as sources of tokens: one is made and saved here."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from smalti.errors import ConfigError, MissingExtraError, WeightsError
from smalti.layers.tokens import TokenConfig, build_tokens
from smalti.models.tokens import VAE_FILE, fill_tokens, with_network

diffusers = pytest.importorskip("diffusers", reason="extra gen is not installed")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pixels a code of six numbers; with an attention layer."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    model = diffusers.models.AutoencoderKL(
        block_out_channels=(8, 16, 16), latent_channels=6, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


def images() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("named", ["folder", "file"])
def test_tokens_are_diffusers_codes_and_come_back_through_its_decoder(vae: Path, named: str) -> None:
    config = with_network(TokenConfig(kind="vae", path=str(vae if named == "folder" else vae / VAE_FILE)), {}, 3)
    assert (config.patch_size, config.dim) == (4, 6)
    tokens = build_tokens(config, 16, 3).eval()
    fill_tokens(tokens, config)
    model = diffusers.models.AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        codes = model.encode(images() / 127.5 - 1).latent_dist.mean
        drawn = model.decode(codes).sample
    assert_close(tokens.encode(images()), codes.flatten(2).mT, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert_close(tokens.decode(tokens.encode(images())), (drawn / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-4)
    tokens.fit([images()])
    drawn = torch.cat([tokens.encode(images(), torch.arange(5) + 5 * n) for n in range(300)])
    assert_close(drawn.flatten(0, 1).var(0).mean().item(), 1.0, rtol=0.03, atol=0)


def test_files_with_the_attention_s_older_names_are_read(vae: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(vae / VAE_FILE)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in tensors.items():
        for new, old in older.items():
            key = key.replace(f".{new}.", f".{old}.") if "attentions" in key else key
        renamed[key] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / VAE_FILE)
    (tmp_path / "config.json").write_text((vae / "config.json").read_text())
    filled = []
    for folder in (vae, tmp_path):
        config = with_network(TokenConfig(kind="vae", path=str(folder)), {}, 3)
        filled.append(build_tokens(config, 16, 3))
        fill_tokens(filled[-1], config)
    assert_close(filled[0].encode(images()), filled[1].encode(images()))


def test_a_vae_of_another_width_size_or_class_or_none_at_all(vae: Path, tmp_path: Path) -> None:
    for given, channels, message in (
        ({"dim": 16}, 3, r"tokens.dim=16: .* makes tokens of 6; leave it out"),
        ({"patch_size": 8}, 3, r"tokens.patch_size=8: .* makes tokens of 4"),
        ({}, 1, r"data.channels=1: .* takes images of 3 channels"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_network(TokenConfig(kind="vae", path=str(vae), **given), given, channels)
    config = with_network(TokenConfig(kind="vae", path=str(vae)), {}, 3)
    with pytest.raises(ConfigError, match=r"data.image_size=18: a multiple of 4, the autoencoder's patch size"):
        build_tokens(config, 18, 3)
    with pytest.raises(WeightsError, match=f"lacks {VAE_FILE}; a folder with config.json"):
        with_network(TokenConfig(kind="vae", path=str(tmp_path)), {}, 3)
    with pytest.raises(ConfigError, match=r"tokens.kind=vae: set tokens.path to a folder in diffusers' format"):
        build_tokens(TokenConfig(kind="vae"), 16, 3)
    shape = json.loads((vae / "config.json").read_text())
    (tmp_path / VAE_FILE).write_bytes((vae / VAE_FILE).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**shape, "_class_name": "VQModel"}))
    with pytest.raises(ConfigError, match=r"describes VQModel; tokens.kind=vae takes AutoencoderKL"):
        with_network(TokenConfig(kind="vae", path=str(tmp_path)), {}, 3)
    (tmp_path / "config.json").write_text(json.dumps({**shape, "latent_channels": 5}))
    wider = with_network(TokenConfig(kind="vae", path=str(tmp_path)), {}, 3)
    with pytest.raises(WeightsError, match="is not of the shape that its settings say"):
        fill_tokens(build_tokens(wider, 16, 3), wider)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config.json: can't be read"):
        with_network(TokenConfig(kind="vae", path=str(tmp_path)), {}, 3)


def test_without_diffusers_the_extra_is_named(vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers.models", None)
    with pytest.raises(MissingExtraError, match=r'tokens.kind=vae needs diffusers: pip install "smalti\[gen\]"'):
        with_network(TokenConfig(kind="vae", path=str(vae)), {}, 3)
