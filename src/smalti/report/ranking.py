"""The page of a ranking: what the statistics say, orders beside controls, curves, and pictures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smalti.data.images.decode import as_picture
from smalti.data.images.image_set import as_text
from smalti.data.images.labelled import eval_image
from smalti.files import write_atomically
from smalti.ranking.classes import ClassOrders
from smalti.ranking.rank import Ranking
from smalti.ranking.summary import (
    FRACTIONS,
    NumberTable,
    PicturedImage,
    agreement_tables,
    class_ranks,
    class_table,
    curve_charts,
    curve_table,
    order_table,
    pictured_images,
)
from smalti.report.formats import duration
from smalti.report.order_pictures import draw_sheet, enlarge, heat_picture, order_picture, rank_map, revealed_picture
from smalti.report.parts import Fact, Figure, Picture, PictureBlock, Summary, Table, TableCell
from smalti.report.patch_pictures import image_uri
from smalti.report.render import render

_VIEW_PX = 512
_PER_ROW = 3


@dataclass(frozen=True)
class ExplainedTable:
    """A table with its lead and the meanings of its columns."""

    lead: str
    table: Table
    meanings: Mapping[str, str]


@dataclass(frozen=True)
class ClassSection:
    """One order, class by class."""

    order: str
    maps: Sequence[PictureBlock]
    table: ExplainedTable


@dataclass(frozen=True)
class RankingPage:
    """All that the page shows."""

    title: str
    subtitle: str
    summary: Summary
    facts: Sequence[Fact]
    orders: ExplainedTable
    agreements: Mapping[str, ExplainedTable]
    """Heading -> table."""
    classes: Sequence[ClassSection]
    """Empty if the images have no classes."""
    figures: Sequence[Figure]
    curves: ExplainedTable | None
    """Scores of the curves; None if there is no predictor."""
    pictures: Sequence[Sequence[PictureBlock]]
    """Rows of pictures of each image."""
    info: Mapping[str, Any]


def write_page(path: Path, ranking: Ranking, num_shown: int = 4, command: str = "") -> Path:
    """Write the page as one HTML file that loads nothing, and its pictures as a PNG sheet in the same folder.

    Args:
        path: ends in ``.html``.
        ranking: the result.
        num_shown: images shown, spread evenly over those that could be read; 0 leaves pictures out.
        command: that made it.
    """
    pictures = dict(_pictures(ranking, num_shown))
    if pictures:
        draw_sheet(path.with_suffix(".png"), list(pictures.items()))
    write_atomically(path, render("ranking", ranking_page(ranking, pictures, command)))
    return path


def ranking_page(ranking: Ranking, pictures: Mapping[str, Mapping[str, np.ndarray]], command: str = "") -> RankingPage:
    """The data of the page.

    Args:
        ranking: the result.
        pictures: name of an image -> heading -> picture.
        command: that made it.
    """
    grid = ranking.cache.grid
    charts = [chart for chart in curve_charts(ranking) if not chart.is_constant] if ranking.curves else []
    return RankingPage(
        title=f"Ranking by {ranking.source}",
        subtitle=f"patches of {ranking.data} ranked by {ranking.source}",
        summary=Summary(
            "unknown",
            tuple(ranking.sentences) or ("These statistics have no verdict on the orders.",),
            "Orders that do not look at the image are shown for comparison: an order that is better than a random one "
            "need not depend on the content.",
        ),
        facts=[
            Fact(f"{len(ranking.images):,}", "images ranked"),
            Fact(f"{len(ranking.skipped):,}", "could not be read"),
            Fact(f"{grid[0]} × {grid[1]}", f"patches, images of {ranking.cache.image_size} px"),
            Fact(duration(ranking.seconds), "to compute the orders"),
        ],
        orders=_explained(order_table(ranking)),
        agreements={heading: _explained(table) for heading, table in agreement_tables(ranking).items()},
        classes=[_class_section(name, classes, grid) for name, classes in ranking.by_class.items()],
        figures=[Figure(chart.title, chart.explanation, chart, chart.is_wide) for chart in charts],
        curves=_explained(curve_table(ranking)) if ranking.curves else None,
        pictures=[_blocks(name, found) for name, found in pictures.items()],
        info={"command": command, **ranking.settings},
    )


def _class_section(order: str, classes: Sequence[ClassOrders], grid: tuple[int, int]) -> ClassSection:
    maps = []
    for one in class_ranks(classes):
        heading, alt = f"{one.name} · {one.static_ratio:.2f}", f"mean ranks of {order}: {one.name}"
        picture = Picture(heading, image_uri(rank_map(one.values, grid), ".png"), alt)
        maps.append(PictureBlock("", (picture,), grid[1] / grid[0]))
    return ClassSection(order, maps, _explained(class_table(classes)))


def _explained(data: NumberTable) -> ExplainedTable:
    """Names and numbers are not broken."""
    rows = tuple(tuple(TableCell(text, "word") for text in row) for row in data.rows)
    return ExplainedTable(data.lead, Table(data.columns, rows), data.meanings)


def _blocks(name: str, found: Mapping[str, np.ndarray]) -> list[PictureBlock]:
    pictures = [Picture(heading, image_uri(picture), f"{heading}: {name}") for heading, picture in found.items()]
    rows = [tuple(pictures[start : start + _PER_ROW]) for start in range(0, len(pictures), _PER_ROW)]
    return [PictureBlock(name if number == 0 else "", row, 1.0) for number, row in enumerate(rows)]


def _pictures(ranking: Ranking, num_shown: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Name of an image, and heading -> picture."""
    for one in pictured_images(ranking, num_shown):
        yield as_text(ranking.images.names[one.place]), _pictures_of(ranking, one)


def _pictures_of(ranking: Ranking, one: PicturedImage) -> dict[str, np.ndarray]:
    grid, sample = ranking.cache.grid, ranking.images.samples[one.place]
    picture = enlarge(as_picture(eval_image(sample.path, _VIEW_PX, 3, "centre", sample.pixels)), grid)
    found = {
        "image": picture,
        f"{'scores' if one.has_scores else 'ranks'} of {one.main}": heat_picture(picture, one.values, grid),
        f"order of {one.main}": order_picture(picture, one.orders[one.main], grid, one.num_top),
    }
    num = grid[0] * grid[1]
    for name, order in one.orders.items():
        for fraction in FRACTIONS:
            count = max(1, round(fraction * num))
            found[f"{name}, {count} of {num}"] = revealed_picture(picture, order, grid, count)
    return found
