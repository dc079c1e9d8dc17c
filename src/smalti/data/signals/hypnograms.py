"""Sleep stages: what a hypnogram file says, and which stage each window of a recording gets.

Labels without times fit one length of a label or are refused, and bare numbers need a named code: both could be read in
two ways.
Letters: n labels.
"""

import csv
import datetime
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from smalti.data.images.image_set import read_lines
from smalti.data.signals import edf
from smalti.errors import DataError
from smalti.reading import check_columns

STAGES = ("W", "N1", "N2", "N3", "REM")
"""Sleep stages of the AASM; stages 3 and 4 of Rechtschaffen and Kales are both N3."""
UNDEFINED = -1
"""Stage of what nobody scored, or scored as movement."""
Codes = Literal["aasm", "nsrr", "dreams"]
CODES: dict[Codes, dict[int, int]] = {
    "aasm": {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, -1: UNDEFINED, -2: UNDEFINED},
    "nsrr": {0: 0, 1: 1, 2: 2, 3: 3, 4: 3, 5: 4, 6: UNDEFINED, 9: UNDEFINED},
    "dreams": {5: 0, 4: 4, 3: 1, 2: 2, 1: 3, 0: 3, -1: UNDEFINED, -2: UNDEFINED, -3: UNDEFINED},
}
"""What bare numbers mean: as in YASA; as in SHHS and other data of the NSRR; as in the DREAMS databases."""
LABELS_S = (5.0, 10.0, 20.0, 30.0)
"""Lengths of a label that are tried where a file doesn't say."""
_DREAMS_LABEL_S = 5.0

_STAGE_NAMES = {"w": 0, "wake": 0, "1": 1, "n1": 1, "s1": 1, "2": 2, "n2": 2, "s2": 2, "3": 3, "n3": 3, "s3": 3}
_STAGE_NAMES |= {"4": 3, "n4": 3, "s4": 3, "r": 4, "rem": 4}
_STAGE_NAMES |= dict.fromkeys(("?", "m", "mt", "movement", "movement time", "undefined", "unscored", ""), UNDEFINED)
_NUMBER = re.compile(r"([+-]?\d{1,9})(?:\.0*)?")


@dataclass(frozen=True)
class Scoring:
    """Scored stages with their times; the remaining time is undefined."""

    onsets: np.ndarray
    """``(n,)`` seconds from the start of the recording, or of the scoring where ``start`` is known."""
    durations: np.ndarray
    """``(n,)`` seconds."""
    stages: np.ndarray
    """``(n,)`` places in :data:`STAGES`, or :data:`UNDEFINED`."""
    start: datetime.datetime | None = None
    """When onset 0 is, as a file of its own says."""
    num_classes: int = len(STAGES)

    @property
    def end_s(self) -> float:
        """Where the last label ends."""
        return float((self.onsets + self.durations).max(initial=0.0))

    @property
    def scored_end_s(self) -> float:
        """Where the last label ends that is a stage; files often close with a long undefined one."""
        is_stage = self.stages != UNDEFINED
        return float((self.onsets + self.durations)[is_stage].max(initial=0.0))

    def shifted(self, seconds: float) -> "Scoring":
        """The same, so many seconds later."""
        return replace(self, onsets=self.onsets + seconds)

    def windows(self, starts_s: Float[np.ndarray, " W"], window_s: float) -> Int[np.ndarray, " W"]:
        """The stage that covers most of each window; a tie goes to the first of them.

        Args:
            starts_s: where windows begin, in seconds as ``onsets``.
            window_s: their length.
        """
        covered = np.zeros((len(starts_s), self.num_classes))
        for onset, duration, stage in zip(self.onsets, self.durations, self.stages, strict=True):
            if stage != UNDEFINED:
                shared = np.minimum(starts_s + window_s, onset + duration) - np.maximum(starts_s, onset)
                covered[:, stage] += shared.clip(0)
        covered = covered.round(6)
        undefined = window_s - covered.sum(1)
        return np.where(undefined > covered.max(1) + 1e-6, UNDEFINED, covered.argmax(1)).astype(np.int64)


@dataclass(frozen=True)
class Labels:
    """Stages one after the other from the start of the recording, of a length that the file doesn't say."""

    path: Path
    stages: np.ndarray
    """``(n,)`` places in :data:`STAGES`, or :data:`UNDEFINED`."""
    label_s: float | None = None
    """Seconds of a label where the file or the user says."""

    def timed(self, label_s: float) -> Scoring:
        """With times, for labels of so many seconds."""
        count = len(self.stages)
        return Scoring(np.arange(count) * label_s, np.full(count, label_s), self.stages)


def read_hypnogram(path: Path, codes: Codes | None = None, stage_s: float | None = None) -> Scoring | Labels:
    """Stages from a file: EDF+ annotations, a CSV table, or a text with a label a line.

    A CSV table has a column ``stage`` and, where labels don't simply follow each other, ``onset_s`` and ``duration_s``.
    A text may have a heading in brackets.

    Args:
        path: of the stages.
        codes: what bare numbers mean; see :data:`CODES`.
        stage_s: seconds of a label, where the file doesn't say.

    Raises:
        DataError: if the file can't be read, holds an unknown stage, or bare numbers without ``codes``.
    """
    if path.suffix.lower() in edf.ENDINGS:
        header = edf.open_edf(path)
        scoring = stages_of(path, edf.read_timeline(header).annotations, stage_s)
        if scoring is None:
            raise DataError(f"{path}: has no annotations of sleep stages")
        return replace(scoring, start=header.start)
    lines = read_lines(path)
    if path.suffix.lower() == ".csv" and lines and "stage" in [c.strip() for c in lines[0][1].split(",")]:
        return _table(path, codes, stage_s)
    labels = [(number, line) for number, line in lines if not re.fullmatch(r"\[.*\]", line)]
    return Labels(path, parse_stages(path, labels, codes), stage_s)


def parse_stages(path: Path, labels: Sequence[tuple[int, str]], codes: Codes | None) -> Int[np.ndarray, " n"]:
    """Places in :data:`STAGES` of labels: names, or bare numbers under a code.

    Beside names such as W and R the numbers 1 to 4 are the stages 1 to 4 of Rechtschaffen and Kales.

    Args:
        path: named in errors.
        labels: number of the line and its text.
        codes: what bare numbers mean.

    Raises:
        DataError: for an unknown stage, no stage at all, or bare numbers without ``codes``.
    """
    if not labels:
        raise DataError(f"{path}: an empty hypnogram; it needs one stage a line")
    numbers = [int(found[1]) if (found := _NUMBER.fullmatch(text.strip())) else None for _, text in labels]
    is_named = any(
        number is None and _STAGE_NAMES.get(text.strip().lower(), UNDEFINED) != UNDEFINED
        for number, (_, text) in zip(numbers, labels, strict=True)
    )
    bare = {number for number in numbers if number is not None}
    if bare and not is_named and codes is None:
        raise DataError(f"{path}: has bare numbers as stages; {_readings(bare)}")
    stages = []
    for number, (line, text) in zip(numbers, labels, strict=True):
        if number is not None and not is_named:
            assert codes is not None
            if number not in CODES[codes]:
                raise DataError(
                    f"{path}: line {line} holds {number}, which is no stage under data.signal.codes={codes}; "
                    f"{_readings(bare)}"
                )
            stages.append(CODES[codes][number])
        elif text.strip().lower() in _STAGE_NAMES:
            stages.append(_STAGE_NAMES[text.strip().lower()])
        else:
            raise DataError(
                f"{path}: line {line} holds '{text[:40]}', which is no sleep stage; {', '.join(STAGES)} or ? are known"
            )
    return np.array(stages, dtype=np.int64)


def stages_of(
    path: Path, annotations: Iterable[tuple[float, float | None, str]], stage_s: float | None
) -> Scoring | None:
    """The sleep stages among EDF+ annotations; None if there are none.

    Args:
        path: named in errors.
        annotations: onset, duration (None: unknown) and text.
        stage_s: seconds of a label without a duration.

    Raises:
        DataError: for a sleep stage that is unknown, or of unknown length.
    """
    found = []
    for onset, duration, text in annotations:
        whole = text.strip().lower()
        name = re.sub(r"^sleep[ _-]?stage[ _-]*|^stage[ _-]*", "", whole)
        if name == whole and name not in ("movement time", *(stage.lower() for stage in STAGES)):
            continue
        if name in _STAGE_NAMES:
            found.append((onset, duration or math.nan, _STAGE_NAMES[name]))
        elif re.fullmatch(r"sleep[ _-]?stage[ _-]*\S*", whole):
            raise DataError(f"{path}: '{text[:40]}' at {onset:g} s is no sleep stage; W, N1, N2, N3, R or ? are known")
    if not found:
        return None
    onsets, durations, stages = (np.array(column) for column in zip(*found, strict=True))
    return _scoring(path, onsets, durations, stages.astype(np.int64), stage_s)


def time_labels(
    labels: Labels, recording: Path, span_s: float | None, gaps_s: float = 0.0, codes: Codes | None = None
) -> Scoring:
    """Labels with the times that fit a recording; they begin where it begins.

    Args:
        labels: of a file without times.
        recording: named in errors.
        span_s: seconds from the start to the end of the recording, gaps included; None if that isn't known.
        gaps_s: seconds of ``span_s`` that weren't recorded.
        codes: ``dreams`` says that labels last 5 s where ``span_s`` isn't known.

    Raises:
        DataError: if no length of a label fits, or several do, or it isn't clear whether labels count gaps.
    """
    count = len(labels.stages)
    if labels.label_s is None and span_s is None:
        if codes == "dreams":
            return labels.timed(_DREAMS_LABEL_S)
        raise DataError(
            f"{labels.path}: neither how long its {count:,} labels last nor how long the recording is; give "
            "data.signal.stage_s, or data.signal.rate_hz where the recording doesn't say its sampling rate"
        )
    lengths = LABELS_S if labels.label_s is None else (labels.label_s,)
    if span_s is not None and gaps_s:
        joined = [length for length in lengths if _fits(count, length, span_s - gaps_s)]
        if any(not _fits(count, length, span_s) for length in joined):
            raise DataError(
                f"{labels.path}: {count:,} labels of {joined[0]:g} s fit {recording.name} without its gaps of "
                f"{gaps_s:g} s, so their times aren't clear; give a csv with onset_s, duration_s and stage"
            )
    if labels.label_s is not None:
        return labels.timed(labels.label_s)
    assert span_s is not None
    fitting = [length for length in LABELS_S if _fits(count, length, span_s)]
    exact = [length for length in fitting if math.isclose(count * length, span_s, abs_tol=1e-6)]
    if len(exact or fitting) == 1:
        return labels.timed((exact or fitting)[0])
    lasting = ", ".join(f"{count * length:g} s at {length:g} s" for length in fitting or LABELS_S)
    raise DataError(
        f"{labels.path}: {count:,} labels fit {f'{len(fitting)} label lengths' if fitting else 'no label length'} "
        f"({lasting}; the recording {recording.name} lasts {span_s:g} s); set data.signal.stage_s, or give a csv with "
        "onset_s and stage"
    )


def align(scoring: Scoring, recording: Path, start: datetime.datetime | None, span_s: float) -> Scoring:
    """A scoring with onsets from the start of the recording, where both say when they start.

    Args:
        scoring: as read.
        recording: named in errors.
        start: of the recording; None if it doesn't say.
        span_s: how long it lasts.

    Raises:
        DataError: if no label lies within the recording.
    """
    late_s = 0.0 if scoring.start is None or start is None else (scoring.start - start).total_seconds()
    moved = scoring.shifted(late_s)
    first_s = float(moved.onsets.min(initial=math.inf))
    if len(moved.onsets) and (first_s >= span_s or moved.end_s <= 0):
        starts = f" (it starts {scoring.start}, the recording {start})" if late_s else ""
        raise DataError(
            f"{recording}: its hypnogram lies outside{starts}: from {first_s:g} to {first_s + _extent(moved):g} s of a "
            f"recording of {span_s:g} s; correct the start, or give a csv with onset_s, duration_s and stage"
        )
    return moved


def _extent(scoring: Scoring) -> float:
    return float((scoring.onsets + scoring.durations).max() - scoring.onsets.min())


def _fits(count: int, label_s: float, span_s: float) -> bool:
    """Whether labels end within one label of where the recording ends."""
    return abs(count * label_s - span_s) < label_s


def _readings(bare: set[int]) -> str:
    """What each code makes of some numbers, one line."""
    readings = [
        f"{name} ({', '.join(f'{number} {_shown(table[number])}' for number in sorted(bare))})"
        for name, table in CODES.items()
        if bare <= table.keys()
    ]
    if not readings:
        shown = ", ".join(map(str, sorted(bare)[:9]))
        return f"none of {', '.join(CODES)} has all of {shown}; write them as {', '.join(STAGES)} or ?"
    return f"name their code with data.signal.codes={' or '.join(readings)}"


def _shown(stage: int) -> str:
    return "?" if stage == UNDEFINED else STAGES[stage]


def _table(path: Path, codes: Codes | None, stage_s: float | None) -> Scoring | Labels:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = table_rows(path, csv.DictReader(file))
    stages = parse_stages(path, [(number, row["stage"]) for number, row in enumerate(rows, 2)], codes)
    if "onset_s" not in rows[0]:
        return Labels(path, stages, stage_s)
    try:
        onsets = np.array([float(row["onset_s"]) for row in rows])
        durations = np.array([float(row.get("duration_s") or "nan") for row in rows])
    except ValueError as error:
        raise DataError(f"{path}: onset_s and duration_s must be seconds ({error})") from None
    return _scoring(path, onsets, durations, stages, stage_s)


def _scoring(
    path: Path, onsets: np.ndarray, durations: np.ndarray, stages: np.ndarray, stage_s: float | None
) -> Scoring:
    """In order of onsets; labels without a duration (NaN) last ``stage_s``, else as long as they are apart."""
    if not np.isfinite(onsets).all() or np.isinf(durations).any() or (durations < 0).any():
        raise DataError(f"{path}: onsets and durations must be finite seconds, durations at least 0")
    order = np.argsort(onsets, kind="stable")
    onsets, durations, stages = onsets[order], durations[order], stages[order]
    if np.isnan(durations).any():
        apart = np.unique(np.diff(onsets).round(3))
        length = stage_s or (float(apart[0]) if len(apart) == 1 and apart[0] in LABELS_S else None)
        if length is None:
            raise DataError(
                f"{path}: does not say how long its labels last, and they are not evenly spaced by "
                f"{', '.join(f'{length:g}' for length in LABELS_S)} s; give durations (duration_s) or "
                "data.signal.stage_s"
            )
        durations = np.where(np.isnan(durations), length, durations)
    shorter = np.minimum(durations[:-1], durations[1:])
    overlap = onsets[:-1] + durations[:-1] - onsets[1:]
    differ = (stages[:-1] != stages[1:]) & (stages[:-1] != UNDEFINED) & (stages[1:] != UNDEFINED)
    doubled = np.flatnonzero(differ & (shorter > 0) & (overlap > shorter / 2))
    if len(doubled):
        first = int(doubled[0])
        raise DataError(
            f"{path}: from {onsets[first + 1]:g} s on it says both {_shown(int(stages[first]))} and "
            f"{_shown(int(stages[first + 1]))}; keep one scoring"
        )
    return Scoring(onsets, durations, stages)


def table_rows(path: Path, reader: "csv.DictReader[str]") -> list[dict[str, str]]:
    """Rows of a table without blanks around cells.

    Raises:
        DataError: for a row with more cells than there are columns, two columns of one name, or what is no table.
    """
    rows = []
    try:
        check_columns(path, reader.fieldnames or ())
        for number, row in enumerate(reader, 2):
            if None in row:
                raise DataError(
                    f"{path}: line {number} has more cells than the {len(row) - 1} columns of the first line"
                )
            rows.append({str(name).strip(): (value or "").strip() for name, value in row.items()})
    except csv.Error as error:
        raise DataError(f"{path}: can't be read as a table ({error})") from None
    return rows
