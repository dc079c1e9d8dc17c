"""Labelled images for evaluation: what is learned from, what is judged on, and how both are made ready for an encoder.

Unlike in training nothing is random here: the same file gives the same array, resized the way published evaluations do.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from smalti.data.coco import with_objects
from smalti.data.folders import SPLITS, ImageSample, ImageSet, open_images, read_image
from smalti.data.image_set import IGNORED as IGNORED
from smalti.data.image_set import REFUSED
from smalti.data.images import PILLOW_ERRORS, image_size
from smalti.data.loader import epoch_order
from smalti.data.views import Skipped, centre_crop
from smalti.data.workers import load_items
from smalti.errors import ConfigError, DataError

EvalCrop = Literal["crop", "squash", "centre"]
"""How an image becomes a square; see :func:`eval_image`."""
_TEST_SHARE = 0.2
_LOOKED_AT = 10  # masks, before an evaluation, for a mistake that would not show in it
_NEEDED = {
    "labels": "class folders (CLASS/image or SPLIT/CLASS/image)",
    "masks": "masks (images/ with masks/ or instances/, and classes.txt)",
    "boxes": "boxes (COCO's annotations/instances_SPLIT.json beside images/)",
}
Kind = Literal["labels", "masks", "boxes"]


@dataclass(frozen=True)
class LabelledData:
    """Images to learn from and others to be evaluated on."""

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    note: str
    """How the two came about, one line for logs and results."""
    drawn: bool = False
    """Whether ``train`` is a draw from the training images."""
    split: str = "test"
    """The evaluated split by its own name; ``held-out`` of a seeded split, empty where all images are evaluated."""

    missing: tuple[str, ...] = ()
    """Classes of class folders that have training images and none to be evaluated."""

    @property
    def evaluated(self) -> str:
        """What the evaluated images are called, such as ``val images``."""
        return f"{self.split} images".strip()


def open_labelled(data: str | Path, *, split: str | None = None, seed: int = 0, need: Kind) -> LabelledData:
    """The labelled images at a path, in two parts.

    Args:
        data: as for :func:`~smalti.data.folders.open_images`.
        split: what to judge on; None takes val, else test, else a fifth of the images, chosen by the seed.
        seed: of that choice.
        need: class labels, masks, or boxes of objects.

    Raises:
        DataError: if the layout hasn't what is needed, a split is missing, classes are to be evaluated that have no
            training images, or a file of boxes contradicts itself or the images.
    """
    images = open_images(data)
    found = {"labels": any(sample.label is not None for sample in images.samples)}
    found["masks"] = any(sample.mask is not None or sample.instances is not None for sample in images.samples)
    found["boxes"] = any(sample.annotations is not None for sample in images.samples)
    if not found[need]:
        raise DataError(
            f"{images.root}: found layout '{images.layout}', this needs {_NEEDED[need]}{_hint(images, need)}"
        )
    if need == "boxes":
        images = with_objects(images)
    if not images.classes:
        raise DataError(f"{images.root}: no classes.txt; it needs one class name a line, the first for value 0")
    if need == "masks":
        _warn_of_black_and_white(images)
    if split is None and set(images.splits) <= {"train"}:
        return _split_by_seed(images, images.classes, seed, by_label=need == "labels")
    if split is not None and SPLITS.get(split, split) == "train":
        raise DataError(f"{images.root}: split 'train' is what an evaluation learns from; judge on val or test")
    test_name = split or ("val" if "val" in images.splits else "test")
    test, train = images.subset(test_name), images.subset("train")
    missing = _missing_classes(images, train, test) if need == "labels" else ()
    note = f"learned from train ({len(train)}), evaluated on {test_name} ({len(test)})"
    split = SPLITS.get(test_name, test_name)
    return LabelledData(train, test, images.classes, note, split=split, missing=missing)


def draw_training(data: LabelledData, size: float, seed: int) -> LabelledData:
    """The same data with fewer images to learn from, drawn by the seed; smaller draws are parts of larger ones.

    Args:
        data: with all training images.
        size: a share below 1, or a number of images from 1 on; at least one image is drawn.
        seed: of the draw.

    Raises:
        ConfigError: if ``size`` is above 1 and not whole.
        DataError: if there are not so many images.
    """
    total = len(data.train)
    if size >= 1 and size != int(size):
        raise ConfigError(f"eval.train_size={size:g}: give a share below 1, or a whole number of images")
    count = int(size) if size >= 1 else max(1, round(size * total))
    if count > total:
        raise DataError(f"{data.train.root}: {total} training images, eval.train_size={count} asks for more")
    places = sorted(epoch_order(seed, 0, total)[:count].tolist())
    train = replace(data.train, samples=tuple(data.train.samples[place] for place in places))
    note = f"{data.note}; {count} of the {total} training images drawn, seed {seed}"
    return replace(data, train=train, note=note, drawn=True)


def _hint(images: ImageSet, need: Kind) -> str:
    if need == "boxes" and any(images.root.glob("annotations/instances_*.json")):
        return f"; COCO's files there are read with coco={images.root}"
    objects = images.root / "objects"
    if need == "labels" and objects.is_dir():
        return f"; there are some in {objects}"
    if need == "masks" and images.layout == "coco":
        return f"; COCO's come as coco-stuff={images.root} or coco-things={images.root}"
    return ""


def _warn_of_black_and_white(images: ImageSet) -> None:
    """Warn once where masks seem to be black and white pictures: 255 is ignored, so one class would be all there is."""
    masks = [sample.mask for sample in images.samples if sample.mask is not None and sample.label_map is None]
    values: set[int] = set()
    for mask in masks[:: max(1, len(masks) // _LOOKED_AT)][:_LOOKED_AT]:
        try:
            values.update(np.unique(_read_numbers(mask)).tolist())
        except DataError:  # told when it is read, if its image can be
            return
    if IGNORED in values and values <= {0, IGNORED} and images.classes and len(images.classes) <= IGNORED:
        warnings.warn(
            f"{images.root}: masks hold only 0 and {IGNORED}, and {IGNORED} is ignored, so nothing but "
            f"'{images.classes[0]}' counts; save the other class as 1",
            stacklevel=3,
        )


def _split_by_seed(images: ImageSet, classes: tuple[str, ...], seed: int, by_label: bool) -> LabelledData:
    """A fifth of the images to be judged on, of each class alike; at least one stays to learn from."""
    groups: dict[int | None, list[int]] = {}
    for i, sample in enumerate(images.samples):
        groups.setdefault(sample.label if by_label else None, []).append(i)
    judged: set[int] = set()
    for group, members in groups.items():
        num_test = min(max(1, round(_TEST_SHARE * len(members))), len(members) - 1)
        order = epoch_order(seed, group or 0, len(members))
        judged.update(members[i] for i in order[:num_test])
    if not judged:
        raise DataError(f"{images.root}: {len(images)} images, too few to learn from some and judge on others")
    parts = [
        tuple(sample for i, sample in enumerate(images.samples) if (i in judged) == is_test)
        for is_test in (False, True)
    ]
    train, test = (replace(images, samples=part, classes=classes) for part in parts)
    note = f"no splits found: a seeded 80/20 split, seed {seed} ({len(train)} and {len(test)} images)"
    missing = _missing_classes(images, train, test) if by_label else ()
    return LabelledData(train, test, classes, note, split="held-out", missing=missing)


def _missing_classes(images: ImageSet, train: ImageSet, test: ImageSet) -> tuple[str, ...]:
    """Names of the classes that have training images and none to be evaluated.

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


def read_mask(sample: ImageSample, num_classes: int) -> np.ndarray:
    """Class of each pixel: ``(H, W)``, uint8 for up to 255 classes (255 is ignored), else int64.

    Palette masks give their indices; the values of known data sets become classes. Where there are only instances, 1 is
    any instance and 0 the rest.

    Raises:
        DataError: if the mask can't be read, has colours instead of numbers, another size than its image, or a value
            for which there is no class.
    """
    source = sample.mask or sample.instances
    if source is None:
        raise DataError(f"{sample.path}: has no mask")
    numbers = _read_numbers(source)
    size = image_size(sample.path)
    if numbers.shape != size:
        mask_height, mask_width = numbers.shape
        raise DataError(
            f"{source}: {mask_width}x{mask_height} pixels, its image {sample.path.name} has {size[1]}x{size[0]}; "
            "they must be the same"
        )
    if sample.mask is None:
        return (numbers > 0).astype(np.uint8)
    if sample.label_map is not None:
        classes = sample.label_map.classes(numbers)
        is_refused = classes == REFUSED
        if is_refused.any():
            value = numbers[is_refused].min()
            raise DataError(
                f"{source}: holds the value {value}, which no mask of {sample.label_map.name} has "
                f"({sample.label_map.note})"
            )
        return classes.astype(np.uint8)
    is_wrong = (numbers >= num_classes) | (numbers < 0)
    if num_classes <= IGNORED:
        is_wrong &= numbers != IGNORED
    if is_wrong.any():
        raise DataError(
            f"{source}: holds the value {numbers[is_wrong].min()}, but classes.txt names {num_classes} classes "
            f"(0..{num_classes - 1}; {IGNORED} is ignored)"
        )
    return numbers.astype(np.uint8 if num_classes <= IGNORED else np.int64)


def _read_numbers(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
                raise DataError(
                    f"{path}: a mask of mode {image.mode}, it needs one number a pixel (grey or palette): "
                    "the line in classes.txt, from 0"
                )
            numbers = np.asarray(image)
    except PILLOW_ERRORS as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: can't be read as a mask ({error})") from None
    return numbers.astype(np.uint8) if numbers.dtype == bool else numbers


def load_images(
    paths: str | Path | Sequence[str | Path], size: int, channels: int = 3, mode: EvalCrop = "crop"
) -> Tensor:
    """Images ready for :meth:`smalti.Encoder.encode`: ``(B, channels, size, size)``, uint8, or float32 in 0..1 where
    one of the files has 16 bits or floats.

    Args:
        paths: image files, or one of them.
        size: side in pixels, a multiple of the patch size.
        channels: as the encoder takes.
        mode: see :func:`eval_image`.

    Raises:
        DataError: if a file can't be read.
    """
    files = [paths] if isinstance(paths, (str, Path)) else paths
    images = [torch.tensor(eval_image(Path(file), size, channels, mode)).permute(2, 0, 1) for file in files]
    if any(image.dtype != torch.uint8 for image in images):
        images = [image / 255 if image.dtype == torch.uint8 else image for image in images]
    return torch.stack(images)


def eval_image(path: Path, size: int, channels: int, mode: EvalCrop) -> np.ndarray:
    """An image ready for an encoder: ``(size, size, C)``, uint8, or float32 in 0..1 for 16-bit and float files.

    Args:
        path: the image file.
        size: side in pixels.
        channels: C.
        mode: ``crop``: short side to ``size * 256 / 224``, bicubic, then the central square: classification.
            ``squash``: to ``size`` x ``size`` whatever its shape, bilinear: segmentation.
            ``centre``: the largest central square to ``size``, bicubic: nothing of a square image is cut off, as in
            :class:`smalti.data.views.CentreCrop`. All antialiased.

    Raises:
        DataError: if the file can't be read.

    Source: Caron et al., DINO, arXiv:2104.14294v2, evaluation code (crop); Balazevic et al., arXiv:2306.01667 (squash).
    """
    image = read_image(path, channels)
    if mode == "squash":
        return _resize_antialiased(image, size, size, "bilinear")
    if mode == "centre":
        return centre_crop(image, size)
    height, width = image.shape[:2]
    short = round(size * 256 / 224)
    if height <= width:
        image = _resize_antialiased(image, short, max(short, int(short * width / height)), "bicubic")
    else:
        image = _resize_antialiased(image, max(short, int(short * height / width)), short, "bicubic")
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


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


def eval_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """``(size, size)``: the mask by nearest pixel, in the rule of ``F.interpolate(mode="nearest")``."""
    rows, columns = (_nearest(side, size) for side in mask.shape)
    return mask[rows[:, None], columns[None, :]]


def _nearest(side: int, size: int) -> np.ndarray:
    """``(size,)``: which of ``side`` places each of ``size`` places takes."""
    ramp = torch.arange(side, dtype=torch.float32)[None, None]  # as masks travel in the sources
    return F.interpolate(ramp, size=size, mode="nearest")[0, 0].long().numpy()


def eval_batches(
    images: ImageSet,
    size: int,
    channels: int,
    mode: EvalCrop,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[tuple[Tensor, list[int], list[Skipped]]]:
    """All images once, in order: ``(B, C, S, S)`` uint8 or float32 in 0..1, their places in the set, who was left out.

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
        self.size, self.channels, self.mode, self.batch_size = size, channels, mode, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.paths) / self.batch_size)

    def __getitem__(self, batch: int) -> tuple[Tensor, list[int], list[Skipped]]:
        arrays, places, skipped = [], [], []
        first = batch * self.batch_size
        for place, path in enumerate(self.paths[first : first + self.batch_size], first):
            try:
                arrays.append(eval_image(path, self.size, self.channels, self.mode))
                places.append(place)
            except DataError as error:
                skipped.append(Skipped(path, str(error).removeprefix(f"{path}: ")))
        if not arrays:
            return torch.empty(0, self.channels, self.size, self.size, dtype=torch.uint8), places, skipped
        if any(array.dtype != np.uint8 for array in arrays):
            arrays = [array if array.dtype != np.uint8 else array / np.float32(255) for array in arrays]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2), places, skipped
