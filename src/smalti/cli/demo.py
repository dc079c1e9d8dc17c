"""``smalti demo``: train, evaluate and report on the embedded samples."""

from pathlib import Path
from typing import Annotated

import typer

from smalti.cli.options import Debug, Quiet
from smalti.config import parse_overrides

NAME = "demo"


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings of training, such as steps=500 seed=1.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for samples and run.")] = Path(
        "runs/demo"
    ),
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train and evaluate on sample images in a few minutes.

    Writes samples, trains, compares with the untrained network and writes a report.
    """
    overrides = parse_overrides(words or [])

    from smalti.cli.options import print_results
    from smalti.data.images.folders import open_images, read_image
    from smalti.models.loading import load
    from smalti.report.hero import hero_figure
    from smalti.report.run_page import write_report
    from smalti.runs.demo import run_demo

    done = run_demo(out, overrides, quiet=quiet)
    page = write_report(done.run)
    scenes = open_images(done.samples).subset("val").paths[:3]
    hero = hero_figure(
        load(done.run, quiet=True), [read_image(path) for path in scenes], out / "hero.png", size=(96, 96)
    )
    print_results(done.results)
    print(done.verdict)
    print(f"samples: {done.samples}\nrun:     {done.run}\nreport:  {page}\npicture: {hero}")
