"""Models of Hugging Face transformers: tokens equal to theirs at several sizes; wrong folders in one line."""

import json
from pathlib import Path

import pytest
import torch

import smalti
from smalti.errors import ConfigError, WeightsError
from smalti.exporters.timm import timm_model
from smalti.models.huggingface import describe

transformers = pytest.importorskip("transformers")

SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
KINDS = {
    "vit": ("ViT", {"hidden_size": 48, "intermediate_size": 100}),
    "vit_mae": ("ViTMAE", {"hidden_size": 48, "intermediate_size": 100, "mask_ratio": 0.0, "decoder_hidden_size": 32}),
    "dinov2": ("Dinov2", {"hidden_size": 48}),
    "dinov2, gated": ("Dinov2", {"hidden_size": 48, "use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegisters", {"hidden_size": 48, "num_register_tokens": 3}),
    "dinov3": ("DINOv3ViT", {"hidden_size": 64, "intermediate_size": 96, "num_register_tokens": 4}),
    "clip": ("CLIPVision", {"hidden_size": 48, "intermediate_size": 100}),
    "siglip": ("SiglipVision", {"hidden_size": 48, "intermediate_size": 100}),
    "dinov3, gated": (
        "DINOv3ViT",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "use_gated_mlp": True,
            "hidden_act": "silu",
            "query_bias": False,
            "value_bias": False,
        },
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.nn.Module]]:
    """A small model of each kind, as ``save_pretrained`` writes it."""
    folder, models = tmp_path_factory.mktemp("hf"), {}
    for kind, (name, arguments) in KINDS.items():
        shape = {**SHAPE, **arguments}
        if name == "ViTMAE":
            shape |= {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 32}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**shape)).eval()
            for key, parameter in model.named_parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
                if "lambda1" in key:
                    parameter.uniform_(0.5, 1.5)
        model.save_pretrained(folder / kind)
        models[kind] = (folder / kind, model)
    return models


def theirs(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Tokens in the order of the image's patches; MAE shuffles them."""
    name = type(model).__name__
    interpolates = ("ViTModel", "ViTMAEModel", "CLIPVisionModel", "SiglipVisionModel")
    options = {"interpolate_pos_encoding": True} if name in interpolates else {}
    if name == "ViTMAEModel":
        noise = torch.arange(images.shape[-1] * images.shape[-2] // 64).expand(len(images), -1).float()
        options["noise"] = noise
    tokens = model(images, **options).last_hidden_state
    if name == "CLIPVisionModel":  # the norm of its class token, which timm applies to all tokens
        return getattr(model, "vision_model", model).post_layernorm(tokens)
    return tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (3, 8)])
@torch.no_grad()
def test_tokens_are_those_of_transformers(kind: str, grid: tuple[int, int], saved) -> None:
    folder, model = saved[kind]
    encoder = smalti.load(f"hf:{folder}", quiet=True)
    images = torch.randn(2, 3, 8 * grid[0], 8 * grid[1], generator=torch.Generator().manual_seed(1))
    features = encoder.encode(images)
    difference = (torch.cat([features.prefix, features.patches], dim=1) - theirs(model, images)).abs().max()
    assert difference < (1e-5 if "dinov3" in kind else 1e-6)


def test_every_tensor_is_accounted_for(saved) -> None:
    for folder, _ in saved.values():
        report = smalti.load(f"hf:{folder}", quiet=True).report
        assert report is not None and report.matched == report.total and not report.unused
        known = ("position_ids", "mask_token", "pooler", "decoder", "register_tokens")
        assert all(any(part in name for part in known) for name in report.dropped)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_vision_part_of_a_whole_model_has_the_published_vector(kind: str, saved, tmp_path: Path) -> None:
    name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    vision = {**SHAPE, "hidden_size": 48, "intermediate_size": 100}
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
        model = getattr(transformers, f"{name}Model")(config).eval()
    model.save_pretrained(tmp_path)
    encoder = smalti.load(f"hf:{tmp_path}", quiet=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    vector = model.vision_model(images).pooler_output
    assert (encoder.image_features(images) - vector).abs().max() < 1e-5
    assert encoder.pool == ("map" if kind == "siglip" else "auto")
    assert encoder.report is not None and not encoder.report.unused
    assert any("text_model" in dropped for dropped in encoder.report.dropped)


@torch.no_grad()
def test_names_in_memory_are_read_as_those_of_files(saved, tmp_path: Path) -> None:
    for kind in ("vit", "dinov3"):
        folder, model = saved[kind]
        torch.save(model.state_dict(), tmp_path / "state.pth")
        held = smalti.load(f"hf:{folder}", quiet=True)
        arguments = held.config()["model_args"]
        again = smalti.models.build.encoder_from_config({**held.config(), "model_args": arguments})
        from smalti.models.layouts import to_timm_names
        from smalti.models.weights import load_vit, read_tensors

        load_vit(again.vit, to_timm_names(read_tensors(tmp_path / "state.pth")), "state")
        images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        assert torch.equal(again.eval().encode(images).patches, held.encode(images).patches)


def test_another_epsilon_of_the_norms_stays_and_timm_can_t_have_it(saved, tmp_path: Path) -> None:
    encoder = smalti.load(f"hf:{saved['vit'][0]}", quiet=True)
    assert encoder.norm_eps == encoder.vit.norm.eps == 1e-12
    with pytest.raises(ConfigError, match="eps=1e-12, which timm's vit_small_patch16_224 can't be told"):
        timm_model(encoder)
    assert smalti.load(f"hf:{saved['dinov2'][0]}", quiet=True).norm_eps is None  # timm's own


def test_normalisation_is_the_processor_s(saved, tmp_path: Path) -> None:
    folder = saved["vit"][0]
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25] * 3})
    )
    encoder = smalti.load(f"hf:{folder}", quiet=True)
    assert encoder.mean == (0.5, 0.5, 0.5) and encoder.std == (0.25, 0.25, 0.25)


def test_wrong_folders_are_one_line(saved, tmp_path: Path) -> None:
    config = json.loads((saved["vit"][0] / "config.json").read_text())
    for change, line in (
        ({"model_type": "swin"}, "model_type=swin: can't be read; it is one of vit, vit_mae"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_act": "relu"}, "hidden_act=relu: can't be read"),
    ):
        with pytest.raises(WeightsError, match=line):
            describe({**config, **change})
    with pytest.raises(WeightsError, match="no such folder; hf:OWNER/NAME names a model of the hub"):
        smalti.load("hf:./nothing")
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        smalti.load(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"has no model\.safetensors"):
        smalti.load(f"hf:{tmp_path}")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="names files outside of its folder"):
        smalti.load(f"hf:{tmp_path}")
