"""The whole choice: candidates, rounds, costs, adaptations, and one sentence about them."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from smalti.choosing.adapt import Way, adapt_best, gains, parse_way
from smalti.choosing.candidates import READINGS, Reading, candidates_of
from smalti.choosing.cost import Cost, measure_costs, pareto
from smalti.choosing.frozen import FIRST_IMAGES, Round, Score, Search, is_below, search
from smalti.comparison.outcome import Comparison
from smalti.config import Count, ImageSize, settings, to_tree
from smalti.data.images.folders import ImageSet, open_images
from smalti.errors import ConfigError, SmaltiError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import Progress
from smalti.evaluation.evaluate import open_sets
from smalti.evaluation.paired import NO_DIFFERENCE, Row, row_tree, table_cells
from smalti.evaluation.protocol import find_protocol
from smalti.files import check_folder, is_free, write_atomically
from smalti.models.encoder import Encoder
from smalti.runs.machine import describe_machine

CHOICE, ADAPTED, PAGE = "choice.json", "adapt", "report.html"
FROZEN_SHARE = 0.6
"""Fraction of the budget for frozen encoders if the best is also adapted."""
START_S = 30.0
"""Seconds that each way of adapting takes besides training and evaluation: processes start, steps are measured."""
SHORTEST_S = 20.0
"""Seconds of training below which a way is not tried."""
PER_CLASS = 4
"""Images of the first round per class, for class folders."""
LABEL_FREE = ("dense-structure", "effective-rank", "position")
_DECIDE: Mapping[str, tuple[str, ...]] = {
    "masks": ("in-context", "linear-segmentation", "knn-patch"),
    "labels": ("knn", "linear-probe"),
    "images": (),
}


@settings
class ChooseConfig:
    """Settings of ``smalti choose``."""

    layers: tuple[Reading, ...] = READINGS
    """Which blocks are read: ``last``, ``3/4`` and ``1/2`` of the depth, ``last4`` (the last four, concatenated)."""
    image_sizes: tuple[ImageSize, ...] = ()
    """Sides of the images in pixels; empty: each encoder's own, and with labels also twice that up to 448."""
    adapt: tuple[str, ...] = ("neco", "neco:lora:16", "diet")
    """How the best encoder is adapted: ``METHOD`` or ``METHOD:ADAPT``, with the recipe METHOD_small224; empty: not."""
    protocols: tuple[str, ...] = ()
    """Protocols, the first one decides; empty: those that fit the labels."""
    first_images: Count = FIRST_IMAGES
    """Images of the first round, to learn from and to evaluate; of class folders at least four per class."""


@dataclass(frozen=True)
class Choice:
    """What was found."""

    data: str
    labelled: str | None
    protocols: tuple[str, ...]
    rounds: tuple[Round, ...]
    unscored: tuple[str, ...]
    """Candidates for which the budget did not suffice."""
    costs: Mapping[str, Cost]
    """Of all candidates that were scored, by name."""
    adapted: tuple[Row, ...]
    """Each way of adapting, with its gain over the weights before; empty if none was tried or all failed."""
    failures: Mapping[str, str]
    """Way of adapting -> why it failed."""
    agreement: Mapping[str, tuple[float, float, float]]
    """Label-free metric -> Spearman correlation with the deciding score over the candidates of the first round, with
    its 95 % interval (bootstrap over candidates)."""
    minutes: float
    budget: float

    @property
    def best(self) -> Score:
        """The best candidate of the last round."""
        return self.rounds[-1].scores[0]

    @property
    def sentences(self) -> list[str]:
        """The answer, the most important first."""
        return [text for text in (_use(self), _next_best(self), _faster(self), _adapting(self), _left(self)) if text]

    def front(self, done: Round) -> list[str]:
        """Names of the candidates of a round that no other beats in both score and time; fastest first."""
        sign = -1.0 if "lower is better" in done.rows[0].unit else 1.0
        return pareto({row.arm: (self.costs[row.arm].ms_per_image, sign * row.score.mean) for row in done.rows})


def choose(
    encoders: Sequence[str],
    data: str,
    out: Path,
    load: Callable[[str], Encoder],
    config: ChooseConfig = ChooseConfig(),
    evaluation: EvalConfig = EvalConfig(),
    *,
    labelled: str | None = None,
    load_settings: Mapping[str, Any] = {},
    minutes: float = 30.0,
    progress: Progress | None = None,
    quiet: bool = False,
    isolate: bool = True,
) -> Choice:
    """Choose an encoder, its layer and the image size for a user's images; implements ``smalti choose``.

    Args:
        encoders: names of encoders, as in :func:`smalti.load`.
        data: images to train on, and to evaluate on where no labelled ones are given.
        out: a folder, new or of an earlier choice, which is replaced.
        load: an encoder by name, on the device to run on.
        config: what is compared.
        evaluation: how labelled images are read and evaluated.
        labelled: images with classes or masks; None: those of ``data`` if it has labels, else label-free scores decide.
        load_settings: ``load.*`` with which ``load`` loads all encoders; adaptations start in the same way.
        minutes: budget of wall-clock time.
        progress: called as ``progress(what, done, total)``.
        quiet: show no progress of adaptations.
        isolate: as for :func:`smalti.comparison.run.compare`, which runs the adaptations.

    Raises:
        ConfigError: for an invalid setting, or a folder of something else.
        DataError: if the data can't be read or lack what a protocol needs.
        WeightsError: if an encoder can't be loaded.
    """
    began = time.monotonic()
    if not encoders:
        raise ConfigError("no encoders are named; write --encoders timm:NAME,RUN,...")
    if len(set(encoders)) < len(encoders):
        raise ConfigError("an encoder is named twice; name each once")
    if not minutes > 0:
        raise ConfigError(f"budget of {minutes:g} minutes: a number above 0 is needed")
    if not is_free(out) and not (out / CHOICE).is_file():
        raise ConfigError(f"{out}: is not empty and holds no earlier choice; choose another --out")
    check_folder(out)
    ways = [parse_way(text) for text in config.adapt]
    scored_on = labelled or data
    protocols, number = _protocols(scored_on, config, evaluation)
    evaluation = dataclasses.replace(evaluation, protocols=protocols, baseline=False)
    what = Search(scored_on, open_sets(scored_on, evaluation), evaluation, protocols, load, progress)
    needs_labels = find_protocol(protocols[0]).need != "images"
    if not needs_labels and len(config.image_sizes) > 1:
        raise ConfigError(
            f"image_sizes={list(config.image_sizes)}: {protocols[0]} depends on the image size itself, so it can't "
            "compare sizes; name one size, or give labelled images"
        )
    candidates = [
        one
        for spec in encoders
        for one in candidates_of(spec, load(spec), config.layers, config.image_sizes, own_size_only=not needs_labels)
    ]
    rounds, unscored = search(candidates, what, 60 * minutes * (FROZEN_SHARE if ways else 1.0), number)
    scored = [score.candidate for score in rounds[0].scores]
    loaded = {spec: load(spec) for spec in dict.fromkeys(one.encoder for one in scored)}
    costs = measure_costs(scored, loaded)
    left = minutes - (time.monotonic() - began) / 60
    run = partial(adapt_best, images=data, load_settings=load_settings, out=out / ADAPTED, quiet=quiet, isolate=isolate)
    rows, failures = adapt_in_time(rounds[-1], loaded, ways, what, left, run)
    return Choice(
        data,
        labelled,
        protocols,
        tuple(rounds),
        tuple(unscored),
        costs,
        tuple(rows),
        failures,
        _agreement(rounds[0], protocols[0]),
        (time.monotonic() - began) / 60,
        minutes,
    )


def _protocols(data: str, config: ChooseConfig, evaluation: EvalConfig) -> tuple[tuple[str, ...], int]:
    """Names of the protocols, the deciding one first, and the number of images of the first round."""
    images: ImageSet = open_images(data, class_depth=evaluation.class_depth)
    kind = "images"
    if images.classes:
        kind = "masks" if any(sample.mask or sample.instances for sample in images.samples) else kind
        kind = "labels" if kind == "images" and images.labels is not None else kind
    named = config.protocols or _DECIDE[kind]
    for name in named:
        find_protocol(name)
    classes = len(images.classes or ()) if kind == "labels" else 0  # an image with a mask shows several classes
    number = max(config.first_images, PER_CLASS * classes)
    return tuple(dict.fromkeys((*named, *LABEL_FREE))), number


def adapt_in_time(
    done: Round,
    loaded: Mapping[str, Encoder],
    ways: Sequence[Way],
    what: Search,
    minutes: float,
    run: Callable[..., Comparison],
) -> tuple[list[Row], dict[str, str]]:
    """Adapt the best encoder in what is left of the budget; gains, and ways that failed with the reason."""
    if not ways:
        return [], {}
    evaluation = done.scores[0].seconds
    left = 60 * minutes - evaluation  # of the weights before
    fitting = min(len(ways), int(max(left, 0) // (evaluation + START_S + SHORTEST_S)))
    untried = {way.name: "not tried, no time was left of the budget" for way in ways[fitting:]}
    if not fitting:
        return [], untried
    best, deciding = done.scores[0].candidate, what.protocols[0]
    needs_labels = find_protocol(deciding).need != "images"
    size = float(done.num_train) if needs_labels and what.sets[find_protocol(deciding).need].train else None
    config = dataclasses.replace(what.config, data=what.data, protocols=(deciding,), train_size=size)
    training = left / fitting - evaluation - START_S
    try:
        found = run(best, loaded[best.encoder], ways[:fitting], config=config, minutes=training / 60)
    except SmaltiError as error:
        return [], {way.name: str(error) for way in ways[:fitting]} | untried
    return gains(found), dict(found.failures) | untried


def _agreement(first: Round, deciding: str) -> dict[str, tuple[float, float, float]]:
    """Spearman correlation of label-free metrics with the deciding score over the candidates of a round."""
    if find_protocol(deciding).need == "images":
        return {}
    score = [row.score.mean for row in first.rows]
    found = {}
    for name in LABEL_FREE:
        metric = next(iter(first.scores[0].results[name].metrics), "") if name in first.scores[0].results else ""
        values = [float(one.results[name].metrics.get(metric, np.nan)) for one in first.scores] if metric else []
        if len(values) >= 4 and np.isfinite(values).all():
            found[f"{name} {metric}"] = spearman_interval(np.array(values), np.array(score))
    return found


def spearman_interval(
    first: np.ndarray, second: np.ndarray, resamplings: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Spearman correlation over ``(n,)`` pairs with its 95 % interval, a percentile bootstrap over the pairs."""
    from scipy.stats import rankdata  # heavy, and only needed here

    def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        ranks = [rankdata(one, axis=-1) for one in (a, b)]
        x, y = (one - one.mean(-1, keepdims=True) for one in ranks)
        scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
        return np.divide((x * y).sum(-1), scale, out=np.full(scale.shape, np.nan), where=scale > 0)

    rows = np.random.default_rng(seed).integers(len(first), size=(resamplings, len(first)))
    drawn = correlation(first[rows], second[rows])
    known = drawn[np.isfinite(drawn)]  # a draw of one value alone has no correlation
    low, high = np.percentile(known, (2.5, 97.5)) if len(known) else (np.nan, np.nan)
    return float(correlation(first, second)), float(low), float(high)


def _score_text(row: Row) -> str:
    return table_cells([row])[0][1]


def _use(choice: Choice) -> str:
    done, row = choice.rounds[-1], choice.rounds[-1].rows[0]
    free = find_protocol(choice.protocols[0]).need == "images"
    note = " This score needs no labels and is weak evidence; label a few images to be sure." if free else ""
    return (
        f"Use {done.scores[0].candidate.name}: {row.protocol} {row.metric} {_score_text(row)} "
        f"({done.num_test} images).{note}"
    )


def _next_best(choice: Choice) -> str:
    rows = choice.rounds[-1].rows
    if len(rows) < 2:
        return ""
    row = rows[1]
    ratio = choice.costs[row.arm].ms_per_image / choice.costs[rows[0].arm].ms_per_image
    apart = "" if is_below(row.difference) else ", not distinguishable"
    return f"Next best: {row.arm}, {_score_text(row)}{apart}, at {ratio:.2f} times the time per image."


def _faster(choice: Choice) -> str:
    rows, costs = choice.rounds[-1].rows, choice.costs
    equal = [row for row in rows[2:] if not is_below(row.difference)]
    best_ms = costs[rows[0].arm].ms_per_image
    faster = min(equal, key=lambda row: costs[row.arm].ms_per_image, default=None)
    if faster is None or costs[faster.arm].ms_per_image > 0.8 * best_ms:
        return ""
    ratio = costs[faster.arm].ms_per_image / best_ms
    return f"Not distinguishable and faster: {faster.arm}, {_score_text(faster)}, at {ratio:.2f} times the time."


def _adapting(choice: Choice) -> str:
    if not choice.adapted:
        return f"Adapting: {next(iter(choice.failures.values()))}." if choice.failures else ""
    helped = [row for row in choice.adapted if row.gain_verdict == "better"]
    top = max(helped or choice.adapted, key=lambda row: row.gain.mean if row.gain else -np.inf)
    assert top.gain is not None
    numbers = f"{top.arm} {top.gain.mean:+.3f} [{top.gain.low:+.3f}, {top.gain.high:+.3f}] at the last layer, one seed"
    return f"Adapting helped: {numbers}." if helped else f"Adapting did not help: {numbers}."


def _left(choice: Choice) -> str:
    if not choice.unscored:
        return ""
    number = len(choice.unscored) + len(choice.rounds[0].scores)
    return (
        f"The budget of {choice.budget:g} minutes did not suffice for {len(choice.unscored)} of {number} candidates; "
        "give more minutes, or name fewer layers and sizes."
    )


def export_command(choice: Choice) -> str:
    """The command that exports the best candidate; one line that says why there is none for several layers."""
    best = choice.best.candidate
    if len(best.layers) > 1:
        return (
            f"# {best.reading}, concatenated: timm's forward_intermediates(indices="
            f"{[layer - 1 for layer in best.layers]}) on the export of the whole encoder"
            f"\nsmalti export {best.encoder} to=timm --out DIR"
        )
    depth = f" load.depth={best.layers[0]}" if best.layers != (best.depth,) else ""
    return f"smalti export {best.encoder} to=timm{depth} --out DIR"


def write_choice(choice: Choice, out: Path) -> Path:
    """Write ``choice.json``: the sentences and every number."""
    content: dict[str, Any] = {
        "sentences": choice.sentences,
        "export": export_command(choice),
        "data": choice.data,
        "labelled": choice.labelled,
        "protocols": list(choice.protocols),
        "minutes": round(choice.minutes, 2),
        "budget_minutes": choice.budget,
        "rounds": [
            {
                "num_train": one.num_train,
                "num_test": one.num_test,
                "seconds": round(one.seconds, 1),
                "rows": [row_tree(row) for row in one.rows],
                "candidates": [
                    {
                        "candidate": to_tree(dataclasses.asdict(score.candidate)),
                        "name": score.candidate.name,
                        "metrics": {name: dict(result.metrics) for name, result in score.results.items()},
                        "dropped": one.dropped.get(score.candidate.name),
                    }
                    for score in one.scores
                ],
            }
            for one in choice.rounds
        ],
        "unscored": list(choice.unscored),
        "costs": {name: dataclasses.asdict(cost) for name, cost in choice.costs.items()},
        "pareto": choice.front(choice.rounds[-1]),
        "adapted": [row_tree(row) for row in choice.adapted],
        "failures": dict(choice.failures),
        "agreement": {name: list(values) for name, values in choice.agreement.items()},
        **describe_machine(),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
    write_atomically(out / CHOICE, text + "\n")
    return out / CHOICE


def candidate_columns(choice: Choice) -> tuple[str, ...]:
    """Heads of the columns of :func:`candidate_cells`."""
    return ("candidate", "score", "difference to the best", "ms per image", "parameters", "licence")


def candidate_cells(choice: Choice, row: Row) -> tuple[str, ...]:
    """A candidate of the last round as text."""
    cost, (_, _, _, difference, _) = choice.costs[row.arm], table_cells([row])[0]
    if difference and not is_below(row.difference):
        difference += f": {NO_DIFFERENCE}"
    return (
        row.arm,
        _score_text(row),
        difference,
        f"{cost.ms_per_image:.1f}",
        f"{cost.parameters / 1e6:.1f} M",
        cost.licence or "not stated",
    )
