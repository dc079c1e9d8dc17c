"""The contract of an evaluation: an encoder and labelled data in, a Result out."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smalti.config import write_atomically
from smalti.errors import DataError


@dataclass(frozen=True)
class Result:
    """What one protocol found about one encoder on one data set; the same object for CLI, report and comparison."""

    protocol: str
    """Name of the protocol, as the command line spells it."""
    encoder: str
    """The encoder as the user named it (``runs/a``, ``random:vit_tiny_patch16_224``)."""
    data: str
    """The data set as the user named it."""
    metrics: Mapping[str, float]
    """Name -> value; the first is the headline. Scores lie in 0..1."""
    units: Mapping[str, str]
    """Metric name -> unit and direction, such as ``share, higher is better``."""
    settings: Mapping[str, Any]
    """Everything that determined the numbers: preset, split, sizes, seeds, conventions, counts."""
    per_class: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Metric name -> class name -> value; NaN where a class does not occur."""

    @property
    def headline(self) -> tuple[str, float]:
        """Name and value of the first metric."""
        return next(iter(self.metrics.items()))

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes None, as JSON has none."""
        return _plain(dataclasses.asdict(self))


def results_json(results: list[Result]) -> str:
    """``{"results": [...]}`` as text."""
    return json.dumps({"results": [result.to_json() for result in results]}, indent=2, ensure_ascii=False) + "\n"


def write_results(path: Path, results: list[Result]) -> None:
    """Write results as JSON, whole file or none."""
    write_atomically(path, results_json(results))


def read_results(path: Path) -> list[Result]:
    """Results that :func:`write_results` wrote.

    Raises:
        DataError: if the file isn't there or isn't of that form.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["results"]
        return [Result(**{**row, "per_class": row.get("per_class", {})}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a file of results ({type(error).__name__}: {error})") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    return str(value) if isinstance(value, Path) else value
