"""Results of an evaluation, and their JSON."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smalti.charts import LineChart
from smalti.data.signals.signal_set import READER
from smalti.evaluation.shown import Shown
from smalti.evaluation.tally import Tally
from smalti.files import write_atomically
from smalti.models.encoder import Encoder
from smalti.reading import reading

_FEW_NAMES = 5
FRACTION = "0 to 1, higher is better"
"""Unit of accuracies and IoUs."""


BaselineKind = Literal["untrained", "before", "random-init"]
BASELINE_LABELS: Mapping[BaselineKind, str] = {
    "untrained": "untrained",
    "before": "before",
    "random-init": "random init",
}
"""Names of baselines in tables and pages: the same network before its first step, with random weights (``untrained``)
or those of ``init`` (``before``), or timm's random initialisation of an imported encoder."""


@dataclass(frozen=True)
class Baseline:
    """A baseline with which an encoder's scores are compared."""

    kind: BaselineKind
    make: Callable[[], Encoder]
    """Builds the encoder; called when it is needed."""

    @property
    def label(self) -> str:
        """Name in tables and pages."""
        return BASELINE_LABELS[self.kind]


@dataclass(frozen=True)
class Result:
    """Result of one protocol for one encoder on one data set; used by CLI, report and comparison."""

    protocol: str
    """Name of the protocol on the command line."""
    encoder: str
    """Name of the encoder given by the user (``runs/a``, ``random:vit_tiny_patch16_224``)."""
    data: str
    """Path of the data set given by the user."""
    metrics: Mapping[str, float]
    """Metric name -> value; the first is the headline."""
    units: Mapping[str, str]
    """Metric name -> unit and direction, such as ``0 to 1, higher is better``."""
    settings: Mapping[str, Any]
    """Everything that determined the numbers: preset, split, sizes, seeds, conventions, counts."""
    per_class: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Metric name -> class name -> value; NaN if a class does not occur."""
    details: "Details | None" = field(default=None, compare=False, repr=False)
    """Per-image details of the scores; not part of the JSON."""
    baseline: BaselineKind | None = None
    """Kind of baseline; None: scores of the evaluated encoder itself."""
    intervals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Metric name -> ``low`` and ``high`` of its interval; if there is a baseline also ``difference``,
    ``difference_low`` and ``difference_high``, paired. Metrics that aren't a sum over images have none. Filled by
    :func:`smalti.evaluate`; ``settings["intervals"]`` describes the resampling."""

    @property
    def headline(self) -> tuple[str, float]:
        """Name and value of the first metric."""
        return next(iter(self.metrics.items()))

    @property
    def is_baseline(self) -> bool:
        """Whether this is the result of a baseline."""
        return self.baseline is not None

    @property
    def subject(self) -> str:
        """What was evaluated: generated images where the settings name them, else the encoder."""
        return str(self.settings.get("generated") or self.encoder)

    @property
    def imported(self) -> str:
        """What is known of weights that come from a file or from timm rather than from a run; empty for all others."""
        return str(self.settings.get("imported") or "")

    @property
    def variant(self) -> str:
        """What per-class scores and pictures depend on besides protocol and data, such as the number of clusters; only
        results of one variant share a figure. Empty: nothing."""
        clusters = self.settings.get("clusters") or ()
        return f"K = {max(clusters)}" if clusters else ""

    @property
    def unit(self) -> str:
        """What :attr:`details` has a row of, and intervals resample: ``images`` or ``recordings``."""
        return "recordings" if self.settings.get("layout") == READER else "images"

    @property
    def reference(self) -> tuple[str, float] | None:
        """Name and headline score of what the evaluated images stand beside, such as real images; None: nothing."""
        known = self.settings.get("reference")
        return (str(known["name"]), float(known["score"])) if isinstance(known, Mapping) else None

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes None, as JSON has no NaN."""
        plain = dataclasses.asdict(dataclasses.replace(self, details=None))
        del plain["details"]
        return _plain(plain)


@dataclass(frozen=True)
class Boxes:
    """Objects in one image, for figures."""

    boxes: np.ndarray
    """``(n, 4)`` x0 y0 x1 y1, relative to the image's width and height."""
    labels: np.ndarray
    """``(n,)`` class of each object."""
    scores: np.ndarray
    """``(n,)`` scores in 0..1; 1 for true objects, 0 for crowds."""


@dataclass(frozen=True)
class Details:
    """Per-image details of a result; for signals, per recording."""

    images: tuple[str, ...]
    """Test images or recordings, relative to their data set; the n of the tallies."""
    classes: tuple[str, ...]
    tallies: Mapping[str, Tally]
    """Metric name -> contribution of each test image; only for metrics that are sums over images."""
    confusion: np.ndarray | None = None
    """``(G, G)`` int64 counts of pixels or images; rows: ground truth, columns: prediction."""
    predictions: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Index of a test image -> ``(M, M)`` class of each pixel, for the few example images."""
    found: Mapping[int, tuple[Boxes, Boxes]] = field(default_factory=dict)
    """Index of a test image -> true and predicted objects, for the few example images."""
    charts: Mapping[str, LineChart] = field(default_factory=dict)
    """Name -> chart, as pages show it. Charts of one name from several encoders are merged into one."""
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Caption -> ``(H, W, 3)`` uint8 figure."""
    shown: Shown | None = None
    """Pictures, masks and patch tokens of the images of ``predictions``; only if requested from :func:`evaluate`."""
    groups: tuple[str, ...] = ()
    """Group of each test image, if a table of the data has groups."""


def describe_result(result: Result) -> str:
    """Context of a result's scores: number of images and split, image size, preset, and what was skipped."""
    settings, parts = result.settings, list[str]()
    if (number := settings.get("num_test")) is not None:
        looked_at = settings.get("num_images")
        subset = f"{looked_at} of " if looked_at is not None and looked_at < number else ""
        parts.append(f"{subset}{number} {settings.get('evaluated', 'images')}")
    if (size := settings.get("image_size")) is not None:
        parts.append(f"{size} px")
    if settings.get("preset") is not None:
        parts.append(f"preset {settings['preset']}")
    if settings.get("keep_curve"):
        parts.append(f"order {settings['order']}")
    if settings.get("clusters"):
        parts.append(f"{settings['num_patches']} patches")
    line = ", ".join(parts)
    if skipped := _skipped(settings):
        line += f"{'; ' if line else ''}skipped: {', '.join(skipped)}"
    return line


def _skipped(settings: Mapping[str, Any]) -> list[str]:
    unreadable = settings.get("num_unreadable", 0)
    evaluated = settings.get("num_unreadable_evaluated", unreadable)
    clusters, missing = settings.get("clusters_left_out") or (), settings.get("classes_without_images") or ()
    names = ", ".join(missing[:_FEW_NAMES]) + (", ..." if len(missing) > _FEW_NAMES else "")
    return [
        *([f"{evaluated} unreadable"] if evaluated else []),
        *([f"{unreadable - evaluated} unreadable in train"] if unreadable > evaluated else []),
        *([f"{settings['num_unlabelled']} without a label"] if settings.get("num_unlabelled") else []),
        *([f"K = {', '.join(map(str, clusters))} (too few patches)"] if clusters else []),
        *(
            [f"{len(missing)} of {settings['num_classes']} classes, which have no such images ({names})"]
            if missing
            else []
        ),
    ]


def results_json(results: list[Result]) -> str:
    """``{"results": [...]}`` as text."""
    return json.dumps({"results": [result.to_json() for result in results]}, indent=2, ensure_ascii=False) + "\n"


def write_results(path: Path, results: list[Result]) -> None:
    """Write results as JSON, atomically."""
    write_atomically(path, results_json(results))


def read_results(path: Path) -> list[Result]:
    """Read results written by :func:`write_results`.

    Raises:
        DataError: if the file is missing or invalid.
    """
    with reading(path, "a file of results"):
        return [_result(row) for row in json.loads(path.read_bytes())["results"]]


def _result(row: Mapping[str, Any]) -> Result:
    """A result from its row in JSON; null becomes NaN. Raises ValueError if a value has the wrong type."""
    texts = [row["protocol"], row["encoder"], row["data"], *row["units"].values()]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"a text is needed, not {wrong[0]!r}")
    if not row["metrics"] or not isinstance(row["settings"], dict):
        raise ValueError("metrics and settings are needed")
    if row.get("baseline") not in (None, *BASELINE_LABELS):
        raise ValueError(f"unknown kind of baseline {row['baseline']!r}")
    groups = {
        key: {name: _numbers(values) for name, values in row.get(key, {}).items()} for key in ("per_class", "intervals")
    }
    return Result(**{**row, "metrics": _numbers(row["metrics"]), **groups})


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    """Convert JSON's null to NaN."""
    return {name: float("nan") if value is None else float(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    return str(value) if isinstance(value, Path) else value
