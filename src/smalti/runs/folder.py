"""Files of a run directory other than checkpoints and logs: ``run.json`` and results."""

import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smalti.data.dataset import Dataset
from smalti.errors import DataError
from smalti.files import remove_leftovers, set_aside, write_atomically
from smalti.methods.base import Method
from smalti.models.loading import weights_digest
from smalti.reading import as_number, read_csv, read_mapping
from smalti.runs.machine import describe_machine
from smalti.training.checkpoint import tidy
from smalti.training.logs import LOG_FILE

CONFIG_FILE, RUN_FILE, RESULTS = "config.yaml", "run.json", "results"
INIT_DIGEST = "init_digest"
"""Entry of ``run.json``: digest of the initial weights."""
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "names_digest": str,
    INIT_DIGEST: str,
    "classes": list,
    "num_images": int,
    "reference": dict,
    "training_s": (int, float),
}
"""Entries of ``run.json`` that Smalti reads, with their types."""


def write_run_file(run: Path, images: Dataset, init: str | None, precision: str) -> None:
    """Write ``run.json``: command, data and machine."""
    content = {
        "command": " ".join(sys.argv),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "images": images.describe(),
        "classes": list(images.classes or ()),
        "num_images": len(images),
        "names_digest": images.fingerprint(),
        **({INIT_DIGEST: weights_digest(init)} if init else {}),
        "precision": precision,
        **describe_machine(),
    }
    write_atomically(run / RUN_FILE, json.dumps(content, indent=2))


def read_run_file(run: Path) -> dict[str, Any]:
    """Content of a run directory's ``run.json``; empty if it is missing or damaged."""
    try:
        return _parse(run / RUN_FILE)
    except DataError:
        return {}


def _parse(path: Path) -> dict[str, Any]:
    """The entries of a ``run.json``.

    Raises:
        DataError: if it can't be read, or an entry has the wrong type.
    """
    content = read_mapping(path)
    for name, kind in _TYPES.items():
        if name in content and not isinstance(content[name], kind):
            raise DataError(f"{path}: '{name}' has the wrong type {type(content[name]).__name__}")
    return content


def repair_folder(run: Path) -> None:
    """Prepare a run directory for resuming: remove leftovers of a kill, rename a damaged ``run.json``."""
    remove_leftovers(run)
    remove_leftovers(run / RESULTS, abandoned=True)  # evaluations may be writing there
    tidy(run)
    if (run / RUN_FILE).exists():
        try:
            _parse(run / RUN_FILE)
        except DataError as error:
            set_aside(run / RUN_FILE, error)


def check_same_images(run: Path, images: Dataset) -> None:
    """Check that a resumed run uses the same images, since their order follows from their names.

    Raises:
        DataError: if they are different.
    """
    known = read_run_file(run)
    if known.get("names_digest", images.fingerprint()) != images.fingerprint():
        raise DataError(
            f"{run}: was trained on {known.get('num_images')} images, but {images.root} now has {len(images)} or "
            "other ones; restore them, or start a new run with --init from this one"
        )


def record_end(run: Path, started: float, method: Method) -> None:
    """Add to ``run.json`` when training ended, how long it took since ``started``, and whether the loss decreased."""
    content, reference = read_run_file(run), None
    try:
        reference = method.reference(end_of_log(run))
    except (DataError, ValueError) as error:  # training has finished; don't fail because of a damaged log
        warnings.warn(f"{run / LOG_FILE}: can't tell whether anything was learned ({error})", stacklevel=2)
    if reference is not None:
        content["reference"] = {
            **dataclasses.asdict(reference),
            "has_learned": reference.has_learned,
            "sentence": reference.sentence,
        }
    content["finished"] = time.strftime("%Y-%m-%d %H:%M:%S")
    content["training_s"] = round(content.get("training_s", 0) + time.time() - started, 1)
    write_atomically(run / RUN_FILE, json.dumps(content, indent=2))


def end_of_log(run: Path) -> dict[str, float]:
    """Means over the last tenth of the rows of ``log.csv`` (at least one), for columns with values there."""
    rows = read_csv(run / LOG_FILE) if (run / LOG_FILE).is_file() else []
    last = rows[-max(1, len(rows) // 10) :]
    columns = {name: [as_number(row[name]) for row in last if row[name]] for name in (last[0] if last else ())}
    return {name: float(np.mean(values)) for name, values in columns.items() if values and np.isfinite(values).all()}


def new_results_file(run: Path) -> Path:
    """An unused name for an evaluation in ``results/``, reserved by creating a folder for its details, so that two
    evaluations in the same second get different names."""
    start = run / RESULTS / f"evaluate_{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while True:
        folder = start if number == 1 else start.with_name(f"{start.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder.with_suffix(".json")
        except FileExistsError:
            number += 1
