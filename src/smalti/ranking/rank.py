"""Rank the patches of a folder of images: write the orders, describe them, and compare them with controls."""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from smalti.config import ImageSize, Workers, read_yaml, settings, to_tree
from smalti.data.archives.members import num_bytes
from smalti.data.images.folders import open_images
from smalti.data.images.image_set import ImageSet
from smalti.data.images.labelled import eval_batches
from smalti.data.images.pixels import PixelConfig
from smalti.data.order_files import OrderCache, check_fits, read_orders
from smalti.data.views import Skipped
from smalti.data.workers import default_workers
from smalti.errors import ConfigError, DataError, RunError, ShapeError
from smalti.files import check_writable, write_atomically
from smalti.methods.base import get_method
from smalti.methods.comae import CoMAE
from smalti.methods.prefix import Prefix
from smalti.methods.ranker import DistilledRanker
from smalti.models.loading import WEIGHTS_FILE, file_digest, latest_checkpoint, open_encoder, weights_digest
from smalti.models.weights import LoadConfig
from smalti.preflight.devices import free_bytes
from smalti.ranking.classes import CLASS_UNITS, ClassOrders, conclude_classes, orders_by_class
from smalti.ranking.curves import UNITS as CURVE_UNITS
from smalti.ranking.curves import CurveScore, PrefixCurve, compare_curves, conclude_curves, evaluate_orders
from smalti.ranking.diagnostics import UNITS, agreement, conclude, describe_orders, spread_evenly
from smalti.ranking.distilled import NetworkRanker, agree_with_teacher
from smalti.ranking.rankers import (
    AttentionRanker,
    GraphRanker,
    PixelRanker,
    RankedImages,
    Ranker,
    check_memory,
    choose_names,
    look_up,
    rank_images,
)
from smalti.ranking.unfinished import Unfinished
from smalti.runs.build import load_method
from smalti.runs.config import resolve
from smalti.runs.folder import CONFIG_FILE
from smalti.runs.machine import describe_machine

CONTROLS = ("random", "fixed_random", "collapse_static", "collapse_shuffled", "halton", "centre_out")
"""Control orders that every curve is compared with."""
RANDOM_DRAWS, FIXED_DRAWS = 3, 5
"""Draws of ``random`` and permutations of ``fixed_random`` per curve."""
ORDERS_FILE = "orders.parquet"
_COSTLESS = ("chunk", "num_workers", "num_scored", "num_shown", "max_pixels")
"""Settings that don't change the orders."""
_COMPARED = 512  # images for statistics whose cost is quadratic in the number of patches

Progress = Callable[[str, int, int], None]


@settings
class RankConfig(PixelConfig):
    """Settings of patch ranking."""

    batch_size: int = 16
    """Images per batch."""
    chunk: int | None = None
    """Targets per chunk, for runs of comae; never changes the orders. None: as many as fit in 256 MiB."""
    damping: float = 0.85
    """Damping factor of PageRank, in 0..1 (1 excluded)."""
    image_size: ImageSize | None = None
    """Side of the ranked images in pixels, for encoders; None: the encoder's own. A run of comae has a fixed size."""
    weights: str | None = None
    """Network of a run to use: student or teacher."""
    load: LoadConfig = LoadConfig()
    """How to load weights from other sources."""
    num_workers: Workers | None = None
    """Data-loading worker processes; None: 0 on a CPU, up to 8 with a GPU."""
    num_scored: PositiveInt = 512
    """Maximum number of images for the curves, from the test split if present, else from val, else from all."""
    num_shown: NonNegativeInt = 4
    """Example images in the report."""


@dataclass(frozen=True)
class Ranking:
    """Result of :func:`rank`."""

    source: str
    data: str
    cache: OrderCache = field(repr=False)
    images: ImageSet = field(repr=False)
    """Images that could be read."""
    skipped: tuple[Skipped, ...]
    """Images that could not be read."""
    names: tuple[str, ...]
    """Reported orders."""
    described: Mapping[str, Mapping[str, float]]
    """Order -> numbers of :data:`smalti.ranking.diagnostics.UNITS`."""
    agreements: Mapping[tuple[str, str], Mapping[str, float]]
    """Rank agreement of pairs of image-specific orders."""
    against: Mapping[str, Mapping[str, float]]
    """Order -> agreement with the same order of another run."""
    against_source: str
    curves: Mapping[str, PrefixCurve] = field(repr=False)
    """Order -> curve; empty without ``predictor``."""
    curve_scores: Mapping[str, Mapping[str, CurveScore]]
    """Order -> number of :data:`smalti.ranking.curves.UNITS`."""
    predictor: str
    scored_on: str
    """Description of the images used for the curves."""
    sentences: tuple[str, ...]
    """Summary of the statistics, in sentences."""
    settings: Mapping[str, Any]
    seconds: float
    """Time to compute the orders."""
    by_class: Mapping[str, tuple[ClassOrders, ...]] = field(default_factory=dict)
    """Order found in images -> its statistics in each class; empty without classes."""


def rank(
    spec: str,
    data: str,
    out: Path,
    config: RankConfig | None = None,
    *,
    orders: Sequence[str] = (),
    both_flips: bool = True,
    against: str | None = None,
    predictor: str | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Ranking:
    """Rank the patches of all images, write the file of orders, and compute statistics of the orders.

    Invalid inputs are reported before the work starts where possible.

    Args:
        spec: a run of comae, or an encoder by any of its names.
        data: images.
        out: the file of orders, ``.parquet``.
        config: settings.
        orders: names; empty: all that ``spec`` gives.
        both_flips: also rank the mirrored images.
        against: a file of orders of the same images, or another run, to compare with.
        predictor: a run of prefix, used to compute curves.
        device: where to compute; None: the CPU.
        progress: called as ``progress(what, done, total)``.

    Raises:
        ConfigError, DataError, ShapeError, RunError, WeightsError: for a missing or incompatible input.
    """
    config, device = config or RankConfig(), device or torch.device("cpu")
    images = open_images(data).with_pixels(config.pixels)
    ranker = open_ranker(spec, config, orders, device)
    asked, named = choose_names(ranker, orders)
    other = _open_other(against, config, [name for name in named if name in asked], ranker, device)
    if isinstance(other, OrderCache) and not set(images.names) & set(other.images):
        check_fits(other, images, ranker.grid, flips_needed=False)
    referee = None if predictor is None else open_predictor(predictor, ranker, device)
    check_writable(out)
    states = 2 if both_flips else 1
    check_memory(ranker, config.batch_size, len(images) * states, len(asked), free_bytes(device), device.type)
    workers = default_workers(device.type) if config.num_workers is None else config.num_workers

    def rank_with(
        one: Ranker, of: ImageSet, names: Sequence[str], flips: bool, unfinished: Unfinished | None = None
    ) -> RankedImages:
        return rank_images(
            one,
            of,
            names,
            both_flips=flips,
            batch_size=config.batch_size,
            num_workers=workers,
            device=device,
            progress=progress,
            unfinished=unfinished,
        )

    began = time.monotonic()
    if not asked:  # orders that need no image
        asked = ("variance",)
    unfinished = Unfinished(out, _key(spec, images, config, asked, both_flips))
    ranked = rank_with(ranker, images, asked, both_flips, unfinished)
    seconds = time.monotonic() - began
    readable = _readable(images, ranked)
    if isinstance(other, OrderCache):
        check_fits(other, readable, ranker.grid, flips_needed=False)
    ranked.write(out, ranker)
    unfinished.remove()
    cache = read_orders(out)
    named = _possible(cache, readable, named, given=bool(orders))
    described = {name: _describe(cache, name, readable, ranked, both_flips) for name in named}
    own = [name for name in named if name in cache.stored]
    agreements = _agreements(cache, own, readable)
    compared = _compare(cache, own, other, readable, rank_with)
    curves, curve_scores, scored_on = _evaluate_all(cache, named, readable, ranker, referee, config, device, progress)
    sentences = conclude(described, agreements, compared, len(readable))
    taught = agree_with_teacher(ranker, cache, readable) if isinstance(ranker, NetworkRanker) else None
    sentences += [] if taught is None else [taught.sentence]
    by_class = _by_class(cache, own, readable)
    sentences += conclude_classes(by_class)
    return Ranking(
        source=ranker.source,
        data=data,
        cache=cache,
        images=readable,
        skipped=ranked.skipped,
        names=named,
        described=described,
        agreements=agreements,
        against=compared,
        against_source=against or "",
        curves=curves,
        curve_scores=curve_scores,
        predictor=predictor or "",
        scored_on=scored_on,
        sentences=(*sentences, *_curve_sentences(curves, curve_scores)),
        settings={
            "image_size": ranker.image_size,
            "grid": list(ranker.grid),
            "crop": "the largest central square",
            "flip_states": "original and mirrored" if both_flips else "original",
            "damping": config.damping if isinstance(ranker, GraphRanker) else None,
            "batch_size": config.batch_size,
            "device": device.type,
        },
        seconds=seconds,
        by_class=by_class,
    )


def _key(spec: str, images: ImageSet, config: RankConfig, names: Sequence[str], both_flips: bool) -> str:
    """Changes with everything that determines the orders, and with the boundaries of the batches."""
    run = Path(spec).expanduser()
    checkpoint = latest_checkpoint(run) if (run / CONFIG_FILE).is_file() else None
    weights = weights_digest(spec) if checkpoint is None else file_digest(checkpoint / WEIGHTS_FILE)
    own = {name: value for name, value in to_tree(config).items() if name not in _COSTLESS}
    sizes = [num_bytes(sample.path) for sample in images.samples]
    parts = [spec, weights, images.fingerprint(), sizes, own, list(names), both_flips, version("smalti")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def open_ranker(spec: str, config: RankConfig, orders: Sequence[str], device: torch.device) -> Ranker:
    """Load a ranker by name.

    Raises:
        ConfigError: for a run of a method without orders, or for settings that don't apply.
        RunError, WeightsError: if it doesn't exist or can't be loaded.
    """
    run = Path(spec).expanduser()
    name = _method_of(run)
    if name == "ranker":
        return _open_network(run, spec, config, device)
    if name is not None and not get_method(name).has_encoder:
        if name != "comae":
            raise ConfigError(f"{spec}: is a run of {name}; patches are ranked by a run of comae, or by an encoder")
        for setting in ("image_size", "weights", "load"):
            if getattr(config, setting) != getattr(RankConfig(), setting):
                raise ConfigError(f"{setting}: {spec} is a run of comae, which sets this itself; leave it out")
        method = load_method(run)
        assert isinstance(method, CoMAE)
        method.to(device)
        return GraphRanker(method, method.config.encoder_dim, spec, config.damping, config.chunk)
    for setting in ("chunk", "damping"):
        if getattr(config, setting) != getattr(RankConfig(), setting):
            raise ConfigError(f"{setting}={getattr(config, setting)}: only applies to runs of comae; leave it out")
    load = dataclasses.replace(config.load, weights=config.weights) if config.weights else config.load
    encoder = open_encoder(spec, load).to(device)
    if orders and "attention" not in orders and not encoder.has_class_token:
        height, width = encoder.img_size
        size = config.image_size or height
        if config.image_size is None and height != width:
            raise ConfigError(f"{spec} takes {height}x{width} images; choose a square image_size")
        return PixelRanker(size, encoder.in_chans, encoder.check_size(size, size), spec)
    return AttentionRanker(encoder, spec, config.image_size)


def _open_network(run: Path, spec: str, config: RankConfig, device: torch.device) -> NetworkRanker:
    for setting in ("chunk", "damping", "image_size", "weights", "load"):
        if getattr(config, setting) != getattr(RankConfig(), setting):
            raise ConfigError(f"{setting}: does not apply to {spec}, a run of ranker; leave it out")
    method = load_method(run)
    assert isinstance(method, DistilledRanker)
    settings_of_run = resolve(read_yaml(run / CONFIG_FILE), str(run / CONFIG_FILE))
    return NetworkRanker(method.to(device), settings_of_run, spec)


def open_predictor(run: str, ranker: Ranker, device: torch.device) -> Prefix:
    """Load the predictor of a run, if it uses the same patches.

    Raises:
        ConfigError: if it is a run of another method.
        ShapeError: if it uses other patches.
        RunError: if there is no such run.
    """
    folder = Path(run).expanduser()
    name = _method_of(folder)
    if name is None:
        raise RunError(f"--predictor {run}: is not a run directory; train one with smalti train prefix")
    if name != "prefix":
        raise ConfigError(f"--predictor {run}: is a run of {name}; orders are scored by a run of prefix")
    method = load_method(folder)
    assert isinstance(method, Prefix)
    theirs, ours = (method.tokens.image_size, method.tokens.grid), (ranker.image_size, ranker.grid)
    if theirs != ours:
        side = ranker.image_size // ranker.grid[0]
        raise ShapeError(
            f"--predictor {run}: uses {theirs[1][0]}x{theirs[1][1]} patches of {theirs[0]} px images, the orders are "
            f"of {ours[1][0]}x{ours[1][1]} of {ours[0]} px; train it with data.image_size={ours[0]} "
            f"tokens.patch_size={side}"
        )
    return method.to(device)


def write_ranking(path: Path, ranking: Ranking, command: str = "") -> None:
    """Write all statistics with their units as JSON."""
    write_atomically(path, json.dumps(ranking_content(ranking, command), indent=2, ensure_ascii=False) + "\n")


def ranking_content(ranking: Ranking, command: str = "") -> dict[str, Any]:
    """Content of the JSON file: plain types, null for missing numbers."""
    return {
        "encoder": ranking.source,
        "data": ranking.data,
        "num_images": len(ranking.images),
        "unreadable": [{"path": str(one.path), "reason": one.reason} for one in ranking.skipped],
        "settings": dict(ranking.settings),
        "seconds": round(ranking.seconds, 3),
        "seconds_an_image": {name: float(f"{value:.4g}") for name, value in ranking.cache.seconds.items()},
        "says": list(ranking.sentences),
        "orders": {name: _finite(numbers) for name, numbers in ranking.described.items()},
        "agreements": [
            {"first": first, "second": second, **_finite(numbers)}
            for (first, second), numbers in ranking.agreements.items()
        ],
        "classes": {name: [one.to_json() for one in classes] for name, classes in ranking.by_class.items()},
        "against": {"source": ranking.against_source, "orders": {n: _finite(v) for n, v in ranking.against.items()}}
        if ranking.against_source
        else None,
        "curves": {
            "predictor": ranking.predictor,
            "images": ranking.scored_on,
            "orders": {
                name: {
                    "k": curve.counts.tolist(),
                    "left": curve.error.tolist(),
                    "entropy": curve.entropy.mean((0, 1)).tolist(),
                    "auc_q_sd_of_draws": _number(curve.spread_of_draws()),
                    **{n: _finite(dataclasses.asdict(one)) for n, one in ranking.curve_scores[name].items()},
                }
                for name, curve in ranking.curves.items()
            },
        }
        if ranking.curves
        else None,
        "units": {**UNITS, **CURVE_UNITS, **CLASS_UNITS},
        "command": command,
        **describe_machine(),
    }


def _method_of(run: Path) -> str | None:
    """Name of the method of a run; None if it isn't a run."""
    if not (run / CONFIG_FILE).is_file():
        return None
    method = read_yaml(run / CONFIG_FILE).get("method")
    return str(method["name"]) if isinstance(method, Mapping) and "name" in method else None


def _open_other(
    against: str | None, config: RankConfig, names: Sequence[str], ranker: Ranker, device: torch.device
) -> OrderCache | Ranker | None:
    """Load the orders of another run or file; they must use the same patches and share at least one order."""
    if against is None:
        return None
    other: OrderCache | Ranker
    if (Path(against).expanduser() / CONFIG_FILE).is_file():
        other = open_ranker(against, config, names, device)
    else:
        other = read_orders(against)
    if other.grid != ranker.grid:
        raise ShapeError(
            f"--against {against}: orders {other.grid[0]}x{other.grid[1]} patches, these are "
            f"{ranker.grid[0]}x{ranker.grid[1]}; rank at the same image size and patch size"
        )
    there = other.stored if isinstance(other, OrderCache) else other.gives
    if not any(name in there for name in names):
        raise DataError(
            f"--against {against}: has orders {', '.join(there)}, none of those compared here "
            f"({', '.join(names) or 'none is found in images'})"
        )
    return other


def _readable(images: ImageSet, ranked: RankedImages) -> ImageSet:
    unreadable = {one.path for one in ranked.skipped}
    return dataclasses.replace(
        images, samples=tuple(sample for sample in images.samples if sample.path not in unreadable)
    )


def _agreements(cache: OrderCache, names: Sequence[str], images: ImageSet) -> dict[tuple[str, str], dict[str, float]]:
    """Agreement of each pair of orders, on a sample of the images."""
    some = [images.names[place] for place in spread_evenly(len(images), _COMPARED)]
    return {
        (first, second): agreement(look_up(cache, first, some, False), look_up(cache, second, some, False))
        for number, first in enumerate(names)
        for second in names[number + 1 :]
    }


def _compare(
    cache: OrderCache,
    names: Sequence[str],
    other: OrderCache | Ranker | None,
    images: ImageSet,
    rank_with: Callable[[Ranker, ImageSet, Sequence[str], bool], RankedImages],
) -> dict[str, dict[str, float]]:
    """Agreement with the orders of another run."""
    if other is None:
        return {}
    listed = images.names
    places = spread_evenly(len(images), _COMPARED)
    some = [listed[place] for place in places]
    shared = [name for name in names if name in (other.stored if isinstance(other, OrderCache) else other.gives)]
    theirs: dict[str, Tensor]
    if isinstance(other, OrderCache):
        theirs = {name: other.orders(name, some, [False] * len(some)) for name in shared}
    else:
        chosen = dataclasses.replace(images, samples=tuple(images.samples[place] for place in places))
        found = rank_with(other, chosen, shared, False)
        theirs = {name: found.orders[name].long() for name in shared}
    return {name: agreement(look_up(cache, name, some, False), theirs[name]) for name in shared}


def _by_class(cache: OrderCache, names: Sequence[str], images: ImageSet) -> dict[str, tuple[ClassOrders, ...]]:
    """Statistics of the orders that are found in images, class by class; empty without classes."""
    labels, listed = [sample.label for sample in images.samples], images.names
    found = {
        name: orders_by_class(look_up(cache, name, listed, False).long(), labels, images.classes or ())
        for name in names
    }
    return {name: classes for name, classes in found.items() if classes}


def _possible(cache: OrderCache, images: ImageSet, names: Sequence[str], given: bool) -> tuple[str, ...]:
    """Drop ``collapse_shuffled`` if a split has only one image, unless it was requested."""
    if "collapse_shuffled" not in names or given:
        return tuple(names)
    try:
        look_up(cache, "collapse_shuffled", images.names[:1], False)
    except DataError:
        return tuple(name for name in names if name != "collapse_shuffled")
    return tuple(names)


def _describe(
    cache: OrderCache, name: str, images: ImageSet, ranked: RankedImages, both_flips: bool
) -> dict[str, float]:
    listed = images.names
    is_own = name in cache.stored
    as_is = torch.tensor([not flip for flip in ranked.flips])
    return describe_orders(
        look_up(cache, name, listed, False),
        cache.grid,
        mirrored=look_up(cache, name, listed, True) if both_flips and is_own else None,
        scores=cache.scores[name][as_is] if name in cache.scores else None,
        degenerate=int(ranked.degenerate[name][as_is].sum()) if name in ranked.degenerate else None,
    )


def _evaluate_all(
    cache: OrderCache,
    names: Sequence[str],
    images: ImageSet,
    ranker: Ranker,
    predictor: Prefix | None,
    config: RankConfig,
    device: torch.device,
    progress: Progress | None,
) -> tuple[dict[str, PrefixCurve], dict[str, dict[str, CurveScore]], str]:
    if predictor is None:
        return {}, {}, ""
    split = next((split for split in ("test", "val") if split in images.splits), None)
    of = images.subset(split) if split else images
    chosen = dataclasses.replace(
        of, samples=tuple(of.samples[place] for place in spread_evenly(len(of), config.num_scored))
    )
    tokens = torch.cat(
        [
            predictor.tokens.encode(pixels.to(device))
            for pixels, places, _ in eval_batches(chosen, ranker.image_size, predictor.tokens.in_chans, "centre", 64)
            if places
        ]
    )
    listed = chosen.names
    wanted = (*names, *(name for name in CONTROLS if name not in names))
    wanted = tuple(
        name for name in wanted if not name.startswith("collapse_") or (name in names or "collapse" in cache.stored)
    )
    draws: dict[str, list[Tensor]] = {}
    for name in _possible(cache, chosen, wanted, given=False):
        if name == "random":
            draws[name] = [look_up(cache, name, listed, False, draw) for draw in range(RANDOM_DRAWS)]
        elif name == "fixed_random":
            draws[name] = [look_up(cache, f"{name}:{seed}", listed, False) for seed in range(FIXED_DRAWS)]
        else:
            draws[name] = [look_up(cache, name, listed, False)]
    curves = evaluate_orders(predictor, tokens, draws, progress=progress)
    where = f"{len(chosen):,} images" + (f" of the {split} split" if split else "")
    return curves, compare_curves(curves), where


def _curve_sentences(
    curves: Mapping[str, PrefixCurve], curve_scores: Mapping[str, Mapping[str, CurveScore]]
) -> list[str]:
    return conclude_curves(curve_scores, at_start=float(curves["random"].error[0])) if curve_scores else []


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in numbers.items()}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
