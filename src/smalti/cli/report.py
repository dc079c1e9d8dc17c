"""``smalti report``: a run as one page."""

from pathlib import Path
from typing import Annotated

import typer

from smalti.cli.options import Debug, Out

NAME = "report"


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    out: Out = None,
    images: Annotated[int, typer.Option("--images", help="How many images are shown.")] = 12,
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page about a run: curves, feature maps, a patch to click, results."""
    from smalti.report.page import write_report

    print(f"written: {write_report(run, out=out, num_images=images)}")
