"""Names of tensors in files of Hugging Face transformers, as timm's.

Source: the files of ``ViTModel``, ``ViTMAEModel``, ``Dinov2Model``, ``Dinov2WithRegistersModel``, ``DINOv3ViTModel``,
``SiglipVisionModel`` and ``CLIPVisionModel`` of transformers 5. Names of a model in memory are accepted, too.
"""

import re
from collections.abc import Mapping

from torch import Tensor

PREFIX = re.compile(
    r"^((vit|dinov2|dinov2_with_registers|dinov3_vit|vision_model|model|backbone)\.)+"
    r"(?=embeddings\.|encoder\.|layer|norm|post_layernorm\.|pre_layrnorm\.|head\.)"
)
PATCHES = re.compile(r"(^|\.)embeddings\.patch_embedding(s\.projection|s)?\.weight$")
"""The tensor that identifies such a file."""
BLOCK = re.compile(r"^(?:encoder\.)?layers?\.(\d+)\.(.+)\.(weight|bias|lambda1)$")
DROPPED = re.compile(
    r"^(pooler|decoder|classifier|text_model|text_projection|visual_projection|head)\.|mask_token$|logit_|position_ids$"
)
OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.register_tokens": "reg_token",
}
PARTS = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "embeddings.patch_embedding": "patch_embed.proj",
    "layernorm": "norm",
    "norm": "norm",
    "post_layernorm": "norm",
    "pre_layrnorm": "norm_pre",
}
POOL = {
    "head.attention.out_proj": "proj",
    "head.layernorm": "norm",
    "head.mlp.fc1": "mlp.fc1",
    "head.mlp.fc2": "mlp.fc2",
}
"""Layers of SigLIP's attention pooling, as those of timm's."""
INSIDE = {
    **{f"attention.attention.{name}": f"attn.{name[0]}_proj" for name in ("query", "key", "value")},
    **{f"{where}.{part}_proj": f"attn.{part}_proj" for where in ("attention", "self_attn") for part in "qkv"},
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "self_attn.out_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "norm1": "norm1",
    "norm2": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "mlp.gate_proj": "mlp.fc1_g",
    "mlp.down_proj": "mlp.fc2",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
}


def is_huggingface(names: Mapping[str, Tensor]) -> bool:
    """Whether a file has the names of transformers."""
    return any(PATCHES.search(name) for name in names)


def from_huggingface(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors with timm's names, and the names of those that are left out (poolers, decoders, heads, mask tokens).

    Queries, keys and values stay apart, as ``attn.{q,k,v}_proj``. SigLIP's head is timm's attention pooling. Tensors
    with unknown names keep these.
    """
    result: dict[str, Tensor] = {}
    dropped = []
    is_gated = any(name.endswith("mlp.gate_proj.weight") for name in tensors)
    for full, tensor in tensors.items():
        name = PREFIX.sub("", full)
        pooling = _pooling(name, tensor)
        if pooling:
            result |= pooling
            continue
        if DROPPED.search(name) or DROPPED.search(full) or not tensor.numel():  # also zero registers
            dropped.append(full)
            continue
        new = _timm_name(name, is_gated)
        if new == "pos_embed" and tensor.ndim == 2:
            tensor = tensor[None]
        if new == "cls_token" and tensor.ndim == 1:
            tensor = tensor[None, None]
        result[new] = tensor
    return result, tuple(dropped)


def _pooling(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of SigLIP's attention pooling, with timm's names; empty for all others."""
    part, _, kind = name.rpartition(".")
    if name == "head.probe":
        return {"attn_pool.latent": tensor}
    if part == "head.attention" and kind in ("in_proj_weight", "in_proj_bias"):
        width, kind = len(tensor) // 3, kind.removeprefix("in_proj_")
        return {f"attn_pool.q.{kind}": tensor[:width], f"attn_pool.kv.{kind}": tensor[width:]}
    return {f"attn_pool.{POOL[part]}.{kind}": tensor} if part in POOL else {}


def _timm_name(name: str, is_gated: bool) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    block = BLOCK.match(name)
    if block is None:
        part, _, kind = name.rpartition(".")
        return f"{PARTS[part]}.{kind}" if part in PARTS else name
    number, part, kind = block.groups()
    if part == "mlp.up_proj":
        inner = "mlp.fc1_x" if is_gated else "mlp.fc1"
    else:
        inner = INSIDE.get(part, part)
    return f"blocks.{number}.{inner}.{'gamma' if kind == 'lambda1' else kind}"
