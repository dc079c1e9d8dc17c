"""Labelled images for evaluation: what is learned from, what is evaluated on, and how both are prepared for an encoder.

Unlike in training nothing is random here: the same file gives the same array, resized the way published evaluations do.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from smalti.data.crops import centre_crop
from smalti.data.dataset import Labelled
from smalti.data.images.coco import with_objects
from smalti.data.images.decode import NO_PIXELS, PixelConfig
from smalti.data.images.folders import SPLITS, ClassDepth, ImageSample, ImageSet, open_images, read_image
from smalti.data.images.image_set import IGNORED as IGNORED
from smalti.data.images.image_set import as_text
from smalti.data.images.masks import check_headers as check_headers
from smalti.data.images.masks import eval_mask as eval_mask
from smalti.data.images.masks import read_mask as read_mask
from smalti.data.images.masks import values_seen, warn_of_black_and_white, with_values
from smalti.data.loader import epoch_order
from smalti.data.views import Skipped
from smalti.data.workers import load_items
from smalti.errors import ConfigError, DataError

EvalCrop = Literal["crop", "squash", "centre"]
"""How an image is made square; see :func:`eval_image`."""
_TEST_RATIO = 0.2
_LONGEST = 64  # sides of a strip
_NEEDED = {
    "labels": "class folders (CLASS/image or SPLIT/CLASS/image), or a table with path and label",
    "masks": "masks (images/ with masks/ or instances/, and classes.txt)",
    "boxes": "boxes (COCO's annotations/instances_SPLIT.json beside images/)",
}
LabelKind = Literal["labels", "masks", "boxes"]


def open_labelled(
    data: str | Path,
    *,
    split: str | None = None,
    seed: int = 0,
    need: LabelKind,
    class_depth: ClassDepth | None = None,
    mask_values: Mapping[int, int | str] | None = None,
    ignore: Sequence[int | str] = (),
    pixels: PixelConfig = NO_PIXELS,
) -> Labelled[ImageSet]:
    """The labelled images at a path, in two parts.

    Args:
        data: as for :func:`~smalti.data.images.folders.open_images`.
        split: what to evaluate on; None: val, else test, else a random 20 % of the images (seeded).
        seed: of that choice.
        need: class labels, masks, or boxes of objects.
        class_depth: how many folders name a class, where class folders are nested.
        mask_values: value in the mask files -> class, by number or name; other values are refused. None: the value is
            the class.
        ignore: values in the mask files, or names of classes, whose pixels are ignored, as 255 is.
        pixels: how the files are decoded.

    Raises:
        ConfigError: for a class in ``mask_values`` or ``ignore`` that isn't there.
        DataError: if the layout hasn't what is needed, a split is missing, classes are to be evaluated that have no
            training images, or a file of boxes contradicts itself or the images.
    """
    images = open_images(data, class_depth=class_depth).with_pixels(pixels)
    found = {"labels": any(sample.label is not None for sample in images.samples)}
    found["masks"] = any(sample.mask is not None or sample.instances is not None for sample in images.samples)
    found["boxes"] = any(sample.annotations is not None for sample in images.samples)
    if not found[need]:
        raise DataError(
            f"{as_text(images.root)}: has layout '{images.layout}', but this needs {_NEEDED[need]}{_hint(images, need)}"
        )
    if need == "boxes":
        images = with_objects(images)
    classes = images.classes
    if not classes:
        raise DataError(
            f"{as_text(images.root)}: no classes.txt; it needs one class name a line, the first for value 0"
            f"{values_seen(images)}"
        )
    if need == "masks":
        if mask_values is not None or ignore:
            images = with_values(images, classes, mask_values, ignore)
        warn_of_black_and_white(images)
    if split is None and set(images.splits) <= {"train"}:
        listed = images.subset("train") if images.splits else images
        _check_masks(listed, need)
        return _split_by_seed(listed, classes, seed, by_label=need == "labels")
    if split is not None and SPLITS.get(split, split) == "train":
        raise DataError(
            f"{as_text(images.root)}: split 'train' is what an evaluation learns from; evaluate on val or test"
        )
    test_name = split or ("val" if "val" in images.splits else "test")
    test, train = images.subset(test_name), images.subset("train")
    _check_masks(train, need)
    _check_masks(test, need)
    missing = _missing_classes(images, train, test) if need == "labels" else ()
    note = f"learned from train ({len(train)}), evaluated on {test_name} ({len(test)})"
    split = SPLITS.get(test_name, test_name)
    return Labelled(train, test, classes, note, split=split, missing=missing)


def _check_masks(images: ImageSet, need: LabelKind) -> None:
    """Refuse images without masks where masks are needed."""
    if need != "masks":
        return
    if missing := [sample.path for sample in images.samples if sample.mask is None and sample.instances is None]:
        raise DataError(
            f"{as_text(images.root)}: {len(missing)} of {len(images)} images have no mask, the first: "
            f"{as_text(missing[0].name)}; add masks, or list the images that have one in train.txt and val.txt"
        )


def draw_training(data: Labelled[ImageSet], size: float, seed: int) -> Labelled[ImageSet]:
    """The same data with fewer images to learn from, drawn by the seed; smaller draws are parts of larger ones.

    Args:
        data: with all training images.
        size: a fraction below 1, or a number of images from 1 on; at least one image is drawn.
        seed: of the draw.

    Raises:
        ConfigError: if ``size`` is above 1 and not whole.
        DataError: if there are not so many images.
    """
    total = len(data.train)
    if size >= 1 and size != int(size):
        raise ConfigError(f"eval.train_size={size:g}: give a fraction below 1, or a whole number of images")
    count = int(size) if size >= 1 else max(1, round(size * total))
    if count > total:
        raise DataError(f"{data.train.root}: {total} training images, eval.train_size={count} asks for more")
    places = sorted(epoch_order(seed, 0, total)[:count].tolist())
    train = replace(data.train, samples=tuple(data.train.samples[place] for place in places))
    note = f"{data.note}; {count} of the {total} training images drawn, seed {seed}"
    return replace(data, train=train, note=note, drawn=True)


def _hint(images: ImageSet, need: LabelKind) -> str:
    if need == "boxes" and any(images.root.glob("annotations/instances_*.json")):
        return f"; COCO's files there are read with coco={images.root}"
    if why := {"labels": images.no_labels, "masks": images.no_masks}.get(need):
        return f"; {why}"
    objects = images.root / "objects"
    if need == "labels" and objects.is_dir():
        return f"; there are some in {objects}"
    if need == "masks" and images.layout == "coco":
        return f"; COCO's come as coco-stuff={images.root} or coco-things={images.root}"
    return ""


def _split_by_seed(images: ImageSet, classes: tuple[str, ...], seed: int, by_label: bool) -> Labelled[ImageSet]:
    """A fifth of the images to be evaluated, of each class alike, or of the groups, which stay whole; at least one
    stays to learn from."""
    has_groups = any(sample.group is not None for sample in images.samples)
    strata: dict[int | None, dict[str | int, list[int]]] = {}
    for i, sample in enumerate(images.samples):
        stratum = None if has_groups or not by_label else sample.label
        unit = i if sample.group is None else sample.group
        strata.setdefault(stratum, {}).setdefault(unit, []).append(i)
    evaluated: set[int] = set()
    for stratum, units in strata.items():
        members = list(units.values())
        num_test = min(max(1, round(_TEST_RATIO * len(members))), len(members) - 1)
        order = epoch_order(seed, stratum or 0, len(members))
        evaluated.update(i for unit in order[:num_test] for i in members[unit])
    if not evaluated:
        what = "group" if has_groups else "image"
        raise DataError(
            f"{as_text(images.root)}: {len(images)} images{' of one group' * has_groups}, too few to learn from some "
            f"and evaluate others; add a second {what} of each class, or splits"
        )
    parts = [
        tuple(sample for i, sample in enumerate(images.samples) if (i in evaluated) == is_test)
        for is_test in (False, True)
    ]
    train, test = (replace(images, samples=part, classes=classes) for part in parts)
    by = " by groups" if has_groups else ""
    note = f"no splits found: a seeded 80/20 split{by}, seed {seed} ({len(train)} and {len(test)} images)"
    missing = _missing_classes(images, train, test) if by_label else ()
    return Labelled(train, test, classes, note, split="held-out", missing=missing)


def _missing_classes(images: ImageSet, train: ImageSet, test: ImageSet) -> tuple[str, ...]:
    """Names of the classes with training images but no images to evaluate on.

    Raises:
        DataError: if it is the other way round for some: nothing can learn what they are.
    """
    classes = images.classes or ()
    learned, evaluated = ({sample.label for sample in one.samples if sample.label is not None} for one in (train, test))
    if evaluated - learned:
        split = str(test.samples[0].split)
        names = ", ".join(classes[label] for label in sorted(evaluated - learned))
        others = [name for name in images.splits if name not in ("train", split)]
        other = f", or evaluate another split (eval.split={others[0]})" if others else ""
        raise DataError(
            f"{images.root}: {split} has images of {names} and train has none, so nothing can learn these classes; add "
            f"training images of them, or take them out of {split}{other}"
        )
    return tuple(classes[label] for label in sorted(learned - evaluated))


def load_images(
    paths: str | Path | Sequence[str | Path],
    size: int,
    channels: int = 3,
    mode: EvalCrop = "crop",
    pixels: PixelConfig = NO_PIXELS,
) -> Tensor:
    """Images ready for :meth:`smalti.Encoder.encode`: ``(B, channels, size, size)``, uint8, or float32 in 0..1 if
    one of the files has 16 bits or floats.

    Args:
        paths: image files, or one of them.
        size: side in pixels, a multiple of the patch size.
        channels: as the encoder takes.
        mode: see :func:`eval_image`.
        pixels: how the files are decoded.

    Raises:
        DataError: if a file can't be read.
    """
    files = [paths] if isinstance(paths, (str, Path)) else paths
    images = [torch.tensor(eval_image(Path(file), size, channels, mode, pixels)).permute(2, 0, 1) for file in files]
    if any(image.dtype != torch.uint8 for image in images):
        images = [image / 255 if image.dtype == torch.uint8 else image for image in images]
    return torch.stack(images)


def eval_image(path: Path, size: int, channels: int, mode: EvalCrop, pixels: PixelConfig = NO_PIXELS) -> np.ndarray:
    """An image ready for an encoder: ``(size, size, C)``, uint8, or float32 in 0..1 for 16-bit and float files.

    Args:
        path: the image file.
        size: side in pixels.
        channels: C.
        mode: ``crop``: short side to ``size * 256 / 224``, bicubic, then the central square: classification.
            ``squash``: to ``size`` x ``size`` whatever its shape, bilinear: segmentation.
            ``centre``: the largest central square to ``size``, bicubic: nothing of a square image is cut off, as in
            :class:`smalti.data.crops.CentreCrop`. All antialiased.
        pixels: how the file is decoded.

    Raises:
        DataError: if the file can't be read.

    Source: Caron et al., DINO, arXiv:2104.14294v2, evaluation code (crop); Balazevic et al., arXiv:2306.01667 (squash).
    """
    image = read_image(path, channels, pixels)
    if mode == "squash":
        return _resize_antialiased(image, size, size, "bilinear")
    if mode == "centre":
        return centre_crop(image, size)
    image = _middle(image)
    height, width = image.shape[:2]
    short = round(size * 256 / 224)
    if height <= width:
        image = _resize_antialiased(image, short, max(short, int(short * width / height)), "bicubic")
    else:
        image = _resize_antialiased(image, max(short, int(short * height / width)), short, "bicubic")
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def _middle(image: np.ndarray) -> np.ndarray:
    """The middle of a strip, :data:`_LONGEST` times as long as it is wide: the rest would be enlarged to be cut off."""
    height, width = image.shape[:2]
    most = _LONGEST * min(height, width)
    top, left = max(0, (height - most) // 2), max(0, (width - most) // 2)
    return image[top : top + most, left : left + most]


def _resize_antialiased(image: np.ndarray, height: int, width: int, kind: Literal["bilinear", "bicubic"]) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    channels = image.shape[2]
    if image.dtype == np.uint8 and channels in (1, 3):
        method = Image.Resampling.BILINEAR if kind == "bilinear" else Image.Resampling.BICUBIC
        picture = Image.fromarray(image if channels == 3 else image[:, :, 0])
        return np.asarray(picture.resize((width, height), method)).reshape(height, width, channels)
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, (height, width), mode=kind, antialias=True)[0].permute(1, 2, 0)
    if image.dtype == np.uint8:
        return resized.round().clamp(0, 255).to(torch.uint8).numpy()
    return resized.clamp(0, 1).numpy()


def eval_batches(
    images: ImageSet,
    size: int,
    channels: int,
    mode: EvalCrop,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[tuple[Tensor, list[int], list[Skipped]]]:
    """All images once, in order: ``(B, C, S, S)`` uint8 or float32 in 0..1, indices in the set, and those left out.

    Unreadable images are left out, so a batch may be smaller than ``batch_size``, or empty.
    """
    batches = _EvalBatches(images.samples, size, channels, mode, batch_size)
    yield from load_items(batches, range(len(batches)), num_workers)


class _EvalBatches(Dataset[tuple[Tensor, list[int], list[Skipped]]]):
    def __init__(
        self,
        samples: Sequence[ImageSample],
        size: int,
        channels: int,
        mode: EvalCrop,
        batch_size: int,
    ):
        self.paths = [sample.path for sample in samples]
        self.pixels = samples[0].pixels if samples else NO_PIXELS
        self.size, self.channels, self.mode, self.batch_size = size, channels, mode, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.paths) / self.batch_size)

    def __getitem__(self, batch: int) -> tuple[Tensor, list[int], list[Skipped]]:
        arrays, places, skipped = [], [], []
        first = batch * self.batch_size
        for place, path in enumerate(self.paths[first : first + self.batch_size], first):
            try:
                arrays.append(eval_image(path, self.size, self.channels, self.mode, self.pixels))
                places.append(place)
            except DataError as error:
                skipped.append(Skipped(path, str(error).removeprefix(f"{path}: ")))
        if not arrays:
            return torch.empty(0, self.channels, self.size, self.size, dtype=torch.uint8), places, skipped
        if any(array.dtype != np.uint8 for array in arrays):
            arrays = [array if array.dtype != np.uint8 else array / np.float32(255) for array in arrays]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2), places, skipped
