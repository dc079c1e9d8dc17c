"""Keep curve: classification accuracy with only the first patches of an order, by fraction of dropped patches.

Source: Guo et al., "The Collapse of Patches", 2025, arXiv:2511.22281, Table 5 and Fig. 8: area under the curve (top-1
over the rates 0, 0.01 ... 0.98, not normalised) and knee. Differs from it: image-independent orders (one random
permutation for all images; the mean order), which the paper lacks, are always included; accuracy has intervals; the
time per image is measured, including the time to rank its patches if known.
The head is the run's own if its method trained one. Otherwise, or if the baseline has none (a run with other classes,
an imported encoder), it is a linear layer, fitted on whole training images as in linear-probe.
Encoder and baseline always have the same kind of head. Dropped patches are never embedded.
An encoder with learned pruning (DynamicViT) has no order of its own: at rate r each stage keeps ``rho = 1 - r`` of what
the one before kept. So has the paper's comparison: its accuracy of DynamicViT at 30 % (81.44) is that published for
``rho = 0.7`` (81.43), where the last stage drops 66 %.
Letters: n images, N patches, k kept ones, K classes, S rates.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from smalti.charts import Line, LineChart, floats
from smalti.config import BatchSize, Count, PathText, settings
from smalti.data.images.labelled import eval_batches
from smalti.data.order_files import (
    FOUND,
    STATIC,
    OrderCache,
    check_fits,
    check_order,
    grid_order,
    read_orders,
    static_name,
)
from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import own_head
from smalti.evaluation.features import Features
from smalti.evaluation.intervals import LEVEL
from smalti.evaluation.metrics import ConfusionMatrix, class_recall
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.protocols.linear_probe import BATCH_SIZE, LEARNING_RATES, fit_probe
from smalti.evaluation.result import FRACTION
from smalti.evaluation.tally import Tally, tally_mean
from smalti.functional.graphs import descending
from smalti.functional.orders import knee, num_kept, random_orders
from smalti.functional.patches import patch_variance
from smalti.layers.token_pruning import TokenPruning
from smalti.models.encoder import ClassHead, Encoder
from smalti.models.pruning import encode_pruned

CONTROLS = ("random", "fixed_random")
"""Orders that are always included; also the static order of each order from a file."""
ALL_CONTROLS = (*CONTROLS, *STATIC)
"""Orders that look at no image."""
LEAST_GAIN = 0.005
"""Gain over random below which a fraction of it says nothing."""
SECTION = "Patches dropped"
"""Heading of the charts on pages."""
PLAIN = ("halton", "variance")
"""Orders added by default if the encoder was trained without an order."""
RATES = tuple(round(0.05 * step, 2) for step in range(20))
PAPER_RATES = tuple(round(0.01 * step, 2) for step in range(99))
TABLE = (0.3, 0.5, 0.78)
"""Rates of the paper's Table 5: always measured, but only part of the area if they are among the rates."""
PRUNING = "pruning"
"""Stands among the orders for the encoder's own learned pruning."""
PRUNING_NOTE = "each stage keeps 1 - rate of the patches that the one before kept"
SPEED_BATCH, SPEED_ROUNDS = 8, 5
OWN_HEAD = "the run's own, trained or untrained like the encoder"


@dataclasses.dataclass(frozen=True)
class Orders:
    """Orders of the patches of evaluated images, by name."""

    names: tuple[str, ...]
    """Names of the orders; the first is the headline. :data:`PRUNING` is none, and :meth:`of` does not know it."""
    own: str
    """Order the encoder was trained with; empty: none."""
    asked: bool
    """Whether the user named the first order."""
    caches: tuple[OrderCache, ...]
    encoder: Encoder
    images: tuple[str, ...]
    """Names of the evaluated images."""
    seed: int

    def of(self, name: str, pixels: Tensor, places: Sequence[int]) -> Int[Tensor, "B N"]:
        """Orders of a batch.

        Args:
            name: one of ``names``.
            pixels: ``(B, C, S, S)`` images, not normalised, on the encoder's device.
            places: indices of the images in the test set.
        """
        grid = self.encoder.check_size(pixels.shape[-2], pixels.shape[-1])
        cache = self.cache_of(name)
        if cache is not None:
            found = cache.orders(name, [self.images[place] for place in places], [False] * len(places))
            return found.to(pixels.device)
        fixed = grid_order(name, grid)
        if fixed is not None:
            return fixed.to(pixels.device).expand(len(places), -1)
        if name == "random":
            keys = torch.tensor(places, device=pixels.device) + 2**32 * self.seed
            return random_orders(keys, grid[0] * grid[1])
        if name == "variance":
            return descending(patch_variance(pixels.float(), self.encoder.patch_size))
        assert name == "attention", name
        return descending(self.encoder.encode_with_attention(self.encoder.normalize(pixels))[1].mean(1))

    def cache_of(self, name: str) -> OrderCache | None:
        """The file that has an order; None if no file has it."""
        return next((cache for cache in self.caches if name in cache.names), None)


@settings
class KeepCurveConfig:
    """Settings of ``keep-curve``."""

    orders: tuple[PathText, ...] = ()
    """Patch orders by name, and files of ``smalti rank`` (.parquet), which add all their orders. The first is the
    headline; the encoder's own order and the random and static controls are always included."""
    rates: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()
    """Fractions of patches that are dropped, ascending; empty: 0, 0.05 ... 0.95 (paper: 0, 0.01 ... 0.98)."""
    speed: bool = True
    """Also measure the time per image at each rate on this machine; no score depends on it."""
    epochs: Count | None = None
    """Passes over the training images; None: the preset's."""
    batch_size: BatchSize | None = None
    """Images per training step; None: the preset's."""


def open_orders(features: Features, config: EvalConfig, size: int) -> Orders:
    """The requested orders, followed by the one the encoder was trained with and the controls.

    A file adds all orders in it. The first requested order is the headline; by default the encoder's own.

    Raises:
        ConfigError: for an unknown name, or learned pruning of an encoder without.
        DataError, ShapeError: for a file that can't be read or doesn't match the images, or if no file has an order.
    """
    own_settings: KeepCurveConfig = config.of("keep-curve")
    encoder, head = features.encoder, features.encoder.class_head
    own = PRUNING if encoder.token_pruning is not None else head.order if head is not None else ""
    if PRUNING in own_settings.orders and encoder.token_pruning is None:
        raise ConfigError(
            f"eval.keep-curve.orders: {PRUNING} needs an encoder that has learned it, as a run of dynamicvit; "
            f"{encoder.source or encoder.name} has not"
        )
    named = [
        order if order == PRUNING or order.endswith(".parquet") else check_order(order) for order in own_settings.orders
    ]
    files = {order: Path(order).expanduser() for order in named if order.endswith(".parquet")}
    if own and not files and head is not None and head.orders:
        files[head.orders] = Path(head.orders)
    read = {order: read_orders(file) for order, file in files.items()}
    caches = tuple(read.values())
    grid = encoder.check_size(size, size)
    for cache in caches:
        check_fits(cache, features.data.test, grid, flips_needed=False)
    stored = [name for cache in caches for name in cache.stored]
    asked = [name for order in named for name in (read[order].stored if order in files else (order,))]
    wanted = [*asked, *([own] if own else [] if asked else PLAIN), *([] if asked else stored), *CONTROLS]
    wanted += [static_name(name) for name in wanted if name in FOUND and name in stored]
    names = tuple(dict.fromkeys(wanted))
    orders = Orders(names, own, bool(asked), caches, encoder, features.names, config.seed)
    for name in names:
        if name == PRUNING:
            continue
        needs_file = grid_order(name, grid) is None and name not in ("random", "variance")
        if not needs_file or orders.cache_of(name) is not None:
            continue
        if name == "attention":
            if not encoder.has_class_token:
                raise ConfigError(f"eval.keep-curve.orders: attention needs a class token; {encoder.name} has none")
            continue
        given = f"; {', '.join(map(str, files.values()))} has {', '.join(stored)}" if files else ""
        raise DataError(
            f"order '{name}' comes from a file of smalti rank; add it: eval.keep-curve.orders=[FILE.parquet]{given}"
        )
    return orders


def fit_head(features: Features, config: EvalConfig, size: int) -> tuple[ClassHead, dict[str, Any]]:
    """Fit a linear layer on the vectors of whole training images; returns it and its entries in the settings."""
    own: KeepCurveConfig = config.of("keep-curve")
    encoder, train, data = features.encoder, features.data.train, features.data
    vectors, labels = [], list[int]()
    for found, places in features.encode(train, size, "centre", features.batch_size, "train images"):
        vectors.append(encoder.pooled(found).float())
        labels += [int(train.samples[place].label or 0) for place in places]
    if not vectors:
        raise DataError(f"{train.root}: none of the {len(train)} train images can be read")
    inputs = torch.cat(vectors)
    batch_size = own.batch_size or BATCH_SIZE
    probe = fit_probe(
        inputs,
        torch.tensor(labels),
        len(data.classes),
        torch.ones(1, inputs.shape[1], dtype=torch.bool),
        epochs=own.epochs,
        batch_size=batch_size,
        seed=config.seed,
        root=train.root,
        progress=features.progress,
    )
    weight = (probe.heads.weight / probe.std[:, None]).T  # fold the standardisation into the layer
    bias = probe.heads.bias - weight @ probe.mean
    about = {
        "head": "linear layer, fitted on vectors of whole training images as in linear-probe",
        "learning_rate": LEARNING_RATES[probe.rate] * batch_size / BATCH_SIZE,
        "held_out_top1": probe.held_out_top1,
        "epochs": probe.epochs,
        "head_batch_size": batch_size,
    }
    return ClassHead(weight, bias, data.classes), about


@register_protocol(
    "keep-curve",
    need="labels",
    settings=KeepCurveConfig,
    by_default=False,
)
@torch.no_grad()
def keep_curve(features: Features, config: EvalConfig) -> Scores:
    """Classification accuracy as patches are dropped in several orders; needs class folders."""
    own: KeepCurveConfig = config.of("keep-curve")
    size = features.image_size(config.image_size)
    encoder, test, classes = features.encoder, features.data.test, features.data.classes
    rates = own.rates or (PAPER_RATES if config.preset == "paper" else RATES)
    if len(rates) < 2 or any(after <= before for before, after in itertools.pairwise(rates)):
        raise ConfigError(f"eval.keep-curve.rates={list(rates)}: at least two ascending rates are needed")
    orders = open_orders(features, config, size)
    head = features.class_head
    about: dict[str, Any] = {"head": OWN_HEAD}
    if head is None:
        head, about = fit_head(features, config, size)
        if own_head(encoder, classes) is not None:
            about["head_note"] = "the baseline has no head of its own, so both have fitted ones"
        elif encoder.class_head is not None and len(encoder.class_head.weight):
            about["head_note"] = "the run's own head is for other classes"
    head = head._replace(weight=head.weight.to(features.device), bias=head.bias.to(features.device))
    pruning = encoder.token_pruning
    if pruning is not None:
        pruning.predictors.to(features.device)
    trained = () if pruning is None else (round(1 - pruning.keep_ratio, 6),)
    measured = tuple(sorted({0.0, *rates, *TABLE, *trained}))
    preds, places = _predictions(features, orders, head, measured, size)
    labels = torch.tensor([int(test.samples[place].label or 0) for place in places])
    right = {name: found == labels[:, None] for name, found in preds.items()}  # (n, S) each

    first = orders.names[0]
    grid = encoder.check_size(size, size)
    in_area = torch.tensor([measured.index(rate) for rate in rates])
    metrics: dict[str, float] = {}
    units: dict[str, str] = {}
    tallies: dict[str, Tally] = {}

    def add(name: str, values: Float[Tensor, " n"], unit: str = FRACTION) -> None:
        numbers = np.full(len(test), np.nan)
        numbers[places] = values.double().numpy()
        tallies[name] = tally_mean(numbers)
        metrics[name], units[name] = tallies[name].score(), unit

    span = rates[-1] - rates[0]
    add("mean_top1", _areas(right[first][:, in_area], rates) / span)
    add("auc", _areas(right[first][:, in_area], rates), f"area, at most {span:g}, higher is better")
    add("top1", right[first][:, 0].double())
    for rate in TABLE:
        add(f"top1_drop{100 * rate:.0f}", right[first][:, measured.index(rate)].double())
    for rate in trained:
        add("top1_trained_ratio", right[PRUNING][:, measured.index(rate)].double())
    metrics["knee"] = knee(right[first][:, in_area].double().mean(0), torch.tensor(rates))
    units["knee"] = "fraction of dropped patches at the largest bend of the curve"
    for name in orders.names[1:]:
        add(f"mean_top1_{name}", _areas(right[name][:, in_area], rates) / span)

    means = {name: float(_areas(right[name][:, in_area], rates).mean() / span) for name in orders.names}
    for name in orders.names:
        if static_name(name) in means:
            metrics[f"static_ratio_{name}"] = static_ratio(means[name], means[static_name(name)], means["random"])
            units[f"static_ratio_{name}"] = "fraction of the gain over random that one order for all images reaches"

    confusion = ConfusionMatrix(len(classes))
    confusion.update(labels, preds[first][:, 0])
    of_class = {rate: ConfusionMatrix(len(classes)) for rate in rates}
    for rate, matrix in of_class.items():
        matrix.update(labels, preds[first][:, measured.index(rate)])
    recalls = torch.stack([class_recall(matrix.matrix) for matrix in of_class.values()])
    settings = {
        "preset": config.preset,
        "order": first,
        "order_note": "the first requested order"
        if orders.asked
        else "the encoder's own pruning"
        if orders.own == PRUNING
        else "the encoder's training order"
        if orders.own
        else "none was requested",
        "orders": list(orders.names),
        "files": {str(cache.path): cache.source for cache in orders.caches},
        **about,
        "pool": encoder.pool,
        "rates": list(rates),
        "num_patches": grid[0] * grid[1],
        "kept": {f"{rate:g}": num_kept(grid[0] * grid[1], rate) for rate in measured},
        "image_size": size,
        "resize": "the largest central square",
        "interval": f"{LEVEL:.0%}, Wilson's, over the {features.evaluated}",
        "keep_curve": {name: _curve(right[name], measured) for name in orders.names},
    }
    if pruning is not None:
        settings["pruning"] = _about_pruning(pruning, measured, grid[0] * grid[1], encoder.depth)
    if own.speed:
        settings |= measure_speed(orders, head, measured, size)
    charts = accuracy_charts(settings["keep_curve"]) | (speed_charts(settings) if own.speed else {})
    return Scores(
        metrics,
        settings,
        {
            "recall": dict(zip(classes, class_recall(confusion.matrix).tolist(), strict=True)),
            "mean_recall": dict(zip(classes, recalls.mean(0).tolist(), strict=True)),
        },
        units=units,
        tallies=tallies,
        confusion=confusion.matrix.numpy(),
        charts=charts,
    )


def static_ratio(own: float, static: float, random: float) -> float:
    """Fraction of an order's gain over random orders that its static order reaches; NaN without a gain.

    Args:
        own: mean accuracy with the order of each image.
        static: the same with one order for all images.
        random: the same with random orders.

    Example:
        >>> round(static_ratio(0.5, 0.4, 0.3), 3)
        0.5
    """
    return (static - random) / (own - random) if own - random >= LEAST_GAIN else math.nan


def accuracy_charts(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, LineChart]:
    """Accuracy against the fraction of dropped patches: of all encoders by their own orders, and of each by all orders.

    Args:
        curves: order -> rates, accuracy and its interval; the encoder's own order first.
    """
    lines = {
        name: Line(floats(curve["top1"]), floats(curve["rate"]), name, floats(curve["low"]), floats(curve["high"]))
        for name, curve in curves.items()
    }
    first, *others = lines.values()
    controls = [dataclasses.replace(line, role="control") for line in others if line.name in ALL_CONTROLS]
    *names, last = (name for name in ALL_CONTROLS if name in lines)
    about_controls = f"{', '.join(names)} and {last} do not look at the image"
    together = LineChart(
        "Encoders compared",
        f"Top-1 accuracy of each encoder by its own order against the fraction of dropped patches, beside orders that "
        f"are the same for all images ({about_controls}); higher is better. With learned pruning, {PRUNING_NOTE}.",
        (first, *controls),
        SECTION,
        x_axis="fraction",
        x_label="dropped patches",
        is_wide=True,
        has_points=True,
        needs_several=True,
    )
    each = LineChart(
        "Accuracy by order of the patches",
        "Top-1 accuracy against the fraction of dropped patches, for each order of the patches that are kept (bands: "
        f"95 % over the evaluated images); {about_controls}, so an order that depends on it must lie above them"
        f"{f'; with {PRUNING}, {PRUNING_NOTE}' if PRUNING in lines else ''}.",
        (first, *others),
        SECTION,
        x_axis="fraction",
        x_label="dropped patches",
        is_wide=True,
        has_points=True,
        per_encoder=True,
    )
    return {"together": together, "orders": each}


def speed_charts(settings: Mapping[str, Any]) -> dict[str, LineChart]:
    """Accuracy against images per second, for the orders whose ranking time is known: of all encoders by their own
    orders, and of each by all orders; empty if no time is known.

    Args:
        settings: ``keep_curve`` and what :func:`measure_speed` gives.
    """
    lines: dict[str, Line] = {}
    for name, ranking in settings["ranking_s"].items():
        if ranking is not None:
            curve, speed = settings["keep_curve"][name], settings["speed"]
            taken = speed["pruning_s"] if name == PRUNING else speed["image_s"]
            rates = floats(1 / (seconds + ranking) for seconds in taken)
            lines[name] = Line(floats(curve["top1"]), rates, name, floats(curve["low"]), floats(curve["high"]))
    unknown = [name for name, ranking in settings["ranking_s"].items() if ranking is None]
    left_out = f" (not known, so left out: {', '.join(unknown)})" if unknown else ""
    explanation = (
        f"Top-1 accuracy against images per second ({settings['speed_note']}), including the time to rank the "
        f"patches{left_out}; the upper right is better."
    )
    each = LineChart(
        "Accuracy against images per second",
        explanation,
        tuple(lines.values()),
        SECTION,
        x_axis="log",
        x_label="images per second",
        is_wide=True,
        has_points=True,
        per_encoder=True,
    )
    if not lines:
        return {}
    first = next(iter(settings["ranking_s"]))
    if first not in lines:
        return {"speed": each}
    together = dataclasses.replace(
        each,
        title="Encoders compared by time",
        explanation=f"Top-1 accuracy of each encoder by its own order or pruning against images per second "
        f"({settings['speed_note']}), including the time to rank the patches; the upper right is better.",
        lines=(lines[first],),
        per_encoder=False,
        needs_several=True,
    )
    return {"together_speed": together, "speed": each}


def _about_pruning(pruning: TokenPruning, rates: Sequence[float], num_patches: int, depth: int) -> dict[str, Any]:
    """What learned pruning keeps at each rate: patches after each stage, and the mean fraction over the blocks."""
    ratios = {f"{rate:g}": 1 - rate for rate in rates}
    return {
        "rate": PRUNING_NOTE,
        "trained_keep_ratio": pruning.keep_ratio,
        "before_blocks": list(pruning.blocks),
        "kept": {name: list(pruning.counts(num_patches, ratio)) for name, ratio in ratios.items()},
        "mean_kept": {name: round(pruning.mean_kept(num_patches, depth, ratio), 4) for name, ratio in ratios.items()},
    }


def _predictions(
    features: Features, orders: Orders, head: ClassHead, rates: Sequence[float], size: int
) -> tuple[dict[str, Int[Tensor, "n S"]], list[int]]:
    """The predicted class at each rate for each order, and the indices of the readable images."""
    encoder, test = features.encoder, features.data.test
    found: dict[str, list[Tensor]] = {name: [] for name in orders.names}
    places, done = list[int](), 0
    batches = eval_batches(
        test, size, encoder.in_chans, "centre", features.batch_size, num_workers=features.num_workers
    )
    for pixels, positions, skipped in batches:
        features.skipped.update({str(item.path): item.reason for item in skipped})
        done += len(positions) + len(skipped)
        if positions:
            pixels = pixels.to(features.device)
            images = encoder.normalize(pixels)
            places += positions
            whole = _predict(encoder, head, images, None)  # the same for all orders
            for name in orders.names:
                if name == PRUNING:
                    columns = [_predict_pruned(encoder, head, images, 1 - rate) if rate else whole for rate in rates]
                    found[name].append(torch.stack(columns, dim=1))
                    continue
                order = orders.of(name, pixels, positions)
                columns = []
                for rate in rates:
                    keep = num_kept(order.shape[1], rate)
                    is_whole = keep == order.shape[1]
                    columns.append(whole if is_whole else _predict(encoder, head, images, order[:, :keep]))
                found[name].append(torch.stack(columns, dim=1))
        features.progress("keep-curve", done, len(test))
    if not places:
        raise DataError(f"{test.root}: none of the {len(test)} {features.evaluated} can be read")
    return {name: torch.cat(parts) for name, parts in found.items()}, places


def _predict(encoder: Encoder, head: ClassHead, images: Tensor, ids_keep: Tensor | None) -> Int[Tensor, " B"]:
    return (encoder.image_features(images, ids_keep) @ head.weight.T + head.bias).argmax(1).cpu()


def _predict_pruned(encoder: Encoder, head: ClassHead, images: Tensor, keep_ratio: float) -> Int[Tensor, " B"]:
    assert encoder.token_pruning is not None
    vectors = encoder.pooled(encode_pruned(encoder, images, encoder.token_pruning, keep_ratio))
    return (vectors @ head.weight.T + head.bias).argmax(1).cpu()


def _areas(right: Tensor, rates: Sequence[float]) -> Float[Tensor, " n"]:
    """The area under each image's curve; the mean is the area under the curve of accuracy."""
    return torch.trapezoid(right.double(), torch.tensor(rates, dtype=torch.float64), dim=1)


def _curve(right: Tensor, rates: Sequence[float]) -> dict[str, list[float]]:
    """Accuracy at each rate with its interval, for figures."""
    from scipy.stats import binomtest  # heavy, and only needed here

    known = [binomtest(int(column.sum()), len(column)).proportion_ci(LEVEL, method="wilson") for column in right.T]
    return {
        "rate": list(rates),
        "top1": [round(value, 5) for value in right.double().mean(0).tolist()],
        "low": [round(float(interval.low), 5) for interval in known],
        "high": [round(float(interval.high), 5) for interval in known],
    }


def measure_speed(orders: Orders, head: ClassHead, rates: Sequence[float], size: int) -> dict[str, Any]:
    """Time per image at each rate, and to rank its patches, on this machine.

    The minimum over several interleaved rounds, which is least affected by other load.

    Args:
        orders: orders in the curve.
        head: classification head.
        rates: fractions of dropped patches.
        size: image size in pixels.

    Returns:
        ``speed``: seconds per image at each rate, without ranking, as ``image_s``, and with learned pruning as
        ``pruning_s``, prediction modules included; ``ranking_s``: seconds to rank an image for each order, None if a
        network ranked it that isn't available and its file has no time.
    """
    encoder = orders.encoder
    device = head.weight.device
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (SPEED_BATCH, encoder.in_chans, size, size), generator=generator, dtype=torch.uint8
    ).to(device)
    images = encoder.normalize(pixels)
    grid = encoder.check_size(size, size)
    order = random_orders(torch.arange(SPEED_BATCH, device=device), grid[0] * grid[1])
    kept = {rate: num_kept(order.shape[1], rate) for rate in rates}

    def passes(keep: int) -> Callable[[], object]:
        return lambda: _predict(encoder, head, images, order[:, :keep] if keep < order.shape[1] else None)

    def pruned(rate: float) -> Callable[[], object]:
        return lambda: _predict_pruned(encoder, head, images, 1 - rate)

    jobs: dict[Any, Callable[[], object]] = {keep: passes(keep) for keep in dict.fromkeys(kept.values())}
    computed = [name for name in orders.names if name in ("variance", "attention") and orders.cache_of(name) is None]
    if PRUNING in orders.names:
        for rate in rates:
            jobs[PRUNING, rate] = passes(order.shape[1]) if not rate else pruned(rate)
    for name in computed:
        jobs[name] = lambda name=name: orders.of(name, pixels, range(SPEED_BATCH)).cpu()  # type: ignore[misc]
    seconds: Mapping[Any, float] = _fastest(jobs)
    speed = {"rate": list(rates), "image_s": [float(f"{seconds[keep]:.4g}") for keep in kept.values()]}
    if PRUNING in orders.names:
        speed["pruning_s"] = [float(f"{seconds[PRUNING, rate]:.4g}") for rate in rates]
    ranking: dict[str, float | None] = {}
    for name in orders.names:
        cache = orders.cache_of(name)
        if cache is None or name in STATIC:  # one order for all images: no ranking per image
            ranking[name] = seconds.get(name, 0.0)
        else:
            ranking[name] = cache.seconds.get(_base(name))
    return {
        "speed": speed,
        "ranking_s": ranking,
        "speed_note": f"seconds per image, batches of {SPEED_BATCH}, {torch.get_num_threads()} threads, {device.type}, "
        f"fastest of {SPEED_ROUNDS} interleaved rounds",
    }


def _base(name: str) -> str:
    """The stored order from which an order is derived."""
    return "collapse" if name.startswith("collapse") else name.removesuffix(static_name(""))


def _fastest(jobs: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
    """Seconds per image of each job; jobs are interleaved, so that other load affects all of them."""
    for job in jobs.values():
        job()  # the first call also allocates
    taken: dict[Any, list[float]] = {name: [] for name in jobs}
    for _ in range(SPEED_ROUNDS):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()  # ends on the CPU, so a GPU has finished
            taken[name].append((time.perf_counter() - started) / SPEED_BATCH)
    return {name: min(values) for name, values in taken.items()}
