"""``smalti report``: write a run, a comparison or an evaluation as one page."""

from pathlib import Path
from typing import Annotated

import typer

from smalti.cli.options import Debug, Out
from smalti.errors import ConfigError

NAME = "report"


def command(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Output of train, compare or evaluate.", show_default=False)
    ],
    data: Annotated[
        str | None, typer.Option("--data", metavar="DIR", help="Images to show; default: those it was trained on.")
    ] = None,
    out: Out = None,
    images: Annotated[
        int | None, typer.Option("--images", help="Number of images of a run to show.", show_default="12")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a run, comparison or evaluation as one HTML page.

    The page of a run has curves, feature maps, a patch to click and results. The file is self-contained.
    """
    from smalti.comparison.run import SUMMARY
    from smalti.data.images.folders import open_images
    from smalti.report.comparison import write_comparison
    from smalti.report.evaluation import RESULTS_FILE, write_evaluation
    from smalti.report.run_page import NUM_IMAGES, write_report

    is_comparison, is_evaluation = (run / SUMMARY).is_file(), (run / RESULTS_FILE).is_file()
    if (is_comparison or is_evaluation) and (data or images is not None):
        kind = "a comparison" if is_comparison else "an evaluation"
        raise ConfigError(
            f"{run}: is {kind}, whose page shows the images that were evaluated; leave out --data, --images"
        )
    if is_comparison:
        page = write_comparison(run, out)
    elif is_evaluation:
        page = write_evaluation(run, out)
    else:
        number = NUM_IMAGES if images is None else images
        page = write_report(run, out=out, num_images=number, images=open_images(data) if data else None)
    print(f"written: {page}")
