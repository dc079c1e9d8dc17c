"""The main job: a folder of images in, a run directory with a better encoder out."""

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from timm.models.vision_transformer import Block

from smalti.config import (
    BatchSize,
    Count,
    ImageSize,
    Seed,
    Tree,
    Workers,
    build,
    field_names,
    flatten,
    merge,
    read_yaml,
    settings,
    to_tree,
    write_yaml,
)
from smalti.data.images.decode import read_values
from smalti.data.images.folders import ImageSet, open_images, training_images
from smalti.data.images.image_set import as_text, is_text
from smalti.data.images.pixels import NO_PIXELS, PixelConfig, Range
from smalti.data.images.value_range import percentile_ranges
from smalti.data.loader import TrainLoader, UnreadableLog
from smalti.data.signals.signal_config import SignalConfig, as_read, check_window
from smalti.data.signals.signal_set import SignalSet, is_signals, open_signals, training_signals
from smalti.data.views import Views, collate
from smalti.data.workers import check_workers, default_workers, needed_mib
from smalti.errors import ConfigError, DataError, Interrupted, RunError, SmaltiError, WeightsError
from smalti.evaluation.protocol import (
    BaselineKind,
    EvalConfig,
    Result,
    determining,
    evaluate,
    find_protocol,
    fitting_protocols,
    open_sets,
    write_results,
)
from smalti.files import check_folder, is_free, remove_leftovers
from smalti.layers.pooling import PRRConfig
from smalti.layers.tokens import TokenConfig
from smalti.methods.base import Method, TokenMethod, get_method, method_names
from smalti.models.encoder import Encoder, build_encoder, encoder_from_config
from smalti.models.loading import (
    CHECKPOINTS,
    STATE_FILE,
    WEIGHTS_FILE,
    encoder_description,
    latest_checkpoint,
    load,
    names_best,
    open_encoder,
)
from smalti.models.tokens import fill_tokens, with_network
from smalti.models.weights import LoadConfig, read_tensors
from smalti.reading import reading, reason, shorten
from smalti.runs.folder import (
    CONFIG_FILE,
    RESULTS,
    RUN_FILE,
    check_same_images,
    mend_folder,
    note_end,
    write_run_file,
)
from smalti.runs.lock import locked
from smalti.runs.posttrain import COSTLESS, BeforeAfter
from smalti.runs.recipes import find_recipe
from smalti.training.checkpoint import CheckpointConfig, Checkpoints, TrainingState, usable_checkpoint
from smalti.training.interrupt import Interrupt, StopRequested, end_at_once, handled_signals
from smalti.training.launch import (
    PATIENCE,
    check_trackers,
    limit_threads,
    make_accelerator,
    num_processes,
    resolve_devices,
    resolve_precision,
    split_batch,
    under_launcher,
)
from smalti.training.logs import CSVLog, Screen, Trackers
from smalti.training.loop import Listener, LogConfig, LoopConfig
from smalti.training.loop import train as run_loop
from smalti.training.optim import OptimConfig, apply_schedules, build_optimizer, clip_gradients, peak_lr
from smalti.training.processes import launch

DEFAULT_ENCODER = "vit_small_patch16_224"
SIGNAL_ENCODER = {"name": "vit_tiny_patch16_224", "patch_size": 50, "embed_dim": 256, "depth": 8, "num_heads": 8}
"""Where the data are signals: timm's plain vision transformer with these arguments, patches in samples."""
SCALE_SAMPLE = 256
"""Images in which ``data.scale=percentiles`` looks."""
FIRST_LOOK = 20
"""Images of which one must be readable before a run is begun."""
MAY_CHANGE = ("eval", "checkpoint", "log", "devices", "micro_batch", "data.num_workers")
"""Settings that a resumed run may be given anew; all others would change what it computes."""


@settings
class DataConfig(PixelConfig):
    """What is read, and how."""

    scale: Range | tuple[Range, ...] | Literal["percentiles"] | None = None  # type: ignore[assignment]
    """Values that become 0 and 1: one pair or one a channel, such as [0, 4095] for 12 bits in 16-bit files; what lies
    outside is clipped. ``percentiles`` finds a pair a channel in 256 images, and the run keeps it. None: 0..255 of 8
    bits, 0..65535 of unsigned 16, 0..1 of floats."""

    path: str | None = None
    """A folder of images, a list file, class folders or images with masks; ``NAME=PATH`` forces a reader."""
    class_depth: Annotated[int, Field(ge=1)] | Literal["deepest"] | None = None
    """``supervised``: how many nested class folders name the class (1: the outermost), or ``deepest``: the folder of
    the image; None: there is one above each image."""
    image_size: ImageSize = 224
    """Side of the main crop in pixels, a multiple of the patch size."""
    channels: Count = 3
    """Channels of an image, 1..N; of signals as many as are read."""
    signal: SignalConfig | None = None
    """How signals are read; set where the data are some."""
    mean: tuple[float, ...] | None = None
    """Normalisation per channel, of images in 0..1; None: the encoder's own."""
    std: tuple[float, ...] | None = None
    """Likewise."""
    num_workers: Workers | None = None
    """Processes that read images; None: 0 on a CPU, up to 8 beside a GPU. Never changes the trained weights."""


@settings
class RunConfig:
    """All settings of a training run; what stands in a recipe and in ``config.yaml``."""

    method: dict[str, Any]
    """``name``, and the method's own settings."""
    data: DataConfig = DataConfig()
    """What is read."""
    encoder: str | dict[str, Any] | None = None
    """Architecture by timm's name, and ``encoder.patch_size``, ``encoder.depth`` and any other argument of timm's
    ``VisionTransformer``; None: vit_small_patch16_224, or what ``init`` brings."""
    tokens: TokenConfig | None = None
    """Of methods without an encoder, what a token is; None: the defaults."""
    init: str | None = None
    """Weights to start from: RUN | FILE.safetensors | timm:NAME | timm:NAME@FILE; None starts from random ones."""
    load: LoadConfig = LoadConfig()
    """How the weights of ``init`` are fitted."""
    steps: Count = 10_000
    """Optimiser steps."""
    batch_size: BatchSize = 64
    """Images per optimiser step, over all devices and accumulated gradients."""
    micro_batch: int | None = None
    """Images that one device takes at a time; None: ``batch_size / devices``. Gradients are accumulated until a step's
    images are seen. Changes memory and time; results change by rounding only, except for losses that couple samples."""
    seed: Seed = 0
    """Of weights, data order, augmentation and everything else random."""
    devices: int | str = "auto"
    """``auto`` (one GPU, else the CPU), ``cpu``, or a number of devices, one process each."""
    precision: str = "auto"
    """``fp32`` or ``bf16``; ``auto`` is bf16 on GPUs that have it."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile."""
    weights: str | None = None
    """Which network evaluation in training looks at: student or teacher; None: the one the method hands on."""
    pool: Literal["auto", "cls", "avg", "map", "prr"] = "auto"
    """The vector that stands for an image, in methods that learn from one, too: ``cls`` class token, ``avg`` mean
    patch, ``auto`` the class token where there is one, ``prr`` the same behind parameter-free attention among all
    tokens, ``map`` timm's attention pooling of the patches, which is trained."""
    prr: PRRConfig | None = None
    """Of ``pool=prr``: ``num_heads pre_norm post_norm include_prefix``; None: as the paper has it."""
    drop_path: float = 0.0
    """Stochastic depth of the trained network, highest rate."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedules."""
    eval: EvalConfig = EvalConfig()
    """Evaluation in training (``eval.data``, ``eval.every``); never changes the trained weights."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written; never changes the trained weights."""
    log: LogConfig = LogConfig()
    """What is written down; never changes the trained weights."""


def resolve(tree: Mapping[str, Any], where: str = "settings") -> tuple[RunConfig, Any]:
    """A run's settings and its method's own, from a tree of the user's keys over the method's defaults.

    Args:
        tree: as a recipe and the command line give it; ``method`` is a name or a mapping with ``name``.
        where: what to name in errors.

    Raises:
        ConfigError: for an unknown key or method (the nearest is named), or a value that can't be used.
    """
    chosen = tree.get("method")
    chosen = {"name": chosen} if isinstance(chosen, str) else chosen or {}
    if not isinstance(chosen, Mapping):
        raise ConfigError(f"{where}: method={shorten(repr(chosen))}: write 'method: NAME', one method")
    chosen = dict(chosen)
    if "name" not in chosen:
        raise ConfigError(f"{where}: no method is named; write smalti train METHOD, or 'method: NAME' in the recipe")
    method = get_method(str(chosen.pop("name")))
    data = tree.get("data")
    of_signals = isinstance(data, Mapping) and data.get("signal") is not None
    if of_signals and not method.takes_signals:
        raise ConfigError(
            f"{where}: {method.name} learns from images, these are signals; there is: {_signal_methods()}"
        )
    defaults = merge(method.defaults, method.posttrain_defaults) if tree.get("init") else dict(method.defaults)
    if of_signals:
        defaults = merge(defaults, {key: value for key, value in method.signal_defaults.items() if key != "method"})
        chosen = {**method.signal_defaults.get("method", {}), **chosen}
    own: Any = build(method.Config, chosen, where, group="method")
    optim = tree.get("optim")
    if isinstance(optim, Mapping) and "base_lr" in optim and "lr" not in optim:  # else the default would win over it
        defaults = merge(defaults, {"optim": {"lr": None}})
    config = build(RunConfig, merge(defaults, {**tree, "method": {"name": method.name, **to_tree(own)}}), where)
    if issubclass(method, TokenMethod):
        _check_no_encoder(config, where)
        if method.needs_start and not config.init:
            names = " or ".join(dict.fromkeys((*method.starts_from, method.name)))
            raise ConfigError(f"{where}: {method.name} fine-tunes a run of {names}; name it with --init RUN")
        given = tree.get("tokens")
        tokens = config.tokens or TokenConfig()
        tokens = with_network(tokens, dict(given) if isinstance(given, Mapping) else {}, config.data.channels)
        config = dataclasses.replace(config, tokens=tokens)
    elif config.tokens is not None:
        raise ConfigError(f"{where}: {method.name} has an encoder, tokens.* is for methods without one")
    if config.init and config.encoder:
        raise ConfigError(f"{where}: init={config.init} brings its own architecture; leave encoder= out")
    if config.load != LoadConfig() and not config.init:
        raise ConfigError(f"{where}: load.* fits the weights of --init, which is not given")
    for name in config.eval.protocols:
        find_protocol(name)
    check_trackers(config.log.trackers)
    return _as_trained(config), own


def _check_no_encoder(config: RunConfig, where: str) -> None:
    """Settings of an encoder make no sense where there is none.

    Raises:
        ConfigError: for the first of them.
    """
    name = config.method["name"]
    without = dict.fromkeys(("encoder", "weights", "prr")) | {"pool": "auto", "drop_path": 0.0, "load": LoadConfig()}
    for setting, unset in without.items():
        if getattr(config, setting) != unset:
            raise ConfigError(
                f"{where}: {setting}: {name} trains no encoder, its tokens are set by tokens.*; leave it out"
            )
    if config.eval.data or config.eval.every or config.eval.patience:
        raise ConfigError(
            f"{where}: eval.*: {name} trains no encoder that could be evaluated in training; leave it out"
        )
    if config.optim.freeze_encoder_ratio:
        raise ConfigError(f"{where}: optim.freeze_encoder_ratio: {name} trains no encoder; leave it out")


def with_start(tree: Tree) -> Tree:
    """The tree with what ``init`` fixes, where a method without an encoder starts from a run: size and channels of its
    images, tokens, and settings of the method that both have.

    Raises:
        ConfigError: if the method doesn't start from such runs, or a setting contradicts it.
        RunError: if there is no such run.
    """
    chosen = tree.get("method")
    name = chosen.get("name") if isinstance(chosen, Mapping) else chosen
    if not tree.get("init") or name not in method_names():
        return tree
    method = get_method(str(name))
    if not issubclass(method, TokenMethod):
        return tree
    run = Path(str(tree["init"]))
    if not (run / CONFIG_FILE).is_file():
        raise RunError(f"init={run}: is not a run directory; {name} starts from what --out of smalti train named")
    shared = field_names(method.Config)
    with reading(run / CONFIG_FILE, "the settings of a run", ConfigError):
        before = read_yaml(run / CONFIG_FILE)
        found = before["method"]["name"]
        allowed = dict.fromkeys((*method.starts_from, method.name))
        if found not in allowed:
            raise ConfigError(f"init={run}: is a run of {found}; {name} starts from {' or '.join(allowed)}")
        fixed: Tree = {
            "data": {key: before["data"][key] for key in ("image_size", "channels")},
            "tokens": before["tokens"],
        }
    own = {key: value for key, value in before["method"].items() if key in shared}
    given = flatten(tree)
    for key, value in flatten(fixed).items():
        if given.get(key, value) != value:
            raise ConfigError(f"{key}={given[key]}: {run} has {value}, which its weights are for; leave it out")
    return merge(
        {**fixed, "method": own}, {**tree, "method": chosen if isinstance(chosen, Mapping) else {"name": name}}
    )


def count_classes(config: RunConfig, own: Any, images: ImageSet | SignalSet | None) -> tuple[RunConfig, Any]:
    """The settings with ``method.num_classes`` as the images have them, where the method learns from labels; where it
    can do without them, of images that have them.

    Args:
        config: the run's settings.
        own: the method's.
        images: what will be read; None: nothing.

    Raises:
        DataError: if the images have no classes, or more than the settings say.
    """
    method = get_method(config.method["name"])
    has_labels = (
        isinstance(images, ImageSet)
        and bool(images.classes)
        and all(sample.label is not None for sample in images.samples)
    )
    ignored = method.takes_labels and (own.num_classes == 0 or (own.num_classes is None and not has_labels))
    if ignored or not (method.needs_labels or method.takes_labels):
        return config, own
    if images is None or isinstance(images, SignalSet):
        raise DataError(f"{method.name} learns from class labels; give --data with class folders (CLASS/image)")
    if not has_labels:
        raise DataError(
            f"{images.root}: found layout '{images.layout}', {method.name} needs class folders "
            "(CLASS/image or SPLIT/CLASS/image)"
        )
    found = len(images.classes or ())
    count = found if own.num_classes is None else own.num_classes
    if count < found:
        raise DataError(f"{images.root}: has {found} classes, method.num_classes={count}; leave it out")
    own = dataclasses.replace(own, num_classes=count)
    return dataclasses.replace(config, method={**config.method, "num_classes": count}), own


def check_start(config: RunConfig, own: Any) -> None:
    """Refuse a post-training method without weights to start from, unless ``method.from_scratch`` asks for it.

    Args:
        config: the run's settings.
        own: the method's.

    Raises:
        ConfigError: without ``init`` and ``from_scratch``, or with both.
    """
    method = get_method(config.method["name"])
    if not method.is_posttraining or bool(config.init) != own.from_scratch:
        return
    if own.from_scratch:
        raise ConfigError(f"method.from_scratch=true starts from random weights, init={config.init} does not; drop one")
    raise ConfigError(
        f"{method.name} is post-training: name the weights to start from with --init (timm:NAME@FILE, a run, ...), or "
        "set method.from_scratch=true to start from random ones"
    )


def posttrain_note(tree: Mapping[str, Any], config: RunConfig) -> str:
    """One line about the settings that a run has because it starts from weights; empty where there are none.

    Args:
        tree: the user's keys, as :func:`resolve` takes them.
        config: what it made of them.
    """
    given, used = flatten(tree), flatten(to_tree(config))
    special = flatten(get_method(config.method["name"]).posttrain_defaults) if config.init else {}
    changed = [f"{key}={used[key]}" for key, value in special.items() if key not in given and used[key] == value]
    return f"starting from weights: {' '.join(changed)}, unless you say otherwise" if changed else ""


def build_method(
    config: RunConfig, own: Any, description: Mapping[str, Any] | None = None, quiet: bool = True
) -> Method:
    """The method of a run with its encoder, on the CPU; random weights are a function of ``config.seed``.

    Args:
        config: the run's settings.
        own: the method's.
        description: of the encoder, from a checkpoint that will fill in the weights; ``init`` isn't needed then.
        quiet: don't print how many tensors of ``init`` matched.
    """
    method = get_method(config.method["name"])
    with torch.random.fork_rng(devices=[]), _building(method.name):
        torch.manual_seed(config.seed)
        if issubclass(method, TokenMethod):
            chosen = config.tokens or TokenConfig()
            tokens = method.make_tokens(chosen, own, config.data.image_size, config.data.channels)
            if chosen.path is not None and description is None and not config.init:
                fill_tokens(tokens, chosen)
            built = method(tokens, own)
            if config.init and description is None:
                built.start_from(load_method(Path(config.init)))
            return built
        encoder = starting_encoder(config, description, quiet)
        encoder.draw_positions()  # a method that wants none drops them again
        encoder.set_drop_path(config.drop_path)
        return method(encoder, own)


@contextlib.contextmanager
def _building(name: str) -> Iterator[None]:
    """What arithmetic and memory say of numbers that don't fit together, as an error about the settings.

    Raises:
        ConfigError: in place of these exceptions.
    """
    try:
        yield
    except SmaltiError:
        raise
    except (ArithmeticError, MemoryError, RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{name} can't be built with these settings ({reason(error)}); look at method.* and encoder.*"
        ) from error


def load_method(run: Path) -> Method:
    """The method of a run with the weights of its newest checkpoint, in eval mode on the CPU.

    Raises:
        RunError: if it is no run directory, or holds no checkpoint.
        WeightsError: if the checkpoint is damaged, or of another method than the run's settings say.
    """
    checkpoint = latest_checkpoint(run) if (run / CONFIG_FILE).is_file() else None
    if checkpoint is None:
        raise RunError(f"{run}: is not a run with a checkpoint; give what --out of smalti train named")
    with reading(checkpoint, "a checkpoint of this run", WeightsError):
        config, own = resolve(read_yaml(run / CONFIG_FILE), str(run / CONFIG_FILE))
        method = build_method(config, own, encoder_description(checkpoint))
        method.load_state_dict(read_tensors(checkpoint / WEIGHTS_FILE))
        return method.eval()


def starting_encoder(config: RunConfig, description: Mapping[str, Any] | None = None, quiet: bool = True) -> Encoder:
    """The encoder of a run before its first step, on the CPU: random weights from the seed, or those of ``init``.

    Args:
        config: the run's settings.
        description: of the encoder, from a checkpoint that will fill in the weights; ``init`` isn't needed then.
        quiet: don't print how many tensors of ``init`` matched.
    """
    data = config.data
    if config.init:
        encoder = (
            encoder_from_config(description) if description else open_encoder(config.init, config.load, quiet=quiet)
        )
        encoder.pretrained = True
        if not get_method(config.method["name"]).reads_field:
            encoder.tabulate_field()
        if encoder.in_chans != data.channels:
            raise ConfigError(f"init={config.init} takes {encoder.in_chans} channels, data.channels={data.channels}")
    elif data.signal is not None:
        encoder = _signal_encoder(config, data.signal)
    else:
        arguments = {"name": config.encoder} if isinstance(config.encoder, str) else dict(config.encoder or {})
        name = str(arguments.pop("name", DEFAULT_ENCODER))
        encoder = build_encoder(name, img_size=data.image_size, in_chans=data.channels, seed=config.seed, **arguments)
    if data.signal is None:
        encoder.check_size(data.image_size, data.image_size)
    elif not encoder.takes_signals or encoder.img_size[1] != data.signal.window:
        raise ConfigError(
            f"init={config.init} takes images of {encoder.img_size[0]}x{encoder.img_size[1]}, these are windows of "
            f"{data.signal.window} samples; start from an encoder of such signals, or without --init"
        )
    if data.mean or data.std:
        encoder.set_normalization(data.mean or encoder.mean, data.std or encoder.std)
    encoder.set_pool(config.pool, config.prr, fresh=True)
    return encoder


def _signal_encoder(config: RunConfig, signal: SignalConfig) -> Encoder:
    """A vision transformer over windows of signals: an image of one row, patches of one row. Raw values go in."""
    given = {"name": config.encoder} if isinstance(config.encoder, str) else dict(config.encoder or {})
    arguments = {**SIGNAL_ENCODER, **given}
    name, patch = str(arguments.pop("name")), arguments.pop("patch_size")
    length = patch[-1] if isinstance(patch, (list, tuple)) else patch
    if not isinstance(length, int) or length < 1 or (isinstance(patch, (list, tuple)) and patch[0] != 1):
        raise ConfigError(f"encoder.patch_size={patch}: of signals it is a number of samples, at least 1")
    check_window(signal, length)
    return build_encoder(
        name,
        img_size=(1, signal.window),
        in_chans=config.data.channels,
        patch_size=[1, length],
        seed=config.seed,
        mean=(0.0,),
        std=(1.0,),
        **arguments,
    )


def _signal_methods() -> str:
    return ", ".join(name for name in method_names() if get_method(name).takes_signals)


def open_data(config: RunConfig) -> ImageSet | SignalSet:
    """All images, or windows of signals, at the run's path.

    Raises:
        ConfigError, DataError: as the readers do.
    """
    path = str(config.data.path)
    if config.data.signal is None:
        images = open_images(path, class_depth=config.data.class_depth)
        return images if config.data.scale == "percentiles" else images.with_pixels(config.data.pixels)
    return open_signals(path, config.data.signal)


def open_training(config: RunConfig) -> ImageSet | SignalSet:
    """What a run learns from: the images, or windows of signals, of the train split where there are splits.

    Raises:
        ConfigError, DataError: as the readers do.
    """
    return training_part(open_data(config), config)


def training_part(data: ImageSet | SignalSet, config: RunConfig) -> ImageSet | SignalSet:
    """The train split of :func:`open_data`, or all of it where there are no splits.

    Raises:
        ConfigError, DataError: if there are splits and none is for training, or the channels are not as configured.
    """
    if isinstance(data, ImageSet):
        return training_images(data)
    signals = training_signals(data)
    if config.data.channels != len(signals.channels):
        raise ConfigError(
            f"data.channels={config.data.channels}: the signals have {len(signals.channels)} "
            f"({', '.join(signals.channels)}); leave it out, and name them with data.signal.channels=A,B"
        )
    return signals


def measure_scale(config: RunConfig, images: ImageSet | SignalSet) -> tuple[RunConfig, ImageSet | SignalSet]:
    """Settings and images with the ranges of values that ``data.scale=percentiles`` asks for, found in a sample.

    Raises:
        DataError: if no image of the sample can be read, or a channel has one value nearly everywhere.
    """
    if config.data.scale != "percentiles" or isinstance(images, SignalSet):
        return config, images
    values = []
    for place in np.linspace(0, len(images) - 1, min(len(images), SCALE_SAMPLE)).round().astype(int):
        with contextlib.suppress(DataError):
            values.append(read_values(images.paths[place], config.data.channels, config.data.max_pixels))
    data = dataclasses.replace(config.data, scale=percentile_ranges(values))
    config = _as_trained(dataclasses.replace(config, data=data))
    return config, images.with_pixels(config.data.pixels)


def _as_trained(config: RunConfig) -> RunConfig:
    """Settings with which evaluation in training decodes images as training does, unless they say otherwise."""
    if config.data.scale == "percentiles":
        return config
    known = {name: getattr(config.data, name) for name in field_names(PixelConfig)}
    given = {name: value for name in known if (value := getattr(config.eval, name)) != getattr(NO_PIXELS, name)}
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **{**known, **given}))


def with_signals(tree: Tree) -> Tree:
    """The tree with what follows from the data, where these are signals: channels by name and number; the evaluation
    reads as training does, but for the window, which is a stage's.

    Raises:
        ConfigError, DataError: if the recordings can't be read, or ``data.signal`` is given for images.
    """
    data = tree.get("data")
    if not isinstance(data, Mapping) or not data.get("path") or not is_signals(str(data["path"])):
        if isinstance(data, Mapping) and data.get("signal") is not None and data.get("path"):
            raise ConfigError(f"data.signal.* is for signals, {data.get('path')} is none; write signals=PATH if it is")
        return tree
    signal = build(SignalConfig, data.get("signal") or {}, group="data.signal")
    channels = open_signals(str(data["path"]), signal).channels
    known = to_tree(dataclasses.replace(signal, channels=channels))
    tree = merge({"data": {"channels": len(channels)}}, merge(tree, {"data": {"signal": known}}))
    evaluated = tree.get("eval")
    if isinstance(evaluated, Mapping) and evaluated.get("data"):
        tree = merge({"eval": {"signal": as_read(known)}}, tree)
    return tree


def train(
    method: str | None = None,
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    init: str | None = None,
    recipe: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Path:
    """Train an encoder on a folder of images; what ``smalti train`` does.

    Args:
        method: by name, such as ``mae``; None takes the recipe's.
        data: what ``data.path`` takes.
        out: the run directory; it must not hold anything yet.
        init: weights to start from, see :class:`RunConfig`.
        recipe: a YAML file of settings, or the name of one that comes with Smalti.
        overrides: further settings as a tree, such as ``{"steps": 100, "method": {"mask_ratio": 0.6}}``.
        quiet: show no progress.

    Returns:
        The run directory.

    Raises:
        ConfigError, DataError, WeightsError, RunError: each with one line that says what to do.
        Interrupted: after a signal; what was done is kept, and :func:`resume` continues.
    """
    tree = read_yaml(find_recipe(recipe)) if recipe else {}
    given: dict[str, Any] = {"method": {"name": method}} if method else {}
    given |= {"data": {"path": str(data)}} if data else {}
    given |= {"init": init} if init else {}
    tree = with_start(with_signals(_absolute_paths(merge(merge(tree, given), overrides or {}))))
    config, own = resolve(tree, str(recipe) if recipe else "settings")
    check_start(config, own)
    if not config.data.path:
        raise ConfigError("no images are named; give --data DIR")
    if out is None:
        raise ConfigError("no run directory is named; give --out DIR")
    run = Path(out).expanduser()
    if run.is_file():
        raise ConfigError(f"{run}: is a file; --out needs a folder that is new or empty")
    if not is_text(run.absolute()):
        raise ConfigError(f"{as_text(run)}: its path is not UTF-8, and weights can't be read from there; rename it")
    if _is_first_process():
        _check_free(run)
        check_folder(run)
    found = open_data(config)
    config, images = measure_scale(config, training_part(found, config))
    config, own = count_classes(config, own, images)
    _check_before_writing(config, own, images, quiet=under_launcher() and not _is_first_process())
    with _written_by_this_process(run):
        if _is_first_process():
            _check_free(run)  # another process may have been quicker
            remove_leftovers(run)
            if not quiet:
                print(f"data: {found.account()}", file=sys.stderr)
                if note := posttrain_note(tree, config):
                    print(note, file=sys.stderr)
            write_yaml(run / CONFIG_FILE, to_tree(config))
            write_run_file(run, images, config.init, _precision(config))
        _start(run, config, None, quiet)
    return run


def resume(run: str | Path, overrides: Mapping[str, Any] | None = None, *, quiet: bool = False) -> Path:
    """Resume an interrupted run from its newest checkpoint that can be read; what ``smalti train --resume RUN`` does.

    Args:
        run: the run directory.
        overrides: settings given anew, of those in ``MAY_CHANGE``.
        quiet: show no progress.

    Raises:
        ConfigError: if there is no such run, or a setting can't change any more.
        RunError: if another process writes into it.
        WeightsError: if it has checkpoints, none of which can be read.
        Interrupted: after a signal; what was done is kept.
    """
    run = Path(run).expanduser()
    path = run / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(
            f"{run}: is not a run directory (it has no {CONFIG_FILE}); start one with: smalti train METHOD"
        )
    before = read_yaml(path)
    overrides = overrides or {}
    for name in flatten(overrides):
        if not any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE):
            raise ConfigError(
                f"{name} can't change when a run is resumed, the weights would differ; free are {', '.join(MAY_CHANGE)}"
            )
    config, _ = resolve(merge(before, _absolute_paths(overrides)), str(path))
    _split(config)
    _check_evaluation(config)
    images = open_training(config)
    with _written_by_this_process(run):
        if _is_first_process():
            mend_folder(run)
        check_same_images(run, images)
        checkpoint, notes = usable_checkpoint(run, set_aside=_is_first_process())
        if _is_first_process():
            for note in notes:
                warnings.warn(note, stacklevel=2)
            if not (run / RUN_FILE).exists():
                write_run_file(run, images, config.init, _precision(config))
            if checkpoint is None:
                print(f"{run}: has no checkpoint yet; it starts from step 0", file=sys.stderr)
        _start(run, config, checkpoint, quiet)
    return run


def _check_free(run: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        ConfigError: naming the command that resumes it.
    """
    if not is_free(run):
        raise ConfigError(f"{run}: is not empty; choose another --out, or resume it with: smalti train --resume {run}")


def _written_by_this_process(run: Path) -> contextlib.AbstractContextManager[None]:
    """The lock of a run directory; of several processes the first one holds it."""
    return locked(run) if _is_first_process() else contextlib.nullcontext()


def _check_before_writing(config: RunConfig, own: Any, images: ImageSet | SignalSet, quiet: bool) -> None:
    """Find mistakes while there is nothing to clean up.

    Raises:
        ConfigError, DataError, ShapeError, WeightsError: the mistake.
    """
    _check_evaluation(config)
    resolve_precision(config.precision, resolve_devices(config.devices).kind)
    method = build_method(config, own, quiet=quiet)
    micro_batch, accumulate = _split(config)
    method.check_batch(micro_batch)
    if accumulate > 1 and method.couples_samples and not quiet:
        print(
            f"gradients of {accumulate} micro-batches of {micro_batch} are accumulated, but {method.name} couples the "
            f"images of a micro-batch ({method.couples_samples}): results differ from one batch of {config.batch_size}",
            file=sys.stderr,
        )
    method.bind(images, config.data.image_size)
    if config.weights is not None and config.weights not in method.networks():
        raise ConfigError(f"weights={config.weights}: {method.name} as it is set has {', '.join(method.networks())}")
    views = method.make_views(config.data.image_size)
    build_optimizer(method.param_groups(), config.optim)
    _check_freeze(method, config.optim)
    _check_pool(method, config)
    workers = _num_workers(config)
    if isinstance(images, SignalSet):  # all of them are read already
        check_workers(views(images.read(0), np.random.default_rng(0)), micro_batch, workers)
        return
    if config.eval.data and config.eval.image_size:
        method.networks()[method.export_network].check_size(config.eval.image_size, config.eval.image_size)
    trouble: DataError | None = None
    for sample in images.samples[:FIRST_LOOK]:
        try:
            view = views(sample.read(config.data.channels), np.random.default_rng(0))
            check_workers(view, micro_batch, workers, resolve_devices(config.devices).processes)
            return
        except DataError as error:
            trouble = error
    if trouble is not None:
        raise trouble


def _check_freeze(method: Method, config: OptimConfig) -> None:
    """Something must be left to learn while the encoder stays as it is.

    Raises:
        ConfigError: if there is nothing beside it.
    """
    inside = {parameter for encoder in method.networks().values() for parameter in encoder.parameters()}
    beside = any(parameter.requires_grad and parameter not in inside for parameter in method.parameters())
    if config.freeze_encoder_ratio and not beside:
        raise ConfigError(
            f"optim.freeze_encoder_ratio={config.freeze_encoder_ratio}: {method.name} trains nothing beside its "
            "encoder; leave it at 0"
        )


def _check_pool(method: Method, config: RunConfig) -> None:
    """A pooling with parameters must be read by the method's loss, or it would be handed on as it was drawn.

    Raises:
        ConfigError: if it isn't.
    """
    if not method.networks():
        return
    pool = next(iter(method.networks().values())).vit.attn_pool
    if pool is not None and any(True for _ in pool.parameters()) and not method.pools_images:
        raise ConfigError(
            f"pool={config.pool}: {method.name} learns from patches alone, so the parameters of this pooling would "
            "stay as they were drawn; choose auto, cls, avg, or prr without norms"
        )


def _start(run: Path, config: RunConfig, checkpoint: Path | None, quiet: bool) -> None:
    """Run the processes that ``devices`` asks for, or this one where a launcher has started it already.

    Raises:
        Interrupted: after a signal, with the line that says how to resume.
    """
    devices = resolve_devices(config.devices)
    if config.precision == "auto" and not quiet and _is_first_process():
        kind = "GPU" if devices.kind == "cuda" else "CPU"
        print(f"precision=auto: {_precision(config)} on this {kind}", file=sys.stderr)
    try:
        if devices.processes > 1 and not under_launcher():
            launch(_work, (run, config, checkpoint, quiet), devices.processes)
        else:
            _work(run, config, checkpoint, quiet)
    except Interrupted as end:
        kept = latest_checkpoint(run)
        where = f"; checkpoint: {kept}" if kept is not None else ""
        name = signal.Signals(end.number).name
        line = f"interrupted by {name}{where}; resume with: smalti train --resume {shlex.quote(str(run))}"
        raise Interrupted(end.number, line if _is_first_process() else "") from None


def _precision(config: RunConfig) -> str:
    """What a run computes in on this machine."""
    return resolve_precision(config.precision, resolve_devices(config.devices).kind)


def _split(config: RunConfig) -> tuple[int, int]:
    """``micro_batch`` and accumulated passes of a run on this machine, see :func:`split_batch`."""
    return split_batch(config.batch_size, config.micro_batch, num_processes(config.devices))


def _num_workers(config: RunConfig) -> int:
    """Worker processes that read images for one process of a run."""
    if config.data.num_workers is not None:
        return config.data.num_workers
    return default_workers(resolve_devices(config.devices).kind)


def _resumed(state: TrainingState, checkpoint: Path | None, processes: int, micro_batch: int) -> str:
    """Where a run resumes, and how its steps are divided now if that has changed."""
    changes = [
        f"{name} {before} -> {now}"
        for name, before, now in (
            ("processes", state.num_processes, processes),
            ("micro_batch", state.micro_batch, micro_batch),
        )
        if before not in (0, now)
    ]
    return "; ".join((str(checkpoint), *changes))


def _work(run: Path, config: RunConfig, checkpoint: Path | None, quiet: bool) -> None:
    """One process of a run.

    Raises:
        Interrupted: after a signal.
    """
    interrupt = Interrupt()
    with handled_signals(interrupt.ask, None if under_launcher() else end_at_once):
        try:
            _train(run, config, checkpoint, quiet, interrupt)
        except StopRequested as stop:
            raise Interrupted(stop.number) from None


def _train(run: Path, config: RunConfig, checkpoint: Path | None, quiet: bool, interrupt: Interrupt) -> None:
    _, own = resolve(to_tree(config))
    kind = resolve_devices("cpu" if config.devices == "cpu" else "auto").kind
    micro_batch, accumulate = _split(config)
    accelerator = make_accelerator(
        kind, resolve_precision(config.precision, kind), accumulate, config.log.trackers, run
    )
    if accelerator.num_processes > 1:
        interrupt.share(PATIENCE)
    images = open_training(config)
    description = None if checkpoint is None else encoder_description(checkpoint)
    method = build_method(config, own, description)
    method.bind(images, config.data.image_size)
    if method.fit_images and checkpoint is None and not config.init:
        method.fit(_fitting_batches(method, images, config))
    method = method.to(accelerator.device)
    limit_threads(method, micro_batch)
    if config.compile:
        for module in method.modules():
            if isinstance(module, Block):
                module.compile()
    optimizer = build_optimizer(method.param_groups(), config.optim)
    main = accelerator.is_main_process
    state: TrainingState | None = None
    if checkpoint is not None:
        state = Checkpoints(run, method, optimizer, config.checkpoint, main).restore(checkpoint)

    views = method.make_views(config.data.image_size)

    def make_batches(start: int) -> Iterator[Views]:
        return iter(
            TrainLoader(
                images,
                views,
                batch_size=micro_batch,
                seed=config.seed,
                channels=config.data.channels,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                num_workers=_num_workers(config),
                start_step=start,
                pin_memory=kind == "cuda",
            )
        )

    screen = Screen(method.name) if main and not quiet else None
    csv_log = CSVLog(run)
    listeners: tuple[Listener, ...] = ((csv_log,) if main else ()) + ((screen,) if screen else ())
    if config.log.trackers:
        accelerator.init_trackers(
            "smalti", config={name: str(value) for name, value in flatten(to_tree(config)).items()}
        )
        listeners += (Trackers(accelerator),) if main else ()
    if main and state is not None:
        csv_log.event(state.step, "resumed", _resumed(state, checkpoint, accelerator.num_processes, micro_batch))
    hook = EvaluationHook(config, run, evaluates=main, progress=interrupt.check) if config.eval.data else None
    counted = -1 if state is None else state.evaluated_step
    if hook is not None and main and counted >= 0 and hook.due(counted) and not hook.file(counted).exists():
        hook.evaluate(counted, method)  # counted already, but its file is lost
    loop = LoopConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        accumulate=accumulate,
        seed=config.seed,
        optim=config.optim,
        checkpoint=config.checkpoint,
        log=config.log,
        patience=config.eval.patience,
        evaluated_with=_evaluated_with(config),
    )
    started = time.time()
    try:
        state = run_loop(
            method,
            optimizer,
            accelerator,
            make_batches,
            loop,
            run,
            state=state,
            hooks=() if hook is None else (hook,),
            listeners=listeners,
            unreadable=UnreadableLog(run / "unreadable.csv", len(images)),
            interrupt=interrupt,
        )
    finally:
        if screen is not None:
            screen.close()
        for tracker in accelerator.trackers:
            tracker.finish()  # not end_training: it would take the processes apart, who meet once more below
    if main:
        note_end(run, started, method)
        if hook is not None and hook.before_and_after is not None:
            best = state.best_step if state.num_evaluations > 1 else None  # of one score nothing is chosen
            hook.before_and_after.conclude(state.step, best, partial(_encoder_of, run, config, own))
    accelerator.wait_for_everyone()


def _fitting_batches(method: Method, images: ImageSet | SignalSet, config: RunConfig) -> Iterator[Views]:
    """The first ``fit_images`` images of training, or all of them once; the same in every process."""
    batch_size = min(64, len(images))
    views = method.make_views(config.data.image_size)
    loader = TrainLoader(
        images, views, batch_size=batch_size, seed=config.seed, channels=config.data.channels, num_workers=0
    )
    return itertools.islice(iter(loader), max(1, min(method.fit_images, len(images)) // batch_size))


def _encoder_of(run: Path, config: RunConfig, own: Any, step: int) -> Encoder:
    """The network that evaluation looks at, as it was after a step; step 0 also where its checkpoint is gone."""
    network = config.weights or get_method(config.method["name"]).export_network
    checkpoint = run / CHECKPOINTS / f"step_{step:08d}"
    if (checkpoint / STATE_FILE).is_file() or step > 0:
        encoder = load(checkpoint, network=network, quiet=True)
    else:
        encoder = build_method(config, own).networks()[network]
        encoder.source = f"step {step} ({network})"
    return encoder.to("cpu" if config.devices == "cpu" else resolve_devices("auto").kind)


def _evaluated_with(config: RunConfig) -> str:
    """What the scores of evaluations in training depend on beside the weights, as text; empty without evaluation."""
    if not config.eval.data:
        return ""
    return json.dumps({**determining(config.eval, COSTLESS), "weights": config.weights}, sort_keys=True)


class EvaluationHook:
    """Evaluation in training: before it, every ``eval.every`` steps and after the last; of the network handed on.

    Where training starts from weights, it also keeps what the verdict of :mod:`smalti.runs.posttrain` needs.
    """

    def __init__(
        self, config: RunConfig, run: Path, evaluates: bool, progress: Callable[[str, int, int], None] | None = None
    ) -> None:
        self.config = config
        self.run = run
        self.progress = progress  # of an evaluation; it may end one by an exception
        handed_on = get_method(config.method["name"]).export_network
        self.before_and_after = (
            BeforeAfter(run, config.eval, config.weights or handed_on, handed_on, progress)
            if config.init and evaluates
            else None
        )
        self.evaluates = evaluates  # one process does; the others know when, since all read the finite check together

    def due(self, step: int) -> bool:
        """Before the first step, every ``eval.every`` steps and after the last."""
        every = self.config.eval.every
        return step in (0, self.config.steps) or (every > 0 and step % every == 0)

    def __call__(self, step: int, method: Method) -> float | None:
        """BeforeAfter; returns the headline of the first protocol, with its sign changed where lower is better."""
        if not self.evaluates:
            return None
        results = self.evaluate(step, method)
        if not results:
            return None
        metric, value = results[0].headline
        return -value if "lower is better" in results[0].units[metric] else value

    def file(self, step: int) -> Path:
        """Where the results of a step are written."""
        return self.run / RESULTS / f"step_{step:08d}.json"

    def evaluate(self, step: int, method: Method) -> list[Result]:
        """Results now, written to ``results/step_*.json``; those of step 0 are the baseline of all others."""
        network = self.config.weights or method.export_network
        encoder = method.networks()[network]
        encoder.source = f"step {step} ({network})"
        encoder.class_head = method.class_head(network)
        data = str(self.config.eval.data)
        protocols = self.config.eval.protocols or fitting_protocols(data)
        config = dataclasses.replace(self.config.eval, protocols=protocols)
        results = evaluate(encoder, f"{self.run} (step {step})", data, config, progress=self.progress)
        kind: BaselineKind | None = None
        if step == 0 and config.baseline:
            kind = "before" if self.config.init else "untrained"
        write_results(self.file(step), [dataclasses.replace(result, baseline=kind) for result in results])
        if self.before_and_after is not None:
            self.before_and_after.heard(step, results)
            if step == 0 and not self.before_and_after.knows(0):
                self.before_and_after.evaluate(0, encoder)
        return results


def _check_evaluation(config: RunConfig) -> None:
    """Find mistakes in ``eval.*`` before hours of training, not after.

    Raises:
        ConfigError, DataError: if the data can't be read or an unknown network is named.
    """
    if config.eval.data:
        open_sets(config.eval.data, config.eval)
        if config.init:
            open_sets(config.eval.data, BeforeAfter(Path(), config.eval).config)
    elif config.eval.every or config.eval.patience:
        name = "every" if config.eval.every else "patience"
        raise ConfigError(f"eval.{name}={getattr(config.eval, name)} needs labelled images; give eval.data=DIR")
    if config.eval.patience and not config.eval.every:
        raise ConfigError(f"eval.patience={config.eval.patience} counts evaluations in training; give eval.every=STEPS")
    method = get_method(config.method["name"])
    pair = ("student", "teacher")
    names = pair if method.export_network in pair else (method.export_network,)
    if config.weights is not None and config.weights not in names:
        raise ConfigError(f"weights={config.weights}: {method.name} has {', '.join(names)}")


def _is_first_process() -> bool:
    """Whether this process writes: the first of several, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def _absolute_paths(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Paths in settings so that they still hold when the run is resumed or reported from another folder."""
    result = dict(tree)
    if isinstance(result.get("init"), str):
        result["init"] = absolute(result["init"])
    for group, key in (("data", "path"), ("eval", "data"), ("method", "orders"), ("tokens", "path")):
        inner = result.get(group)
        if isinstance(inner, Mapping) and isinstance(inner.get(key), str):
            result[group] = {**inner, key: absolute(inner[key])}
    evaluated = result.get("eval")
    if isinstance(evaluated, Mapping) and isinstance(evaluated.get("orders"), (list, tuple)):
        result["eval"] = {**evaluated, "orders": [absolute(str(order)) for order in evaluated["orders"]]}
    return result


def absolute(text: str, beside: Path | None = None) -> str:
    """``PATH``, ``NAME=PATH`` or ``timm:NAME@PATH`` with the path made absolute, if there is something.

    Args:
        text: as a user gives it.
        beside: a folder in which to look, too, for what isn't there.
    """
    for mark in ("", "@" if text.startswith("timm:") else "="):
        head, found, path = text.rpartition(mark) if mark else ("", "", text)
        for folder in (Path(), *([beside] if beside is not None else [])):
            whole = folder / Path(path).expanduser()
            if (found or not mark) and (whole.exists() or names_best(whole)):
                return f"{head}{found}{whole.resolve()}"
    return text


def shared_by_workers(config: RunConfig, own: Any) -> float:
    """Shared memory in MiB that the data workers of a run need on this machine, all its processes together."""
    workers = _num_workers(config)
    if not workers:
        return 0.0
    views = build_method(config, own).make_views(config.data.image_size)
    sample = views(_noise(config), np.random.default_rng(0))
    return needed_mib(sample, _split(config)[0], workers) * resolve_devices(config.devices).processes


def _noise(config: RunConfig) -> np.ndarray:
    """An image, or a window of signals, of random numbers."""
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, config.data.channels), dtype=np.uint8)
    if config.data.signal is None:
        return noise
    window = noise.reshape(-1)[: config.data.signal.window * config.data.channels].astype(np.float32)
    return np.resize(window, (1, config.data.signal.window, config.data.channels))


def step_maker(config: RunConfig, own: Any, device: torch.device) -> tuple[Callable[[int], Callable[[], None]], float]:
    """A maker of training steps for :func:`smalti.preflight.report.measure_step`, and a checkpoint's size in MiB.

    A step reads its images from ``config.data.path``; without one it is fed noise.

    Raises:
        ConfigError, DataError, WeightsError: as :func:`train` does.
    """
    images = open_training(config) if config.data.path else None
    if images is not None:
        config, images = measure_scale(config, images)
    config, own = count_classes(config, own, images)
    precision = resolve_precision(config.precision, device.type)
    dtype = torch.bfloat16 if precision == "bf16" else None
    whole = build_method(config, own)
    trained = sum(parameter.numel() for parameter in whole.parameters() if parameter.requires_grad)
    stored = sum(tensor.numel() for tensor in whole.state_dict().values())

    def make_step(batch_size: int) -> Callable[[], None]:
        method = build_method(config, own)
        if images is not None:
            method.bind(images, config.data.image_size)
        if method.fit_images and images is not None and not config.init:
            method.fit(itertools.islice(_fitting_batches(method, images, config), 1))
        method = method.to(device).train()
        optimizer = build_optimizer(method.param_groups(), config.optim)
        views = method.make_views(config.data.image_size)
        batches: Iterator[Views]
        if images is not None:
            batches = iter(TrainLoader(images, views, batch_size=batch_size, seed=0, channels=config.data.channels))
        else:
            noise = _noise(config)
            batches = itertools.repeat(collate([views(noise, np.random.default_rng(n)) for n in range(batch_size)]))

        def step() -> None:
            batch = next(batches).to(device)
            apply_schedules(optimizer, config.optim, peak=peak_lr(config.optim, batch_size), progress=0.5)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                losses = method(batch, 0.5)
            torch.autograd.backward(torch.stack(list(losses.values())).sum())
            clip_gradients([p for p in method.parameters() if p.requires_grad], config.optim)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            method.after_step(0.5)

        return step

    return make_step, 4 * (stored + 2 * trained) / 2**20
