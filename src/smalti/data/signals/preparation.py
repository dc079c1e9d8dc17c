"""Recordings made ready for an encoder: filtered and scaled whole, then cut into windows that have stages.

Each channel is filtered at its own sampling rate, each piece between gaps on its own; the scale is that of the whole
recording. No window crosses a gap.
Letters: C channels, R samples of all windows, W windows; lengths of pieces differ.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import Float

from smalti.data.signals.hypnograms import Labels, Scoring, align, read_hypnogram, time_labels
from smalti.data.signals.recording_list import TABLE, ListedRecording
from smalti.data.signals.recordings import Piece, RawSignal, read_signal
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_file import StoredSignal
from smalti.data.signals.window_labels import scoring_of
from smalti.errors import DataError

_HIGHEST_BAND = 0.45
"""Highest frequency to keep, as a fraction of the sampling rate."""
_MAD_OF_NORMAL = 0.6744897501960817
"""Median absolute deviation of a standard normal variable."""
_FILTER_ORDER = 4
_RATES_HZ = (0.1, 1e6)
"""Lowest and highest sampling rate that is believed."""
_LARGEST_FACTORS = (1_000, 10_000, 100_000)
"""Of up- and downsampling; larger ones are tried where the smaller ones would let time drift."""


@dataclass(frozen=True)
class Recording:
    """One recording, made ready."""

    name: str
    """Its file, relative to the set."""
    path: Path
    subject: str
    split: str | None
    signal: np.ndarray | StoredSignal = field(repr=False)
    """``(C, R)`` float32, whole windows one after the other; between two there may be a gap."""
    starts_s: np.ndarray = field(repr=False)
    """``(W,)`` seconds from the start of the recording to each window."""
    stages: np.ndarray | None = field(repr=False)
    """``(W,)`` places in :data:`~smalti.data.signals.hypnograms.STAGES` or UNDEFINED; None if it wasn't scored."""
    labels: np.ndarray | None = field(default=None, repr=False)
    """``(W,)`` places in the classes of the set or UNDEFINED; None if it has no class labels."""
    rates_hz: tuple[float, ...] = ()
    """As recorded, of each channel."""
    recorded_s: float = 0.0
    """Seconds that the file holds, also those in no whole window."""
    gaps_s: float = 0.0
    """Seconds between its first and its last sample that weren't recorded."""
    hypnogram: Path | None = None
    """Where its stages are from: a file beside it, or its own."""
    faults: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """See :class:`~smalti.data.signals.recordings.RawSignal`."""


def prepare_recording(
    root: Path,
    listed: ListedRecording,
    channels: Sequence[str],
    config: SignalConfig,
    classes: Sequence[str] = (),
) -> Recording:
    """A recording, read and made ready.

    Args:
        root: of the set; names are relative to it.
        listed: the recording.
        channels: by name, in the order of the encoder.
        config: how it is read.
        classes: of the labelled parts of all recordings.

    Raises:
        DataError: if it can't be read or used, or its stages or labels contradict it; one line.
    """
    path = listed.path
    raw = read_signal(path, channels, config.codes, config.stage_s, with_stages=listed.hypnogram is None)
    scoring = raw.scoring
    if listed.hypnogram is not None:
        scoring = read_hypnogram(listed.hypnogram, config.codes, config.stage_s)
    rates_hz = _known_rates(path, raw.rates_hz, listed.rate_hz, len(channels), config)
    if rates_hz is None:
        if isinstance(scoring, Labels):
            scoring = time_labels(scoring, path, None, codes=config.codes)
        rates_hz = _fitting_rates(path, raw, scoring)
    ends_s = [piece.start_s + _seconds(piece, rates_hz) for piece in raw.pieces]
    recorded_s = sum(_seconds(piece, rates_hz) for piece in raw.pieces)
    gaps_s = max(0.0, ends_s[-1] - recorded_s) if len(raw.pieces) > 1 else 0.0
    full_s = None if raw.missing_s is None else ends_s[-1] + raw.missing_s
    if isinstance(scoring, Labels):
        scoring = time_labels(scoring, path, full_s, gaps_s, config.codes)
    if scoring is not None:
        scoring = align(scoring, path, raw.start, full_s or max(ends_s[-1], scoring.end_s))
        _check_length(path, scoring, full_s, raw, config)
    labelled = scoring_of(path, listed.parts, classes, full_s or ends_s[-1], config.window_s) if listed.parts else None
    kept = [piece for piece in raw.pieces if _seconds(piece, rates_hz) + 1e-9 >= config.window_s]
    ready = [
        condition_channel(
            [(piece.start_s, piece.values[number]) for piece in kept], rate_hz, config, f"{path}: channel {channel}"
        )
        for number, (channel, rate_hz) in enumerate(zip(channels, rates_hz, strict=True))
    ]
    cut = [
        _cut([channel[number] for channel in ready], piece.start_s, scoring or labelled, config)
        for number, piece in enumerate(kept)
    ]
    starts = np.concatenate([windows for _, windows in cut]) if cut else np.zeros(0)
    if not len(starts):
        longest_s = max(_seconds(piece, rates_hz) for piece in raw.pieces)
        raise DataError(
            f"{path}: lasts {longest_s:.1f} s at {rates_hz[0]:g} Hz{' without a gap' * (len(raw.pieces) > 1)}, a "
            f"window is {config.window_s:g} s"
        )
    return Recording(
        path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix(),
        path,
        listed.subject,
        listed.split,
        np.ascontiguousarray(np.concatenate([signal for signal, _ in cut], axis=1)),
        starts,
        None if scoring is None else scoring.windows(starts, config.window_s),
        None if labelled is None else labelled.windows(starts, config.window_s),
        rates_hz,
        recorded_s,
        gaps_s,
        None if scoring is None else listed.hypnogram or path,
        raw.faults,
    )


def condition_channel(
    pieces: Sequence[tuple[float, Float[np.ndarray, "_"]]], rate_hz: float, config: SignalConfig, where: str = "signal"
) -> list[Float[np.ndarray, "_"]]:
    """The pieces of one channel ready for windows: band-pass without phase, resampled, robustly scaled, clipped.

    Scaled by median and 1.4826 median absolute deviations over all pieces; by the standard deviation where more than
    half of them is one value.

    Args:
        pieces: seconds from the start of the recording, and values as recorded, any unit.
        rate_hz: of the values.
        config: band, rate and limit.
        where: what to name in errors.

    Returns:
        float32 values of each piece at ``config.resample_hz``.

    Raises:
        DataError: if a value is not finite, the channel is flat, or the rate leaves nothing of the band.
    """
    from scipy import signal as dsp  # heavy, and only needed here

    if not pieces:
        return []
    for start_s, values in pieces:
        if not np.isfinite(values).all():
            count, first = int((~np.isfinite(values)).sum()), int(np.argmin(np.isfinite(values)))
            raise DataError(
                f"{where}: {count} values are not finite, the first at {start_s + first / rate_hz:.2f} s; cut them out "
                "or fill them"
            )
    high = highest_hz(rate_hz, config)
    if high <= config.low_hz:
        raise DataError(f"{where}: {rate_hz:g} Hz leaves nothing between {config.low_hz:g} and {high:g} Hz")
    kind = ("bandpass", [config.low_hz, high]) if config.low_hz else ("lowpass", high)
    sections = dsp.butter(_FILTER_ORDER, kind[1], kind[0], fs=rate_hz, output="sos")
    recorded = np.concatenate([values for _, values in pieces])
    median, ratio = np.median(recorded), _ratio(rate_hz, len(recorded), config, where)
    filtered = []
    for _, values in pieces:
        try:
            one = dsp.sosfiltfilt(sections, values - median)
        except ValueError as error:  # fewer samples than the filter needs
            raise DataError(f"{where}: {len(values)} samples are too few to be filtered ({error})") from None
        filtered.append(one if ratio == 1 else dsp.resample_poly(one, ratio.numerator, ratio.denominator))
    joined = np.concatenate(filtered)
    median = np.median(joined)
    robust = np.median(np.abs(joined - median)) / _MAD_OF_NORMAL
    least = 1e-9 * np.ptp(recorded)
    scale = robust if robust > least else joined.std()
    if not scale > least:
        raise DataError(f"{where} is flat; choose others with data.signal.channels")
    return [np.clip((one - median) / scale, -config.clip, config.clip).astype(np.float32) for one in filtered]


def highest_hz(rate_hz: float, config: SignalConfig) -> float:
    """Highest frequency that is kept of a channel recorded at a rate."""
    return min(config.high_hz, _HIGHEST_BAND * rate_hz, _HIGHEST_BAND * config.resample_hz)


def _ratio(rate_hz: float, samples: int, config: SignalConfig, where: str) -> Fraction:
    """By what to resample: time drifts by less than half a sample over the recording."""
    exact = config.resample_hz / rate_hz
    for largest in _LARGEST_FACTORS:
        ratio = Fraction(exact).limit_denominator(largest)
        if ratio and abs(float(ratio) - exact) * samples < 0.5:
            return ratio
    raise DataError(f"{where}: {rate_hz:g} Hz can't be resampled to {config.resample_hz:g} Hz without a drift in time")


def _cut(
    channels: Sequence[Float[np.ndarray, "_"]], start_s: float, scoring: Scoring | None, config: SignalConfig
) -> tuple[Float[np.ndarray, "C R"], Float[np.ndarray, " W"]]:
    """Whole windows of one piece and where they begin: where its first label begins, or whole windows before it."""
    late_s = 0.0
    if scoring is not None and len(scoring.onsets):
        within = scoring.onsets[scoring.onsets >= start_s - 1e-6]
        late_s = (float(within.min() if len(within) else scoring.onsets.min()) - start_s) % config.window_s
        late_s = 0.0 if math.isclose(late_s, config.window_s, abs_tol=1e-6) else late_s
    first, length = round(late_s * config.resample_hz), min(len(one) for one in channels)
    count = max(0, (length - first) // config.window)
    signal = np.stack([one[first : first + count * config.window] for one in channels])
    return signal, start_s + late_s + np.arange(count) * config.window_s


def _seconds(piece: Piece, rates_hz: Sequence[float]) -> float:
    return min(len(values) / rate_hz for values, rate_hz in zip(piece.values, rates_hz, strict=True))


def _known_rates(
    path: Path, own: tuple[float, ...] | None, listed: float | None, num_channels: int, config: SignalConfig
) -> tuple[float, ...] | None:
    """The sampling rates of a recording's channels, from the file, the table or the settings.

    Raises:
        DataError: if they contradict each other or can't be.
    """
    for known in (*(own or ()), *([listed] if listed is not None else [])):
        if not _RATES_HZ[0] <= known <= _RATES_HZ[1]:
            raise DataError(
                f"{path}: a sampling rate of {known:g} Hz; between {_RATES_HZ[0]:g} and {_RATES_HZ[1]:,.0f} is needed"
            )
    for known in own or ():
        if listed and not math.isclose(known, listed, rel_tol=1e-3):
            raise DataError(f"{path}: says {known:g} Hz, {TABLE} says {listed:g} Hz")
        if config.rate_hz and not math.isclose(known, config.rate_hz, rel_tol=1e-3):
            raise DataError(
                f"{path}: says {known:g} Hz, data.signal.rate_hz={config.rate_hz:g}; leave it out for such files"
            )
    rate_hz = listed or config.rate_hz
    return own or (None if rate_hz is None else (rate_hz,) * num_channels)


def _fitting_rates(path: Path, raw: RawSignal, scoring: Scoring | None) -> tuple[float, ...]:
    """The whole number of samples a second with which a recording lasts as long as its stages.

    Raises:
        DataError: if there is none.
    """
    if scoring is None or not scoring.end_s:
        raise DataError(f"{path}: does not say its sampling rate; give data.signal.rate_hz=HZ, or rate_hz in {TABLE}")
    fits = len(raw.pieces[0].values[0]) / scoring.end_s
    if not math.isclose(fits, round(fits), abs_tol=1e-6) or not round(fits):
        raise DataError(
            f"{path}: does not say its sampling rate, and its stages don't fit one; give data.signal.rate_hz"
        )
    return (float(round(fits)),) * len(raw.pieces[0].values)


def _check_length(path: Path, scoring: Scoring, full_s: float | None, raw: RawSignal, config: SignalConfig) -> None:
    """Refuse stages that continue after the end, warn of those that end early.

    Args:
        path: of the recording.
        scoring: from its start.
        full_s: how long the recording is, also where the end of its file is missing; None if that isn't known.
        raw: as read.
        config: the window, what may be more.
    """
    if full_s is None:
        return
    if scoring.scored_end_s > full_s + config.window_s + 1e-6:
        hint = "do they belong to this recording?"
        if raw.rates_hz is None:
            hint = f"a rate of {len(raw.pieces[0].values[0]) / scoring.scored_end_s:g} Hz would fit"
        raise DataError(f"{path}: lasts {full_s:.0f} s, its stages {scoring.scored_end_s:.0f} s; {hint}")
    if scoring.end_s < full_s / 2:
        warnings.warn(
            f"{path}: lasts {full_s:.0f} s, its stages end at {scoring.end_s:.0f} s"
            f"{f' with data.signal.stage_s={config.stage_s:g}' if config.stage_s else ''}; the rest is unscored",
            stacklevel=2,
        )
