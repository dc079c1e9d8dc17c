"""Intervals of scores: bootstrap over the evaluated images, or over groups of them, and over seeds.


Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13 (percentile intervals); Field & Welsh,
"Bootstrapping clustered data", J. R. Statist. Soc. B 69(3), 2007 (resampling both of two crossed factors).
Differs from them: the spread over seeds is widened by ``sqrt(S / (S - 1))``, by which the plain bootstrap of S values
is too narrow, and by the ratio of Student's quantile to the normal one, since few seeds give a poor estimate of their
spread: 2.7 times with 3 seeds. Groups of images (videos, patients, sites) are also few, and are widened in the same
way; single images are many and need neither.
Letters: S seeds, R resamplings, n images, G groups.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, UInt

from smalti.errors import ConfigError, DataError, ShapeError
from smalti.evaluation.tally import Tally

LEVEL = 0.95
RESAMPLINGS = 2000
_AT_ONCE = 2**23  # weights in memory at a time
_KEPT = 2**26  # weights that are cached for the next metric of the same images


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    low: float
    """NaN if nothing can be resampled: one seed, and a score that isn't a sum over images."""
    high: float
    over: str
    """Resampled units: ``images and seeds``, ``groups and seeds``, ``images``, ``groups``, ``seeds`` or ``nothing``;
    of recordings, ``recordings`` or ``subjects`` in place of images."""

    @property
    def holds_zero(self) -> bool:
        """Whether the interval includes zero; also true if there is no interval."""
        return not (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Resampled:
    """Scores of one arm: as measured, and with resampled images."""

    measured: np.ndarray
    """``(S,)``."""
    drawn: np.ndarray | None
    """``(S, R)``; resampling r draws the same images for all seeds and all arms. None: not a sum over images."""
    unit: str = "images"
    """Resampled units: ``images``, ``groups``, ``recordings`` or ``subjects``."""


def group_images(names: Sequence[str], pattern: str) -> tuple[str, ...]:
    r"""The group of each image, extracted from its name.

    Args:
        names: names of the images, relative to the data set.
        pattern: a regular expression to search in each name; its first group, or the whole match, is the name of the
            group.

    Example:
        >>> group_images(["a/site3_001.png", "b/site3_002.png", "a/site7_001.png"], r"site(\d+)")
        ('3', '3', '7')

    Raises:
        ConfigError: if the pattern isn't a regular expression.
        DataError: if an image has no group, or all have the same one.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"eval.groups={pattern}: not a regular expression ({error})") from None
    found: list[str] = []
    for name in names:
        match = compiled.search(name)
        group = match[1] if match and compiled.groups else match[0] if match else None
        if not group:
            raise DataError(f"eval.groups={pattern}: does not match {name}; every evaluated image needs a group")
        found.append(group)
    if len(set(found)) == 1:
        raise DataError(
            f"eval.groups={pattern}: all {len(names)} evaluated images are in one group, '{found[0]}'; an interval "
            "needs several"
        )
    return tuple(found)


def resample(
    tallies: Sequence[Tally],
    seed: int = 0,
    resamplings: int = RESAMPLINGS,
    *,
    groups: Sequence[str] | None = None,
    unit: str | None = None,
    level: float = LEVEL,
) -> Resampled:
    """Scores of one arm with resampled images; equal ``seed`` and number of images give the same resamples.

    Args:
        tallies: one per seed, all of the same images in the same order.
        seed: seed of the resampling.
        resamplings: R.
        groups: group of each image, from :func:`group_images`: resamples whole groups. None: single images.
        unit: name of what is resampled; None: ``images`` or ``groups``.
        level: confidence level of the interval; widens the spread of G groups.

    Raises:
        ShapeError: if the tallies have different numbers of images.
    """
    number = len(tallies[0])
    if any(len(tally) != number for tally in tallies):
        raise ShapeError(
            f"seeds were evaluated on {sorted({len(t) for t in tallies})} images; the number must be the same"
        )
    measured = np.array([tally.score() for tally in tallies])
    if groups is not None:
        tallies = [tally.by_group(groups) for tally in tallies]
        number = len(tallies[0])
    parts = []
    for weights in _weights(number, seed, resamplings):
        rows = weights.astype(np.float64)
        parts.append(np.stack([tally.scores(rows) for tally in tallies]))
    drawn = np.concatenate(parts, axis=1)
    if groups is None:
        return Resampled(measured, drawn, unit or "images")
    known = np.isfinite(drawn)
    centre = np.where(known, drawn, 0).sum(1, keepdims=True) / known.sum(1, keepdims=True).clip(1)
    return Resampled(measured, centre + widening(number, level) * (drawn - centre), unit or "groups")


def _weights(number: int, seed: int, resamplings: int) -> Iterator[UInt[np.ndarray, "r n"]]:
    """``(R, n)`` counts of a bootstrap of ``n`` items, in chunks of rows."""
    if number * resamplings <= _KEPT:
        kept = _kept_weights(number, seed, resamplings)
        rows = max(1, _AT_ONCE // max(number, 1))
        yield from (kept[start : start + rows] for start in range(0, resamplings, rows))
    else:
        yield from _draw(number, seed, resamplings)


@lru_cache(maxsize=1)
def _kept_weights(number: int, seed: int, resamplings: int) -> UInt[np.ndarray, "R n"]:
    """Cached for all metrics, since the resamples take longer to draw than to score."""
    return np.concatenate(list(_draw(number, seed, resamplings)))


def _draw(number: int, seed: int, resamplings: int) -> Iterator[UInt[np.ndarray, "r n"]]:
    rng = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // max(number, 1))
    for start in range(0, resamplings, rows):
        size = min(rows, resamplings - start)
        yield rng.multinomial(number, np.full(number, 1 / number), size=size).astype(np.uint16)


def interval(arm: Resampled, level: float = LEVEL, seed: int = 0) -> Interval:
    """Mean over seeds with its interval."""
    return _interval(arm.measured, arm.drawn, level, seed, arm.unit)


def difference(arm: Resampled, reference: Resampled, level: float = LEVEL, seed: int = 0) -> Interval:
    """Arm minus reference, paired: the same seeds, and the same images in each resampling.

    Raises:
        ShapeError: if they have different numbers of seeds.
    """
    if len(arm.measured) != len(reference.measured):
        raise ShapeError(
            f"{len(arm.measured)} seeds against {len(reference.measured)}; paired differences need the same seeds"
        )
    both = arm.drawn is not None and reference.drawn is not None
    drawn = arm.drawn - reference.drawn if both else None  # type: ignore[operator]
    return _interval(arm.measured - reference.measured, drawn, level, seed, arm.unit)


def widening(number: int, level: float = LEVEL) -> float:
    """Factor that widens the spread of few seeds or groups; 0 for a single one, whose spread is unknown."""
    if number < 2:
        return 0.0
    from scipy.special import ndtri, stdtrit  # heavy, and only needed here

    quantile = (1 + level) / 2
    student = stdtrit(number - 1, quantile) / ndtri(quantile)
    return float(math.sqrt(number / (number - 1)) * student)


def few_seeds(number: int, unit: str = "images") -> str:
    """A sentence on the limits of one or two seeds; empty for three or more.

    Args:
        number: of seeds.
        unit: what else the intervals resample.
    """
    if number == 1:
        return (
            f"One seed: the intervals cover the evaluated {unit}, not the randomness of training; another seed "
            "may differ."
        )
    if number == 2:
        return (
            "Two seeds: their spread is uncertain, so the intervals over seeds are widened by a factor of "
            f"{widening(2):.0f}; a third seed may reveal differences that are not found here."
        )
    return ""


def _interval(
    measured: Float[np.ndarray, " S"], drawn: Float[np.ndarray, "S R"] | None, level: float, seed: int, unit: str
) -> Interval:
    num_seeds = len(measured)
    over = " and ".join(name for name, is_drawn in ((unit, drawn is not None), ("seeds", num_seeds > 1)) if is_drawn)
    mean = float(np.mean(measured))
    if not over:
        return Interval(mean, math.nan, math.nan, "nothing")
    scores = np.repeat(measured[:, None], RESAMPLINGS, axis=1) if drawn is None else drawn
    resamplings = scores.shape[1]
    picked = np.random.default_rng([seed, num_seeds]).integers(num_seeds, size=(num_seeds, resamplings))
    centre = scores.mean(0)
    spread = np.take_along_axis(scores, picked, axis=0).mean(0) - centre
    values = centre + widening(num_seeds, level) * spread
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(mean, math.nan, math.nan, "nothing")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), over)
