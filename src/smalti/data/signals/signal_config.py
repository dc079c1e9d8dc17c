"""How recordings are read and preprocessed: the settings ``data.signal.*`` and ``eval.signal.*``."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat

from smalti.config import settings
from smalti.data.signals.hypnograms import Codes
from smalti.errors import ShapeError

Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda v: tuple(map(str.strip, v.split(","))) if isinstance(v, str) else v)
]
LabelSource = Literal["folders"]


@settings
class SignalConfig:
    """How recordings are read and preprocessed. Use the settings that the encoder was trained with."""

    channels: Names = ()
    """Names of the channels, in this order; empty: all channels named after electrodes of the 10-20 system that every
    recording has; all that every recording has if they are sound or arrays without such names."""
    rate_hz: PositiveFloat | None = None
    """Sampling rate of files without one (arrays, text); None: ``rate_hz`` of recordings.csv, or computed from the
    duration of the stages."""
    resample_hz: PositiveFloat = 100.0
    """Sampling rate after resampling, as the encoder gets it."""
    low_hz: Annotated[float, Field(ge=0)] = 0.3
    """High-pass cutoff frequency; 0: no high-pass filter."""
    high_hz: PositiveFloat = 35.0
    """Low-pass cutoff frequency, at most 0.45 times the sampling rate of a recording."""
    clip: PositiveFloat = 20.0
    """Scaled values are clipped to this magnitude, in robust standard deviations."""
    window_s: PositiveFloat = 30.0
    """Length of a window in seconds; each window has one stage, or one class."""
    stage_s: PositiveFloat | None = None
    """Length of a label in seconds, for files without one; None: 5, 10, 20 or 30, whichever fits the recording."""
    codes: Codes | None = None
    """Coding of stages given as numbers: aasm (0 to 4: W, N1, N2, N3, REM), nsrr (0 to 5: W, stages 1 to 4, REM) or
    dreams (5 W, 4 REM, 3 to 0: stages 1 to 4); None: numbers are an error."""

    labels: LabelSource | None = None
    """``folders``: the class of a recording is the name of its folder (CLASS/FILE or SPLIT/CLASS/FILE). None:
    labels.csv, or the column label of recordings.csv, if present."""

    @property
    def window(self) -> int:
        """Samples of a window."""
        return round(self.window_s * self.resample_hz)


def check_window(config: SignalConfig, patch: int) -> None:
    """Refuse a window that patches don't divide.

    Raises:
        ShapeError: naming both, in samples.
    """
    if config.window % patch:
        raise ShapeError(
            f"windows are {config.window} samples ({config.window_s:g} s at {config.resample_hz:g} Hz), which patches "
            f"of {patch} samples don't divide; choose another encoder.patch_size or data.signal.window_s"
        )
