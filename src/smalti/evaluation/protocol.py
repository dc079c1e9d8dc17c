"""The contract of an evaluation protocol, and the registry.

A protocol is a function in its own file, with its settings class, registered by name with the kind of
data it needs. :func:`smalti.evaluation.evaluate.evaluate` opens the data and computes features once for all protocols.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from smalti.charts import LineChart
from smalti.config import settings as settings_class
from smalti.config import (
    unknown_key,
)
from smalti.errors import ConfigError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.features import Observer
from smalti.evaluation.result import Boxes
from smalti.evaluation.tally import Tally
from smalti.registry import clash, import_outside

Need = Literal["labels", "masks", "boxes", "images", "stages", "windows"]
"""Kind of data a protocol needs; ``images``: no labels, ``stages``: sleep stages of signals, ``windows``: class labels
of windows of signals."""
Run = Callable[[Any, EvalConfig], "Scores"]
"""Maps an :class:`EvaluationContext` (of images: :class:`Features`) and settings to scores; ``config.of(NAME)`` returns
the protocol's own settings."""
OverSteps = Callable[[Sequence[int], Sequence[Mapping[str, float]]], LineChart | None]
"""Maps the steps of a run's evaluations, ascending, and their metrics to a chart; None: too few of them."""
F = TypeVar("F", bound=Run)


@settings_class
class NoSettings:
    """Settings of protocols that have none."""


class Scores(NamedTuple):
    """What a protocol returns; :func:`evaluate` turns it into a :class:`Result`."""

    metrics: dict[str, float]
    """Metric name -> value, the headline metric first."""
    settings: dict[str, Any]
    """Settings that determined the scores, besides the common ones."""
    per_class: dict[str, dict[str, float]]
    """Metric name -> class name -> value."""
    units: Mapping[str, str] = {}
    """Units of metrics that are not :data:`FRACTION`."""
    tallies: Mapping[str, Tally] = {}
    """See :class:`Details`."""
    confusion: np.ndarray | None = None
    """See :class:`Details`."""
    predictions: Mapping[int, np.ndarray] = {}
    """See :class:`Details`; for the places in ``features.shown``."""
    charts: Mapping[str, LineChart] = {}
    """See :class:`Details`."""
    found: Mapping[int, tuple[Boxes, Boxes]] = {}
    """See :class:`Details`; for the places in ``features.shown``."""
    pictures: Mapping[str, np.ndarray] = {}
    """See :class:`Details`."""


@dataclass(frozen=True)
class Protocol:
    """An entry of the registry."""

    name: str
    need: Need
    """Kind of data it needs."""
    settings: type
    """Settings class of ``eval.NAME.*``."""
    run: Run
    summary: str
    """One line for help texts."""
    by_default: bool = True
    """Whether it runs by default if the data supports it."""
    observer: Callable[[Any], Observer] | None = None
    """Creates the observer of the encoder during the pass over test images, from the protocol's settings."""
    prefers: tuple[Need, ...] = ()
    """Kinds of data it uses instead of ``need``, the first that is present: for more metrics or to reuse a pass."""
    has_baseline: bool = True
    """Whether the baseline is evaluated, too; false if the encoder is the measure, not the thing measured."""
    check: Callable[[EvalConfig], None] | None = None
    """Validates the settings before the encoder is loaded."""
    has_presets: bool = True
    """Whether it depends on ``eval.preset``."""
    takes_norm: bool = False
    """Whether it depends on ``eval.norm``."""
    takes_pool: bool = False
    """Whether it depends on ``eval.pool``."""
    priority: int = 0
    """Pages show protocols of higher priority first, and state the first one's result as the verdict."""
    over_steps: OverSteps | None = None
    """Chart of what only all evaluations of a run show."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """Kinds of data it can use."""
        return (self.need, *self.prefers)


_REGISTRY: dict[str, Protocol] = {}


def register_protocol(
    name: str,
    *,
    need: Need,
    settings: type = NoSettings,
    by_default: bool = True,
    observer: Callable[[Any], Observer] | None = None,
    prefers: tuple[Need, ...] = (),
    has_baseline: bool = True,
    check: Callable[[EvalConfig], None] | None = None,
    has_presets: bool = True,
    takes_norm: bool = False,
    takes_pool: bool = False,
    priority: int = 0,
    over_steps: OverSteps | None = None,
) -> Callable[[F], F]:
    """Decorator that registers a function as a protocol; the first line of its docstring is the summary.

    Args:
        name: name on the command line.
        need: kind of data it needs.
        settings: its settings class, decorated with :func:`smalti.config.settings`; all settings have defaults.
        by_default: whether it runs by default if the data supports it.
        observer: creates the observer of the encoder, returned by ``features.observed(name, size)``.
        prefers: kinds of data it uses instead of ``need``, the first that is present.
        has_baseline: whether the baseline is evaluated, too.
        check: validates the settings before the encoder is loaded.
        has_presets: whether it depends on ``eval.preset``.
        takes_norm: whether it depends on ``eval.norm``.
        takes_pool: whether it depends on ``eval.pool``.
        priority: pages show protocols of higher priority first.
        over_steps: makes a chart of all evaluations of a run.

    Raises:
        ConfigError: if the name is taken.
    """

    def register(run: F) -> F:
        summary = (run.__doc__ or "").strip().splitlines()[0]
        other = _REGISTRY[name].run if name in _REGISTRY else run
        if (other.__module__, other.__qualname__) != (run.__module__, run.__qualname__):
            raise ConfigError(clash("protocol", name, other.__module__, run.__module__))
        _REGISTRY[name] = Protocol(
            name=name,
            need=need,
            settings=settings,
            run=run,
            summary=summary,
            by_default=by_default,
            observer=observer,
            prefers=prefers,
            has_baseline=has_baseline,
            check=check,
            has_presets=has_presets,
            takes_norm=takes_norm,
            takes_pool=takes_pool,
            priority=priority,
            over_steps=over_steps,
        )
        return run

    return register


def _registry() -> Mapping[str, Protocol]:
    """All protocols by name, including those of plugins."""
    import_outside("protocol")
    return _REGISTRY


def protocol_names() -> tuple[str, ...]:
    """Names of the registered protocols, in alphabetical order."""
    return tuple(sorted(_registry()))


def priority_of(name: str) -> int:
    """See :attr:`Protocol.priority`; 0 for a protocol that is not installed."""
    known = _registry()
    return known[name].priority if name in known else 0


def over_steps_of(name: str) -> OverSteps | None:
    """See :attr:`Protocol.over_steps`; None for a protocol that is not installed."""
    known = _registry()
    return known[name].over_steps if name in known else None


def find_protocol(name: str) -> Protocol:
    """Look up a protocol by name.

    Raises:
        ConfigError: if it doesn't exist; the nearest name is suggested.
    """
    known = _registry()
    if name in known:
        return known[name]
    raise ConfigError(unknown_key(name, known, kind="protocol"))
