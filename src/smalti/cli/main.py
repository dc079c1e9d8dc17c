"""The command ``smalti``: one file a verb; errors of ours become one line and exit code 2."""

import io
import os
import sys
import warnings
from typing import Annotated, Any

import typer

import smalti
from smalti import threads
from smalti.cli import (
    compare,
    demo,
    doctor,
    embed,
    evaluate,
    export,
    generate,
    methods,
    probe,
    rank,
    report,
    samples,
    train,
)
from smalti.errors import SmaltiError

app = typer.Typer(
    name="smalti",
    help="Smalti learns from the pieces of an image: pretrain vision transformers on your own images, "
    "measure what their patch tokens know, and hand the encoder on as a plain timm model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (methods, train, evaluate, compare, report, probe, rank, generate, export, embed, doctor, samples, demo):
    app.command(module.NAME)(module.command)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"smalti {smalti.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options that stand before the verb."""


def _warn_in_one_line() -> None:
    """Each warning as one line, once, without its place in the code. What a data set leaves out stands in the line
    about that data set; glyphs that matplotlib lacks are drawn by the browser."""
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        is_known = category.__name__ == "LeftOut" or str(message).startswith("Glyph ")
        if str(message) not in shown and not is_known:
            shown.add(str(message))
            print(f"smalti: warning: {message}", file=sys.stderr)

    warnings.showwarning = show


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0 done, 2 a user's mistake, 130 interrupted."""
    threads.set_environment()  # before anything imports torch
    words = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files need not be text
    if "--debug" not in words:
        _warn_in_one_line()
    try:
        sys.exit(app(words, standalone_mode=False) or 0)
    except SmaltiError as error:
        if "--debug" in words:
            raise
        print(f"smalti: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("smalti: interrupted; a training run goes on with: smalti train --resume RUN", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # a reader such as head has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # of click's errors, which some releases of typer carry inside
        if usage is None:
            raise
        context = getattr(error, "ctx", None)
        verb = f" {context.info_name}" if context is not None and context.parent is not None else ""
        print(f"smalti: {usage()} (see: smalti{verb} --help)", file=sys.stderr)
        sys.exit(2)
