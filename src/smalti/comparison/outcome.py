"""Results of a comparison."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.comparison.cell import (
    DETAILS,
    RESULTS_FILE,
)
from smalti.comparison.plan import BEFORE, Plan
from smalti.evaluation.details import read_details
from smalti.evaluation.paired import (
    Row,
)
from smalti.evaluation.result import BaselineKind, Result, read_results


@dataclass(frozen=True)
class Cost:
    """Cost of an arm, mean over its seeds; training only, except ``eval_s``."""

    steps: float = 0.0
    images_seen: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    gpu_s: float = 0.0
    peak_mib: float = 0.0
    """Peak memory of the training process or its GPU; of the evaluation if the arm isn't trained."""
    eval_s: float = 0.0
    parameters: int = 0
    """Number of parameters of the encoder."""
    is_partial: bool = False
    """Whether a cell was interrupted and resumed: times before the last start are not included."""


@dataclass(frozen=True)
class Cell:
    """An arm with one seed."""

    arm: str
    seed: int
    folder: Path
    evaluations: tuple[str, ...]
    """Keys, in the order of the plan."""
    baseline: Path | None = None
    """For a trained arm, the cell folder of its network before training."""

    @property
    def results(self) -> list[Result]:
        """All results, with details."""
        return [result for number in range(len(self.evaluations)) for result in self.results_of(number)]

    def results_of(self, number: int) -> list[Result]:
        """Results of one evaluation of the plan, by index.

        Raises:
            DataError: if it no longer exists.
        """
        return _results(self.folder / self.evaluations[number])

    def baseline_of(self, number: int) -> list[Result]:
        """Results of the same evaluation for the network before training; empty for arms that aren't trained.

        Raises:
            DataError: if it no longer exists.
        """
        if self.baseline is None:
            return []
        kind: BaselineKind = "before" if self.baseline.name.startswith(BEFORE) else "untrained"
        found = _results(self.baseline / self.evaluations[number])
        return [dataclasses.replace(result, baseline=kind) for result in found]


def _results(target: Path) -> list[Result]:
    return read_details(target / DETAILS, read_results(target / RESULTS_FILE))


@dataclass(frozen=True)
class Comparison:
    """Outcome of a comparison."""

    out: Path
    plan: Plan
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]
    """Finished cells."""
    failures: Mapping[str, str]
    """Arm -> why it failed, one line."""
    costs: Mapping[str, Cost]
    info: Mapping[str, Any]
    """Machine, versions, commit, times."""

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms with results, in the order of the plan."""
        return tuple(arm for arm in self.plan.arms if any(cell.arm == arm for cell in self.cells))

    def table(self, headlines: bool = True) -> list[tuple[str, list[Row]]]:
        """Rows by ``DATA: PROTOCOL METRIC``, in the order of the plan."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.is_headline or not headlines:
                groups.setdefault(f"{row.data}: {row.protocol} {row.metric}", []).append(row)
        return list(groups.items())
