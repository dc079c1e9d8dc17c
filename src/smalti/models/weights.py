"""Read weights safely, also those of other projects, and load them into a timm vision transformer.

Nothing here runs code from a file: safetensors is data by construction, and torch files are opened with
``weights_only=True``.
"""

import argparse
import math
import pickle
import re
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import safe_open
from timm.layers import resample_patch_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smalti.config import Count, ImageSize, settings
from smalti.errors import WeightsError
from smalti.functional.positions import Resampling, resample_positions
from smalti.layers.attention import num_heads_of
from smalti.models.layouts import ForeignViT, Tensors, describe, fuse_part_attention, some, to_eva_names
from smalti.reading import reading

CONTAINERS = ("state_dict", "model", "ema_state_dict", "module")
NETWORKS = {
    "student": ("student", "params", "model"),
    "teacher": ("teacher", "ema_params", "model_ema", "ema_state_dict"),
}
"""Keys under which training checkpoints keep the two networks of a method."""
AGAIN = "it may be cut short or damaged, copy or download it again"
"""Advice for an incomplete file of weights."""
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz")


@settings
class LoadConfig:
    """How the weights of a file are loaded into an encoder."""

    weights: str | None = None
    """``student`` or ``teacher``, if a file or run holds both; None: the one that its method exports."""
    img_size: ImageSize | None = None
    """Native image size in pixels; position embeddings are resampled to its grid. None: the architecture's own."""
    registers: Literal["keep", "drop"] = "keep"
    """``drop``: load a file with register tokens into a model without them (NeCo's "XR" models)."""
    fold_layer_scale: bool = False
    """Multiply LayerScale into the preceding layers: a model without LayerScale with the same outputs."""
    patch_size: ImageSize | None = None
    """Patch size in pixels; the patch embedding is resampled if the file has another one. None: the architecture's."""
    patch_resample: Literal["pinv", "bicubic"] = "pinv"
    """``pinv``: pseudoinverse resize of the patch embedding (FlexiViT, timm); ``bicubic``: resize the kernel."""
    depth: Count | None = None
    """Keep only the first ``depth`` blocks, with the final norm after them; None: all."""
    pos_mode: Literal["bicubic", "bilinear"] | None = None
    """Interpolation of position embeddings to other grids; None: the encoder's own, which is bicubic."""
    pos_antialias: bool | None = None
    """Antialias this interpolation; None: the encoder's own, true as in timm (the code of the DINO family: false)."""
    pos_offset: float | None = None
    """Offset added to the grid size in the scale factor; None: the encoder's own, 0 (DINO, iBOT, DINOv2: 0.1)."""


@dataclass(frozen=True)
class LoadReport:
    """Which tensors of a file were loaded into a model, and how."""

    source: str
    matched: int
    """Tensors of the model that got their values from the file."""
    total: int
    """Tensors of the model."""
    missing: tuple[str, ...] = ()
    """Tensors of the model that the file does not have."""
    unused: tuple[str, ...] = ()
    """Tensors of the file that the model does not use, apart from those dropped."""
    resampled: tuple[str, ...] = ()
    """Tensors that were resampled to the model's grid."""
    dropped: tuple[str, ...] = ()
    """Tensors of the file skipped on purpose: heads, decoders, mask tokens, networks not selected."""
    notes: tuple[str, ...] = ()
    """Changes other than names, in words."""
    used: tuple[str, ...] = ()
    """Tensors of the model that got their values from the file, by name."""

    def __str__(self) -> str:
        notes = [f"resampled {', '.join(self.resampled)}"] if self.resampled else []
        notes += [f"missing {some(self.missing)}"] if self.missing else []
        notes += [f"not used {some(self.unused)}"] if self.unused else []
        notes += [f"dropped {some(self.dropped, 2)}"] if self.dropped else []
        notes += self.notes
        return f"{self.source}: {self.matched} of {self.total} tensors matched" + "".join(f"; {note}" for note in notes)

    def details(self) -> str:
        """Every tensor by name, one kind a line."""
        kinds = ("used", "missing", "unused", "dropped")
        return "\n".join(f"{kind}: {', '.join(getattr(self, kind)) or 'none'}" for kind in kinds)


class Container(NamedTuple):
    """The tensors of one network in a checkpoint."""

    tensors: Tensors
    """By their names in the file."""
    network: str | None = None
    """The key that held them, where there were several networks."""
    beside: tuple[str, ...] = ()
    """The file's other keys."""


def read_tensors(path: Path, prefix: str = "", keys: Collection[str] | None = None) -> Tensors:
    """The tensors in a file, on the CPU; of safetensors only those whose name starts with ``prefix``, without it, and
    is one of ``keys``, where these are given.

    Raises:
        WeightsError: if the file is missing, truncated, of another kind, or holds pickled Python objects.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise WeightsError(f"{path}: {what}; a weights file is needed ({', '.join(SUFFIXES)})")
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"{path}: not a known kind of weights file; needed: one of {', '.join(SUFFIXES)}")
    if path.suffix == ".npz":
        return _read_arrays(path)
    if path.suffix == ".safetensors":
        _check_weights(path)
        with reading(path, "a safetensors file", WeightsError, AGAIN), safe_open(path, framework="pt") as file:
            return {
                key.removeprefix(prefix): file.get_tensor(key)
                for key in file.keys()
                if key.startswith(prefix) and (keys is None or key in keys)
            }
    return unwrap_file(path).tensors


def read_checkpoint(path: Path, network: str | None = None) -> Container:
    """The tensors of one network in a checkpoint of any kind that :func:`read_tensors` opens.

    Args:
        path: the file.
        network: ``student`` or ``teacher``, of a torch file that keeps both under keys of their own; in other files
            it is recognised by the names (:func:`smalti.models.layouts.to_timm_names`).

    Raises:
        WeightsError: as :func:`read_tensors`, and if the network isn't there.
    """
    if path.is_file() and path.suffix in SUFFIXES and path.suffix not in (".safetensors", ".npz"):
        return unwrap_file(path, network)
    return Container(read_tensors(path))


def _check_weights(path: Path) -> None:
    """Name what is often saved in the place of weights: the pointer of Git LFS, a web page, nothing.

    Raises:
        WeightsError: if it is one of these.
    """
    with reading(path, "weights", WeightsError), path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise WeightsError(f"{path}: is empty; {AGAIN}")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path}: is a Git LFS pointer, not the weights; fetch them with: git lfs pull --include {path.name}"
        )
    if re.match(rb"\s*<(!doctype|html|\?xml|head|body)", start, re.IGNORECASE):
        raise WeightsError(
            f"{path}: is a web page, not the weights; download the file itself, not the page that shows it"
        )


def _read_arrays(path: Path) -> Tensors:
    """Arrays by name, such as a Flax tree that was saved with numpy under joined names."""
    _check_weights(path)
    with reading(path, "an npz file of plain arrays", WeightsError, AGAIN):
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except ValueError as error:
            if "allow_pickle" in str(error):
                if not zipfile.is_zipfile(path):
                    raise ValueError("it is no npz file") from error
                raise WeightsError(f"{path}: holds Python objects; save plain arrays") from error
            raise
    numbers = {name: array for name, array in arrays.items() if array.dtype.kind in "fiub"}
    strange = next((name for name in arrays if arrays[name].dtype.kind == "V"), None)
    if strange is not None:
        raise WeightsError(f"{path}: '{strange}' is of no number type of numpy's (bfloat16?); save it as float32")
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in numbers.items()}


def read_torch(path: Path) -> Any:
    """What a torch file holds, opened without running code from it.

    Raises:
        WeightsError: if it holds pickled objects other than tensors and plain values, or is damaged.
    """
    _check_weights(path)
    with reading(path, "a torch file", WeightsError, AGAIN):
        try:
            with torch.serialization.safe_globals(
                [argparse.Namespace]
            ):  # plain attributes: MAE, DINO, PART keep their args
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            if not found:  # torch's own text says how to load it unsafely
                raise ValueError("it holds something else than tensors and plain values") from error
            raise WeightsError(
                f"{path}: holds pickled Python objects ({found.group(1)}), which can run code when loaded, so it isn't "
                "opened; a file of tensors alone is needed: safetensors, or torch.save of a state_dict"
            ) from error


def unwrap_file(path: Path, network: str | None = None) -> Container:
    """:func:`unwrap` of a torch file.

    Raises:
        WeightsError: as :func:`read_torch` and :func:`unwrap`, naming the file.
    """
    content = read_torch(path)
    with reading(path, "a file of tensors by name", WeightsError):
        try:
            return unwrap(content, network)
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from error


def unwrap(content: Any, network: str | None = None) -> Container:
    """The flat ``{name: tensor}`` inside a training checkpoint: unwraps containers, ``teacher`` before ``student``.

    Args:
        content: what a torch file holds; nested mappings of tensors are joined with dots.
        network: ``student`` or ``teacher``; None: the teacher, which DINO and its descendants export.

    Raises:
        WeightsError: if there are no tensors by name.
    """
    if not isinstance(content, Mapping):
        raise WeightsError(f"the file holds a {type(content).__name__}, not tensors by name")
    groups = [str(key) for key, value in content.items() if isinstance(value, Mapping)]
    for key in NETWORKS.get(network, (network,)) if network else ("teacher", "student"):
        if key in groups:
            inner = unwrap(content[key])
            return Container(inner.tensors, key, tuple(map(str, content)))
    for key in CONTAINERS:
        if key in groups:
            inner = unwrap(content[key], network)
            return inner._replace(beside=(*map(str, content), *inner.beside))
    tensors = _leaves(content)
    if not tensors:
        raise WeightsError(f"no tensors found under the keys {', '.join(map(str, content)) or '(none)'}")
    return Container(tensors)


def _leaves(content: Mapping[Any, Any]) -> Tensors:
    """Tensors by name; if there are none, those of the groups inside, names joined with dots."""
    own = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    groups = {str(key): _leaves(value) for key, value in content.items() if isinstance(value, Mapping) and not own}
    return own or {f"{key}.{name}": tensor for key, group in groups.items() for name, tensor in group.items()}


def load_vit(
    vit: VisionTransformer | Eva,
    foreign: ForeignViT | Mapping[str, Tensor],
    source: str,
    partial: bool = False,
    config: LoadConfig | None = None,
    resampling: Resampling = Resampling(),
) -> LoadReport:
    """Copy tensors into a timm ViT; what differs in form only is fitted.

    Positions go to the model's grid and to its rows (a class token's row is added to the token where the model has no
    such row, which is the same function); queries and PART's keys and values are fused.

    Args:
        vit: the model to fill.
        foreign: from :func:`smalti.models.layouts.to_timm_names`, or tensors with timm's names.
        source: what to call the file.
        partial: take what matches; otherwise every tensor of the model must be filled.
        config: whether registers may be dropped and patches resampled; None: neither.
        resampling: how positions are brought to the model's grid.

    Raises:
        WeightsError: if shapes don't fit (names both architectures), or something is missing and not ``partial``.
    """
    foreign = foreign if isinstance(foreign, ForeignViT) else ForeignViT(dict(foreign))
    config = config or LoadConfig()
    own = vit.state_dict()
    num_heads = num_heads_of(vit.blocks[0])
    if foreign.num_heads not in (None, num_heads):
        raise WeightsError(f"{source}: was made with {foreign.num_heads} attention heads, the model has {num_heads}")
    foreign = replace(foreign, tensors=fuse_part_attention(foreign.tensors, num_heads))
    if isinstance(vit, Eva):
        try:
            foreign = to_eva_names(foreign, own)
        except WeightsError as error:
            raise WeightsError(f"{source}: {error}") from error
        if config.fold_layer_scale:  # Eva keeps its LayerScale, as factors of one
            ones = {name: torch.ones_like(value) for name, value in own.items() if re.search(r"\.gamma_[12]$", name)}
            foreign = replace(foreign, tensors={**foreign.tensors, **ones})
    foreign, resampled = _fit_positions(vit, foreign, resampling)
    found, notes, dropped = dict(foreign.tensors), foreign.notes, foreign.dropped
    if config.registers == "drop":
        count = found.pop("reg_token").shape[1] if "reg_token" in found else 0
        notes += (f"{count} registers dropped" if count else "no registers to drop",)
    kernel = found.get("patch_embed.proj.weight")
    size = vit.patch_embed.patch_size
    if config.patch_size and kernel is not None and kernel.ndim == 4 and tuple(kernel.shape[-2:]) != tuple(size):
        found["patch_embed.proj.weight"] = resample_patches(kernel, size, config.patch_resample)
        resampled += (f"patch embedding from {kernel.shape[-1]} to {size[1]} px ({config.patch_resample})",)
    misfits = [key for key in own if key in found and found[key].shape != own[key].shape]
    if misfits:
        key = misfits[0]
        same = key == "patch_embed.proj.weight" and found[key].shape[:2] == own[key].shape[:2]
        raise WeightsError(
            f"{source}: holds {describe(foreign.tensors)}, the model is {describe(own)}; "
            f"'{key}' is {tuple(found[key].shape)} and must be {tuple(own[key].shape)}"
            + (f"; load.patch_size={size[1]} resamples it" if same else "")
        )
    used = tuple(key for key in own if key in found)
    missing = tuple(key for key in own if key not in found)
    unused = tuple(key for key in found if key not in own)
    report = LoadReport(source, len(used), len(own), missing, unused, resampled, dropped, notes, used)
    if (missing or unused) and not partial:
        raise WeightsError(
            f"{report}; the file holds {describe(foreign.tensors)}, the model is {describe(own)}; "
            + _remedy(missing, unused)
        )
    vit.load_state_dict({key: found[key] for key in used}, strict=False)
    return report


def resample_patches(
    kernel: Float[Tensor, "D C p q"], size: tuple[int, int], how: str = "pinv"
) -> Float[Tensor, "D C r s"]:
    """A patch embedding for patches of another size.

    Args:
        kernel: ``(D, C, p, q)`` weights of the patch convolution.
        size: ``(r, s)`` of the new patch in pixels.
        how: ``pinv`` keeps the response to a patch that is enlarged with its kernel; ``bicubic`` resizes the kernel
            like an image, and the response to a constant patch grows with its area, by (16 / 14)**2 = 1.306, say.

    Source: Beyer et al., FlexiViT, arXiv:2212.08013v2, Sec. 3.4, for ``pinv``, in timm's form.
    """
    if how == "pinv":
        return resample_patch_embed(kernel, list(size))
    return F.interpolate(kernel, size=size, mode="bicubic")


def _fit_positions(
    vit: VisionTransformer | Eva, foreign: ForeignViT, resampling: Resampling
) -> tuple[ForeignViT, tuple[str, ...]]:
    """The position table with the model's rows and grid, where the file's can be understood; and what to say of it.

    The table's rows before the patches are none, the class token's, or the class token's and the registers'.
    """
    tensors = dict(foreign.tensors)
    table, own = tensors.get("pos_embed"), vit.pos_embed
    if table is None or own is None or table.shape == own.shape or table.ndim != 3 or table.shape[-1] != own.shape[-1]:
        return foreign, ()
    tokens = [name for name in ("cls_token", "reg_token") if name in tensors]
    counts = [tensors[name].shape[1] for name in tokens]
    grid = (int(vit.patch_embed.grid_size[0]), int(vit.patch_embed.grid_size[1]))
    num_class = counts[0] if "cls_token" in tokens else 0
    for num_rows in dict.fromkeys((sum(counts), num_class, 0)):
        old = foreign.grid or _grid(table.shape[1] - num_rows, grid)
        if old is not None and old[0] * old[1] == table.shape[1] - num_rows:
            break
    else:
        return foreign, ()
    prefix = table.new_zeros(1, sum(counts), table.shape[-1])
    prefix[:, :num_rows] = table[:, :num_rows]
    notes = foreign.notes
    if vit.no_embed_class:
        for name, rows in zip(tokens, torch.split(prefix, counts, dim=1), strict=True):
            tensors[name] = tensors[name] + rows
        prefix = prefix[:, :0]
        notes += ("position of the class token added to it",) if num_rows else ()
    elif num_rows == 0 and "reg_token" not in tensors:
        return foreign, ()  # a class token without a position, or one that was never used: no telling
    else:
        prefix = prefix[:, : vit.num_prefix_tokens]
    table = torch.cat([prefix, table[:, num_rows:]], dim=1)
    tensors["pos_embed"] = resample_positions(table, old, grid, prefix.shape[1], resampling)
    said = (f"pos_embed from {old[0]}x{old[1]} to {grid[0]}x{grid[1]}",) if old != grid else ()
    return replace(foreign, tensors=tensors, notes=notes), said


def _grid(num_patches: int, preferred: tuple[int, int]) -> tuple[int, int] | None:
    """The grid of a table: the model's own where the number fits, else a square one."""
    if num_patches == preferred[0] * preferred[1]:
        return preferred
    side = math.isqrt(max(num_patches, 0))
    return (side, side) if side and side * side == num_patches else None


def _remedy(missing: tuple[str, ...], unused: tuple[str, ...]) -> str:
    """What to do about tensors that are left over."""
    if "reg_token" in unused:
        return "name an architecture with registers (vit_..._reg4_...), or load.registers=drop leaves them out"
    if any(name.endswith(".ls1.gamma") for name in unused):
        return "name an architecture with LayerScale (vit_..._dinov2), or load.fold_layer_scale=true folds it in"
    if any(name.endswith(".gamma_1") for name in missing):
        return "the file has no LayerScale; name an architecture without it"
    if any(".rpe_" in name for name in unused):
        return "its attention has relative position tables (LoMaR, iRPE), which timm's VisionTransformer can't compute"
    return "name the fitting architecture, or allow a partial match (--partial, partial=True)"
