"""Sleep staging: a copy of the encoder, fine-tuned to classify the sleep stage of each window, with many or few labels.

An untrained encoder gives the baseline: training from scratch. How classifiers are trained, and the fractions of
labels: :mod:`smalti.evaluation.window_tuning`.
Letters: n windows, K stages.

Source: the protocol of PART, arXiv:2506.03682 (fine-tuning with fresh positions, fewer labels); its settings for EEG
could not be found, so all settings here are our own. Cohen, "A coefficient of agreement for nominal scales", 1960.
"""

import numpy as np
from jaxtyping import Int

from smalti.charts import LineChart, loss_chart
from smalti.config import settings
from smalti.data.signals.signal_set import SignalSet
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import EvaluationContext
from smalti.evaluation.metrics import accuracy, balanced_accuracy, cohen_kappa, macro_f1
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.window_tuning import (
    WindowTuningConfig,
    fraction_chart,
    some_recordings,
    sweep_labels,
    timelines,
    tuning_settings,
)

AGREEMENT = "agreement beyond chance, at most 1, higher is better"
"""Unit of kappa; it may be negative."""


@settings
class SleepStagingConfig(WindowTuningConfig):
    """Settings of ``sleep-staging``."""


@register_protocol(
    "sleep-staging",
    need="stages",
    settings=SleepStagingConfig,
)
def sleep_staging(context: EvaluationContext[SignalSet], config: EvalConfig) -> Scores:
    """Sleep stage classification, fine-tuned on fractions of the subjects; needs recordings with stages."""
    own: SleepStagingConfig = config.of("sleep-staging")
    data = context.data
    sweep = sweep_labels(context, config, "sleep-staging", "kappa", cohen_kappa)
    metrics = {
        "kappa": sweep.rows[-1]["mean"],
        "macro_f1": float(np.mean([macro_f1(matrix) for matrix in sweep.matrices])),
        "balanced_top1": float(np.mean([balanced_accuracy(matrix) for matrix in sweep.matrices])),
        "top1": float(np.mean([accuracy(matrix) for matrix in sweep.matrices])),
        **sweep.fraction_metrics("kappa"),
    }
    return Scores(
        metrics,
        tuning_settings(context, config, own, sweep),
        sweep.per_class(data.classes),
        units={name: AGREEMENT for name in metrics if name.startswith("kappa")},
        tallies=sweep.tallies(),
        confusion=sweep.total.numpy(),
        charts={
            **fraction_chart(sweep, "Kappa with fewer labels", "Kappa"),
            **_hypnograms(data.test, sweep.predicted, data.classes),
            "loss": loss_chart(sweep.losses),
        },
    )


def _hypnograms(signals: SignalSet, predicted: Int[np.ndarray, " n"], classes: tuple[str, ...]) -> dict[str, LineChart]:
    """Scored and predicted stages of a few recordings.

    Stages are drawn as sleep laboratories do: the first (W) at the top, the last (REM) below it, then the others.
    """
    downwards = [0, len(classes) - 1, *range(1, len(classes) - 1)]
    found = timelines(signals, predicted, classes, downwards, some_recordings(signals))
    return {
        f"stages {place}": LineChart(
            f"Stages of {signals.names[place]}",
            "Sleep stage of each window of the recording as scored, and as each encoder predicts it; the closer to the "
            "scored one, the better.",
            lines,
            "Hypnograms",
            x_label="window",
            levels=levels,
            is_wide=True,
        )
        for place, (lines, levels) in found.items()
    }
