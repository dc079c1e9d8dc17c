"""Details of results on disk: Parquet for what each image contributed, PNG for predictions, CSV for confusion.

Layout of a folder: ``details.json`` and, a folder a result, ``NUMBER_PROTOCOL/per_image.parquet``, ``confusion.csv``
and ``predictions/PLACE.png`` (palette images whose values are classes).
"""

import colorsys
import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from smalti.config import write_atomically
from smalti.errors import DataError
from smalti.evaluation.protocol import Details, Result
from smalti.evaluation.tally import Tally

INDEX, PER_IMAGE, CONFUSION, PREDICTIONS = "details.json", "per_image.parquet", "confusion.csv", "predictions"


def write_details(folder: Path, results: Sequence[Result]) -> None:
    """Write the details of results; those without any are left out. The index comes last: a folder with it is whole."""
    index = []
    for number, result in enumerate(results):
        details = result.details
        if details is None:
            continue
        name = f"{number:02d}_{result.protocol}"
        _write_tallies(folder / name / PER_IMAGE, details)
        if details.confusion is not None:
            write_atomically(folder / name / CONFUSION, _confusion_csv(details))
        for place, classes in details.predictions.items():
            write_atomically(folder / name / PREDICTIONS / f"{place:06d}.png", _png(classes))
        index.append(
            {
                "number": number,
                "folder": name,
                "protocol": result.protocol,
                "classes": list(details.classes),
                "images": list(details.images),
                "curves": {key: list(map(float, values)) for key, values in details.curves.items()},
                "tallies": {
                    metric: {"shape": list(tally.part.shape[1:]), "absent": tally.absent}
                    for metric, tally in details.tallies.items()
                },
            }
        )
    write_atomically(folder / INDEX, json.dumps(index, ensure_ascii=False, indent=1) + "\n")


def read_details(folder: Path, results: Sequence[Result]) -> list[Result]:
    """Results with the details that :func:`write_details` wrote.

    Raises:
        DataError: if the folder isn't of that form.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        found = {entry["number"]: _read_one(folder / entry["folder"], entry) for entry in index}
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid) as error:
        raise DataError(f"{folder}: not a folder of details ({type(error).__name__}: {error})") from error
    return [dataclasses.replace(result, details=found.get(number)) for number, result in enumerate(results)]


def palette(num_classes: int) -> np.ndarray:
    """``(num_classes, 3)`` uint8 colours that people tell apart: hues a golden angle apart, at three brightnesses.

    Class 0, mostly the background, is a dark grey.
    """
    colours = [(70, 70, 70)]
    for number in range(1, num_classes):
        hue, value = number * 0.618034 % 1, (0.95, 0.75, 0.55)[number % 3]
        red, green, blue = colorsys.hsv_to_rgb(hue, (0.75, 0.55, 0.9)[number // 3 % 3], value)
        colours.append((round(red * 255), round(green * 255), round(blue * 255)))
    return np.array(colours[:num_classes], dtype=np.uint8)


def _write_tallies(path: Path, details: Details) -> None:
    columns: dict[str, list[Any]] = {"metric": [], "image": [], "part": [], "whole": []}
    for metric, tally in details.tallies.items():
        columns["metric"] += [metric] * len(tally)
        columns["image"] += list(details.images)
        columns["part"] += list(tally.part.reshape(len(tally), -1))
        columns["whole"] += list(tally.whole.reshape(len(tally), -1))
    schema = pa.schema(
        [
            ("metric", pa.string()),
            ("image", pa.string()),
            ("part", pa.list_(pa.float64())),
            ("whole", pa.list_(pa.float64())),
        ]
    )
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), sink, compression="zstd")
    write_atomically(path, sink.getvalue())


def _read_one(folder: Path, entry: dict[str, Any]) -> Details:
    table = pq.read_table(folder / PER_IMAGE)
    metrics = np.array(table["metric"].to_pylist(), dtype=object)
    tallies = {}
    for metric, form in entry["tallies"].items():
        rows = table.filter(pa.array(metrics == metric))
        shape = (rows.num_rows, *form["shape"])
        part, whole = (
            np.asarray(rows[column].combine_chunks().flatten(), dtype=np.float64).reshape(shape)
            for column in ("part", "whole")
        )
        tallies[metric] = Tally(part, whole, form["absent"])
    confusion = None
    if (folder / CONFUSION).is_file():
        with (folder / CONFUSION).open(encoding="utf-8", newline="") as file:
            confusion = np.array([row[1:] for row in csv.reader(file)][1:], dtype=np.int64)
    predictions = {}
    for path in sorted((folder / PREDICTIONS).glob("*.png")):
        with Image.open(path) as image:
            predictions[int(path.stem)] = np.asarray(image).astype(np.int32)
    return Details(
        images=tuple(entry["images"]),
        classes=tuple(entry["classes"]),
        tallies=tallies,
        confusion=confusion,
        predictions=predictions,
        curves=entry["curves"],
    )


def _confusion_csv(details: Details) -> str:
    """Ground truth down, prediction across."""
    assert details.confusion is not None
    names = [details.classes[i] if i < len(details.classes) else str(i) for i in range(len(details.confusion))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["truth \\ prediction", *names])
    writer.writerows([name, *row] for name, row in zip(names, details.confusion.tolist(), strict=True))
    return text.getvalue()


def _png(classes: np.ndarray) -> bytes:
    """Values up to 255 with a palette, so that people see classes in any viewer; else 16 bit."""
    if classes.max(initial=0) < 256:
        image = Image.frombytes("P", (classes.shape[1], classes.shape[0]), classes.astype(np.uint8).tobytes())
        image.putpalette(palette(256).tobytes())
    else:
        image = Image.fromarray(classes.astype(np.uint16))
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()
