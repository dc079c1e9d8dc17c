"""Evaluation during training."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from smalti.errors import ConfigError
from smalti.evaluation.config import determining
from smalti.evaluation.evaluate import evaluate, fitting_protocols, open_sets
from smalti.evaluation.result import BaselineKind, Result, write_results
from smalti.methods.base import Method, get_method
from smalti.models.encoder import Encoder
from smalti.models.loading import (
    CHECKPOINTS,
    STATE_FILE,
    load,
)
from smalti.runs.build import build_method
from smalti.runs.config import RunConfig
from smalti.runs.folder import (
    RESULTS,
)
from smalti.runs.posttrain import COSTLESS, BeforeAfter
from smalti.training.launch import (
    resolve_devices,
)
from smalti.training.parallel import is_sharded


def encoder_at(run: Path, config: RunConfig, step: int) -> Encoder:
    """The evaluated network at a step; step 0 works even if its checkpoint was deleted."""
    network = config.weights or get_method(config.method.name).export_network
    checkpoint = run / CHECKPOINTS / f"step_{step:08d}"
    if (checkpoint / STATE_FILE).is_file() or step > 0:
        encoder = load(checkpoint, network=network, quiet=True)
    else:
        encoder = build_method(config).networks()[network]
        encoder.source = f"step {step} ({network})"
    return encoder.to("cpu" if config.devices == "cpu" else resolve_devices("auto").kind)


def evaluated_with(config: RunConfig) -> str:
    """Settings that affect the scores of evaluation during training, as text; empty without evaluation."""
    if not config.eval.data:
        return ""
    return json.dumps({**determining(config.eval, COSTLESS), "weights": config.weights}, sort_keys=True)


class EvaluationHook:
    """Evaluate the exported network before training, every ``eval.every`` steps and after the last step.

    If training starts from weights, also store results for the verdict of :mod:`smalti.runs.posttrain`.
    """

    def __init__(
        self, config: RunConfig, run: Path, evaluates: bool, progress: Callable[[str, int, int], None] | None = None
    ) -> None:
        self.config = config
        self.run = run
        self.progress = progress  # progress callback of evaluations; may stop them by raising an exception
        exported = get_method(config.method.name).export_network
        self.before_and_after = (
            BeforeAfter(run, config.eval, config.weights or exported, exported, progress)
            if config.init and evaluates
            else None
        )
        self.evaluates = (
            evaluates  # only in one process; the others call it, too, since all check for non-finite values together
        )

    def due(self, step: int) -> bool:
        """Before the first step, every ``eval.every`` steps and after the last."""
        every = self.config.eval.every
        return step in (0, self.config.steps) or (every > 0 and step % every == 0)

    def __call__(self, step: int, method: Method) -> float | None:
        """Evaluate; returns the headline metric of the first protocol, negated if lower is better."""
        if not self.evaluates:
            return None
        results = self.evaluate(step, method)
        if not results:
            return None
        metric, value = results[0].headline
        return -value if "lower is better" in results[0].units[metric] else value

    def file(self, step: int) -> Path:
        """Where the results of a step are written."""
        return self.run / RESULTS / f"step_{step:08d}.json"

    def evaluate(self, step: int, method: Method) -> list[Result]:
        """Evaluate and write ``results/step_*.json``; the results of step 0 are the baseline of all others."""
        network = self.config.weights or method.export_network
        encoder = self._encoder(step, method, network)
        encoder.source = f"step {step} ({network})"
        data = str(self.config.eval.data)
        protocols = self.config.eval.protocols or fitting_protocols(data, self.config.eval)
        config = dataclasses.replace(self.config.eval, protocols=protocols)
        results = evaluate(encoder, f"{self.run} (step {step})", data, config, progress=self.progress)
        kind: BaselineKind | None = None
        if step == 0 and config.baseline:
            kind = "before" if self.config.init else "untrained"
        write_results(self.file(step), [dataclasses.replace(result, baseline=kind) for result in results])
        if self.before_and_after is not None:
            self.before_and_after.record(step, results)
            if step == 0 and not self.before_and_after.has(0):
                self.before_and_after.evaluate(0, encoder)
        return results

    def _encoder(self, step: int, method: Method, network: str) -> Encoder:
        """The network to evaluate; of a sharded method, a whole one from the checkpoint of the step."""
        if is_sharded(method):
            return encoder_at(self.run, self.config, step)
        encoder = method.networks()[network]
        encoder.class_head = method.class_head(network)
        encoder.token_pruning = method.token_pruning(network)
        return encoder


def check_evaluation(config: RunConfig) -> None:
    """Check ``eval.*`` before training starts.

    Raises:
        ConfigError, DataError: if the data can't be read or an unknown network is named.
    """
    if config.eval.data:
        open_sets(config.eval.data, config.eval)
        if config.init:
            open_sets(config.eval.data, BeforeAfter(Path(), config.eval).config)
    elif config.eval.every or config.eval.patience:
        name = "every" if config.eval.every else "patience"
        raise ConfigError(f"eval.{name}={getattr(config.eval, name)} needs images to evaluate on; set eval.data=DIR")
    if config.eval.patience and not config.eval.every:
        raise ConfigError(
            f"eval.patience={config.eval.patience} counts evaluations during training; set eval.every=STEPS"
        )
    method = get_method(config.method.name)
    pair = ("student", "teacher")
    names = pair if method.export_network in pair else (method.export_network,)
    if config.weights is not None and config.weights not in names:
        raise ConfigError(f"weights={config.weights}: {method.name} has {', '.join(names)}")
