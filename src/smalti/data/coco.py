"""COCO's files of objects: boxes, categories and outlines of the images in a folder.

Source: Lin et al., COCO, arXiv:1405.0312; the data format on its site.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smalti.data.image_set import read_json
from smalti.errors import DataError


@dataclass(frozen=True, slots=True)
class CocoObject:
    """One object, or a crowd of them."""

    box: tuple[float, float, float, float]
    """x0 y0 x1 y1 in pixels of the image."""
    label: int
    """Place of its category in ``CocoAnnotations.classes``."""
    is_crowd: bool
    """Whether it is a region with many objects that nobody told apart."""
    area: float
    """Pixels inside its outline, as the file has it; of the box, where it has none."""
    outline: Any = field(repr=False)
    """As in the file: a list of polygons, a run-length code, or None. Nothing is decoded."""


@dataclass(frozen=True, slots=True)
class CocoImage:
    """One image and its objects."""

    id: int
    height: int
    width: int
    objects: tuple[CocoObject, ...] = field(repr=False)
    """In the order of the file; may be empty."""


@dataclass(frozen=True)
class CocoAnnotations:
    """What a file of annotations holds."""

    path: Path
    classes: tuple[str, ...]
    """Names of the categories, in the order of their ids."""
    category_ids: tuple[int, ...]
    """The file's own number of each class; COCO's have gaps."""
    images: Mapping[str, CocoImage] = field(repr=False)
    """Name of the file, as given, -> image; images without objects are there, too."""


def read_annotations(path: Path) -> CocoAnnotations:
    """The objects of all images in a file of COCO's format, such as ``instances_train2017.json``.

    Raises:
        DataError: if the file can't be read, lacks something, or contradicts itself; one line that names the place.
    """
    tree: Any = read_json(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(tree, dict) or not isinstance(tree.get(key), list):
            raise DataError(f"{path}: no list '{key}'; COCO's format needs images, annotations and categories")
    where = "'categories'"
    try:
        names = {int(category["id"]): str(category["name"]) for category in tree["categories"]}
        if len(names) < len(tree["categories"]):
            raise DataError(f"{path}: two categories have the same id")
        ids = tuple(sorted(names))
        place = {category_id: i for i, category_id in enumerate(ids)}
        where = "'images'"
        rows = {int(image["id"]): image for image in tree["images"]}
        if len(rows) < len(tree["images"]) or len({image["file_name"] for image in tree["images"]}) < len(rows):
            raise DataError(f"{path}: two images have the same id or file name")
        objects: dict[int, list[CocoObject]] = {image_id: [] for image_id in rows}
        for number, item in enumerate(tree["annotations"]):
            where = f"annotation {item.get('id', f'number {number}')}"
            image_id, category_id = int(item["image_id"]), int(item["category_id"])
            if image_id not in objects:
                raise DataError(f"{path}: {where} is of image {image_id}, which the file doesn't list")
            if category_id not in place:
                raise DataError(f"{path}: {where} is of category {category_id}, which the file doesn't list")
            objects[image_id].append(_object(item, place[category_id]))
        where = "'images'"
        images = {
            str(row["file_name"]): CocoImage(image_id, int(row["height"]), int(row["width"]), tuple(objects[image_id]))
            for image_id, row in rows.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"can't be used: {error}"
        raise DataError(f"{path}: {where} {reason}") from None
    return CocoAnnotations(path, tuple(names[category_id] for category_id in ids), ids, images)


def _object(item: Mapping[str, Any], label: int) -> CocoObject:
    left, top, width, height = (float(value) for value in item["bbox"])
    if not all(map(math.isfinite, (left, top, width, height))) or min(width, height) < 0:
        raise ValueError(f"a box of {item['bbox']}; it needs left, top, width and height")
    return CocoObject(
        box=(left, top, left + width, top + height),
        label=label,
        is_crowd=bool(item.get("iscrowd", 0)),
        area=float(item.get("area", width * height)),
        outline=item.get("segmentation"),
    )
