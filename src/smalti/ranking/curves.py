"""How well the first k patches of an order predict all others, according to a predictor trained without any order.

Source: Guo et al., arXiv:2511.22281v2, Eq. (8), the remaining uncertainty, which the paper doesn't measure for any
order. By the chain rule, its Eq. (1) is the same for every order and can't compare orders.
Letters: n images, N tokens, d values per token, K values of k, R resamplings, D draws.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smalti.errors import ShapeError
from smalti.functional.graphs import ranks_of
from smalti.methods.prefix import Prediction

QUARTER = 0.25
NUM_POINTS = 17
NOISE_FLOOR = 1e-2
"""Noise floor relative to a token's unit variance: a token known to within it has entropy 0."""
RESAMPLINGS = 1000
LEVEL = 0.95
UNSURE = 1.1
"""Largest acceptable unexplained variance when the predictor sees nothing; the mean image leaves 1."""
UNITS = {
    "auc_q": "unexplained fraction of the variance, mean over the first quarter of the patches; lower is better",
    "auc_full": "unexplained fraction of the variance, mean over all patches; lower is better",
    "left_22": "unexplained fraction of the variance after 22 % of the patches; lower is better",
    "entropy_q": "nats per patch above the noise floor, mean over the first quarter; lower is better",
}


@runtime_checkable
class PrefixPredictor(Protocol):
    """Predicts the distribution of unseen tokens: :class:`smalti.methods.prefix.Prefix`, or a known distribution."""

    def predict(self, tokens: Float[Tensor, "B N d"], seen: Bool[Tensor, "B N"]) -> Prediction:
        """A normal distribution for each value of each token."""
        ...


@dataclass(frozen=True)
class PrefixCurve:
    """Curve of one order."""

    counts: Int[np.ndarray, " K"]
    """k."""
    squared: Float[np.ndarray, "D n K"]
    """Squared error of unseen tokens per image, for each draw of the order (one, if it isn't random)."""
    total: Float[np.ndarray, " n"]
    """Squared deviation of all tokens of an image from the mean token at their position."""
    entropy: Float[np.ndarray, "D n K"]
    """Nats per patch: ``0.5 sum_d log(1 + variance / NOISE_FLOOR)`` of the unseen patches, divided by N."""
    num_patches: int
    """N."""

    @property
    def fractions(self) -> Float[np.ndarray, " K"]:
        """k / N."""
        return self.counts / self.num_patches

    @property
    def error(self) -> Float[np.ndarray, " K"]:
        """E(k): fraction of the variance that is unexplained; about 1 at k = 0, 0 at k = N."""
        return self.squared.mean(0).sum(0) / self.total.sum()

    def numbers(self, weights: Float[np.ndarray, "R n"] | None = None) -> dict[str, np.ndarray]:
        """The metrics of :data:`UNITS`.

        Args:
            weights: how often each image counts in each resampling; None: each once.

        Returns:
            ``(R,)`` each.
        """
        weights = np.ones((1, len(self.total))) if weights is None else weights
        error = weights @ self.squared.mean(0) / (weights @ self.total)[:, None]
        entropy = weights @ self.entropy.mean(0) / weights.sum(1, keepdims=True)
        return {
            "auc_q": area(self.fractions, error, QUARTER) / QUARTER,
            "auc_full": area(self.fractions, error, 1.0),
            "left_22": np.array([np.interp(0.22, self.fractions, one) for one in error]),
            "entropy_q": area(self.fractions, entropy, QUARTER) / QUARTER,
        }

    def spread_of_draws(self) -> float:
        """Standard deviation of ``auc_q`` over the draws; NaN for one."""
        if len(self.squared) < 2:
            return math.nan
        error = self.squared.sum(1) / self.total.sum()
        return float((area(self.fractions, error, QUARTER) / QUARTER).std(ddof=1))


@dataclass(frozen=True)
class CurveScore:
    """Score of one order with its interval over images, and its difference from a control."""

    value: float
    low: float
    high: float
    difference: float
    """To the control; NaN for the control itself."""
    difference_low: float
    difference_high: float


def prefix_counts(num_patches: int) -> Int[np.ndarray, " K"]:
    """17 values of k, fewer if N is small: nine evenly spaced in the first quarter, the others in the rest."""
    first = np.linspace(0, num_patches / 4, (NUM_POINTS + 1) // 2)
    rest = np.linspace(num_patches / 4, num_patches, (NUM_POINTS + 1) // 2)
    return np.unique(np.round(np.concatenate([first, rest])).astype(int))


def area(fractions: Float[np.ndarray, " K"], curves: Float[np.ndarray, "R K"], upto: float) -> Float[np.ndarray, " R"]:
    """Area under curves from 0 to ``upto`` by the trapezoidal rule; interpolated if ``upto`` lies between two
    points."""
    inside = fractions < upto
    at_end = np.array([np.interp(upto, fractions, curve) for curve in curves])
    return np.trapezoid(
        np.concatenate([curves[:, inside], at_end[:, None]], axis=1), np.append(fractions[inside], upto), axis=1
    )


@torch.no_grad()
def evaluate_orders(
    predictor: PrefixPredictor,
    tokens: Float[Tensor, "n N d"],
    orders: Mapping[str, Sequence[Int[Tensor, "n M"]]],
    *,
    batch_size: int = 64,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, PrefixCurve]:
    """Curves of orders of the same images.

    Args:
        predictor: predictor in eval mode, on the device of ``tokens``.
        tokens: tokens from its token source.
        orders: by name, one or more draws of each.
        batch_size: images per batch.
        progress: called as ``progress(what, done, total)``, counting curves.

    Raises:
        ShapeError: for fewer than two images, or orders of another number of images or patches.
    """
    num_images, num = tokens.shape[:2]
    if num_images < 2:
        raise ShapeError(f"{num_images} image: at least 2 are needed, since errors are relative to the mean image")
    for name, draws in orders.items():
        if any(tuple(draw.shape) != (num_images, num) for draw in draws):
            raise ShapeError(
                f"orders '{name}' of shape {tuple(draws[0].shape)}; {(num_images, num)} is needed for these tokens"
            )
    counts = prefix_counts(num)
    total = (tokens - tokens.mean(0)).double().square().sum((1, 2)).cpu().numpy()
    num_curves, done = sum(len(draws) for draws in orders.values()), 0
    found = {}
    for name, draws in orders.items():
        squared, entropy = (np.zeros((len(draws), num_images, len(counts))) for _ in range(2))
        for row, draw in enumerate(draws):
            ranks = ranks_of(draw.to(tokens.device).long())
            for start in range(0, num_images, batch_size):
                part = slice(start, start + batch_size)
                for place, count in enumerate(counts[:-1]):  # the error after all N patches is 0
                    seen = ranks[part] < int(count)
                    told = predictor.predict(tokens[part], seen)
                    error = (told.mean - tokens[part]).double().square().sum(-1)
                    nats = 0.5 * torch.log1p(told.log_variance.double().exp() / NOISE_FLOOR).sum(-1)
                    squared[row, part, place] = error.masked_fill(seen, 0).sum(1).cpu().numpy()
                    entropy[row, part, place] = nats.masked_fill(seen, 0).sum(1).cpu().numpy() / num
            done += 1
            if progress is not None:
                progress("curves", done, num_curves)
        found[name] = PrefixCurve(counts, squared, total, entropy, num)
    return found


def compare_curves(
    curves: Mapping[str, PrefixCurve], control: str = "random", seed: int = 0
) -> dict[str, dict[str, CurveScore]]:
    """Metrics of each order with 95 % bootstrap intervals over images, and paired differences to a control.

    Args:
        curves: curves of the same images, by order.
        control: name of the control order.
        seed: seed of the resamplings, which are the same for all orders.

    Returns:
        order -> metric of :data:`UNITS` -> value.
    """
    num_images = len(curves[control].total)
    draws = np.random.default_rng(seed).multinomial(num_images, np.full(num_images, 1 / num_images), RESAMPLINGS)
    weights = draws.astype(np.float64)
    exact = {name: curve.numbers() for name, curve in curves.items()}
    drawn = {name: curve.numbers(weights) for name, curve in curves.items()}
    ends = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    result: dict[str, dict[str, CurveScore]] = {}
    for name in curves:
        result[name] = {}
        for number in UNITS:
            value, base = float(exact[name][number][0]), float(exact[control][number][0])
            low, high = np.quantile(drawn[name][number], ends).tolist()
            gaps = drawn[name][number] - drawn[control][number]
            gap_low, gap_high = np.quantile(gaps, ends).tolist()
            own = name == control
            result[name][number] = CurveScore(
                value,
                low,
                high,
                math.nan if own else value - base,
                math.nan if own else gap_low,
                math.nan if own else gap_high,
            )
    return result


def conclude_curves(
    curve_scores: Mapping[str, Mapping[str, CurveScore]], control: str = "random", at_start: float = 1.0
) -> list[str]:
    """Compare the first quarter of each order with the control, in one sentence each.

    Args:
        curve_scores: result of :func:`compare_curves`.
        control: name of the control order.
        at_start: unexplained fraction of the variance before any patch is seen; a predictor worse than the mean image
            is reported first.
    """
    sentences = []
    if at_start > UNSURE:
        sentences.append(
            f"under-trained predictor: with no patch seen, it leaves {at_start:.2f} of the variance unexplained (the "
            "mean image: 1); train it longer before you use its curves."
        )
    for name in ("collapse", "coverage", "in_strength", "attention", "variance", "collapse_static", "halton"):
        if name not in curve_scores:
            continue
        one = curve_scores[name]["auc_q"]
        if one.difference_high < 0:
            verdict = f"is more informative than {control}"
        elif one.difference_low > 0:
            verdict = f"is less informative than {control}"
        else:
            verdict = f"does not differ from {control}"
        sentences.append(
            f"{name}'s first quarter {verdict}: {one.value:.3f} of the variance is unexplained, against "
            f"{curve_scores[control]['auc_q'].value:.3f} ({one.difference:+.3f}, {one.difference_low:+.3f} to "
            f"{one.difference_high:+.3f})."
        )
    return sentences
