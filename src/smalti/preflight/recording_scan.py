"""What ``smalti doctor`` says of a folder of recordings: content, files that can't be used, and settings to use.

Every recording is read and prepared once, as a run would; only its facts are kept.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from smalti.data.signals.hypnograms import STAGES
from smalti.data.signals.preparation import Recording, prepare_recording
from smalti.data.signals.recording_list import ListedRecording, RecordingList
from smalti.data.signals.recordings import channel_names, common_channels, read_signal
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import SignalSet, list_signals
from smalti.errors import SmaltiError
from smalti.runs.build import SIGNAL_ENCODER

_WINDOWS_S = (30.0, 20.0, 10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1)
"""Windows that are proposed."""
WHOLE = "recordings"
"""In place of a split."""
_DEFAULT = SignalConfig()

Counts = dict[str, dict[str, int]]
"""``{class: {split: windows}}``."""


@dataclass(frozen=True)
class Unusable:
    """A recording that can't be read or used."""

    path: Path
    reason: str
    """One line, which names the file."""


@dataclass(frozen=True)
class RecordingScan:
    """Content of a folder of recordings."""

    count: int
    """All recordings, also those that can't be used."""
    total_bytes: int
    channels: dict[str, int]
    """Name of a channel -> number of recordings that have it, as far as they can be read."""
    read: tuple[str, ...]
    """Channels that a run reads."""
    rates_hz: dict[float, int]
    """Sampling rate -> number of recordings."""
    lengths_s: tuple[float, ...]
    """Seconds recorded, of each recording that can be read, ascending."""
    config: SignalConfig
    """How they were read."""
    classes: Counts | None
    """Windows of each class; None without class labels."""
    stages: Counts | None
    """Windows of each sleep stage; None without stages."""
    unusable: tuple[Unusable, ...]
    doubtful: tuple[str, ...]
    """Warnings, one line each."""
    proposed: dict[str, str]
    """Setting -> value that fits these recordings better."""
    shared_subjects: tuple[str, ...] = ()
    """Subjects in several splits."""

    @property
    def problems(self) -> list[str]:
        """What makes training or evaluation fail, one sentence each."""
        found = []
        if self.unusable:
            found.append(
                f"{len(self.unusable):,} of {self.count:,} recordings can't be used, and training refuses the folder; "
                "repair or remove them, or change the settings"
            )
        if self.shared_subjects:
            found.append(
                f"subject {self.shared_subjects[0]} is in several splits, which evaluation refuses; a split is by "
                "subject"
            )
        if missing := [name for name, splits in (self.classes or {}).items() if not sum(splits.values())]:
            found.append(f"no window of {self.config.window_s:g} s has class {', '.join(missing)} for most of its time")
        return found


def scan_recordings(
    data: str, config: SignalConfig, progress: Callable[[int, int], None] | None = None
) -> tuple[str, RecordingScan]:
    """One line about the recordings, and what is in them.

    Args:
        data: as for :func:`~smalti.data.signals.signal_set.open_signals`.
        config: how they are read.
        progress: called as ``progress(done, total)``, counting files.

    Raises:
        ConfigError, DataError: if nothing can be read: no recordings, tables that can't be used, no common channel.
    """
    root, listing = list_signals(data, config)
    unusable, names = list[Unusable](), dict[Path, tuple[str, ...]]()
    for one in listing.recordings:
        try:
            names[one.path] = channel_names(one.path)
        except SmaltiError as error:
            unusable.append(Unusable(one.path, str(error)))
    readable = [one for one in listing.recordings if one.path in names]
    read = config.channels or (common_channels([one.path for one in readable]) if readable else ())
    prepared, lengths_s = list[Recording](), list[float]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for done, one in enumerate(readable, 1):
            try:
                found = prepare_recording(root, one, read, config, listing.classes or ())
                lengths_s.append(found.recorded_s)
                # only the shape of the signal is needed
                prepared.append(replace(found, signal=np.broadcast_to(np.float32(0), found.signal.shape)))
            except SmaltiError as error:
                unusable.append(Unusable(one.path, str(error)))
                lengths_s += _length(one, read, config)
            if progress is not None:
                progress(done, len(readable))
    signals = SignalSet(root, tuple(prepared), read, config, left_out=listing.left_out, classes=listing.classes)
    account = signals.account() if prepared else f"signals: {len(listing.recordings)} recordings, none can be used"
    faults = [text for one in prepared for _, text in one.faults]
    scan = RecordingScan(
        count=len(listing.recordings),
        total_bytes=sum(one.path.stat().st_size for one in listing.recordings),
        channels=dict(Counter(name for found in names.values() for name in found)),
        read=tuple(read),
        rates_hz=dict(sorted(Counter(rate for one in prepared for rate in set(one.rates_hz)).items())),
        lengths_s=tuple(sorted(lengths_s)),
        config=config,
        classes=_count(signals, signals.window_classes, listing.classes or ())
        if listing.classes and prepared
        else None,
        stages=_count(signals, signals.stages, STAGES) if any(one.stages is not None for one in prepared) else None,
        unusable=tuple(unusable),
        doubtful=(*faults, *(str(one.message) for one in caught)),
        proposed={},
        shared_subjects=_shared(prepared),
    )
    return account, replace(scan, proposed=_propose(scan, listing, names))


def _length(one: ListedRecording, channels: Sequence[str], config: SignalConfig) -> list[float]:
    """Seconds of a recording that can be read but not used; empty if they aren't known."""
    try:
        raw = read_signal(one.path, channels, config.codes, config.stage_s, with_stages=False)
    except SmaltiError:
        return []
    known = one.rate_hz or config.rate_hz
    rates_hz = raw.rates_hz or (None if known is None else (known,) * len(channels))
    if rates_hz is None:
        return []
    return [
        sum(
            min(len(values) / rate_hz for values, rate_hz in zip(piece.values, rates_hz, strict=True))
            for piece in raw.pieces
        )
    ]


def _count(signals: SignalSet, values: np.ndarray, names: Sequence[str]) -> Counts:
    """Windows of each class and split."""
    split_of = np.repeat(
        [one.split or WHOLE for one in signals.recordings],
        [one.signal.shape[1] // signals.config.window for one in signals.recordings],
    )
    splits = [*signals.splits, *([WHOLE] if WHOLE in split_of else [])] or [WHOLE]
    return {
        name: {split: int(((values == place) & (split_of == split)).sum()) for split in splits}
        for place, name in enumerate(names)
    }


def _shared(recordings: Sequence[Recording]) -> tuple[str, ...]:
    """Subjects that are in several splits, sorted."""
    pairs = {(one.subject, one.split) for one in recordings if one.split is not None}
    counts = Counter(subject for subject, _ in pairs)
    return tuple(sorted(subject for subject, count in counts.items() if count > 1))


def _propose(scan: RecordingScan, listing: RecordingList, names: dict[Path, tuple[str, ...]]) -> dict[str, str]:
    """Settings that fit the recordings better than those they were read with."""
    config, proposed = scan.config, dict[str, str]()
    if not config.channels and len({frozenset(one) for one in names.values()}) > 1:
        proposed["data.signal.channels"] = ",".join(scan.read)
    rate_hz, window_s = config.resample_hz, config.window_s
    if len(scan.rates_hz) == 1 and (only := next(iter(scan.rates_hz))) < config.resample_hz == _DEFAULT.resample_hz:
        rate_hz = only
    if fewer_s := _fitting_window(scan, listing):
        window_s = fewer_s
    if not _is_whole(window_s * rate_hz):
        rate_hz = config.resample_hz
    if window_s != config.window_s:
        proposed["data.signal.window_s"] = f"{window_s:g}"
    if rate_hz != config.resample_hz:
        proposed["data.signal.resample_hz"] = f"{rate_hz:g}"
    samples, patch = round(window_s * rate_hz), SIGNAL_ENCODER["patch_size"]
    assert isinstance(patch, int)
    if samples % patch:
        sizes = [size for size in range(2, samples // 2 + 1) if samples % size == 0]
        if sizes:
            proposed["encoder.patch_size"] = str(min(sizes, key=lambda size: abs(math.log(size / patch))))
    return proposed


def _fitting_window(scan: RecordingScan, listing: RecordingList) -> float | None:
    """A shorter window that the shortest recording holds, and that every class fills; None if there is no need."""
    limits = [seconds for seconds in scan.lengths_s[:1] if seconds < scan.config.window_s]
    for name, splits in (scan.classes or {}).items():
        if not sum(splits.values()):
            parts = [part for one in listing.recordings for part in one.parts if part.label == name]
            spans = [part.end_s - part.start_s for part in parts if math.isfinite(part.end_s)]
            limits += [float(np.median(spans))] if spans else []
    if not limits:
        return None
    return next((window_s for window_s in _WINDOWS_S if window_s <= min(limits)), None)


def _is_whole(number: float) -> bool:
    return math.isclose(number, round(number), rel_tol=1e-9)
