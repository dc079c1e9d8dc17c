"""Compare scores of several arms on the same images: intervals, paired differences and verdicts.

An arm is what is compared: a method with several seeds, or an encoder before and after training.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smalti.errors import ShapeError
from smalti.evaluation.intervals import (
    LEVEL,
    RESAMPLINGS,
    Interval,
    Resampled,
    difference,
    group_images,
    interval,
    resample,
)
from smalti.evaluation.result import BASELINE_LABELS, FRACTION, Details, Result, describe_result

NO_DIFFERENCE = "no difference found"


@dataclass(frozen=True)
class Row:
    """One metric of one arm."""

    data: str
    protocol: str
    metric: str
    unit: str
    arm: str
    score: Interval
    seeds: Mapping[int, float]
    """Seed -> score."""
    difference: Interval | None
    """Difference from the first arm, over common seeds; None for the first arm, or if that failed."""
    is_headline: bool
    gain: Interval | None = None
    """For a trained arm, the gain over its network before training, paired over the same seeds and images."""
    gain_over: str = ""
    """Name of that baseline."""
    about: str = ""
    """Context of the score: images, split, size, preset, skipped images."""

    @property
    def verdict(self) -> str:
        """Verdict on the difference, in words."""
        return _verdict(self.difference, self.unit)

    @property
    def gain_verdict(self) -> str:
        """Verdict on the gain, in words."""
        return _verdict(self.gain, self.unit)


def _verdict(gap: Interval | None, unit: str) -> str:
    if gap is None:
        return ""
    if gap.over == "nothing":
        return "no interval: one seed"
    if gap.holds_zero:
        return NO_DIFFERENCE
    up = gap.mean > 0
    if "higher is better" in unit:
        return "better" if up else "worse"
    if "lower is better" in unit:
        return "worse" if up else "better"
    return "higher" if up else "lower"


def shared_headline(results: Sequence[Result]) -> str | None:
    """The first metric of one protocol that all results have, so that arms are compared on the same metric: an encoder
    with too few patches for 500 clusters has a different headline metric than one with enough."""
    return next((name for name in results[0].metrics if all(name in result.metrics for result in results)), None)


def metric_rows(
    by_arm: Mapping[str, Mapping[int, Result]],
    metric: str,
    data: str,
    reference: str | None = None,
    baselines: Mapping[str, Mapping[int, Result]] | None = None,
    groups: str | None = None,
    headline: str | None = None,
) -> list[Row]:
    """One metric of all arms, in order.

    Args:
        by_arm: arm -> seed -> result, all of one protocol.
        metric: name of the metric.
        data: name of the images in the rows.
        reference: reference arm of the differences; None: the first.
        baselines: arm -> seed -> result of the network before training, for trained arms.
        groups: pattern of :func:`smalti.evaluation.intervals.group_images`; intervals resample whole groups. None: the
            groups from the table of images, if there is one.
        headline: headline metric of all arms; None: that of each arm.
    """
    reference = reference or next(iter(by_arm))
    resampled = {arm: _resampled(results, metric, groups) for arm, results in by_arm.items()}
    rows = []
    for arm, results in by_arm.items():
        one = next(iter(results.values()))
        against = None
        if arm != reference and reference in by_arm:
            against = _difference(results, by_arm[reference], metric, resampled[arm], resampled[reference])
        untrained = (baselines or {}).get(arm, {})
        first = next(iter(untrained.values()), None)
        rows.append(
            Row(
                data=data,
                protocol=one.protocol,
                metric=metric,
                unit=one.units[metric],
                arm=arm,
                score=_within_range(interval(resampled[arm]), one.units[metric]),
                seeds={seed: float(result.metrics[metric]) for seed, result in results.items()},
                difference=against,
                is_headline=(headline or one.headline[0]) == metric,
                gain=_difference(results, untrained, metric, resampled[arm], _resampled(untrained, metric, groups))
                if first is not None and all(metric in result.metrics for result in untrained.values())
                else None,
                about=describe_result(one),
                gain_over=BASELINE_LABELS[first.baseline] if first is not None and first.baseline else "",
            )
        )
    return rows


def with_intervals(results: Sequence[Result]) -> list[Result]:
    """Add intervals of the scores to results and, if there is a baseline, of the paired difference.

    Args:
        results: results with details; baselines have ``baseline`` set. ``settings["groups"]`` sets what is resampled.
    """
    baselines = {(result.protocol, result.data): result for result in results if result.is_baseline}
    return [
        _with_intervals(result, None if result.is_baseline else baselines.get((result.protocol, result.data)))
        for result in results
    ]


def _with_intervals(result: Result, baseline: Result | None) -> Result:
    details, groups = result.details, result.settings.get("groups")
    found: dict[str, dict[str, float]] = {}
    for metric in details.tallies if details else ():
        arms = {"": {0: result}}
        if baseline is not None and metric in baseline.metrics:
            arms = {"baseline": {0: baseline}, **arms}
        row = metric_rows(arms, metric, result.data, groups=groups)[-1]
        found[metric] = {"low": row.score.low, "high": row.score.high}
        if (gap := row.difference) is not None:
            found[metric] |= {"difference": gap.mean, "difference_low": gap.low, "difference_high": gap.high}
    if details is None or not found:
        return result
    drawn = f"{len(details.images)} {result.unit}"
    if (known := _groups(details, groups)) is not None:
        unit = _unit(result, groups)
        which = "" if unit == "subjects" else f" of {result.unit} ({groups or 'from the table'})"
        drawn = f"{len(set(known))} {unit}{which}"
    text = f"{LEVEL:.0%}, percentile bootstrap with {RESAMPLINGS} resamplings of {drawn}"
    return dataclasses.replace(result, intervals=found, settings={**result.settings, "intervals": text})


def result_cells(result: Result, baseline: Result | None, metric: str) -> tuple[str, ...]:
    """A metric of a result as text: value with interval and, with a baseline, its value and the difference."""
    value, ends = float(result.metrics[metric]), result.intervals.get(metric, {})
    error = result.settings.get("standard_error", {}).get(metric)
    shown = f"{_short(value)} ± {_short(error)}" if error is not None else _short(value) + _span(ends, "low", "high")
    if baseline is None:
        return (shown,)
    before = float(baseline.metrics.get(metric, math.nan))
    if math.isnan(before):
        return shown, "", ""
    gap = _short(value - before, "+") + _span(ends, "difference_low", "difference_high", "+")
    return shown, _short(before), gap


def _span(ends: Mapping[str, float], low: str, high: str, sign: str = "") -> str:
    if not all(math.isfinite(ends.get(end, math.nan)) for end in (low, high)):
        return ""
    return f" [{_short(ends[low], sign)}, {_short(ends[high], sign)}]"


def _short(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if not abs(value) >= 10 else f"{value:{sign}.1f}"


def row_tree(row: Row) -> dict[str, Any]:
    """Plain values for JSON, with the verdict in words; the inverse of :func:`read_row`."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(row) | {"verdict": row.verdict, "gain_verdict": row.gain_verdict})
    return plain


def read_row(row: Mapping[str, Any]) -> Row:
    values = {key: value for key, value in row.items() if key not in ("verdict", "gain_verdict")}
    values["score"] = _read_interval(row["score"])
    for key in ("difference", "gain"):
        values[key] = _read_interval(row[key]) if row[key] else None
    values["seeds"] = {int(seed): math.nan if score is None else score for seed, score in row["seeds"].items()}
    return Row(**values)


def _read_interval(value: Mapping[str, Any]) -> Interval:
    ends = {key: math.nan if value[key] is None else float(value[key]) for key in ("mean", "low", "high")}
    return Interval(**ends, over=value["over"])


def table_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Text of each row: arm, mean with interval, scores of the seeds, difference with interval, verdict."""
    return [
        (
            row.arm,
            _with_interval(row.score, ""),
            " ".join(f"{score:.3f}" for score in row.seeds.values()),
            _with_interval(row.difference, "+") if row.difference else "",
            row.verdict,
        )
        for row in rows
    ]


def about_lines(rows: Sequence[Row]) -> list[str]:
    """Context of a table: one line if it is the same for all arms, else one line per group."""
    by_text: dict[str, list[str]] = {}
    for row in rows:
        by_text.setdefault(row.about, []).append(row.arm)
    if len(by_text) == 1:
        return [text for text in by_text if text]
    return [f"{', '.join(arms)}: {text or 'unknown'}" for text, arms in by_text.items()]


def gain_cells(row: Row) -> tuple[str, str]:
    """Text of the gain over the network before training with its interval, and of the verdict; empty if there is
    none."""
    return (_with_interval(row.gain, "+") if row.gain else "", row.gain_verdict)


def _within_range(score: Interval, unit: str) -> Interval:
    """Clip the interval of a fraction to 0..1."""
    if unit != FRACTION:
        return score
    low, high = (min(max(end, 0.0), 1.0) if math.isfinite(end) else end for end in (score.low, score.high))
    return dataclasses.replace(score, low=low, high=high)


def _resampled(results: Mapping[int, Result], metric: str, groups: str | None) -> Resampled:
    tallies = [result.details.tallies.get(metric) if result.details else None for result in results.values()]
    known = [tally for tally in tallies if tally is not None]
    if len(known) == len(tallies):
        first = next(result for result in results.values() if result.details)
        assert first.details is not None
        return resample(known, groups=_groups(first.details, groups), unit=_unit(first, groups))
    return Resampled(np.array([result.metrics[metric] for result in results.values()], dtype=np.float64), None)


def _groups(details: Details, pattern: str | None) -> Sequence[str] | None:
    """The group of each image, by a pattern on its name, else from the table of images; None: no groups."""
    return group_images(details.images, pattern) if pattern is not None else details.groups or None


def _unit(result: Result, pattern: str | None) -> str:
    """What intervals of a result resample."""
    if result.details is None or _groups(result.details, pattern) is None:
        return result.unit
    return "subjects" if pattern is None and result.unit == "recordings" else "groups"


def _difference(
    ours: Mapping[int, Result], theirs: Mapping[int, Result], metric: str, drawn: Resampled, reference: Resampled
) -> Interval | None:
    """Paired over the seeds that both have, and over the images if they are the same."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    one, other = next(iter(ours.values())).details, next(iter(theirs.values())).details
    same = one is not None and other is not None and one.images == other.images

    def chosen(source: Resampled, results: Mapping[int, Result]) -> Resampled:
        rows = [list(results).index(seed) for seed in seeds]
        keep = source.drawn[rows] if source.drawn is not None and same else None
        return Resampled(source.measured[rows], keep)

    try:
        return difference(chosen(drawn, ours), chosen(reference, theirs))
    except ShapeError:
        return None


def _with_interval(value: Interval, sign: str) -> str:
    span = "" if math.isnan(value.low) else f" [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"
    return f"{value.mean:{sign}.3f}{span}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
