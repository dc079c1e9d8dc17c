"""``smalti evaluate``: what an encoder's tokens know."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from smalti.cli.options import (
    Data,
    Debug,
    EncoderSpec,
    Json,
    Out,
    Partial,
    Quiet,
    Settings,
    group,
    needed,
    pixels_of_run,
    settings_of_run,
)
from smalti.config import merge, parse_overrides, unknown_key
from smalti.errors import ConfigError

NAME = "evaluate"
PLAIN, GROUPS = ("seed", "batch_size", "pool", "weights"), ("eval", "load")


def command(
    encoder: EncoderSpec,
    words: Settings = None,
    data: Data = None,
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", metavar="A,B", help="Protocols; without it, those that fit the data."),
    ] = None,
    out: Out = None,
    json: Json = None,
    partial: Partial = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Evaluate an encoder on labelled images, beside its baseline.

    The baseline of a run is the same network untrained (or before, where it started from weights); of an imported
    encoder it is the random initialisation of its architecture. eval.baseline=false leaves it out.

    --out DIR also writes results, what stands behind them and a page with figures; of a run, smalti report RUN shows
    them, too.

    Of generated images, --protocol generation judges a folder in an encoder's features: smalti evaluate ENCODER --data
    REAL --protocol generation eval.generated=FOLDER, or smalti evaluate FOLDER ... eval.features=ENCODER.

    Settings: eval.* (eval.split eval.image_size eval.k eval.preset eval.baseline ...), seed, batch_size, pool, weights,
    load.* (how weights of others are fitted: load.pos_antialias load.registers ..., see docs/weights.md).
    """
    data = needed(data, "--data", "DIR")
    tree = parse_overrides(words or [])
    for name in tree:
        if name not in (*PLAIN, *GROUPS):
            raise ConfigError(unknown_key(name, (*PLAIN, *GROUPS)))
    weights, fit = tree.pop("weights", None), group(tree, "load")
    settings = merge({name: tree[name] for name in PLAIN if name in tree}, tree.get("eval", {}))
    if (features := settings.pop("features", None)) is not None:
        settings["generated"], encoder = _as_generated(encoder, settings), str(features)
    settings = as_trained(encoder, str(data), settings)
    if protocol:
        settings["protocols"] = [name.strip() for name in protocol.split(",") if name.strip()]

    from smalti.cli.options import Progress, best_device, load_encoder, print_results, say_data
    from smalti.config import build
    from smalti.data.signals.signal_config import SignalConfig
    from smalti.data.signals.signal_set import open_signals
    from smalti.evaluation.details import write_details
    from smalti.evaluation.protocol import EvalConfig, open_sets, write_results
    from smalti.files import check_folder, check_writable
    from smalti.report.evaluation import RESULTS_FILE, check_free, save_evaluation
    from smalti.runs.baseline import evaluate
    from smalti.runs.folder import CONFIG_FILE, RESULTS, new_results_file

    config = build(EvalConfig, settings, "eval")
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
    if not quiet and "stages" in sets:
        print(f"data: {open_signals(str(data), config.signal or SignalConfig()).account()}", file=sys.stderr)
    elif not quiet:
        say_data(str(data), config.class_depth)
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


def _as_generated(folder: str, settings: dict[str, Any]) -> str:
    """What stands in the encoder's place where ``eval.features`` names the encoder: a folder of generated images.

    Raises:
        ConfigError: if they are named twice, or it is a run, which has drawn nothing yet.
    """
    if settings.get("generated") is not None:
        raise ConfigError(f"eval.generated={settings['generated']}: {folder} is what is judged already; leave one out")
    if (Path(folder).expanduser() / "config.yaml").is_file():
        raise ConfigError(f"{folder}: is a run; draw images first, with smalti generate, and name their folder")
    return folder


def as_trained(encoder: str, data: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Data are read as the run read them, but for the window of signals, and for what the user says."""
    from smalti.data.signals.signal_config import as_read
    from smalti.data.signals.signal_set import is_signals

    tree = settings_of_run(encoder)
    if not is_signals(data):
        return {**pixels_of_run(tree), **settings}
    of_run = tree.get("data")
    known = of_run.get("signal") if isinstance(of_run, dict) else None
    return merge({"signal": as_read(known)} if isinstance(known, dict) else {}, settings)
