"""``smalti methods``: what there is to train."""

from typing import Annotated

import typer

from smalti.cli.options import Debug

NAME = "methods"


def command(
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Show the settings of one.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table, as in the README.")] = False,
    debug: Debug = False,
) -> None:
    """List the methods with paper, recipe and the number reached; or the settings of one."""
    from rich.console import Console
    from rich.table import Table

    from smalti.config import field_docs
    from smalti.methods.base import get_method
    from smalti.runs.recipes import COLUMNS, catalogue

    console = Console()
    if name is not None:
        method = get_method(name)
        console.print(f"[bold]{method.name}[/]: {method.title}; {method.paper}")
        table = Table("setting", "default", "meaning", title_justify="left")
        for field, (default, meaning) in field_docs(method.Config).items():
            table.add_row(f"method.{field}", str(default), " ".join(meaning.split()))
        console.print(table)
        return
    rows = catalogue()
    if markdown:
        print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
        for row in rows:
            print("| " + " | ".join(row) + " |")
        return
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row)
    console.print(table)
