"""Evaluation settings: common ones, and a group for each protocol."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from smalti.config import (
    OWN,
    BatchSize,
    CountFromZero,
    ImageSize,
    PathText,
    Seed,
    Workers,
    build,
    field_names,
    settings,
    to_tree,
    unknown_key,
)
from smalti.data.images.pixels import PixelConfig
from smalti.data.signals.signal_config import SignalConfig
from smalti.errors import ConfigError
from smalti.reading import shorten

Preset = Literal["small", "full", "paper"]
Pool = Literal["auto", "cls", "avg", "map", "prr"]


@settings
class EvalConfig(PixelConfig):
    """Settings of an evaluation. Protocol-specific settings are grouped by name: ``eval.knn.k``."""

    data: PathText | None = None
    """Class folders, images with masks, or any images for protocols without labels; NAME=PATH forces a reader."""
    protocols: tuple[str, ...] = ()
    """Names of the protocols; empty: all that the data supports."""
    split: str | None = None
    """Split to evaluate on, such as val or test; None: the data's own, else a random 20 % (seeded)."""
    every: CountFromZero = 0
    """While training: steps between evaluations; 0: only before and after training."""
    patience: CountFromZero = 0
    """While training: stop after this many consecutive evaluations without a new best; 0: no early stopping."""
    image_size: ImageSize | None = None
    """Side of the images in pixels, a multiple of the patch size; None: the preset's, else the encoder's own."""
    preset: Preset = "small"
    """Sizes and conventions: ``small`` takes minutes on a CPU; ``full`` has the published sizes and our conventions;
    ``paper`` also has the published code's conventions, for comparison with published numbers."""
    pool: Pool = "auto"
    """Image vector: ``cls`` token, ``avg`` (mean patch token), ``prr``, ``map``, or ``auto``: the encoder's own
    (linear-probe: class token, and prr or map where the encoder uses them; finetune: mean patch token)."""
    norm: bool = True
    """Dense protocols: apply the encoder's final norm to patch tokens; false: use the last block's output."""
    batch_size: BatchSize = 64
    """Images per forward pass. Affects memory and time, not the scores."""
    num_workers: Workers = 0
    """Data-loading worker processes; 0: load in the main process. Does not affect the scores."""
    cache_mib: CountFromZero = 2048
    """Memory for cached patch tokens in MiB; larger sets are recomputed each epoch."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """Precision of patch tokens, whether cached or recomputed."""
    seed: Seed = 0
    """Seed of the split (if the data has none), of head initialisation, of data order and of the random baseline."""
    split_seed: Seed | None = None
    """Seed of the split (if the data has none) and of the ``train_size`` subset only; None: ``seed``."""
    train_size: Annotated[float, Field(gt=0)] | None = None
    """Random subset of the training images: a fraction below 1, or a number of images; None: all."""
    baseline: bool = True
    """Also evaluate a baseline: the same network before training (of a run), or at random initialisation (of an
    imported encoder)."""
    groups: str | None = None
    """Regular expression on the relative path of an evaluated image; its first group, or the whole match, is the
    group of the image (video, patient or site). Intervals then resample whole groups; scores don't change.
    None: the column ``group`` of a table of images, if present."""
    class_depth: Annotated[int, Field(ge=1)] | Literal["deepest"] | None = None
    """Nested class folders: how many levels form the class name (1: the outermost, 2: ``a/b``), or ``deepest``: the
    folder that contains the image; None: one level of folders."""
    mask_values: dict[int, int | str] | None = None
    """Mask files: pixel value -> class number or name, such as ``{0: 0, 255: 1}``; other values are an error. None:
    pixel values are line numbers in classes.txt, counted from 0."""
    ignore: tuple[int | str, ...] = ()
    """Mask files: pixel values or class names to ignore; 255 is always ignored, unless ``mask_values`` maps it to a
    class."""
    signal: SignalConfig | None = None
    """Recordings: how to read them; None: the defaults. ``smalti evaluate RUN`` uses the settings of the training run;
    in Python, pass them here."""
    own: dict[str, Any] = Field(default_factory=dict)
    """Protocol-specific settings by name: ``eval.knn.k`` on the command line, ``knn={"k": 20}`` in Python."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: Any) -> Any:
        """Move groups named after a protocol into ``own``, as instances of the protocol's settings class."""
        given = dict(values if isinstance(values, Mapping) else values.kwargs or {})
        known = cls.open_groups() if given.keys() - field_names(cls) or given.get("own") else {}
        own = dict(given.pop("own", None) or {})
        own |= {name: given.pop(name) for name in [*given] if name in known}
        typed = {}
        for name, value in own.items():
            if name not in known:
                raise ConfigError(unknown_key(name, known, kind="protocol"))
            typed[name] = _typed(known[name], name, value)
        return {**given, "own": typed}

    @staticmethod
    def open_groups() -> Mapping[str, type]:
        """Settings groups besides the fields: protocol -> settings class."""
        from smalti.evaluation.protocol import find_protocol, protocol_names

        return {name: find_protocol(name).settings for name in protocol_names()}

    def of(self, protocol: str) -> Any:
        """The settings of one protocol, an instance of its settings class."""
        return self.own[protocol] if protocol in self.own else self.open_groups()[protocol]()


def _typed(cls: type, name: str, value: Any) -> Any:
    """A protocol's settings from plain values.

    Raises:
        ConfigError: for an unknown key or an invalid value.
    """
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"eval.{name}={shorten(repr(value))}: needs settings, such as eval.{name}.KEY=VALUE")
    return build(cls, value, "", f"eval.{name}")


def determining(config: EvalConfig, costless: Collection[str]) -> dict[str, Any]:
    """Plain values of the settings that determine scores, used to look up cached results.

    Args:
        config: the settings.
        costless: names of settings that change no score.
    """
    names = [name for name in field_names(EvalConfig) if name not in (*costless, OWN)]
    shared = {name: to_tree(getattr(config, name)) for name in names}
    return {**shared, **{name: to_tree(config.of(name)) for name in sorted(config.protocols or config.own)}}
