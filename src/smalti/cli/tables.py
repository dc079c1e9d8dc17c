"""Tables on the terminal, never truncated."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_WIDEST = 10_000


def print_table(table: "Table") -> None:
    """Print a table without truncation: in a pipe or file as wide as needed, one line per row; on a terminal wrapped
    between words to its width, or as wide as the longest words need.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(markup=False)
    wide = console.options.update(width=_WIDEST)
    sizes = [
        [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)] for column in table.columns
    ]
    least, widths = ([max(size[end] for size in cells) for cells in sizes] for end in (0, 1))
    borders = Measurement.get(console, wide, table).maximum - sum(widths)
    while console.is_terminal and sum(widths) + borders > console.width and widths != least:
        place = max(range(len(widths)), key=lambda place: widths[place] - least[place])
        widths[place] -= 1
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    console.width = max(console.width, sum(widths) + borders)
    console.print(table)


def plain_table(*columns: str) -> "Table":
    """A table without lines.

    Args:
        columns: column headers.
    """
    from rich.table import Table

    return Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
