"""A training step of a run, to measure its time and memory before the run."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from smalti.config import build, to_tree
from smalti.data.loader import TrainLoader
from smalti.data.views import Views, collate
from smalti.data.workers import needed_mib
from smalti.methods.base import get_method
from smalti.runs.build import (
    build_method,
    count_classes,
    divide_batch,
    fitting_batches,
    measure_scale,
    num_workers,
    open_training,
)
from smalti.runs.config import RunConfig
from smalti.training.launch import (
    resolve_devices,
    resolve_precision,
)
from smalti.training.optim import build_optimizer, peak_lr
from smalti.training.step import training_step

STAND_IN_CLASSES = 1000
"""Number of classes (ImageNet's, or images of a method with a class per image) of a step measured without images."""


def shared_by_workers(config: RunConfig) -> float:
    """Shared memory in MiB that the data workers of all processes of a run need on this machine."""
    workers = num_workers(config)
    if not workers:
        return 0.0
    views = build_method(config).make_views(config.data.image_size)
    sample = views(_noise(config), np.random.default_rng(0))
    return needed_mib(sample, divide_batch(config)[0], workers) * resolve_devices(config.devices).processes


def _noise(config: RunConfig) -> np.ndarray:
    """An image, or a window of signals, filled with random numbers."""
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, config.data.channels), dtype=np.uint8)
    if config.data.signal is None:
        return noise
    window = noise.reshape(-1)[: config.data.signal.window * config.data.channels].astype(np.float32)
    return np.resize(window, (1, config.data.signal.window, config.data.channels))


def _with_classes(config: RunConfig) -> RunConfig:
    """Set :data:`STAND_IN_CLASSES` for a method that needs a number of classes or images, if there are no images."""
    method = get_method(config.method.name)
    name = "num_images" if method.needs_num_images else "num_classes"
    is_needed = method.needs_labels or method.needs_num_images
    if not is_needed or getattr(config.method, name, None) is not None:
        return config
    named = build(type(config.method), {**to_tree(config.method), name: STAND_IN_CLASSES}, group="method")
    return dataclasses.replace(config, method=named)


def step_maker(config: RunConfig, device: torch.device) -> tuple[Callable[[int], Callable[[], None]], float]:
    """Returns ``make_step`` for :func:`smalti.preflight.report.measure_step`, and the size of a checkpoint in MiB.

    A step reads its images from ``config.data.path``, or uses noise if no path is set.

    Raises:
        ConfigError, DataError, WeightsError: as :func:`train` does.
    """
    images = open_training(config) if config.data.path else None
    if images is not None:
        config, images = measure_scale(config, images)
    config = count_classes(config, images) if images is not None else _with_classes(config)
    precision = resolve_precision(config.precision, device.type)
    dtype = torch.bfloat16 if precision == "bf16" else None
    whole = build_method(config)
    trained = sum(parameter.numel() for parameter in whole.parameters() if parameter.requires_grad)
    stored = sum(tensor.numel() for tensor in whole.state_dict().values())

    def make_step(batch_size: int) -> Callable[[], None]:
        method = build_method(config)
        if images is not None:
            method.bind(images, config.data.image_size)
        if method.fit_images and images is not None and not config.init:
            method.fit(itertools.islice(fitting_batches(method, images, config), 1))
        method = method.to(device).train()
        optimizer = build_optimizer(method.param_groups(), config.optim)
        views = method.make_views(config.data.image_size)
        batches: Iterator[Views]
        if images is not None:
            batches = iter(TrainLoader(images, views, batch_size=batch_size, seed=0, channels=config.data.channels))
        else:
            noise = _noise(config)
            batch = collate([views(noise, np.random.default_rng(n)) for n in range(batch_size)])
            batch.labels = torch.arange(batch_size) % (getattr(config.method, "num_classes", None) or 1)
            batches = itertools.repeat(batch)

        def model(views: Views, progress: float) -> dict[str, Tensor]:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                return method(views, progress)

        def step() -> None:
            micro_batch = next(batches).to(device)
            peak = peak_lr(config.optim, batch_size)
            training_step(method, optimizer, [micro_batch], config.optim, peak=peak, progress=0.5, model=model)

        return step

    return make_step, 4 * (stored + 2 * trained) / 2**20
