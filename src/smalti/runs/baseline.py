"""The baseline of an encoder: the same network before training, rebuilt from the run's config and seed."""

import dataclasses
import warnings

from smalti.config import read_yaml
from smalti.evaluation import evaluate as evaluation
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import Progress
from smalti.evaluation.evaluate import random_baseline
from smalti.evaluation.paired import with_intervals
from smalti.evaluation.result import Baseline, BaselineKind, Result
from smalti.models.encoder import Encoder
from smalti.models.loading import CHECKPOINTS, STATE_FILE, as_loaded, open_encoder, weights_digest
from smalti.runs.build import build_method
from smalti.runs.config import RunConfig, resolve
from smalti.runs.folder import CONFIG_FILE, INIT_DIGEST, read_run_file


def evaluate(
    encoder: Encoder,
    name: str,
    data: str,
    config: EvalConfig,
    *,
    progress: Progress | None = None,
    figures: bool = False,
) -> list[Result]:
    """Evaluate an encoder and its baseline (:func:`baseline_of`), as ``smalti evaluate`` does.

    Args:
        encoder: on the device to run on.
        name: name of the encoder in the results.
        data: labelled images, as in ``EvalConfig.data``; overrides ``config.data``.
        config: settings of all protocols; ``baseline=False`` leaves the baseline out.
        progress: called as ``progress(what, done, total)`` from time to time.
        figures: also store figures of a few images for report pages, in ``details.shown``.

    Returns:
        One result per protocol, each followed by that of the baseline, if there is one; with ``intervals`` over the
        evaluated images, or over groups of them (``config.groups``).

    Raises:
        ConfigError, DataError, ShapeError: as :func:`smalti.evaluation.protocol.evaluate`.
    """
    baseline = baseline_of(encoder, name, config.seed) if config.baseline else None
    results = evaluation.evaluate(encoder, name, data, config, baseline=baseline, progress=progress, figures=figures)
    return with_intervals(results)


def baseline_of(encoder: Encoder, name: str = "", seed: int = 0) -> Baseline | None:
    """The baseline with which an encoder's scores are compared.

    Args:
        encoder: as returned by :func:`smalti.load`.
        name: name given by the user; ``random:NAME`` has no baseline.
        seed: of the random initialisation of an imported encoder.

    Returns:
        For a run: the same network at step 0, ``untrained`` or (with ``init``) ``before``. For an imported encoder:
        ``random-init``. None for untrained encoders, and for a run whose initial weights no longer exist.
    """
    if encoder.origin is None:
        return None if name.startswith("random:") else random_baseline(encoder, seed)
    origin = encoder.origin
    run = origin.checkpoint.parent.parent
    if not (run / CONFIG_FILE).is_file():
        warnings.warn(
            f"{origin.checkpoint}: the run's {CONFIG_FILE} is missing, so the untrained network can't be rebuilt; "
            "using a random initialisation of the architecture as baseline",
            stacklevel=2,
        )
        return random_baseline(encoder, seed)
    first = run / CHECKPOINTS / f"step_{0:08d}"
    if origin.checkpoint.name == first.name:
        return None
    config = resolve(read_yaml(run / CONFIG_FILE), str(run / CONFIG_FILE))
    kind: BaselineKind = "before" if config.init else "untrained"
    if (first / STATE_FILE).is_file():
        load = dataclasses.replace(origin.load, weights=origin.network)
        return Baseline(kind, lambda: _like(encoder, open_encoder(first, load, quiet=True)))
    if config.init and (known := read_run_file(run).get(INIT_DIGEST)) != weights_digest(config.init):
        problem = "can't be found" if known else "was not recorded"
        warnings.warn(f"{run}: no baseline: init={config.init} has changed, or {problem}", stacklevel=2)
        return None
    classes = encoder.class_head.classes if encoder.class_head is not None else ()
    return Baseline(
        kind,
        lambda: _like(encoder, as_loaded(untrained_network(config, origin.network, classes), origin.load)),
    )


def untrained_network(config: RunConfig, network: str, classes: tuple[str, ...] = ()) -> Encoder:
    """A network of a run as it is before the first step, on the CPU: bit-equal to the checkpoint of step 0.

    Args:
        config: the run's settings.
        network: name of one of the method's networks.
        classes: class names of the classification head, if the method trains one.
    """
    method = build_method(config)
    encoder = method.networks()[network]
    encoder.source = f"step 0 ({network})"
    head = method.class_head(network)
    encoder.class_head = head._replace(classes=classes) if head is not None else None
    encoder.token_pruning = method.token_pruning(network)
    return encoder


def _like(encoder: Encoder, before: Encoder) -> Encoder:
    """The network before training with the pooling of the trained one."""
    before.set_pool(encoder.pool, encoder.prr)
    return before
