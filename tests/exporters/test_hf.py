"""Export to transformers: what AutoModel opens gives the encoder's tokens; what it has no class for is refused."""

import json
from pathlib import Path

import pytest
import torch

import smalti
from command import smalti as command
from smalti.errors import ConfigError
from smalti.exporters.hf import export_hf, model_type
from smalti.exporters.timm import export_timm
from smalti.models.build import build_encoder

transformers = pytest.importorskip("transformers")

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
ROTARY = {**SIZE, "embed_dim": 64, "num_heads": 2}
CASES = {
    "vit": ("vit_tiny_patch16_224", SIZE, "vit"),
    "vit, two channels": ("vit_tiny_patch16_224", {**SIZE, "in_chans": 2}, "vit"),
    "dinov2": ("vit_small_patch14_dinov2", SIZE, "dinov2"),
    "dinov2, gated": ("vit_giant_patch14_dinov2", {**SIZE, "mlp_ratio": 2 * 128 / 48}, "dinov2"),
    "registers": ("vit_small_patch14_reg4_dinov2", SIZE, "dinov2_with_registers"),
    "registers with positions": ("vit_tiny_patch16_224", {**SIZE, "reg_tokens": 2}, "dinov2_with_registers"),
    "dinov3": ("vit_small_patch16_dinov3", ROTARY, "dinov3_vit"),
    "dinov3 with biases": ("vit_small_patch16_dinov3_qkvb", ROTARY, "dinov3_vit"),
    "dinov3, gated": ("vit_small_plus_patch16_dinov3", ROTARY, "dinov3_vit"),
}


def encoder_of(case: str) -> smalti.Encoder:
    name, arguments, _ = CASES[case]
    encoder = build_encoder(name, seed=0, **arguments).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in encoder.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            if "gamma" in key:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return encoder


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_automodel_gives_the_encoder_s_tokens_and_smalti_reads_it_back(case: str, tmp_path: Path) -> None:
    encoder = encoder_of(case)
    made = export_hf(encoder, tmp_path / "out")
    assert made.kind == CASES[case][2] and made.difference < (1e-5 if "dinov3" in case else 1e-6)
    assert sorted(path.name for path in made.path.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    again = smalti.load(f"hf:{made.path}", quiet=True)
    images = torch.randn(2, encoder.in_chans, 32, 32, generator=torch.Generator().manual_seed(2))
    assert (again.encode(images).patches - encoder.encode(images).patches).abs().max() < 1e-5
    assert again.mean == encoder.mean and again.std == encoder.std


@torch.no_grad()
def test_the_image_processor_prepares_images_as_smalti_does(tmp_path: Path) -> None:
    encoder = encoder_of("vit")
    export_hf(encoder, tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prepared = torch.as_tensor(processor(pixels.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"])
    assert (prepared - encoder.normalize(pixels[None])).abs().max() < 1e-5


@torch.no_grad()
def test_automodel_also_opens_timm_s_folder(tmp_path: Path) -> None:
    encoder = encoder_of("dinov2")
    export_timm(encoder, tmp_path / "out")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    features = encoder.encode(images)
    tokens = torch.cat([features.prefix, features.patches], dim=1)
    assert (model(images).last_hidden_state - tokens).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("vit_base_patch16_clip_224", SIZE, "it has a norm before its blocks"),
        ("vit_tiny_patch16_224", {**SIZE, "class_token": False, "global_pool": "avg"}, "it has no class token"),
        ("vit_tiny_patch16_224", {**SIZE, "qk_norm": True}, "its attention has norms or a gate"),
        ("vit_tiny_patch16_224", {**SIZE, "img_size": [32, 64]}, "its grid of patches is not square"),
        ("vit_small_patch14_dinov2", {**SIZE, "mlp_ratio": 2.5}, "no whole mlp_ratio gives its MLP's width"),
        ("vit_small_patch16_rope_224", ROTARY, "its positions are not DINOv3's"),
    ],
)
def test_what_transformers_has_no_class_for_is_one_line(name: str, arguments: dict, line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"transformers has no model for {name}: {line}; export to=timm"):
        export_hf(build_encoder(name, seed=0, **arguments), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_pooling_and_gaug_are_refused() -> None:
    encoder = encoder_of("vit")
    encoder.set_pool("prr")
    with pytest.raises(ConfigError, match="pool=prr has no place there"):
        model_type(encoder)
    encoder.set_pool("auto")
    encoder.attach_gaug((4, 4), 0)
    with pytest.raises(ConfigError, match="gaug=true adds a bias"):
        model_type(encoder)


def test_the_command_writes_it_and_names_the_format(tmp_path: Path) -> None:
    done = command("export", "random:test_vit", "to=hf", "load.img_size=32", "--out", tmp_path / "out")
    assert "AutoModel.from_pretrained" in done.stdout and "# vit" in done.stdout
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "vit"
    done = command("export", "random:test_vit", "to=hf", "input=unit", "--out", tmp_path / "two", code=2)
    assert "input=unit only applies to to=onnx; to=hf takes normalized images" in done.stderr
    assert not (tmp_path / "two").exists()
