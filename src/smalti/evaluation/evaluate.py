"""Evaluate an encoder and its baseline with several protocols."""

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from smalti.data.dataset import Labelled
from smalti.data.images.decode import NO_PIXELS, PixelConfig
from smalti.data.images.folders import ImageSet, open_images
from smalti.data.images.labelled import LabelKind, check_headers, draw_training, open_labelled
from smalti.data.signals.labelled_signals import open_labelled_signals
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import Target, is_signals, target_of
from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import EvaluationContext, Progress, own_head
from smalti.evaluation.features import Features
from smalti.evaluation.intervals import group_images
from smalti.evaluation.protocol import Need, Protocol, _registry, find_protocol, protocol_names
from smalti.evaluation.result import FRACTION, Baseline, Details, Result
from smalti.evaluation.shown import show
from smalti.models.build import encoder_from_config
from smalti.models.encoder import Encoder, eval_mode

_KINDS: Mapping[Need, LabelKind] = {"labels": "labels", "masks": "masks", "boxes": "boxes"}
TARGETS: Mapping[Need, Target] = {"stages": "stages", "windows": "classes"}
"""Needs of protocols for signals, and what these predict."""


def fitting_protocols(data: str, config: EvalConfig | None = None) -> tuple[str, ...]:
    """Names of the default protocols that the layout of the data supports, in alphabetical order.

    Data without labels and masks get the protocols that need none, recordings without class labels those for sleep
    stages.

    Args:
        data: path, or ``NAME=PATH``.
        config: how the data are read; None: the defaults.
    """
    config = config or EvalConfig()
    protocols = [_registry()[name] for name in protocol_names()]
    if is_signals(data):
        target = target_of(data, config.signal)
        return tuple(protocol.name for protocol in protocols if TARGETS.get(protocol.need) == target)
    has = _has(open_images(data, class_depth=config.class_depth)) or {"images"}
    return tuple(protocol.name for protocol in protocols if protocol.need in has and protocol.by_default)


def evaluate(
    encoder: Encoder,
    name: str,
    data: str,
    config: EvalConfig,
    *,
    baseline: Baseline | None = None,
    progress: Progress | None = None,
    figures: bool = False,
) -> list[Result]:
    """Evaluate an encoder and its baseline with the protocols of ``config``.

    The encoder's weights and the train or eval mode of each submodule are unchanged afterwards, as is the global random
    state.

    Args:
        encoder: on the device to run on.
        name: name of the encoder in the results.
        data: labelled images, as in ``EvalConfig.data``; overrides ``config.data``.
        config: settings of all protocols.
        baseline: baseline to compare with, which ``smalti.evaluate`` finds; None: evaluate only the encoder.
        progress: called as ``progress(what, done, total)`` from time to time.
        figures: also store figures of a few images for report pages, in ``details.shown``.

    Returns:
        One result per protocol in the order of ``config.protocols``, each followed by that of the baseline, if there
        is one, with its kind in ``baseline``.

    Raises:
        ConfigError: for an unknown protocol or an invalid setting.
        DataError: if the data lacks what a protocol needs.
        ShapeError: if the patch size does not divide the image size, or the encoder needs other channels.
    """
    protocols = [find_protocol(protocol) for protocol in config.protocols or fitting_protocols(data, config)]
    _warn_unused(protocols, config)
    sets = open_sets(data, config)
    for need, labelled in sets.items():
        if need == "masks":
            check_headers(labelled.train)
            check_headers(labelled.test)
    compared = [protocol for protocol in protocols if protocol.has_baseline]
    other: Encoder | None = None
    if config.baseline and compared and baseline is not None:
        other = baseline.make().to(next(encoder.parameters()).device)
    results = run_protocols(encoder, name, data, protocols, sets, config, progress, figures=figures, beside=other)
    beside: dict[str, Result] = {}
    if other is not None and baseline is not None:
        label = f"{name} ({baseline.label})"
        found = run_protocols(other, label, data, compared, sets, config, progress, figures=figures, beside=encoder)
        beside = {result.protocol: dataclasses.replace(result, baseline=baseline.kind) for result in found}
    return [one for result in results for one in (result, beside.get(result.protocol)) if one is not None]


def open_sets(data: str, config: EvalConfig) -> dict[Need, Labelled[Any]]:
    """Load the labelled images that the protocols of ``config`` need, and validate the settings.

    Raises:
        ConfigError: for an unknown protocol.
        DataError: if the data lacks what a protocol needs.
    """
    protocols = [find_protocol(protocol) for protocol in config.protocols or fitting_protocols(data, config)]
    of_signals = is_signals(data)
    for protocol in protocols:
        if protocol.check is not None:
            protocol.check(config)
        if (protocol.need in TARGETS) != of_signals:
            wanted, there = ("images", "signals") if of_signals else ("signals", "images")
            raise DataError(
                f"{data}: protocol {protocol.name} needs {wanted}, but the data are {there}"
                + ("; write signals=PATH to read them as signals" if not of_signals else "")
            )
    if of_signals:
        if config.train_size is not None:
            raise ConfigError(
                f"eval.train_size only applies to images; for recordings set eval.{protocols[0].name}.fractions"
            )
        split_seed = config.seed if config.split_seed is None else config.split_seed
        signal = config.signal or SignalConfig()
        found: dict[Need, Labelled[Any]] = {
            need: open_labelled_signals(data, signal, target=TARGETS[need], split=config.split, seed=split_seed)
            for need in dict.fromkeys(protocol.need for protocol in protocols)
        }
        if config.groups is not None:
            for one in found.values():
                group_images(one.test.names, config.groups)
        return found
    images = (
        open_images(data, class_depth=config.class_depth) if any(protocol.prefers for protocol in protocols) else None
    )
    # preferred but not needed; can't be opened without a train split or class names
    has = _has(images) if images and images.classes and (not images.splits or "train" in images.splits) else ()
    needs = dict.fromkeys(_source(protocol, has) for protocol in protocols)
    seed = config.seed if config.split_seed is None else config.split_seed
    sets: dict[Need, Labelled[ImageSet]] = {
        need: open_unlabelled(data, split=config.split, pixels=config.pixels)
        if need == "images"
        else open_labelled(
            data,
            split=config.split,
            seed=seed,
            need=_KINDS[need],
            class_depth=config.class_depth,
            mask_values=config.mask_values,
            ignore=config.ignore,
            pixels=config.pixels,
        )
        for need in needs
    }
    for need, labelled in sets.items():
        for called, images in (("train images", labelled.train), (labelled.evaluated, labelled.test))[
            need == "images" :
        ]:
            if not len(images):
                raise DataError(
                    f"{data}: no {called}; an evaluation needs a train split and another split to evaluate on"
                )
    if config.groups is not None:
        for labelled in sets.values():
            group_images(labelled.test.names, config.groups)
    if config.train_size is not None:
        for need in sets.keys() - {"images"}:
            sets[need] = draw_training(sets[need], config.train_size, seed)
    return {**sets}


def _has(images: ImageSet) -> set[Need]:
    """Kinds of labels in the data."""
    has: set[Need] = set()
    if any(sample.label is not None for sample in images.samples):
        has.add("labels")
    if any(sample.mask is not None or sample.instances is not None for sample in images.samples):
        has.add("masks")
    return has


def _source(protocol: Protocol, has: Collection[Need]) -> Need:
    """Which of the available kinds of labels a protocol uses."""
    return next((need for need in protocol.prefers if need in has), protocol.need)


def open_unlabelled(data: str, split: str | None = None, pixels: PixelConfig = NO_PIXELS) -> Labelled[ImageSet]:
    """Images for protocols that need no labels: a split (val or test if present), or all of them."""
    images = open_images(data).with_pixels(pixels)
    held_out = [name for name in ("val", "test") if name in images.splits]
    name = split or (held_out[0] if held_out else None)
    evaluated = images.subset(name) if name else images
    nothing = dataclasses.replace(images, samples=())
    note = f"no labels needed: {name or 'all images'} ({len(evaluated)})"
    return Labelled(nothing, evaluated, (), note, split=name or "")


def random_baseline(encoder: Encoder, seed: int) -> Baseline:
    """The baseline of an imported encoder: its architecture with timm's random initialisation."""
    return Baseline("random-init", partial(random_init, encoder, seed))


def random_init(encoder: Encoder, seed: int) -> Encoder:
    """An encoder of the same architecture and normalisation with timm's random weights, on the same device."""
    shape = {key: value for key, value in encoder.config().items() if key not in ("fixed_positions", "position_field")}
    made = encoder_from_config(shape, seed)
    head = encoder.class_head
    if head is not None:  # only the patch order matters here, which is the same for both
        made.class_head = head._replace(weight=head.weight[:0], bias=head.bias[:0])
    if encoder.token_pruning is not None:
        made.token_pruning = encoder.token_pruning.redrawn(made.embed_dim, seed)
    return made.to(next(encoder.parameters()).device)


def run_protocols(
    encoder: Encoder,
    name: str,
    data: str,
    protocols: Sequence[Protocol],
    sets: Mapping[Need, Labelled[Any]],
    config: EvalConfig,
    progress: Progress | None = None,
    *,
    figures: bool = False,
    beside: Encoder | None = None,
    make: Callable[..., Features] = Features,
) -> list[Result]:
    """Run protocols on data that were opened; features are computed only once.

    Args:
        encoder: as for :func:`evaluate`, as are name, data, config, progress and figures.
        protocols: which.
        sets: of :func:`open_sets`.
        beside: the encoder to compare with: heads stored with the encoder are used only if it has one, too.
        make: what computes the features of images.

    Returns:
        One result per protocol.
    """
    results = []
    with eval_mode(encoder):
        features = {
            need: _context(
                encoder,
                labelled,
                [protocol for protocol in protocols if _source(protocol, sets) == need],
                config,
                progress,
                own_heads=beside is None or own_head(beside, labelled.classes) is not None,
                make=make,
            )
            for need, labelled in sets.items()
        }
        for protocol in protocols:
            need = _source(protocol, sets)
            source = features[need]
            scores = protocol.run(source, config)
            shared = _common_settings(encoder, protocol, source, need, sets[need].note, config)
            results.append(
                Result(
                    protocol=protocol.name,
                    encoder=name,
                    data=data,
                    metrics=scores.metrics,
                    units={**dict.fromkeys(scores.metrics, FRACTION), **scores.units},
                    settings={**shared, **scores.settings},
                    per_class=scores.per_class,
                    details=Details(
                        images=source.names,
                        groups=source.data.test.groups,
                        classes=source.data.classes,
                        tallies=scores.tallies,
                        confusion=scores.confusion,
                        predictions=scores.predictions,
                        found=scores.found,
                        charts=scores.charts,
                        pictures=scores.pictures,
                        shown=source.once("shown", partial(show, source, config.image_size))
                        if figures and isinstance(source, Features)
                        else None,
                    ),
                )
            )
    return results


def _context(
    encoder: Encoder,
    labelled: Labelled[Any],
    protocols: Sequence[Protocol],
    config: EvalConfig,
    progress: Progress | None,
    own_heads: bool,
    make: Callable[..., Features],
) -> EvaluationContext[Any]:
    """What the protocols of one kind of data are given."""
    if labelled.test.kind == "signals":
        return EvaluationContext(
            encoder, labelled, batch_size=config.batch_size, num_workers=config.num_workers, progress=progress
        )
    return make(
        encoder,
        labelled,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        cache_dtype=config.cache_dtype,
        cache_mib=config.cache_mib,
        norm=config.norm,
        progress=progress,
        observers={
            protocol.name: protocol.observer(config.of(protocol.name))
            for protocol in protocols
            if protocol.observer is not None
        },
        own_heads=own_heads,
    )


def _common_settings(
    encoder: Encoder, protocol: Protocol, source: EvaluationContext[Any], need: Need, note: str, config: EvalConfig
) -> dict[str, Any]:
    """Settings stored with the results of all protocols; ``note`` describes the split."""
    settings: dict[str, Any] = {
        "architecture": encoder.name,
        "weights": encoder.source or "as given",
        "fitted": [] if encoder.report is None else [*encoder.report.resampled, *encoder.report.notes],
        "pos_resampling": encoder.pos_resampling._asdict(),
        "split": note,
        "evaluated": source.evaluated,
        "num_train": len(source.data.train),
        "num_test": len(source.data.test),
        "num_unreadable": len(source.skipped),
        "num_unreadable_evaluated": len(source.skipped.keys() & set(map(str, source.data.test.paths))),
        "num_classes": len(source.data.classes),
        "layout": source.data.test.layout,
        "seed": config.seed,
        **_imported(encoder),
    }
    if encoder.position_field is not None:
        settings["position_field"] = encoder.position_field.config()
    if protocol.takes_norm:
        settings["tokens"] = "after the final norm" if config.norm else "of the last block, without final norm"
    if source.data.test.label_note is not None:
        settings["labels"] = source.data.test.label_note
    if need == "labels" and source.data.missing:
        settings["classes_without_images"] = list(source.data.missing)
    if source.data.drawn:
        settings["train_images"] = source.data.train.names
    if config.groups is not None:
        settings["groups"] = config.groups
    return settings


def _imported(encoder: Encoder) -> dict[str, str]:
    """What is known of weights that come from a file or from timm rather than from a run; empty for all others."""
    report = encoder.report
    is_imported = encoder.pretrained and encoder.origin is None and report is not None
    return {"imported": str(report)} if is_imported and report and encoder.source == report.source else {}


def _warn_unused(protocols: Sequence[Protocol], config: EvalConfig) -> None:
    """Warn about changed settings that none of the protocols uses."""
    default, needs = EvalConfig(), {need for protocol in protocols for need in protocol.needs}
    used = {
        "preset": any(protocol.has_presets for protocol in protocols),
        "norm": any(protocol.takes_norm for protocol in protocols),
        "pool": any(protocol.takes_pool for protocol in protocols),
        "class_depth": "labels" in needs,
        "mask_values": "masks" in needs,
        "ignore": "masks" in needs,
        "signal": bool(needs & TARGETS.keys()),
    }
    unused = [name for name, is_used in used.items() if not is_used and getattr(config, name) != getattr(default, name)]
    unused += sorted(config.own.keys() - {protocol.name for protocol in protocols})
    if unused:
        names = ", ".join(protocol.name for protocol in protocols)
        warnings.warn(f"{', '.join(f'eval.{key}' for key in unused)}: no effect on {names}", stacklevel=3)
