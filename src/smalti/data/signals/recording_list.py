"""Which recordings a folder holds, and of each its hypnogram, labels, subject and split: from tables, or from names."""

import csv
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from smalti.data.images.image_set import SPLITS
from smalti.data.images.splits import split_of
from smalti.data.signals.hypnograms import table_rows
from smalti.data.signals.recordings import ENDINGS, TEXT
from smalti.data.signals.signal_config import LabelSource
from smalti.data.signals.window_labels import LABELS, LabelledPart, class_names, folder_label, read_labels, whole
from smalti.errors import DataError

TABLE = "recordings.csv"
_COLUMNS = ("file", "subject", "split", "rate_hz", "stages", "label")
_HYPNOGRAM = re.compile(r"hypno|stages", re.IGNORECASE)
_HYPNOGRAM_NAMES = ("{}.stages", "{}_stages", "{}-stages", "{}_hypnogram", "{}-hypnogram", "hypnogram_{}")
_HYPNOGRAM_ENDINGS = (".csv", ".txt", ".edf")
_BIDS = re.compile(r"sub-[A-Za-z0-9]+")
_SLEEP_EDF = re.compile(r"((?:SC|ST)\d{4})\w\d?-PSG", re.IGNORECASE)
"""Sleep-EDF Expanded: SC4012E0-PSG.edf is night 2 of subject 01, its stages are in SC4012E?-Hypnogram.edf."""


@dataclass(frozen=True)
class ListedRecording:
    """A recording and what is known of it before it is read."""

    path: Path
    subject: str
    split: str | None
    """train, val or test; None if it is not known."""
    rate_hz: float | None = None
    """From the table."""
    hypnogram: Path | None = None
    parts: tuple[LabelledPart, ...] = ()
    """Its labelled parts."""


@dataclass(frozen=True)
class RecordingList:
    """Recordings of a folder, sorted by path or as its table lists them."""

    recordings: tuple[ListedRecording, ...]
    left_out: tuple[str, ...] = ()
    """What lies there and isn't read, such as ``2 copies in another format (a.npy)``."""
    classes: tuple[str, ...] | None = None
    """Classes of all labelled parts; None without labels."""


def list_recordings(root: Path, labels: LabelSource | None = None) -> RecordingList:
    """The recordings that ``recordings.csv`` lists, else those below the folder, with their labels.

    Args:
        root: the folder.
        labels: ``folders`` takes the name of a recording's folder as its class.

    Raises:
        DataError: if there is none, a table can't be read or names a file that is missing, a recording has several
            hypnograms, or there are several sources of labels.
    """
    found = _listed(root) if (root / TABLE).is_file() else _found(root)
    sources = [
        *([LABELS] if (root / LABELS).is_file() else []),
        *([f"the column label of {TABLE}"] if any(one.parts for one in found.recordings) else []),
        *(["data.signal.labels=folders"] if labels == "folders" else []),
    ]
    if len(sources) > 1:
        raise DataError(f"{root}: has labels from {' and from '.join(sources)}; keep one of them")
    if not sources:
        return found
    recordings = found.recordings
    if labels == "folders":
        recordings = tuple(_labelled_by_folder(root, one) for one in recordings)
    elif sources == [LABELS]:
        recordings = _labelled_by_table(root, recordings)
    names = class_names(root, (part.label for one in recordings for part in one.parts))
    return replace(found, recordings=recordings, classes=names)


def has_labels(root: Path, labels: LabelSource | None = None) -> bool:
    """Whether recordings have class labels, from what can be seen without reading them."""
    if labels is not None or (root / LABELS).is_file():
        return True
    try:
        with (root / TABLE).open(encoding="utf-8-sig", newline="") as file:
            return "label" in [name.strip() for name in next(csv.reader(file), [])]
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def _labelled_by_folder(root: Path, recording: ListedRecording) -> ListedRecording:
    parts, split = folder_label(root, recording.path)
    return replace(recording, parts=parts, split=recording.split or split)


def _labelled_by_table(root: Path, recordings: tuple[ListedRecording, ...]) -> tuple[ListedRecording, ...]:
    parts = read_labels(root)
    if unknown := parts.keys() - {one.path for one in recordings}:
        name = min(unknown).relative_to(root)
        raise DataError(
            f"{root / LABELS}: {name} is no recording of this folder" + "; no such file" * (not min(unknown).is_file())
        )
    return tuple(replace(one, parts=parts.get(one.path, ())) for one in recordings)


def is_hypnogram(path: Path) -> bool:
    """Whether a file's name says that it holds stages, not a signal."""
    return bool(_HYPNOGRAM.search(path.name))


def find_hypnogram(recording: Path) -> Path | None:
    """The file of stages beside a recording; None if there is none.

    Looked for: ``STEM.stages.EXT``, ``STEM_stages.EXT``, ``STEM_hypnogram.EXT``, ``Hypnogram_STEM.EXT`` (DREAMS), with
    ``_`` or ``-``, EXT one of csv, txt, edf, everything in any case, and Sleep-EDF's own names.

    Raises:
        DataError: if there are several.
    """
    names = {_folded(form.format(recording.stem)) for form in _HYPNOGRAM_NAMES}
    sleep_edf = _SLEEP_EDF.fullmatch(recording.stem)
    found = [
        path
        for path in sorted(recording.parent.iterdir())
        if is_hypnogram(path)
        and path.suffix.lower() in _HYPNOGRAM_ENDINGS
        and (
            _folded(path.stem) in names
            or (sleep_edf and re.fullmatch(rf"{sleep_edf[1]}\w+-hypnogram", path.stem, re.IGNORECASE))
        )
        and path != recording
        and path.is_file()
    ]
    if len(found) > 1:
        raise DataError(
            f"{recording}: has {len(found)} hypnograms, {', '.join(path.name for path in found)}; keep one, or name it "
            f"in {TABLE} (columns file, stages)"
        )
    return found[0] if found else None


def subject_of(recording: Path) -> str:
    """The subject, from the path: BIDS's ``sub-NAME`` in the file or a folder, Sleep-EDF's names, which hold
    subject and night; others are one each."""
    for part in (recording.stem, *(folder.name for folder in recording.parents)):
        if found := _BIDS.match(part):
            return found[0]
    match = _SLEEP_EDF.fullmatch(recording.stem)
    return match[1][:5].upper() if match else recording.stem


def _folded(name: str) -> str:
    """A name as names are compared: one form of accents, no difference between cases."""
    return unicodedata.normalize("NFC", name).casefold()


def _found(root: Path) -> RecordingList:
    formats, hypnograms = defaultdict[Path, list[Path]](list), list[Path]()
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or path.suffix.lower() not in ENDINGS or path == root / LABELS or not path.is_file():
            continue
        if is_hypnogram(path):
            hypnograms.append(path)
        else:
            formats[path.with_suffix("")].append(path)
    best = {stem: min(paths, key=lambda path: ENDINGS.index(path.suffix.lower())) for stem, paths in formats.items()}
    for stem, paths in formats.items():
        same = [path for path in paths if path.suffix.lower() == best[stem].suffix.lower()]
        if len(same) > 1:
            raise DataError(f"{same[0]}: {same[1].name} lies beside it; are they one recording? Rename or remove one")
    # a text beside no stages and among richer files is a readme or a licence
    chosen = [
        ListedRecording(path, subject_of(path), _split_of(path, root), None, hypnogram)
        for path in sorted(best.values())
        if (hypnogram := find_hypnogram(path)) is not None or path.suffix.lower() not in TEXT
    ]
    if not chosen:
        named = f"; {hypnograms[0].name} is taken as a hypnogram, by its name" if hypnograms else ""
        raise DataError(f"{root}: no recordings found (looked in all its folders for {', '.join(ENDINGS)}){named}")
    read = {one.path for one in chosen} | {one.hypnogram for one in chosen}
    alone = [path for path in best.values() if path not in read]
    copies = [path for stem, paths in formats.items() if best[stem] in read for path in paths if path != best[stem]]
    unused = [path for path in hypnograms if path not in read]
    return RecordingList(
        tuple(chosen),
        (
            *_phrase(copies, "copy", "copies", "in another format"),
            *_phrase(alone, "text", "texts", "without a hypnogram"),
            *_phrase(unused, "hypnogram", "hypnograms", "of no recording here"),
        ),
    )


def _phrase(paths: list[Path], one: str, many: str, what: str) -> tuple[str, ...]:
    """Files that are left out as a phrase; empty if there are none."""
    if not paths:
        return ()
    return (f"{len(paths):,} {one if len(paths) == 1 else many} {what} ({paths[0].name})",)


def _split_of(path: Path, root: Path) -> str | None:
    """The split that the first folder names."""
    parts = path.relative_to(root).parts
    return split_of(parts[0]) if len(parts) > 1 else None


def _listed(root: Path) -> RecordingList:
    table = root / TABLE
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = table_rows(table, reader)
            columns = [str(name).strip() for name in reader.fieldnames or ()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: can't be read ({error})") from None
    unknown = [name for name in columns if name not in _COLUMNS]
    if "file" not in columns or unknown:
        raise DataError(
            f"{table}: has the columns {', '.join(columns)}; file is needed, {', '.join(_COLUMNS)} are known"
        )
    if not rows:
        raise DataError(f"{table}: lists no recordings")
    listed = tuple(_row(root, number, row) for number, row in enumerate(rows, 2))
    twice = [path for path, count in Counter(one.path for one in listed).items() if count > 1]
    if twice:
        raise DataError(f"{table}: lists {twice[0].name} twice")
    return RecordingList(listed)


def _row(root: Path, number: int, row: dict[str, str]) -> ListedRecording:
    """A line of the table.

    Raises:
        DataError: if a file that it names is missing, or a value can't be used.
    """
    where = f"{root / TABLE}: line {number}"
    path, stages = root / row["file"], row.get("stages")
    for one in (path, *([root / stages] if stages else [])):
        if not one.is_file():
            raise DataError(f"{where}: {one}: no such file")
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{path}: not a recording that can be read; {', '.join(ENDINGS)} are known")
    split = row.get("split") or None
    if split is not None and split not in SPLITS:
        raise DataError(f"{where}: split '{split}'; train, val or test is needed")
    try:
        rate_hz = float(row["rate_hz"]) if row.get("rate_hz") else None
    except ValueError:
        raise DataError(f"{where}: rate_hz '{row['rate_hz']}' is no number") from None
    return ListedRecording(
        path,
        row.get("subject") or subject_of(path),
        SPLITS[split] if split else None,
        rate_hz,
        root / stages if stages else find_hypnogram(path),
        whole(row["label"]) if row.get("label") else (),
    )
