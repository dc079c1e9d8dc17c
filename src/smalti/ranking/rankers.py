"""Rank the patches of all images of a folder, original and mirrored, by scores.

Letters: B images in a batch, C channels, S side of the squares, N patches of an h x w grid, R rows (images,
mirrored ones counted separately), D width of the network that computes dependency graphs.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from smalti.data.images.folders import ImageSet
from smalti.data.images.labelled import eval_batches
from smalti.data.order_files import GEOMETRIC, OF_COLLAPSE, OrderCache, check_order, grid_order, write_orders
from smalti.data.views import Skipped
from smalti.errors import ConfigError, DataError, ShapeError
from smalti.functional import patches
from smalti.functional.graphs import coverage_order, descending, in_strength, is_degenerate, pagerank
from smalti.functional.orders import random_orders
from smalti.layers.attention import attention_modules
from smalti.models.encoder import Encoder
from smalti.ranking.unfinished import Rows, Unfinished, join

FOLLOWING = OF_COLLAPSE
"""Orders derived from the stored order ``collapse``."""
FREE = (*GEOMETRIC, "random", "fixed_random")
"""Orders that need no stored order."""
COPIES = 4
"""Copies of a batch's graphs in memory at a time: in PageRank and the greedy cover, including temporaries."""
_ACTIVATIONS = 16
"""Upper bound on activations per token and channel in a transformer forward pass, including the MLP's hidden layer."""
_MIB = 2**20


@dataclass(frozen=True)
class Ranked:
    """Orders of a batch by one rule."""

    order: Int[Tensor, "B N"]
    score: Float[Tensor, "B N"] | None = None
    """Scores that determine the order (descending), if any."""
    seconds: float = 0.0
    """Time to compute it for the batch; shared work counts for each order."""


class Ranker(ABC):
    """Base class of rankers, which order patches.

    Args:
        image_size: S.
        in_chans: C.
        grid: ``(h, w)``.
        source: description for the file.
    """

    gives: tuple[str, ...] = ("variance",)
    """Orders that :meth:`rank` can compute."""
    default: tuple[str, ...] = ("variance",)
    """Orders computed by default."""

    def __init__(self, image_size: int, in_chans: int, grid: tuple[int, int], source: str) -> None:
        self.image_size, self.in_chans, self.grid, self.source = image_size, in_chans, grid, source

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @torch.no_grad()
    def rank(self, images: Num[Tensor, "B C S S"], names: Sequence[str]) -> dict[str, Ranked]:
        """Orders of a batch.

        Args:
            images: uint8, or float in 0..1.
            names: orders among ``gives``.
        """
        found = self._rank(images, [name for name in names if name != "variance"])
        if "variance" in names:
            watch = Stopwatch()
            found["variance"] = watch.stop(rank_by_score(patch_variance(images, self.grid)))
        return found

    @abstractmethod
    def _rank(self, images: Num[Tensor, "B C S S"], names: Sequence[str]) -> dict[str, Ranked]:
        """Orders of a batch, except ``variance``."""

    def bytes_needed(self, batch_size: int) -> int:
        """Approximate memory of a batch."""
        return batch_size * self.in_chans * self.image_size**2 * 12


class PixelRanker(Ranker):
    """Orders computed from pixels only."""

    def _rank(self, images: Num[Tensor, "B C S S"], names: Sequence[str]) -> dict[str, Ranked]:
        return {}


@runtime_checkable
class HasDependency(Protocol):
    """Methods with dependency graphs: :class:`smalti.methods.comae.CoMAE`."""

    tokens: Any
    """The :class:`smalti.layers.tokens.TokenSource`."""

    def dependency(self, images: Num[Tensor, "B C S S"], chunk: int | None = None) -> Float[Tensor, "B N N"]:
        """``A[b, n, j]``: how much patch n depends on patch j; computed for ``chunk`` targets at a time."""
        ...


class GraphRanker(Ranker):
    """Orders from dependency graphs: ``collapse`` (PageRank), ``in_strength``, ``coverage``.

    Args:
        method: a CoMAE in eval mode, on the device to run on.
        width: D.
        source: see :class:`Ranker`.
        damping: damping factor of PageRank.
        chunk: targets at a time, each a forward pass of N tokens; None: as many as fit into ``PASS_MIB``.
    """

    gives = ("collapse", "in_strength", "coverage", "variance")
    default = gives
    PASS_MIB = 256

    def __init__(
        self, method: HasDependency, width: int, source: str, damping: float = 0.85, chunk: int | None = None
    ) -> None:
        tokens = method.tokens
        super().__init__(tokens.image_size, tokens.in_chans, tokens.grid, source)
        self.method, self.damping, self.width = method, damping, width
        if chunk is not None and chunk < 1:
            raise ConfigError(f"chunk={chunk}: at least 1 is needed")
        self.chunk = chunk
        self.pass_bytes = self.num_patches * width * _ACTIVATIONS * 4

    def _rank(self, images: Num[Tensor, "B C S S"], names: Sequence[str]) -> dict[str, Ranked]:
        if not names:
            return {}
        watch, found = Stopwatch(), {}
        graph = self.method.dependency(images, self.targets_at_once(len(images)))
        graph_s = watch.elapsed_s(graph.device)
        make: dict[str, Callable[[], Ranked]] = {
            "collapse": lambda: rank_by_score(pagerank(graph, self.damping)),
            "in_strength": lambda: rank_by_score(in_strength(graph)),
            "coverage": lambda: Ranked(coverage_order(graph).cpu()),
        }
        for name in names:
            watch = Stopwatch()
            found[name] = watch.stop(make[name](), graph_s)
        return found

    def targets_at_once(self, batch_size: int) -> int:
        """Forward passes computed at a time for each image of a batch."""
        return min(self.num_patches, self.chunk or max(1, self.PASS_MIB * _MIB // (self.pass_bytes * batch_size)))

    def bytes_needed(self, batch_size: int) -> int:
        """Memory of graphs, the forward passes of a chunk, and the images."""
        graphs = COPIES * batch_size * self.num_patches**2 * 4
        return (
            graphs + batch_size * self.targets_at_once(batch_size) * self.pass_bytes + super().bytes_needed(batch_size)
        )


class AttentionRanker(Ranker):
    """``attention``: attention of the class token to the patches in the last block, mean over heads.

    Args:
        encoder: in eval mode, on the device to run on.
        image_size: S; None: the encoder's own.

    Raises:
        ConfigError: if it has no class token, or its last block isn't timm's plain ``Block``.
        ShapeError: if the patch size doesn't divide the image size.
    """

    gives = ("attention", "variance")
    default = gives

    def __init__(self, encoder: Encoder, source: str, image_size: int | None = None) -> None:
        height, width = encoder.img_size
        if image_size is None and height != width:
            raise ConfigError(f"{source} takes {height}x{width} images; choose a square image_size")
        size = image_size or height
        super().__init__(size, encoder.in_chans, encoder.check_size(size, size), source)
        if not encoder.has_class_token:
            raise ConfigError(
                f"{source} has no class token, whose attention ranks the patches; choose another encoder or other "
                "--orders"
            )
        attention_modules(encoder.vit.blocks[-1:], source)
        self.encoder = encoder

    def _rank(self, images: Num[Tensor, "B C S S"], names: Sequence[str]) -> dict[str, Ranked]:
        if not names:
            return {}
        watch = Stopwatch()
        _, weights = self.encoder.encode_with_attention(self.encoder.normalize(images))
        ranked = rank_by_score(weights.mean(1))
        return {"attention": watch.stop(ranked)}

    def bytes_needed(self, batch_size: int) -> int:
        """Memory of one block and the images."""
        tokens = self.num_patches + self.encoder.num_prefix_tokens
        return batch_size * tokens * self.encoder.embed_dim * _ACTIVATIONS * 4 + super().bytes_needed(batch_size)


@dataclass(frozen=True)
class RankedImages:
    """Orders of all readable images, with or without the mirrored ones."""

    images: ImageSet = field(repr=False)
    places: tuple[int, ...] = field(repr=False)
    """``(R,)`` indices of the images in the set."""
    flips: tuple[bool, ...] = field(repr=False)
    """``(R,)``."""
    orders: Mapping[str, Int[Tensor, "R N"]] = field(repr=False)
    """int16."""
    scores: Mapping[str, Float[Tensor, "R N"]] = field(repr=False)
    """float32 scores, for orders that have them."""
    degenerate: Mapping[str, Bool[Tensor, " R"]] = field(repr=False)
    """``(R,)`` True if all patches have the same score."""
    seconds: Mapping[str, float] = field(repr=False)
    """Time to compute an order, per image; shared work counts for each order."""
    skipped: tuple[Skipped, ...]
    """Images that could not be read."""

    def write(self, path: Path, ranker: Ranker) -> None:
        """Write a file of orders for :func:`smalti.data.order_files.read_orders`."""
        names, lost = self.images.names, {one.path for one in self.skipped}
        write_orders(
            path,
            images=[names[place] for place in self.places],
            splits=[self.images.samples[place].split for place in self.places],
            flips=self.flips,
            orders=self.orders,
            scores=self.scores,
            grid=ranker.grid,
            image_size=ranker.image_size,
            root=str(self.images.root),
            source=ranker.source,
            seconds=self.seconds,
            unreadable=[name for name, path in zip(names, self.images.paths, strict=True) if path in lost],
        )


def rank_images(
    ranker: Ranker,
    images: ImageSet,
    names: Sequence[str],
    *,
    both_flips: bool = True,
    batch_size: int = 16,
    num_workers: int = 0,
    device: torch.device | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    unfinished: Unfinished | None = None,
) -> RankedImages:
    """Orders of all images, from their largest central squares, resized to the ranker's size.

    Args:
        ranker: ranker on ``device``.
        images: the images.
        names: orders among ``ranker.gives``.
        both_flips: also rank mirrored images, whose orders need not be the mirrored orders.
        batch_size: images per batch, not counting mirrored ones.
        num_workers: data-loading worker processes; 0: load in the main process.
        device: None: the CPU.
        progress: called as ``progress(what, done, total)``, counting images.
        unfinished: keeps the orders found so far, also after an interruption, and brings those of an earlier call.

    Raises:
        DataError: if no image can be read.
    """
    parts = [] if unfinished is None else list(unfinished.parts)
    start = 0 if unfinished is None else unfinished.done
    rest = replace(images, samples=images.samples[start:])
    states = (False, True) if both_flips else (False,)
    done, device = start, device or torch.device("cpu")
    if progress is not None:
        progress("images ranked", done, len(images))
    try:
        for rows in _rank_batches(ranker, rest, start, names, states, batch_size, num_workers, device):
            parts.append(rows)
            done += rows.done
            if unfinished is not None:
                unfinished.add(rows)
            if progress is not None:
                progress("images ranked", done, len(images))
    finally:
        if unfinished is not None:
            unfinished.flush()
    found = join(parts)
    if not found.places:
        first = f"; the first: {found.skipped[0][0]}: {found.skipped[0][1]}" if found.skipped else ""
        raise DataError(f"{images.root}: none of {len(images):,} images can be read{first}")
    return RankedImages(
        images,
        tuple(found.places),
        tuple(found.flips),
        found.orders,
        found.scores,
        found.degenerate,
        {name: total / len(found.places) for name, total in found.seconds.items()},
        tuple(Skipped(Path(path), reason) for path, reason in found.skipped),
    )


def _rank_batches(
    ranker: Ranker,
    images: ImageSet,
    start: int,
    names: Sequence[str],
    states: Sequence[bool],
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> Iterator[Rows]:
    """Orders of each batch of images, which begin at index ``start`` of their set."""
    if not len(images):
        return
    batches = eval_batches(images, ranker.image_size, ranker.in_chans, "centre", batch_size, num_workers)
    for pixels, found, unreadable in batches:
        of_states = []
        for flip in states if found else ():
            batch = (pixels.flip(-1) if flip else pixels).to(device)
            ranked = ranker.rank(batch, names)
            scored = {name: one.score for name, one in ranked.items() if one.score is not None}
            of_states.append(
                Rows(
                    done=0,
                    places=[start + place for place in found],
                    flips=[flip] * len(found),
                    orders={name: one.order.to("cpu", torch.int16) for name, one in ranked.items()},
                    scores={name: score.to("cpu", torch.float32) for name, score in scored.items()},
                    degenerate={name: is_degenerate(score).cpu() for name, score in scored.items()},
                    seconds={name: one.seconds for name, one in ranked.items()},
                )
            )
        skipped = [(str(one.path), one.reason) for one in unreadable]
        yield join([*of_states, Rows(done=len(found) + len(unreadable), skipped=skipped)])


def choose_names(ranker: Ranker, wanted: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which orders to compute, and which to report.

    Args:
        ranker: the ranker.
        wanted: names from the user; empty: all that the ranker gives, and those derived from them.

    Returns:
        Names to compute with the ranker; names of all orders to report, without duplicates.

    Raises:
        ConfigError: for an unknown order, or one that this ranker can't give.
    """
    if not wanted:
        follow = FOLLOWING if "collapse" in ranker.default else ()
        return ranker.default, (*ranker.default, *follow)
    for name in wanted:
        base = "collapse" if check_order(name) in FOLLOWING else name.partition(":")[0]
        if base not in ranker.gives and base not in FREE:
            needs = "an encoder with a class token" if base == "attention" else "a run of comae"
            there = ", ".join((*ranker.gives, *(FOLLOWING if "collapse" in ranker.gives else ()), *FREE))
            raise ConfigError(f"order '{name}' needs {needs}; {ranker.source} has {there}")
    named = tuple(dict.fromkeys(wanted))
    asked = ["collapse" if name in FOLLOWING else name for name in named if name.partition(":")[0] not in FREE]
    return tuple(dict.fromkeys(asked)), named


def look_up(cache: OrderCache, name: str, images: Sequence[str], flip: bool, draw: int = 0) -> Int[Tensor, "B N"]:
    """Orders of images by name: from a file, or computed if the order needs no file.

    Args:
        cache: the file of orders.
        name: name of an order.
        images: names of the images in the file.
        flip: whether the images are mirrored.
        draw: index of the draw of ``random``.

    Raises:
        DataError: as :meth:`smalti.data.order_files.OrderCache.orders`.
    """
    if name == "random":
        return random_orders(torch.arange(len(images)) + 1_000_003 * draw, cache.num_patches)
    found = None if name in cache.stored else grid_order(name, cache.grid)
    if found is not None:
        return found.expand(len(images), -1).clone()
    return cache.orders(name, images, [flip] * len(images))


def check_memory(ranker: Ranker, batch_size: int, num_rows: int, num_names: int, free: float, where: str) -> None:
    """Check that a batch fits into memory before anything is read.

    Args:
        ranker: the ranker.
        batch_size: B.
        num_rows: R; their orders are kept in main memory until the file is written.
        num_names: number of orders per row.
        free: available memory of the device in bytes.
        where: name of the device.

    Raises:
        ConfigError: if it doesn't fit; names the batch size (or chunk) that does.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: at least 1 is needed")
    kept = num_rows * ranker.num_patches * num_names * 6 if where == "cpu" else 0
    if kept > free:
        raise ConfigError(
            f"orders of {num_rows:,} rows of {ranker.num_patches} patches need {_gib(kept)}, but {_gib(free)} is free; "
            "rank fewer images at a time, or fewer orders"
        )
    needed = ranker.bytes_needed(batch_size)
    if needed <= free - kept:
        return
    fits = largest_batch(ranker, free - kept)
    what = f"graphs of {ranker.num_patches}x{ranker.num_patches} patches" if isinstance(ranker, GraphRanker) else "this"
    remedy = f"batch_size={fits} fits"
    if not fits:
        remedy = "not even batch_size=1 fits; rank at a smaller image size, or with larger patches"
        if isinstance(ranker, GraphRanker):
            without = ranker.bytes_needed(1) - ranker.targets_at_once(1) * ranker.pass_bytes
            chunk = math.floor((free - kept - without) / ranker.pass_bytes)
            if chunk >= 1:
                remedy = f"batch_size=1 chunk={chunk} fits"
    raise ConfigError(
        f"batch_size={batch_size}: {what} need about {_gib(needed)}, but {_gib(free - kept)} is free on {where}; "
        f"{remedy}"
    )


def largest_batch(ranker: Ranker, free: float) -> int:
    """The largest batch size that needs at most ``free`` bytes; 0 if not one image does."""
    low, high = 0, 1
    while ranker.bytes_needed(high) <= free and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ranker.bytes_needed(middle) <= free else (low, middle)
    return low


def patch_variance(images: Num[Tensor, "B C S S"], grid: tuple[int, int]) -> Float[Tensor, "B N"]:
    """Variance of the pixel values of each patch, over all channels, of images in 0..1.

    Raises:
        ShapeError: if the grid doesn't divide the images.
    """
    height, width = images.shape[-2:]
    if height % grid[0] or width % grid[1]:
        raise ShapeError(f"images of {height}x{width} pixels can't be divided into {grid[0]}x{grid[1]} patches")
    values = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return patches.patch_variance(values, (height // grid[0], width // grid[1]))


class Stopwatch:
    """Measures time, including pending work of the device."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def elapsed_s(self, device: torch.device) -> float:
        """Time since construction."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - self._began

    def stop(self, ranked: Ranked, before_s: float = 0.0) -> Ranked:
        """``ranked`` with the elapsed time; orders are on the CPU, so the device has finished."""
        return replace(ranked, seconds=before_s + time.perf_counter() - self._began)


def rank_by_score(scores: Tensor) -> Ranked:
    return Ranked(descending(scores).cpu(), scores.cpu())


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / _MIB:.1f} MiB"
