"""Export an encoder to a folder that Hugging Face transformers loads; the tokens are checked to be equal.

Source: the files and ``config.json`` of ``ViTModel``, ``Dinov2Model``, ``Dinov2WithRegistersModel`` and
``DINOv3ViTModel`` in transformers 5.
Letters: D embed_dim.
"""

import contextlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.layers import Attention, GluMlp, LayerScale, Mlp, RotaryEmbeddingDinoV3, SwiGLU
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smalti.errors import ConfigError, MissingExtraError, WeightsError
from smalti.exporters.card import CARD, Provenance, model_card
from smalti.exporters.timm import check_target
from smalti.files import folder_beside, write_atomically
from smalti.models.build import clone_encoder
from smalti.models.encoder import Encoder
from smalti.models.huggingface import CONFIG, PREPROCESSOR, WEIGHTS
from smalti.models.pooling import MODULES

TOLERANCE = {"vit": 1e-6, "dinov2": 1e-6, "dinov2_with_registers": 1e-6, "dinov3_vit": 1e-5}
"""Largest allowed absolute difference of a token, by model type."""
_CLASSES = {
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}
_INSTEAD = "export to=timm: AutoModel of transformers opens that folder, too, with timm installed"


class HFExport(NamedTuple):
    """Result of :func:`export_hf`."""

    path: Path
    """The folder, for ``AutoModel.from_pretrained``."""
    kind: str
    """``model_type`` in its ``config.json``."""
    difference: float
    """Largest absolute difference over all tokens of one random image."""


def export_hf(encoder: Encoder, out: Path, provenance: Provenance = Provenance()) -> HFExport:
    """Write an encoder as a model of transformers: weights, ``config.json``, ``preprocessor_config.json``, a card.

    The folder is written under a temporary name, opened by ``AutoModel``, compared with the encoder on a random image,
    and only then renamed to ``out``.

    Args:
        encoder: on any device; the comparison runs on the CPU in float32.
        out: a folder that does not exist yet, or is empty.
        provenance: of the weights, for the model card.

    Raises:
        MissingExtraError: without transformers.
        ConfigError: if ``out`` can't be written, or transformers has no class for this encoder.
        WeightsError: if its tokens differ by more than :data:`TOLERANCE`; nothing is written.
    """
    check_transformers()
    check_target(out)
    kind = model_type(encoder)
    ours = clone_encoder(encoder).cpu().float().eval()
    try:
        with folder_beside(out) as temporary:
            save_file(_tensors(ours, kind), temporary / WEIGHTS, metadata={"format": "pt"})
            for name, content in ((CONFIG, _config(ours, kind)), (PREPROCESSOR, _preprocessor(ours))):
                write_atomically(temporary / name, json.dumps(content, indent=2) + "\n")
            usage = f"""from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{provenance.repository or out}")
tokens = model(pixel_values=images).last_hidden_state  # class token, registers, patches"""
            write_atomically(
                temporary / CARD, model_card(encoder, "hf", "normalized", encoder.img_size, usage, provenance)
            )
            difference = _compare(ours, temporary)
            if not difference <= TOLERANCE[kind]:  # also NaN
                raise WeightsError(
                    f"the model of transformers differs from the encoder by {difference:.3g} on a random image, at "
                    f"most {TOLERANCE[kind]:g} is allowed; {out} was not written"
                )
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{out}: can't be written ({getattr(error, 'strerror', None) or error})") from error
    return HFExport(out, kind, difference)


def check_transformers() -> None:
    """Check that the required package is installed.

    Raises:
        MissingExtraError: if it isn't; names the extra.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError('export to=hf needs transformers: pip install "smalti[hf]"')


def model_type(encoder: Encoder) -> str:
    """The model type of transformers that computes an encoder's tokens.

    Raises:
        ConfigError: if there is none; says what does not fit.
    """
    misfit = _misfit(encoder)
    if misfit:
        raise ConfigError(f"transformers has no model for {encoder.name}: {misfit}; {_INSTEAD}")
    if isinstance(encoder.vit, Eva):
        return "dinov3_vit"
    block: Any = encoder.vit.blocks[0]
    if encoder.num_prefix_tokens > 1:
        return "dinov2_with_registers"
    return "dinov2" if isinstance(block.ls1, LayerScale) or isinstance(block.mlp, GluMlp) else "vit"


def _misfit(encoder: Encoder) -> str:
    """What an encoder has that the four classes lack; empty if one of them fits."""
    vit: Any = encoder.vit
    block, (height, width) = vit.blocks[0], encoder.img_size
    if encoder.pool in MODULES:
        return f"pool={encoder.pool} has no place there (export with pool=auto: the same tokens)"
    if encoder.gaug is not None:
        return "gaug=true adds a bias to its attention"
    if not encoder.has_class_token:
        return "it has no class token"
    if vit.patch_embed.proj.bias is None or not isinstance(vit.norm_pre, nn.Identity):
        return "it has a norm before its blocks"
    attn: Any = getattr(block, "attn", None)
    parts = [getattr(attn, name, None) for name in ("q_norm", "k_norm", "norm")]
    if not all(isinstance(part, nn.Identity) for part in parts) or getattr(attn, "gate", None) is not None:
        return "its attention has norms or a gate"
    if isinstance(vit, Eva):
        rope = vit.rope
        if type(rope) is not RotaryEmbeddingDinoV3 or encoder.position_free or vit.pos_embed is not None:
            return "its positions are not DINOv3's"
        plain = (rope.grid_indexing, float(rope.grid_offset), rope.normalize_coords) == ("ij", 0.0, "separate")
        if not plain or not attn.rotate_half:
            return "its rotary positions are laid out in another way than DINOv3's"
        if type(block) is not EvaBlock or type(attn) is not EvaAttention or attn.qkv is None:
            return f"its blocks are {type(block).__name__} with {type(attn).__name__}"
        if block.gamma_1 is None or block.gamma_2 is None:
            return "it has no LayerScale after attention or MLP"
        return "" if type(block.mlp) in (Mlp, SwiGLU) else f"its MLP is {type(block.mlp).__name__}"
    if type(block) is not Block or type(attn) is not Attention:
        return f"its blocks are {type(block).__name__} with {type(attn).__name__}"
    if height // encoder.patch_size[0] != width // encoder.patch_size[1]:
        return "its grid of patches is not square"
    if vit.pos_embed is None and encoder.position_field is None:
        return "it has no table of positions"
    if type(block.mlp) is GluMlp:
        hidden = block.mlp.fc2.in_features
        return "" if _gated_ratio(hidden, encoder.embed_dim) else f"no whole mlp_ratio gives its MLP's width {hidden}"
    if type(block.mlp) is not Mlp or _activation(block.mlp.act) is None:
        return f"its MLP is {type(block.mlp).__name__} with {type(getattr(block.mlp, 'act', None)).__name__}"
    needs_ratio = encoder.num_prefix_tokens > 1 or isinstance(block.ls1, LayerScale)
    if needs_ratio and block.mlp.fc1.out_features % encoder.embed_dim:
        return "no whole mlp_ratio gives its MLP's width"
    return ""


def _activation(module: nn.Module) -> str | None:
    """``hidden_act`` of an activation; None: it has no name in transformers."""
    name = type(module).__name__
    if name == "GELU":
        return "gelu" if getattr(module, "approximate", "none") == "none" else "gelu_pytorch_tanh"
    return {"GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}.get(name)


def _gated_ratio(hidden: int, width: int) -> int | None:
    """The whole ``mlp_ratio`` for which a gated MLP of transformers has this width."""
    return next((r for r in range(1, 17) if 8 * math.ceil(2 * r * width // 3 / 8) == hidden), None)


def _tensors(encoder: Encoder, kind: str) -> dict[str, Tensor]:
    """The weights with the names of transformers' files."""
    vit: Any = encoder.vit
    width = encoder.embed_dim
    rotary = kind == "dinov3_vit"
    projection = "embeddings.patch_embeddings" if rotary else "embeddings.patch_embeddings.projection"
    found: dict[str, Tensor] = {
        f"{projection}.weight": vit.patch_embed.proj.weight,
        f"{projection}.bias": vit.patch_embed.proj.bias,
        **{f"{'norm' if rotary else 'layernorm'}.{key}": value for key, value in vit.norm.named_parameters()},
    }
    registers = vit.reg_token
    if rotary:
        token = vit.cls_token
    else:
        table, token = encoder.position_table()
        assert table is not None and token is not None
        rows = table.shape[1] - vit.patch_embed.num_patches
        if registers is not None and rows > 1:  # transformers adds positions before it inserts registers
            registers = registers + table[:, 1:rows]
        first = table[:, :1] if rows else torch.zeros(1, 1, width)
        found["embeddings.position_embeddings"] = torch.cat([first, table[:, rows:]], dim=1)
    found["embeddings.cls_token"] = token
    if registers is not None:
        found["embeddings.register_tokens"] = registers
    if kind != "vit":
        found["embeddings.mask_token"] = torch.zeros(1, 1, width) if rotary else torch.zeros(1, width)
    for number, block in enumerate(vit.blocks):
        before = f"layer.{number}" if rotary else f"encoder.layer.{number}"
        found |= {f"{before}.{name}": value for name, value in _block(block, kind, width).items()}
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def _block(block: Any, kind: str, width: int) -> dict[str, Tensor]:
    """Tensors of one block."""
    is_vit, rotary = kind == "vit", kind == "dinov3_vit"
    attn, mlp = block.attn, block.mlp
    names = ("q_proj", "k_proj", "v_proj") if rotary else ("attention.query", "attention.key", "attention.value")
    inner = len(attn.qkv.weight) // 3
    result = {
        f"attention.{name}.weight": part for name, part in zip(names, torch.split(attn.qkv.weight, inner), strict=True)
    }
    if rotary and attn.q_bias is not None:
        result |= {"attention.q_proj.bias": attn.q_bias, "attention.v_proj.bias": attn.v_bias}
    if not rotary and attn.qkv.bias is not None:
        parts = zip(names, torch.split(attn.qkv.bias, inner), strict=True)
        result |= {f"attention.{name}.bias": part for name, part in parts}
    layers = {
        "attention.o_proj" if rotary else "attention.output.dense": attn.proj,
        "layernorm_before" if is_vit else "norm1": block.norm1,
        "layernorm_after" if is_vit else "norm2": block.norm2,
    }
    if rotary:
        gated = type(mlp) is SwiGLU
        layers |= {"mlp.gate_proj": mlp.fc1_g, "mlp.up_proj": mlp.fc1_x} if gated else {"mlp.up_proj": mlp.fc1}
        layers["mlp.down_proj"] = mlp.fc2
    elif is_vit:
        layers |= {"intermediate.dense": mlp.fc1, "output.dense": mlp.fc2}
    elif type(mlp) is GluMlp:
        layers |= {"mlp.weights_in": mlp.fc1, "mlp.weights_out": mlp.fc2}
    else:
        layers |= {"mlp.fc1": mlp.fc1, "mlp.fc2": mlp.fc2}
    result |= {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.named_parameters()}
    if not is_vit:
        scales = (block.gamma_1, block.gamma_2) if rotary else (block.ls1, block.ls2)
        for number, scale in enumerate(scales, 1):
            gamma = scale if rotary else getattr(scale, "gamma", torch.ones(width))
            result[f"layer_scale{number}.lambda1"] = gamma
    return result


def _config(encoder: Encoder, kind: str) -> dict[str, Any]:
    """Content of ``config.json``."""
    vit: Any = encoder.vit
    block, width = vit.blocks[0], encoder.embed_dim
    mlp = block.mlp
    hidden = mlp.fc2.in_features
    common = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "dtype": "float32",
        "hidden_size": width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
        "image_size": encoder.img_size[0],
        "patch_size": encoder.patch_size[0],
        "num_channels": encoder.in_chans,
        "layer_norm_eps": vit.norm.eps,
    }
    if kind == "dinov3_vit":
        return {
            **common,
            "hidden_act": "silu" if type(mlp) is SwiGLU else "gelu",
            "intermediate_size": hidden,
            "use_gated_mlp": type(mlp) is SwiGLU,
            "num_register_tokens": encoder.num_prefix_tokens - 1,
            "rope_theta": float(vit.rope.temperature),
            "query_bias": block.attn.q_bias is not None,
            "key_bias": False,
            "value_bias": block.attn.q_bias is not None,
            "proj_bias": True,
            "mlp_bias": True,
            "pos_embed_rescale": None,
            "pos_embed_jitter": None,
            "pos_embed_shift": None,
        }
    common["qkv_bias"] = block.attn.qkv.bias is not None
    if kind == "vit":
        return {**common, "hidden_act": _activation(mlp.act), "intermediate_size": hidden}
    gated = type(mlp) is GluMlp
    return {
        **common,
        "hidden_act": "gelu" if gated else _activation(mlp.act),
        "mlp_ratio": _gated_ratio(hidden, width) if gated else hidden // width,
        "use_swiglu_ffn": gated,
        "apply_layernorm": True,
        **({"num_register_tokens": encoder.num_prefix_tokens - 1} if kind == "dinov2_with_registers" else {}),
    }


def _preprocessor(encoder: Encoder) -> dict[str, Any]:
    """Content of ``preprocessor_config.json``: resize, pixels in 0..1, normalisation."""
    height, width = encoder.img_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }


@torch.inference_mode()
def _compare(encoder: Encoder, folder: Path) -> float:
    """Largest absolute difference between tokens of an encoder and of the model in a folder."""
    import transformers

    with contextlib.ExitStack() as stack:
        if transformers.logging.is_progress_bar_enabled():
            transformers.logging.disable_progress_bar()
            stack.callback(transformers.logging.enable_progress_bar)
        before = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        stack.callback(transformers.logging.set_verbosity, before)
        theirs = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    generator = torch.Generator().manual_seed(0)
    images = encoder.normalize(torch.rand(1, encoder.in_chans, *encoder.img_size, generator=generator))
    features = encoder.encode(images)
    tokens = torch.cat([features.prefix, features.patches], dim=1)
    return float((tokens - theirs(pixel_values=images).last_hidden_state).abs().max())
