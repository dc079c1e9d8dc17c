"""Results of one protocol on one data set, arm by arm, and their charts merged over the arms.

An arm is whatever is compared: methods, checkpoints, or an encoder and its baseline.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from smalti.charts import Line, LineChart, floats
from smalti.evaluation.result import BASELINE_LABELS, Details, Result
from smalti.report.parts import Figure

BASELINES = tuple(BASELINE_LABELS.values())
"""Names of arms that are drawn in grey: a baseline, not a competitor."""


@dataclass(frozen=True)
class Evaluated:
    """One protocol on one data set."""

    data: str
    protocol: str
    arms: Mapping[str, Sequence[Result]]
    """Arm -> its results, one per seed. Means are over seeds, pictures are of the first."""

    @property
    def name(self) -> str:
        """For titles."""
        return f"{self.protocol} on {self.data}"

    @property
    def details(self) -> dict[str, Details]:
        """Arm -> details of the first seed that has any."""
        found = {arm: next((r.details for r in results if r.details), None) for arm, results in self.arms.items()}
        return {arm: details for arm, details in found.items() if details is not None}

    @property
    def seed(self) -> int:
        """Seed of what is shown of single results."""
        seeds = [results[0].settings.get("seed") for results in self.arms.values() if results]
        return int(next((seed for seed in seeds if seed is not None), 0))


def chart_sections(evaluated: Sequence[Evaluated]) -> dict[str, list[Figure]]:
    """The charts of protocols under their headings, merged over arms; charts in which nothing changes are left out."""
    sections: dict[str, list[Figure]] = {}
    for one in evaluated:
        for title, chart in _merged(one):
            if not chart.is_constant:
                drawn = dataclasses.replace(chart, title=f"{title} ({one.name})")
                figure = Figure(drawn.title, chart.explanation, drawn, chart.is_wide)
                sections.setdefault(chart.section, []).append(figure)
    return sections


def _merged(one: Evaluated) -> list[tuple[str, LineChart]]:
    """Titles and charts of all arms: one for all of them, or one for each trained arm."""
    merged: list[tuple[str, LineChart]] = []
    for name in dict.fromkeys(name for details in one.details.values() for name in details.charts):
        charts = {arm: chart for arm, results in one.arms.items() if (chart := _mean_chart(results, name))}
        trained = [arm for arm in charts if arm not in BASELINES] or list(charts)
        first = charts[trained[0]]
        if first.needs_several and len(trained) < 2:
            continue
        if not first.per_encoder:
            merged.append((first.title, dataclasses.replace(first, lines=_together(charts, trained[0]))))
            continue
        for arm in trained:
            beside = [_named(charts[other].lines[0], other) for other in charts if other in BASELINES and other != arm]
            title = f"{arm}: {charts[arm].title}"
            merged.append((title, dataclasses.replace(charts[arm], lines=(*charts[arm].lines, *beside))))
    return merged


def _together(charts: Mapping[str, LineChart], first: str) -> tuple[Line, ...]:
    """Lines of all arms: what is true first, controls (of the first arm) last."""
    truth = [line for line in charts[first].lines if line.role == "truth"]
    own = [_named(line, arm) for arm, chart in charts.items() for line in chart.lines if line.role == "encoder"]
    controls = [_named(line, first) for line in charts[first].lines if line.role == "control"]
    return (*truth, *own, *controls)


def _named(line: Line, arm: str) -> Line:
    name = f"{arm}: {line.name}" if line.name else arm
    return dataclasses.replace(line, name=name, is_baseline=arm in BASELINES)


def _mean_chart(results: Sequence[Result], name: str) -> LineChart | None:
    """A chart with its lines averaged over seeds, where all have the same places; with intervals, the first seed's."""
    charts = [result.details.charts[name] for result in results if result.details and name in result.details.charts]
    if not charts:
        return None
    first = charts[0]
    return dataclasses.replace(
        first,
        lines=tuple(
            line if line.low else _mean_line([chart.lines[n] for chart in charts if len(chart.lines) > n])
            for n, line in enumerate(first.lines)
        ),
    )


def _mean_line(lines: Sequence[Line]) -> Line:
    first = lines[0]
    alike = [line.y for line in lines if line.steps == first.steps]
    return (
        dataclasses.replace(first, y=floats(np.mean(np.array(alike, dtype=np.float64), axis=0))) if first.y else first
    )
