"""``smalti probe``: analyse what a trained method has learned."""

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
        str, typer.Option("--what", metavar="KIND", help="`positions`: what PART has learned about them.")
    ] = "positions",
    data: Data = None,
    images: Annotated[int, typer.Option("--images", help="Number of images, or windows of recordings.")] = 32,
    overfit: Annotated[
        bool, typer.Option("--overfit", help="Also overfit 8 of them from scratch, in 1,000 steps.")
    ] = False,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Analyse what a run of PART has learned about positions.

    Measures consistency, fit, collapse and leaks. Results are written to RUN/probes and appear in the report.
    """
    if what not in KINDS:
        raise ConfigError(unknown_key(what, KINDS, kind="probe"))
    from rich.progress import Progress
    from rich.table import Table

    from smalti.cli.options import write_json
    from smalti.cli.tables import print_table
    from smalti.files import check_writable
    from smalti.report.positions import draw_positions
    from smalti.runs.probe import UNITS, probe_positions, write_probe

    if json:
        check_writable(json)
    with Progress(transient=True) as bar:
        task = bar.add_task("overfitting", total=None, visible=overfit)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        probe = probe_positions(run, data, images, run_overfit=overfit, progress=progress)
    path = write_probe(run, probe)
    draw_positions(probe, path.with_suffix(".png"))
    if json:
        write_json(
            json, {"metrics": {name: None if value != value else value for name, value in probe.metrics.items()}}
        )
    table = Table("probe", "value", "meaning", title=f"positions of {run}", title_justify="left")
    for name, value in probe.metrics.items():
        table.add_row(name, f"{value:.4g}", UNITS.get(name, ""))
    print_table(table)
    print(f"written: {path} and {path.with_suffix('.png').name}; smalti report {run} shows them")
