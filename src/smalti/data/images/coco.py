"""COCO's files of objects: boxes, categories and outlines of the images in a folder.

Source: Lin et al., COCO, arXiv:1405.0312; the data format on its site.
"""

import functools
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from smalti.data.images.image_set import ImageSample, ImageSet
from smalti.errors import DataError
from smalti.reading import read_json, reason


@dataclass(frozen=True, slots=True)
class CocoObject:
    """One object, or a crowd of them."""

    box: tuple[float, float, float, float]
    """x0 y0 x1 y1 in pixels of the image."""
    label: int
    """Place of its category in ``CocoAnnotations.classes``."""
    is_crowd: bool
    """Whether it is a region with many objects that were not outlined one by one."""
    area: float
    """Pixels inside its outline, from the file; without an outline, those of the box."""
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
        if repeated := [name for name, count in Counter(names.values()).items() if count > 1]:
            same = ", ".join(str(category_id) for category_id, name in names.items() if name == repeated[0])
            raise DataError(f"{path}: categories {same} are both called '{repeated[0]}'; rename or merge them")
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
    except DataError:
        raise
    except Exception as error:  # as in `reading`, with the place in the file
        problem = f"lacks {error}" if isinstance(error, KeyError) else f"can't be used: {reason(error)}"
        raise DataError(f"{path}: {where} {problem}") from error
    return CocoAnnotations(path, tuple(names[category_id] for category_id in ids), ids, images)


def _object(item: Mapping[str, Any], label: int) -> CocoObject:
    left, top, width, height = (float(value) for value in item["bbox"])
    if not all(map(math.isfinite, (left, top, width, height))) or min(width, height) < 0:
        raise ValueError(f"a box of {item['bbox']}; it needs left, top, width and height")
    return CocoObject(
        box=(left, top, left + width, top + height),
        label=label,
        is_crowd=bool(item.get("iscrowd", 0)),
        area=float(item.get("area") or width * height),
        outline=item.get("segmentation"),
    )


def with_objects(images: ImageSet) -> ImageSet:
    """The images that their files of annotations list, with the classes of these files.

    Images that no file lists are left out with a warning, as nobody knows what is in them. Boxes that reach over the
    border by more than a pixel are counted in a warning; their users clip them.

    Raises:
        DataError: if there are no annotations, the files have other categories or none, a file lists an image that
            isn't there, or a box lies outside its image.
    """
    files = tuple(dict.fromkeys(sample.annotations for sample in images.samples if sample.annotations is not None))
    if not files:
        raise DataError(f"{images.root}: has no annotations; boxes come in annotations/instances_SPLIT.json")
    tables = {path: _read_once(path) for path in files}
    first = tables[files[0]]
    for path, table in tables.items():
        if not table.classes:
            raise DataError(f"{path}: 'categories' is empty; it needs id and name of each class")
        if (table.classes, table.category_ids) != (first.classes, first.category_ids):
            raise DataError(
                f"{path}: its categories aren't those of {files[0].name} ({len(table.classes)} and "
                f"{len(first.classes)}); all splits need the same ids and names"
            )
        _check_boxes(table)
    kept, unlisted, seen = list[ImageSample](), list[Path](), dict[tuple[Path, str], Path]()
    for sample in images.samples:
        name = _listed_name(sample)
        if sample.annotations is None or name is None:
            unlisted.append(sample.path)
            continue
        if (other := seen.setdefault((sample.annotations, name), sample.path)) != sample.path:
            raise DataError(f"{sample.annotations}: '{name}' may be {other} or {sample.path}; write its folder, too")
        kept.append(sample)
    for path, table in tables.items():
        if missing := [name for name in table.images if (path, name) not in seen]:
            raise DataError(
                f"{path}: {len(missing):,} of {len(table.images):,} images don't exist, the first: {missing[0]}"
            )
    if unlisted:
        warnings.warn(
            f"{images.root}: {len(unlisted):,} of {len(images):,} images are in no file of annotations and are left "
            f"out, the first: {unlisted[0].name}",
            stacklevel=3,
        )
    return replace(images, samples=tuple(kept), classes=first.classes)


def annotated_image(sample: ImageSample) -> CocoImage:
    """What the file of annotations says about one of the images of :func:`with_objects`."""
    name = _listed_name(sample)
    assert sample.annotations is not None and name is not None, sample.path
    return _read_once(sample.annotations).images[name]


def _read_once(path: Path) -> CocoAnnotations:
    """A file of annotations, read again only when it has changed."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from None
    return _read_cached(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4)
def _read_cached(path: Path, changed_ns: int, size: int) -> CocoAnnotations:
    return read_annotations(path)


def _listed_name(sample: ImageSample) -> str | None:
    """How its file of annotations names the image: by as many of its folders as the file writes."""
    if sample.annotations is None:
        return None
    names, parts = _read_once(sample.annotations).images, sample.path.parts
    return next((name for i in range(len(parts)) if (name := "/".join(parts[i:])) in names), None)


def _check_boxes(table: CocoAnnotations) -> None:
    _check_box_format(table)
    over = 0
    for name, image in table.images.items():
        if min(image.height, image.width) < 1:
            raise DataError(f"{table.path}: image '{name}' has {image.width}x{image.height} pixels")
        for number, item in enumerate(image.objects):
            x0, y0, x1, y1 = item.box
            if x0 >= image.width or y0 >= image.height or x1 < 0 or y1 < 0:
                raise DataError(
                    f"{table.path}: object {number} of image '{name}' has the box x {x0:g}..{x1:g}, y {y0:g}..{y1:g}, "
                    f"outside of its {image.width}x{image.height} pixels; boxes are left, top, width and height"
                )
            over += x0 < -1 or y0 < -1 or x1 > image.width + 1 or y1 > image.height + 1
    if over:
        warnings.warn(f"{table.path}: {over:,} boxes reach over the border of their image; clipped", stacklevel=4)


def _check_box_format(table: CocoAnnotations) -> None:
    """Refuse boxes that are fractions of the image, or corners (x0 y0 x1 y1) where left, top, width and height belong.

    Corners are known by the outlines of the objects, or by boxes that would reach over the border of their image.
    """
    boxes = [(image, item) for image in table.images.values() for item in image.objects]
    if not boxes:
        return
    needed = "boxes are left, top, width and height in pixels"
    is_below_1 = all(max(x0, y0, x1 - x0, y1 - y0) <= 1 + 1e-6 for _, item in boxes for x0, y0, x1, y1 in [item.box])
    if is_below_1 and max(max(image.height, image.width) for image, _ in boxes) > 2:
        raise DataError(f"{table.path}: all {len(boxes):,} boxes lie in 0..1, as fractions of the image; {needed}")
    fits_file = fits_corners = over = 0
    for image, item in boxes:
        x0, y0, x1, y1 = item.box
        corners = (x0, y0, x1 - x0, y1 - y0)
        over += x1 > image.width + 1 or y1 > image.height + 1
        if corners[2] <= x0 or corners[3] <= y0 or corners[2] > image.width + 1 or corners[3] > image.height + 1:
            fits_corners -= len(boxes)  # these are no corners, so none are
        elif (outline := _outline_box(item.outline)) is not None:
            fits_file += _near(outline, item.box)
            fits_corners += _near(outline, corners)
    if fits_corners > fits_file or (fits_corners >= 0 and fits_file == 0 and over >= max(1, 0.1 * len(boxes))):
        raise DataError(
            f"{table.path}: boxes look like corners (x0, y0, x1, y1): read as left, top, width and height, {over:,} of "
            f"{len(boxes):,} reach over the border or don't fit their outlines; {needed}"
        )


def _outline_box(outline: Any) -> tuple[float, float, float, float] | None:
    """The box around polygons; None of other outlines."""
    try:
        points = [float(value) for polygon in outline for value in polygon]
    except (TypeError, ValueError):
        return None
    if len(points) < 6 or len(points) % 2:
        return None
    return min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])


def _near(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) <= 2 for a, b in zip(one, other, strict=True))
