"""Export an encoder to ONNX; the files are checked in ONNX Runtime for equal outputs.

``encoder.onnx`` takes whole images; ``keep.onnx`` also takes the patches to use, and its cost is that of these patches;
``ranked.onnx`` holds a ranker that chooses them.
Letters: B images, N patches, L kept ones, D embed_dim, K classes.
"""

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from smalti.errors import ConfigError, MissingExtraError, WeightsError
from smalti.exporters.card import CARD, Input, Provenance, input_metadata, model_card
from smalti.exporters.ranked import best_patches, check_keep, check_ranker
from smalti.exporters.timm import check_target
from smalti.files import folder_beside, write_atomically
from smalti.functional.orders import random_orders
from smalti.layers.attention import attention_modules
from smalti.methods.ranker import DistilledRanker
from smalti.models.build import clone_encoder
from smalti.models.encoder import ClassHead, Encoder

TOLERANCE = 1e-4
"""Largest allowed difference of an output, relative to the largest value of that output (at least 1)."""
WHOLE, KEEP, RANKED, CONFIG = "encoder.onnx", "keep.onnx", "ranked.onnx", "config.json"
OPSET = 20
_ONE_FILE_BYTES = 1.8 * 2**30  # protobuf's limit is 2 GiB
_TRIED = (1, 3)
"""Batch sizes that are compared, since the batch axis is dynamic."""


class OnnxExport(NamedTuple):
    """Result of :func:`export_onnx`."""

    path: Path
    """The folder."""
    outputs: tuple[str, ...]
    """``tokens`` ``(B, N, D)``, ``vector`` ``(B, D)``, and ``logits`` ``(B, K)`` if the weights include a head."""
    difference: float
    """Largest difference to torch, measured as for :data:`TOLERANCE`."""


class Exported(nn.Module):
    """The exported model: images in, tokens, vector and class scores out.

    Args:
        encoder: a copy, modified in place; with ``input="unit"``, its normalisation is part of the model.
        head: linear classification head, or None.
        input: format of the images.
    """

    def __init__(self, encoder: Encoder, head: ClassHead | None, input: Input = "normalized") -> None:
        super().__init__()
        self.encoder = encoder
        self.input = input
        if encoder.gaug is not None:  # torch's exporter can't decompose fused attention with a bias
            for module in attention_modules(encoder.vit.blocks, encoder.name):
                module.fused_attn = False
        self.head: nn.Linear | None = None
        if head is not None:
            self.head = nn.Linear(head.weight.shape[1], len(head.weight))
            self.head.weight = nn.Parameter(head.weight.detach().clone())
            self.head.bias = nn.Parameter(head.bias.detach().clone())

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> tuple[Tensor, ...]:
        """Takes ``(B, C, H, W)`` float images in the format of ``input``, and ``(B, L)`` raster indices of the patches
        to use; None: all."""
        images = self.encoder.normalize(images) if self.input == "unit" else images
        features = self.encoder.encode(images, ids_keep=ids_keep)
        vector = self.encoder.pooled(features)
        return (features.patches, vector) if self.head is None else (features.patches, vector, self.head(vector))


class ExportedRanked(nn.Module):
    """A ranker, the choice of its best patches, and the model that encodes these.

    Args:
        model: encodes the chosen patches.
        ranker: scores the patches; its normalisation may differ from the model's.
        keep: L, number of patches.
    """

    def __init__(self, model: Exported, ranker: DistilledRanker, keep: int) -> None:
        super().__init__()
        self.model, self.ranker, self.keep = model, ranker, keep

    def choose(self, images: Tensor) -> Tensor:
        """``(B, L)`` raster indices of the patches with the highest scores, the best first."""
        if self.model.input == "normalized":  # back to 0..1, since the ranker has a normalisation of its own
            images = images * self.model.encoder._std + self.model.encoder._mean
        return best_patches(self.ranker, images, self.keep)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The model's outputs for the chosen patches, and their indices."""
        ids_keep = self.choose(images)
        return (*self.model(images, ids_keep), ids_keep)


def export_onnx(
    encoder: Encoder,
    out: Path,
    *,
    image_size: int | None = None,
    keep: int | None = None,
    input: Input = "normalized",
    ranker: DistilledRanker | None = None,
    provenance: Provenance = Provenance(),
) -> OnnxExport:
    """Write a folder with ``encoder.onnx``, ``keep.onnx``, ``config.json`` and a model card.

    Both models take ``images`` ``(B, C, H, W)`` float32 with any B, normalised as for the exported timm model, or with
    ``input="unit"`` pixels in 0..1. ``keep.onnx`` also takes ``ids_keep`` ``(B, L)`` int64: the first L patches of an
    order, as raster indices; the others are not embedded. With a ranker, ``ranked.onnx`` takes images alone, encodes
    the ``keep`` best patches and also returns their ``ids_keep``. Dynamic axes are named ``batch`` (B) and ``kept``
    (L). The files' metadata contains range, mean and std. The files are run in ONNX Runtime, compared with torch for
    several B and L, and only then renamed to ``out``.

    Args:
        encoder: on any device; the logits of ``encoder.class_head`` are an output, too.
        out: a folder that does not exist yet, or is empty.
        image_size: side of the images in pixels; None: the encoder's own.
        keep: fixed L; None: dynamic.
        input: ``normalized`` images, or pixels in 0..1 (``unit``), which the model normalises itself.
        ranker: chooses the patches of ``ranked.onnx``; needs ``keep``.
        provenance: of the weights, for the model card.

    Raises:
        MissingExtraError: without onnx, onnxscript or onnxruntime.
        ConfigError: if ``out`` isn't empty or can't be written, or ``keep`` isn't in 1..N or is missing for a ranker.
        ShapeError: if the patch size does not divide ``image_size``.
        WeightsError: if ONNX Runtime's outputs differ; nothing is written.
    """
    check_onnx()
    check_target(out)
    height, width = encoder.img_size if image_size is None else (image_size, image_size)
    grid = encoder.check_size(height, width)
    num_patches = grid[0] * grid[1]
    if keep is not None:
        check_keep(keep, grid, (height, width))
    if ranker is not None:
        check_ranker(ranker, encoder, (height, width), keep)
    head = encoder.class_head
    model = Exported(clone_encoder(encoder).cpu().float().eval(), head, input).eval()
    outputs = ("tokens", "vector", "logits")[: 2 if head is None else 3]
    try:
        with folder_beside(out) as temporary:
            metadata = input_metadata(encoder, input)
            images = _images(2, encoder.in_chans, height, width)
            some = keep or max(2, num_patches // 2)
            _write(model, (images,), temporary / WHOLE, ("images",), outputs, {"images": {0: "batch"}}, metadata)
            free = {0: "batch"} if keep else {0: "batch", 1: "kept"}
            arguments = (images, random_orders(torch.arange(2), num_patches)[:, :some])
            shapes = {"images": {0: "batch"}, "ids_keep": free}
            _write(model, arguments, temporary / KEEP, ("images", "ids_keep"), outputs, shapes, metadata)
            difference = compare(model, temporary, (height, width), (keep,) if keep else (1, some, num_patches))
            if not difference <= TOLERANCE:  # also NaN
                raise WeightsError(
                    f"ONNX Runtime's outputs differ from torch's by {difference:.3g} of the largest, at most "
                    f"{TOLERANCE:g} is allowed; {out} was not written"
                )
            if ranker is not None and keep is not None:
                ranked = ExportedRanked(model, copy.deepcopy(ranker).cpu().float(), keep).eval()
                names = (*outputs, "ids_keep")
                _write(ranked, (images,), temporary / RANKED, ("images",), names, {"images": {0: "batch"}}, metadata)
                difference = max(difference, compare_ranked(ranked, temporary, (height, width)))
                if not difference <= TOLERANCE:
                    raise WeightsError(
                        f"{RANKED} differs from torch by {difference:.3g} of the largest output, at most {TOLERANCE:g} "
                        f"is allowed; {out} was not written"
                    )
            described = _description(encoder, (height, width), keep, outputs, metadata)
            write_atomically(temporary / CONFIG, json.dumps(described, indent=2, ensure_ascii=False) + "\n")
            usage = f"""import onnxruntime

session = onnxruntime.InferenceSession("{WHOLE}")
{", ".join(outputs)} = session.run(None, {{"images": images}})"""
            write_atomically(temporary / CARD, model_card(encoder, "onnx", input, (height, width), usage, provenance))
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ConfigError(f"{encoder.name} with pool={encoder.pool} can't be written as ONNX ({reason})") from error
    except OSError as error:
        raise ConfigError(f"{out}: can't be written ({error.strerror or error})") from error
    return OnnxExport(out, outputs, difference)


def _description(
    encoder: Encoder, size: tuple[int, int], keep: int | None, outputs: tuple[str, ...], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Content of ``config.json``."""
    grid, head = encoder.check_size(*size), encoder.class_head
    return {
        "images": {"shape": ["B", encoder.in_chans, *size], **metadata},
        "ids_keep": {"shape": ["B", keep or "L"], "range": f"0..{grid[0] * grid[1] - 1}, int64, raster order"},
        "outputs": list(outputs),
        "grid": list(grid),
        "classes": list(head.classes) if head else [],
        "order": head.order if head else "",
        "opset": OPSET,
        "smalti": encoder.config(),
    }


@torch.inference_mode()
def compare_ranked(model: ExportedRanked, folder: Path, size: tuple[int, int]) -> float:
    """Largest difference between a model and its ``ranked.onnx``, as :func:`compare` measures it.

    Outputs are compared for the patches that the file has chosen; a choice counts as equal if the scores of its patches
    are those of the model's own choice, since patches with equal scores may be exchanged.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / RANKED, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in _TRIED:
        pixels = _images(batch, model.model.encoder.in_chans, *size)
        images = model.model.encoder.normalize(pixels) if model.model.input == "normalized" else pixels
        *outputs, chosen = session.run(None, {"images": images.numpy()})
        ids = torch.from_numpy(chosen)
        scores = model.ranker.scores(model.ranker.encoder.normalize(pixels))
        best = scores.topk(model.keep, dim=1).values
        pairs = [(best, scores.gather(1, ids).sort(dim=1, descending=True).values.numpy())]
        pairs += list(zip(model.model(images, ids), outputs, strict=True))
        for mine, other in pairs:
            gap = float(np.abs(mine.numpy() - other).max() / max(1.0, float(mine.abs().max())))
            worst = max(worst, gap) if np.isfinite(gap) else float("nan")
            if worst != worst:
                return worst
    return worst


def check_onnx() -> None:
    """Check that the required packages are installed.

    Raises:
        MissingExtraError: if one is missing; names the extra.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise MissingExtraError(f'export to ONNX needs {error.name}: pip install "smalti[onnx]"') from None
    del onnx, onnxruntime, onnxscript


@torch.inference_mode()
def compare(model: Exported, folder: Path, size: tuple[int, int], kept: tuple[int, ...]) -> float:
    """Largest difference between a model and its exported files on random images, measured as for :data:`TOLERANCE`.

    Args:
        model: on the CPU, in eval mode.
        folder: holds :data:`WHOLE` and :data:`KEEP`.
        size: height and width of the images.
        kept: numbers of patches to try.
    """
    import onnxruntime

    whole, few = (
        onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"]) for name in (WHOLE, KEEP)
    )
    worst = 0.0
    for batch in _TRIED:
        images = _images(batch, model.encoder.in_chans, *size)
        images = model.encoder.normalize(images) if model.input == "normalized" else images
        num_patches = model(images)[0].shape[1]
        pairs = [(model(images), whole.run(None, {"images": images.numpy()}))]
        for count in kept:
            ids = random_orders(torch.arange(batch), num_patches)[:, :count]
            pairs.append((model(images, ids), few.run(None, {"images": images.numpy(), "ids_keep": ids.numpy()})))
        for ours, theirs in pairs:
            for mine, other in zip(ours, theirs, strict=True):
                gap = np.abs(mine.numpy() - other).max() / max(1.0, float(mine.abs().max()))
                worst = max(worst, float(gap)) if np.isfinite(gap) else float("nan")
                if worst != worst:
                    return worst
    return worst


def _add_metadata(path: Path, values: Mapping[str, str]) -> None:
    """Add entries to a file's metadata; external weights stay where they are."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    known = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**known, **values})
    onnx.save(model, path)


def _images(batch: int, channels: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(batch))


def _write(
    model: nn.Module,
    arguments: tuple[Tensor, ...],
    path: Path,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    shapes: Mapping[str, Mapping[int, str]],
    metadata: Mapping[str, str],
) -> None:
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    free: dict[str, Any] = {
        name: {axis: torch.export.Dim(what) for axis, what in axes.items()} for name, axes in shapes.items()
    }
    batch = free["images"][0]
    for name in inputs:
        free[name][0] = batch  # the same dynamic axis as that of the images
    with _quiet():
        torch.onnx.export(
            model,
            arguments,
            path,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=free,
            opset_version=OPSET,
            dynamo=True,
            external_data=size > _ONE_FILE_BYTES,
            verbose=False,
        )
    _add_metadata(path, metadata)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's messages; the outputs are compared afterwards."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
