"""``smalti report``: a run as one page."""

from pathlib import Path
from typing import Annotated

import typer

from smalti.cli.options import Debug, Out

NAME = "report"


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    data: Annotated[
        str | None, typer.Option("--data", metavar="DIR", help="Images to show; without it, those it was trained on.")
    ] = None,
    out: Out = None,
    images: Annotated[int, typer.Option("--images", help="How many images are shown.")] = 12,
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page about a run: curves, feature maps, a patch to click, results."""
    from smalti.data.folders import open_images
    from smalti.report.page import write_report

    shown = open_images(data) if data else None
    print(f"written: {write_report(run, out=out, num_images=images, images=shown)}")
