"""How recordings are read and made ready: the settings ``data.signal.*`` and ``eval.signal.*``."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveFloat

from smalti.config import settings
from smalti.data.signals.hypnograms import Codes
from smalti.errors import ShapeError

Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda v: tuple(map(str.strip, v.split(","))) if isinstance(v, str) else v)
]


@settings
class SignalConfig:
    """How recordings are read and made ready; what an encoder was trained with must be kept for it."""

    channels: Names = ()
    """Channels by name, in this order; empty: those named after electrodes of the 10-20 system that all recordings
    have."""
    rate_hz: PositiveFloat | None = None
    """Sampling rate of files that don't say theirs (arrays, text); None: ``rate_hz`` of recordings.csv, or how long the
    stages beside them last."""
    resample_hz: PositiveFloat = 100.0
    """Sampling rate that the encoder sees."""
    low_hz: Annotated[float, Field(ge=0)] = 0.3
    """Lowest frequency that is kept; 0 keeps all."""
    high_hz: PositiveFloat = 35.0
    """Highest frequency that is kept, at most 0.45 of a recording's own rate."""
    clip: PositiveFloat = 20.0
    """Largest value after scaling, in robust standard deviations."""
    window_s: PositiveFloat = 30.0
    """Seconds of a window: what gets one stage."""
    stage_s: PositiveFloat | None = None
    """Seconds of a label in files that don't say; None: what of 5, 10, 20 and 30 fits the recording."""
    codes: Codes | None = None
    """What bare numbers mean as stages: aasm (0 to 4: W, N1, N2, N3, REM), nsrr (0 to 5: W, stages 1 to 4, REM) or
    dreams (5 W, 4 REM, 3 to 0: stages 1 to 4); None refuses them."""

    @property
    def window(self) -> int:
        """Samples of a window."""
        return round(self.window_s * self.resample_hz)


def as_read(known: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of training for reading recordings elsewhere: all but the window, since a stage has its own."""
    return {name: value for name, value in known.items() if name != "window_s"}


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
