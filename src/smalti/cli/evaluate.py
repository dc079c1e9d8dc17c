"""``smalti evaluate``: evaluate an encoder on labelled images."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from smalti.cli import completion
from smalti.cli.options import (
    Data,
    Debug,
    EncoderSpec,
    Imports,
    Json,
    Out,
    Partial,
    Quiet,
    group,
    needed,
    pixels_of_run,
    settings_of_run,
)
from smalti.cli.setting_docs import Setting, describe
from smalti.config import all_keys, merge, parse_overrides, unknown_key
from smalti.errors import ConfigError
from smalti.registry import listed

NAME = "evaluate"
ELSEWHERE = ("data", "protocols", "every", "patience")
"""Fields of ``eval`` that are options here (``--data``, ``--protocol``), or for evaluation in training."""
PLAIN, GROUPS = ("seed", "batch_size", "pool", "weights"), ("eval", "load")


def command(
    encoder: EncoderSpec,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings, such as eval.image_size=96 eval.preset=full.", show_default=False
        ),
    ] = None,
    data: Data = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            metavar="A,B",
            help="Protocols (listed below); default: those that fit the data.",
            autocompletion=completion.protocols,
        ),
    ] = None,
    out: Out = None,
    json: Json = None,
    partial: Partial = False,
    imports: Imports = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Evaluate an encoder, and compare it with its baseline.

    The baseline of a run is the same network untrained, or before training if it started from weights; the baseline of
    an imported encoder is its random initialisation. `eval.baseline=false` skips it.

    `--out DIR` also writes a report with figures. Results of a run appear in `smalti report RUN`, too.

    Settings: `eval.*` `load.*` `seed` `batch_size` `pool` `weights`. `smalti settings evaluate` explains them.
    """
    data = needed(data, "--data", "DIR")
    tree = parse_overrides(words or [])
    check_names(tree)
    weights, fit = tree.pop("weights", None), group(tree, "load")
    settings = merge({name: tree[name] for name in PLAIN if name in tree}, tree.get("eval", {}))
    settings = as_trained(encoder, str(data), settings)
    if protocol:
        settings["protocols"] = [name.strip() for name in protocol.split(",") if name.strip()]

    from smalti.cli.options import Progress, best_device, load_encoder, print_data, print_results
    from smalti.config import build
    from smalti.data.signals.signal_config import SignalConfig
    from smalti.data.signals.signal_set import open_signals
    from smalti.evaluation.config import EvalConfig
    from smalti.evaluation.details import write_details
    from smalti.evaluation.evaluate import TARGETS, open_sets
    from smalti.evaluation.result import write_results
    from smalti.files import check_folder, check_writable
    from smalti.report.evaluation import RESULTS_FILE, check_free, save_evaluation
    from smalti.runs.baseline import evaluate
    from smalti.runs.folder import CONFIG_FILE, RESULTS, new_results_file

    config = build(EvalConfig, settings, "", "eval")
    run = Path(encoder).expanduser()
    is_run = (run / CONFIG_FILE).is_file()
    if out:
        check_free(out)
        check_writable(out / RESULTS_FILE)
    if json:
        check_writable(json)
    if is_run:
        check_folder(run / RESULTS)
    sets = open_sets(str(data), config)
    if not quiet and sets.keys() & TARGETS:
        print(f"data: {open_signals(str(data), config.signal or SignalConfig()).account()}", file=sys.stderr)
    elif not quiet:
        print_data(str(data), config.class_depth)
    model = load_encoder(encoder, weights=weights, seed=config.seed, partial=partial, load=fit, debug=debug)
    model = model.to(best_device())
    results = evaluate(model, encoder, str(data), config, progress=None if quiet else Progress(), figures=True)
    if is_run:
        file = new_results_file(run)
        write_details(file.with_suffix(""), results)
        write_results(file, results)
    if json:
        write_results(json, results)
    page = save_evaluation(out, results, shlex.join(["smalti", *sys.argv[1:]])) if out else None
    print_results(results)
    if page:
        print(f"report: {page}")


def check_names(tree: Mapping[str, Any]) -> None:
    """Refuse keys that aren't settings of this command, such as settings of training.

    Raises:
        ConfigError: for the first of them, with the nearest name.
    """
    known = (*PLAIN, *GROUPS)
    for name in tree:
        if name not in known:
            from smalti.evaluation.config import EvalConfig
            from smalti.models.weights import LoadConfig

            elsewhere = (*all_keys(EvalConfig, "eval."), *all_keys(LoadConfig, "load."))
            raise ConfigError(unknown_key(name, known, elsewhere=elsewhere))


def more_help() -> str:
    """The protocols, one line each."""
    lines = [f"- `{name}`: {protocol.summary}" for name, protocol in listed("protocol").items()]
    return "\n".join(["Protocols:", "", *lines])


def own_settings() -> list[Setting]:
    """For ``smalti settings evaluate``: settings of this command, without those of evaluation during training only."""
    from smalti.evaluation.config import EvalConfig
    from smalti.models.weights import LoadConfig

    of_eval = list(describe(EvalConfig, "eval."))
    plain = [
        replace(one, key=one.key.removeprefix("eval.")) for one in of_eval if one.key.removeprefix("eval.") in PLAIN
    ]
    grouped = [one for one in of_eval if one.key.removeprefix("eval.") not in (*PLAIN, *ELSEWHERE)]
    (weights, *others) = describe(LoadConfig, "load.")
    return [*plain, replace(weights, key="weights"), *grouped, *others]


def as_trained(encoder: str, data: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Read data as the run did, except for the window of sleep stages and for the user's settings."""
    from smalti.data.signals.signal_set import as_read, is_signals

    tree = settings_of_run(encoder)
    if not is_signals(data):
        return {**pixels_of_run(tree), **settings}
    of_run = tree.get("data")
    known = of_run.get("signal") if isinstance(of_run, dict) else None
    if not isinstance(known, dict):
        return settings
    own = settings.get("signal")
    return merge({"signal": as_read(known, data, own.get("labels") if isinstance(own, dict) else None)}, settings)
