"""A ranking as pages show it: tables of its statistics, charts of its curves, and the orders that are pictured."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from smalti.charts import Line, LineChart, floats
from smalti.ranking.classes import CLASS_UNITS, ClassOrders
from smalti.ranking.curves import UNITS as CURVE_UNITS
from smalti.ranking.curves import PrefixCurve
from smalti.ranking.diagnostics import TOP, UNITS, num_top, spread_evenly
from smalti.ranking.rank import Ranking
from smalti.ranking.rankers import look_up

FRACTIONS = (0.10, TOP, 0.50)
"""Fractions of the patches that are revealed in pictures."""
MOST_CLASSES = 60
"""Maximum number of classes on a page."""
_COLUMNS = (
    "position_variance_ratio",
    "static_correlation",
    "top_overlap",
    "neighbour_correlation",
    "nearest_distance",
    "flip_agreement",
    "score_spread",
    "num_degenerate",
)
_IN_CHARTS = (
    "collapse",
    "coverage",
    "in_strength",
    "attention",
    "variance",
    "random",
    "fixed_random",
    "collapse_static",
)
_RANDOM, _STATIC = "random", "collapse_static"


@dataclass(frozen=True)
class NumberTable:
    """A table whose first columns are names."""

    lead: str
    """What to know before reading it; may be empty."""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    meanings: Mapping[str, str]
    """Column -> what it is; empty where the names suffice."""


@dataclass(frozen=True)
class ClassRanks:
    """Mean ranks of the patches in the images of one class, or in all of them."""

    name: str
    static_ratio: float
    values: Float[np.ndarray, " N"]
    """1 where patches come first in most images, 0 where they come last; the ends are those of all classes."""


@dataclass(frozen=True)
class PicturedImage:
    """An image with the orders of its patches."""

    place: int
    """In ``ranking.images``."""
    main: str
    """Name of its own order."""
    values: Float[np.ndarray, " N"]
    """The scores of its patches, or minus their ranks where there are no scores; larger ones come first."""
    has_scores: bool
    orders: Mapping[str, Int[np.ndarray, " N"]]
    """The own order, and orders to compare with."""
    num_top: int
    """Patches that are numbered."""


def order_table(ranking: Ranking) -> NumberTable:
    """The statistics of all orders."""
    columns = [name for name in _COLUMNS if any(name in numbers for numbers in ranking.described.values())]
    titles = {column: column.replace("_", " ") for column in columns}
    meanings = {titles[column]: UNITS[column] for column in columns}
    first = next(iter(ranking.described.values()))
    if "nearest_distance" in columns:
        mean, spread = (first.get(f"nearest_distance_random{end}", math.nan) for end in ("", "_sd"))
        meanings[titles["nearest_distance"]] += f" ({mean:.3f} ± {spread:.3f} for random sets)"
    chance = 1 / max(1, len(ranking.images))
    return NumberTable(
        f"Read the position variance ratio first: about {chance:.2g} is chance here, which random orders have; 1 means "
        "one order for all images, which orders have that do not look at the image.",
        ("order", *titles.values()),
        tuple(
            (name, *(_text(numbers.get(column), column.startswith("num_")) for column in columns))
            for name, numbers in ranking.described.items()
        ),
        meanings,
    )


def agreement_tables(ranking: Ranking) -> dict[str, NumberTable]:
    """Heading -> agreement between orders, and with those of another training; empty where there is none."""
    top = f"Jaccard of the first {100 * TOP:.0f} %"
    columns = ("first", "second", "Spearman", "sd over images", "mean orders subtracted", "Kendall", top)
    keys = ("spearman", "spearman_sd", "spearman_residual", "kendall", "jaccard")
    tables = {}
    if ranking.agreements:
        rows = tuple((*pair, *(_text(numbers[key]) for key in keys)) for pair, numbers in ranking.agreements.items())
        tables[""] = NumberTable("", columns, rows, {})
    if ranking.against:
        other = "the other training"
        rows = tuple((name, other, *(_text(numbers[key]) for key in keys)) for name, numbers in ranking.against.items())
        lead = f"The same orders by {ranking.against_source}: what two trainings agree on is a property of the data."
        tables["Another training"] = NumberTable(lead, columns, rows, {})
    return tables


def class_table(classes: Sequence[ClassOrders]) -> NumberTable:
    """The statistics of one order, class by class."""
    titles = {name: name.replace("_", " ") for name in CLASS_UNITS}
    named = "" if len(classes) <= MOST_CLASSES else f" The first {MOST_CLASSES} of {len(classes)} classes."
    return NumberTable(
        "An order that depends on the class is more alike within a class than across classes; the chance level of the "
        f"static ratio is 1 / images of the class.{named}",
        ("class", *titles.values()),
        tuple(
            (one.name, *(_text(getattr(one, name), name.startswith("num_")) for name in titles))
            for one in classes[:MOST_CLASSES]
        ),
        {title: CLASS_UNITS[name] for name, title in titles.items()},
    )


def class_ranks(classes: Sequence[ClassOrders]) -> list[ClassRanks]:
    """Mean ranks of one order for pictures: of all images, then of each class."""
    shown = classes[:MOST_CLASSES]
    total = sum(one.num_images for one in classes)
    overall = np.sum([one.num_images * one.mean_rank.numpy() for one in classes], axis=0) / total
    ranks = [overall, *(one.mean_rank.numpy() for one in shown)]
    low, high = (float(end(ranks)) for end in (np.min, np.max))
    num = len(overall)
    ratio = float(overall.var() / np.arange(num).var())
    names = [("all images", ratio), *((one.name, one.static_ratio) for one in shown)]
    return [
        ClassRanks(name, ratio, 1 - (one - low) / max(high - low, 1e-12))
        for (name, ratio), one in zip(names, ranks, strict=True)
    ]


def curve_charts(ranking: Ranking) -> list[LineChart]:
    """What is left to predict after the first patches of each order."""
    chosen = {name: curve for name, curve in ranking.curves.items() if name in _IN_CHARTS}
    return [
        _curve_chart(
            "Variance left",
            "Fraction of the variance of the tokens that the predictor does not explain after seeing the first k "
            "patches; lower is better.",
            {name: (curve, curve.error) for name, curve in chosen.items()},
        ),
        _curve_chart(
            "Entropy left",
            "Entropy per patch that is left after seeing the first k patches, in nats above the noise floor, as the "
            "predictor estimates it; lower is better.",
            {name: (curve, curve.entropy.mean((0, 1))) for name, curve in chosen.items()},
        ),
    ]


def _curve_chart(
    title: str, explanation: str, curves: Mapping[str, tuple[PrefixCurve, Float[np.ndarray, " K"]]]
) -> LineChart:
    lines = tuple(
        Line(floats(values.tolist()), floats(curve.counts.tolist()), name, is_baseline=name == _RANDOM)
        for name, (curve, values) in curves.items()
    )
    return LineChart(title, explanation, lines, x_label="patches seen", is_wide=True)


def curve_table(ranking: Ranking) -> NumberTable:
    """The scores of the curves, the best order first."""
    headline = next(iter(CURVE_UNITS))
    columns = ("order", *CURVE_UNITS, f"{headline} minus {_RANDOM}", "sd of draws")
    rows = []
    for name, numbers in sorted(ranking.curve_scores.items(), key=lambda item: item[1][headline].value):
        scores = (f"{_text(one.value)} ({_text(one.low)}–{_text(one.high)})" for one in numbers.values())
        first = numbers[headline]
        gap = f"{first.difference:+.3f} ({first.difference_low:+.3f} to {first.difference_high:+.3f})"
        draws = ranking.curves[name].spread_of_draws()
        own = math.isnan(first.difference)
        rows.append((name, *scores, "" if own else gap, "" if math.isnan(draws) else _text(draws)))
    return NumberTable(
        f"On {ranking.scored_on}, by {ranking.predictor}, which was trained independently of the orders. Intervals and "
        f"differences to {_RANDOM} are 95 % over images, the same images for all orders; they do not include the "
        "randomness of training the predictor and the ranker.",
        columns,
        tuple(rows),
        CURVE_UNITS,
    )


def pictured_images(ranking: Ranking, num_shown: int) -> Iterator[PicturedImage]:
    """Images spread evenly over those that could be read, with the first order that is an image's own.

    Args:
        ranking: its orders.
        num_shown: number of images.
    """
    own = [name for name in ranking.names if name in ranking.cache.stored] or list(ranking.names)
    main, cache = own[0], ranking.cache
    beside: Sequence[str] = [n for n in (_STATIC, _RANDOM) if n == _RANDOM or n in cache.names]
    for place in spread_evenly(len(ranking.images), num_shown):
        name = ranking.images.names[place]
        orders = {one: look_up(cache, one, [name], False, draw=place)[0].numpy() for one in (main, *beside)}
        has_scores = main in cache.scores
        scores = cache.scores_of(main, [name], [False])[0].numpy() if has_scores else -np.argsort(orders[main])
        yield PicturedImage(
            place, main, scores.astype(np.float64), has_scores, orders, num_top(cache.grid[0] * cache.grid[1])
        )


def _text(value: float | None, is_count: bool = False) -> str:
    if value is None or (is_count and math.isnan(value)):
        return ""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if is_count else f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
