"""Fine-tuning classifiers of windows of signals on fractions of the labels: what the protocols for signals share.

Position embeddings are reinitialised, a linear layer classifies the class token, and everything is trained. Fractions
of labels are fractions of the training subjects, the same for every encoder; a smaller fraction is a subset of a larger
one with the same seed. With few labels there are more passes over them, so that every fit has enough steps.
Letters: n windows, B of them in a batch, D embed_dim, K classes, U units that intervals resample (recordings, or
subjects), S seeds.

All settings are our own.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.charts import Line, LineChart, floats
from smalti.config import BatchSize, Count, settings
from smalti.data.signals.hypnograms import UNDEFINED
from smalti.data.signals.labelled_signals import count_drawn, draw_subjects
from smalti.data.signals.signal_config import check_window
from smalti.data.signals.signal_set import SignalSet
from smalti.errors import DataError, ShapeError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import EvaluationContext, spread
from smalti.evaluation.intervals import LEVEL, RESAMPLINGS
from smalti.evaluation.metrics import class_f1, class_recall
from smalti.evaluation.tally import Tally
from smalti.evaluation.tuning import (
    Example,
    rate_positions,
    seeded,
    train,
    trainable_copy,
    warm_cosine,
    with_linear_head,
)
from smalti.models.build import clone_encoder
from smalti.models.encoder import Encoder

BETAS = (0.9, 0.999)
NUM_TIMELINES = 4
"""Recordings whose windows are drawn one after the other."""
Score = Callable[[Tensor], Tensor]
"""One number for each ``(..., K, K)`` confusion matrix."""


@dataclass(frozen=True)
class WindowRecipe:
    """Settings of one fine-tuning; all our own."""

    epochs: int
    fewest_steps: int
    """Minimum number of steps."""
    batch_size: int
    learning_rate: float
    layer_decay: float = 0.75
    label_smoothing: float = 0.1
    weight_decay: float = 0.05
    drop_path: float = 0.0
    warmup_ratio: float = 0.05
    num_steps: int | None = None
    """Number of steps; replaces ``epochs``."""

    def steps(self, num_windows: int) -> int:
        """Total number of steps; the last batch may contain windows of the next epoch."""
        if self.num_steps is not None:
            return self.num_steps
        return max(self.fewest_steps, math.ceil(self.epochs * num_windows / self.batch_size))


@settings
class WindowTuningConfig:
    """Settings of a protocol that fine-tunes on windows."""

    fractions: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (1.0,)
    """Fractions of the training subjects whose labels are used, one fine-tuning each."""
    repeats: Count = 1
    """Fits with different seeds, each on its own draw of subjects."""
    steps: Count | None = None
    """Training steps; None: the preset's. Not together with ``epochs``."""
    epochs: Count | None = None
    """Passes over the training windows; None: the preset's."""
    batch_size: BatchSize | None = None
    """Windows per training step; None: the preset's."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest learning rate; None: the preset's."""


def choose_recipe(config: EvalConfig, own: WindowTuningConfig) -> WindowRecipe:
    """The preset with the user's settings."""
    small = WindowRecipe(epochs=5, fewest_steps=200, batch_size=32, learning_rate=1e-3)
    full = WindowRecipe(epochs=50, fewest_steps=1000, batch_size=64, learning_rate=2.5e-4, drop_path=0.1)
    changed: dict[str, Any] = {
        "epochs": own.epochs,
        "batch_size": own.batch_size,
        "learning_rate": own.learning_rate,
        "num_steps": own.steps,
    }
    if own.epochs is not None:
        changed["fewest_steps"] = 1
    recipe = small if config.preset == "small" else full
    return replace(recipe, **{name: value for name, value in changed.items() if value is not None})


class WindowClassifier(nn.Module):
    """The encoder and a linear layer on the window's vector: the class token if there is one.

    The layer is the copy's own ``head``, so that it is a timm classifier for timm's layer-wise decay.
    """

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        """
        Args:
            encoder: a copy, modified in place.
            num_classes: K.
        """
        super().__init__()
        self.encoder = with_linear_head(encoder, num_classes)

    def forward(self, windows: Float[Tensor, "B C 1 T"]) -> Float[Tensor, "B K"]:
        """Class scores of windows."""
        return self.encoder.vit.head(self.encoder.image_features(self.encoder.normalize(windows)))


@dataclass(frozen=True)
class LabelledWindows:
    """Loads labelled training windows; see :func:`~smalti.evaluation.tuning.train`."""

    signals: SignalSet
    places: tuple[int, ...]
    """Indices of the labelled windows."""

    def __len__(self) -> int:
        return len(self.places)

    def __call__(self, place: int, key: int) -> Example:
        """``(C, 1, T)`` window and its class; not augmented."""
        index = self.places[place]
        return _window(self.signals, index), torch.tensor(int(self.signals.targets[index]))


@dataclass(frozen=True)
class LabelSweep:
    """Fits on fractions of the labels."""

    rows: tuple[dict[str, Any], ...]
    """For each fraction: ``share``, ``subjects``, ``windows`` and the scores of all seeds, their mean and interval."""
    counts: np.ndarray
    """``(S, U, K, K)`` confusion matrices of the largest fraction."""
    predicted: np.ndarray
    """``(n,)`` classes of the test windows by the first seed's fit on the largest fraction."""
    losses: tuple[float, ...]
    """Of that fit."""
    per_recording: np.ndarray
    """``(R, K, K)`` confusion matrices of its test recordings."""

    @property
    def matrices(self) -> list[Int[Tensor, "K K"]]:
        """One confusion matrix a seed."""
        return [torch.from_numpy(one.sum(0)) for one in self.counts]

    @property
    def total(self) -> Int[Tensor, "K K"]:
        """The confusion matrix of all seeds."""
        return torch.stack(self.matrices).sum(0)

    def fraction_metrics(self, metric: str) -> dict[str, float]:
        """Mean score of each smaller fraction, and the area under their curve; empty for a single fraction."""
        if len(self.rows) < 2:
            return {}
        means = [row["mean"] for row in self.rows]
        area = {f"{metric}_area": area_under_log([row["share"] for row in self.rows], means)}
        return area | {f"{metric}_at_{row['share']:g}": row["mean"] for row in self.rows[:-1]}

    def per_class(self, classes: Sequence[str]) -> dict[str, dict[str, float]]:
        """Recall and F1 of each class."""
        return {
            name: dict(zip(classes, values.tolist(), strict=True))
            for name, values in (("recall", class_recall(self.total)), ("f1", class_f1(self.total)))
        }

    def tallies(self) -> dict[str, Tally]:
        """Tally of each recording for the accuracies, for the first seed."""
        matrices = self.per_recording
        right, whole = matrices.diagonal(axis1=1, axis2=2).astype(np.float64), matrices.sum(2).astype(np.float64)
        return {
            "top1": Tally(right.sum(1, keepdims=True), whole.sum(1, keepdims=True)),
            "balanced_top1": Tally(right, whole),
        }


def sweep_labels(
    context: EvaluationContext[SignalSet], config: EvalConfig, protocol: str, metric: str, score: Score
) -> LabelSweep:
    """Fine-tune on each fraction of the training subjects, with each seed, and predict the test windows.

    Args:
        context: encoder and labelled signals.
        config: settings; those of the protocol are a :class:`WindowTuningConfig`.
        protocol: its name.
        metric: name of the score.
        score: of a confusion matrix, for the curve over the fractions and its intervals.

    Raises:
        DataError: if no training window has a class.
        ShapeError: if the encoder doesn't take such windows.
    """
    own: WindowTuningConfig = config.of(protocol)
    data = context.data
    recipe, num_classes = choose_recipe(config, own), len(data.classes)
    _check_fit(context.encoder, data.train)
    rows, units = list[dict[str, Any]](), _units(data.test)
    losses, predicted = list[float](), np.zeros(0, np.int64)
    counts, per_recording = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for fraction in _distinct_fractions(own.fractions, data.train, protocol):
        found, windows, subjects = [], [], 0
        for seed in seeds_of(config, own):
            part = draw_subjects(data.train, fraction, seed)
            learned = labelled_windows(part)
            model, curve = fine_tune(context, learned, recipe, num_classes, seed, f"{protocol} {fraction:g}")
            guesses = predict(model, data.test, context.batch_size, context.device)
            matrices = confusions(data.test, guesses, num_classes)
            found.append(np.stack([matrices[unit].sum(0) for unit in units]))
            windows.append(len(learned))
            subjects = len(part.subjects)
            if seed == config.seed:
                predicted, losses, per_recording = guesses, curve, matrices
        counts = np.stack(found)  # (S, U, K, K)
        low, high = bootstrap_interval(counts, score, config.seed)
        scores = [float(score(torch.from_numpy(one.sum(0)))) for one in counts]
        rows.append(
            {
                "share": fraction,
                "subjects": subjects,
                "windows": windows,
                metric: scores,
                "mean": float(np.mean(scores)),
                "low": low,
                "high": high,
            }
        )
    return LabelSweep(tuple(rows), counts, predicted, tuple(losses), per_recording)


def seeds_of(config: EvalConfig, own: WindowTuningConfig) -> list[int]:
    """Seeds of the fits of one fraction."""
    return [config.seed + number for number in range(own.repeats)]


def tuning_settings(
    context: EvaluationContext[SignalSet], config: EvalConfig, own: WindowTuningConfig, sweep: LabelSweep
) -> dict[str, Any]:
    """What determined the scores, for the result."""
    data, encoder = context.data, context.encoder
    return {
        "comparable": "our own recipe; compare encoders in this table, not with published numbers",
        "test_set": f"{len(data.test.recordings)} recordings of {len(data.test.subjects)} subjects, "
        f"{int((data.test.targets != UNDEFINED).sum())} scored windows",
        "train_subjects": len(data.train.subjects),
        "channels": list(data.train.channels),
        "signal": asdict(data.train.config),
        "trained": "a copy of the whole encoder, including positions"
        + (" (new, as it was trained without)" if encoder.position_free else ""),
        "pool": encoder.pool,
        "recipe": asdict(choose_recipe(config, own)),
        "optimiser": f"AdamW, betas {BETAS}, no weight decay on vectors, cosine to 0",
        "seeds": seeds_of(config, own),
        "label_sweep": list(sweep.rows),
        "interval": f"95 %, bootstrap over the test {'subjects' if data.test.groups else 'recordings'}",
    }


def labelled_windows(signals: SignalSet) -> LabelledWindows:
    """The windows that have a target.

    Raises:
        DataError: if there are none.
    """
    places = np.flatnonzero(signals.targets != UNDEFINED)
    if not len(places):
        what = {"stages": "stage", "classes": "class"}[signals.target]
        raise DataError(f"{signals.root}: no window of {', '.join(signals.names[:3])} has a {what}")
    return LabelledWindows(signals, tuple(places.tolist()))


def predict(model: nn.Module, signals: SignalSet, batch_size: int, device: torch.device) -> Int[np.ndarray, " n"]:
    """The most likely class of every window."""
    parts = []
    with torch.no_grad():
        for first in range(0, len(signals), batch_size):
            windows = [_window(signals, i) for i in range(first, min(first + batch_size, len(signals)))]
            parts.append(model(torch.stack(windows).to(device)).argmax(1).cpu().numpy())
    return np.concatenate(parts)


def confusions(signals: SignalSet, predicted: Int[np.ndarray, " n"], num_classes: int) -> Int[np.ndarray, "R K K"]:
    """Confusion matrix of each recording (rows: target, columns: prediction); windows without a target are ignored."""
    counts = np.zeros((len(signals.recordings), num_classes, num_classes), np.int64)
    numbers, is_scored = _recording_numbers(signals), signals.targets != UNDEFINED
    np.add.at(counts, (numbers[is_scored], signals.targets[is_scored], predicted[is_scored]), 1)
    return counts


def bootstrap_interval(counts: Int[np.ndarray, "S U K K"], score: Score, seed: int = 0) -> tuple[float, float]:
    """Interval of the mean score of S fits by resampling units with replacement, the same for all fits.

    NaN for a single unit.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13.
    """
    number = counts.shape[1]
    if number < 2:
        return math.nan, math.nan
    weights = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=RESAMPLINGS)
    drawn = np.einsum("br,srkl->bskl", weights, counts)
    scores = score(torch.from_numpy(drawn)).numpy()
    scores = scores[np.isfinite(scores).all(1)].mean(1)
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(scores) else (math.nan, math.nan)
    return float(low), float(high)


def area_under_log(fractions: list[float], values: list[float]) -> float:
    """Mean height of a curve over the logarithm of the label fraction: trapezoidal area divided by width."""
    x = np.log(np.array(fractions))
    return float(np.trapezoid(values, x) / (x[-1] - x[0]))


def fine_tune(
    context: EvaluationContext[SignalSet],
    learned: LabelledWindows,
    recipe: WindowRecipe,
    num_classes: int,
    seed: int,
    what: str,
) -> tuple[WindowClassifier, list[float]]:
    """Fine-tune a classifier of windows; returns it in eval mode, and its loss during training.

    Args:
        context: the encoder, which isn't modified, and the progress callback.
        learned: training windows.
        recipe: number of steps, learning rate and batch size.
        num_classes: K.
        seed: seed of positions, head and order.
        what: label of the progress.
    """
    encoder, num_steps = context.encoder, recipe.steps(len(learned))
    with seeded(seed, context.device):
        copy = clone_encoder(encoder)
        copy.vit.set_input_size((1, learned.signals.config.window))  # pretraining may have used another window length
        model = WindowClassifier(trainable_copy(copy, recipe.drop_path), num_classes)
        optimizer = create_optimizer_v2(
            model.encoder.vit,
            "adamw",
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            betas=BETAS,
        )
        rate_positions(optimizer, encoder, model.encoder)
        losses = train(
            model,
            optimizer,
            context,
            learned,
            lambda windows, targets: F.cross_entropy(model(windows), targets, label_smoothing=recipe.label_smoothing),
            lambda step: warm_cosine(
                step,
                num_steps,
                peak=recipe.learning_rate,
                least=0.0,
                num_warmup=math.ceil(recipe.warmup_ratio * num_steps),
            ),
            num_steps=num_steps,
            batch_size=recipe.batch_size,
            seed=seed,
            what=what,
            num_images=len(learned),
        )
    return model, losses


def fraction_chart(sweep: LabelSweep, title: str, score: str) -> dict[str, LineChart]:
    """A score against the fraction of labelled subjects; empty for a single fraction.

    Args:
        sweep: the fits.
        title: of the chart.
        score: name of the score, at the beginning of a sentence.
    """
    if len(sweep.rows) < 2:
        return {}
    x, mean, low, high = (floats(one[key] for one in sweep.rows) for key in ("share", "mean", "low", "high"))
    explanation = (
        f"{score} against the fraction of the training subjects whose labels are used (bands: 95 % over the test "
        "recordings); higher is better, and the grey line is the same network trained from its state before training."
    )
    line = Line(mean, x, low=low, high=high)
    chart = LineChart(title, explanation, (line,), "Fewer labels", x_axis="log fraction", is_wide=True, has_points=True)
    return {"labels": chart}


def timelines(
    signals: SignalSet,
    predicted: Int[np.ndarray, " n"],
    classes: Sequence[str],
    downwards: Sequence[int],
    places: Sequence[int],
) -> dict[int, tuple[tuple[Line, Line], tuple[str, ...]]]:
    """Targets and predictions of some recordings, and the names of the levels from bottom to top.

    Args:
        signals: test signals; windows without a target are gaps.
        predicted: classes of all windows.
        classes: names of the classes.
        downwards: places of the classes, from the top of the chart.
        places: of the recordings.
    """
    numbers = _recording_numbers(signals)
    height = np.array([len(classes) - 1 - list(downwards).index(one) for one in range(len(classes))], np.float64)
    is_scored, done = signals.targets != UNDEFINED, {"stages": "scored", "classes": "labelled"}[signals.target]
    scored = np.where(is_scored, height[np.where(is_scored, signals.targets, 0)], np.nan)
    levels = tuple(classes[one] for one in reversed(downwards))
    return {
        place: (
            (
                Line(floats(scored[numbers == place]), name=done, role="truth"),
                Line(floats(height[predicted[numbers == place]])),
            ),
            levels,
        )
        for place in places
    }


def some_recordings(signals: SignalSet) -> tuple[int, ...]:
    """A few recordings to be shown, evenly spaced."""
    return spread(len(signals.recordings), NUM_TIMELINES)


def _window(signals: SignalSet, index: int) -> Float[Tensor, "C 1 T"]:
    return torch.from_numpy(signals.read(index)).permute(2, 0, 1)  # (1, T, C) -> (C, 1, T)


def _recording_numbers(signals: SignalSet) -> Int[np.ndarray, " n"]:
    """The recording of each window."""
    return np.array([signals.locate(i)[0] for i in range(len(signals))], dtype=np.int64)


def _units(signals: SignalSet) -> list[list[int]]:
    """Recordings of each unit that intervals resample."""
    groups = signals.groups or tuple(map(str, range(len(signals.recordings))))
    return [[i for i, one in enumerate(groups) if one == group] for group in dict.fromkeys(groups)]


def _check_fit(encoder: Encoder, signals: SignalSet) -> None:
    """Check that signals match an encoder's input.

    Raises:
        ShapeError: if they don't.
    """
    if not encoder.takes_signals:
        height, width = encoder.img_size
        raise ShapeError(
            f"{encoder.name} takes images of {height}x{width} pixels, but the data are signals; train an encoder for "
            f"them with smalti train part --data {signals.root}"
        )
    if encoder.in_chans != len(signals.channels):
        raise ShapeError(
            f"the encoder takes {encoder.in_chans} channels, but the signals have {len(signals.channels)} "
            f"({', '.join(signals.channels)}); choose as many with eval.signal.channels=A,B"
        )
    check_window(signals.config, encoder.patch_size[1])


def _distinct_fractions(fractions: tuple[float, ...], signals: SignalSet, protocol: str) -> list[float]:
    """Fractions in ascending order; merges those with the same number of subjects into the largest, with a warning."""
    of_count = {count_drawn(signals, fraction): fraction for fraction in sorted(set(fractions))}
    distinct = list(of_count.values())
    if len(distinct) < len(set(fractions)):
        left = ", ".join(f"{fraction:g}" for fraction in sorted(set(fractions) - set(distinct)))
        warnings.warn(
            f"eval.{protocol}.fractions: {left} of {len(signals.subjects)} subjects are the same number as for a "
            "larger fraction",
            stacklevel=3,
        )
    return distinct
