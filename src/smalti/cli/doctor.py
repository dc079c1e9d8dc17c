"""``smalti doctor``: what is installed, what the images are like, what a run will need."""

from pathlib import Path
from typing import Annotated

import typer

from smalti.cli.options import Debug, Json, write_json
from smalti.config import merge, parse_overrides
from smalti.files import check_writable

NAME = "doctor"


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA] [KEY=VALUE]...",
            help="Images or recordings to look at, and settings as for train, such as batch_size=128.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="DIR", help="Report images of DIR's evaluated split that DATA trains on."),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="METHOD", help="Measure a training step of this method.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="Measure a step of this recipe.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where a run would be written.")] = Path(),
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Look at this machine, at images or recordings, and at what a run will need in memory, time and disk."""
    if json:
        check_writable(json)
    words = list(words or [])
    data = words.pop(0) if words and _is_data(words[0]) else None
    tree = parse_overrides(words)

    import sys

    from smalti.config import build, read_yaml
    from smalti.preflight.report import doctor, measure_step
    from smalti.runs.config import DataConfig, with_signals

    tree = merge(tree, {"data": {"path": data}} if data else {})
    if method or recipe or tree.keys() - {"data"}:
        from smalti.cli.options import best_device
        from smalti.preflight.step import shared_by_workers, step_maker
        from smalti.runs.config import resolve, with_start
        from smalti.runs.recipes import find_recipe
        from smalti.training.launch import num_processes

        given = read_yaml(find_recipe(recipe)) if recipe else {}
        given = merge(merge(given, {"method": {"name": method}} if method else {}), tree)
        config = resolve(with_start(with_signals(given)), str(recipe) if recipe else "settings")
        settings = config.data
        device = best_device()
        make_step, checkpoint_mib = step_maker(config, device)
        step = measure_step(
            make_step,
            batch_size=config.batch_size,
            steps=config.steps,
            micro_batch=config.micro_batch,
            processes=num_processes(config.devices),
            device=device,
            checkpoint_mib=checkpoint_mib,
            keep=config.checkpoint.keep,
            shared_mib=shared_by_workers(config),
        )
    else:
        settings, step = build(DataConfig, with_signals(tree).get("data", {}), group="data"), None

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty() and (done == total or done % 100 == 0):
            print(f"reading images: {done} of {total}", file=sys.stderr, end="\n" if done == total else "\r")

    report = doctor(data, settings, against=against, out=out, step=step, progress=show)
    if json:
        write_json(json, report.to_json())
    print("\n".join(report.lines()))


def _is_data(word: str) -> bool:
    """Whether it is ``PATH`` or ``NAME=PATH``, not a setting."""
    if "=" not in word or Path(word).exists():
        return True
    from smalti.data.images.folders import READERS
    from smalti.data.signals.signal_set import READER

    return word.partition("=")[0] in (*READERS, READER)
