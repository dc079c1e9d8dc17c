"""Orders of the patches of a set of images as one Parquet file: a row for each image and each of its flip states.

``order[..., 0]`` is the most important patch, an index in raster order. An order of the mirrored image is a row of its
own, since what finds orders need not give the mirrored order. Letters: N patches, M images, R rows, B asked for.

A file has the columns ``image`` (relative to the data, with ``/``), ``split`` (or null), ``flip``, a column of N int16
for each order, named as below, and optionally ``NAME_score`` of N float32; its metadata has, under ``smalti``, the rest
of what :class:`OrderCache` knows as JSON.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.data.dataset import Dataset
from smalti.data.images.image_set import SPLITS, as_text
from smalti.data.views import Views
from smalti.errors import ConfigError, DataError, ShapeError
from smalti.files import write_atomically
from smalti.functional import orders as geometry
from smalti.functional.graphs import ranks_of
from smalti.functional.transfer import move
from smalti.reading import reading, shorten

GEOMETRIC = ("raster", "spiral", "centre_out", "border_in", "halton")
"""Orders of the grid alone."""
OF_COLLAPSE = ("collapse_reversed", "collapse_static", "collapse_shuffled")
"""Orders that follow from those of ``collapse`` in a file."""
DISTILLED = "distilled"
"""Order that a run of ``ranker`` predicts."""
FOUND = ("collapse", "in_strength", "coverage", "attention", DISTILLED)
"""Orders of each image that a trained network found."""
STATIC = tuple(f"{name}_static" for name in FOUND)
"""One order for all images: by the mean rank of each patch position in an order of :data:`FOUND`."""
CACHED = tuple(dict.fromkeys((*FOUND, *OF_COLLAPSE, *STATIC)))
"""Orders that need a file."""
ORDERS = (*CACHED, "random", "fixed_random", *GEOMETRIC, "variance")
"""Names of orders, the same everywhere; ``fixed_random:3`` is ``fixed_random`` from another seed. ``random`` is drawn
again for each image and step, ``variance`` depends on the pixels."""
_STATIC = "_static"
_VERSION = 1
_CHUNK = 4096  # images at a time
_SHUFFLE_SEED = 0
_RESERVED = ("image", "split", "flip")


def static_name(name: str) -> str:
    """Name of the static order of an order."""
    return name + _STATIC


def check_order(name: str) -> str:
    """The name itself, if there is such an order.

    Raises:
        ConfigError: if there is none; all names are listed.
    """
    base, colon, seed = name.partition(":")
    if base not in ORDERS or (colon and not (base == "fixed_random" and seed.isdecimal())):
        raise ConfigError(f"there is no order '{name}'; there are {', '.join(ORDERS)} (and fixed_random:SEED)")
    return name


def grid_order(name: str, grid: tuple[int, int]) -> Int[Tensor, " N"] | None:
    """The one order for all images that a name and a grid give; None for a name that needs more than those."""
    base, _, seed = name.partition(":")
    if base == "fixed_random":
        return geometry.fixed_random(grid[0] * grid[1], int(seed or 0))
    make = {
        "raster": geometry.raster,
        "spiral": geometry.spiral,
        "centre_out": geometry.centre_out,
        "border_in": geometry.border_in,
        "halton": geometry.halton,
    }.get(base)
    return None if make is None else make(grid)


@dataclass(frozen=True)
class OrderCache:
    """Orders of patches of many images, as :func:`read_orders` found them."""

    path: Path
    """The file."""
    grid: tuple[int, int]
    """Patches down and across."""
    image_size: int
    """Side in pixels of the squares that were ranked."""
    root: str
    """Where the images lay."""
    source: str
    """What made the orders, in words."""
    images: tuple[str, ...] = field(repr=False)
    """``R`` names of images."""
    splits: tuple[str | None, ...] = field(repr=False)
    """``R`` splits."""
    flips: np.ndarray = field(repr=False)
    """``(R,)`` bool."""
    stored: Mapping[str, Int[Tensor, "R N"]] = field(repr=False)
    """Orders by name, int16."""
    scores: Mapping[str, Float[Tensor, "R N"]] = field(repr=False)
    """Scores behind some of them, float32."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What finding an order took where the file was made, for an image; of those of which it is known."""
    unreadable: frozenset[str] = field(default=frozenset(), repr=False)
    """Names of images that could not be read then, and so have no order."""

    @property
    def names(self) -> tuple[str, ...]:
        """Available orders: those in the file and those derived from them."""
        derived = (*(OF_COLLAPSE if "collapse" in self.stored else ()), *map(static_name, self.stored))
        return tuple(dict.fromkeys((*self.stored, *(name for name in derived if name in CACHED))))

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    def orders(self, name: str, images: Sequence[str], flips: Sequence[bool]) -> Int[Tensor, "B N"]:
        """Orders of some images.

        Args:
            name: one of ``names``.
            images: ``B`` names, as :attr:`smalti.data.images.image_set.ImageSet.names` has them.
            flips: ``B``, whether each is mirrored.

        Returns:
            int64.

        Raises:
            DataError: if the file lacks the order, an image, or an image's flip state.
        """
        self._check_name(name)
        rows = self._rows_of(images, flips)
        if name in STATIC:
            return self.static_of(name.removesuffix(_STATIC)).expand(len(rows), -1).clone()
        if name == "collapse_shuffled":
            rows = self._others[rows]
        base = "collapse" if name in OF_COLLAPSE else name
        found = self.stored[base][torch.from_numpy(rows)].long()
        return found.flip(1) if name == "collapse_reversed" else found

    def table(self, name: str, images: Sequence[str], flips: bool = True) -> Int[Tensor, "M F N"]:
        """Orders of some images as they are and, if ``flips``, mirrored; used in each training step.

        Returns:
            int16; ``table[i, 1]`` is the order of the mirrored image i. Images that could not be read when the file was
            made have 0..N-1: training replaces them.

        Raises:
            DataError: as :meth:`orders`.
        """
        there = [place for place, image in enumerate(images) if as_text(image) not in self.unreadable]
        table = torch.arange(self.num_patches, dtype=torch.int16).repeat(len(images), 1 + flips, 1)
        for state in range(1 + flips):
            found = self.orders(name, [images[place] for place in there], [bool(state)] * len(there))
            table[there, state] = found.short()
        return table

    def scores_of(self, name: str, images: Sequence[str], flips: Sequence[bool]) -> Float[Tensor, "B N"]:
        """The scores behind orders of some images, for an order that has them.

        Raises:
            DataError: as :meth:`orders`.
        """
        self._check_name(name)
        return self.scores[name][torch.from_numpy(self._rows_of(images, flips))]

    def static_of(self, name: str) -> Int[Tensor, " N"]:
        """Patches by their mean rank in a stored order over the images of the train split, in all flip states; over all
        images if there is no train split.

        Raises:
            DataError: if the file lacks the order.
        """
        self._check_name(name)
        if name not in self._statics:
            is_train = np.array([split == "train" for split in self.splits])
            rows = np.flatnonzero(is_train) if is_train.any() else np.arange(len(self.images))
            self._statics[name] = geometry.static_order(self.stored[name][torch.from_numpy(rows)].long())
        return self._statics[name]

    @cached_property
    def _statics(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def _place(self) -> dict[tuple[str, bool], int]:
        return {(image, bool(flip)): row for row, (image, flip) in enumerate(zip(self.images, self.flips, strict=True))}

    @cached_property
    def _others(self) -> np.ndarray:
        """``(R,)``: the row of another image of the same split in the same flip state. One random cycle through all of
        a split's images, so that none gets its own order and each order is used once."""
        others = np.full(len(self.images), -1)
        rng = np.random.default_rng(_SHUFFLE_SEED)
        members: dict[str | None, dict[str, None]] = {}
        for image, split in zip(self.images, self.splits, strict=True):
            members.setdefault(split, {})[image] = None
        for split, names in members.items():
            if len(names) < 2:
                raise DataError(f"{self.path}: split '{split}' has one image; collapse_shuffled needs another")
            cycle = [list(names)[place] for place in rng.permutation(len(names))]
            for image, other in zip(cycle, cycle[1:] + cycle[:1], strict=True):
                for flip in (False, True):
                    row = self._place.get((image, flip))
                    if row is not None:
                        others[row] = self._rows_of([other], [flip])[0]
        return others

    def _check_name(self, name: str) -> None:
        if name not in self.names:
            raise DataError(f"{self.path}: holds no order '{name}'; it can give {', '.join(self.names)}")

    def _rows_of(self, images: Sequence[str], flips: Sequence[bool]) -> np.ndarray:
        rows = np.empty(len(images), dtype=np.int64)
        for place, (image, flip) in enumerate(zip(images, flips, strict=True)):
            row = self._place.get((as_text(image), bool(flip)))
            if row is None:
                raise DataError(self._lacks(as_text(image), bool(flip)))
            rows[place] = row
        return rows

    def _lacks(self, image: str, flip: bool) -> str:
        if (image, not flip) in self._place:
            state = "mirrored" if flip else "unmirrored"
            return f"{self.path}: has no orders of {state} images ({image}, say); rank again with both flip states"
        return f"{self.path}: has no order of {image}; it was made from {self.root}: rank the images in use"


def check_fits(cache: OrderCache, images: Dataset, grid: tuple[int, int], flips_needed: bool) -> None:
    """Refuse a file of other images, another grid, or without the flip states that are needed.

    Raises:
        ShapeError: for another grid.
        DataError: if an image, or its flip state, isn't in the file.
    """
    if cache.grid != grid:
        raise ShapeError(
            f"{cache.path}: orders of {cache.grid[0]}x{cache.grid[1]} patches, the images have {grid[0]}x{grid[1]}; "
            "rank them at this image size and patch size"
        )
    names = [name for name in map(as_text, images.names) if name not in cache.unreadable]
    there = sum((name, False) in cache._place or (name, True) in cache._place for name in names)
    if there < len(names):
        raise DataError(
            f"{cache.path}: has orders of {there:,} of the {len(names):,} images of {images.root}; it was made from "
            f"{cache.root}: rank the images in use"
        )
    for flip in (False, True) if flips_needed else (False,):
        cache._rows_of(names, [flip] * len(names))


class TrainingOrders:
    """The order of each training image's patches under one name, wherever it comes from.

    Args:
        name: one of ``ORDERS`` but ``variance``, which is of pixels.
        path: the file of ``smalti rank``, for names in ``CACHED``.

    Raises:
        ConfigError: if there is no such order, or it needs a file and none is named.
    """

    def __init__(self, name: str, path: str | None) -> None:
        self.name = check_order(name)
        self.path = path
        self.looks_up = self.name in CACHED
        """Whether the orders are in the file."""
        if self.looks_up and path is None:
            raise ConfigError(
                f"method.order={name} is found by a network: give its file as method.orders=FILE "
                "(smalti rank RUN --data DIR --out FILE), or an order that needs none (random, halton)"
            )
        self._table = torch.empty(0, 2, 0, dtype=torch.int16)  # in no buffer: it is about the data, not learned

    def bind(self, images: Dataset, grid: tuple[int, int], flips: bool) -> None:
        """Read the orders of the images; with ``flips``, of mirrored ones, too.

        Raises:
            DataError, ShapeError: if the file is about others, or lacks a flip state.
        """
        if images.kind == "signals":
            raise DataError("orders are of an image's patches, these are signals")
        if self.looks_up:
            assert self.path is not None
            cache = read_orders(self.path)
            check_fits(cache, images, grid, flips)
            self._table = cache.table(self.name, images.names, flips=flips)

    def mean_ranks(self, grid: tuple[int, int]) -> Float[Tensor, " N"]:
        """Mean rank of each patch position over all images and flip states."""
        if not self.looks_up:
            order = grid_order(self.name, grid)
            assert order is not None, self.name
            return ranks_of(order).float()
        assert self._table.shape[-1], "bind() comes first"
        total = torch.zeros(self._table.shape[-1], dtype=torch.float64)
        for start in range(0, len(self._table), _CHUNK):
            part = self._table[start : start + _CHUNK]
            total += ranks_of(part.flatten(0, 1).long()).double().sum(0)
        return (total / (self._table.shape[0] * self._table.shape[1])).float()

    def of(self, views: Views, grid: tuple[int, int]) -> Int[Tensor, "B N"]:
        """The orders of a batch; ``random`` is drawn from the keys of its samples.

        Raises:
            ShapeError: if those that were read are of another grid.
        """
        num_patches = grid[0] * grid[1]
        if self.looks_up:
            assert len(self._table), "bind() comes first"
            if self._table.shape[-1] != num_patches:
                raise ShapeError(f"orders of {self._table.shape[-1]} patches, the images have {num_patches}")
            self._table = move(self._table, views.index.device)
            return self._table[views.index, views.flips.long()].long()
        if self.name == "random":
            return geometry.random_orders(views.keys, num_patches)
        order = grid_order(self.name, grid)
        assert order is not None, self.name
        return move(order, views.keys.device).expand(views.batch_size, -1)


def write_orders(
    path: Path,
    *,
    images: Sequence[str],
    splits: Sequence[str | None],
    flips: Sequence[bool],
    orders: Mapping[str, Int[Tensor, "R N"]],
    scores: Mapping[str, Float[Tensor, "R N"]] | None = None,
    grid: tuple[int, int],
    image_size: int,
    root: str,
    source: str,
    seconds: Mapping[str, float] | None = None,
    unreadable: Sequence[str] = (),
) -> None:
    """Write a file for :func:`read_orders`, atomically.

    Args:
        path: ends in ``.parquet``.
        images: names relative to the data, a row each.
        splits: ``train``, ``val``, ``test`` or None, a row each.
        flips: a row each.
        orders: by name, permutations of 0..N-1.
        scores: by the same names.
        grid: patches down and across.
        image_size: side in pixels of the squares that were ranked.
        root: where the images lie.
        source: what made the orders, in words.
        seconds: that an image took, for the orders of which it was measured.
        unreadable: names of images that could not be read, and so have no row.

    Raises:
        ConfigError: for another ending, or if it can't be written.
        ShapeError: if lengths don't fit, or an order is no permutation.
    """
    scores = scores or {}
    rows, num = len(images), grid[0] * grid[1]
    if path.suffix.lower() != ".parquet":
        raise ConfigError(f"{path}: orders are written as Parquet; name a file that ends in .parquet")
    if not orders or set(scores) - set(orders) or set(orders) & set(_RESERVED):
        raise ConfigError(f"orders {', '.join(orders) or 'none'} with scores {', '.join(scores) or 'none'}")
    if num > np.iinfo(np.int16).max:
        raise ShapeError(f"a grid of {grid[0]}x{grid[1]} patches; a file of orders holds at most 32767")
    for what, count in (("splits", len(splits)), ("flips", len(flips))):
        if count != rows:
            raise ShapeError(f"{count} {what} for {rows} images")
    for what, tables in (("order", orders), ("score", scores)):
        for name, table in tables.items():
            if tuple(table.shape) != (rows, num):
                raise ShapeError(f"{what} '{name}' of shape {tuple(table.shape)}; ({rows}, {num}) is needed")
    for name, table in orders.items():
        if not _are_permutations(table):
            raise ShapeError(f"order '{name}' is no permutation of 0..{num - 1} in every row")
    fields = [pa.field("image", pa.string()), pa.field("split", pa.string()), pa.field("flip", pa.bool_())]
    columns: list[Any] = [
        pa.array([as_text(image) for image in images], pa.string()),
        pa.array([None if split is None else SPLITS.get(split, split) for split in splits], pa.string()),
        pa.array([bool(flip) for flip in flips], pa.bool_()),
    ]
    for tables, suffix, kind, dtype in (
        (orders, "", pa.int16(), torch.int16),
        (scores, "_score", pa.float32(), torch.float32),
    ):
        for name, table in tables.items():
            flat = pa.array(table.detach().cpu().to(dtype).reshape(-1).numpy(), kind)
            fields.append(pa.field(name + suffix, pa.list_(kind, num)))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, num))
    note = {
        "kind": "orders",
        "version": _VERSION,
        "grid": list(grid),
        "image_size": image_size,
        "root": root,
        "source": source,
        "orders": list(orders),
        "seconds": dict(seconds or {}),
        "unreadable": [as_text(name) for name in unreadable],
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=pa.schema(fields, metadata={"smalti": json.dumps(note)})), buffer)
    write_atomically(path, buffer.getvalue())


def read_orders(path: str | Path) -> OrderCache:
    """The orders in a file.

    Raises:
        DataError: if it is missing, is no file of orders, or is damaged.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"{path}: is not a file; orders are written by smalti rank RUN --data DIR --out FILE.parquet")
    with reading(path, "a Parquet file"):
        table = pq.read_table(path)
    try:
        note = json.loads((table.schema.metadata or {})[b"smalti"])
        if note["kind"] != "orders":
            raise KeyError("kind")
    except Exception:
        raise DataError(f"{path}: is no file of orders; such a file is written by smalti rank") from None
    if note.get("version") != _VERSION:
        raise DataError(
            f"{path}: is of version {note.get('version')}, version {_VERSION} is needed; rank the images again"
        )
    with reading(path, "a file of orders", advice="rank the images again"):
        grid = (note["grid"][0], note["grid"][1])
        if not all(isinstance(side, int) and side >= 1 for side in grid):
            raise ValueError(f"a grid of {shorten(str(grid))} patches")
        names = [str(name) for name in note["orders"]]
        num = grid[0] * grid[1]
        scored = [name for name in names if f"{name}_score" in table.column_names]
        cache = OrderCache(
            path=path,
            grid=grid,
            image_size=int(note["image_size"]),
            root=str(note["root"]),
            source=str(note["source"]),
            images=tuple(_cells(table, "image", str)),
            splits=tuple(_cells(table, "split", str, type(None))),
            flips=np.array(_cells(table, "flip", bool), dtype=bool),
            stored={name: _rows(table[name], num) for name in names},
            scores={name: _rows(table[f"{name}_score"], num) for name in scored},
            seconds={str(name): float(value) for name, value in (note.get("seconds") or {}).items()},
            unreadable=frozenset(map(str, note.get("unreadable") or ())),
        )
    for name, values in cache.stored.items():
        if not _are_permutations(values):
            raise DataError(f"{path}: is damaged (order '{name}' is no permutation in some row); rank the images again")
    if len(cache._place) < len(cache.images):
        raise DataError(f"{path}: is damaged (an image stands in it twice); rank the images again")
    return cache


def _cells(table: pa.Table, name: str, *kinds: type) -> list[Any]:
    """A column's values, of these types."""
    values = table[name].to_pylist()
    if wrong := [value for value in values if not isinstance(value, kinds)]:
        raise TypeError(f"column '{name}' holds {wrong[0]!r}")
    return values


def _rows(column: pa.ChunkedArray, num: int) -> Tensor:
    """``(R, N)`` of a column of lists."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(flat.copy()).reshape(len(column), num)


def _are_permutations(orders: Tensor) -> bool:
    target = torch.arange(orders.shape[-1], device=orders.device, dtype=orders.dtype)
    return not orders.is_floating_point() and bool((orders.sort(dim=-1).values == target).all())
