"""Generate images with a run of MAR or CMAR: classes, token orders, and sampling within memory."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.config import BatchSize, Count, Seed, field_names, settings, unknown_key
from smalti.data.loader import sample_key
from smalti.data.order_files import CACHED, OrderCache, check_order, grid_order, read_orders
from smalti.errors import ConfigError, DataError, ShapeError
from smalti.functional.orders import random_orders, static_order
from smalti.functional.random import fork_keys, sample_uniform
from smalti.methods.cmar import CMAR
from smalti.methods.mar import MAR, SamplerConfig
from smalti.runs.build import load_method
from smalti.runs.folder import read_run_file

Source = Literal["bank", "class_mean", "global_mean"]
_BANK = 6  # stream of an image's random keys
_FREE_SHARE = 0.25
"""Fraction of the free memory that a batch may use."""
_MOST_AT_ONCE = 256


@settings
class GenerateConfig(SamplerConfig):
    """Settings of ``smalti generate``."""

    num: Count = 64
    """Number of images."""
    labels: tuple[int | str, ...] | int | str | None = None
    """Classes to generate in turn, by name or number, such as ``cat,dog``; ``none``: unconditional. None: all."""
    order: str | None = None
    """Order in which tokens are generated: collapse, random, halton ...; None: the order used in training."""
    order_source: Source = "bank"
    """Which order of a file is used for an image: ``bank``, that of a training image of its class; ``class_mean``;
    ``global_mean``."""
    seed: Seed = 0
    """The same seed draws the same images."""
    batch_size: BatchSize | None = None
    """Images per batch; None: as many as fit into memory."""

    @property
    def sampler(self) -> SamplerConfig:
        """Only the settings of the sampler."""
        return SamplerConfig(**{name: getattr(self, name) for name in field_names(SamplerConfig)})

    @property
    def words(self) -> str | None:
        """``labels`` as passed to :func:`choose_classes`."""
        if self.labels is None:
            return None
        return ",".join(map(str, self.labels)) if isinstance(self.labels, tuple) else str(self.labels)


@dataclass(frozen=True)
class Generator:
    """A run of MAR or CMAR that generates images."""

    method: MAR
    """The method, in eval mode on the CPU."""
    classes: tuple[str, ...]
    """Class names; numbers if the run stored none, empty if it was trained without classes."""


@dataclass(frozen=True)
class Film:
    """Intermediate steps of the first images."""

    frames: Float[Tensor, "F S C H W"]
    """F images at S of the steps; tokens not generated yet are grey."""
    drawn: tuple[int, ...]
    """Number of tokens generated up to each of the S frames."""
    ranks: Int[Tensor, "F N"]
    """Rank of each token in the order; 0 is first."""
    grid: tuple[int, int]
    """Grid of tokens, height and width."""


def load_generator(run: Path) -> Generator:
    """Load a run of MAR or CMAR from its newest checkpoint.

    Raises:
        RunError: if it isn't a run directory, or has no checkpoint.
        ConfigError: for a run of another method.
    """
    method = load_method(run)
    if not isinstance(method, MAR):
        raise ConfigError(f"{run}: is a run of {method.name}; only runs of mar and cmar generate images")
    names = read_run_file(run).get("classes") or []
    known = len(names) == method.num_classes
    return Generator(method, tuple(str(name) for name in (names if known else range(method.num_classes))))


def choose_classes(words: str | None, classes: Sequence[str], num: int) -> list[int]:
    """The class of each image: the named classes in turn.

    Args:
        words: names or numbers, comma-separated; ``none``: unconditional; None: every class in turn, or unconditional
            if there are none.
        classes: names, K of them.
        num: number of images.

    Returns:
        Class indices 0..K-1, and K for unconditional.

    Raises:
        ConfigError: for an unknown class; the closest match is suggested.
    """
    if words is None:
        chosen = list(range(len(classes))) or [0]
    else:
        chosen = [_class_number(word.strip(), classes) for word in words.split(",") if word.strip()]
        if not chosen:
            raise ConfigError("labels= is empty; write labels=cat,dog, or leave it out")
    return [chosen[place % len(chosen)] for place in range(num)]


def _class_number(word: str, classes: Sequence[str]) -> int:
    if word in classes:
        return list(classes).index(word)
    if word == "none":
        return len(classes)
    if not classes:
        raise ConfigError(f"labels={word}: this run was trained without classes; leave labels= out")
    if word.isdecimal():
        if int(word) < len(classes):
            return int(word)
        raise ConfigError(f"labels={word}: a class of 0..{len(classes) - 1} is needed")
    raise ConfigError("labels: " + unknown_key(word, classes, kind="class"))


def choose_orders(
    name: str,
    source: Source,
    cache: OrderCache | None,
    labels: Sequence[int],
    keys: Int[Tensor, " B"],
    grid: tuple[int, int],
    classes: Sequence[str],
) -> Int[Tensor, "B N"]:
    """The token order for each image.

    A file has orders of training images. A generated image uses those of its class (or of all images if unconditional):
    one at random (``bank``), or the order of their mean ranks (``class_mean``). ``global_mean``: order of the mean
    ranks of all training images. The class of a training image is its folder.

    Args:
        name: name of an order, see :data:`smalti.data.order_files.ORDERS`.
        source: how an image's order is chosen from a file.
        cache: the file of orders, if needed.
        labels: class indices, K for unconditional.
        keys: random keys of each image.
        grid: grid of tokens.
        classes: names, K of them.

    Raises:
        ConfigError: for an unknown order, or one that needs a file.
        ShapeError: for orders of another number of tokens.
        DataError: if the file doesn't have the order, or not for a class.
    """
    check_order(name)
    num_tokens = grid[0] * grid[1]
    if name == "random":
        return random_orders(keys, num_tokens)
    if name == "variance":
        raise ConfigError("order=variance needs pixels, which a generated image doesn't have yet; choose another order")
    if name not in CACHED:
        order = grid_order(name, grid)
        assert order is not None, name
        return order.expand(len(labels), -1).clone()
    if cache is None:
        raise ConfigError(f"order={name} needs a file; name it with --orders FILE (smalti rank writes it)")
    if cache.grid != grid:
        raise ShapeError(
            f"{cache.path}: orders of {cache.grid[0]}x{cache.grid[1]} patches, but this run generates "
            f"{grid[0]}x{grid[1]} tokens; rank the images at this image size and patch size"
        )
    is_train = np.array([split == "train" for split in cache.splits])
    rows = np.flatnonzero(is_train) if is_train.any() else np.arange(len(cache.images))
    found = cache.orders(name, [cache.images[row] for row in rows], [bool(cache.flips[row]) for row in rows])
    if source == "global_mean":
        return static_order(found).expand(len(labels), -1).clone()
    folders = np.array([Path(cache.images[row]).parent.name for row in rows])
    draws = sample_uniform(fork_keys(keys, _BANK), 1)[:, 0]
    result = torch.empty(len(labels), num_tokens, dtype=torch.int64)
    for label in sorted(set(labels)):
        places = [place for place, own in enumerate(labels) if own == label]
        members = found
        if label < len(classes):
            members = found[torch.from_numpy(np.flatnonzero(folders == classes[label]))]
            if not len(members):
                raise DataError(
                    f"{cache.path}: has no training image in a folder '{classes[label]}', so no order for that class; "
                    "use order_source=global_mean, or rank images in class folders"
                )
        if source == "class_mean":
            result[places] = static_order(members)
        else:
            result[places] = members[(draws[places] * len(members)).long()]
    return result


def own_order(method: MAR) -> tuple[str, str | None]:
    """The order used in training, and its file."""
    return (method.config.order, method.config.orders) if isinstance(method, CMAR) else ("random", None)


def open_cache(name: str, path: str | Path | None) -> OrderCache | None:
    """Open the file of an order; None if the order needs none."""
    return read_orders(path) if path is not None and name in CACHED else None


def fitting_batch(method: MAR, sampler: SamplerConfig, device: torch.device, num: int) -> int:
    """Batch size that uses a quarter of the free memory, by a rough estimate."""
    config, places = method.config, method.tokens.num_tokens + method.config.buffer_size
    floats = places * config.embed_dim * 16 + places**2 * config.num_heads
    floats += max(method.plan(sampler)) * config.head_width * 8
    of_one = 4 * floats * (1 if sampler.cfg == 1 else 2)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return max(1, min(num, _MOST_AT_ONCE, int(_FREE_SHARE * free / of_one)))


def draw_images(
    method: MAR,
    orders: Int[Tensor, "B N"],
    labels: Sequence[int],
    *,
    seed: int = 0,
    sampler: SamplerConfig = SamplerConfig(),
    batch_size: int | None = None,
    keep: Callable[[int, Float[Tensor, "_ C H W"]], None],
    is_kept: Callable[[int], bool] = lambda row: False,
    progress: Callable[[int, int], None] | None = None,
    film_images: int = 0,
    film_frames: int = 8,
) -> tuple[Film | None, float]:
    """Generate images in batches; if the GPU runs out of memory, the batch size is halved.

    Args:
        method: method on its device.
        orders: token order of each image.
        labels: class index of each image, K for unconditional.
        seed: the same seed, class and order give the same image, whatever the batch.
        sampler: settings of the sampler.
        batch_size: images per batch; None: as many as fit.
        keep: called with the index of a batch's first image and its images, in 0..1, on the CPU.
        is_kept: whether the image of an index exists already; a batch is skipped if all of its images exist.
        progress: called with completed and total work, in tokens.
        film_images: F, number of first images whose generation is recorded.
        film_frames: S, number of frames; fewer if there are fewer steps.

    Returns:
        The film, if requested and its images were generated in this call; and images per second.
    """
    device = next(method.parameters()).device
    num, counts = len(labels), method.plan(sampler)
    batch = fitting_batch(method, sampler, device, num) if batch_size is None else batch_size
    ends = np.cumsum(counts)
    shots = sorted({int(ends[round(place)]) for place in np.linspace(0, len(ends) - 1, min(film_frames, len(ends)))})
    shown: list[Tensor] = []
    frames: list[Tensor] = []
    started, first, drawn_now = time.perf_counter(), 0, 0
    while first < num:
        rows = range(first, min(first + batch, num))
        if all(map(is_kept, rows)):
            first = rows.stop
            continue
        keys = image_keys(seed, rows).to(device)
        shown.clear()

        def watch(drawn: int, tokens: Tensor, done: int = first, count: int = len(rows)) -> None:
            if drawn in shots and done < film_images:
                shown.append(tokens[: film_images - done].clone())
            if progress is not None:
                progress(done * int(ends[-1]) + drawn * count, num * int(ends[-1]))

        try:
            tokens = method.draw(
                orders[first : rows.stop].to(device),
                keys,
                torch.tensor([labels[row] for row in rows], device=device),
                sampler,
                watch,
            )
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch = (batch + 1) // 2
            torch.cuda.empty_cache()
            continue
        keep(first, method.tokens.decode(tokens).cpu())
        drawn_now += len(rows)
        if shown:
            frames.append(torch.stack(shown, dim=1))
        first = rows.stop
    film = _film(method, torch.cat(frames), orders[: min(film_images, num)], tuple(shots)) if frames else None
    return film, drawn_now / (time.perf_counter() - started)


def image_keys(seed: int, rows: Sequence[int]) -> Int[Tensor, " B"]:
    """Random keys of images, by index."""
    return torch.tensor([sample_key(seed, 0, row) for row in rows], dtype=torch.int64)


def _film(method: MAR, tokens: Float[Tensor, "F S N d"], orders: Tensor, drawn: tuple[int, ...]) -> Film:
    """Decode frames; tokens not generated yet are grey."""
    grid, side = method.tokens.grid, method.tokens.image_size
    ranks = orders.argsort(dim=1)
    images = method.tokens.decode(tokens.flatten(0, 1)).cpu()
    images = images.view(*tokens.shape[:2], *images.shape[1:])
    places = torch.arange(side) * torch.tensor(grid)[:, None] // side  # pixel row or column -> that of its token
    by_pixel = ranks[:, (places[0][:, None] * grid[1] + places[1]).flatten()].view(-1, 1, side, side)
    frames = torch.stack(
        [torch.where(by_pixel < count, images[:, step], 0.5) for step, count in enumerate(drawn)], dim=1
    )
    return Film(frames, drawn, ranks, grid)
