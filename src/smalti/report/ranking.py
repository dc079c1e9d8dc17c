"""The page of a ranking: what the numbers say, orders beside controls, curves, and pictures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from smalti.data.images.decode import as_picture
from smalti.data.images.image_set import as_text
from smalti.data.images.labelled import eval_image
from smalti.files import write_atomically
from smalti.ranking.curves import UNITS as CURVE_UNITS
from smalti.ranking.diagnostics import TOP, UNITS, num_top, spread_evenly
from smalti.ranking.rank import Ranking
from smalti.ranking.rankers import look_up
from smalti.report.details import picture_block, picture_blocks
from smalti.report.figures import image_uri, line_chart
from smalti.report.html import (
    Html,
    chart_figure,
    decimals,
    duration,
    fact_boxes,
    join,
    settings_table,
    tag,
    verdict_box,
    whole_page,
)
from smalti.report.order_pictures import draw_sheet, enlarge, heat_picture, order_picture, revealed_picture

SHARES = (0.10, TOP, 0.50)
"""Of the patches, revealed in the pictures."""
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
_IN_CHART = (
    "collapse",
    "coverage",
    "in_strength",
    "attention",
    "variance",
    "random",
    "fixed_random",
    "collapse_static",
)
_VIEW_PX = 512


def write_page(path: Path, ranking: Ranking, num_shown: int = 4, command: str = "") -> Path:
    """Write the page as one HTML file that needs nothing beside it, and a PNG sheet of its pictures beside it.

    Args:
        path: ends in ``.html``.
        ranking: what was found.
        num_shown: images shown, spread evenly over those that could be read; 0 leaves pictures out.
        command: that made it.
    """
    pictures = dict(_pictures(ranking, num_shown))
    if pictures:
        draw_sheet(path.with_suffix(".png"), list(pictures.items()))
    sections: dict[str, tuple[str, Html | None]] = {
        "orders": ("Orders", _orders(ranking)),
        "agreement": ("Agreement", _agreement(ranking)),
        "curves": ("What the first patches tell", _curves(ranking)),
        "pictures": ("Pictures", _show(pictures)),
        "settings": ("What was run", settings_table({"command": command, **ranking.settings})),
    }
    said = ranking.sentences or ("Nothing was asked of these orders that has a verdict.",)
    caution = (
        "Orders that look at no image stand beside those that do: without them, being better than random does not show "
        "that content matters."
    )
    count = f"{len(ranking.images):,}"
    facts = fact_boxes(
        (
            (count, "images ranked"),
            (f"{len(ranking.skipped):,}", "could not be read"),
            (f"{ranking.cache.grid[0]} × {ranking.cache.grid[1]}", f"patches, images of {ranking.cache.image_size} px"),
            (duration(ranking.seconds), "finding orders"),
        )
    )
    subtitle = f"patches of {ranking.data} ranked by {ranking.source}"
    page = whole_page(
        f"Ranking by {ranking.source}", subtitle, verdict_box("unknown", said, caution), sections, facts=facts
    )
    write_atomically(path, page)
    return path


def _orders(ranking: Ranking) -> Html:
    columns = [name for name in _COLUMNS if any(name in numbers for numbers in ranking.described.values())]
    rows = [
        {"order": name, **{column.replace("_", " "): _text(column, numbers) for column in columns}}
        for name, numbers in ranking.described.items()
    ]
    first = next(iter(ranking.described.values()))
    lead = (
        f"Position share is the number to read first: chance is {1 / max(1, len(ranking.images)):.2g} here, 1 is one "
        "order for all images; orders that look at no image have 1, random ones chance."
    )
    random = first.get("nearest_distance_random", math.nan)
    meaning = {column.replace("_", " "): UNITS[column] for column in columns}
    if "nearest distance" in meaning:
        spread = first.get("nearest_distance_random_sd", math.nan)
        meaning["nearest distance"] += f" ({random:.3f} ± {spread:.3f} for random sets)"
    return join(
        (
            tag("p", lead, class_="lead"),
            _table(["order", *(column.replace("_", " ") for column in columns)], rows),
            tag("details", tag("summary", "What the columns mean"), settings_table(meaning)),
        )
    )


def _text(column: str, numbers: Mapping[str, float]) -> str:
    value = numbers.get(column, math.nan)
    if column == "num_degenerate":
        return "" if math.isnan(value) else f"{value:,.0f}"
    return decimals(value) if column in numbers else ""


def _agreement(ranking: Ranking) -> Html | None:
    parts = []
    columns = ["first", "second", "Spearman", "sd over images", "Kendall", "Jaccard of the first 22 %"]

    def row(first: str, second: str, numbers: Mapping[str, float]) -> dict[str, str]:
        values = (numbers[name] for name in ("spearman", "spearman_sd", "kendall", "jaccard"))
        return dict(zip(columns, (first, second, *map(decimals, values)), strict=True))

    if ranking.agreements:
        pairs = [row(first, second, numbers) for (first, second), numbers in ranking.agreements.items()]
        parts.append(_table(columns, pairs))
    if ranking.against:
        lead = f"The same orders by {ranking.against_source}: what two trainings agree on is a property of the data."
        pairs = [row(name, "the other's", numbers) for name, numbers in ranking.against.items()]
        parts += [tag("h3", "Another training"), tag("p", lead, class_="lead"), _table(columns, pairs)]
    return join(parts) if parts else None


def _curves(ranking: Ranking) -> Html | None:
    if not ranking.curves:
        return None
    lead = (
        f"Of {ranking.scored_on}, by {ranking.predictor}, trained independently of the orders: the fraction of "
        "the tokens' variance that is left when the first k patches are seen. Lower is better. Intervals and "
        "differences to random are 95 % over images, the same images for all orders; they leave out chance in training "
        "the predictor and what found the orders."
    )
    chosen = {name: curve for name, curve in ranking.curves.items() if name in _IN_CHART}
    charts = [
        chart_figure(
            "Variance left",
            "over k, the patches seen",
            line_chart(
                "variance left over the patches seen",
                {name: (curve.counts.tolist(), curve.error.tolist()) for name, curve in chosen.items()},
                size=(5.6, 3.0),
                muted=("random",),
            ),
            "wide",
        ),
        chart_figure(
            "Entropy left",
            "nats a patch above the noise floor, as the predictor says",
            line_chart(
                "entropy left over the patches seen",
                {name: (curve.counts.tolist(), curve.entropy.mean((0, 1)).tolist()) for name, curve in chosen.items()},
                size=(5.6, 3.0),
                muted=("random",),
            ),
            "wide",
        ),
    ]
    columns = ["order", *CURVE_UNITS, "auc_q less random", "sd of draws"]
    rows = []
    for name, numbers in sorted(ranking.curve_scores.items(), key=lambda item: item[1]["auc_q"].value):
        quarter = numbers["auc_q"]
        line = {"order": name}
        line |= {n: f"{decimals(one.value)} ({decimals(one.low)}–{decimals(one.high)})" for n, one in numbers.items()}
        if not math.isnan(quarter.difference):
            line["auc_q less random"] = (
                f"{quarter.difference:+.3f} ({quarter.difference_low:+.3f} to {quarter.difference_high:+.3f})"
            )
        draws = ranking.curves[name].spread_of_draws()
        line["sd of draws"] = "" if math.isnan(draws) else decimals(draws)
        rows.append(line)
    meaning = tag("details", tag("summary", "What the columns mean"), settings_table(CURVE_UNITS))
    table = _table(columns, rows)
    return join((tag("p", lead, class_="lead"), tag("div", *charts, class_="charts"), table, meaning))


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Html:
    """Names of orders are not broken."""
    head = tag("thead", tag("tr", *(tag("th", column) for column in columns)))
    body = (tag("tr", *(tag("td", row.get(column, ""), class_="word") for column in columns)) for row in rows)
    return tag("div", tag("table", head, tag("tbody", *body)), class_="scroll")


def _show(pictures: Mapping[str, Mapping[str, np.ndarray]]) -> Html | None:
    if not pictures:
        return None
    blocks = []
    for name, found in pictures.items():
        cells = [(heading, image_uri(picture), f"{heading}: {name}") for heading, picture in found.items()]
        first = picture_block(name, cells[:3], 1.0)
        rest = [picture_block("", cells[start : start + 3], 1.0) for start in range(3, len(cells), 3)]
        blocks.append(tag("div", first, *rest))
    lead = (
        "Scores from the image's lowest (dark) to its highest (pale); the first 22 % of the patches with their "
        "numbers, and the path through the first twelve; then what the first patches show, beside the same number "
        "by the mean order of all images and by chance."
    )
    return join((tag("p", lead, class_="lead"), picture_blocks(blocks)))


def _pictures(ranking: Ranking, num_shown: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Name of an image -> heading -> picture, of the first order that is an image's own."""
    own = [name for name in ranking.names if name in ranking.cache.stored] or list(ranking.names)
    main, grid = own[0], ranking.cache.grid
    num = grid[0] * grid[1]
    beside: Sequence[str] = [n for n in ("collapse_static", "random") if n == "random" or n in ranking.cache.names]
    for place in spread_evenly(len(ranking.images), num_shown):
        name, sample = ranking.images.names[place], ranking.images.samples[place]
        picture = enlarge(as_picture(eval_image(sample.path, _VIEW_PX, 3, "centre", sample.pixels)), grid)
        orders = {one: look_up(ranking.cache, one, [name], False, draw=place)[0].numpy() for one in (main, *beside)}
        found = {"image": picture}
        if main in ranking.cache.scores:
            scores = ranking.cache.scores_of(main, [name], [False])[0].numpy()
            found[f"scores of {main}"] = heat_picture(picture, scores, grid)
        else:
            found[f"ranks of {main}"] = heat_picture(picture, -np.argsort(orders[main]).astype(np.float64), grid)
        found[f"order of {main}"] = order_picture(picture, orders[main], grid, num_top(num))
        for one in (main, *beside):
            for share in SHARES:
                count = max(1, round(share * num))
                found[f"{one}, {count} of {num}"] = revealed_picture(picture, orders[one], grid, count)
        yield as_text(name), found
