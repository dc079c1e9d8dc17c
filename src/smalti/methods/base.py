"""The contract of a method, and the registry.

A method is a paper as an ``nn.Module``: it says how an image becomes a training sample, what the loss terms are, and
what happens after a step. It is told how far training is (``progress`` in [0, 1]) and asks nobody: it knows no trainer.
"""

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from smalti.config import settings, unknown_key
from smalti.data.images.image_set import ImageSet
from smalti.data.signals.signal_set import SignalSet
from smalti.data.views import ViewMaker, Views
from smalti.errors import ConfigError
from smalti.layers.tokens import TokenConfig, TokenSource, build_tokens
from smalti.models.encoder import ClassHead, Encoder
from smalti.registry import clash, import_outside

M = TypeVar("M", bound="type[Method]")


@dataclass(frozen=True)
class Findings:
    """What a method found when it looked at itself."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    """For the log; the same names each time."""
    warnings: Mapping[str, str] = field(default_factory=dict)
    """Name of a fault to what was seen; told once each."""


@settings
class MethodConfig:
    """Base of the settings of a method: ``method.*`` on the command line."""

    name: str
    """The method, as ``smalti train NAME`` spells it."""


LEAST_GAIN = 0.01
"""A loss that is less than this fraction below the reference's has learned nothing that could be told from it."""


@dataclass(frozen=True)
class Reference:
    """What a predictor that ignores the image gets, beside what the method gets."""

    metric: str
    """What is compared, in words, such as ``the position loss``."""
    value: float
    constant: float
    """Of the predictor that ignores the image."""
    predictor: str
    """Which one that is, such as ``the uniform guess among 64 cells``."""
    higher_is_better: bool = False
    """Of fractions in 0..1: the errors (1 less the value) are compared then."""

    @property
    def gain(self) -> float:
        """By which fraction of the constant predictor's error the method is better; negative where it is worse."""
        value, constant = (1 - self.value, 1 - self.constant) if self.higher_is_better else (self.value, self.constant)
        return (constant - value) / constant if constant > 0 else 0.0

    @property
    def has_learned(self) -> bool:
        """Whether the method is better by at least :data:`LEAST_GAIN`."""
        return self.gain >= LEAST_GAIN

    @property
    def sentence(self) -> str:
        """For people; the first words say where nothing was learned."""
        better = f"{abs(100 * self.gain):.1f} % {'better' if self.gain >= 0 else 'worse'}"
        if self.has_learned:
            return (
                f"{self.metric} is {self.value:.4g} at the end; {self.predictor} gets {self.constant:.4g} without "
                f"looking at the image ({better})"
            )
        return (
            f"nothing learned: {self.metric} is {self.value:.4g} at the end, {better} than {self.predictor}, which "
            f"gets {self.constant:.4g} without looking at the image"
        )


def uniform_guess(row: Mapping[str, float], term: str, count: int, of: str, weight: float = 1.0) -> Reference | None:
    """The reference of a cross-entropy: ``ln K``, which the uniform guess pays whatever the targets.

    Args:
        row: of the log, see :meth:`Method.reference`.
        term: of the loss.
        count: K.
        of: what is guessed, such as ``cells``.
        weight: by which the term was multiplied.
    """
    if not weight or f"loss/{term}" not in row or count < 2:
        return None
    value = row[f"loss/{term}"] / weight
    return Reference(f"the {term} loss", value, math.log(count), f"the uniform guess among {count} {of}")


def same_for_all(row: Mapping[str, float], term: str, entropy: str, weight: float = 1.0) -> Reference | None:
    """The reference of self-distillation: the best distribution that is the same for all images, which pays the entropy
    of the mean target. It is ``ln K`` where prototypes are used alike, and near 0 where all targets are one.

    Args:
        row: of the log, see :meth:`Method.reference`.
        term: of the loss.
        entropy: the observation that holds the entropy of the mean target.
        weight: by which the term was multiplied.
    """
    if not weight or not {f"loss/{term}", entropy} <= row.keys():
        return None
    value = row[f"loss/{term}"] / weight
    return Reference(f"the {term} loss", value, row[entropy], "the best distribution that is the same for all images")


class Method(nn.Module, ABC):
    """Base of all methods: :class:`EncoderMethod` and :class:`TokenMethod`; see ``docs/architecture.md``, contract 2.

    Args:
        config: an instance of the class's ``Config``.
    """

    name: ClassVar[str]
    """As ``smalti train NAME`` spells it; set by :func:`register`."""
    Config: ClassVar[type[MethodConfig]]
    """Settings class; its fields are ``method.*`` on the command line."""
    title: ClassVar[str]
    """The method in a few words."""
    paper: ClassVar[str]
    """Authors, year, arXiv number and version."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Run settings that the paper fixes (``optim`` and such), as a tree; recipes and the user's keys go over them."""
    posttrain_defaults: ClassVar[Mapping[str, Any]] = {}
    """What goes over ``defaults`` where training starts from weights (``init``): low rates, time for fresh heads."""
    pools_images: ClassVar[bool] = False
    """Whether the loss reads one vector an image from the encoder, so that a pooling with parameters learns."""
    needs_labels: ClassVar[bool] = False
    """Whether ``views.labels`` must be there; the run then fills in ``num_classes`` of the settings."""
    takes_labels: ClassVar[bool] = False
    """Whether ``views.labels`` are used where the data has them; the run then fills in ``num_classes``."""
    takes_signals: ClassVar[bool] = False
    """Whether it learns from windows of signals, too: ``(B, C, 1, T)``."""
    signal_defaults: ClassVar[Mapping[str, Any]] = {}
    """What goes over ``defaults`` where the data are signals; may hold settings of the method under ``method``."""
    has_encoder: ClassVar[bool]
    """Whether it trains an encoder, which can be evaluated and exported."""
    export_network: ClassVar[str] = ""
    """Which of :meth:`networks` is exported by default; empty without an encoder."""
    no_weight_decay: ClassVar[tuple[str, ...]] = ()
    """Last parts of names of parameters that are not decayed, beside biases and one-dimensional ones."""
    is_posttraining: ClassVar[bool] = False
    """Whether it continues from trained weights: a run without ``init`` needs the setting ``from_scratch``."""
    reads_field: ClassVar[bool] = False
    """Whether crops read their positions out of a field. For all others a field that weights bring becomes a table."""

    starts_from: ClassVar[tuple[str, ...]] = ()
    """Without an encoder: methods whose runs ``init`` may name, beside its own."""
    needs_start: ClassVar[bool] = False
    """Whether a run must start from another (``init``)."""
    next_command: ClassVar[str] = ""
    """What a user types next, where it is not evaluation; ``{run}`` stands for the run."""

    fit_images: ClassVar[int] = 0
    """How many images :meth:`fit` wants to see; 0: there is nothing to fit."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.observations: dict[str, Tensor] = {}
        """Scalars of the last forward worth watching (entropies, say), detached and on the device; logged."""

    @abstractmethod
    def make_views(self, image_size: int) -> ViewMaker:
        """How an image becomes a training sample, with main crops of ``image_size`` pixels."""

    def fit(self, batches: Iterable[Views]) -> None:
        """Called once, before the first step of a run that starts from nothing: measure what the loss needs to know of
        the images. Every process is given the same batches; what is found is kept in buffers."""
        return

    def bind(self, images: ImageSet | SignalSet, image_size: int) -> None:
        """Called before the first step of a process, and before anything is written: what will be read, in the order of
        ``views.index``, to look up what is known of each image. Nothing of it is kept in checkpoints.

        Raises:
            DataError, ShapeError: if what the method knows is about other images.
        """
        return

    def couplings(self) -> dict[str, bool]:
        """What can couple the samples of a micro-batch in the loss or its statistics, and whether it does here."""
        return {}

    @property
    def couples_samples(self) -> str:
        """What couples the samples of a micro-batch, as text; empty where each sample counts alone, so that a step's
        result depends on ``micro_batch`` by rounding only (stochastic depth and dropout aside: they draw other
        random numbers)."""
        return ", ".join(name for name, couples in self.couplings().items() if couples)

    def check_batch(self, micro_batch: int) -> None:
        """Called before anything is written: refuse a number of images per forward pass that the loss can't take.

        Raises:
            ConfigError: naming the number that is needed.
        """
        return

    @abstractmethod
    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Named loss terms of a batch, scalars that the loop adds up; each a mean over samples, so that the mean over
        processes is the loss of the joined batch. Random draws come from ``views.keys``."""

    def after_backward(self, progress: float) -> None:
        """Called once gradients of a step are complete, before clipping: to drop or change some."""
        return

    def diagnose(self, views: Views, progress: float) -> Findings:
        """Called when the log is written, with the batch of that step: what is too dear to look at in every step. It
        must leave everything as it is, and draw no random number."""
        return Findings()

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """What a predictor that ignores the image would get, to be told at the end of training.

        Args:
            row: means over the end of the log: ``loss/TERM`` and the observations, by name.

        Returns:
            None where no such predictor is known, or the row lacks what is needed.
        """
        return None

    def after_step(self, progress: float) -> None:
        """Called after the optimiser: teacher, centre, queue."""
        return

    @abstractmethod
    def networks(self) -> dict[str, Encoder]:
        """The encoders inside, by name: ``encoder``, or ``student`` and ``teacher``."""

    def class_head(self, network: str) -> ClassHead | None:
        """What tells classes by one of :meth:`networks`; None where nothing does."""
        return None

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser, with ``lr_scale`` and ``weight_decay_scale`` that the schedules multiply.

        Here: biases, one-dimensional parameters and those of :attr:`no_weight_decay` are not decayed, everything else
        is (so are positions, class and mask tokens, as in the official MAE and DINO code).
        """
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                last = name.rpartition(".")[2]
                is_plain = parameter.ndim < 2 or last in ("bias", *self.no_weight_decay)
                (plain if is_plain else decayed).append(parameter)
        return [
            {"params": decayed, "lr_scale": 1.0, "weight_decay_scale": 1.0},
            {"params": plain, "lr_scale": 1.0, "weight_decay_scale": 0.0},
        ]


class EncoderMethod(Method):
    """Base of methods that train an encoder.

    Args:
        encoder: the network to train; a method may hold copies of it.
        config: an instance of the class's ``Config``.
    """

    has_encoder = True
    export_network = "encoder"

    def __init__(self, encoder: Encoder, config: Any) -> None:
        super().__init__(config)


class TokenMethod(Method):
    """Base of methods that learn about the tokens of images and hand on no encoder: what ranks patches, or draws them.

    Args:
        tokens: what a token is; fitted to the images before the first step.
        config: an instance of the class's ``Config``.
    """

    has_encoder = False
    fit_images = 2048

    def __init__(self, tokens: TokenSource, config: Any) -> None:
        super().__init__(config)
        self.tokens = tokens.requires_grad_(False)

    @classmethod
    def make_tokens(cls, config: TokenConfig, own: Any, image_size: int, in_chans: int) -> TokenSource:
        """The token source that the method is built with, without weights that others trained.

        Args:
            config: ``tokens.*``.
            own: the method's settings.
            image_size: side of the images in pixels.
            in_chans: their channels.
        """
        return build_tokens(config, image_size, in_chans)

    def fit(self, batches: Iterable[Views]) -> None:
        """Fit the token source."""
        self.tokens.fit(views.global_crops for views in batches)

    def start_from(self, other: "Method") -> None:
        """Take over all weights of another of the same shape; what this one has beside them stays as it is drawn.

        Raises:
            ConfigError: if some of the other's don't fit.
        """
        own, brought = self.state_dict(), other.state_dict()
        misfits = [key for key, value in brought.items() if key not in own or own[key].shape != value.shape]
        if misfits:
            raise ConfigError(
                f"init is a run of {other.name} of another shape: '{misfits[0]}' does not fit; leave its settings out"
            )
        self.load_state_dict({**own, **brought})

    def networks(self) -> dict[str, Encoder]:
        """None at all."""
        return {}


def refuse_changed(config: Any, names: Sequence[str], why: str) -> None:
    """For settings that would do nothing here: refuse what differs from its default.

    Args:
        config: a method's settings.
        names: of fields of it.
        why: what they are for, to be read after the name.

    Raises:
        ConfigError: for the first of them.
    """
    defaults = type(config)()
    for name in names:
        if getattr(config, name) != getattr(defaults, name):
            raise ConfigError(f"method.{name}={getattr(config, name)} {why}; leave it out")


_REGISTRY: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known under a name.

    Raises:
        ConfigError: if another class has that name, or ``Config`` is no :class:`MethodConfig`.
    """

    def add(cls: M) -> M:
        if not issubclass(cls.Config, MethodConfig):
            raise ConfigError(f"method {name}: {cls.Config.__name__} must be a subclass of MethodConfig")
        other = _REGISTRY.get(name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(clash("method", name, other.__module__, cls.__module__))
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def method_names() -> tuple[str, ...]:
    """All registered methods, sorted; those of other packages, too."""
    importlib.import_module("smalti.methods")
    import_outside("method")
    return tuple(sorted(_REGISTRY))


def get_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ConfigError: if there is none of that name; the nearest is suggested.
    """
    names = method_names()
    if name not in _REGISTRY:
        raise ConfigError(unknown_key(name, names, kind="method"))
    return _REGISTRY[name]
