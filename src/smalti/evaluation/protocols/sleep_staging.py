"""Sleep staging: a copy of the encoder, fine-tuned to classify the sleep stage of each window, with many or few labels.

Position embeddings are reinitialised, a linear layer classifies the class token, and everything is trained. Fractions
of labels are fractions of the training subjects, the same for every encoder; a smaller fraction is a subset of a larger
one with the same seed. An untrained encoder gives the baseline: training from scratch.
With few labels there are more passes over them, so that every fit has enough steps.
Letters: n windows, B of them in a batch, D embed_dim, K stages, R recordings, S seeds.

Source: the protocol of PART, arXiv:2506.03682 (fine-tuning with fresh positions, fewer labels); its settings for EEG
could not be found, so all settings here are our own. Cohen, "A coefficient of agreement for nominal scales", 1960.
"""

import math
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.charts import Line, LineChart, floats, loss_chart
from smalti.config import BatchSize, Count, settings
from smalti.data.signals.hypnograms import UNDEFINED
from smalti.data.signals.labelled_signals import draw_subjects
from smalti.data.signals.signal_config import check_window
from smalti.data.signals.signal_set import SignalSet
from smalti.errors import DataError, ShapeError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import EvaluationContext, spread
from smalti.evaluation.intervals import LEVEL, RESAMPLINGS
from smalti.evaluation.metrics import (
    accuracy,
    balanced_accuracy,
    class_f1,
    class_recall,
    cohen_kappa,
    macro_f1,
)
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.tally import Tally
from smalti.evaluation.tuning import (
    Example,
    rate_fresh_positions,
    seeded,
    train,
    trainable_copy,
    warm_cosine,
    with_linear_head,
)
from smalti.models.build import clone_encoder
from smalti.models.encoder import Encoder

AGREEMENT = "agreement beyond chance, at most 1, higher is better"
"""Unit of kappa; it may be negative."""
BETAS = (0.9, 0.999)
_SHOWN = 4  # recordings whose hypnograms are stored


@dataclass(frozen=True)
class StagingRecipe:
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
class SleepStagingConfig:
    """Settings of ``sleep-staging``."""

    fractions: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (1.0,)
    """Fractions of the training subjects whose labels are used, one fine-tuning each."""
    repeats: Count = 1
    """Fits with different seeds, each on its own draw of subjects."""
    steps: Count | None = None
    """Training steps; None: the preset's. Not together with ``epochs``."""
    epochs: Count | None = None
    """Passes over the training images; None: the preset's."""
    batch_size: BatchSize | None = None
    """Images per training step; None: the preset's."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest learning rate; None: the preset's."""


def choose_recipe(config: EvalConfig) -> StagingRecipe:
    """The preset with the user's settings."""
    own: SleepStagingConfig = config.of("sleep-staging")
    small = StagingRecipe(epochs=5, fewest_steps=200, batch_size=32, learning_rate=1e-3)
    full = StagingRecipe(epochs=50, fewest_steps=1000, batch_size=64, learning_rate=2.5e-4, drop_path=0.1)
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


class StageClassifier(nn.Module):
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
    """Loads scored training windows; see :func:`~smalti.evaluation.tuning.train`."""

    signals: SignalSet
    places: tuple[int, ...]
    """Indices of the scored windows."""

    def __len__(self) -> int:
        return len(self.places)

    def __call__(self, place: int, key: int) -> Example:
        """``(C, 1, T)`` window and its stage; not augmented."""
        index = self.places[place]
        return _window(self.signals, index), torch.tensor(int(self.signals.stages[index]))


def scored_windows(signals: SignalSet) -> LabelledWindows:
    """The windows that have a stage.

    Raises:
        DataError: if there are none.
    """
    places = np.flatnonzero(signals.stages != UNDEFINED)
    if not len(places):
        raise DataError(f"{signals.root}: no window of {', '.join(signals.names[:3])} has a stage")
    return LabelledWindows(signals, tuple(places.tolist()))


def predict(model: nn.Module, signals: SignalSet, batch_size: int, device: torch.device) -> Int[np.ndarray, " n"]:
    """The most likely stage of every window."""
    parts = []
    with torch.no_grad():
        for first in range(0, len(signals), batch_size):
            windows = [_window(signals, i) for i in range(first, min(first + batch_size, len(signals)))]
            parts.append(model(torch.stack(windows).to(device)).argmax(1).cpu().numpy())
    return np.concatenate(parts)


def confusions(signals: SignalSet, predicted: Int[np.ndarray, " n"], num_classes: int) -> Int[np.ndarray, "R K K"]:
    """Confusion matrix of each recording (rows: scored stage, columns: prediction); unscored windows are ignored."""
    counts = np.zeros((len(signals.recordings), num_classes, num_classes), np.int64)
    numbers = np.array([signals.locate(i)[0] for i in range(len(signals))], dtype=np.int64)
    is_scored = signals.stages != UNDEFINED
    np.add.at(counts, (numbers[is_scored], signals.stages[is_scored], predicted[is_scored]), 1)
    return counts


def kappa_interval(counts: Int[np.ndarray, "S R K K"], seed: int = 0) -> tuple[float, float]:
    """Interval of the mean kappa of S fits by resampling recordings with replacement, the same for all fits.

    NaN for a single recording.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13.
    """
    number = counts.shape[1]
    if number < 2:
        return math.nan, math.nan
    weights = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=RESAMPLINGS)
    drawn = np.einsum("br,srkl->bskl", weights, counts)
    kappas = cohen_kappa(torch.from_numpy(drawn)).numpy()
    kappas = kappas[np.isfinite(kappas).all(1)].mean(1)
    low, high = np.quantile(kappas, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(kappas) else (math.nan, math.nan)
    return float(low), float(high)


def area_under_log(fractions: list[float], values: list[float]) -> float:
    """Mean height of a curve over the logarithm of the label fraction: trapezoidal area divided by width."""
    x = np.log(np.array(fractions))
    return float(np.trapezoid(values, x) / (x[-1] - x[0]))


@register_protocol(
    "sleep-staging",
    need="stages",
    settings=SleepStagingConfig,
)
def sleep_staging(context: EvaluationContext[SignalSet], config: EvalConfig) -> Scores:
    """Sleep stage classification, fine-tuned on fractions of the subjects; needs recordings with stages."""
    own: SleepStagingConfig = config.of("sleep-staging")
    data = context.data
    recipe, encoder, num_classes = choose_recipe(config), context.encoder, len(data.classes)
    _check_fit(encoder, data.train)
    fractions = _distinct_fractions(own.fractions, len(data.train.subjects))
    seeds = [config.seed + number for number in range(own.repeats)]
    sweep, curve = list[dict[str, Any]](), list[float]()
    counts, predicted = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for fraction in fractions:
        found, windows, subjects = [], [], 0
        for seed in seeds:
            part = draw_subjects(data.train, fraction, seed)
            learned = scored_windows(part)
            model, losses = fine_tune(context, learned, recipe, num_classes, seed, f"sleep-staging {fraction:g}")
            guesses = predict(model, data.test, context.batch_size, context.device)
            found.append(confusions(data.test, guesses, num_classes))
            windows.append(len(learned))
            subjects = len(part.subjects)
            if seed == config.seed:
                predicted, curve = guesses, losses
        counts = np.stack(found)  # (S, R, K, K)
        low, high = kappa_interval(counts, config.seed)
        kappas = [float(cohen_kappa(torch.from_numpy(one.sum(0)))) for one in counts]
        sweep.append(
            {
                "share": fraction,
                "subjects": subjects,
                "windows": windows,
                "kappa": kappas,
                "mean": float(np.mean(kappas)),
                "low": low,
                "high": high,
            }
        )
    matrices = [torch.from_numpy(one.sum(0)) for one in counts]  # of the largest fraction
    metrics = {
        "kappa": sweep[-1]["mean"],
        "macro_f1": float(np.mean([macro_f1(matrix) for matrix in matrices])),
        "balanced_top1": float(np.mean([balanced_accuracy(matrix) for matrix in matrices])),
        "top1": float(np.mean([accuracy(matrix) for matrix in matrices])),
    }
    if len(sweep) > 1:
        means = [one["mean"] for one in sweep]
        metrics["kappa_area"] = area_under_log(fractions, means)
        metrics |= {f"kappa_at_{one['share']:g}": one["mean"] for one in sweep[:-1]}
    total = torch.stack(matrices).sum(0)
    per_class = {
        name: dict(zip(data.classes, values.tolist(), strict=True))
        for name, values in (("recall", class_recall(total)), ("f1", class_f1(total)))
    }
    settings = {
        "comparable": "our own recipe; compare encoders in this table, not with published numbers",
        "test_set": f"{len(data.test.recordings)} recordings of {len(data.test.subjects)} subjects, "
        f"{int((data.test.stages != UNDEFINED).sum())} scored windows",
        "train_subjects": len(data.train.subjects),
        "channels": list(data.train.channels),
        "signal": asdict(data.train.config),
        "trained": "a copy of the whole encoder, including positions"
        + (" (new, as it was trained without)" if encoder.position_free else ""),
        "pool": encoder.pool,
        "recipe": asdict(recipe),
        "optimiser": f"AdamW, betas {BETAS}, no weight decay on vectors, cosine to 0",
        "seeds": seeds,
        "label_sweep": sweep,
        "interval": "95 %, bootstrap over the test recordings",
    }
    return Scores(
        metrics,
        settings,
        per_class,
        units={name: AGREEMENT for name in metrics if name.startswith("kappa")},
        tallies=_tallies(counts[0]),
        confusion=total.numpy(),
        charts={
            **_label_charts(sweep),
            **_hypnograms(data.test, predicted, data.classes),
            "loss": loss_chart(curve),
        },
    )


def fine_tune(
    context: EvaluationContext[SignalSet],
    learned: LabelledWindows,
    recipe: StagingRecipe,
    num_classes: int,
    seed: int,
    what: str,
) -> tuple[StageClassifier, list[float]]:
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
        model = StageClassifier(trainable_copy(copy, recipe.drop_path), num_classes)
        optimizer = create_optimizer_v2(
            model.encoder.vit,
            "adamw",
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            betas=BETAS,
        )
        rate_fresh_positions(optimizer, encoder, model.encoder)
        losses = train(
            model,
            optimizer,
            context,
            learned,
            lambda windows, stages: F.cross_entropy(model(windows), stages, label_smoothing=recipe.label_smoothing),
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


def _window(signals: SignalSet, index: int) -> Float[Tensor, "C 1 T"]:
    return torch.from_numpy(signals.read(index)).permute(2, 0, 1)  # (1, T, C) -> (C, 1, T)


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


def _distinct_fractions(fractions: tuple[float, ...], num_subjects: int) -> list[float]:
    """Fractions in ascending order; merges those with the same number of subjects into the largest, with a warning."""
    of_count: dict[int, float] = {}
    for fraction in sorted(set(fractions)):
        of_count[max(1, round(fraction * num_subjects))] = fraction
    distinct = list(of_count.values())
    if len(distinct) < len(set(fractions)):
        left = ", ".join(f"{fraction:g}" for fraction in sorted(set(fractions) - set(distinct)))
        warnings.warn(
            f"eval.sleep-staging.fractions: {left} of {num_subjects} subjects are the same number as for a larger "
            "fraction",
            stacklevel=3,
        )
    return distinct


def _tallies(counts: Int[np.ndarray, "R K K"]) -> dict[str, Tally]:
    """Tally of each recording for the accuracies, for the first seed."""
    right, whole = (values.astype(np.float64) for values in (counts.diagonal(axis1=1, axis2=2), counts.sum(2)))
    return {
        "top1": Tally(right.sum(1, keepdims=True), whole.sum(1, keepdims=True)),
        "balanced_top1": Tally(right, whole),
    }


def _label_charts(sweep: list[dict[str, Any]]) -> dict[str, LineChart]:
    """Kappa against the fraction of labelled subjects; empty for a single fraction."""
    if len(sweep) < 2:
        return {}
    x, mean, low, high = (floats(one[key] for one in sweep) for key in ("share", "mean", "low", "high"))
    explanation = (
        "Kappa against the fraction of the training subjects whose labels are used (bands: 95 % over the test "
        "recordings); higher is better, and the grey line is the same network trained from its state before training."
    )
    line = Line(mean, x, low=low, high=high)
    chart = LineChart(
        "Kappa with fewer labels",
        explanation,
        (line,),
        "Fewer labels",
        x_axis="log fraction",
        is_wide=True,
        has_points=True,
    )
    return {"labels": chart}


def _hypnograms(signals: SignalSet, predicted: Int[np.ndarray, " n"], classes: tuple[str, ...]) -> dict[str, LineChart]:
    """Scored and predicted stages of a few recordings; windows without a stage are gaps.

    Stages are drawn as sleep laboratories do: the first (W) at the top, the last (REM) below it, then the others.
    """
    numbers = np.array([signals.locate(i)[0] for i in range(len(signals))], dtype=np.int64)
    downwards = [0, len(classes) - 1, *range(1, len(classes) - 1)]
    height = np.array([len(classes) - 1 - downwards.index(stage) for stage in range(len(classes))], dtype=np.float64)
    scored = np.where(
        signals.stages == UNDEFINED, np.nan, height[np.where(signals.stages == UNDEFINED, 0, signals.stages)]
    )
    charts = {}
    for place in spread(len(signals.recordings), _SHOWN):
        chosen, name = numbers == place, signals.names[place]
        charts[f"stages {place}"] = LineChart(
            f"Stages of {name}",
            "Sleep stage of each window of the recording as scored, and as each encoder predicts it; the closer to the "
            "scored one, the better.",
            (Line(floats(scored[chosen]), name="scored", role="truth"), Line(floats(height[predicted[chosen]]))),
            "Hypnograms",
            x_label="window",
            levels=tuple(classes[stage] for stage in reversed(downwards)),
            is_wide=True,
        )
    return charts
