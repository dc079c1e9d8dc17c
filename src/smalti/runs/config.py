"""All settings of a training run, and how they are resolved from the user's keys."""

import dataclasses
import glob
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
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import as_read, is_signals, open_signals
from smalti.errors import ConfigError, RunError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocol import find_protocol
from smalti.layers.pooling import PRRConfig
from smalti.layers.tokens import TokenConfig
from smalti.methods.base import MethodConfig, get_method, method_names
from smalti.models.adaptation import FULL, parse_adapt
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
from smalti.training.parallel import Parallel

MAY_CHANGE = ("eval", "checkpoint", "log", "devices", "parallel", "micro_batch", "data.num_workers", "checkpointing")
"""Settings that may change when a run resumes; all others would change its results."""


@settings
class DataConfig(PixelConfig):
    """Training data, and how they are read."""

    scale: Range | tuple[Range, ...] | Literal["percentiles"] | None = None  # type: ignore[assignment]
    """Input range mapped to 0..1: one pair, or one per channel, such as [0, 4095] for 12-bit data in 16-bit files;
    values outside are clipped. ``percentiles`` estimates a pair per channel from 256 images and stores it with the run.
    None: 0..255 for 8-bit files, 0..65535 for unsigned 16-bit, 0..1 for floats."""

    path: PathText | None = None
    """Images: a folder, tar, zip or Parquet files, a data set of Hugging Face, a list or a table; ``NAME=PATH`` selects
    a reader."""
    class_depth: Annotated[int, Field(ge=1)] | Literal["deepest"] | None = None
    """For ``supervised``, with nested class folders: how many levels form the class name (1: the outermost only), or
    ``deepest``: the folder that holds the image. None: class folders are not nested."""
    image_size: ImageSize = 224
    """Side length of the main crop in pixels; a multiple of the patch size."""
    channels: Count = 3
    """Number of channels of the images; for signals it follows from the recordings."""
    signal: SignalConfig | None = None
    """How signals are read; filled in if the data are signals."""
    mean: tuple[float, ...] | None = None
    """Mean per channel for normalisation, of images in 0..1; None: the encoder's own."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel for normalisation, of images in 0..1; None: the encoder's own."""
    num_workers: Workers | None = None
    """Worker processes that load data; None: 0 on CPU, up to 8 with a GPU. Does not change the trained weights."""


@settings
class RunConfig:
    """All settings of a training run, as in a recipe and in ``config.yaml``."""

    method: MethodConfig
    """Name of the method (``name``) and its settings."""
    data: DataConfig = DataConfig()
    """Training data."""
    encoder: str | dict[str, Any] | None = None
    """timm name of the architecture; ``encoder.patch_size``, ``encoder.depth`` and any other argument of timm's
    ``VisionTransformer`` override it. None: the architecture of ``init``, else vit_small_patch16_224."""
    tokens: TokenConfig | None = None
    """Tokens of methods without an encoder; None: the defaults."""
    init: PathText | None = None
    """Initial weights: RUN | FILE.safetensors | timm:NAME | timm:NAME@FILE | hf:FOLDER | hf:NAME; None: random
    initialisation."""
    load: LoadConfig = LoadConfig()
    """How the weights of ``init`` are loaded."""
    steps: Count = 10_000
    """Number of optimiser steps."""
    batch_size: BatchSize = 64
    """Images per optimiser step, summed over devices and accumulation steps."""
    micro_batch: int | None = None
    """Images per forward pass on one device; gradients are accumulated over the rest of the batch. None:
    ``batch_size / devices``. Changes memory and time. Results change only by rounding, except for losses that couple
    the samples of a batch."""
    seed: Seed = 0
    """Seed of the initial weights, data order, augmentation and all other randomness."""
    devices: int | str = "auto"
    """``auto`` (one GPU, else CPU), ``cpu``, or the number of devices, with one process each."""
    parallel: Parallel = "ddp"
    """With several devices: ``ddp``, each holds the whole method; ``fsdp``, each holds a slice of parameters, gradients
    and moments (FSDP2), which takes less memory and more communication. The same results up to rounding."""
    precision: str = "auto"
    """``fp32``, ``bf16`` (autocast; weights, losses and statistics stay float32) or ``auto``: bf16 on GPUs that support
    it, else fp32."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile."""
    weights: str | None = None
    """Network that is evaluated during training: student or teacher; None: the one that the method exports."""
    pool: Literal["auto", "cls", "avg", "map", "prr"] = "auto"
    """Pooling of tokens to the image vector; also used in the loss of methods that train on image vectors. ``cls``:
    class token; ``avg``: mean of the patch tokens; ``auto``: class token if there is one, else the mean; ``prr``: as
    ``auto``, after parameter-free attention over all tokens; ``map``: timm's trainable attention pooling."""
    prr: PRRConfig | None = None
    """Settings of ``pool=prr``: ``num_heads pre_norm post_norm include_prefix``; None: those of the paper."""
    gaug: bool = False
    """Add a learned Gaussian around each patch to its attention logits (GAug of LocAtViT), in all networks, saved with
    them; refused by methods whose loss predicts positions, which it would reveal. Weights of ``init`` that have it keep
    it."""
    adapt: str = "full"
    """What of the encoder is trained, if it starts from weights (``init``): ``full``: all; ``last:N``: the last N
    blocks and the final norm; ``norms``: the layer norms; ``lora:R``: updates of rank R of all linear layers of the
    blocks, merged when the run is loaded or exported. Heads are always trained."""
    checkpointing: bool = False
    """Recompute the activations of each block in the backward pass: less memory, about a third more time, the same
    gradients."""
    drop_path: float = 0.0
    """Maximum stochastic depth rate of the trained network; the rate grows linearly with depth."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and learning rate schedule."""
    eval: EvalConfig = EvalConfig()
    """Evaluation during training (``eval.data``, ``eval.every``); does not change the trained weights."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written; does not change the trained weights."""
    log: LogConfig = LogConfig()
    """Logging; does not change the trained weights."""


def resolve(tree: Mapping[str, Any], where: str = "settings") -> RunConfig:
    """Resolve the settings of a run: the user's keys merged over the method's defaults.

    Args:
        tree: the user's keys, from recipe and command line; ``method`` is a name or a mapping with ``name``.
        where: source of the settings, for error messages.

    Raises:
        ConfigError: for an unknown key or method (the closest match is suggested), or an invalid value.
    """
    chosen = tree.get("method")
    chosen = {"name": chosen} if isinstance(chosen, str) else chosen or {}
    if not isinstance(chosen, Mapping):
        raise ConfigError(f"{where}: method={shorten(repr(chosen))}: one name is needed; write 'method: NAME'")
    chosen = dict(chosen)
    if "name" not in chosen:
        raise ConfigError(f"{where}: no method is given; write smalti train METHOD, or 'method: NAME' in the recipe")
    method = get_method(str(chosen.pop("name")))
    data = tree.get("data")
    of_signals = isinstance(data, Mapping) and data.get("signal") is not None
    if of_signals and not method.takes_signals:
        raise ConfigError(
            f"{where}: {method.name} learns from images, but the data are signals; use {_signal_methods()}"
        )
    defaults = merge(method.defaults, method.posttrain_defaults) if tree.get("init") else dict(method.defaults)
    if of_signals:
        defaults = merge(defaults, {key: value for key, value in method.signal_defaults.items() if key != "method"})
        chosen = {**method.signal_defaults.get("method", {}), **chosen}
    method_config = build(method.Config, chosen, where, group="method")
    optim = tree.get("optim")
    if (
        isinstance(optim, Mapping) and "base_lr" in optim and "lr" not in optim
    ):  # otherwise the default lr would override it
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
        raise ConfigError(f"{where}: tokens.* only applies to methods without an encoder; {method.name} has one")
    if parse_adapt(config.adapt)[0] != FULL and not config.init:
        raise ConfigError(f"adapt={config.adapt} keeps a part of trained weights as it is; name these with --init")
    if config.init and config.encoder:
        raise ConfigError(f"{where}: init={config.init} has its own architecture; leave encoder= out")
    if config.load != LoadConfig() and not config.init:
        raise ConfigError(f"{where}: load.* applies to the weights of --init; give --init, or leave it out")
    for name in config.eval.protocols:
        find_protocol(name)
    check_trackers(config.log.trackers)
    return as_trained(config)


def _check_no_encoder(config: RunConfig, where: str) -> None:
    """Refuse encoder settings for a method without an encoder.

    Raises:
        ConfigError: for the first such setting.
    """
    name = config.method.name
    without: dict[str, Any] = dict.fromkeys(("encoder", "weights", "prr"))
    without |= {"pool": "auto", "gaug": False, "adapt": "full", "checkpointing": False, "drop_path": 0.0}
    without |= {"load": LoadConfig()}
    for setting, unset in without.items():
        if getattr(config, setting) != unset:
            raise ConfigError(f"{where}: {setting}: {name} trains no encoder, only tokens.* applies; leave it out")
    if config.eval.data or config.eval.every or config.eval.patience:
        raise ConfigError(f"{where}: eval.*: {name} trains no encoder to evaluate; leave it out")
    if config.optim.freeze_encoder_ratio:
        raise ConfigError(f"{where}: optim.freeze_encoder_ratio: {name} trains no encoder; leave it out")


def with_start(tree: Tree) -> Tree:
    """Add what ``init`` fixes if a method without an encoder starts from a run: image size, channels, tokens, and the
    method settings that both methods have.

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
        raise RunError(f"init={run}: is not a run directory; {name} starts from the --out of smalti train")
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
            raise ConfigError(f"{key}={given[key]}: the weights of {run} need {value}; leave it out")
    return merge(
        {**fixed, "method": inherited}, {**tree, "method": chosen if isinstance(chosen, Mapping) else {"name": name}}
    )


def check_start(config: RunConfig) -> None:
    """Refuse a post-training method without initial weights, unless ``method.from_scratch`` is set.

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
        raise ConfigError(f"method.from_scratch=true contradicts init={config.init}; leave one out")
    raise ConfigError(
        f"{method.name} is a post-training method; name the initial weights with --init (timm:NAME@FILE, a run, ...), "
        "or set method.from_scratch=true to start from random weights"
    )


def posttrain_note(tree: Mapping[str, Any], config: RunConfig) -> str:
    """One line about the defaults that changed because the run starts from weights; empty if none did.

    Args:
        tree: the user's keys, as in :func:`resolve`.
        config: the resolved settings.
    """
    given, used = flatten(tree), flatten(to_tree(config))
    special = flatten(get_method(config.method.name).posttrain_defaults) if config.init else {}
    changed = [f"{key}={used[key]}" for key, value in special.items() if key not in given and used[key] == value]
    return f"starting from weights: {' '.join(changed)} by default" if changed else ""


def _signal_methods() -> str:
    return ", ".join(name for name in method_names() if get_method(name).takes_signals)


def as_trained(config: RunConfig) -> RunConfig:
    """Let evaluation during training decode images as training does, unless ``eval.*`` sets it otherwise."""
    if config.data.scale == "percentiles":
        return config
    known = {name: getattr(config.data, name) for name in field_names(PixelConfig)}
    given = {name: value for name in known if (value := getattr(config.eval, name)) != getattr(NO_PIXELS, name)}
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **{**known, **given}))


def with_signals(tree: Tree) -> Tree:
    """Add what follows from the data if they are signals: names and number of channels. Evaluation reads recordings as
    training does, except for the window of sleep stages, which is one stage long.

    Raises:
        ConfigError, DataError: if the recordings can't be read, or ``data.signal`` is given for images.
    """
    data = tree.get("data")
    if not isinstance(data, Mapping) or not data.get("path") or not is_signals(str(data["path"])):
        if isinstance(data, Mapping) and data.get("signal") is not None and data.get("path"):
            raise ConfigError(
                f"data.signal.* only applies to signals; leave it out, or write signals={data.get('path')}"
            )
        return tree
    signal = build(SignalConfig, data.get("signal") or {}, group="data.signal")
    channels = open_signals(str(data["path"]), signal).channels
    known = to_tree(dataclasses.replace(signal, channels=channels))
    tree = merge({"data": {"channels": len(channels)}}, merge(tree, {"data": {"signal": known}}))
    evaluated = tree.get("eval")
    if isinstance(evaluated, Mapping) and evaluated.get("data"):
        own = evaluated.get("signal")
        labels = own.get("labels") if isinstance(own, Mapping) else None
        tree = merge({"eval": {"signal": as_read(known, str(evaluated["data"]), labels)}}, tree)
    return tree


def absolute_paths(tree: Mapping[str, Any], beside: Path | None = None) -> Tree:
    """Settings of a run, or a part of them, with absolute paths, valid from any working directory.

    Args:
        tree: the user's keys, as in :func:`resolve`.
        beside: another folder to search for relative paths.
    """
    chosen = tree.get("method")
    name = chosen.get("name") if isinstance(chosen, Mapping) else chosen
    groups = {"method": get_method(str(name)).Config} if name in method_names() else {}
    return resolve_paths(tree, RunConfig, lambda text: absolute(text, beside), groups)


def absolute(text: str, beside: Path | None = None) -> str:
    """``PATH``, ``NAME=PATH``, ``timm:NAME@PATH`` or ``hf:PATH`` with the path made absolute, if it exists or is a
    pattern of files that do.

    Args:
        text: value given by the user.
        beside: another folder to search for relative paths.
    """
    if text.startswith("hf:"):
        return f"hf:{absolute(text.removeprefix('hf:'), beside)}"
    for mark in ("", "@" if text.startswith("timm:") else "="):
        head, found, path = text.rpartition(mark) if mark else ("", "", text)
        for folder in (Path(), *([beside] if beside is not None else [])):
            whole = folder / Path(path).expanduser()
            if (found or not mark) and (whole.exists() or names_best(whole) or glob.glob(str(whole))):  # noqa: PTH207
                return f"{head}{found}{whole.resolve()}"
    return text
