"""``smalti doctor``: check the machine, the data, and the time and memory that a run needs."""

from pathlib import Path
from typing import Annotated

import typer

from smalti.cli import completion
from smalti.cli.options import Debug, Json, write_json
from smalti.config import parse_overrides
from smalti.files import check_writable

NAME = "doctor"


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA] [KEY=VALUE]...",
            help="Images or recordings, and settings of training, such as batch_size=128.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="DIR", help="Report images of DIR's evaluation split that also occur in DATA."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="Measure a training step of this method.",
            autocompletion=completion.methods,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help="Measure a training step of this recipe.",
            autocompletion=completion.recipes,
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", metavar="ENCODER", help="With --keep: the encoder that is measured."),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option("--keep", metavar="K", help="Measure what encoding only K patches of an image saves."),
    ] = None,
    ranker: Annotated[
        str | None,
        typer.Option("--ranker", metavar="RUN", help="With --keep: a run of ranker that chooses the patches."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the run will be written.")] = Path(),
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Check machine, data, memory, time and disk before a run."""
    if json:
        check_writable(json)
    words = list(words or [])
    data = words.pop(0) if words and _is_data(words[0]) else None

    import sys

    from smalti.api import doctor

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty() and (done == total or done % 100 == 0):
            print(f"reading files: {done} of {total}", file=sys.stderr, end="\n" if done == total else "\r")

    report = doctor(
        data,
        method=method,
        recipe=recipe,
        against=against,
        encoder=encoder,
        keep=keep,
        ranker=ranker,
        out=out,
        overrides=parse_overrides(words),
        progress=show,
    )
    if json:
        write_json(json, report.to_json())
    print("\n".join(report.lines()))


def _is_data(word: str) -> bool:
    """Whether a word is ``PATH`` or ``NAME=PATH``, not a setting."""
    if "=" not in word or "://" in word.partition("=")[0] or Path(word).exists():
        return True
    from smalti.data.images.folders import READERS
    from smalti.data.signals.signal_set import READER

    return word.partition("=")[0] in (*READERS, READER)
