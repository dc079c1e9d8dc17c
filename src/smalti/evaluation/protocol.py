"""The contract of an evaluation: an encoder and labelled data in, a Result out.

A protocol is a function in a file of its own, registered by name with what it needs of the data and which settings it
uses. :func:`evaluate` opens the data, computes the features that protocols share once, and evaluates a baseline beside
the encoder: the gain over the same network before training is what training was worth.
"""

import dataclasses
import difflib
import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from smalti.config import BatchSize, Count, CountFromZero, ImageSize, PathText, Seed, Workers, settings, to_tree
from smalti.data.images.folders import ClassDepth, ImageSet, open_images
from smalti.data.images.labelled import Kind, LabelledData, check_headers, draw_training, open_labelled
from smalti.data.images.pixels import PixelConfig
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import LabelledSignals, is_signals, open_labelled_signals
from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import Features, Observer, Progress, own_head
from smalti.evaluation.intervals import group_images
from smalti.evaluation.metrics import Absent
from smalti.evaluation.shown import Shown, show
from smalti.evaluation.tally import Tally
from smalti.files import write_atomically
from smalti.models.encoder import Encoder, encoder_from_config, eval_mode
from smalti.reading import reading

Need = Literal["labels", "masks", "boxes", "images", "stages"]
"""What the data must have; ``images`` are enough for what needs no labels, ``stages`` are those of signals."""
_KINDS: Mapping[Need, Kind] = {"labels": "labels", "masks": "masks", "boxes": "boxes"}
Labelled = LabelledData | LabelledSignals
Preset = Literal["small", "full", "paper"]

_FEW_NAMES = 5
SHARE = "share of 1, higher is better"
"""Unit of accuracies and IoUs."""


@settings
class EvalConfig(PixelConfig):
    """Settings of all protocols. Where a protocol doesn't heed a setting that was changed, a warning says so."""

    data: PathText | None = None
    """Labelled images: class folders, or images with masks; NAME=PATH forces a reader."""
    protocols: tuple[str, ...] = ()
    """Names of the protocols; empty takes all that fit the data."""
    split: str | None = None
    """The split to be judged on, such as val or test; None takes the data's own, or a seeded fifth."""
    every: CountFromZero = 0
    """While training: evaluate every so many steps; 0 evaluates not before the end."""
    patience: CountFromZero = 0
    """While training: stop after so many evaluations in a row without a new best; 0 never stops early."""
    image_size: ImageSize | None = None
    """Side of the images in pixels, a multiple of the patch size; None takes the preset's, else the encoder's own."""
    batch_size: BatchSize = 64
    """Images that are encoded at a time. Changes memory and time, not the numbers."""
    num_workers: Workers = 0
    """Workers that read images; 0 reads in this process. Does not change the numbers."""
    cache_mib: CountFromZero = 2048
    """Patch tokens up to this size are kept in memory; beyond it they are computed again for each epoch."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """Precision to which patch tokens are rounded, whether they are kept or computed again."""
    seed: Seed = 0
    """Of the split (where the data has none), the heads' initial weights, their order of images, and the baseline."""
    split_seed: Seed | None = None
    """Of the split alone, where the data has none, and of the draw of ``train_size``; None takes ``seed``."""
    groups: str | None = None
    """A regular expression on each evaluated image's relative path; its first group, or the whole match, names what
    the image belongs to (a video, patient or site). Intervals then resample whole groups; no score depends on it.
    None: the column ``group`` of a table of images, if there is one."""
    class_depth: Annotated[int, Field(ge=1)] | Literal["deepest"] | None = None
    """Nested class folders: how many of them name the class (1: the outermost, 2: ``a/b``), or ``deepest``: the folder
    of the image; None: there is one above each image."""
    mask_values: dict[int, int | str] | None = None
    """Masks of your own: value in the files -> class, by number or name, such as ``{0: 0, 255: 1}``; other values are
    refused. None: the value is the line in classes.txt, from 0."""
    ignore: tuple[int | str, ...] = ()
    """Masks of your own: values, or names of classes, whose pixels count for nothing; 255 is always ignored, unless
    ``mask_values`` gives it a class."""
    train_size: Annotated[float, Field(gt=0)] | None = None
    """Learn from fewer training images, drawn by the seed: a fraction below 1, or their number; None takes all."""
    baseline: bool = True
    """Also evaluate the baseline: of a run the same network untrained (or before, where it started from weights), of
    an imported encoder its random initialisation."""
    pool: Literal["auto", "cls", "avg", "map", "prr"] = "auto"
    """generation, knn, rank, linear-probe, finetune: what stands for an image: cls token, avg of the patches, prr: the
    same after attention without parameters, map: learned attention pooling, or auto: what the encoder hands on
    (linear-probe: class token, and prr or map only where the encoder hands them on; finetune: the mean patch)."""
    norm: bool = True
    """Protocols with patch tokens: take them behind the encoder's final norm, or as its last block leaves them."""
    preset: Preset = "small"
    """Sizes and conventions: small ends in minutes on a CPU; full has the published sizes and our conventions; paper
    has the published code's conventions, too, for numbers beside published ones."""
    generated: PathText | None = None
    """generation: the images to be judged, as ``--data`` takes them, or what ``smalti generate --out`` named."""
    inception: PathText | None = None
    """generation: weights of FID's Inception network, for FID, KID and inception score beside the other numbers."""
    k: Count | None = None
    """generation, knn, knn-patch, in-context, retrieval: number of neighbours; None takes the protocol's own."""
    memory_size: CountFromZero | None = None
    """knn-patch, in-context, retrieval: training patches that are kept, at most; 0 keeps all; None: the preset's."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """knn-patch, in-context: of the softmax over neighbours; None takes the protocol's own."""
    void: Literal["ignore", "class0"] | None = None
    """knn-patch, in-context, retrieval: pixels without a label in the memory count for nothing, or as class 0; None
    takes the preset's."""
    matching: Literal["direct", "hungarian"] | None = None
    """in-context: predicted classes as they are, or matched to the true ones; None: the preset's."""
    clusters: tuple[Count, ...] = ()
    """overclustering: numbers of clusters; empty: as many as classes, 300 and 500, where there are enough patches."""
    repeats: Count | None = None
    """overclustering: clusterings with seeds of their own, whose scores are averaged; None: the preset's.
    sleep-staging: fits with seeds of their own, each on subjects of its own; None: 1. generation: resamples behind
    standard errors, at least 20."""
    fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    """sleep-staging: shares of the training subjects whose labels are learned from, each anew; empty: all of them."""
    signal: SignalConfig | None = None
    """sleep-staging: how recordings are read, in windows of 30 s; None: the defaults. ``smalti evaluate RUN`` fills in
    what the run was trained with; from Python, say it here."""
    parity: bool = False
    """attention: void pixels and objects as the published code has them."""
    num_images: Count = 64
    """attention, rank, equivariance: images that are looked at where all would be too many."""
    epochs: Count | None = None
    """Heads and fine-tuning: passes over the training images; None takes the protocol's own."""
    head_batch_size: BatchSize | None = None
    """Heads and fine-tuning: images a step; None takes the protocol's own."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """linear-segmentation, finetune, segmenter, detection: highest learning rate; None takes the protocol's own (in the
    small preset of linear-segmentation: chosen on held-out training images)."""
    iters: Count | None = None
    """segmenter, detection, sleep-staging: training steps; None takes the preset's."""
    masks: bool | None = None
    """detection: also learn and judge outlines; None does so where the annotations have more than boxes."""
    frozen_blocks: CountFromZero = 0
    """detection: so many of the encoder's first blocks, and what comes before them, stay as they are."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """detection: of the products in training; auto is bf16 on GPUs that have it, else fp32."""
    augment: bool | None = None
    """linear-probe, linear-segmentation, knn-patch, in-context, retrieval: crop and alter the training images; None
    takes the preset's."""
    mask_size: ImageSize | None = None
    """linear-segmentation, overclustering, in-context: side of the masks in pixels; None takes the preset's."""
    absent: Absent | None = None
    """mIoU: a class in neither masks nor predictions counts zero, or is skipped; None: the preset's."""
    orders: tuple[PathText, ...] = ()
    """keep-curve: orders of patches by name, and files of ``smalti rank`` (.parquet), each for all orders in it. The
    first counts first; the one that the encoder learned with, random and fixed ones are always among them."""
    rates: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()
    """keep-curve: shares of patches that are dropped, rising; empty: 0, 0.05 ... 0.95 (paper: 0, 0.01 ... 0.98)."""
    speed: bool = True
    """keep-curve: also measure the time of an image at each rate on this machine; no score depends on it."""


SHARED = frozenset(
    {
        "data",
        "protocols",
        "split",
        "split_seed",
        "groups",
        "train_size",
        "every",
        "patience",
        "image_size",
        "batch_size",
        "num_workers",
        "seed",
        "baseline",
        "max_pixels",
        "scale",
    }
)
"""Settings that every protocol heeds."""


_READING: Mapping[Need, frozenset[str]] = {
    "labels": frozenset({"class_depth"}),
    "masks": frozenset({"mask_values", "ignore"}),
}
"""Settings of how labels are read."""
LATER = ("orders", "rates", "speed", "class_depth", "mask_values", "ignore", "max_pixels", "scale")
"""Settings that older results don't know: as long as they are at their defaults, the old results are the same."""


def determining(config: EvalConfig, costless: Collection[str]) -> dict[str, Any]:
    """Plain values of the settings that determine scores, by which results are found again.

    Args:
        config: the settings.
        costless: names of those that change no score.
    """
    plain, default = to_tree(config), to_tree(EvalConfig())
    return {
        name: value
        for name, value in plain.items()
        if name not in costless and not (name in LATER and value == default[name])
    }


BaselineKind = Literal["untrained", "before", "random-init"]
BASELINE_LABELS: Mapping[BaselineKind, str] = {
    "untrained": "untrained",
    "before": "before",
    "random-init": "random init",
}
"""How tables and pages name a baseline: the same network before its first step, where that is random (``untrained``)
or brought by ``init`` (``before``), or timm's random initialisation of an imported encoder."""


@dataclass(frozen=True)
class Baseline:
    """What the scores of an encoder are compared with."""

    kind: BaselineKind
    make: Callable[[], Encoder]
    """Builds the encoder; called once it is needed."""

    @property
    def label(self) -> str:
        """As tables and pages name it."""
        return BASELINE_LABELS[self.kind]


@dataclass(frozen=True)
class Result:
    """What one protocol found about one encoder on one data set; the same object for CLI, report and comparison."""

    protocol: str
    """Name of the protocol, as the command line spells it."""
    encoder: str
    """The encoder as the user named it (``runs/a``, ``random:vit_tiny_patch16_224``)."""
    data: str
    """The data set as the user named it."""
    metrics: Mapping[str, float]
    """Name -> value; the first is the headline. Scores lie in 0..1."""
    units: Mapping[str, str]
    """Metric name -> unit and direction, such as ``share, higher is better``."""
    settings: Mapping[str, Any]
    """Everything that determined the numbers: preset, split, sizes, seeds, conventions, counts."""
    per_class: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Metric name -> class name -> value; NaN where a class does not occur."""
    details: "Details | None" = field(default=None, compare=False, repr=False)
    """What stands behind the numbers, image by image; not part of the JSON."""
    baseline: BaselineKind | None = None
    """Of the scores of a baseline, which kind it is; None: scores of the encoder that was asked about."""
    intervals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Metric name -> ``low`` and ``high`` of its interval; where a baseline stands beside it also ``difference``,
    ``difference_low`` and ``difference_high``, paired. Metrics that are no sum over images have none. Filled by
    :func:`smalti.evaluate`; ``settings["intervals"]`` says what was resampled."""

    @property
    def headline(self) -> tuple[str, float]:
        """Name and value of the first metric."""
        return next(iter(self.metrics.items()))

    @property
    def is_baseline(self) -> bool:
        """Whether this is the baseline of the encoder that was asked about."""
        return self.baseline is not None

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes None, as JSON has none."""
        plain = dataclasses.asdict(dataclasses.replace(self, details=None))
        del plain["details"]
        return _plain(plain)


@dataclass(frozen=True)
class Boxes:
    """Objects in one image, as pages draw them."""

    boxes: np.ndarray
    """``(n, 4)`` x0 y0 x1 y1 as shares of the image's width and height."""
    labels: np.ndarray
    """``(n,)`` class of each."""
    scores: np.ndarray
    """``(n,)`` in 0..1; of true objects 1, of crowds 0."""


@dataclass(frozen=True)
class Details:
    """What stands behind the numbers of a result."""

    images: tuple[str, ...]
    """Test images, relative to their data set; the n of the tallies."""
    classes: tuple[str, ...]
    tallies: Mapping[str, Tally]
    """Metric name -> what each test image contributed; metrics that have no such form are left out."""
    confusion: np.ndarray | None = None
    """``(G, G)`` int64 pixels or images, ground truth down, prediction across."""
    predictions: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Place of a test image -> ``(M, M)`` class of each pixel, of the few images that are shown."""
    found: Mapping[int, tuple[Boxes, Boxes]] = field(default_factory=dict)
    """Place of a test image -> true objects and those that were found, of the few images that are shown."""
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Name -> numbers for figures: of each step, where the name begins with ``loss``; else of each layer, first to
    last."""
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Caption -> ``(H, W, 3)`` uint8, as pages show it."""
    shown: Shown | None = None
    """Pictures, masks and patch tokens of the images of ``predictions``; where :func:`evaluate` was asked for them."""
    groups: tuple[str, ...] = ()
    """What each test image belongs to, where a table of the data says so."""


class Scores(NamedTuple):
    """What a protocol hands back; :func:`evaluate` makes a :class:`Result` of it."""

    metrics: dict[str, float]
    """Name -> value, the headline first."""
    settings: dict[str, Any]
    """What determined the numbers, beyond what all protocols share."""
    per_class: dict[str, dict[str, float]]
    """Metric name -> class name -> value."""
    units: Mapping[str, str] = {}
    """Units of metrics that are not :data:`SHARE`."""
    tallies: Mapping[str, Tally] = {}
    """See :class:`Details`."""
    confusion: np.ndarray | None = None
    """See :class:`Details`."""
    predictions: Mapping[int, np.ndarray] = {}
    """See :class:`Details`; for the places in ``features.shown``."""
    curves: Mapping[str, Sequence[float]] = {}
    """See :class:`Details`."""
    found: Mapping[int, tuple[Boxes, Boxes]] = {}
    """See :class:`Details`; for the places in ``features.shown``."""
    pictures: Mapping[str, np.ndarray] = {}
    """See :class:`Details`."""


@dataclass(frozen=True)
class Protocol:
    """An entry of the registry."""

    name: str
    need: Need
    """What the data must have."""
    heeds: frozenset[str]
    """Settings that it heeds, beside :data:`SHARED`."""
    run: Callable[[Features, EvalConfig], Scores]
    summary: str
    """One line for help texts."""
    by_default: bool = True
    """Whether it runs where no protocol is named and the data fits."""
    observer: Callable[[EvalConfig], Observer] | None = None
    """Makes what watches the encoder while test images pass through it, for whom tokens are not enough."""
    prefers: tuple[Need, ...] = ()
    """What it takes where the data has it, though ``need`` is enough: it then says more, or shares a pass."""
    has_baseline: bool = True
    """Whether the baseline is evaluated, too; not where the encoder is the measure rather than what is measured."""
    check: Callable[[EvalConfig], None] | None = None
    """Finds mistakes in the settings before there is an encoder."""


_REGISTRY: dict[str, Protocol] = {}


def register_protocol(
    name: str,
    *,
    need: Need,
    heeds: Sequence[str] = (),
    by_default: bool = True,
    observer: Callable[[EvalConfig], Observer] | None = None,
    prefers: tuple[Need, ...] = (),
    has_baseline: bool = True,
    check: Callable[[EvalConfig], None] | None = None,
) -> Callable[[Callable[[Features, EvalConfig], Scores]], Callable[[Features, EvalConfig], Scores]]:
    """Decorator that makes a function a protocol; the first line of its docstring is the summary.

    Args:
        name: as the command line spells it.
        need: what the data must have.
        heeds: fields of :class:`EvalConfig` that it heeds, beside :data:`SHARED`.
        by_default: whether it runs where no protocol is named and the data fits.
        observer: makes what watches the encoder while test images pass through it; ``features.observed(name, size)``.
        prefers: what it takes where the data has it, though ``need`` is enough.
        has_baseline: whether the baseline is evaluated, too.
        check: finds mistakes in the settings before there is an encoder.
    """
    unknown = set(heeds) - {item.name for item in dataclasses.fields(EvalConfig)}
    assert name not in _REGISTRY and not unknown, (name, unknown)

    def register(run: Callable[[Features, EvalConfig], Scores]) -> Callable[[Features, EvalConfig], Scores]:
        summary = (run.__doc__ or "").strip().splitlines()[0]
        heeded = SHARED.union(heeds, *(_READING.get(source, ()) for source in (need, *prefers)))
        _REGISTRY[name] = Protocol(name, need, heeded, run, summary, by_default, observer, prefers, has_baseline, check)
        return run

    return register


def protocol_names() -> tuple[str, ...]:
    """Names of the registered protocols, in alphabetical order."""
    return tuple(sorted(_REGISTRY))


def find_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ConfigError: if there is none, with the nearest name.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    have = ", ".join(protocol_names())
    near = difflib.get_close_matches(name, _REGISTRY, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"there are: {have}"
    raise ConfigError(f"no protocol '{name}'; {hint}")


def fitting_protocols(data: str, class_depth: ClassDepth | None = None) -> tuple[str, ...]:
    """Names of the protocols that the layout of the data allows and that end in minutes, in alphabetical order.

    Data with neither labels nor masks get those that need none.
    """
    protocols = [_REGISTRY[name] for name in protocol_names()]
    if is_signals(data):
        return tuple(protocol.name for protocol in protocols if protocol.need == "stages")
    has = _has(open_images(data, class_depth=class_depth)) or {"images"}
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
    """Evaluate an encoder with the protocols of ``config``, and its baseline beside it.

    The encoder comes back as it was: each submodule in its own train or eval mode, weights untouched, and no global
    random state is drawn from.

    Args:
        encoder: on the device where it shall run.
        name: of the encoder in the results.
        data: labelled images, as in ``EvalConfig.data``, which is not read here.
        config: settings of all protocols.
        baseline: what the scores are compared with; None: the encoder alone. ``smalti.evaluate`` finds it.
        progress: called as ``progress(what, done, total)`` from time to time.
        figures: also keep what pages show of a few images, in ``details.shown``.

    Returns:
        One result per protocol in the order of ``config.protocols``, each followed by that of the baseline, if there
        is one, with its kind in ``baseline``.

    Raises:
        ConfigError: for an unknown protocol, or a setting that can't be used.
        DataError: if the data lacks what a protocol needs.
        ShapeError: if the patch size does not divide the image size, or the encoder wants other channels.
    """
    protocols = [
        find_protocol(protocol) for protocol in config.protocols or fitting_protocols(data, config.class_depth)
    ]
    _warn_unheeded(protocols, config)
    sets = open_sets(data, config)
    for need, labelled in sets.items():
        if need == "masks" and isinstance(labelled, LabelledData):
            check_headers(labelled.train)
            check_headers(labelled.test)
    compared = [protocol for protocol in protocols if protocol.has_baseline]
    other: Encoder | None = None
    if config.baseline and compared and baseline is not None:
        other = baseline.make().to(next(encoder.parameters()).device)
    results = _evaluate_encoder(encoder, name, data, protocols, sets, config, progress, figures, other)
    beside: dict[str, Result] = {}
    if other is not None and baseline is not None:
        label = f"{name} ({baseline.label})"
        found = _evaluate_encoder(other, label, data, compared, sets, config, progress, figures, encoder)
        beside = {result.protocol: dataclasses.replace(result, baseline=baseline.kind) for result in found}
    return [one for result in results for one in (result, beside.get(result.protocol)) if one is not None]


def open_sets(data: str, config: EvalConfig) -> dict[Need, Labelled]:
    """The labelled images that the protocols of ``config`` need; also finds mistakes before there is an encoder.

    Raises:
        ConfigError: for an unknown protocol.
        DataError: if the data lacks what a protocol needs.
    """
    protocols = [
        find_protocol(protocol) for protocol in config.protocols or fitting_protocols(data, config.class_depth)
    ]
    of_signals = is_signals(data)
    for protocol in protocols:
        if protocol.check is not None:
            protocol.check(config)
        if (protocol.need == "stages") != of_signals:
            wanted, there = ("signals", "images") if protocol.need == "stages" else ("images", "signals")
            raise DataError(
                f"{data}: protocol {protocol.name} needs {wanted}, these are {there}"
                + ("; signals=PATH forces them to be read as such" if not of_signals else "")
            )
    if of_signals:
        if config.train_size is not None:
            raise ConfigError("eval.train_size is for images; of signals, eval.fractions draws shares of the subjects")
        split_seed = config.seed if config.split_seed is None else config.split_seed
        signal = config.signal or SignalConfig()
        signals = open_labelled_signals(data, signal, split=config.split, seed=split_seed)
        if config.groups is not None:
            group_images(signals.test.names, config.groups)
        return {"stages": signals}
    images = (
        open_images(data, class_depth=config.class_depth) if any(protocol.prefers for protocol in protocols) else None
    )
    # without a train split or class names, what is only preferred can't be opened
    has = _has(images) if images and images.classes and (not images.splits or "train" in images.splits) else ()
    needs = dict.fromkeys(_source(protocol, has) for protocol in protocols)
    seed = config.seed if config.split_seed is None else config.split_seed
    sets: dict[Need, LabelledData] = {
        need: open_unlabelled(data, split=config.split)
        if need == "images"
        else open_labelled(
            data,
            split=config.split,
            seed=seed,
            need=_KINDS[need],
            class_depth=config.class_depth,
            mask_values=config.mask_values,
            ignore=config.ignore,
        )
        for need in needs
    }
    sets = {need: labelled.with_pixels(config.pixels) for need, labelled in sets.items()}
    for need, labelled in sets.items():
        for called, images in (("train images", labelled.train), (labelled.evaluated, labelled.test))[
            need == "images" :
        ]:
            if not len(images):
                raise DataError(f"{data}: no {called}; an evaluation learns from train and is about another split")
    if config.groups is not None:
        for labelled in sets.values():
            group_images(labelled.test.names, config.groups)
    if config.train_size is not None:
        for need in sets.keys() - {"images"}:
            sets[need] = draw_training(sets[need], config.train_size, seed)
    return {**sets}


def _has(images: ImageSet) -> set[Need]:
    """What there is beyond images."""
    has: set[Need] = set()
    if any(sample.label is not None for sample in images.samples):
        has.add("labels")
    if any(sample.mask is not None or sample.instances is not None for sample in images.samples):
        has.add("masks")
    return has


def _source(protocol: Protocol, has: Collection[Need]) -> Need:
    """Which data a protocol takes, of what there is."""
    return next((need for need in protocol.prefers if need in has), protocol.need)


def open_unlabelled(data: str, split: str | None = None) -> LabelledData:
    """Images for protocols that need no labels: a split (val or test where there is one), or all of them."""
    images = open_images(data)
    held_out = [name for name in ("val", "test") if name in images.splits]
    name = split or (held_out[0] if held_out else None)
    judged = images.subset(name) if name else images
    nothing = dataclasses.replace(images, samples=())
    note = f"no labels needed: {name or 'all images'} ({len(judged)})"
    return LabelledData(nothing, judged, (), note, split=name or "")


def random_baseline(encoder: Encoder, seed: int) -> Baseline:
    """The baseline of an imported encoder: its architecture with timm's random initialisation."""
    return Baseline("random-init", partial(random_init, encoder, seed))


def random_init(encoder: Encoder, seed: int) -> Encoder:
    """An encoder of the same architecture and normalisation with timm's random weights, on the same device."""
    shape = {key: value for key, value in encoder.config().items() if key not in ("fixed_positions", "position_field")}
    made = encoder_from_config(shape, seed)
    head = encoder.class_head
    if head is not None:  # no classes: only the order of patches in which both are asked
        made.class_head = head._replace(weight=head.weight[:0], bias=head.bias[:0])
    return made.to(next(encoder.parameters()).device)


def describe_result(result: Result) -> str:
    """What must be known to read the numbers of a result: how many images of which split, their size, the preset, and
    what was left out."""
    told, parts = result.settings, list[str]()
    if (number := told.get("num_test")) is not None:
        looked_at = told.get("num_images")
        few = f"{looked_at} of " if looked_at is not None and looked_at < number else ""
        parts.append(f"{few}{number} {told.get('evaluated', 'images')}")
    if (size := told.get("image_size")) is not None:
        parts.append(f"{size} px")
    if told.get("preset") is not None:
        parts.append(f"preset {told['preset']}")
    if told.get("keep_curve"):
        parts.append(f"order {told['order']}")
    if told.get("clusters"):
        parts.append(f"{told['num_patches']} patches")
    line = ", ".join(parts)
    if left_out := _left_out(told):
        line += f"{'; ' if line else ''}left out: {', '.join(left_out)}"
    return line


def _left_out(told: Mapping[str, Any]) -> list[str]:
    unreadable = told.get("num_unreadable", 0)
    evaluated = told.get("num_unreadable_evaluated", unreadable)
    clusters, missing = told.get("clusters_left_out") or (), told.get("classes_without_images") or ()
    names = ", ".join(missing[:_FEW_NAMES]) + (", ..." if len(missing) > _FEW_NAMES else "")
    return [
        *([f"{evaluated} unreadable"] if evaluated else []),
        *([f"{unreadable - evaluated} unreadable in train"] if unreadable > evaluated else []),
        *([f"{told['num_unlabelled']} without a label"] if told.get("num_unlabelled") else []),
        *([f"K = {', '.join(map(str, clusters))} (too few patches)"] if clusters else []),
        *([f"{len(missing)} of {told['num_classes']} classes, which have no such images ({names})"] if missing else []),
    ]


def results_json(results: list[Result]) -> str:
    """``{"results": [...]}`` as text."""
    return json.dumps({"results": [result.to_json() for result in results]}, indent=2, ensure_ascii=False) + "\n"


def write_results(path: Path, results: list[Result]) -> None:
    """Write results as JSON, whole file or none."""
    write_atomically(path, results_json(results))


def read_results(path: Path) -> list[Result]:
    """Results that :func:`write_results` wrote.

    Raises:
        DataError: if the file isn't there or isn't of that form.
    """
    with reading(path, "a file of results"):
        return [_result(row) for row in json.loads(path.read_bytes())["results"]]


def _result(row: Mapping[str, Any]) -> Result:
    """A result from its row in JSON; null is NaN again. Raises ValueError where a value has another type."""
    texts = [row["protocol"], row["encoder"], row["data"], *row["units"].values()]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"a text is needed, not {wrong[0]!r}")
    if not row["metrics"] or not isinstance(row["settings"], dict):
        raise ValueError("metrics and settings are needed")
    if row.get("baseline") not in (None, *BASELINE_LABELS):
        raise ValueError(f"baseline={row['baseline']!r} is of no known kind")
    groups = {
        key: {name: _numbers(values) for name, values in row.get(key, {}).items()} for key in ("per_class", "intervals")
    }
    return Result(**{**row, "metrics": _numbers(row["metrics"]), **groups})


def _evaluate_encoder(
    encoder: Encoder,
    name: str,
    data: str,
    protocols: Sequence[Protocol],
    sets: Mapping[Need, Labelled],
    config: EvalConfig,
    progress: Progress | None,
    figures: bool,
    beside: Encoder | None,
) -> list[Result]:
    """One result a protocol; features are computed once for all of them. Own heads are used only where ``beside``, the
    encoder that this one is compared with, has one, too."""
    results = []
    with eval_mode(encoder):
        features = {
            need: Features(
                encoder,
                labelled,
                batch_size=config.batch_size,
                num_workers=config.num_workers,
                cache_dtype=config.cache_dtype,
                cache_mib=config.cache_mib,
                norm=config.norm,
                progress=progress,
                observers={
                    protocol.name: protocol.observer(config)
                    for protocol in protocols
                    if protocol.observer is not None and _source(protocol, sets) == need
                },
                own_heads=beside is None or own_head(beside, labelled.classes) is not None,
            )
            for need, labelled in sets.items()
        }
        for protocol in protocols:
            need = _source(protocol, sets)
            source = features[need]
            scores = protocol.run(source, config)
            shared = {
                "architecture": encoder.name,
                "weights": encoder.source or "as given",
                "fitted": [] if encoder.report is None else [*encoder.report.resampled, *encoder.report.notes],
                "pos_resampling": encoder.pos_resampling._asdict(),
                "split": sets[need].note,
                "evaluated": source.evaluated,
                "num_train": len(source.data.train),
                "num_test": len(source.data.test),
                "num_unreadable": len(source.skipped),
                "num_unreadable_evaluated": len(source.skipped.keys() & set(map(str, source.data.test.paths))),
                "num_classes": len(source.data.classes),
                "layout": source.data.test.layout,
                "seed": config.seed,
            }
            if encoder.position_field is not None:
                shared["position_field"] = encoder.position_field.config()
            if "norm" in protocol.heeds:
                shared["tokens"] = "behind the final norm" if config.norm else "of the last block, without final norm"
            if source.data.test.label_note is not None:
                shared["labels"] = source.data.test.label_note
            if need == "labels" and source.data.missing:
                shared["classes_without_images"] = list(source.data.missing)
            if source.data.drawn:
                shared["train_images"] = source.data.train.names
            if config.groups is not None:
                shared["groups"] = config.groups
            results.append(
                Result(
                    protocol=protocol.name,
                    encoder=name,
                    data=data,
                    metrics=scores.metrics,
                    units={**dict.fromkeys(scores.metrics, SHARE), **scores.units},
                    settings={**shared, **scores.settings},
                    per_class=scores.per_class,
                    details=Details(
                        images=source.names,
                        groups=_table_groups(source.data),
                        classes=source.data.classes,
                        tallies=scores.tallies,
                        confusion=scores.confusion,
                        predictions=scores.predictions,
                        found=scores.found,
                        curves=scores.curves,
                        pictures=scores.pictures,
                        shown=source.once("shown", partial(show, source, config.image_size))
                        if figures and need != "stages"
                        else None,
                    ),
                )
            )
    return results


def _warn_unheeded(protocols: Sequence[Protocol], config: EvalConfig) -> None:
    """One line about settings that were changed and that none of the protocols heeds."""
    heeded = frozenset[str]().union(*(protocol.heeds for protocol in protocols))
    default = EvalConfig()
    idle = [
        item.name
        for item in dataclasses.fields(EvalConfig)
        if item.name not in heeded and getattr(config, item.name) != getattr(default, item.name)
    ]
    if idle:
        names = ", ".join(protocol.name for protocol in protocols)
        keys = ", ".join(f"eval.{key}" for key in idle)
        warnings.warn(f"{keys}: no effect on {names}", stacklevel=3)


def _table_groups(data: Labelled) -> tuple[str, ...]:
    """The groups of the evaluated images by their table, an image without one by itself; empty where no table has any,
    or all images are in one."""
    if isinstance(data, LabelledSignals):
        return ()
    groups = tuple(sample.group or str(sample.path) for sample in data.test.samples)
    is_known = any(sample.group is not None for sample in data.test.samples)
    return groups if is_known and len(set(groups)) > 1 else ()


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    """JSON's null is NaN again."""
    return {name: float("nan") if value is None else float(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    return str(value) if isinstance(value, Path) else value
