"""Reading weights safely, whoever wrote them, and fitting them into a timm vision transformer.

Nothing here runs code from a file: safetensors is data by construction, and torch files are opened with
``weights_only=True``.
"""

import argparse
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smalti.errors import WeightsError

Tensors = dict[str, Tensor]
CONTAINERS = ("state_dict", "model", "ema_state_dict", "module")
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "module.")
DROPPED = re.compile(
    r"(^|\.)(.*head.*|prototypes.*|decoder_.*|mask_token|masked_embed|relation_blocks.*|dist_token)(\.|$)"
)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True)
class LoadReport:
    """What happened to the tensors of a file when a model took them."""

    source: str
    matched: int
    """Tensors of the model that got their values from the file."""
    total: int
    """Tensors of the model."""
    missing: tuple[str, ...] = ()
    """Tensors of the model that the file does not have."""
    unused: tuple[str, ...] = ()
    """Tensors of the file that the model does not take, heads and decoders left aside."""
    resampled: tuple[str, ...] = ()
    """Tensors that were resampled to the model's grid."""

    def __str__(self) -> str:
        notes = [f"resampled {', '.join(self.resampled)}"] if self.resampled else []
        notes += [f"missing {_some(self.missing)}"] if self.missing else []
        notes += [f"not used {_some(self.unused)}"] if self.unused else []
        return f"{self.source}: {self.matched} of {self.total} tensors matched" + "".join(f"; {note}" for note in notes)


def read_tensors(path: Path, prefix: str = "") -> Tensors:
    """The tensors in a file, on the CPU; of safetensors only those whose name starts with ``prefix``, without it.

    Raises:
        WeightsError: if the file is missing, truncated, of another kind, or holds pickled Python objects.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise WeightsError(f"{path}: {what}; a weights file is needed ({', '.join(SUFFIXES)})")
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"{path}: not a known kind of weights file; needed: one of {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(
                f"{path}: not a whole safetensors file ({error}); it may be truncated, copy or download it again"
            ) from error
    return flatten(read_torch(path))


def read_torch(path: Path) -> Any:
    """What a torch file holds, opened without running code from it.

    Raises:
        WeightsError: if it holds pickled objects other than tensors and plain values, or is damaged.
    """
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # plain attributes; old checkpoints keep their args
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found.group(1)})" if found else ""
        raise WeightsError(
            f"{path}: holds pickled Python objects{what}, which can run code when loaded; Smalti reads tensors only: "
            "save its state dict as safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: damaged or not a torch file ({str(error).splitlines()[0]})") from error


def flatten(content: Any, network: str | None = None) -> Tensors:
    """The flat ``{name: tensor}`` inside a training checkpoint: unwraps containers, ``teacher`` before ``student``.

    Raises:
        WeightsError: if there are no tensors by name, or not the ``network`` asked for.
    """
    if not isinstance(content, Mapping):
        raise WeightsError(f"the file holds a {type(content).__name__}, not tensors by name")
    for key in (network,) if network else ("teacher", "student"):
        if isinstance(content.get(key), Mapping):
            return flatten(content[key])
    for key in CONTAINERS:
        if isinstance(content.get(key), Mapping):
            return flatten(content[key], network)
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"no tensors found under the keys {', '.join(map(str, content)) or '(none)'}")
    return tensors


def to_timm_names(tensors: Mapping[str, Tensor]) -> Tensors:
    """Names as timm's ``VisionTransformer`` has them: wrappers and prefixes stripped, heads and decoders dropped.

    Handles the layouts of DINO, iBOT, DINOv2 (registers, chunked blocks, SwiGLU), MAE and their kin; source:
    the key tables of the projects' released checkpoints.

    Raises:
        WeightsError: if two networks (``model.`` and ``teacher.``) stand in one file, or no ViT is found.
    """
    names = {key: key for key in tensors}
    for wrapper in WRAPPERS:
        names = {key: name.replace(wrapper, "") if name.startswith(wrapper) else name for key, name in names.items()}
    anchor = "patch_embed.proj.weight"
    prefixes = sorted({name.removesuffix(anchor) for name in names.values() if name.endswith(anchor)}, key=len)
    if not prefixes:
        raise WeightsError(
            f"no vision transformer found: no tensor is called '{anchor}' (the file has {_some(tuple(tensors))})"
        )
    if len(prefixes) > 1:
        raise WeightsError(
            f"the file holds {len(prefixes)} vision transformers ({', '.join(repr(p) for p in prefixes)}); "
            "save the one you want alone"
        )
    result: Tensors = {}
    for key, name in names.items():
        name = name.removeprefix(prefixes[0]) if name.startswith(prefixes[0]) else ""
        if not name or DROPPED.search(name):
            continue
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # chunked DINOv2: the inner number is global
        name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        name = (
            name.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2.").replace("register_tokens", "reg_token")
        )
        name = re.sub(r"^fc_norm\.", "norm.", name)
        result[name] = tensors[key].float() if tensors[key].is_floating_point() else tensors[key]
    registers, positions, cls_token = (result.get(k) for k in ("reg_token", "pos_embed", "cls_token"))
    if registers is not None and positions is not None and cls_token is not None and _has_class_row(positions):
        result["cls_token"] = cls_token + positions[:, :1]  # DINOv2 with registers: timm keeps no position for these
        result["pos_embed"] = positions[:, 1:]
    return result


def load_vit(vit: VisionTransformer, tensors: Mapping[str, Tensor], source: str, partial: bool = False) -> LoadReport:
    """Copy tensors into a timm ViT; positions of another grid are resampled, bicubic and antialiased as timm does.

    Args:
        vit: the model to fill.
        tensors: with timm's names (:func:`to_timm_names`).
        source: what to call the file.
        partial: take what matches; otherwise every tensor of the model must be filled.

    Raises:
        WeightsError: if shapes don't fit (names both architectures), or something is missing and not ``partial``.
    """
    own = vit.state_dict()
    found = dict(tensors)
    resampled: tuple[str, ...] = ()
    positions = found.get("pos_embed")
    if positions is not None and "pos_embed" in own and positions.shape[-1] == own["pos_embed"].shape[-1]:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        num_old = positions.shape[1] - prefix
        if positions.shape != own["pos_embed"].shape and num_old > 0 and math.isqrt(num_old) ** 2 == num_old:
            grid = list(vit.patch_embed.grid_size)
            found["pos_embed"] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)
            resampled = (f"pos_embed from {math.isqrt(num_old)}x{math.isqrt(num_old)} to {grid[0]}x{grid[1]}",)
    misfits = [key for key in own if key in found and found[key].shape != own[key].shape]
    if misfits:
        key = misfits[0]
        raise WeightsError(
            f"{source}: holds {_architecture(found)}, the model is {_architecture(own)}; "
            f"'{key}' is {tuple(found[key].shape)} and must be {tuple(own[key].shape)}"
        )
    missing = tuple(key for key in own if key not in found)
    unused = tuple(key for key in found if key not in own)
    report = LoadReport(source, len(own) - len(missing), len(own), missing, unused, resampled)
    if (missing or unused) and not partial:
        raise WeightsError(
            f"{report}; the file holds {_architecture(found)}, the model is {_architecture(own)}; "
            "name the fitting architecture, or allow a partial match (--partial, partial=True)"
        )
    vit.load_state_dict({key: value for key, value in found.items() if key in own}, strict=False)
    return report


def _architecture(tensors: Mapping[str, Tensor]) -> str:
    """A ViT's proportions in words, read off its tensors."""
    kernel = tensors.get("patch_embed.proj.weight")
    depth = 1 + max((int(m.group(1)) for m in (re.match(r"blocks\.(\d+)\.", key) for key in tensors) if m), default=-1)
    if kernel is None or kernel.ndim != 4:
        return f"a network of {depth} blocks"
    extras = [
        text for key, text in (("reg_token", "registers"), ("blocks.0.ls1.gamma", "LayerScale")) if key in tensors
    ]
    extras += [] if "cls_token" in tensors else ["no class token"]
    return (
        f"a ViT {kernel.shape[0]} wide, {depth} deep, patch {kernel.shape[-1]}, {kernel.shape[1]} channels"
        + "".join(f", {extra}" for extra in extras)
    )


def _has_class_row(positions: Tensor) -> bool:
    """Whether a position table has one row more than a square grid."""
    rows = positions.shape[1]
    return math.isqrt(rows) ** 2 != rows and math.isqrt(rows - 1) ** 2 == rows - 1


def _some(names: tuple[str, ...], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
