"""Convert the checkpoints of other projects to names and shapes of timm's ``VisionTransformer``.

Besides renaming: no class token and no final norm (SelfPatch), no class token and another GELU (LOCA), no positions and
the class token last (PART), an unused class token (FLSL). All of this is detected from the tensors; the rest follows
from the architecture that the user names.

Sources: the checkpoints and module definitions that DINO, iBOT, DINOv2, MAE, DropPos, Mugs, CrIBo, CrOC, SelfPatch,
FLSL, Leopart, TimeT, NeCo, PART and LOCA have published; those of DINOv3, OpenCLIP and PE.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from smalti.errors import WeightsError
from smalti.models.clip_names import from_clip, tower_of
from smalti.models.huggingface_names import from_huggingface, is_huggingface

Tensors = dict[str, Tensor]
WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
ANCHOR, FLAX_ANCHOR = "patch_embed.proj.weight", "ToTokenSequence_0.embedding.kernel"
DROPPED = re.compile(
    r"(^|\.)([^.]*head[^.]*|prototypes[^.]*|(aux_)?decoder_[^.]*|mask_token|mask_pos_token|masked_embed"
    r"|relation_blocks[^.]*|dist_token|targets|clf)(\.|$)"
)
FLAX_DROPPED = re.compile(r"^(projection_head|cross_attention_block|final_norm|position_predictor)|prototypes")
TEACHER = re.compile(r"(^|[._])(teacher|ema)([._]|$)")
OPTIMIZER = re.compile(r"^(opt_state|optimizer)\.")
SPLIT = re.compile(r"^(blocks\.\d+\.attn)\.(q|q_proj|query)\.(weight|bias)$")
UNUSED_IN_EVA = re.compile(r"(\.bias_mask$|^rope_embed\.|^local_cls_norm\.)")
"""Tensors of official DINOv3 files that timm computes, or that only training used."""
_RENAMED = {
    "mlp.w12.": "mlp.fc1.",
    "mlp.w1.": "mlp.fc1_g.",
    "mlp.w2.": "mlp.fc1_x.",
    "mlp.w3.": "mlp.fc2.",
    "register_tokens": "reg_token",
    "storage_tokens": "reg_token",
}
SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
"""``(width, depth)`` of the vision transformers that have a name."""


@dataclass(frozen=True)
class ForeignViT:
    """A vision transformer from a file, with timm's names."""

    tensors: Tensors
    """Float tensors are float32. Queries and ``attn.kv`` may be separate: fusing them requires the number of heads."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """timm's arguments for this network, besides the name of the architecture."""
    dropped: tuple[str, ...] = ()
    """The file's names of heads, decoders, mask tokens, optimiser state and networks that weren't selected."""
    notes: tuple[str, ...] = ()
    """Changes other than names, in words."""
    grid: tuple[int, int] | None = None
    """``(h, w)`` of the position table, where the file says so."""
    num_heads: int | None = None
    """Attention heads, where the file says so."""


def to_timm_names(tensors: Mapping[str, Tensor], network: str | None = None, beside: Iterable[str] = ()) -> ForeignViT:
    """The one vision transformer among the tensors, with timm's names.

    The part before ``patch_embed.proj.weight`` is the prefix (``backbone.``, ``module.``, ``model.`` ...). Names
    without the prefix are dropped, as are heads and decoders.

    Args:
        tensors: by their names in the file; ``/`` separates like a dot.
        network: ``student`` or ``teacher``, or a prefix, if there are several.
        beside: other keys of the file (e.g. ``flsl_loss``), which can identify a layout.

    Raises:
        WeightsError: if there is no vision transformer, several and none selected, or not the selected one.
    """
    if is_huggingface(tensors):
        found, left_out = from_huggingface(tensors)
        return _from_torch({name: _plain(tensor) for name, tensor in found.items()}, {}, left_out, set(beside))
    tower = tower_of(tensors)
    if tower is not None:
        found, left_out = from_clip(tensors, tower)
        return ForeignViT({name: _plain(tensor) for name, tensor in found.items()}, {}, left_out)
    names = {key: WRAPPERS.sub("", key.replace("/", ".")) for key in tensors}
    anchors = [name for name in names.values() if not OPTIMIZER.match(name)]
    prefixes = {_before(name, anchor) for name in anchors for anchor in (ANCHOR, FLAX_ANCHOR)} - {None}
    if not prefixes:
        raise WeightsError(
            f"no vision transformer found: no tensor is called '{ANCHOR}' (the file has {some(tuple(tensors))})"
        )
    prefix = _choose(sorted(str(prefix) for prefix in prefixes), network)
    inside = {key: name.removeprefix(prefix) for key, name in names.items() if name.startswith(prefix)}
    is_flax = FLAX_ANCHOR in inside.values()
    skip = FLAX_DROPPED if is_flax else DROPPED
    kept = {name: _plain(tensors[key]) for key, name in inside.items() if not skip.search(name)}
    dropped = tuple(key for key in tensors if inside.get(key) not in kept)
    if is_flax:
        return _from_flax(kept, dropped)
    parts = {name: tensors[key] for key, name in inside.items()}
    return _from_torch({_timm_name(name): tensor for name, tensor in kept.items()}, parts, dropped, set(beside))


def _before(name: str, anchor: str) -> str | None:
    prefix = name.removesuffix(anchor)
    return prefix if prefix != name and (not prefix or prefix.endswith(".")) else None


def _choose(prefixes: list[str], network: str | None) -> str:
    """The prefix of the selected network."""
    roles = {prefix: "teacher" if TEACHER.search(prefix) else "student" for prefix in prefixes}
    held = ", ".join(f"'{prefix}'" for prefix in prefixes)
    if network is not None:
        wanted = [prefix for prefix in prefixes if network in (roles[prefix], prefix.rstrip("."))]
        if len(wanted) == 1 and (len(prefixes) > 1 or roles[wanted[0]] == "teacher" or network in wanted[0]):
            return wanted[0]
        if len(prefixes) == 1:
            raise WeightsError(f"the file holds one network and doesn't call it {network}; leave weights={network} out")
        raise WeightsError(f"weights={network} names {len(wanted)} of the networks in the file ({held})")
    if len(prefixes) == 1:
        return prefixes[0]
    if {prefix.split(".")[0] for prefix in prefixes} == {"params", "ema_params"} and len(prefixes) == 2:
        return next(prefix for prefix in prefixes if roles[prefix] == "student")  # LOCA evaluates its raw weights
    if sorted(roles.values()) == ["student", "teacher"]:
        student, teacher = sorted(prefixes, key=lambda prefix: roles[prefix])
        why = ", what NeCo's own evaluation reads" if (student, teacher) == ("model.", "teacher.") else ""
        choice = f"weights=student ('{student}'{why}) or weights=teacher ('{teacher}')"
    else:
        choice = " or ".join(f"weights={prefix.rstrip('.')}" for prefix in prefixes if prefix)
    raise WeightsError(
        f"the file holds {len(prefixes)} vision transformers ({held}); choose {choice}; "
        "it is load.weights in smalti train, network in Python"
    )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _timm_name(name: str) -> str:
    name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # chunked DINOv2: the inner number is global
    name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
    name = re.sub(r"^fc_norm\.", "norm.", name)
    for theirs, ours in _RENAMED.items():
        name = name.replace(theirs, ours)
    return name


def _from_torch(
    tensors: Tensors, everything: Mapping[str, Tensor], dropped: tuple[str, ...], beside: set[str]
) -> ForeignViT:
    """Convert checkpoints in the layouts of DINO, MAE and PART, after renaming.

    Args:
        tensors: the tensors to keep, with timm's names.
        everything: all tensors with the prefix, including heads, with the file's names.
        dropped: names dropped so far.
        beside: other keys of the file.
    """
    tensors = _fuse_split_attention(tensors)
    model_args: dict[str, Any] = {}
    notes: list[str] = []
    positions = tensors.get("pos_embed")
    if "blocks.0.attn.kv.weight" in tensors and positions is not None:
        if _is_part_pretraining(everything):
            del tensors["pos_embed"]
            model_args["pos_embed"] = "none"
            dropped += ("pos_embed",)
            notes.append("no positions: PART doesn't train those in the file")
        elif "cls_token" in tensors:
            tensors["pos_embed"] = positions.roll(1, dims=1)  # PART's sequence ends with the class token
    square = positions is not None and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]
    if "flsl_loss" in beside and square and "cls_token" in tensors:
        del tensors["cls_token"]
        dropped += ("cls_token",)
        notes.append("no class token: FLSL doesn't train the one in the file")
    if "cls_token" not in tensors and square:
        model_args["class_token"] = False
        if "norm.weight" not in tensors:
            model_args["final_norm"] = False
    return ForeignViT(tensors, model_args, dropped, tuple(notes))


def _is_part_pretraining(everything: Mapping[str, Tensor]) -> bool:
    """Whether a PART file comes from pretraining: it holds the targets' buffer, or a head over pairs of patches."""
    head, token = everything.get("head.weight"), everything.get("cls_token")
    pairs = head is not None and token is not None and head.shape[-1] != token.shape[-1]
    return pairs or any(name == "targets" or name.startswith("head.multihead_attn.") for name in everything)


def _fuse_split_attention(tensors: Tensors) -> Tensors:
    """``attn.{q,k,v}``, also ``{q,k,v}_proj`` and ``{query,key,value}``, as ``attn.qkv``."""
    result = dict(tensors)
    for name in tensors:
        match = SPLIT.match(name)
        if match is None:
            continue
        block, query, kind = match.groups()
        others = {"q": ("k", "v"), "q_proj": ("k_proj", "v_proj"), "query": ("key", "value")}[query]
        trio = [name, *(f"{block}.{other}.{kind}" for other in others)]
        if all(part in tensors for part in trio):
            result[f"{block}.qkv.{kind}"] = torch.cat([result.pop(part) for part in trio])
    return result


def fuse_part_attention(tensors: Mapping[str, Tensor], num_heads: int) -> Tensors:
    """``attn.q`` and ``attn.kv`` as ``attn.qkv``: PART stacks ``[key; value]`` head by head, timm all keys first.

    Args:
        tensors: with ``attn.q.* (D, ...)`` and ``attn.kv.* (2 * D, ...)``; others pass.
        num_heads: H, which divides D.
    """
    result = dict(tensors)
    for name in tensors:
        if name.endswith((".attn.kv.weight", ".attn.kv.bias")) and name.replace(".kv.", ".q.") in tensors:
            stacked = result.pop(name)
            pairs = stacked.reshape(num_heads, 2, -1, *stacked.shape[1:])  # (2 * D, ...) -> (H, 2, hd, ...)
            keys, values = (pairs[:, number].flatten(0, 1) for number in (0, 1))
            queries = result.pop(name.replace(".kv.", ".q."))
            result[name.replace(".kv.", ".qkv.")] = torch.cat([queries, keys, values])
    return result


def to_eva_names(foreign: ForeignViT, own: Mapping[str, Tensor]) -> ForeignViT:
    """Rename and split tensors for timm's ``Eva``, whose LayerScale and attention have other names.

    Args:
        foreign: a network with the names of timm's ``VisionTransformer``, or with those of ``Eva``.
        own: state of the model that is to be filled.

    Raises:
        WeightsError: if the file has biases of queries or values that are not zero, and the model has none.
    """
    tensors: Tensors = {}
    dropped, notes = [*foreign.dropped], [*foreign.notes]
    for name, tensor in foreign.tensors.items():
        new = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)
        if UNUSED_IN_EVA.search(new):
            dropped.append(name)
        else:
            tensors[new] = tensor
    for name in [name for name in tensors if name.endswith((".attn.qkv.weight", ".attn.qkv.bias"))]:
        attn, _, kind = name.rpartition(".qkv.")
        if name in own:
            continue
        split = [f"{attn}.{part}_proj.{kind}" for part in "qkv"]
        if split[0] in own:
            rows = [own[part].shape[0] if part in own else own[split[0]].shape[0] for part in split]
            if sum(rows) == tensors[name].shape[0]:
                parts = torch.split(tensors.pop(name), rows)
                tensors |= {part: value for part, value in zip(split, parts, strict=True) if part in own}
        elif kind == "bias":  # Eva's keys have no bias; DINOv3 masks theirs
            queries, _, values = tensors.pop(name).chunk(3)
            tensors |= {f"{attn}.q_bias": queries, f"{attn}.v_bias": values}
    for name in [name for name in tensors if re.search(r"\.attn\.[qv]_proj\.bias$", name) and name not in own]:
        tensors[name.replace("_proj.bias", "_bias")] = tensors.pop(name)
    lost = [name for name in tensors if name.endswith((".q_bias", ".v_bias")) and name not in own]
    if any(bool(tensors[name].any()) for name in lost):
        raise WeightsError(
            "the file has biases of queries and values, which this architecture lacks; name the one with them "
            "(vit_..._dinov3_qkvb)"
        )
    for name in lost:
        del tensors[name]
    notes += ["biases of queries and values, all zero, left out"] if lost else []
    return replace(foreign, tensors=tensors, dropped=tuple(dropped), notes=tuple(notes))


def fold_layer_scale(tensors: Mapping[str, Tensor]) -> Tensors:
    """LayerScale multiplied into the linear layer before it: ``diag(gamma) W`` and ``gamma * b``, the same function."""
    result = dict(tensors)
    for name in tensors:
        match = re.match(r"^(blocks\.\d+)\.(?:ls([12])\.gamma|gamma_([12]))$", name)
        if match:
            gamma = result.pop(name)
            layer = f"{match.group(1)}.{'attn.proj' if '1' in match.groups() else 'mlp.fc2'}"
            for kind in ("weight", "bias"):
                if f"{layer}.{kind}" in result:
                    tensor = result[f"{layer}.{kind}"]
                    result[f"{layer}.{kind}"] = gamma.view(-1, *[1] * (tensor.ndim - 1)) * tensor
    return result


def _from_flax(tree: Tensors, dropped: tuple[str, ...]) -> ForeignViT:
    """LOCA's arrays as Flax lays them out: kernels end with their outputs, heads are an axis."""
    result: Tensors = {}
    grid: tuple[int, int] | None = None
    num_heads: int | None = None
    for name, array in tree.items():
        block = re.match(r"^encoderblock_(\d+)\.(.*)$", name)
        if name == FLAX_ANCHOR:
            result["patch_embed.proj.weight"] = array.permute(3, 2, 0, 1)  # HWIO -> OIHW
        elif name == "ToTokenSequence_0.embedding.bias":
            result["patch_embed.proj.bias"] = array
        elif name == "ToTokenSequence_0.posembed_input":
            result["pos_embed"] = array.flatten(1, -2)  # (1, h, w, D) -> (1, N, D)
            grid = (array.shape[1], array.shape[2]) if array.ndim == 4 else None
        elif name in ("encoder_norm.scale", "encoder_norm.bias"):
            result[f"norm.{'weight' if name.endswith('scale') else 'bias'}"] = array
        elif block:
            inner, _, kind = block.group(2).rpartition(".")
            if inner == "MultiHeadDotProductAttention_0.query" and kind == "kernel":
                num_heads = array.shape[1]
            result[f"blocks.{block.group(1)}.{_flax_layer(inner)}.{'bias' if kind == 'bias' else 'weight'}"] = (
                _flax_matrix(inner, kind, array)
            )
        else:
            result[name] = array
    notes = ("tanh GELU, no class token: a LOCA layout",)
    model_args = {"class_token": False, "act_layer": "gelu_tanh"}
    return ForeignViT(_fuse_split_attention(result), model_args, dropped, notes, grid, num_heads)


def _flax_layer(inner: str) -> str:
    attention, mlp = "MultiHeadDotProductAttention_0", "MlpBlock_0"
    names = {"LayerNorm_0": "norm1", "LayerNorm_1": "norm2", f"{attention}.out": "attn.proj"}
    names |= {f"{attention}.{part}": f"attn.{part}" for part in ("query", "key", "value")}
    names |= {f"{mlp}.Dense_0": "mlp.fc1", f"{mlp}.Dense_1": "mlp.fc2"}
    return names.get(inner, inner)


def _flax_matrix(inner: str, kind: str, array: Tensor) -> Tensor:
    """A Flax array of a block in torch's shape: matrices ``(out, in)``, heads side by side."""
    if kind == "scale" or (kind == "bias" and array.ndim == 1):
        return array
    if kind == "bias":
        return array.flatten()  # (H, hd) -> (D,)
    if inner.endswith(".out"):
        return array.flatten(0, 1).T  # (H, hd, D) -> (D, D) transposed
    return array.flatten(1).T  # (D, H, hd) or (in, out) -> (out, in)


def describe(tensors: Mapping[str, Tensor]) -> str:
    """A ViT's proportions in words, read off its tensors."""
    kernel = tensors.get(ANCHOR)
    depth = num_blocks(tensors)
    if kernel is None or kernel.ndim != 4:
        return f"a network of {depth} blocks"
    extras = [f"{tensors['reg_token'].shape[1]} registers"] if "reg_token" in tensors else []
    extras += ["LayerScale"] if {"blocks.0.ls1.gamma", "blocks.0.gamma_1"} & tensors.keys() else []
    extras += [] if "cls_token" in tensors else ["no class token"]
    return (
        f"a ViT {kernel.shape[0]} wide, {depth} deep, patch {kernel.shape[-1]}, {kernel.shape[1]} channels"
        + "".join(f", {extra}" for extra in extras)
    )


def num_blocks(tensors: Mapping[str, Tensor]) -> int:
    """Depth, by the highest number of a block."""
    return 1 + max((int(m.group(1)) for m in (re.match(r"blocks\.(\d+)\.", key) for key in tensors) if m), default=-1)


def likely_names(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Possible timm names for an architecture of this size, most likely first; not all exist in timm."""
    kernel = tensors.get(ANCHOR)
    if kernel is None or kernel.ndim != 4:
        return ()
    size = SIZES.get((kernel.shape[0], num_blocks(tensors)))
    if (kernel.shape[0], num_blocks(tensors)) == (1536, 40):
        size = "giant"
    if size is None:
        return ()
    stem = f"vit_{size}_patch{kernel.shape[-1]}"
    registers = f"_reg{tensors['reg_token'].shape[1]}" if "reg_token" in tensors else ""
    if "pos_embed" not in tensors and registers and kernel.shape[-1] == 16:
        return (f"{stem}_dinov3",)
    if "blocks.0.ls1.gamma" in tensors:
        return (f"{stem}{registers}_dinov2", f"{stem}_dinov2", f"{stem}_224")
    return (f"{stem}{registers}_224", f"{stem}_224", f"{stem}_dinov2")


def some(names: tuple[str, ...], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
