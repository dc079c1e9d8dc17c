"""``smalti choose``: which encoder, layer and image size for these images."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smalti.cli.options import Data, Debug, Out, Quiet, group, needed
from smalti.cli.setting_docs import Setting, describe
from smalti.config import build, parse_overrides
from smalti.errors import ConfigError

if TYPE_CHECKING:
    from smalti.choosing.choose import Choice

NAME = "choose"


def own_settings() -> list[Setting]:
    """For ``smalti settings choose``."""
    from smalti.choosing.choose import ChooseConfig

    return list(describe(ChooseConfig))


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings, such as image_sizes=[224,448], layers=[last], adapt=[] and eval.class_depth=1.",
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    encoders: Annotated[
        str | None,
        typer.Option("--encoders", metavar="A,B,...", help="Encoders to choose from, separated by commas."),
    ] = None,
    labelled: Annotated[
        str | None,
        typer.Option("--labelled", metavar="DIR", help="Labelled images that decide, if those of --data have none."),
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", metavar="minutes=N", help="Wall-clock time for everything.")
    ] = "minutes=30",
    out: Out = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Choose an encoder, layer and image size for your images.

    Frozen encoders are scored on few images, those that stay on more, until the budget or the images are used; then
    the best one is adapted for a few minutes in several ways and compared with itself before.

    Settings: `layers` `image_sizes` `adapt` `protocols` `first_images`, `load.*` of all encoders and `eval.*`. `smalti
    settings choose` explains them.
    """
    folder: Path = needed(out, "--out", "DIR")
    images: str = needed(data, "--data", "IMAGES")
    names: str = needed(encoders, "--encoders", "timm:NAME@FILE,runs/a")
    tree = parse_overrides(words or [])
    evaluation, load = group(tree, "eval"), group(tree, "load")

    from smalti.choosing.choose import ChooseConfig, choose, export_command, write_choice
    from smalti.cli.options import Progress, best_device, load_encoder, print_data
    from smalti.evaluation.config import EvalConfig
    from smalti.report.choice import write_choice_page

    config, settings = build(ChooseConfig, tree), build(EvalConfig, evaluation, group="eval")
    device = best_device()
    for source in dict.fromkeys(filter(None, (images, labelled))):
        print_data(source, settings.class_depth)
    choice = choose(
        [name.strip() for name in names.split(",") if name.strip()],
        images,
        folder,
        lambda spec: load_encoder(spec, seed=settings.seed, load=load).to(device),
        config,
        settings,
        labelled=labelled,
        load_settings=load,
        minutes=_minutes(budget),
        progress=None if quiet else Progress(),
        quiet=quiet,
    )
    numbers = write_choice(choice, folder)
    page = write_choice_page(choice, folder, f"smalti {shlex.join(sys.argv[1:])}")
    _print(choice)
    print("\n".join(choice.sentences))
    print(f"export: {export_command(choice)}")
    print(f"numbers: {numbers}")
    print(f"report: {page}")


def _minutes(budget: str) -> float:
    """The number in ``minutes=N``.

    Raises:
        ConfigError: for anything else.
    """
    key, _, value = budget.partition("=")
    try:
        minutes = float(value)
    except ValueError:
        minutes = 0.0
    if key != "minutes" or not 0 < minutes < float("inf"):
        raise ConfigError(f"--budget {budget}: write --budget minutes=N with a number above 0")
    return minutes


def _print(choice: "Choice") -> None:
    """The last round: score, difference to the best, cost."""
    from smalti.choosing.choose import candidate_cells, candidate_columns
    from smalti.cli.tables import plain_table, print_table

    done = choice.rounds[-1]
    row = done.rows[0]
    print(f"{row.protocol} {row.metric} ({row.unit}) on {done.num_test} images")
    table = plain_table(*candidate_columns(choice))
    for one in done.rows:
        table.add_row(*candidate_cells(choice, one))
    print_table(table)
    print()
