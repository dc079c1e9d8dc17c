"""The command ``smalti``: one file per verb; Smalti's errors become one line and exit code 2."""

import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import smalti
from smalti import streams, threads
from smalti.cli import (
    choose,
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
    settings,
    shard,
    train,
)
from smalti.errors import Interrupted, SmaltiError, exit_code, machine_error

RESUMING = (compare.NAME, generate.NAME, rank.NAME)
"""Commands that resume when they are run again."""
app = typer.Typer(
    name="smalti",
    help="Self-supervised learning on image patches: pretrain vision transformers on your own images, evaluate "
    "their patch tokens, and export the encoder as a plain timm model.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def command_class(more_help: Callable[[], str] | None) -> type[TyperCommand]:
    """Class of a command; ``more_help`` returns Markdown to append to its help."""

    class Verb(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            self.epilog = more_help() if more_help else None  # not earlier: it takes time
            super().format_help(ctx, formatter)

    return Verb


for module in (
    methods,
    settings,
    train,
    evaluate,
    compare,
    choose,
    report,
    probe,
    rank,
    generate,
    export,
    embed,
    doctor,
    samples,
    shard,
    demo,
):
    app.command(module.NAME, cls=command_class(getattr(module, "more_help", None)))(module.command)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"smalti {smalti.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the verb."""


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 a mistake or a problem of the machine, 130 interrupted, 143 ended by
    SIGTERM or SIGHUP, 138 by SIGUSR1, each after a checkpoint."""
    threads.set_environment()  # before anything imports torch
    streams.protect_streams()
    words = sys.argv[1:] if arguments is None else arguments
    if "--debug" not in words:
        streams.warn_in_one_line()
    sys.exit(_run(words))


def _run(words: list[str]) -> int:
    try:
        code = int(app(words, prog_name="smalti", standalone_mode=False) or 0)
        if code == exit_code(signal.SIGINT):  # typer has caught the KeyboardInterrupt
            raise KeyboardInterrupt
        if (error := streams.lost_output()) is not None:
            print(f"smalti: the output can't be printed ({error.strerror}); all files were written", file=sys.stderr)
            return code or 2
        return code
    except Interrupted as end:
        if end.line:
            print(f"smalti: {end.line}", file=sys.stderr)
        return int(end.code or 0)
    except (KeyboardInterrupt, typer.Abort):
        verb = next((word for word in words if not word.startswith("-")), "")
        print(f"smalti: interrupted{'; the same command resumes' if verb in RESUMING else ''}", file=sys.stderr)
        return exit_code(signal.SIGINT)
    except Exception as error:
        line = str(error) if isinstance(error, SmaltiError) else machine_error(error)
        if line is not None and "--debug" in words:
            raise
        line = line or _usage(error)
        if line is None:
            raise
        print(f"smalti: {line}", file=sys.stderr)
        return 2


def _usage(error: Exception) -> str | None:
    """The message for a wrong option; None for any other error."""
    usage = getattr(error, "format_message", None)  # of click's errors, which some releases of typer wrap
    if usage is None:
        return None
    context = getattr(error, "ctx", None)
    verb = f" {context.info_name}" if context is not None and context.parent is not None else ""
    return f"{usage()} (see: smalti{verb} --help)"
