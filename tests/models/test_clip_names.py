"""Files of OpenCLIP and Perception Encoder: every tensor is read, as timm reads it."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import eva, vision_transformer

from smalti.models.clip_names import tower_of
from smalti.models.layouts import to_timm_names
from smalti.models.loading import _fill as fill
from smalti.models.weights import LoadConfig, read_tensors

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
PE = {
    "class token and attention pooling": "vit_pe_core_tiny_patch16_384",
    "no final norm": "vit_pe_lang_large_patch14_448",
}
PE |= {"LayerScale, no class token": "vit_pe_spatial_gigantic_patch14_448"}


def model_of(name: str) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = timm.create_model(name, img_size=64 if "16" in name else 56, **SMALL).eval()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def official(model: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """A model's tensors with the names of CLIP's code."""
    result: dict[str, torch.Tensor] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        new = re.sub(r"\.(gamma_|ls)([12])(\.gamma)?$", r".ls_\2.gamma", name)
        new = re.sub(r"^blocks\.", "transformer.resblocks.", new)
        new = re.sub(r"(resblocks\.\d+)\.norm([12])", r"\1.ln_\2", new)
        new = new.replace("norm_pre.", "ln_pre.").replace("attn_pool.norm.", "attn_pool.layernorm.")
        new = re.sub(r"^norm\.", "ln_post.", new).replace("patch_embed.proj.", "conv1.")
        new = new.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj").replace("attn.qkv.", "attn.in_proj_")
        new = new.replace("attn.proj.", "attn.out_proj.").replace("attn_pool.proj.", "attn_pool.attn.out_proj.")
        new = new.replace("attn_pool.latent", "attn_pool.probe")
        if new == "cls_token":
            new, tensor = "class_embedding", tensor[0, 0]
        elif new == "pos_embed":
            new, tensor = "positional_embedding", tensor[0]
        elif ".q." in new:
            new = new.replace("attn_pool.q.", "attn_pool.attn.in_proj_")
            tensor = torch.cat([tensor, state[name.replace(".q.", ".kv.")]])
        elif ".kv." in new:
            continue
        result[prefix + new] = tensor.clone()
    text = {"token_embedding.weight": torch.ones(3, 4)} if prefix else {}
    return {**result, f"{prefix}proj": torch.ones(32, 8), **text}


@pytest.mark.parametrize("kind", PE)
@pytest.mark.parametrize("prefix", ["", "visual."])
@torch.no_grad()
def test_files_of_pe_are_read_as_timm_reads_them(kind: str, prefix: str, tmp_path) -> None:
    model = model_of(PE[kind])
    held = official(model, prefix)
    theirs = eva.checkpoint_filter_fn({**held}, model)
    own = model.state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in own.items())  # the names above are PE's
    save_file(held, tmp_path / "pe.safetensors")
    foreign = to_timm_names(read_tensors(tmp_path / "pe.safetensors"))
    size = {"img_size": list(model.patch_embed.img_size)}
    arguments = {**{name: value for name, value in SMALL.items() if name != "num_classes"}, **size}
    description = {"architecture": PE[kind], "model_args": arguments, "mean": None, "std": None}
    encoder = fill(description, foreign, "file", LoadConfig()).eval()
    assert encoder.report.matched == encoder.report.total and not encoder.report.unused
    assert set(encoder.report.dropped) == {f"{prefix}proj", *(["token_embedding.weight"] if prefix else [])}
    images = torch.randn(1, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    features = encoder.encode(images)
    tokens = torch.cat([features.prefix, features.patches], dim=1)
    assert torch.equal(tokens, model.forward_features(images))
    if encoder.pool == "map":
        assert (encoder.image_features(images) - model(images)).abs().max() < 1e-5


@torch.no_grad()
def test_the_vision_tower_of_open_clip_is_read_as_timm_reads_it() -> None:
    model = model_of("vit_base_patch16_clip_224")
    held = official(model, "visual.")
    foreign = to_timm_names(held)
    theirs = vision_transformer.checkpoint_filter_fn({**held}, model)
    own = model.state_dict()
    assert foreign.tensors.keys() == own.keys()
    for name, value in own.items():
        assert torch.equal(foreign.tensors[name], value) and torch.equal(theirs[name], value), name


def test_other_files_have_no_such_tower() -> None:
    resnet = {"visual.conv1.weight": torch.ones(1), "visual.layer1.0.conv1.weight": torch.ones(1)}
    assert tower_of(resnet) is None and tower_of({"patch_embed.proj.weight": torch.ones(1)}) is None
