"""Arguments, options and output shared by several commands."""

import json
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from smalti.config import build, parse_overrides, read_yaml, to_tree
from smalti.errors import ConfigError
from smalti.registry import use_modules

if TYPE_CHECKING:
    import torch

    from smalti.evaluation.result import Result
    from smalti.models.encoder import Encoder

EncoderSpec = Annotated[
    str,
    typer.Argument(
        metavar="ENCODER",
        help="`RUN`, `FILE.safetensors`, `timm:NAME[@FILE]`, `hf:FOLDER`, `hf:NAME` or `random:NAME`.",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="DIR", help="Images: folder, tar, zip, Parquet, list; `NAME=PATH` forces a reader."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="PATH", help="Where to write the result.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the results as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Partial = Annotated[bool, typer.Option("--partial", help="Accept weights that cover only a part of the model.")]


def _use(modules: list[str] | None) -> list[str] | None:
    use_modules(modules or [])
    return modules


Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import", metavar="MODULE", help="Module or FILE.py that registers methods or protocols.", callback=_use
    ),
]

_TELL_EVERY_S = 60.0


def needed(value: Any, option: str, example: str) -> Any:
    """The value of a required option.

    Raises:
        ConfigError: if it is missing.
    """
    if value is None:
        raise ConfigError(f"{option} is needed, for example {option} {example}")
    return value


def settings_of_run(encoder: str) -> dict[str, Any]:
    """The ``config.yaml`` of the run that ``encoder`` names; empty for other encoders."""
    run = Path(encoder).expanduser()
    for folder in (run, run.parent, run.parent.parent):  # RUN, RUN/best, RUN/checkpoints/step_...
        if (folder / "config.yaml").is_file():
            return read_yaml(folder / "config.yaml")
    return {}


def pixels_of_run(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``scale`` and ``max_pixels`` of a run's settings, if they aren't the defaults."""
    from smalti.data.images.pixels import NO_PIXELS, trained_pixels

    known = to_tree(trained_pixels(tree))
    return {key: value for key, value in known.items() if value != getattr(NO_PIXELS, key)}


def group(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """Remove a group of settings from a tree and return it; empty if it is missing.

    Raises:
        ConfigError: if it is a single value.
    """
    found = tree.pop(name, {})
    if not isinstance(found, dict) or "name" in found:
        raise ConfigError(f"{name} is a group of settings; write {name}.KEY=VALUE")
    return found


T = TypeVar("T")


def take(words: list[str] | None, cls: type[T]) -> T:
    """Settings of a command from its ``KEY=VALUE`` words.

    Raises:
        ConfigError: for an unknown key, or a value that doesn't fit.
    """
    return build(cls, parse_overrides(words or []))


def load_encoder(
    spec: str,
    *,
    weights: str | None = None,
    pool: str | None = None,
    seed: int = 0,
    partial: bool = False,
    load: Mapping[str, Any] | None = None,
    debug: bool = False,
) -> "Encoder":
    """Load an encoder to the CPU by name, with the settings of the group ``load``; ``debug`` lists every tensor."""
    from smalti.models.loading import open_encoder
    from smalti.models.weights import LoadConfig

    config = build(LoadConfig, {**(load or {}), **({"weights": weights} if weights else {})}, group="load")
    encoder = open_encoder(spec, config, seed=seed, partial=partial)
    if debug and encoder.report is not None:
        print(encoder.report.details(), file=sys.stderr)
    if pool:
        encoder.set_pool(pool)
    return encoder


def print_data(data: str, class_depth: Any = None) -> None:
    """Print how the images of a path are read and which are left out: one line on stderr."""
    from smalti.data.images.folders import open_images

    print(f"data: {open_images(data, class_depth=class_depth).account()}", file=sys.stderr)


def best_device() -> "torch.device":
    """The GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def print_results(results: "list[Result]") -> None:
    """Print one table per protocol: the encoder, its baseline, and intervals."""
    from smalti.cli.tables import plain_table, print_table
    from smalti.evaluation.paired import result_cells
    from smalti.evaluation.result import BASELINE_LABELS, describe_result

    baselines = {(result.protocol, result.data): result for result in results if result.is_baseline}
    notes: dict[str, None] = {}
    for result in results:
        if result.is_baseline:
            continue
        baseline = baselines.get((result.protocol, result.data))
        columns = (BASELINE_LABELS[baseline.baseline], "difference") if baseline and baseline.baseline else ()
        table = plain_table(result.protocol, "value", *columns)
        for metric in result.metrics:
            table.add_row(metric, *result_cells(result, baseline, metric))
        print(f"{result.encoder} on {result.data}")
        print(describe_result(result) or "the evaluated images are unknown")
        print_table(table)
        print()
        if "intervals" in result.settings:
            notes[f"In brackets: {result.settings['intervals']}{'; differences are paired' if columns else ''}."] = None
    for line in notes:
        print(line)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    from smalti.files import write_atomically

    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


class Progress:
    """Prints progress, rate and time left: in place on a terminal, else one line per minute."""

    def __init__(self) -> None:
        self._what, self._done, self._first = "", 0, 0
        self._began = self._told = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what or done <= self._done:
            self._what, self._first, self._began, self._told = what, done, now, now
        self._done = done
        is_terminal, is_end = sys.stderr.isatty(), done >= total
        if not (is_terminal or is_end or now - self._told >= _TELL_EVERY_S):
            return
        self._told = now
        rate = (done - self._first) / (now - self._began) if now > self._began else 0.0
        left = f", {rate:.3g}/s, {timedelta(seconds=round((total - done) / rate))} left" if rate and not is_end else ""
        end = "\n" if is_end or not is_terminal else "\r"
        print(f"{what}: {done} of {total}{left}   ", file=sys.stderr, end=end, flush=True)
