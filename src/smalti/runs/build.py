"""Build images, encoder and method from the settings of a run."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smalti.config import (
    build,
    read_yaml,
    to_tree,
)
from smalti.data.dataset import Dataset
from smalti.data.images.decode import read_values
from smalti.data.images.folders import ImageSet, open_images
from smalti.data.images.value_range import percentile_ranges
from smalti.data.loader import TrainLoader
from smalti.data.signals.signal_config import SignalConfig, check_window
from smalti.data.signals.signal_set import open_signals
from smalti.data.views import Views
from smalti.data.workers import default_workers
from smalti.errors import ConfigError, DataError, RunError, SmaltiError, WeightsError
from smalti.layers.tokens import TokenConfig
from smalti.methods.base import EncoderMethod, Method, TokenMethod, get_method
from smalti.methods.ranker import DistilledRanker
from smalti.models.adaptation import LORA, attach_lora, freeze, parse_adapt
from smalti.models.build import build_encoder, encoder_from_config
from smalti.models.encoder import Encoder
from smalti.models.loading import (
    WEIGHTS_FILE,
    encoder_description,
    latest_checkpoint,
    open_encoder,
)
from smalti.models.tokens import fill_tokens
from smalti.models.weights import read_tensors
from smalti.reading import reading, reason
from smalti.runs.config import DataConfig, RunConfig, as_trained, resolve
from smalti.runs.folder import (
    CONFIG_FILE,
)
from smalti.training.launch import (
    num_processes,
    resolve_devices,
    resolve_precision,
    split_batch,
)

DEFAULT_ENCODER = "vit_small_patch16_224"
SIGNAL_ENCODER = {"name": "vit_tiny_patch16_224", "patch_size": 50, "embed_dim": 256, "depth": 8, "num_heads": 8}
"""For signals: arguments of timm's plain vision transformer; patch sizes are in samples."""
SCALE_SAMPLE = 256
"""Number of images from which ``data.scale=percentiles`` is estimated."""


def count_classes(config: RunConfig, images: Dataset | None) -> RunConfig:
    """Fill in ``method.num_classes`` from the images, if the method trains on labels; if labels are optional, only for
    images that have them. Fill in ``method.num_images`` if each image is a class.

    Args:
        config: the run's settings.
        images: the training images; None: no data.

    Raises:
        DataError: if the images have no classes, or more than the settings say.
    """
    method = get_method(config.method.name)
    if method.needs_num_images and images is not None and getattr(config.method, "num_images", None) is None:
        return _with_own(config, num_images=len(images))
    if not (method.needs_labels or method.takes_labels):
        return config
    wanted = getattr(config.method, "num_classes", None)
    has_labels = images is not None and bool(images.classes) and images.labels is not None
    if method.takes_labels and (wanted == 0 or (wanted is None and not has_labels)):
        return config
    if images is None or images.kind == "signals":
        raise DataError(f"{method.name} learns from class labels; set --data to class folders (CLASS/image)")
    if not has_labels:
        raise DataError(
            f"{images.root}: has layout '{images.layout}', but {method.name} needs class folders "
            "(CLASS/image or SPLIT/CLASS/image)"
        )
    found = len(images.classes or ())
    count = found if wanted is None else wanted
    if count < found:
        raise DataError(f"{images.root}: has {found} classes, but method.num_classes={count}; leave it out")
    return _with_own(config, num_classes=count)


def _with_own(config: RunConfig, **own: Any) -> RunConfig:
    """The settings with some of the method's own replaced."""
    changed = build(type(config.method), {**to_tree(config.method), **own}, group="method")
    return dataclasses.replace(config, method=changed)


def build_method(config: RunConfig, description: Mapping[str, Any] | None = None, quiet: bool = True) -> Method:
    """The method of a run with its encoder, on the CPU; ``config.seed`` determines random weights.

    Args:
        config: the run's settings.
        description: of the encoder, from a checkpoint that will fill in the weights; ``init`` isn't needed then.
        quiet: don't print how many tensors of ``init`` matched.
    """
    method = get_method(config.method.name)
    with torch.random.fork_rng(devices=[]), _building(method.name):
        torch.manual_seed(config.seed)
        if issubclass(method, TokenMethod):
            chosen = config.tokens or TokenConfig()
            tokens = method.make_tokens(chosen, config.method, config.data.image_size, config.data.channels)
            if chosen.path is not None and description is None and not config.init:
                fill_tokens(tokens, chosen)
            built = method(tokens, config.method)
            if config.init and description is None:
                built.start_from(load_method(Path(config.init)))
            return built
        assert issubclass(method, EncoderMethod), method
        encoder = starting_encoder(config, description, quiet)
        if encoder.gaug is not None and method.hides_positions:
            raise ConfigError(
                f"gaug=true: {method.name} hides positions from the network and predicts them, and the Gaussian bias "
                "reveals them; train another method, or without gaug"
            )
        encoder.draw_positions()  # methods without positions remove them later
        encoder.set_drop_path(config.drop_path)
        encoder.checkpointing = config.checkpointing
        kind, rank = parse_adapt(config.adapt)
        if kind == LORA and encoder.lora is None:
            attach_lora(encoder, rank, config.seed)
        made = method(encoder, config.method)
        for part in made.modules():
            if isinstance(part, Encoder):
                freeze(part, config.adapt)
        return made


@contextlib.contextmanager
def _building(name: str) -> Iterator[None]:
    """Convert arithmetic and memory errors from incompatible settings.

    Raises:
        ConfigError: instead of these exceptions.
    """
    try:
        yield
    except SmaltiError:
        raise
    except (ArithmeticError, MemoryError, RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{name} can't be built with these settings ({reason(error)}); check method.* and encoder.*"
        ) from error


def load_method(run: Path) -> Method:
    """The method of a run with the weights of its newest checkpoint, in eval mode on the CPU.

    Raises:
        RunError: if it isn't a run directory, or has no checkpoint.
        WeightsError: if the checkpoint is damaged, or doesn't match the method in the run's settings.
    """
    checkpoint = latest_checkpoint(run) if (run / CONFIG_FILE).is_file() else None
    if checkpoint is None:
        raise RunError(f"{run}: is not a run directory with a checkpoint; give the --out of smalti train")
    with reading(checkpoint, "a checkpoint of this run", WeightsError):
        config = resolve(read_yaml(run / CONFIG_FILE), str(run / CONFIG_FILE))
        method = build_method(config, encoder_description(checkpoint))
        method.load_state_dict(read_tensors(checkpoint / WEIGHTS_FILE))
        return method.eval()


def load_ranker(run: str | Path) -> DistilledRanker:
    """The network of a run of ``ranker``, in eval mode on the CPU.

    Raises:
        ConfigError: for a run of another method.
        RunError, WeightsError: as :func:`load_method`.
    """
    method = load_method(Path(run).expanduser())
    if not isinstance(method, DistilledRanker):
        raise ConfigError(f"ranker={run}: is a run of {method.name}; a run of ranker is needed (smalti train ranker)")
    return method


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
        if not get_method(config.method.name).reads_field:
            encoder.tabulate_field()
        if encoder.in_chans != data.channels:
            raise ConfigError(
                f"init={config.init} takes {encoder.in_chans} channels, but data.channels={data.channels}; make them "
                "equal"
            )
    else:
        encoder = new_encoder(config.encoder, data, config.seed)
    if data.signal is None:
        encoder.check_size(data.image_size, data.image_size)
    elif not encoder.takes_signals or encoder.img_size[1] != data.signal.window:
        raise ConfigError(
            f"init={config.init} takes images of {encoder.img_size[0]}x{encoder.img_size[1]}, but the data are "
            f"windows of {data.signal.window} samples; start from an encoder of such windows, or without --init"
        )
    _set_normalization(encoder, data)
    encoder.set_pool(config.pool, config.prr, fresh=True)
    if config.gaug:
        encoder.attach_gaug(encoder.check_size(*encoder.img_size), config.seed)
    return encoder


def new_encoder(encoder: str | Mapping[str, Any] | None, data: DataConfig, seed: int) -> Encoder:
    """An encoder with timm's random weights, on the CPU, for images or windows of signals as ``data`` says.

    Args:
        encoder: the setting ``encoder``.
        data: size, channels and normalisation of the images.
        seed: seed of the weights.
    """
    arguments = {"name": encoder} if isinstance(encoder, str) else dict(encoder or {})
    if data.signal is not None:
        made = _signal_encoder(arguments, data, data.signal, seed)
    else:
        name = str(arguments.pop("name", DEFAULT_ENCODER))
        made = build_encoder(name, img_size=data.image_size, in_chans=data.channels, seed=seed, **arguments)
    _set_normalization(made, data)
    return made


def _set_normalization(encoder: Encoder, data: DataConfig) -> None:
    if data.mean or data.std:
        encoder.set_normalization(data.mean or encoder.mean, data.std or encoder.std)


def _signal_encoder(given: Mapping[str, Any], data: DataConfig, signal: SignalConfig, seed: int) -> Encoder:
    """A vision transformer for windows of signals: images and patches of one row; values aren't normalised."""
    arguments = {**SIGNAL_ENCODER, **given}
    name, patch = str(arguments.pop("name")), arguments.pop("patch_size")
    length = patch[-1] if isinstance(patch, (list, tuple)) else patch
    if not isinstance(length, int) or length < 1 or (isinstance(patch, (list, tuple)) and patch[0] != 1):
        raise ConfigError(f"encoder.patch_size={patch}: a number of samples, at least 1, is needed for signals")
    check_window(signal, length)
    return build_encoder(
        name,
        img_size=(1, signal.window),
        in_chans=data.channels,
        patch_size=[1, length],
        seed=seed,
        mean=(0.0,),
        std=(1.0,),
        **arguments,
    )


def open_data(config: RunConfig) -> Dataset:
    """All images, or windows of signals, at the run's path.

    Raises:
        ConfigError, DataError: as the readers do.
    """
    path = str(config.data.path)
    if config.data.signal is None:
        images = open_images(path, class_depth=config.data.class_depth)
        return images if config.data.scale == "percentiles" else images.with_pixels(config.data.pixels)
    return open_signals(path, config.data.signal)


def open_training(config: RunConfig) -> Dataset:
    """Training data of a run: images or windows of signals, of the train split if there are splits.

    Raises:
        ConfigError, DataError: as the readers do.
    """
    return training_part(open_data(config), config)


def training_part(data: Dataset, config: RunConfig) -> Dataset:
    """The train split of :func:`open_data`, or all of it without splits.

    Raises:
        ConfigError, DataError: if there are splits but no train split, or the number of channels isn't as configured.
    """
    training = data.training()
    if training.channels is not None and config.data.channels != len(training.channels):
        raise ConfigError(
            f"data.channels={config.data.channels}: the signals have {len(training.channels)} "
            f"({', '.join(training.channels)}); leave it out, and name them with data.signal.channels=A,B"
        )
    return training


def measure_scale(config: RunConfig, images: Dataset) -> tuple[RunConfig, Dataset]:
    """Estimate the input ranges of ``data.scale=percentiles`` from a sample; returns updated settings and images.

    Raises:
        DataError: if no image of the sample can be read, or a channel is nearly constant.
    """
    if config.data.scale != "percentiles" or not isinstance(images, ImageSet):
        return config, images
    values = []
    for place in np.linspace(0, len(images) - 1, min(len(images), SCALE_SAMPLE)).round().astype(int):
        with contextlib.suppress(DataError):
            values.append(read_values(images.samples[place].path, config.data.channels, config.data.max_pixels))
    data = dataclasses.replace(config.data, scale=percentile_ranges(values))
    config = as_trained(dataclasses.replace(config, data=data))
    return config, images.with_pixels(config.data.pixels)


def chosen_precision(config: RunConfig) -> str:
    """Precision of a run on this machine: fp32 or bf16."""
    return resolve_precision(config.precision, resolve_devices(config.devices).kind)


def divide_batch(config: RunConfig) -> tuple[int, int]:
    """``micro_batch`` and accumulation steps of a run on this machine, see :func:`split_batch`."""
    return split_batch(config.batch_size, config.micro_batch, num_processes(config.devices))


def num_workers(config: RunConfig) -> int:
    """Data-loading workers per process of a run."""
    if config.data.num_workers is not None:
        return config.data.num_workers
    return default_workers(resolve_devices(config.devices).kind)


def fitting_batches(method: Method, images: Dataset, config: RunConfig) -> Iterator[Views]:
    """Batches of the first ``fit_images`` training images, or of all once; the same in every process."""
    batch_size = min(64, len(images))
    views = method.make_views(config.data.image_size)
    loader = TrainLoader(
        images, views, batch_size=batch_size, seed=config.seed, channels=config.data.channels, num_workers=0
    )
    return itertools.islice(iter(loader), max(1, min(method.fit_images, len(images)) // batch_size))
