"""Details of results on disk: per-image scores as Parquet, predictions as PNG, confusion matrices as CSV.

Layout of a folder: ``details.json`` and, one folder per result, ``NUMBER_PROTOCOL/per_image.parquet``,
``confusion.csv``, ``predictions/PLACE.png`` (palette images whose values are classes) and ``pictures/NUMBER.png``; true
and predicted boxes are in ``details.json``. Example images for the report are in ``shown_NUMBER/``, stored once for all
results that use them: ``PLACE.jpg``, ``PLACE_mask.png`` (65535 marks ignored pixels) and ``tokens.safetensors``.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
from PIL import Image

from smalti.charts import chart_tree, read_chart
from smalti.evaluation.result import Boxes, Details, Result
from smalti.evaluation.shown import Shown
from smalti.evaluation.tally import Tally
from smalti.files import write_atomically
from smalti.functional.colours import palette
from smalti.reading import reading

INDEX, PER_IMAGE, CONFUSION, PREDICTIONS = "details.json", "per_image.parquet", "confusion.csv", "predictions"
PICTURES = "pictures"
TOKENS = "tokens.safetensors"
_VOID = 65535


def write_details(folder: Path, results: Sequence[Result]) -> None:
    """Write the details of results that have any. The index is written last, so a folder with it is complete."""
    index = []
    shown: dict[int, str] = {}
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
        for place, picture in enumerate(details.pictures.values()):
            write_atomically(folder / name / PICTURES / f"{place:02d}.png", _rgb_png(picture))
        if details.shown is not None and id(details.shown) not in shown:
            shown[id(details.shown)] = f"shown_{number:02d}"
            _write_shown(folder / shown[id(details.shown)], details.shown)
        index.append(
            {
                "number": number,
                "folder": name,
                "shown": _index_of(details.shown, shown[id(details.shown)]) if details.shown is not None else None,
                "protocol": result.protocol,
                "classes": list(details.classes),
                "images": list(details.images),
                "groups": list(details.groups),
                "pictures": list(details.pictures),
                "charts": {name: chart_tree(chart) for name, chart in details.charts.items()},
                "found": {place: [_plain(true), _plain(found)] for place, (true, found) in details.found.items()},
                "tallies": {
                    metric: {"shape": list(tally.part.shape[1:]), "absent": tally.absent}
                    for metric, tally in details.tallies.items()
                },
            }
        )
    write_atomically(folder / INDEX, json.dumps(index, ensure_ascii=False, indent=1) + "\n")


def read_details(folder: Path, results: Sequence[Result]) -> list[Result]:
    """Add details written by :func:`write_details` to results.

    Raises:
        DataError: if the folder doesn't hold such details.
    """
    with reading(folder, "a folder of details"):
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        once = cache(lambda text: _read_shown(folder, json.loads(text)))  # several results can share one
        found = {}
        for entry in index:
            shown = once(json.dumps(entry["shown"])) if entry.get("shown") else None
            found[entry["number"]] = dataclasses.replace(_read_one(folder / entry["folder"], entry), shown=shown)
        return [dataclasses.replace(result, details=found.get(number)) for number, result in enumerate(results)]


def _index_of(shown: Shown, folder: str) -> dict[str, Any]:
    return {
        "folder": folder,
        "places": list(shown.places),
        "aspects": list(shown.aspects),
        "masks": sorted(shown.truths),
        "share": shown.share,
        "grid": list(shown.grid),
        "image_size": shown.image_size,
    }


def _write_shown(folder: Path, shown: Shown) -> None:
    for place, picture in shown.pictures.items():
        data = io.BytesIO()
        Image.fromarray(picture).save(data, format="JPEG", quality=88)
        write_atomically(folder / f"{place:06d}.jpg", data.getvalue())
    for place, truth in shown.truths.items():
        write_atomically(folder / f"{place:06d}_mask.png", _png(np.where(truth < 0, _VOID, truth)))
    write_atomically(folder / TOKENS, safetensors.torch.save({"coordinates": shown.coordinates.contiguous()}))


def _read_shown(folder: Path, entry: dict[str, Any]) -> Shown:
    folder = folder / entry["folder"]
    truths = {place: _read_classes(folder / f"{place:06d}_mask.png") for place in entry["masks"]}
    pictures = {}
    for place in entry["places"]:
        with Image.open(folder / f"{place:06d}.jpg") as image:
            pictures[place] = np.array(image.convert("RGB"))
    return Shown(
        places=tuple(entry["places"]),
        aspects=tuple(entry["aspects"]),
        pictures=pictures,
        truths={place: np.where(truth == _VOID, -1, truth) for place, truth in truths.items()},
        coordinates=safetensors.torch.load_file(folder / TOKENS)["coordinates"],
        share=entry["share"],
        grid=(entry["grid"][0], entry["grid"][1]),
        image_size=entry["image_size"],
    )


def _read_classes(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(np.int32)


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
    predictions = {int(path.stem): _read_classes(path) for path in sorted((folder / PREDICTIONS).glob("*.png"))}
    pictures = {}
    for place, caption in enumerate(entry.get("pictures", [])):
        with Image.open(folder / PICTURES / f"{place:02d}.png") as image:
            pictures[caption] = np.array(image.convert("RGB"))
    return Details(
        images=tuple(entry["images"]),
        groups=tuple(entry["groups"]),
        classes=tuple(entry["classes"]),
        tallies=tallies,
        confusion=confusion,
        predictions=predictions,
        charts={name: read_chart(tree) for name, tree in entry.get("charts", {}).items()},
        pictures=pictures,
        found={int(place): (_boxes(true), _boxes(found)) for place, (true, found) in entry.get("found", {}).items()},
    )


def _plain(boxes: Boxes) -> dict[str, Any]:
    return {
        "boxes": boxes.boxes.round(5).tolist(),
        "labels": boxes.labels.tolist(),
        "scores": boxes.scores.round(4).tolist(),
    }


def _boxes(entry: dict[str, Any]) -> Boxes:
    return Boxes(
        np.array(entry["boxes"], np.float64).reshape(-1, 4),
        np.array(entry["labels"], np.int64),
        np.array(entry["scores"], np.float64),
    )


def _confusion_csv(details: Details) -> str:
    """Rows: ground truth; columns: prediction."""
    assert details.confusion is not None
    names = [details.classes[i] if i < len(details.classes) else str(i) for i in range(len(details.confusion))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["truth \\ prediction", *names])
    writer.writerows([name, *row] for name, row in zip(names, details.confusion.tolist(), strict=True))
    return text.getvalue()


def _rgb_png(picture: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, format="PNG")
    return data.getvalue()


def _png(classes: np.ndarray) -> bytes:
    """Values up to 255 as a palette image, so that any viewer shows the classes; else 16 bit."""
    if classes.max(initial=0) < 256:
        image = Image.frombytes("P", (classes.shape[1], classes.shape[0]), classes.astype(np.uint8).tobytes())
        image.putpalette(palette(256).tobytes())
    else:
        image = Image.fromarray(classes.astype(np.uint16))
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()
