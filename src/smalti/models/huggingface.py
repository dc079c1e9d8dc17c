"""Encoders in the layout of Hugging Face transformers: names of tensors, ``config.json``, folders.

Source: transformers 5, ``models/{vit,vit_mae,dinov2,dinov2_with_registers,dinov3_vit,clip,siglip}``. Names are those of
files; the names of a model in memory are accepted, too. Nothing of transformers is imported.
Letters: D hidden size.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smalti.errors import WeightsError
from smalti.models.layouts import Tensors
from smalti.models.weights import read_tensors
from smalti.reading import read_mapping

CONFIG, WEIGHTS, INDEX, PREPROCESSOR = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
)
ANTIALIASED = ("dinov2_with_registers",)
"""Model types that resample positions with antialiasing in transformers."""
WHOLE = ("clip", "siglip")
"""Model types of text and vision; the vision part is read."""
ACTIVATIONS = {"gelu": None, "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
"""``hidden_act`` -> timm's ``act_layer``; None: timm's default."""


def read_folder(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """The description of an encoder, as of :meth:`Encoder.config`, and its tensors by their names in the file.

    Args:
        folder: with ``config.json`` and ``model.safetensors`` (or its shards), as ``save_pretrained`` writes it.

    Raises:
        WeightsError: if a file is missing or damaged, or the model is of a type that can't be read.
    """
    if not (folder / CONFIG).is_file():
        raise WeightsError(f"{folder}: has no {CONFIG}; hf: needs a folder that save_pretrained of transformers wrote")
    config = read_mapping(folder / CONFIG, error=WeightsError)
    try:
        description = describe(config)
    except WeightsError as error:
        raise WeightsError(f"{folder / CONFIG}: {error}") from error
    if (folder / PREPROCESSOR).is_file():
        pixels = read_mapping(folder / PREPROCESSOR, error=WeightsError)
        description |= {"mean": pixels.get("image_mean"), "std": pixels.get("image_std")}
    return description, _read_weights(folder)


def _read_weights(folder: Path) -> Tensors:
    if (folder / INDEX).is_file():
        index = read_mapping(folder / INDEX, error=WeightsError)
        files = sorted(set(map(str, dict(index.get("weight_map") or {}).values())))
        if any(Path(file).name != file for file in files):
            raise WeightsError(f"{folder / INDEX}: names files outside of its folder")
        return {name: tensor for file in files for name, tensor in read_tensors(folder / file).items()}
    if not (folder / WEIGHTS).is_file():
        raise WeightsError(f"{folder}: has no {WEIGHTS}; save the model with save_pretrained (safetensors)")
    return read_tensors(folder / WEIGHTS)


def describe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our description of the encoder that a ``config.json`` describes.

    Raises:
        WeightsError: for a type of model, or a setting, that timm's models don't have; names a missing field.
    """
    kind = str(config.get("model_type"))
    if kind in WHOLE:  # text and vision
        config = {"model_type": f"{kind}_vision_model", **dict(_need(config, "vision_config"))}
        kind = str(config["model_type"])
    if kind not in _READERS:
        raise WeightsError(f"model_type={kind}: can't be read; it is one of {', '.join((*_READERS, *WHOLE))} that can")
    size, width = _need(config, "image_size"), _need(config, "hidden_size")
    arguments = {
        "img_size": size,
        "in_chans": config.get("num_channels", 3),
        "patch_size": _need(config, "patch_size"),
        "embed_dim": width,
        "depth": _need(config, "num_hidden_layers"),
        "num_heads": _need(config, "num_attention_heads"),
    }
    architecture, more = _READERS[kind](config, width)
    return {
        "architecture": architecture,
        "model_args": {**arguments, **{key: value for key, value in more.items() if value is not None}},
        "mean": None,
        "std": None,
        "pos_antialias": kind in ANTIALIASED,
        "norm_eps": float(_need(config, "layer_norm_eps")),
    }


def _need(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise WeightsError(f"lacks {name}, which is needed to build the encoder")
    return config[name]


def _activation(config: Mapping[str, Any]) -> str | None:
    name = config.get("hidden_act", "gelu")
    if name not in ACTIVATIONS:
        raise WeightsError(f"hidden_act={name}: can't be read; one of {', '.join(ACTIVATIONS)} is needed")
    return ACTIVATIONS[name]


def _ratio(hidden: float, width: int) -> float:
    """timm's ``mlp_ratio`` of a hidden width, safe from rounding down."""
    return (hidden + 0.5) / width


def _vit(config: Mapping[str, Any], width: int) -> tuple[str, dict[str, Any]]:
    arguments = {
        "mlp_ratio": _ratio(_need(config, "intermediate_size"), width),
        "qkv_bias": bool(config.get("qkv_bias", True)),
        "act_layer": _activation(config),
    }
    return "vit_small_patch16_224", arguments


def _dinov2(config: Mapping[str, Any], width: int) -> tuple[str, dict[str, Any]]:
    count = config.get("num_register_tokens", 4) if config["model_type"] == "dinov2_with_registers" else 0
    arguments = {
        "init_values": 1.0,  # a LayerScale, whose values the file has
        "qkv_bias": bool(config.get("qkv_bias", True)),
        **({"reg_tokens": count, "no_embed_class": True} if count else {}),
    }
    ratio = config.get("mlp_ratio", 4)
    if config.get("use_swiglu_ffn", False):
        hidden = 8 * (-(-(2 * int(width * ratio) // 3) // 8))
        return "vit_giant_patch14_dinov2", {**arguments, "mlp_ratio": _ratio(2 * hidden, width)}
    return "vit_small_patch14_dinov2", {**arguments, "mlp_ratio": float(ratio), "act_layer": _activation(config)}


def _dinov3(config: Mapping[str, Any], width: int) -> tuple[str, dict[str, Any]]:
    biased, values = bool(config.get("query_bias", True)), bool(config.get("value_bias", True))
    if biased != values:
        raise WeightsError(f"query_bias={biased}, value_bias={values}: timm's model has both or none")
    for name in ("proj_bias", "mlp_bias"):
        if not config.get(name, True):
            raise WeightsError(f"{name}=false: timm's model has these biases")
    hidden = _need(config, "intermediate_size")
    arguments = {
        "num_reg_tokens": config.get("num_register_tokens", 0),
        "init_values": 1.0,
        "rope_temperature": float(_need(config, "rope_theta")),
    }
    ending = "_qkvb" if biased else ""
    if config.get("use_gated_mlp", False):
        return f"vit_small_plus_patch16_dinov3{ending}", {**arguments, "mlp_ratio": _ratio(hidden, width)}
    if _activation(config) is not None:
        raise WeightsError(f"hidden_act={config['hidden_act']}: timm's model has gelu")
    return f"vit_small_patch16_dinov3{ending}", {**arguments, "mlp_ratio": _ratio(hidden, width)}


def _clip(config: Mapping[str, Any], width: int) -> tuple[str, dict[str, Any]]:
    _need(config, "hidden_act")  # transformers' default is another one
    arguments = {"mlp_ratio": _ratio(_need(config, "intermediate_size"), width), "act_layer": _activation(config)}
    return "vit_base_patch16_clip_224", arguments


def _siglip(config: Mapping[str, Any], width: int) -> tuple[str, dict[str, Any]]:
    _need(config, "hidden_act")
    arguments = {"mlp_ratio": _ratio(_need(config, "intermediate_size"), width), "act_layer": _activation(config)}
    return "vit_base_patch16_siglip_224", arguments


_READERS: Mapping[str, Callable[[Mapping[str, Any], int], tuple[str, dict[str, Any]]]] = {
    "vit": _vit,
    "vit_mae": _vit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "dinov3_vit": _dinov3,
    "clip_vision_model": _clip,
    "siglip_vision_model": _siglip,
}
