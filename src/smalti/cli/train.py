"""``smalti train``: pretrain or post-train an encoder on images."""

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smalti.cli import completion
from smalti.cli.options import Data, Debug, Imports, Out, Quiet
from smalti.config import parse_overrides, read_yaml
from smalti.errors import ConfigError, DataError

if TYPE_CHECKING:
    from smalti.runs.posttrain import Verdict

NAME = "train"


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[METHOD] [KEY=VALUE]...",
            help="A method (see `smalti methods`) and settings, such as steps=1000 optim.lr=1e-3.",
            show_default=False,
            autocompletion=completion.methods,
        ),
    ] = None,
    data: Data = None,
    out: Out = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="ENCODER",
            help="Start from weights: `RUN`, `FILE.safetensors`, `timm:NAME[@FILE]`, `hf:FOLDER` or `hf:NAME`.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help="YAML file of settings, or the name of a shipped one.",
            autocompletion=completion.recipes,
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="Resume an interrupted run.")] = None,
    resume_or_start: Annotated[
        bool, typer.Option("--resume-or-start", help="Resume the run in --out if there is one, else start it.")
    ] = False,
    slurm: Annotated[
        str | None,
        typer.Option(
            "--slurm",
            metavar="KEY=VALUE,...",
            help="Submit the run as a job of SLURM, which is requeued and resumed at its time limit: `nodes=2,gpus=8` "
            "(GPUs per machine), `partition` `time` `cpus` `mem` `account` `qos` `constraint` `warning_s`.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --slurm: print the batch script.")] = False,
    imports: Imports = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a method on a folder of images.

    Common settings: `steps` `batch_size` `encoder` `seed` `devices` `precision` `data.image_size` `optim.lr`. `smalti
    settings` lists all of them, `smalti settings METHOD` those of a method.

    `eval.data=LABELLED eval.every=500` evaluates during training. Interrupted runs resume with `--resume RUN`.
    """
    words = list(words or [])
    if slurm is not None:
        options = {"--data": data, "--out": out, "--init": init, "--recipe": recipe, "--resume": resume}
        flags = [name for name, value in (("--quiet", quiet), ("--debug", debug)) if value]
        for module in imports or []:
            flags += ["--import", module]
        print(_job(slurm, dry_run, words, {name: value for name, value in options.items() if value}, flags))
        return
    if dry_run:
        raise ConfigError("--dry-run prints the script of --slurm; give both")
    method = words.pop(0) if words and "=" not in words[0] else None
    overrides = parse_overrides(words)

    from smalti.runs import train as pretrain

    if resume is not None:
        given = {"a method": method, "--data": data, "--out": out, "--init": init, "--recipe": recipe}
        for name, value in {**given, "--resume-or-start": resume_or_start or None}.items():
            if value is not None:
                raise ConfigError(f"--resume uses the settings of the run; leave out {name}")
        run = pretrain.resume(resume, overrides, quiet=quiet)
    else:
        start = pretrain.resume_or_start if resume_or_start else pretrain.train
        run = start(method, data, out, init=init, recipe=recipe, overrides=overrides, quiet=quiet)
    if os.environ.get("RANK", "0") == "0":
        _print_next_steps(run)


def _job(text: str, dry_run: bool, words: list[str], options: dict[str, str | Path], flags: list[str]) -> str:
    """Submit a run as a job, or only write the script; returns the answer of SLURM, or the script.

    Args:
        text: value of ``--slurm``.
        dry_run: don't submit it.
        words: method and settings.
        options: given options with their values.
        flags: options without values, and those that may be repeated.

    Raises:
        ConfigError: for settings that the run would refuse, as far as they can be checked without the images.
    """
    from smalti.runs.config import resolve
    from smalti.runs.train import given_settings
    from smalti.training.launch import split_batch
    from smalti.training.slurm import batch_script, parse_slurm, submit

    job = parse_slurm(text)
    run = options.get("--resume") or options.get("--out")
    if run is None:
        raise ConfigError("no run directory is given; use --out DIR")
    if "--resume" not in options:
        method = words[0] if words and "=" not in words[0] else None
        overrides = parse_overrides(words if method is None else words[1:])
        init = str(options["--init"]) if "--init" in options else None
        config = resolve(given_settings(method, options.get("--data"), init, options.get("--recipe"), overrides))
        split_batch(config.batch_size, config.micro_batch, job.processes)
        flags = [*flags, "--resume-or-start"]
    given = [part for name, value in options.items() for part in (name, str(value))]
    script = batch_script(job, [sys.executable, "-m", "smalti", "train", *words, *given, *flags], Path(run))
    if dry_run:
        return script.rstrip()
    Path(run).parent.mkdir(parents=True, exist_ok=True)  # SLURM doesn't create the folder of the log
    return submit(script)


def _print_next_steps(run: Path) -> None:
    from smalti.cli.options import print_results
    from smalti.evaluation.result import read_results
    from smalti.methods.base import get_method
    from smalti.runs.folder import read_run_file
    from smalti.runs.posttrain import read_verdict
    from smalti.training.checkpoint import read_state

    state, verdict = read_state(run), None
    first, last = (run / "results" / f"step_{step:08d}.json" for step in (0, state.step))
    try:
        verdict = read_verdict(run)
        if verdict is not None:
            _print_verdict(verdict)
        elif last.is_file():
            baselines = [result for result in read_results(first) if result.is_baseline] if first.is_file() else []
            print_results([*read_results(last), *baselines])
    except DataError as error:  # training has finished even if its results can't be read
        warnings.warn(str(error), stacklevel=2)
    if (reference := read_run_file(run).get("reference")) is not None:
        sentence = str(reference["sentence"])
        print(f"{sentence[0].upper()}{sentence[1:]}.")
    chosen = run
    if state.best_step is not None and state.best_step != state.step:
        chosen = run / "best"
        print(f"trained: {run} (the last step, {state.step}); the best step, {state.best_step}, is {chosen}")
    else:
        print(f"trained: {run}")
    config = read_yaml(run / "config.yaml")
    method = get_method(config["method"]["name"])
    if method.next_command:
        print(f"next:    {method.next_command.format(run=run)}")
        print(f"         smalti report {run}")
        return
    if verdict is None and config.get("init"):
        print(f"not evaluated yet: smalti train --resume {run} eval.data=LABELLED evaluates before and after")
    weights = config.get("weights")
    also = (
        f" weights={weights}" if weights else ""
    )  # else the commands would use another network than the evaluated one
    print(f"next:    smalti evaluate {chosen} --data LABELLED{also}")
    print(f"         smalti report {run}")
    print(f"         smalti export {chosen} to={'onnx' if config.get('gaug') else 'timm'} --out DIR{also}")


def _print_verdict(verdict: "Verdict") -> None:
    from smalti.cli.tables import plain_table, print_table
    from smalti.runs.posttrain import VERDICT_COLUMNS, verdict_cells

    print(verdict.rows[0].data)
    print(verdict.images)
    table = plain_table(*VERDICT_COLUMNS)
    for cells in verdict_cells(verdict):
        table.add_row(*cells)
    print_table(table)
    print(verdict.sentence)
    for note in verdict.notes:
        print(f"  {note}")
