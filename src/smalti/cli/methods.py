"""``smalti methods``: list the methods."""

import shutil
import textwrap
from typing import Annotated

import typer

from smalti.cli import completion
from smalti.cli.options import Debug, Imports
from smalti.config import unknown_key
from smalti.errors import ConfigError

NAME = "methods"


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="[METHOD]", help="Show one method.", autocompletion=completion.methods)
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table, as in the README.")] = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """List the methods with papers, recipes and results.

    `smalti settings METHOD` lists the settings of a method.
    """
    from smalti.runs.recipes import COLUMNS, catalogue

    rows = catalogue()
    if markdown:
        print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
        for row in rows:
            print("| " + " | ".join(row) + " |")
        return
    names = [row[0] for row in rows]
    if name is not None and name not in names:
        raise ConfigError(unknown_key(name, names, kind="method"))
    width = max(map(len, names)) + 2
    for own, what, paper, file, recipes, reached in rows:
        if name is None:
            print(_row(own, what, width))
            lines = (paper, f"recipes: {recipes}", "" if reached.startswith("*") else f"reached: {reached}")
            print("".join(f"{_row('', line, width)}\n" for line in lines if line))
        elif name == own:
            print(_row("", f"{own}: {what}", 0))
            lines = (f"paper:    {paper}", f"file:     {file}", f"recipes:  {recipes}")
            print("\n".join(_row("", line, 0) for line in (*lines, f"reached:  {reached.strip('*')}")))
            print(f"settings: smalti settings {own}\ntrain:    smalti train {own} --data IMAGES --out RUN")


def _row(head: str, text: str, width: int) -> str:
    """Text after a label, wrapped to the width of the terminal; long words aren't broken, so that they can be
    copied."""
    columns = max(40, shutil.get_terminal_size().columns)
    return textwrap.fill(
        text,
        columns,
        initial_indent=head.ljust(width),
        subsequent_indent=" " * (width or 10),
        break_long_words=False,
        break_on_hyphens=False,
    )
