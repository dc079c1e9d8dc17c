"""The parts that pages have in common, as data; the macros of ``templates/macros.html.jinja`` write them as HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from smalti.charts import Chart

Kind = Literal["better", "same", "worse", "unknown"]


@dataclass(frozen=True)
class Summary:
    """What a page says first."""

    kind: Kind
    sentences: tuple[str, ...]
    note: str = ""
    """Small print below the sentences."""


class Fact(NamedTuple):
    """A number and what it is."""

    value: str
    label: str


@dataclass(frozen=True)
class TableCell:
    """A cell of a table."""

    text: str
    kind: str = ""
    """How it looks: ``number``, ``good``, ``bad``, ``better``, ``worse``, ``word`` (not broken) or ``muted``, separated
    by blanks."""
    note: str = ""
    """Text after it in grey."""
    below: str = ""
    """A second line in grey."""
    hint: str = ""
    """Shown when the mouse is over it."""


@dataclass(frozen=True)
class Table:
    """A table; plain text is a cell of its own."""

    columns: tuple[TableCell | str, ...]
    rows: tuple[tuple[TableCell | str, ...], ...]
    row_kinds: tuple[str, ...] = ()
    """``headline`` or ``muted`` for each row; empty: all alike."""


@dataclass(frozen=True)
class Figure:
    """A chart with its visible title and its explanation."""

    title: str
    explanation: str
    chart: Chart
    is_wide: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture with its heading."""

    heading: str
    uri: str
    """``data:`` URI."""
    alt: str

    @property
    def is_pixelated(self) -> bool:
        """Whether it is enlarged without smoothing: maps of patches, stored losslessly."""
        return self.uri.startswith("data:image/png")


class LegendEntry(NamedTuple):
    """A colour and its meaning."""

    colour: str
    """As CSS writes it."""
    name: str


@dataclass(frozen=True)
class PictureBlock:
    """Pictures of one image, side by side."""

    name: str
    pictures: tuple[Picture, ...]
    aspect: float
    """Width over height."""
    legend: tuple[LegendEntry, ...] = ()

    @property
    def shown_aspect(self) -> float:
        """The aspect on the page, where extreme ones are cut."""
        return min(max(self.aspect, 0.5), 2.0)


@dataclass(frozen=True)
class PictureGroup:
    """Blocks of pictures under one heading; the first few are open, the others folded."""

    title: str
    blocks: tuple[PictureBlock, ...]
    lead: str = ""
    num_open: int = 4

    @property
    def num_columns(self) -> int:
        """Most pictures in a block."""
        return max((len(block.pictures) for block in self.blocks), default=1)


def text_table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Table:
    """A table of plain text; missing cells stay empty."""
    return Table(tuple(columns), tuple(tuple(row.get(column, "") for column in columns) for row in rows))


def css_colour(colour: np.ndarray | Sequence[int]) -> str:
    """``rgb(...)`` of three numbers in 0..255."""
    red, green, blue = (int(value) for value in colour)
    return f"rgb({red},{green},{blue})"
