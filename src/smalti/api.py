"""Python functions for the commands, with settings as keyword arguments.

Names are those of the command line; a group of settings is a dict:
``smalti.evaluate(encoder, "photos", ["knn"], image_size=96, knn={"k": 20})``. Nothing is printed. ``smalti.load``,
``train``, ``resume`` and ``compare`` come from the modules that define them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.config import Tree, build, merge, read_yaml, unfold
from smalti.data.images.folders import open_images
from smalti.data.signals.signal_set import is_signals
from smalti.errors import ConfigError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.result import Result
from smalti.exporters.embeddings import Embedded
from smalti.exporters.embeddings import embed as write_embeddings
from smalti.exporters.hf import export_hf
from smalti.exporters.onnx import export_onnx
from smalti.exporters.ranked import RankedModel
from smalti.exporters.timm import export_timm
from smalti.models.encoder import Encoder
from smalti.models.loading import load
from smalti.preflight.keep import KeepReport, measure_keep
from smalti.preflight.report import DoctorReport, measure_step
from smalti.preflight.report import doctor as look
from smalti.preflight.step import shared_by_workers, step_maker
from smalti.ranking.rank import RankConfig, Ranking
from smalti.ranking.rank import rank as rank_patches
from smalti.runs import baseline
from smalti.runs.build import load_ranker
from smalti.runs.config import DataConfig, resolve, with_signals, with_start
from smalti.runs.generate import (
    GenerateConfig,
    choose_classes,
    choose_orders,
    draw_images,
    image_keys,
    load_generator,
    open_cache,
    own_order,
)
from smalti.runs.provenance import history
from smalti.runs.recipes import find_recipe
from smalti.training.launch import num_processes

Spec = str | Path | Encoder
"""An encoder, or one by name: ``RUN``, ``RUN/best``, ``FILE.safetensors``, ``timm:NAME[@FILE]`` or ``random:NAME``."""


def evaluate(
    encoder: Spec,
    data: str | Path,
    protocols: Sequence[str] = (),
    *,
    figures: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> list[Result]:
    """Evaluate an encoder and its baseline on labelled images.

    Args:
        encoder: an encoder on the device to run on, or the name of one, which is moved to the GPU if there is one.
        data: labelled images: a folder, a list file, or ``NAME=PATH`` to force a reader.
        protocols: names such as ``knn``; empty: all that fit the data.
        figures: keep the images that reports show, in ``details.shown`` of the results.
        progress: called as ``progress(what, done, total)`` from time to time.
        settings: ``eval.*`` of the command line, such as ``split="test"`` or ``baseline=False``; settings of one
            protocol are a dict under its name, with ``_`` for ``-``: ``linear_probe={"epochs": 10}``.

    Returns:
        One result per protocol, each followed by that of the baseline, with intervals over the evaluated images.

    Raises:
        ConfigError, DataError, ShapeError, WeightsError: for an invalid setting or input.

    Example:
        >>> results = smalti.evaluate("runs/a", "photos", ["knn"], knn={"k": 20})  # doctest: +SKIP
        >>> results[0].metrics["top1"]  # doctest: +SKIP
        0.31
    """
    own = EvalConfig.open_groups()
    tree = unfold(
        {(dashed if (dashed := key.replace("_", "-")) in own else key): value for key, value in settings.items()}
    )
    config = build(EvalConfig, {**tree, **({"protocols": tuple(protocols)} if protocols else {})}, "", "eval")
    return baseline.evaluate(_encoder(encoder), _name(encoder), str(data), config, progress=progress, figures=figures)


def rank(
    encoder: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    orders: Sequence[str] = (),
    flips: bool = True,
    against: str | Path | None = None,
    predictor: str | Path | None = None,
    **settings: Any,
) -> Ranking:
    """Rank the patches of all images by importance, and write the file of orders.

    Args:
        encoder: a run of comae, or an encoder by any of its names.
        data: images.
        out: the file of orders, ``.parquet``.
        orders: names of orders; empty: all available ones.
        flips: also rank mirrored images, for training with flips.
        against: a file of orders of the same images, or a run of another seed, to compare with.
        predictor: a run of prefix, which scores the orders.
        settings: settings of ``smalti rank``, such as ``batch_size=8``.

    Raises:
        ConfigError, DataError, ShapeError, RunError, WeightsError: for a missing or incompatible input.
    """
    return rank_patches(
        str(encoder),
        str(data),
        Path(out),
        build(RankConfig, unfold(settings)),
        orders=orders,
        both_flips=flips,
        against=None if against is None else str(against),
        predictor=None if predictor is None else str(predictor),
        device=_best_device(),
    )


def generate(run: str | Path, *, orders: str | Path | None = None, **settings: Any) -> Float[Tensor, "B C H W"]:
    """Generate images with a run of mar or cmar.

    Args:
        run: the run directory.
        orders: a file of orders, for orders that need one; None: the run's own.
        settings: settings of ``smalti generate``, such as ``num=16, labels="cat", cfg=2.0``.

    Returns:
        ``(B, C, H, W)`` images in 0..1, on the CPU.

    Raises:
        ConfigError, DataError, RunError, ShapeError: for a missing or incompatible input.
    """
    config = build(GenerateConfig, unfold(settings))
    generator = load_generator(Path(run))
    method, classes = generator.method, generator.classes
    labels = choose_classes(config.words, classes, config.num)
    trained_for, its_file = own_order(method)
    name = config.order or trained_for
    cache = open_cache(name, orders or its_file)
    keys = image_keys(config.seed, range(config.num))
    chosen = choose_orders(name, config.order_source, cache, labels, keys, method.tokens.grid, classes)
    drawn: list[Tensor] = []
    draw_images(
        method.to(_best_device()),
        chosen,
        labels,
        seed=config.seed,
        sampler=config.sampler,
        batch_size=config.batch_size,
        keep=lambda first, images: drawn.append(images),
    )
    return torch.cat(drawn)


def export(encoder: Spec, out: str | Path, to: str = "timm", **settings: Any) -> Path:
    """Write an encoder for timm, transformers or ONNX, and check that the outputs are equal.

    Args:
        encoder: an encoder, or one by name.
        out: a folder that doesn't exist yet.
        to: ``timm``, ``hf`` (Hugging Face transformers) or ``onnx``.
        settings: for ONNX ``image_size=``, ``keep=`` and ``input="unit"``.

    Returns:
        The folder.

    Raises:
        ConfigError, WeightsError: for an invalid setting, or if the outputs differ.
        MissingExtraError: for ``to="onnx"`` or ``to="hf"`` without the extra.
    """
    if to not in ("timm", "hf", "onnx"):
        raise ConfigError(f"to={to}: timm, hf or onnx is needed")
    if to != "onnx" and settings:
        raise ConfigError(f"{next(iter(settings))} only applies to to='onnx'; leave it out")
    model = _encoder(encoder)
    provenance = history(model, model.name if isinstance(encoder, Encoder) else str(encoder))
    if to == "timm":
        return export_timm(model, Path(out), provenance).path
    if to == "hf":
        return export_hf(model, Path(out), provenance).path
    return export_onnx(model.cpu(), Path(out), provenance=provenance, **settings).path


def embed(encoder: Spec, data: str | Path, out: str | Path, *, level: str = "image", **settings: Any) -> Embedded:
    """Write the features of all images to ``.parquet`` or ``.npz``.

    Args:
        encoder: an encoder, or one by name.
        data: images.
        out: the ``.parquet`` or ``.npz`` file.
        level: ``image`` (one vector per image) or ``patch`` (its patch tokens).
        settings: ``pool= image_size= batch_size= num_workers= dtype=``.

    Raises:
        ConfigError, DataError, ShapeError: for an invalid setting or input.
    """
    return write_embeddings(_encoder(encoder), open_images(str(data)), Path(out), level=level, **settings)


def doctor(
    data: str | Path | None = None,
    *,
    method: str | None = None,
    recipe: str | Path | None = None,
    against: str | Path | None = None,
    encoder: Spec | None = None,
    keep: int | None = None,
    ranker: str | Path | None = None,
    out: str | Path = ".",
    overrides: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DoctorReport:
    """Check this machine and the data, and estimate memory, time and disk space of a run.

    Args:
        data: images or recordings; all files are read once.
        method: measure a step of this method.
        recipe: measure a step of this recipe.
        against: a second set, to evaluate on; its images that are also trained on are reported.
        encoder: with ``keep``: the encoder that is measured, with all patches and with ``keep``.
        keep: number of patches to keep.
        ranker: a run of ``ranker`` that chooses them; None: one of the default size.
        out: where a run would be written; need not exist.
        overrides: settings of the run, as in :func:`smalti.train`; a step is measured if any besides ``data`` is given.
        progress: called as ``progress(done, total)``, counting files.

    Returns:
        ``report.lines()`` is what the command prints.

    Raises:
        ConfigError, DataError, WeightsError: as :func:`smalti.train`; also for ``encoder`` or ``ranker`` without
            ``keep``, or ``keep`` without ``encoder``.
    """
    if keep is None and (encoder is not None or ranker is not None):
        raise ConfigError("--encoder and --ranker need --keep K, the number of patches to keep")
    if keep is not None and encoder is None:
        raise ConfigError(f"--keep {keep} needs --encoder, the encoder to measure: RUN, timm:NAME@FILE or random:NAME")
    tree: Tree = merge(unfold(overrides or {}), {"data": {"path": str(data)}} if data else {})
    if method or recipe or tree.keys() - {"data"}:
        given = read_yaml(find_recipe(recipe)) if recipe else {}
        given = merge(merge(given, {"method": {"name": method}} if method else {}), tree)
        config = resolve(with_start(with_signals(given)), str(recipe) if recipe else "settings")
        how, device = config.data, _best_device()
        make_step, checkpoint_mib = step_maker(config, device)
        step = measure_step(
            make_step,
            batch_size=config.batch_size,
            steps=config.steps,
            micro_batch=config.micro_batch,
            processes=num_processes(config.devices),
            device=device,
            checkpoint_mib=checkpoint_mib,
            keep=config.checkpoint.keep,
            shared_mib=shared_by_workers(config),
        )
    else:
        # recordings that can't be opened are what the report is about
        known = tree if data is not None and is_signals(str(data)) else with_signals(tree)
        how, step = build(DataConfig, known.get("data", {}), group="data"), None
    return look(
        None if data is None else str(data),
        how,
        against=None if against is None else str(against),
        out=Path(out),
        step=step,
        keep=None if encoder is None or keep is None else _measure_keep(encoder, keep, ranker),
        progress=progress,
    )


def load_ranked(encoder: Spec, ranker: str | Path, keep: int) -> RankedModel:
    """One module that ranks an image's patches and encodes the best of them, with the interface of a timm model.

    Args:
        encoder: an encoder, or the name of one.
        ranker: a run of ``ranker``.
        keep: number of patches to encode.

    Returns:
        In eval mode on the CPU; takes normalised images.

    Raises:
        ConfigError: for a run of another method, another grid of patches, or ``keep`` outside 1..N.
        RunError, WeightsError: for an encoder or run that can't be loaded.
    """
    model = encoder if isinstance(encoder, Encoder) else load(encoder, quiet=True)
    return RankedModel(model, load_ranker(ranker), keep).cpu().eval()


def _measure_keep(encoder: Spec, keep: int, ranker: str | Path | None) -> KeepReport:
    return measure_keep(_encoder(encoder), keep, None if ranker is None else load_ranker(ranker), str(ranker or ""))


def _encoder(spec: Spec) -> Encoder:
    return spec if isinstance(spec, Encoder) else load(spec, quiet=True).to(_best_device())


def _name(spec: Spec) -> str:
    """Name of an encoder in results."""
    return spec.name if isinstance(spec, Encoder) else str(spec)


def _best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
