"""Names of tensors in the vision towers of OpenCLIP and Perception Encoder (PE) files, as timm's.

Source: the files of ``open_clip`` and ``facebookresearch/perception_models``, both after the code of CLIP.
"""

import re
from collections.abc import Mapping

from torch import Tensor

ANCHOR = re.compile(r"^(.*\.)?conv1\.weight$")
BLOCK = re.compile(r"^transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias|gamma)$")
OUTSIDE = {"class_embedding": "cls_token", "positional_embedding": "pos_embed", "attn_pool.probe": "attn_pool.latent"}
PARTS = {
    "conv1": "patch_embed.proj",
    "ln_pre": "norm_pre",
    "ln_post": "norm",
    "attn_pool.attn.out_proj": "attn_pool.proj",
    "attn_pool.layernorm": "attn_pool.norm",
    "attn_pool.mlp.c_fc": "attn_pool.mlp.fc1",
    "attn_pool.mlp.c_proj": "attn_pool.mlp.fc2",
}
INSIDE = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj": "attn.qkv",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ls_1": "ls1",
    "ls_2": "ls2",
}


def tower_of(names: Mapping[str, Tensor]) -> str | None:
    """The part of the names before those of the vision tower, which may be empty; None: there is no such tower."""
    for name in names:
        match = ANCHOR.match(name)
        if match and f"{match.group(1) or ''}transformer.resblocks.0.ln_1.weight" in names:
            return match.group(1) or ""
    return None


def from_clip(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors with timm's names, and the names of those that are left out: the text tower and the last projection.

    Args:
        tensors: by their names in the file.
        prefix: from :func:`tower_of`.
    """
    result: dict[str, Tensor] = {}
    dropped = []
    for full, tensor in tensors.items():
        name = full.removeprefix(prefix)
        if not full.startswith(prefix) or name == "proj":
            dropped.append(full)
        elif name.startswith("attn_pool.attn.in_proj_"):
            width, kind = len(tensor) // 3, name.rpartition("_")[2]
            result |= {f"attn_pool.q.{kind}": tensor[:width], f"attn_pool.kv.{kind}": tensor[width:]}
        else:
            missing = {"class_embedding": 2, "positional_embedding": 1}.get(name, 0)
            result[_timm_name(name)] = tensor.reshape(*[1] * missing, *tensor.shape)
    return result, tuple(dropped)


def _timm_name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    block = BLOCK.match(name)
    if block is None:
        part, _, kind = name.rpartition(".")
        return f"{PARTS[part]}.{kind}" if part in PARTS else name
    number, part, kind = block.groups()
    return f"blocks.{number}.{INSIDE.get(part, part)}.{kind}"
