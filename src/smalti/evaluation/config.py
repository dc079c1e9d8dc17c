"""Settings of evaluations: those that all protocols share, and each protocol's own."""

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
    """Settings of an evaluation. A protocol's own settings are a group under its name: ``eval.knn.k``."""

    data: PathText | None = None
    """Labelled images: class folders, or images with masks; NAME=PATH forces a reader."""
    protocols: tuple[str, ...] = ()
    """Names of the protocols; empty: all that fit the data."""
    split: str | None = None
    """Split to evaluate on, such as val or test; None: the data's own, else a random 20 % (seeded)."""
    every: CountFromZero = 0
    """While training: evaluate every so many steps; 0: only before and after training."""
    patience: CountFromZero = 0
    """While training: stop after so many evaluations in a row without a new best; 0 never stops early."""
    image_size: ImageSize | None = None
    """Side of the images in pixels, a multiple of the patch size; None: the preset's, else the encoder's own."""
    preset: Preset = "small"
    """Sizes and conventions: ``small`` takes minutes on a CPU; ``full`` has the published sizes and our conventions;
    ``paper`` has the published code's conventions, too, for comparison with published numbers."""
    pool: Pool = "auto"
    """Image vector: ``cls`` token, ``avg`` (mean patch token), ``prr``, ``map``, or ``auto``: the encoder's own
    (linear-probe: class token, and prr or map where the encoder uses them; finetune: mean patch token)."""
    norm: bool = True
    """Protocols with patch tokens: take them after the encoder's final norm; false: as its last block leaves them."""
    batch_size: BatchSize = 64
    """Images that are encoded at a time. Changes memory and time, not the numbers."""
    num_workers: Workers = 0
    """Processes that read images; 0 reads in this process. Does not change the numbers."""
    cache_mib: CountFromZero = 2048
    """Patch tokens up to this size are kept in memory; beyond it they are computed again for each epoch."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """Precision to which patch tokens are rounded, whether they are kept or computed again."""
    seed: Seed = 0
    """Of the split (where the data has none), the heads' initial weights, their order of images, and the baseline."""
    split_seed: Seed | None = None
    """Of the split alone, where the data has none, and of the draw of ``train_size``; None: ``seed``."""
    train_size: Annotated[float, Field(gt=0)] | None = None
    """Use fewer training images, drawn by the seed: a fraction below 1, or their number; None: all."""
    baseline: bool = True
    """Also evaluate the baseline: for a run the same network untrained (or before, where it started from weights), for
    an imported encoder its random initialisation."""
    groups: str | None = None
    """A regular expression on each evaluated image's relative path; its first group, or the whole match, names what
    the image belongs to (a video, patient or site). Intervals then resample whole groups; no score depends on it.
    None: the column ``group`` of a table of images, if there is one."""
    class_depth: Annotated[int, Field(ge=1)] | Literal["deepest"] | None = None
    """Nested class folders: how many of them name the class (1: the outermost, 2: ``a/b``), or ``deepest``: the folder
    of the image; None: there is one above each image."""
    mask_values: dict[int, int | str] | None = None
    """Masks of your own: value in the files -> class, by number or name, such as ``{0: 0, 255: 1}``; other values are
    refused. None: the value is the line in classes.txt, from 0."""
    ignore: tuple[int | str, ...] = ()
    """Masks of your own: values, or names of classes, whose pixels are ignored; 255 is always ignored, unless
    ``mask_values`` gives it a class."""
    signal: SignalConfig | None = None
    """Recordings: how they are read; None: the defaults. ``smalti evaluate RUN`` fills in what the run was trained
    with; from Python, say it here."""
    own: dict[str, Any] = Field(default_factory=dict)
    """Settings of single protocols by name: ``eval.knn.k`` on the command line, ``knn={"k": 20}`` in Python."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: Any) -> Any:
        """Move groups that are named after a protocol into ``own``, as instances of the protocol's settings class."""
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
        """Groups beside the fields: protocol -> its settings class."""
        from smalti.evaluation.protocol import find_protocol, protocol_names

        return {name: find_protocol(name).settings for name in protocol_names()}

    def of(self, protocol: str) -> Any:
        """The settings of one protocol, an instance of its settings class."""
        return self.own[protocol] if protocol in self.own else self.open_groups()[protocol]()


def _typed(cls: type, name: str, value: Any) -> Any:
    """A protocol's settings from plain values.

    Raises:
        ConfigError: for the first key or value that can't be used.
    """
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"eval.{name}={shorten(repr(value))}: needs settings, such as eval.{name}.KEY=VALUE")
    return build(cls, value, "", f"eval.{name}")


def determining(config: EvalConfig, costless: Collection[str]) -> dict[str, Any]:
    """Plain values of the settings that determine scores, by which results are found again.

    Args:
        config: the settings.
        costless: names of those that change no score.
    """
    names = [name for name in field_names(EvalConfig) if name not in (*costless, OWN)]
    shared = {name: to_tree(getattr(config, name)) for name in names}
    return {**shared, **{name: to_tree(config.of(name)) for name in sorted(config.protocols or config.own)}}
