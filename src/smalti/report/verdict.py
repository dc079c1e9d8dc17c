"""Scores of an encoder beside its baseline: pairs of results, what they say in a sentence, and their table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from smalti.evaluation.paired import result_cells
from smalti.evaluation.protocol import priority_of
from smalti.evaluation.result import BASELINE_LABELS, Result, describe_result
from smalti.methods.base import Method
from smalti.report.evaluated import Evaluated
from smalti.report.formats import as_float, decimals
from smalti.report.parts import Kind, Table, TableCell

SAME = 0.005
"""Scores in 0..1 that differ by less count as equal,"""
SLIGHT = 0.02
"""and by less than this, as slightly different."""
TRAINED, IMPORTED = "trained", "imported"
"""Names of the evaluated encoder beside its baseline: weights of a run, and weights of a file or of timm."""
_BASELINES_IN_WORDS = {
    "untrained": "the same network untrained",
    "before": "the weights that it started from",
    "random init": "a random initialisation of its architecture",
    "baseline": "the baseline",
}


@dataclass(frozen=True)
class Pair:
    """One protocol on one data set: the evaluated encoder, and its baseline beside it."""

    result: Result
    baseline: Result | None

    @property
    def name(self) -> str:
        """Protocol, headline metric and data set."""
        return f"{self.result.protocol} {self.result.headline[0]} on {self.result.data}"

    @property
    def arm(self) -> str:
        """Name of the evaluated encoder: imported weights are never called trained."""
        if self.result.encoder.startswith("random:"):
            return BASELINE_LABELS["untrained"]
        is_imported = self.result.imported or (self.baseline is not None and self.baseline.baseline == "random-init")
        return IMPORTED if is_imported else TRAINED

    @property
    def label(self) -> str:
        """Name of the baseline."""
        return label_of(self.baseline) or "baseline"

    @property
    def evaluated(self) -> Evaluated:
        """The two as arms."""
        beside = {self.label: [self.baseline]} if self.baseline else {}
        return Evaluated(self.result.data, self.result.protocol, {self.arm: [self.result], **beside})

    def values(self, metric: str) -> tuple[float, float]:
        """The metric of both; NaN if there is none."""
        return value_of(self.result, metric), value_of(self.baseline, metric)

    def gain(self, metric: str) -> float:
        """How much better the encoder is than the baseline, for either direction; NaN if it can't be said."""
        value, baseline = self.values(metric)
        unit = self.result.units.get(metric, "")
        if "lower is better" in unit:
            return baseline - value
        return value - baseline if "higher is better" in unit else math.nan


def pair_results(results: Sequence[Result]) -> list[Pair]:
    """Results of encoders, each with its baseline on the same protocol and data; by the priority of their protocols."""
    baselines = {(result.protocol, result.data): result for result in results if result.is_baseline}
    pairs = [
        Pair(result, baselines.get((result.protocol, result.data)))
        for result in results
        if not result.is_baseline and result.metrics
    ]
    return sorted(pairs, key=lambda pair: -priority_of(pair.result.protocol))


def conclude(pairs: Sequence[Pair], method: type[Method] | None = None) -> tuple[Kind, str]:
    """Whether the encoder is better than its baseline, and one sentence.

    Args:
        pairs: of :func:`pair_results`; the first with a direction and a baseline decides.
        method: one that exports no encoder.
    """
    measured = [pair for pair in pairs if math.isfinite(pair.gain(pair.result.headline[0]))]
    if not measured:
        return "unknown", _without_gain(pairs, method)
    first = measured[0]
    metric = first.result.headline[0]
    gain = first.gain(metric)
    low, high = (first.result.intervals.get(metric, {}).get(f"difference_{end}", math.nan) for end in ("low", "high"))
    holds_zero = low <= 0 <= high
    kind: Kind = "same" if abs(gain) < SAME or holds_zero else "better" if gain > 0 else "worse"
    word: str = "not better" if kind == "same" else kind
    word = f"slightly {word}" if SAME <= abs(gain) < SLIGHT and not holds_zero else word
    value, baseline = first.values(metric)
    span = f", 95 % interval {low:+.3f} to {high:+.3f}" if math.isfinite(low) else ""
    sentence = (
        f"{word.capitalize()} than {_BASELINES_IN_WORDS[first.label]}: {first.name} is {decimals(value)}, "
        f"against {decimals(baseline)} ({value - baseline:+.3f}{span})"
    )
    if len(measured) > 1:
        improved = sum(pair.gain(pair.result.headline[0]) >= SAME for pair in measured)
        sentence += f"; {improved} of {len(measured)} evaluations improve"
    return kind, f"{sentence}."


def _without_gain(pairs: Sequence[Pair], method: type[Method] | None) -> str:
    """The sentence where nothing can be compared with a baseline."""
    if not pairs and method is not None:
        return f"A run of {method.name} exports no encoder, so there are no features to evaluate."
    if not pairs:
        return "Not evaluated: it is not known whether training improved the features."
    first = pairs[0]
    metric, value = first.result.headline
    score = f"{first.name} is {decimals(as_float(value))}"
    if (reference := first.result.reference) is not None:
        return f"{score}; {reference[0]} get {decimals(reference[1])}."
    if first.baseline is not None and "is better" not in first.result.units.get(metric, ""):
        return f"{score}; neither more nor less of it is better, so it says nothing about the baseline."
    what = "what these weights are worth" if first.arm == IMPORTED else "whether training helped"
    return f"No comparison with a baseline: {score}, and {metric} alone does not show {what}."


def results_table(pairs: Sequence[Pair]) -> Table:
    """All metrics of the encoders, with their baselines beside them where these were evaluated, too."""
    rows: list[tuple[TableCell | str, ...]] = []
    kinds = []
    has_baseline = any(pair.baseline is not None for pair in pairs)
    for pair in pairs:
        headline = pair.result.headline[0]
        for metric in pair.result.metrics:
            is_first = metric == headline
            value, before, change = (*result_cells(pair.result, pair.baseline, metric), "", "")[:3]
            gain = pair.gain(metric) if is_first else math.nan
            colour = " good" if gain >= SAME else " bad" if gain <= -SAME else ""
            where = TableCell(pair.result.data, "path", below=describe_result(pair.result)) if is_first else ""
            cells: tuple[TableCell | str, ...] = (
                TableCell(pair.result.protocol if is_first else ""),
                where,
                TableCell(metric, hint=pair.result.units.get(metric, "")),
                TableCell(value, "number"),
            )
            beside = (TableCell(before or "–", "number"), TableCell(change or "–", f"number{colour}"))
            rows.append((*cells, *beside) if has_baseline else cells)
            kinds.append("headline" if is_first else "muted")
    labels = ", ".join(dict.fromkeys(pair.label for pair in pairs if pair.baseline is not None))
    arms = ", ".join(dict.fromkeys(pair.arm for pair in pairs))
    names = (arms, labels, "difference") if has_baseline else ("value",)
    columns: tuple[TableCell | str, ...] = (
        "protocol",
        "data",
        "metric",
        *(TableCell(name, "number") for name in names),
    )
    return Table(columns, tuple(rows), tuple(kinds))


def results_lead(pairs: Sequence[Pair]) -> str:
    """What to know before reading the table."""
    has_baseline = any(pair.baseline is not None for pair in pairs)
    by_arm: dict[str, list[str]] = {}
    for pair in pairs:
        by_arm.setdefault(pair.arm if has_baseline or pair.arm == IMPORTED else "features", []).append(
            pair.result.imported or pair.result.encoder
        )
    encoders = " ".join(
        f"{'Imported weights' if arm == IMPORTED else arm.capitalize()}: {', '.join(dict.fromkeys(names))}."
        for arm, names in by_arm.items()
    )
    drawn = dict.fromkeys(str(pair.result.settings.get("intervals", "")) for pair in pairs)
    brackets = "".join(f" In brackets: {one}; differences are paired." for one in drawn if one)
    return f"{encoders} Scores lie in 0..1 unless the unit says otherwise (point at the metric's name).{brackets}"


def label_of(result: Result | None) -> str:
    """Name of a baseline; empty for other results."""
    return BASELINE_LABELS[result.baseline] if result is not None and result.baseline is not None else ""


def value_of(result: Result | None, metric: str) -> float:
    """A metric; NaN if there is none."""
    return as_float(result.metrics.get(metric)) if result else math.nan
