"""Frozen encoders by successive halving: all candidates on few images, those that stay on twice as many.

Intervals over images decide what is dropped; where none is found, the lower half is dropped so that the budget holds.
Source: Jamieson and Talwalkar 2016, arXiv:1502.07943 (successive halving), with images as the resource.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from smalti.choosing.candidates import Candidate
from smalti.choosing.shared import Passes, SharedFeatures
from smalti.data.dataset import Labelled
from smalti.data.loader import epoch_order
from smalti.errors import RunError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import Progress
from smalti.evaluation.evaluate import run_protocols
from smalti.evaluation.intervals import Interval
from smalti.evaluation.paired import Row, metric_rows, shared_headline
from smalti.evaluation.protocol import Need, find_protocol
from smalti.evaluation.result import Result
from smalti.models.encoder import Encoder
from smalti.models.inner_layers import InnerLayers

FIRST_IMAGES = 64
"""Images to learn from, and to evaluate, in the first round."""
GROWTH = 2
"""Factor between rounds."""
FEWEST = 2
"""Candidates that are kept as long as no interval drops them, so that there is a next best."""
Sets = Mapping[Need, Labelled[Any]]


@dataclass(frozen=True)
class Score:
    """A candidate in one round."""

    candidate: Candidate
    results: Mapping[str, Result]
    """Protocol -> result."""
    seconds: float
    """Of all its protocols; a pass that several candidates share is counted for the first."""


@dataclass(frozen=True)
class Round:
    """All candidates that were scored on the same images."""

    num_train: int
    num_test: int
    scores: tuple[Score, ...]
    """Best first."""
    rows: tuple[Row, ...]
    """The deciding metric, in the order of ``scores``; differences are to the best."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Name of each candidate that was dropped after it -> why."""

    @property
    def seconds(self) -> float:
        """Time of the round."""
        return sum(score.seconds for score in self.scores)


@dataclass(frozen=True)
class Search:
    """What is scored, on what."""

    data: str
    sets: Sets
    config: EvalConfig
    protocols: tuple[str, ...]
    """The first one decides, in all rounds; those that need no labels are computed in the first round only, the others
    from the second round on."""
    load: Callable[[str], Encoder]
    """An encoder by name, on the device to run on."""
    progress: Progress | None = None


def search(
    candidates: Sequence[Candidate], what: Search, seconds: float, first_images: int = FIRST_IMAGES
) -> tuple[list[Round], list[str]]:
    """Score candidates in rounds until one is left, all images are used or the next round would exceed the budget.

    Args:
        candidates: at least one.
        what: data, protocols and encoders.
        seconds: budget of wall-clock time. The first candidate is scored whatever it takes.
        first_images: images of the first round.

    Returns:
        The rounds, and the names of the candidates that the budget left unscored.
    """
    began = time.monotonic()
    left, rounds, number = list(candidates), list[Round](), first_images
    unscored: list[str] = []
    while True:
        is_first = not rounds
        scores, missing = _score_all(left, what, number, began + seconds if is_first else math.inf, is_first)
        unscored += missing
        done = _rank(scores, what, number)
        is_last = number >= _most_images(what.sets) or len(done.scores) == 1
        kept, dropped = survivors(done)
        if not is_last:
            expected = done.seconds * GROWTH * len(kept) / len(done.scores)
            is_last = time.monotonic() - began + expected > seconds
        rounds.append(done if is_last else dataclasses.replace(done, dropped=dropped))
        if is_last:
            return rounds, unscored
        names = set(kept)
        left = [one for one in left if one.name in names]
        number *= GROWTH


def _most_images(sets: Sets) -> int:
    return max(max(len(labelled.train), len(labelled.test)) for labelled in sets.values())


def few(labelled: Labelled[Any], number: int, seed: int) -> Labelled[Any]:
    """The same data with at most ``number`` images to learn from and to evaluate; a draw is a part of larger ones."""

    def drawn(images: Any) -> Any:
        if number >= len(images):
            return images
        places = np.sort(epoch_order(seed, 0, len(images))[:number])
        return dataclasses.replace(images, samples=tuple(images.samples[place] for place in places.tolist()))

    return dataclasses.replace(labelled, train=drawn(labelled.train), test=drawn(labelled.test), drawn=True)


def _score_all(
    candidates: Sequence[Candidate], what: Search, number: int, deadline: float, is_first: bool
) -> tuple[list[Score], list[str]]:
    """Scores of the candidates, and the names of those that the deadline left out."""
    sets = {need: few(labelled, number, what.config.seed) for need, labelled in what.sets.items()}
    deciding = what.protocols[0]
    names = [name for name in what.protocols if name == deciding or is_first == (find_protocol(name).need == "images")]
    scores, missing = list[Score](), list[str]()
    for (spec, size), members in _groups(candidates).items():
        encoder, passes = None, None
        config = dataclasses.replace(what.config, image_size=size, protocols=tuple(names), baseline=False)
        for candidate in members:
            if scores and time.monotonic() > deadline:
                missing.append(candidate.name)
                continue
            if encoder is None or passes is None:
                encoder = what.load(spec)
                passes = Passes(encoder, [layer for one in members for layer in one.layers], config.cache_mib)
            scores.append(_score(candidate, encoder, passes, sets, config, what))
            if what.progress is not None:
                what.progress(f"candidates on {number} images", len(scores) + len(missing), len(candidates))
    return scores, missing


def _groups(candidates: Sequence[Candidate]) -> dict[tuple[str, int], list[Candidate]]:
    """Candidates that share a pass, by encoder and size: the first size of each encoder, then the second sizes."""
    sizes: dict[str, list[int]] = {}
    groups: dict[tuple[str, int], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault((candidate.encoder, candidate.image_size), []).append(candidate)
        sizes.setdefault(candidate.encoder, []).append(candidate.image_size)
    places = {spec: sorted(set(found)) for spec, found in sizes.items()}
    return dict(sorted(groups.items(), key=lambda item: places[item[0][0]].index(item[0][1])))


def _score(
    candidate: Candidate, encoder: Encoder, passes: Passes, sets: Sets, config: EvalConfig, what: Search
) -> Score:
    started = time.monotonic()
    read = InnerLayers(encoder, candidate.layers)
    results = run_protocols(
        read,
        candidate.name,
        what.data,
        [find_protocol(name) for name in config.protocols],
        sets,
        config,
        make=partial(SharedFeatures, passes=passes),
    )
    return Score(candidate, {result.protocol: result for result in results}, time.monotonic() - started)


def _rank(scores: Sequence[Score], what: Search, number: int) -> Round:
    """The round, best candidate first."""
    deciding = what.protocols[0]
    results = [score.results[deciding] for score in scores]
    metric = shared_headline(results)
    if metric is None:
        raise RunError(f"{deciding}: the candidates share no metric, so they can't be compared")
    is_lower = "lower is better" in results[0].units[metric]
    finite = [-math.inf if math.isnan(result.metrics[metric]) else float(result.metrics[metric]) for result in results]
    order = sorted(range(len(scores)), key=lambda place: finite[place] * (1 if is_lower else -1))
    ranked = [scores[place] for place in order]
    rows = metric_rows(
        {score.candidate.name: {what.config.seed: score.results[deciding]} for score in ranked},
        metric,
        what.data,
        groups=what.config.groups,
        headline=metric,
    )
    labelled = next(iter(what.sets.values()))
    sizes = (min(number, len(labelled.train)), min(number, len(labelled.test)))
    return Round(*sizes, tuple(ranked), tuple(rows))


def survivors(done: Round) -> tuple[list[str], dict[str, str]]:
    """Names of the candidates of the next round, and why the others are dropped."""
    kept, dropped = [done.rows[0].arm], dict[str, str]()
    most = max(FEWEST, math.ceil(len(done.rows) / GROWTH))
    for row in done.rows[1:]:
        if is_below(row.difference):
            dropped[row.arm] = "its interval lies below the best"
        elif len(kept) >= most:
            dropped[row.arm] = "in the lower half; no difference found"
        else:
            kept.append(row.arm)
    return kept, dropped


def is_below(gap: Interval | None) -> bool:
    """Whether an interval excludes zero, so that the candidate is distinguishable from the best."""
    return gap is not None and not gap.holds_zero
