"""Built-in sample data: scenes composed of images from installed packages, with exact labels.

Photographs from scikit-image are the backgrounds. Objects of six silhouettes lie on them, each class cut from its own
material (brick, grass, gravel, coins, text, tissue), and scikit-learn's handwritten digits are drawn on them in ink.
A scene depends on (seed, index) alone.
"""

import functools
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from smalti.data.crops import resize
from smalti.data.images.folders import read_image
from smalti.data.loader import sample_key
from smalti.errors import DataError, MissingExtraError
from smalti.files import folder_beside, is_free

CLASSES = (
    "background",
    "brick_square",
    "coin_disc",
    "grass_star",
    "gravel_triangle",
    "text_cross",
    "tissue_ring",
    "digit",
)
"""Classes of the scenes; their places are the values of the masks."""

_BACKGROUNDS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
    "camera.png",
    "moon.png",
)
# Photograph of each material, and the scale at which its grain shows on objects of a 96 px scene.
_MATERIALS = {
    1: ("brick.png", 0.40),
    2: ("coins.png", 0.30),
    3: ("grass.png", 0.45),
    4: ("gravel.png", 0.35),
    5: ("text.png", 0.35),
    6: ("ihc.png", 0.35),
}
_DIGIT = 7
_BASE_SIZE = 96
_MAX_BACKGROUND_PX = 640
_PLACING_TRIES = 20
_VAL_FIRST = 10**9  # scenes of val: the same ones whatever the number of training scenes
_SCENES, _OBJECTS = 0, 1  # streams of the seed


@dataclass(frozen=True)
class Scene:
    """One image with all its labels."""

    image: np.ndarray
    """``(H, W, 3)`` uint8."""
    mask: np.ndarray
    """``(H, W)`` uint8, place in :data:`CLASSES`."""
    instances: np.ndarray
    """``(H, W)`` uint16: 0 background, 1..n the objects."""
    boxes: np.ndarray
    """``(n, 4)`` float32, x0 y0 x1 y1 in pixels, tight."""
    labels: np.ndarray
    """``(n,)`` int64, place in :data:`CLASSES`."""


def draw_scene(seed: int, index: int, size: int = _BASE_SIZE) -> Scene:
    """A photograph with one to four objects on it, none covering another.

    Raises:
        MissingExtraError: if scikit-image, whose photographs these are, isn't installed.
    """
    rng = _generator(seed, _SCENES, index)
    canvas = _Canvas(rng, size)
    for _ in range(rng.integers(1, 5)):
        canvas.place(int(rng.integers(1, len(CLASSES))), rng.uniform(0.12, 0.24))
    return canvas.scene()


def draw_object(seed: int, index: int, label: int, size: int = _BASE_SIZE) -> Scene:
    """A photograph with one larger object of a given class on it."""
    rng = _generator(seed, _OBJECTS, index * len(CLASSES) + label)
    canvas = _Canvas(rng, size)
    canvas.place(label, rng.uniform(0.24, 0.38))
    return canvas.scene()


class _Canvas:
    """A background on which objects are placed."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng, self.size = rng, size
        self.image = self._background()
        self.mask = np.zeros((size, size), np.uint8)
        self.instances = np.zeros((size, size), np.uint16)
        self.labels: list[int] = []

    def _background(self) -> np.ndarray:
        rng = self.rng
        photo = _photograph(_BACKGROUNDS[rng.integers(len(_BACKGROUNDS))], _MAX_BACKGROUND_PX)
        side = round(math.sqrt(rng.uniform(0.08, 1.0)) * min(photo.shape[:2]))
        top, left = (rng.integers(length - side + 1) for length in photo.shape[:2])
        crop = resize(photo[top : top + side, left : left + side], self.size)
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        return _gain(crop, rng.uniform(0.8, 1.2, size=3))

    def place(self, label: int, radius: float) -> None:
        """Place an object where it covers no other; skip it if there is no room."""
        rng, radius_px = self.rng, max(3.0, radius * self.size)
        if label == _DIGIT:
            pixels, shape = _digit(rng, radius_px, behind=float(self.image.mean()))
        else:
            pixels, shape = _cut_out(rng, label, radius_px, self.size)
        height, width = shape.shape
        for _ in range(_PLACING_TRIES):
            if height > self.size or width > self.size:
                return
            top, left = rng.integers(self.size - height + 1), rng.integers(self.size - width + 1)
            area = np.s_[top : top + height, left : left + width]
            if not self.mask[area][shape].any():
                self.image[area][shape] = pixels[shape]
                self.mask[area][shape] = label
                self.labels.append(label)
                self.instances[area][shape] = len(self.labels)
                return

    def scene(self) -> Scene:
        boxes = []
        for number in range(1, len(self.labels) + 1):
            rows, columns = np.nonzero(self.instances == number)
            boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        return Scene(
            image=self.image,
            mask=self.mask,
            instances=self.instances,
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            labels=np.array(self.labels, np.int64),
        )


def _cut_out(rng: np.random.Generator, label: int, radius: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and shape of an object: its silhouette, turned, filled with its material, turned on its own."""
    side = 2 * math.ceil(radius) + 1
    angle = rng.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    outlines = [np.rint((outline @ turn.T * radius + side / 2) * 16 - 8) for outline in _SILHOUETTES[label]]
    shape = np.zeros((side, side), np.uint8)
    cv2.fillPoly(shape, [outline.astype(np.int32) for outline in outlines], 1, shift=4)
    name, scale = _MATERIALS[label]
    material = _photograph(name, None, scale * size / _BASE_SIZE)
    height, width = material.shape[:2]
    warp = cv2.getRotationMatrix2D((0, 0), rng.uniform(0, 360), rng.uniform(0.85, 1.2))
    warp[:, 2] += side / 2 - warp[:, :2] @ (rng.uniform(0, width), rng.uniform(0, height))
    pixels = cv2.warpAffine(material, warp, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return _gain(pixels, np.full(3, rng.uniform(0.8, 1.2))), shape.astype(bool)


def _digit(rng: np.random.Generator, radius: float, behind: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and shape of a handwritten digit in one ink, bright or dark, that shows on grey level ``behind``."""
    digits = _digits()
    side = 2 * math.ceil(radius) + 1
    strokes = cv2.resize(digits[rng.integers(len(digits))], (side, side), interpolation=cv2.INTER_CUBIC)
    warp = cv2.getRotationMatrix2D((side / 2, side / 2), rng.uniform(-20, 20), rng.uniform(0.9, 1.1))
    shape = cv2.warpAffine(strokes, warp, (side, side), flags=cv2.INTER_LINEAR) > 0.5
    is_dark = behind > 85 and (behind > 170 or rng.random() < 0.5)
    ink = rng.uniform(0, 60, size=3) if is_dark else rng.uniform(195, 255, size=3)
    return np.broadcast_to(np.rint(ink).astype(np.uint8), (side, side, 3)), shape


def _polygon(num_corners: int, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
    """Corners on a circle, or on several in turn: ``(n, 2)``."""
    angles = np.arange(num_corners) * 2 * math.pi / num_corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.resize(radii, num_corners)[:, None]


_CROSS = np.array([(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3)], float) / math.sqrt(10)
_SILHOUETTES = {  # on the unit circle; a second outline is a hole
    1: [_polygon(4)],
    2: [_polygon(48)],
    3: [_polygon(10, (1.0, 0.5))],
    4: [_polygon(3)],
    5: [np.concatenate([_CROSS, -_CROSS])],
    6: [_polygon(48), 0.5 * _polygon(48)],
}


def _gain(image: np.ndarray, factors: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image * factors), 0, 255).astype(np.uint8)


def _generator(seed: int, stream: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=sample_key(seed, stream, index)))


@functools.cache
def _photograph(name: str, max_px: int | None, scale: float = 1.0) -> np.ndarray:
    """One of scikit-image's photographs, shrunk; read as a file, since importing the package takes a second."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise MissingExtraError('the sample scenes need scikit-image: pip install "smalti[samples]"')
    path = Path(spec.origin).parent / "data" / name
    if not path.is_file():
        raise MissingExtraError(f'scikit-image has no {name}; install another version: pip install "smalti[samples]"')
    image = read_image(path)
    height, width = image.shape[:2]
    if max_px is not None:
        scale = min(1.0, max_px / max(height, width))
    if scale == 1:
        return image
    shape = (max(8, round(width * scale)), max(8, round(height * scale)))
    return cv2.resize(image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


@functools.cache
def _digits() -> np.ndarray:
    """``(1797, 8, 8)`` float32 in 0..1."""
    from sklearn.datasets import load_digits  # heavy, and only needed here

    return (load_digits().images / 16).astype(np.float32)


def write_samples(
    out: Path,
    *,
    num_train: int = 2000,
    num_val: int = 400,
    num_objects_train: int = 100,
    num_objects_val: int = 40,
    size: int = _BASE_SIZE,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write scenes as ordinary folders: the layouts that a user's own data has.

    ``images/ masks/ instances/ classes.txt train.txt val.txt``, COCO's ``annotations/instances_{train,val}.json``, and
    ``objects/{train,val}/CLASS/`` with one object an image. All appears at once, when it is complete.

    Args:
        out: the folder to make; it may exist if it is empty.
        num_train: scenes for training.
        num_val: scenes for evaluation.
        num_objects_train: images of one object for each class.
        num_objects_val: the same for evaluation.
        size: side of the images in pixels.
        seed: of everything.
        progress: called with (images written, images in all).

    Returns:
        The folder.

    Raises:
        DataError: if ``out`` holds something already, or can't be written.
        MissingExtraError: if scikit-image isn't installed.
    """
    if not is_free(out):
        raise DataError(f"{out}: {'not empty' if out.is_dir() else 'a file'}; choose a new folder for the samples")
    if min(num_train, num_val, size - 31) < 1:
        raise DataError(f"{num_train} and {num_val} scenes of {size} px; at least one of each, and 32 px, are needed")
    num_kinds = len(CLASSES) - 1
    total = num_train + num_val + num_kinds * (num_objects_train + num_objects_val)
    done = 0
    try:
        with folder_beside(out, durable=False) as draft:
            for written in _write_all(draft, num_train, num_val, num_objects_train, num_objects_val, size, seed):
                done += written
                if progress is not None:
                    progress(done, total)
    except OSError as error:
        raise DataError(f"{out}: samples can't be written ({error.strerror or error})") from error
    return out


def _write_all(
    root: Path, num_train: int, num_val: int, num_objects_train: int, num_objects_val: int, size: int, seed: int
) -> Iterator[int]:
    """Write everything; gives 1 for each image."""
    for folder in ("images", "masks", "instances", "annotations"):
        (root / folder).mkdir()
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    for split, first, count in (("train", 0, num_train), ("val", _VAL_FIRST, num_val)):
        names: list[str] = []
        images: list[dict[str, Any]] = []
        annotations: list[Mapping[str, Any]] = []
        for i in range(count):
            scene = draw_scene(seed, first + i, size)
            name = f"{split}_{i:06d}"
            _write(root / "images" / f"{name}.jpg", scene.image[:, :, ::-1])
            _write(root / "masks" / f"{name}.png", scene.mask)
            _write(root / "instances" / f"{name}.png", scene.instances)
            names.append(name)
            images.append({"id": i + 1, "file_name": f"{name}.jpg", "height": size, "width": size})
            annotations.extend(_coco_annotations(scene, i + 1, len(annotations) + 1))
            yield 1
        (root / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        categories = [{"id": label, "name": CLASSES[label]} for label in range(1, len(CLASSES))]
        coco = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
    for split, first, count in (("train", 0, num_objects_train), ("val", _VAL_FIRST, num_objects_val)):
        for label in range(1, len(CLASSES)):
            objects = root / "objects" / split / CLASSES[label]
            objects.mkdir(parents=True)
            for i in range(count):
                _write(objects / f"{i:06d}.jpg", draw_object(seed, first + i, label, size).image[:, :, ::-1])
                yield 1


def _write(path: Path, image: np.ndarray) -> None:
    options = [cv2.IMWRITE_JPEG_QUALITY, 92] if path.suffix == ".jpg" else []
    path.write_bytes(cv2.imencode(path.suffix, np.ascontiguousarray(image), options)[1].tobytes())


def _coco_annotations(scene: Scene, image_id: int, first_id: int) -> Iterator[Mapping[str, Any]]:
    """COCO's object for each instance; the outline is a run-length code, which is exact."""
    for i, (label, (x0, y0, x1, y1)) in enumerate(zip(scene.labels.tolist(), scene.boxes.tolist(), strict=True)):
        shape = scene.instances == i + 1
        yield {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": label,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": int(shape.sum()),
            "iscrowd": 0,
            "segmentation": {"size": list(shape.shape), "counts": _run_lengths(shape)},
        }


def _run_lengths(shape: np.ndarray) -> list[int]:
    """Lengths of runs in column order, zeros first: COCO's uncompressed code."""
    flat = np.concatenate([[False], shape.T.ravel(), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    lengths = np.diff(np.concatenate([[0], changes, [shape.size]]))
    return lengths[:-1].tolist() if lengths[-1] == 0 else lengths.tolist()
