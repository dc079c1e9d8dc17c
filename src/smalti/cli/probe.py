"""``smalti probe``: what a trained method knows, as numbers and pictures."""

from pathlib import Path
from typing import Annotated

import typer

from smalti.cli.options import Data, Debug, Json
from smalti.config import unknown_key
from smalti.errors import ConfigError

NAME = "probe"
KINDS = ("positions",)


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    what: Annotated[
        str, typer.Option("--what", metavar="KIND", help="positions: what PART knows of them.")
    ] = "positions",
    data: Data = None,
    images: Annotated[int, typer.Option("--images", help="How many images are looked at.")] = 32,
    overfit: Annotated[
        bool, typer.Option("--overfit", help="Also learn 8 images by heart, from the start: 1,000 steps.")
    ] = False,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Look into a trained method: consistency, fit, collapse and leaks, kept in RUN/probes for the report."""
    if what not in KINDS:
        raise ConfigError(unknown_key(what, KINDS).replace("settings has no field", "there is no probe"))
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from smalti.cli.options import write_json
    from smalti.files import check_writable
    from smalti.report.positions import draw_positions
    from smalti.runs.probe import UNITS, probe_positions, write_probe

    if json:
        check_writable(json)
    with Progress(transient=True) as bar:
        task = bar.add_task("learning by heart", total=None, visible=overfit)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        probe = probe_positions(run, data, images, learn_by_heart=overfit, progress=progress)
    path = write_probe(run, probe)
    draw_positions(probe, path.with_suffix(".png"))
    if json:
        write_json(
            json, {"metrics": {name: None if value != value else value for name, value in probe.metrics.items()}}
        )
    table = Table("probe", "value", "meaning", title=f"positions of {run}", title_justify="left")
    for name, value in probe.metrics.items():
        table.add_row(name, f"{value:.4g}", UNITS.get(name, ""))
    Console(markup=False).print(table)
    print(f"written: {path} and {path.with_suffix('.png').name}; they stand in the page of: smalti report {run}")
