"""Window classification: a copy of the encoder, fine-tuned to classify windows of recordings, with few or many labels.

An untrained encoder gives the baseline: training from scratch. How classifiers are trained, and the fractions of
labels: :mod:`smalti.evaluation.window_tuning`. Every class weighs the same in the headline, since the time that
recordings spend in each differs.
Letters: n windows, K classes.

Source: PART, arXiv:2506.03682, for fine-tuning with fresh positions and fewer labels; all settings are our own.
"""

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from smalti.charts import LineChart, loss_chart
from smalti.config import settings
from smalti.data.signals.hypnograms import UNDEFINED
from smalti.data.signals.signal_set import SignalSet
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import EvaluationContext
from smalti.evaluation.metrics import accuracy, macro_f1
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.window_tuning import (
    NUM_TIMELINES,
    WindowTuningConfig,
    fraction_chart,
    sweep_labels,
    timelines,
    tuning_settings,
)

_MOST_LEVELS = 12
"""Classes from which on a chart of them over time can't be read."""


@settings
class WindowClassificationConfig(WindowTuningConfig):
    """Settings of ``window-classification``."""


def mean_recall(matrix: Int[Tensor, "*S K K"]) -> Float[Tensor, "*S"]:
    """Mean recall over the classes that occur, of one or many confusion matrices, float64."""
    return (matrix.diagonal(dim1=-2, dim2=-1).double() / matrix.sum(-1)).nanmean(-1)


@register_protocol(
    "window-classification",
    need="windows",
    settings=WindowClassificationConfig,
)
def window_classification(context: EvaluationContext[SignalSet], config: EvalConfig) -> Scores:
    """Classification of windows, fine-tuned on fractions of the subjects; needs recordings with class labels."""
    own: WindowClassificationConfig = config.of("window-classification")
    data = context.data
    sweep = sweep_labels(context, config, "window-classification", "balanced_top1", mean_recall)
    metrics = {
        "balanced_top1": sweep.rows[-1]["mean"],
        "top1": float(np.mean([accuracy(matrix) for matrix in sweep.matrices])),
        "macro_f1": float(np.mean([macro_f1(matrix) for matrix in sweep.matrices])),
        **sweep.fraction_metrics("balanced_top1"),
    }
    return Scores(
        metrics,
        tuning_settings(context, config, own, sweep),
        sweep.per_class(data.classes),
        tallies=sweep.tallies(),
        confusion=sweep.total.numpy(),
        charts={
            **fraction_chart(sweep, "Balanced accuracy with fewer labels", "Mean recall of the classes"),
            **_timelines(data.test, sweep.predicted, data.classes),
            "loss": loss_chart(sweep.losses),
        },
    )


def _timelines(signals: SignalSet, predicted: Int[np.ndarray, " n"], classes: tuple[str, ...]) -> dict[str, LineChart]:
    """Classes over time of a few recordings in which they change, if they aren't too many."""
    if len(classes) > _MOST_LEVELS:
        return {}
    places = [place for place, one in enumerate(signals.recordings) if _changes(one.labels)][:NUM_TIMELINES]
    found = timelines(signals, predicted, classes, range(len(classes)), places)
    return {
        f"classes {place}": LineChart(
            f"Classes of {signals.names[place]}",
            "Class of each window of the recording as labelled, and as each encoder predicts it; the closer to the "
            "labelled one, the better.",
            lines,
            "Classes over time",
            x_label="window",
            levels=levels,
            is_wide=True,
        )
        for place, (lines, levels) in found.items()
    }


def _changes(labels: np.ndarray | None) -> bool:
    return labels is not None and len(np.unique(labels[labels != UNDEFINED])) > 1
