"""Checkpoints of other projects, made from a tiny model by their own names and shapes, give that model's outputs."""

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from smalti.errors import ConfigError, WeightsError
from smalti.exporters.timm import export_timm
from smalti.functional.positions import Resampling, resample_positions
from smalti.models import loading
from smalti.models.build import build_encoder, encoder_from_config
from smalti.models.encoder import Encoder
from smalti.models.layouts import fold_layer_scale, likely_names, to_timm_names
from smalti.models.loading import load
from smalti.models.weights import load_vit, read_checkpoint, read_tensors, resample_patches

PLAIN, V2, REG = "vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"
SHAPE = {"depth": 2, "embed_dim": 24, "num_heads": 3}


def tiny(name: str = PLAIN, **arguments: Any) -> Encoder:
    """A small encoder, two patches by two, all of whose tensors are random, so that none can be mixed up unseen."""
    encoder = build_encoder(name, **{**SHAPE, "img_size": 32 if "16" in name else 28, "seed": 0, **arguments})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.vit.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return encoder.eval()


def state(encoder: Encoder) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in encoder.vit.state_dict().items()}


def images(encoder: Encoder) -> Tensor:
    return torch.randn(2, 3, *encoder.img_size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def tokens(encoder: Encoder, pixels: Tensor) -> Tensor:
    features = encoder.encode(pixels)
    return torch.cat([features.prefix, features.patches], dim=1)


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """``timm:NAME`` is a small model of that name."""

    def build(name: str, *, img_size: Any = None, **arguments: Any) -> Encoder:
        native = {"img_size": img_size or (32 if "16" in name else 28)}
        return build_encoder(name, **{**SHAPE, **native, **arguments})

    def described(config: Mapping[str, Any], seed: int = 0) -> Encoder:
        native = {"img_size": 32 if "16" in config["architecture"] else 28}
        return encoder_from_config({**config, "model_args": {**SHAPE, **native, **config["model_args"]}}, seed)

    monkeypatch.setattr(loading, "build_encoder", build)
    monkeypatch.setattr(loading, "encoder_from_config", described)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in tensors.items()}


def noise(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.randn_like(value) for key, value in tensors.items()}


HEAD = {f"head.mlp.{number}.weight": torch.ones(2, 2) for number in (0, 2, 4)} | {
    "head.last_layer.weight_g": torch.ones(2, 1),
    "head.last_layer.weight_v": torch.ones(2, 2),
}
ONE = torch.ones(1, 1, 24)


def dino(s: dict[str, Tensor], **beside: Any) -> dict[str, Any]:
    student = under("module.backbone.", noise(s)) | under("module.", HEAD)
    return {"student": student, "teacher": under("backbone.", s) | HEAD, "epoch": 1, "optimizer": {}, **beside}


def decoder() -> dict[str, Tensor]:
    return {
        "mask_token": ONE,
        "decoder_pos_embed": ONE,
        "decoder_embed.weight": torch.ones(3, 3),
        "decoder_blocks.0.attn.qkv.weight": torch.ones(3, 3),
        "decoder_norm.weight": torch.ones(3),
        "decoder_pred.weight": torch.ones(3, 3),
    }


def split(s: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {key: value for key, value in s.items() if ".qkv." not in key}
    for key in set(s) - set(result):
        parts = zip(("query", "key", "value"), s[key].chunk(3), strict=True)
        result |= {key.replace("qkv", name): part for name, part in parts}
    return result


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "DINO backbone": lambda s: s,
    "DINO full": lambda s: dino(s, args=argparse.Namespace(arch="vit_tiny"), dino_loss={"center": torch.ones(1, 2)}),
    "iBOT teacher": lambda s: {"state_dict": s | {"head.last_layer2.weight_v": torch.ones(2, 2), "masked_embed": ONE}},
    "iBOT full": lambda s: dino(s, ibot_loss={"center": torch.ones(1, 2)}),
    "MAE encoder": lambda s: {"model": s},
    "MAE full": lambda s: {"model": s | decoder(), "optimizer": {}, "epoch": 1, "args": argparse.Namespace(lr=1.0)},
    "MAE fine-tuned": lambda s: {
        "model": {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: s[key] for key in s}
        | {"head.weight": torch.ones(5, 24)}
    },
    "DropPos": lambda s: under("module.", s | {"mask_token": ONE}),
    "DropPos training": lambda s: {
        "model": "vit_tiny",
        "state_dict": under("module.", s | decoder() | {"mask_pos_token": ONE, "aux_decoder_pred.weight": ONE}),
    },
    "Mugs": lambda s: dino(
        s | {"relation_blocks.0.attn.qkv.weight": torch.ones(3, 3)}, student_mem={"queue": torch.ones(3, 2)}
    ),
    "CrIBo": lambda s: dino(s | {"head.last_layer_c.weight_v": torch.ones(2, 2)}),
    "CrOC": lambda s: dino(s, croc_loss={"center": torch.ones(1, 2)}),
    "Leopart": lambda s: under("model.", s | {"projection_head.0.weight": ONE, "prototypes.weight": ONE}),
    "TimeT": lambda s: under("feature_extractor.backbone.", s) | {"prototypes": ONE, "mlp_head.0.weight": ONE},
    "NeCo evaluation": lambda s: {"state_dict": under("model.", s) | {"finetune_head.weight": ONE}, "epoch": 1},
    "split attention": split,
    "compiled under DDP": lambda s: under("module._orig_mod.", s),
    "wrapped blocks": lambda s: {key.replace(".attn.", "._fsdp_wrapped_module.attn."): s[key] for key in s},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_gives_the_outputs_of_its_model(layout: str, tmp_path: Path) -> None:
    source = tiny()
    torch.save(LAYOUTS[layout](state(source)), tmp_path / "x.pth")
    encoder = load(f"timm:{PLAIN}@{tmp_path / 'x.pth'}", quiet=True)
    assert_close(tokens(encoder, images(source)), tokens(source, images(source)), atol=1e-6, rtol=0)
    report = encoder.report
    assert report is not None and report.matched == report.total and not report.missing and not report.unused


def test_what_was_used_and_dropped_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(dino(state(tiny())), tmp_path / "x.pth")
    encoder = load(f"timm:{PLAIN}@{tmp_path / 'x.pth'}")
    line = capsys.readouterr().err
    assert "x.pth (teacher): 30 of 30 tensors matched; dropped head.mlp.0.weight, head.mlp.2.weight and 3 more" in line
    assert line.count("\n") == 1
    assert encoder.report is not None
    assert encoder.report.dropped == tuple(HEAD) and set(encoder.report.used) == set(encoder.vit.state_dict())
    assert "missing: none\n" in encoder.report.details() and "head.last_layer.weight_v" in encoder.report.details()


# DINOv2 and NeCo: LayerScale, registers, chunks, SwiGLU.


def v2_names(encoder: Encoder, class_position: Tensor | None = None) -> dict[str, Tensor]:
    """DINOv2's own names; with registers its table keeps a row for the class token, which timm adds to the token."""
    s = state(encoder)
    if "reg_token" in s:
        assert class_position is not None
        s["register_tokens"] = s.pop("reg_token")
        s["cls_token"] = s["cls_token"] - class_position
        s["pos_embed"] = torch.cat([class_position, s["pos_embed"]], dim=1)
    return s | {"mask_token": torch.ones(1, 24)}


@pytest.mark.parametrize("name", [V2, REG])
@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2_with_and_without_registers(name: str, chunked: bool, tmp_path: Path) -> None:
    source = tiny(name)
    s = v2_names(source, torch.randn(1, 1, 24))
    if chunked:  # the second block stands in a second chunk, under its global number
        s = {key.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): s[key] for key in s}
        torch.save({"teacher": under("backbone.", s) | {"dino_head.mlp.0.weight": ONE}}, tmp_path / "x.pth")
    else:
        torch.save(s, tmp_path / "x.pth")
    encoder = load(f"timm:{name}@{tmp_path / 'x.pth'}", quiet=True)
    assert_close(tokens(encoder, images(source)), tokens(source, images(source)), atol=1e-5, rtol=0)
    assert "mask_token" in str(encoder.report and encoder.report.dropped)


def test_swiglu_has_another_name() -> None:
    source = tiny("vit_giant_patch14_dinov2")
    s = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value for key, value in state(source).items()}
    x = torch.randn(1, 5, 24)
    gate, value = F.linear(x, s["blocks.0.mlp.w12.weight"], s["blocks.0.mlp.w12.bias"]).chunk(2, dim=-1)
    expected = F.linear(F.silu(gate) * value, s["blocks.0.mlp.w3.weight"], s["blocks.0.mlp.w3.bias"])
    encoder = build_encoder("vit_giant_patch14_dinov2", **SHAPE, img_size=28, seed=3).eval()
    load_vit(encoder.vit, to_timm_names(s), "file")
    with torch.no_grad():
        assert_close(encoder.vit.blocks[0].mlp(x), expected, atol=1e-5, rtol=1e-5)


def test_ibot_s_old_names_of_layer_scale() -> None:
    source = tiny(init_values=0.1)
    s = {key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): v for key, v in state(source).items()}
    assert "blocks.1.gamma_2" in s
    encoder = build_encoder(PLAIN, **SHAPE, img_size=32, init_values=1.0, seed=3).eval()
    load_vit(encoder.vit, to_timm_names(s), "file")
    assert_close(tokens(encoder, images(source)), tokens(source, images(source)))


@pytest.mark.parametrize("name", [REG, V2])
def test_registers_are_dropped_on_request(name: str, tmp_path: Path) -> None:
    with_registers = tiny(REG)
    path = tmp_path / "reg4.pth"
    torch.save(v2_names(with_registers, torch.randn(1, 1, 24)), path)
    without = tiny(REG, reg_tokens=0)
    without.vit.load_state_dict({key: v for key, v in state(with_registers).items() if key != "reg_token"})
    encoder = load(f"timm:{name}@{path}", registers="drop", quiet=True)
    assert encoder.num_prefix_tokens == 1
    assert_close(tokens(encoder, images(without)), tokens(without, images(without)), atol=1e-5, rtol=0)
    assert "4 registers dropped" in str(encoder.report)
    again = encoder_from_config(encoder.config())
    assert again.num_prefix_tokens == 1


def test_registers_into_a_model_without_them_are_refused_unless_told(tmp_path: Path) -> None:
    torch.save(v2_names(tiny(REG), torch.randn(1, 1, 24)), tmp_path / "reg4.pth")
    with pytest.raises(WeightsError, match=r"4 registers.*the model is .*load.registers=drop leaves them out"):
        load(f"timm:{V2}@{tmp_path / 'reg4.pth'}")


def test_neco_s_training_checkpoint_must_be_told_which_network(tmp_path: Path) -> None:
    source, other = tiny(V2), tiny(V2)
    with torch.no_grad():
        other.vit.patch_embed.proj.weight.neg_()
    both = under("model.", v2_names(source) | {"projection_head.0.weight": ONE})
    both |= under("teacher.", v2_names(other) | {"projection_head.0.weight": ONE})
    torch.save({"state_dict": both, "epoch": 3, "hyper_parameters": {"lr": 1e-5}}, tmp_path / "last.ckpt")
    spec = f"timm:{V2}@{tmp_path / 'last.ckpt'}"
    with pytest.raises(WeightsError, match=r"last.ckpt: the file holds 2.*weights=student .*weights=teacher"):
        load(spec)
    x = images(source)
    assert_close(tokens(load(spec, network="student", quiet=True), x), tokens(source, x))
    assert_close(tokens(load(spec, network="teacher", quiet=True), x), tokens(other, x))
    with pytest.raises(WeightsError, match=r"weights=ema names 0 of the networks in the file \('model.', 'teacher.'\)"):
        load(spec, network="ema")


def test_the_teacher_is_the_default_where_two_stand_under_keys(tmp_path: Path) -> None:
    source = tiny()
    s = state(source)
    torch.save(dino(s) | {"student": under("module.backbone.", s | {"cls_token": 0 * ONE})}, tmp_path / "x.pth")
    spec = f"timm:{PLAIN}@{tmp_path / 'x.pth'}"
    assert_close(load(spec, quiet=True).vit.cls_token.detach(), s["cls_token"])
    assert not load(spec, network="student", quiet=True).vit.cls_token.any()


def test_a_choice_in_a_file_of_one_network_is_refused(tmp_path: Path) -> None:
    torch.save(state(tiny()), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="holds one network and doesn't call it teacher; leave weights=teacher out"):
        load(f"timm:{PLAIN}@{tmp_path / 'x.pth'}", network="teacher")


# Layouts without a class token, or without its use.


def test_selfpatch_has_neither_class_token_nor_final_norm(tmp_path: Path) -> None:
    source = tiny(class_token=False, final_norm=False)
    head = {"head.cls_token": ONE, "head.norm.weight": torch.ones(24), "head.norm.bias": torch.ones(24)}
    content = {"teacher": under("backbone.", state(source)) | head, "student": {}}
    torch.save(content, tmp_path / "x.pth")
    encoder = load(f"timm:{PLAIN}@{tmp_path / 'x.pth'}", quiet=True)
    assert encoder.num_prefix_tokens == 0
    assert_close(tokens(encoder, images(source)), tokens(source, images(source)))


def test_flsl_never_used_its_class_token(tmp_path: Path) -> None:
    source = tiny(class_token=False)
    torch.save(dino(state(source) | {"cls_token": ONE}, flsl_loss={"center": ONE}), tmp_path / "x.pth")
    encoder = load(f"timm:{PLAIN}@{tmp_path / 'x.pth'}", quiet=True)
    assert_close(tokens(encoder, images(source)), tokens(source, images(source)))
    assert "FLSL doesn't train" in str(encoder.report)
    torch.save(state(source) | {"cls_token": ONE}, tmp_path / "bare.pth")  # nothing says that it is FLSL's
    with pytest.raises(WeightsError, match=r"'pos_embed' is \(1, 4, 24\) and must be \(1, 5, 24\)"):
        load(f"timm:{PLAIN}@{tmp_path / 'bare.pth'}")


def flax_tree(s: dict[str, Tensor], num_heads: int) -> dict[str, np.ndarray]:
    """A ViT's tensors as Flax arrays: kernels end with outputs, heads are an axis, the table is a plane."""
    width = s["norm.weight"].shape[0]
    kernel = s["patch_embed.proj.weight"].permute(2, 3, 1, 0)
    tree = {
        "ToTokenSequence_0/embedding/kernel": kernel,
        "ToTokenSequence_0/embedding/bias": s["patch_embed.proj.bias"],
    }
    tree["ToTokenSequence_0/posembed_input"] = s["pos_embed"].reshape(1, 2, 2, width)
    tree |= {"encoder_norm/scale": s["norm.weight"], "encoder_norm/bias": s["norm.bias"]}
    for i in range(2):
        block, ours = f"encoderblock_{i}", f"blocks.{i}"
        for number in (0, 1):
            tree[f"{block}/LayerNorm_{number}/scale"] = s[f"{ours}.norm{number + 1}.weight"]
            tree[f"{block}/LayerNorm_{number}/bias"] = s[f"{ours}.norm{number + 1}.bias"]
            tree[f"{block}/MlpBlock_0/Dense_{number}/kernel"] = s[f"{ours}.mlp.fc{number + 1}.weight"].T
            tree[f"{block}/MlpBlock_0/Dense_{number}/bias"] = s[f"{ours}.mlp.fc{number + 1}.bias"]
        attention = f"{block}/MultiHeadDotProductAttention_0"
        weights, biases = s[f"{ours}.attn.qkv.weight"].chunk(3), s[f"{ours}.attn.qkv.bias"].chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            tree[f"{attention}/{name}/kernel"] = weight.T.reshape(width, num_heads, -1)
            tree[f"{attention}/{name}/bias"] = bias.reshape(num_heads, -1)
        tree[f"{attention}/out/kernel"] = s[f"{ours}.attn.proj.weight"].T.reshape(num_heads, -1, width)
        tree[f"{attention}/out/bias"] = s[f"{ours}.attn.proj.bias"]
    return {key: np.ascontiguousarray(value.numpy()) for key, value in tree.items()}


def flax_forward(tree: dict[str, np.ndarray], pixels: Tensor) -> Tensor:
    """LOCA's encoder written from Flax's definitions: DenseGeneral by einsum, GELU by tanh, LayerNorm's eps 1e-6."""
    t = {key: torch.from_numpy(value).double() for key, value in tree.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt() * t[f"{name}/scale"] + t[f"{name}/bias"]

    patches = pixels.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1)  # B h w p q C
    x = torch.einsum("bhwpqc,pqcd->bhwd", patches, t["ToTokenSequence_0/embedding/kernel"])
    x = (x + t["ToTokenSequence_0/embedding/bias"] + t["ToTokenSequence_0/posembed_input"]).flatten(1, 2)
    for i in range(2):
        block = f"encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_0"
        y = norm(x, f"{block}/LayerNorm_0")
        q, k, v = (
            torch.einsum("bnd,dhe->bnhe", y, t[f"{attention}/{name}/kernel"]) + t[f"{attention}/{name}/bias"]
            for name in ("query", "key", "value")
        )
        weights = (torch.einsum("bnhe,bmhe->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        y = torch.einsum("bhnm,bmhe->bnhe", weights, v)
        x = x + torch.einsum("bnhe,hed->bnd", y, t[f"{attention}/out/kernel"]) + t[f"{attention}/out/bias"]
        y = norm(x, f"{block}/LayerNorm_1") @ t[f"{block}/MlpBlock_0/Dense_0/kernel"]
        y = F.gelu(y + t[f"{block}/MlpBlock_0/Dense_0/bias"], approximate="tanh")
        x = x + y @ t[f"{block}/MlpBlock_0/Dense_1/kernel"] + t[f"{block}/MlpBlock_0/Dense_1/bias"]
    return norm(x, "encoder_norm")


@pytest.mark.parametrize("container", ["npz", "safetensors", "nested"])
def test_loca_s_arrays_give_what_flax_computes(container: str, tmp_path: Path) -> None:
    source = tiny(class_token=False)
    tree = flax_tree(state(source), 3)
    extras = {"position_predictor/kernel": np.ones((24, 4)), "final_norm/scale": np.ones(24)}
    extras |= {"cross_attention_block/LayerNorm_0/scale": np.ones(24)}
    extras |= {"projection_head_for_clustering_prediction/prototypes": np.ones((2, 2))}
    flat = {f"params/{key}": value for key, value in (tree | extras).items()}
    flat |= {f"ema_params/{key}": value * 0 for key, value in tree.items()}
    flat |= {f"opt_state/0/mu/{key}": value for key, value in tree.items()} | {"global_step": np.array(7)}
    path = tmp_path / {"npz": "loca.npz", "safetensors": "loca.safetensors", "nested": "loca.pth"}[container]
    if container == "npz":
        np.savez(path, **flat)
    elif container == "safetensors":
        save_file({key.replace("/", "."): torch.from_numpy(value).clone() for key, value in flat.items()}, path)
    else:
        torch.save({"params": {key: torch.from_numpy(value) for key, value in tree.items()}}, path)
    encoder = load(f"timm:{PLAIN}@{path}", quiet=True)
    x = images(source).double()
    expected = flax_forward(tree, x)
    assert_close(tokens(encoder.double(), x), expected, atol=1e-9, rtol=0)
    assert not torch.allclose(tokens(source.double(), x), expected, atol=1e-6)  # the tanh form of GELU counts
    assert encoder_from_config(encoder.config()).vit.blocks[0].mlp.act.__class__.__name__ == "GELUTanh"
    if container != "nested":
        assert not load(f"timm:{PLAIN}@{path}", network="teacher", quiet=True).vit.pos_embed.any()


def test_another_number_of_heads_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "loca.npz", **flax_tree(state(tiny(class_token=False)), 4))
    with pytest.raises(WeightsError, match="made with 4 attention heads, the model has 3"):
        load(f"timm:{PLAIN}@{tmp_path / 'loca.npz'}")


def part_names(s: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """PART's names: queries apart, keys and values stacked head by head."""
    result = {key: value for key, value in s.items() if ".qkv." not in key}
    for key in set(s) - set(result):
        q, k, v = s[key].chunk(3)
        result[key.replace("qkv", "q")] = q
        heads = [part for pair in zip(k.chunk(num_heads), v.chunk(num_heads), strict=True) for part in pair]
        result[key.replace("qkv", "kv")] = torch.cat(heads)
    return result


def part_forward(p: dict[str, Tensor], pixels: Tensor, num_heads: int, positions: Tensor | None) -> Tensor:
    """PART's encoder written from its definition: class token last, ``[key; value]`` in every head."""
    x = F.conv2d(pixels, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=16).flatten(2).mT
    x = torch.cat([x, p["cls_token"].expand(len(x), -1, -1)], dim=1)
    x = x if positions is None else x + positions
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)  # noqa: E731
    linear = lambda x, name: F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])  # noqa: E731
    for i in range(2):
        y = norm(x, f"blocks.{i}.norm1")
        q = linear(y, f"blocks.{i}.attn.q").unflatten(-1, (num_heads, -1))
        k, v = linear(y, f"blocks.{i}.attn.kv").unflatten(-1, (num_heads, -1)).chunk(2, dim=-1)
        weights = (torch.einsum("bnhe,bmhe->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear(torch.einsum("bhnm,bmhe->bnhe", weights, v).flatten(2), f"blocks.{i}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")


@pytest.mark.parametrize("stage", ["pretraining", "fine-tuned", "pairwise head", "arrays"])
def test_part_s_interleaved_keys_and_values_and_its_last_class_token(stage: str, tmp_path: Path) -> None:
    source = tiny()
    p = part_names(state(source), 3)
    extra: dict[str, Tensor] = {"targets": torch.arange(4), "head.weight": torch.ones(2, 48)}
    extra = {"fine-tuned": {"head.weight": torch.ones(10, 24)}, "pairwise head": {"head.bias": ONE} | extra}.get(
        stage, extra
    )
    if stage == "pairwise head":
        del extra["targets"]
    path = tmp_path / ("part.npz" if stage == "arrays" else "part.pth")
    if stage == "arrays":
        np.savez(path, **{key: value.numpy() for key, value in (p | extra).items()})
    else:
        torch.save({"model": p | extra, "model_ema": None, "args": argparse.Namespace(lr=1.0)}, path)
    encoder = load(f"timm:{PLAIN}@{path}", quiet=True)
    x = images(source)
    expected = part_forward(p, x, 3, p["pos_embed"] if stage == "fine-tuned" else None).roll(1, dims=1)
    assert_close(tokens(encoder, x), expected, atol=2e-5, rtol=1e-5)
    assert (encoder.vit.pos_embed is None) == (stage != "fine-tuned")
    wrong = p | {"blocks.0.attn.kv.weight": p["blocks.0.attn.kv.weight"].flip(0)}
    assert not torch.allclose(part_forward(wrong, x, 3, None).roll(1, dims=1), expected, atol=1e-3)


def test_lomar_s_relative_positions_have_no_place(tmp_path: Path) -> None:
    s = state(tiny()) | {f"blocks.{i}.attn.rpe_k.lookup_table_weight": torch.ones(1, 8, 50) for i in range(2)}
    torch.save({"model": s}, tmp_path / "lomar.pth")
    with pytest.raises(WeightsError, match="relative position tables"):
        load(f"timm:{PLAIN}@{tmp_path / 'lomar.pth'}")


# Patches, LayerScale, positions.


def test_a_constant_kernel_keeps_its_sum_by_pinv_and_grows_by_bicubic() -> None:
    ones = torch.ones(1, 1, 14, 14)
    assert_close(resample_patches(ones, (16, 16)).sum().item(), 196.0, atol=1e-3, rtol=0)
    assert_close(resample_patches(ones, (16, 16), "bicubic").sum().item(), 256.0, atol=1e-3, rtol=0)


def test_enlarged_patches_are_embedded_as_before(tmp_path: Path) -> None:
    source = tiny(V2)
    torch.save(state(source), tmp_path / "x.pth")
    spec = f"timm:{V2}@{tmp_path / 'x.pth'}"
    encoder = load(spec, patch_size=16, img_size=32, quiet=True)
    assert encoder.patch_size == (16, 16) and encoder.img_size == (32, 32)
    assert "patch embedding from 14 to 16 px (pinv)" in str(encoder.report)
    patch = torch.randn(1, 3, 14, 14)
    larger = F.interpolate(patch, (16, 16), mode="bicubic", antialias=True)
    with torch.no_grad():
        assert_close(encoder.vit.patch_embed(larger), source.vit.patch_embed(patch), atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"patch_size=16 does not divide.*load.img_size"):
        load(spec, patch_size=16)
    with pytest.raises(WeightsError, match=r"patch 14.*the model is .*patch 16.*load.patch_size=16 resamples it"):
        load(f"timm:{PLAIN}@{tmp_path / 'x.pth'}", fold_layer_scale=True)
    folded = load(f"timm:{PLAIN}@{tmp_path / 'x.pth'}", fold_layer_scale=True, patch_size=16, quiet=True)
    assert_close(tokens(folded, torch.ones(1, 3, 32, 32)), tokens(encoder, torch.ones(1, 3, 32, 32)), atol=1e-5, rtol=0)


def test_folded_layer_scale_gives_the_same_outputs(tmp_path: Path) -> None:
    source = tiny(V2)
    with torch.no_grad():
        for block in source.vit.blocks:
            block.ls1.gamma.uniform_(0.1, 1)
            block.ls2.gamma.uniform_(0.1, 1)
    torch.save(state(source), tmp_path / "x.pth")
    encoder = load(f"timm:{V2}@{tmp_path / 'x.pth'}", fold_layer_scale=True, quiet=True)
    assert not [key for key in encoder.vit.state_dict() if ".ls1." in key or ".ls2." in key]
    double = [tokens(one.double(), images(source).double()) for one in (encoder, source)]
    assert_close(double[0], double[1], atol=1e-6, rtol=0)
    assert "LayerScale folded" in str(encoder.report)
    assert set(fold_layer_scale(state(tiny()))) == set(state(tiny()))
    with pytest.raises(WeightsError, match=r"LayerScale, the model is .*load.fold_layer_scale=true folds it in"):
        load(f"timm:{PLAIN}@{tmp_path / 'x.pth'}", patch_size=16)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("grid", [(3, 5), (9, 7)])
def test_positions_are_resampled_as_torch_does(mode: str, antialias: bool, offset: float, grid: Any) -> None:
    table = torch.randn(1, 1 + 36, 8)
    plane = table[0, 1:].reshape(6, 6, 8).permute(2, 0, 1)[None]
    if offset:
        size = {"scale_factor": [(new + offset) / 6 for new in grid]}
    else:
        size = {"size": grid}
    expected = F.interpolate(plane, **size, mode=mode, antialias=antialias)
    assert expected.shape[-2:] == grid
    ours = resample_positions(table, (6, 6), grid, 1, Resampling(mode, antialias, offset))
    assert_close(ours[0, 1:], expected[0].flatten(1).T)
    assert_close(ours[:, :1], table[:, :1])


@pytest.mark.parametrize("old", range(1, 40, 3))
def test_an_offset_never_changes_the_number_of_positions(old: int) -> None:
    for new in range(1, 80):
        out = resample_positions(torch.zeros(1, old * old, 1), (old, old), (new, new), 0, Resampling(offset=0.1))
        assert out.shape == (1, new * new, 1)


def test_the_way_of_resampling_is_kept_by_description_export_and_twin(tmp_path: Path) -> None:
    from smalti.evaluation.evaluate import random_init

    source = tiny(V2, img_size=56)
    torch.save(state(source), tmp_path / "x.pth")
    way = {"pos_mode": "bilinear", "pos_antialias": False, "pos_offset": 0.1}
    encoder = load(f"timm:{V2}@{tmp_path / 'x.pth'}", img_size=42, **way, quiet=True)
    expected = resample_positions(source.vit.pos_embed.detach(), (4, 4), (3, 3), 1, Resampling("bilinear", False, 0.1))
    assert_close(encoder.vit.pos_embed.detach(), expected)  # at loading, too
    assert encoder.pos_resampling == ("bilinear", False, 0.1)
    assert encoder_from_config(encoder.config()).pos_resampling == ("bilinear", False, 0.1)
    assert random_init(encoder, 0).pos_resampling == ("bilinear", False, 0.1)
    folder = export_timm(encoder, tmp_path / "out").path  # compares with timm at the native size
    again = load(folder / "model.safetensors", quiet=True)
    x = torch.randn(1, 3, 70, 56)
    assert torch.equal(tokens(again, x), tokens(encoder, x))
    other = load(folder / "model.safetensors", pos_antialias=True, pos_mode="bicubic", quiet=True)
    assert other.pos_resampling == ("bicubic", True, 0.1)
    assert not torch.allclose(tokens(other, x), tokens(encoder, x), atol=1e-4)


@pytest.mark.parametrize(
    "layout", ["LOCA", "PART", "SelfPatch", "registers dropped", "LayerScale folded", "another patch size"]
)
def test_what_was_fitted_can_be_exported(layout: str, tmp_path: Path) -> None:
    path, options, name = tmp_path / "x.pth", {}, PLAIN
    if layout == "LOCA":
        torch.save({k: torch.from_numpy(v) for k, v in flax_tree(state(tiny(class_token=False)), 3).items()}, path)
    elif layout == "PART":
        torch.save(part_names(state(tiny()), 3) | {"targets": torch.ones(4)}, path)
    elif layout == "SelfPatch":
        torch.save(state(tiny(class_token=False, final_norm=False)), path)
    elif layout == "registers dropped":
        name, options = REG, {"registers": "drop"}
        torch.save(v2_names(tiny(REG), torch.randn(1, 1, 24)), path)
    else:
        name = V2
        options = {"patch_size": 16, "img_size": 32} if "patch" in layout else {"fold_layer_scale": True}
        torch.save(state(tiny(V2)), path)
    encoder = load(f"timm:{name}@{path}", **options, quiet=True)
    folder = export_timm(encoder, tmp_path / "out").path  # refuses a difference above 1e-6
    x = images(encoder)
    again = load(folder / "model.safetensors", quiet=True)
    assert torch.equal(tokens(again, x), tokens(encoder, x))


# Mistakes.


def test_bare_weights_name_the_likely_architecture(tmp_path: Path) -> None:
    def shaped(width: int, depth: int, patch: int, *extras: str) -> dict[str, Tensor]:
        tensors = {"patch_embed.proj.weight": torch.zeros(width, 3, patch, patch), "cls_token": torch.zeros(1)}
        tensors |= {f"blocks.{depth - 1}.norm1.weight": torch.zeros(1)}
        return tensors | {name: torch.zeros(1, 4, 1) for name in extras}

    for file, tensors, expected in (
        ("a.pth", shaped(384, 12, 14, "blocks.0.ls1.gamma"), "try timm:vit_small_patch14_dinov2@"),
        ("b.pth", shaped(384, 12, 14, "register_tokens", "blocks.0.ls1.gamma"), "timm:vit_small_patch14_reg4_dinov2@"),
        ("c.pth", shaped(768, 12, 16), "a ViT 768 wide, 12 deep, patch 16, 3 channels: try timm:vit_base_patch16_224@"),
        (
            "d.pth",
            shaped(384, 12, 16, "blocks.0.ls1.gamma"),
            "vit_small_patch16_224@.*d.pth load.fold_layer_scale=true",
        ),
        ("e.pth", shaped(48, 2, 16), "proportions have no name that Smalti knows"),
    ):
        torch.save(tensors, tmp_path / file)
        with pytest.raises(WeightsError, match=expected):
            load(tmp_path / file)
    both = {**under("model.", shaped(384, 12, 16)), **under("teacher.", shaped(384, 12, 16))}
    save_file(both, tmp_path / "f.safetensors")
    with pytest.raises(WeightsError, match=r"timm:vit_small_patch16_224@.*f.safetensors weights=student"):
        load(tmp_path / "f.safetensors")
    assert likely_names({}) == ()


class AttributeDict(dict):  # type: ignore[type-arg]
    """As Lightning pickles its hyper-parameters."""


def test_a_lightning_checkpoint_with_pickled_settings_is_not_opened_and_no_advice_is_unsafe(tmp_path: Path) -> None:
    path = tmp_path / "neco.ckpt"
    torch.save({"state_dict": under("model.", state(tiny())), "hyper_parameters": AttributeDict(lr=1.0)}, path)
    with pytest.raises(WeightsError, match=r"AttributeDict.*a file of tensors alone is needed") as refused:
        load(f"timm:{PLAIN}@{path}")
    assert "weights_only" not in str(refused.value)


def test_arrays_with_python_objects_or_damage_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(WeightsError, match="holds Python objects"):
        read_checkpoint(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:90])
    with pytest.raises(WeightsError, match="can't be read as an npz file"):
        read_checkpoint(tmp_path / "b.npz")
    (tmp_path / "d.npz").write_text("MIT License")
    with pytest.raises(WeightsError, match=r"can't be read as an npz file of plain arrays \(it is no npz file\)"):
        read_checkpoint(tmp_path / "d.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(WeightsError, match=r"pipe\.npz: is no regular file; a weights file is needed"):
        read_tensors(tmp_path / "pipe.npz")
    np.savez(tmp_path / "c.npz", x=np.zeros(2, dtype="V2"))
    with pytest.raises(WeightsError, match="'x' is of no number type"):
        read_checkpoint(tmp_path / "c.npz")


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    s = state(tiny())
    del s["blocks.1.mlp.fc1.bias"]
    torch.save(dino(s), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"29 of 30 tensors matched; missing blocks.1.mlp.fc1.bias"):
        load(f"timm:{PLAIN}@{tmp_path / 'x.pth'}")


def test_settings_that_can_t_apply_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"load.registers='away'"):
        load(f"random:{PLAIN}", registers="away")
    with pytest.raises(ConfigError, match=r"load.registers: random:vi.*no weights"):
        load(f"random:{PLAIN}", registers="drop")
    with pytest.raises(ConfigError, match=r"load.fold_layer_scale: random:vi.*no weights"):
        load(f"random:{PLAIN}", fold_layer_scale=True)
    with pytest.raises(ConfigError, match=r"load.patch_size: random:vit_tiny_patch16_224 has no weights"):
        load(f"random:{PLAIN}", patch_size=8)
    with pytest.raises(ConfigError, match=r"pos_offset=2.0: a number in"):
        load(f"random:{PLAIN}", pos_offset=2.0)


def test_two_networks_without_roles_are_chosen_by_prefix() -> None:
    both = under("encoder_q.", state(tiny())) | under("encoder_k.", noise(state(tiny())))
    with pytest.raises(WeightsError, match="choose weights=encoder_k or weights=encoder_q"):
        to_timm_names(both)
    assert_close(to_timm_names(both, "encoder_q").tensors["cls_token"], state(tiny())["cls_token"])


def test_the_real_file_needs_no_antialiasing(shared: Path) -> None:
    path = shared / "weights" / "vit_small_patch14_dinov2_imgfocus_fp16.safetensors"
    spec = f"timm:{V2}@{path}"
    real = {"build_encoder": build_encoder, "encoder_from_config": encoder_from_config}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in real.items():
            patch.setattr(loading, name, function)
        ours = load(spec, pos_antialias=False, quiet=True)
        at_size = load(spec, pos_antialias=False, img_size=224, quiet=True)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    assert_close(tokens(ours, x), tokens(at_size, x), atol=1e-4, rtol=1e-4)  # resampled then and there, or at loading
    ours.set_pos_resampling(antialias=True)
    assert (tokens(ours, x) - tokens(at_size, x)).abs().max() > 0.1
