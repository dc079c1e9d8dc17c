"""The base class of methods, and their registry.

A method is a paper as an ``nn.Module``: it defines the views of an image, the loss terms, and the updates after a step.
It gets the progress of training (in [0, 1]) as an argument and does not depend on the training loop.
"""

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import settings, unknown_key
from smalti.data.dataset import Dataset
from smalti.data.views import ViewMaker, Views
from smalti.errors import ConfigError
from smalti.layers.token_pruning import TokenPruning
from smalti.layers.tokens import TokenConfig, TokenSource, build_tokens
from smalti.models.encoder import ClassHead, Encoder
from smalti.registry import clash, import_outside

M = TypeVar("M", bound="type[Method]")


@dataclass(frozen=True)
class Findings:
    """Result of :meth:`Method.diagnose`."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    """Numbers for the log; the same names each time."""
    warnings: Mapping[str, str] = field(default_factory=dict)
    """Name of a problem to its description; each is shown once."""


@settings
class MethodConfig:
    """Base of the settings of a method: ``method.*`` on the command line."""

    name: str
    """Name of the method, as in ``smalti train NAME``."""


LEAST_GAIN = 0.01
"""Smallest improvement over the reference, as a fraction of its loss, that counts as learning."""


@dataclass(frozen=True)
class Reference:
    """The score of a predictor that ignores the image, and the method's."""

    metric: str
    """Name of the score, such as ``the position loss``."""
    value: float
    """The method's score."""
    constant: float
    """Score of the predictor that ignores the image."""
    predictor: str
    """That predictor, such as ``the uniform guess among 64 cells``."""
    higher_is_better: bool = False
    """For fractions in 0..1: compare the errors, 1 minus the score."""

    @property
    def gain(self) -> float:
        """Improvement as a fraction of the constant predictor's error; negative if the method is worse."""
        value, constant = (1 - self.value, 1 - self.constant) if self.higher_is_better else (self.value, self.constant)
        return (constant - value) / constant if constant > 0 else 0.0

    @property
    def has_learned(self) -> bool:
        """Whether the gain is at least :data:`LEAST_GAIN`."""
        return self.gain >= LEAST_GAIN

    @property
    def sentence(self) -> str:
        """The comparison in words; starts with "nothing learned" if the gain is too small."""
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
    """The reference of a cross-entropy: ``ln K``, the loss of the uniform guess for any targets.

    Args:
        row: means over the end of the log, see :meth:`Method.reference`.
        term: name of the loss term.
        count: K.
        of: name of the classes, such as ``cells``.
        weight: factor of the term in the loss.
    """
    if not weight or f"loss/{term}" not in row or count < 2:
        return None
    value = row[f"loss/{term}"] / weight
    return Reference(f"the {term} loss", value, math.log(count), f"the uniform guess among {count} {of}")


def same_for_all(row: Mapping[str, float], term: str, entropy: str) -> Reference | None:
    """The reference of self-distillation: the loss of the best distribution that is the same for all images, which is
    the entropy of the mean target. It is ``ln K`` if all prototypes are used equally, and near 0 after a collapse.

    Args:
        row: means over the end of the log, see :meth:`Method.reference`.
        term: name of the loss term.
        entropy: name of the observation with the entropy of the mean target.
    """
    if not {f"loss/{term}", entropy} <= row.keys():
        return None
    value = row[f"loss/{term}"]
    return Reference(f"the {term} loss", value, row[entropy], "the best distribution that is the same for all images")


class Method(nn.Module, ABC):
    """Base of all methods: :class:`EncoderMethod` and :class:`TokenMethod`; see ``docs/architecture.md``, contract 2.

    Args:
        config: an instance of the class's ``Config``.
    """

    name: ClassVar[str]
    """Name in ``smalti train NAME``; set by :func:`register`."""
    Config: ClassVar[type[MethodConfig]]
    """Settings class; its fields are ``method.*`` on the command line."""
    title: ClassVar[str]
    """The method in a few words."""
    paper: ClassVar[str]
    """Authors, year, arXiv number and version."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Run settings of the paper (``optim`` and others), as a tree; recipes and the user's settings override them."""
    posttrain_defaults: ClassVar[Mapping[str, Any]] = {}
    """Overrides of ``defaults`` when training starts from weights (``init``): lower rates, warm-up of new heads."""
    pools_images: ClassVar[bool] = False
    """Whether the loss uses one vector per image from the encoder, so that a pooling with parameters is trained."""
    needs_labels: ClassVar[bool] = False
    """Whether ``views.labels`` are required; the run then sets ``num_classes``."""
    takes_labels: ClassVar[bool] = False
    """Whether ``views.labels`` are used if the data has them; the run then sets ``num_classes``."""
    needs_num_images: ClassVar[bool] = False
    """Whether the loss has a class per image; the run then sets ``num_images``."""
    takes_signals: ClassVar[bool] = False
    """Whether the method also trains on windows of signals, ``(B, C, 1, T)``."""
    signal_defaults: ClassVar[Mapping[str, Any]] = {}
    """Overrides of ``defaults`` for signals; may contain method settings under ``method``."""
    has_encoder: ClassVar[bool]
    """Whether it trains an encoder, which can be evaluated and exported."""
    export_network: ClassVar[str] = ""
    """Which of :meth:`networks` is exported by default; empty without an encoder."""
    no_weight_decay: ClassVar[tuple[str, ...]] = ()
    """Last parts of the names of parameters without weight decay, in addition to biases and one-dimensional ones."""
    is_posttraining: ClassVar[bool] = False
    """Whether the method needs trained weights: a run without ``init`` needs the setting ``from_scratch``."""
    hides_positions: ClassVar[bool] = False
    """Whether the loss predicts positions that the network isn't given; such methods refuse ``gaug=true``."""
    runs_parts_of_blocks: ClassVar[bool] = False
    """Whether the loss calls parts of transformer blocks; with ``parallel=fsdp``, blocks are then gathered together."""
    reads_field: ClassVar[bool] = False
    """Whether crops read positions from a field. For other methods, a field in the initial weights becomes a table."""

    starts_from: ClassVar[tuple[str, ...]] = ()
    """Methods without an encoder: other methods whose runs ``init`` may name."""
    needs_start: ClassVar[bool] = False
    """Whether a run must start from another run (``init``)."""
    next_command: ClassVar[str] = ""
    """Next command for the user, if it isn't evaluation; ``{run}`` is replaced by the run."""

    log_columns: ClassVar[Mapping[str, LogColumn]] = {}
    """Names of :attr:`observations` and of numbers of :meth:`diagnose` -> title and meaning. Pages draw the columns
    that are explained here, and list the last values of the others."""

    fit_images: ClassVar[int] = 0
    """Number of images for :meth:`fit`; 0: nothing to fit."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.observations: dict[str, Tensor] = {}
        """Scalars of the last forward pass for the log, such as entropies; detached, on the device."""

    @abstractmethod
    def make_views(self, image_size: int) -> ViewMaker:
        """The transform from an image to a training sample, with main crops of ``image_size`` pixels."""

    def fit(self, batches: Iterable[Views]) -> None:
        """Called once, before the first step of a new run: estimate statistics of the images that the loss needs. Every
        process gets the same batches; results are stored in buffers."""
        return

    def bind(self, images: Dataset, image_size: int) -> None:
        """Called before the first step of a process, and before anything is written: the data set, in the order of
        ``views.index``, for methods that look up data per image. Not stored in checkpoints.

        Raises:
            DataError, ShapeError: if the method's data belong to other images.
        """
        return

    def couplings(self) -> dict[str, bool]:
        """Parts of the loss that can couple the samples of a micro-batch, and whether each is active."""
        return {}

    @property
    def couples_samples(self) -> str:
        """Active couplings as text. Empty if samples are independent: a step then depends on ``micro_batch`` only by
        rounding (and by the random numbers of dropout)."""
        return ", ".join(name for name, couples in self.couplings().items() if couples)

    def check_batch(self, micro_batch: int) -> None:
        """Called before anything is written: refuse a number of images per forward pass that the loss cannot use.

        Raises:
            ConfigError: names the required number.
        """
        return

    @abstractmethod
    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Named loss terms of a batch: scalars that the loop sums. Each is a mean over samples, so that the mean over
        processes is the loss of the joint batch. Random numbers derive from ``views.keys``."""

    def after_backward(self, progress: float) -> None:
        """Called when the gradients of a step are complete, before clipping, to drop or change some."""
        return

    def diagnose(self, views: Views, progress: float) -> Findings:
        """Called when the log is written, with the batch of that step: measurements too expensive for every step. Must
        not change any state or use global random numbers."""
        return Findings()

    def reference(self, row: Mapping[str, float]) -> Reference | None:
        """Score of a predictor that ignores the image, for the summary at the end of training.

        Args:
            row: means over the end of the log: ``loss/TERM`` and observations, by name.

        Returns:
            None if no such predictor is known, or the row lacks the values.
        """
        return None

    def after_step(self, progress: float) -> None:
        """Called after the optimiser's step, to update teacher, center or queue."""
        return

    @abstractmethod
    def networks(self) -> dict[str, Encoder]:
        """The method's encoders by name: ``encoder``, or ``student`` and ``teacher``."""

    def class_head(self, network: str) -> ClassHead | None:
        """The classification head of one of :meth:`networks`; None if there is none."""
        return None

    def token_pruning(self, network: str) -> TokenPruning | None:
        """The learned pruning of one of :meth:`networks`; None if there is none."""
        return None

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser; schedules are multiplied by ``lr_scale`` and ``weight_decay_scale``.

        By default, biases, one-dimensional parameters and those of :attr:`no_weight_decay` have no weight decay;
        everything else has (positions, class and mask tokens, too, as in the official MAE and DINO code).
        """
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                last = name.rpartition(".")[2]
                is_plain = parameter.ndim < 2 or last in ("bias", *self.no_weight_decay) or name.endswith("rope.freqs")
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
    """Base of methods that train on tokens of images and export no encoder: patch ranking and generation.

    Args:
        tokens: maps images to tokens; fitted to the images before the first step.
        config: an instance of the class's ``Config``.
    """

    has_encoder = False
    fit_images = 2048

    def __init__(self, tokens: TokenSource, config: Any) -> None:
        super().__init__(config)
        self.tokens = tokens.requires_grad_(False)

    @classmethod
    def make_tokens(cls, config: TokenConfig, own: Any, image_size: int, in_chans: int) -> TokenSource:
        """The token source that the method is built with, before pretrained weights are loaded.

        Args:
            config: ``tokens.*``.
            own: settings of the method.
            image_size: side of the images in pixels.
            in_chans: channels of the images.
        """
        return build_tokens(config, image_size, in_chans)

    def fit(self, batches: Iterable[Views]) -> None:
        """Fit the token source."""
        self.tokens.fit(views.global_crops for views in batches)

    def start_from(self, other: "Method") -> None:
        """Load all weights of another method of the same shape; additional weights keep their initial values.

        Raises:
            ConfigError: if some of the other's weights don't fit.
        """
        own, brought = self.state_dict(), other.state_dict()
        misfits = [key for key, value in brought.items() if key not in own or own[key].shape != value.shape]
        if misfits:
            raise ConfigError(
                f"init is a run of {other.name} with other sizes ('{misfits[0]}' does not fit); leave the method's "
                "settings out"
            )
        self.load_state_dict({**own, **brought})

    def networks(self) -> dict[str, Encoder]:
        """No encoders."""
        return {}


def refuse_changed(config: Any, names: Sequence[str], why: str) -> None:
    """Refuse settings without effect that differ from their defaults.

    Args:
        config: a method's settings.
        names: names of fields.
        why: text after the name that explains it.

    Raises:
        ConfigError: for the first one.
    """
    defaults = type(config)()
    for name in names:
        if getattr(config, name) != getattr(defaults, name):
            raise ConfigError(f"method.{name}={getattr(config, name)} {why}; leave it out")


_REGISTRY: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[M], M]:
    """Class decorator: register a method under a name.

    Raises:
        ConfigError: if the name is taken, or ``Config`` isn't a :class:`MethodConfig`.
    """

    def add(cls: M) -> M:
        if not issubclass(cls.Config, MethodConfig):
            raise ConfigError(f"method {name}: {cls.Config.__name__} must be a subclass of MethodConfig")
        if (named := cls.Config.__pydantic_fields__["name"].default) != name:  # type: ignore[attr-defined]
            given = f"says {named!r}" if isinstance(named, str) else "has no default"
            raise ConfigError(
                f'method {name}: the field name of {cls.Config.__name__} {given}; add name: str = "{name}"'
            )
        other = _REGISTRY.get(name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(clash("method", name, other.__module__, cls.__module__))
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def method_names() -> tuple[str, ...]:
    """Names of all registered methods, sorted, including those of other packages."""
    importlib.import_module("smalti.methods")
    import_outside("method")
    return tuple(sorted(_REGISTRY))


def get_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ConfigError: for an unknown name, with the nearest one.
    """
    names = method_names()
    if name not in _REGISTRY:
        raise ConfigError(unknown_key(name, names, kind="method"))
    return _REGISTRY[name]
