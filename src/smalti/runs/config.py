"""What a run is: all settings of a training run, and how they follow from a user's keys."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from smalti.config import (
    BatchSize,
    Count,
    ImageSize,
    PathText,
    Seed,
    Tree,
    Workers,
    build,
    field_names,
    flatten,
    merge,
    read_yaml,
    resolve_paths,
    settings,
    to_tree,
)
from smalti.data.images.pixels import NO_PIXELS, PixelConfig, Range
from smalti.data.signals.signal_config import SignalConfig, as_read
from smalti.data.signals.signal_set import is_signals, open_signals
from smalti.errors import ConfigError, RunError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocol import find_protocol
from smalti.layers.pooling import PRRConfig
from smalti.layers.tokens import TokenConfig
from smalti.methods.base import MethodConfig, get_method, method_names
from smalti.models.loading import (
    names_best,
)
from smalti.models.tokens import with_network
from smalti.models.weights import LoadConfig
from smalti.reading import reading, shorten
from smalti.runs.folder import (
    CONFIG_FILE,
)
from smalti.training.checkpoint import CheckpointConfig
from smalti.training.launch import (
    check_trackers,
)
from smalti.training.loop import LogConfig
from smalti.training.optim import OptimConfig

MAY_CHANGE = ("eval", "checkpoint", "log", "devices", "micro_batch", "data.num_workers")
"""Settings that a resumed run may be given anew; all others would change what it computes."""


@settings
class DataConfig(PixelConfig):
    """What is read, and how."""

    scale: Range | tuple[Range, ...] | Literal["percentiles"] | None = None  # type: ignore[assignment]
    """Values that become 0 and 1: one pair or one a channel, such as [0, 4095] for 12 bits in 16-bit files; what lies
    outside is clipped. ``percentiles`` finds a pair a channel in 256 images, and the run keeps it. None: 0..255 of 8
    bits, 0..65535 of unsigned 16, 0..1 of floats."""

    path: PathText | None = None
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

    method: MethodConfig
    """``name``, and the method's own settings."""
    data: DataConfig = DataConfig()
    """What is read."""
    encoder: str | dict[str, Any] | None = None
    """Architecture by timm's name, and ``encoder.patch_size``, ``encoder.depth`` and any other argument of timm's
    ``VisionTransformer``; None: vit_small_patch16_224, or what ``init`` brings."""
    tokens: TokenConfig | None = None
    """Of methods without an encoder, what a token is; None: the defaults."""
    init: PathText | None = None
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


def resolve(tree: Mapping[str, Any], where: str = "settings") -> RunConfig:
    """The settings of a run, from a tree of the user's keys over the method's defaults.

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
    method_config = build(method.Config, chosen, where, group="method")
    optim = tree.get("optim")
    if isinstance(optim, Mapping) and "base_lr" in optim and "lr" not in optim:  # else the default would win over it
        defaults = merge(defaults, {"optim": {"lr": None}})
    config = build(RunConfig, {**merge(defaults, tree), "method": method_config}, where)
    if not method.has_encoder:
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
    return as_trained(config)


def _check_no_encoder(config: RunConfig, where: str) -> None:
    """Settings of an encoder make no sense where there is none.

    Raises:
        ConfigError: for the first of them.
    """
    name = config.method.name
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
    if method.has_encoder:
        return tree
    run = Path(str(tree["init"]))
    if not (run / CONFIG_FILE).is_file():
        raise RunError(f"init={run}: is not a run directory; {name} starts from what --out of smalti train named")
    shared = [key for key in field_names(method.Config) if key != "name"]
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
    inherited = {key: value for key, value in before["method"].items() if key in shared}
    given = flatten(tree)
    for key, value in flatten(fixed).items():
        if given.get(key, value) != value:
            raise ConfigError(f"{key}={given[key]}: {run} has {value}, which its weights are for; leave it out")
    return merge(
        {**fixed, "method": inherited}, {**tree, "method": chosen if isinstance(chosen, Mapping) else {"name": name}}
    )


def check_start(config: RunConfig) -> None:
    """Refuse a post-training method without weights to start from, unless ``method.from_scratch`` asks for it.

    Args:
        config: the run's settings.

    Raises:
        ConfigError: without ``init`` and ``from_scratch``, or with both.
    """
    method = get_method(config.method.name)
    if not method.is_posttraining:
        return
    from_scratch = bool(getattr(config.method, "from_scratch", False))
    if bool(config.init) != from_scratch:
        return
    if from_scratch:
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
    special = flatten(get_method(config.method.name).posttrain_defaults) if config.init else {}
    changed = [f"{key}={used[key]}" for key, value in special.items() if key not in given and used[key] == value]
    return f"starting from weights: {' '.join(changed)}, unless you say otherwise" if changed else ""


def _signal_methods() -> str:
    return ", ".join(name for name in method_names() if get_method(name).takes_signals)


def as_trained(config: RunConfig) -> RunConfig:
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


def absolute_paths(tree: Mapping[str, Any], beside: Path | None = None) -> Tree:
    """Settings of a run, or a part of them, with absolute paths: they hold from any working directory.

    Args:
        tree: as :func:`resolve` takes it.
        beside: a folder in which to look, too, for what isn't there.
    """
    chosen = tree.get("method")
    name = chosen.get("name") if isinstance(chosen, Mapping) else chosen
    groups = {"method": get_method(str(name)).Config} if name in method_names() else {}
    return resolve_paths(tree, RunConfig, lambda text: absolute(text, beside), groups)


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
