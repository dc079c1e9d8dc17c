"""Labelled recordings in two parts: split by subject, and fractions of the subjects to learn from."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from smalti.data.dataset import Labelled
from smalti.data.images.image_set import SPLITS
from smalti.data.loader import epoch_order
from smalti.data.signals.hypnograms import STAGES, UNDEFINED
from smalti.data.signals.recording_list import TABLE
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import SignalSet, Target, open_signals
from smalti.errors import ConfigError, DataError

_FRACTIONS = {"test": 0.2, "val": 0.1}
_SEARCHED = {
    "stages": "no recording has sleep stages; they stand in STEM.stages.csv, Hypnogram_STEM.txt, STEM-Hypnogram.edf or "
    "in the EDF+ file itself",
    "classes": "no recording has class labels; they stand in labels.csv (file, start_s, end_s, label), in the column "
    "label of recordings.csv, or in the names of the folders (data.signal.labels=folders)",
}


def open_labelled_signals(
    data: str | Path,
    config: SignalConfig,
    *,
    target: Target = "stages",
    split: str | None = None,
    seed: int = 0,
) -> Labelled[SignalSet]:
    """Labelled recordings in two parts, by subject.

    Args:
        data: as for :func:`open_signals`.
        config: how they are read.
        target: which labels, sleep stages or classes.
        split: split to evaluate on; None: test, else val, else a random 20 % of the subjects (seeded).
        seed: of that choice.

    Raises:
        DataError: if no recording has labels, or there are too few subjects; and as :func:`open_signals`.
    """
    try:
        signals = open_signals(data, config)
    except (ConfigError, DataError) as error:  # their settings are those of training
        raise type(error)(str(error).replace("data.signal.", "eval.signal.")) from None
    signals = replace(signals, target=target)
    scored = replace(signals, recordings=tuple(filter(signals.is_scored, signals.recordings)))
    if not scored.recordings:
        raise DataError(f"{signals.root}: {_no_labels(signals).replace('data.signal.', 'eval.signal.')}")
    _refuse_doubtful_subjects(scored)
    missing = len(signals.recordings) - len(scored.recordings)
    rest = f"; {missing} recordings without {target} are left out" if missing else ""
    classes = STAGES if target == "stages" else signals.classes or ()
    if scored.splits:
        evaluated = split or next((name for name in ("test", "val") if name in scored.splits), "test")
        train, test = scored.subset("train"), scored.subset(evaluated)
        note = f"train ({len(train.recordings)} recordings) and {evaluated} ({len(test.recordings)}){rest}"
        if both := set(train.subjects) & set(test.subjects):
            raise DataError(
                f"{signals.root}: subject {min(both)} is in train and in {evaluated}; a split is by subject; "
                f"if these are two people, say so in {TABLE} (columns file, subject, split)"
            )
        return Labelled(train, test, classes, note, split=evaluated)
    parts = _split_alike(scored, seed)
    evaluated = SPLITS.get(split or "test", split or "test")
    if evaluated not in parts or not parts[evaluated] or not parts["train"]:
        raise DataError(
            f"{signals.root}: {len(scored.subjects)} scored subjects can't be split by subject into train and "
            f"{evaluated}"
        )
    counts = ", ".join(f"{name} {len(names)}" for name, names in parts.items())
    note = f"no splits found: subjects split by seed {seed} ({counts}), evaluated on {evaluated}{rest}"
    return Labelled(
        scored.of_subjects(parts["train"]), scored.of_subjects(parts[evaluated]), classes, note, split=evaluated
    )


def _refuse_doubtful_subjects(signals: SignalSet) -> None:
    """Files of one name in several folders: one person, or several? A split by subject must know."""
    places: dict[str, set[Path]] = {}
    for recording in signals.recordings:
        if recording.subject == recording.path.stem:  # the subject is unknown
            places.setdefault(recording.subject, set()).add(recording.path.parent)
    for subject, folders in sorted(places.items()):
        if len(folders) > 1:
            raise DataError(
                f"{signals.root}: {subject} lies in {len(folders)} folders, {min(folders).name} and others; is that "
                f"one person? Name subjects in {TABLE} (columns file, subject), or folders sub-NAME"
            )


def split_subjects(subjects: Sequence[str], seed: int) -> dict[str, tuple[str, ...]]:
    """Subjects for train, val and test, 70, 10 and 20 in a hundred; of few, one at least is for test and for train."""
    order = [subjects[i] for i in epoch_order(seed, 0, len(subjects))]
    num_test = min(max(1, round(_FRACTIONS["test"] * len(order))), len(order) - 1)
    num_val = min(round(_FRACTIONS["val"] * len(order)), len(order) - num_test - 1)
    train = order[num_test + num_val :]
    return {"train": tuple(train), "val": tuple(order[num_test : num_test + num_val]), "test": tuple(order[:num_test])}


def _split_alike(signals: SignalSet, seed: int) -> dict[str, tuple[str, ...]]:
    """:func:`split_subjects` of each stratum."""
    parts: dict[str, tuple[str, ...]] = {"train": (), "val": (), "test": ()}
    for subjects in strata(signals):
        for name, chosen in split_subjects(subjects, seed).items():
            parts[name] += chosen
    return parts


def strata(signals: SignalSet) -> tuple[tuple[str, ...], ...]:
    """Subjects that are drawn alike: all of them for sleep stages, which every night has; for classes, those with the
    same rarest class, which may be their only one."""
    if signals.target == "stages":
        return (signals.subjects,)
    have = defaultdict[str, set[int]](set)
    for recording in signals.recordings:
        if recording.labels is not None:
            have[recording.subject] |= set(recording.labels[recording.labels != UNDEFINED].tolist())
    counts = Counter(label for labels in have.values() for label in labels)
    found = defaultdict[int, list[str]](list)
    for subject, labels in sorted(have.items()):
        found[min(labels, key=lambda label: (counts[label], label), default=UNDEFINED)].append(subject)
    return tuple(tuple(subjects) for _, subjects in sorted(found.items()))


def draw_subjects(signals: SignalSet, fraction: float, seed: int) -> SignalSet:
    """The recordings of a fraction of the subjects, at least one of each stratum; for a seed, smaller fractions are
    subsets of larger.

    Raises:
        ConfigError: if the fraction is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"{fraction:g} of the subjects: a fraction above 0 and at most 1 is needed")
    chosen = list[str]()
    for subjects in strata(signals):
        order = epoch_order(seed, 1, len(subjects))
        chosen += [subjects[i] for i in order[: _count_of(subjects, fraction)]]
    return signals.of_subjects(chosen)


def count_drawn(signals: SignalSet, fraction: float) -> int:
    """Number of subjects that :func:`draw_subjects` takes."""
    return sum(_count_of(subjects, fraction) for subjects in strata(signals))


def _count_of(subjects: Sequence[str], fraction: float) -> int:
    return max(1, round(fraction * len(subjects)))


def _no_labels(signals: SignalSet) -> str:
    """Why nothing can be predicted."""
    if signals.target == "stages" or signals.classes is None:
        return _SEARCHED[signals.target]
    return (
        f"no window of {signals.config.window_s:g} s has a class for most of its time; set data.signal.window_s to the "
        "length of the labelled parts or less"
    )
