"""Intervals of scores: a bootstrap over the images that were judged on and over the seeds.

Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13 (percentile intervals); Field & Welsh,
"Bootstrapping clustered data", J. R. Statist. Soc. B 69(3), 2007 (resampling both of two crossed factors).
Differs from them: what is drawn of the seeds is spread wider, by ``sqrt(S / (S - 1))`` since the plain bootstrap of S
values is too narrow by that much, and by Student's quantile over the normal one, since few seeds tell little about
their own spread: with 3 seeds, 2.7 times. Images are many and need neither.
Letters: S seeds, R resamplings, n images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from smalti.errors import ShapeError
from smalti.evaluation.tally import Tally

LEVEL = 0.95
RESAMPLINGS = 2000
_AT_ONCE = 2**23  # weights in memory


@dataclass(frozen=True)
class Interval:
    """A mean with the interval that the data leave for it."""

    mean: float
    low: float
    """NaN where nothing can be drawn anew: one seed, and a score that is no sum over images."""
    high: float
    over: str
    """What was drawn anew: ``images and seeds``, ``images``, ``seeds`` or ``nothing``."""

    @property
    def holds_zero(self) -> bool:
        """Whether a true value of zero can't be excluded; also where there is no interval."""
        return not (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Resampled:
    """Scores of one arm: as measured, and with images drawn anew."""

    measured: np.ndarray
    """``(S,)``."""
    drawn: np.ndarray | None
    """``(S, R)``; resampling r draws the same images for all seeds, and for all arms. None: no sum over images."""


def resample(tallies: Sequence[Tally], seed: int = 0, resamplings: int = RESAMPLINGS) -> Resampled:
    """Scores of one arm with images drawn anew, the same images for equal ``seed`` and number of images.

    Args:
        tallies: one a seed, all about the same images in the same order.
        seed: of the draws.
        resamplings: R.

    Raises:
        ShapeError: if the tallies are of different numbers of images.
    """
    number = len(tallies[0])
    if any(len(tally) != number for tally in tallies):
        raise ShapeError(f"seeds were judged on {sorted({len(t) for t in tallies})} images; they must be the same")
    rng = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // max(number, 1))
    parts = []
    for start in range(0, resamplings, rows):
        size = min(rows, resamplings - start)
        weights = rng.multinomial(number, np.full(number, 1 / number), size=size).astype(np.float64)
        parts.append(np.stack([tally.scores(weights) for tally in tallies]))
    return Resampled(np.array([tally.score() for tally in tallies]), np.concatenate(parts, axis=1))


def interval(arm: Resampled, level: float = LEVEL, seed: int = 0) -> Interval:
    """Mean over the seeds, with its interval."""
    return _interval(arm.measured, arm.drawn, level, seed)


def difference(arm: Resampled, reference: Resampled, level: float = LEVEL, seed: int = 0) -> Interval:
    """Arm less reference, paired: the same seeds, and in each resampling the same images.

    Raises:
        ShapeError: if they have different numbers of seeds.
    """
    if len(arm.measured) != len(reference.measured):
        raise ShapeError(f"{len(arm.measured)} seeds against {len(reference.measured)}; pairs need the same seeds")
    both = arm.drawn is not None and reference.drawn is not None
    drawn = arm.drawn - reference.drawn if both else None  # type: ignore[operator]
    return _interval(arm.measured - reference.measured, drawn, level, seed)


def widening(num_seeds: int, level: float = LEVEL) -> float:
    """How much wider than drawn the seeds' part is taken; 0 for one seed, which says nothing of its spread."""
    if num_seeds < 2:
        return 0.0
    quantile = (1 + level) / 2
    student = stats.t.ppf(quantile, num_seeds - 1) / stats.norm.ppf(quantile)
    return float(math.sqrt(num_seeds / (num_seeds - 1)) * student)


def _interval(measured: np.ndarray, drawn: np.ndarray | None, level: float, seed: int) -> Interval:
    num_seeds = len(measured)
    over = " and ".join(
        name for name, is_drawn in (("images", drawn is not None), ("seeds", num_seeds > 1)) if is_drawn
    )
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
