"""Synthetic recordings written as a user's own would be: an npz each, and the tables of their subjects and labels."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smalti.data.signals.recording_list import TABLE
from smalti.data.signals.window_labels import LABELS, LabelledPart
from smalti.errors import ConfigError, DataError
from smalti.files import folder_beside, is_free


@dataclass(frozen=True)
class SampleRecording:
    """A recording of a subject of its own."""

    name: str
    """Of the file, without ending, and of the subject."""
    split: str
    arrays: Mapping[str, Any]
    """What the npz holds."""
    parts: Sequence[LabelledPart] = ()


def write_recordings(out: Path, recordings: Iterable[SampleRecording]) -> Path:
    """Write recordings into a new folder, which appears when it is complete.

    Raises:
        DataError: if ``out`` holds something already.
        ConfigError: if it can't be written.
    """
    if not is_free(out):
        raise DataError(f"{out}: is not empty; choose another --out")
    try:
        with folder_beside(out, durable=False) as draft:
            _write_all(draft, recordings)
    except OSError as error:
        raise ConfigError(f"{out}: can't be written ({error.strerror or error})") from error
    return out


def _write_all(out: Path, recordings: Iterable[SampleRecording]) -> None:
    listed: list[tuple[str, ...]] = [("file", "subject", "split")]
    labelled: list[tuple[str, ...]] = [("file", "start_s", "end_s", "label")]
    for one in recordings:
        content = io.BytesIO()
        np.savez_compressed(content, **one.arrays)
        (out / f"{one.name}.npz").write_bytes(content.getvalue())
        listed.append((f"{one.name}.npz", one.name, one.split))
        labelled += [(f"{one.name}.npz", f"{part.start_s:g}", f"{part.end_s:g}", part.label) for part in one.parts]
    for table, rows in ((TABLE, listed), (LABELS, labelled)):
        if len(rows) > 1:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(rows)
            (out / table).write_text(text.getvalue(), encoding="utf-8")
