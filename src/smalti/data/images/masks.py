"""Masks of classes: what their values mean, and how they are read."""

import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from smalti.data.archives.members import open_binary
from smalti.data.images.decode import NO_PIXELS, image_size
from smalti.data.images.image_set import IGNORED, REFUSED, ImageSample, ImageSet, LabelMap
from smalti.errors import ConfigError, DataError
from smalti.reading import reading

BLACK_AND_WHITE_REMEDY = "save the other class as 1, or set eval.mask_values={0: 0, 255: 1}"
"""What to do about masks of only 0 and 255."""
_LOOKED_AT = 10  # masks, before an evaluation, for a mistake that would not show in it
_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 258


def warn_of_black_and_white(images: ImageSet) -> None:
    """Warn once where masks seem to be black and white pictures: 255 is ignored, so one class would be all there is."""
    values = _first_values([sample.mask for sample in images.samples if sample.mask and sample.label_map is None])
    if is_black_and_white(values) and images.classes and len(images.classes) <= IGNORED:
        warnings.warn(
            f"{images.root}: masks hold only 0 and {IGNORED}, and {IGNORED} is ignored, so nothing but "
            f"'{images.classes[0]}' counts; {BLACK_AND_WHITE_REMEDY}",
            stacklevel=3,
        )


def is_black_and_white(values: Set[int]) -> bool:
    """Whether masks hold nothing but 0 and 255, as black and white pictures do."""
    return IGNORED in values and values <= {0, IGNORED}


def with_values(
    images: ImageSet,
    classes: tuple[str, ...],
    mask_values: Mapping[int, int | str] | None,
    ignore: Sequence[int | str],
) -> ImageSet:
    """The images with a table of what the values in their masks mean."""
    if any(sample.label_map is not None for sample in images.samples):
        raise ConfigError(
            f"eval.mask_values and eval.ignore are for masks of your own; layout '{images.layout}' says what its "
            "values mean"
        )
    if len(classes) > IGNORED:
        raise ConfigError(f"eval.mask_values and eval.ignore need at most {IGNORED} classes, there are {len(classes)}")
    if mask_values is None:
        table = {value: value for value in range(len(classes))}
    else:
        table = {value: _class_number(name, classes, "eval.mask_values") for value, name in mask_values.items()}
    ignored = [name if isinstance(name, int) else _class_number(name, classes, "eval.ignore") for name in ignore]
    if wrong := [value for value in (*table, *ignored) if not 0 <= value < 256]:
        raise ConfigError(f"eval.mask_values and eval.ignore: values are 0..255, not {wrong[0]}")
    table |= dict.fromkeys(ignored, IGNORED)
    note = f"values 0..{len(classes) - 1} are classes" if mask_values is None else f"{len(mask_values)} values named"
    note += f"; {', '.join(map(str, sorted({*ignored, IGNORED})))} ignored"
    label_map = LabelMap(
        images.layout, note, tuple(table.get(i, IGNORED if i == IGNORED else REFUSED) for i in range(256))
    )
    return replace(images, samples=tuple(replace(sample, label_map=label_map) for sample in images.samples))


def _class_number(name: int | str, classes: tuple[str, ...], setting: str) -> int:
    if isinstance(name, int) and 0 <= name < len(classes):
        return name
    if name in classes:
        return classes.index(str(name))
    raise ConfigError(f"{setting}: no class '{name}'; there are: {', '.join(classes[:8])}")


def values_seen(images: ImageSet) -> str:
    """The values in a few masks, for a message; empty if they can't be read."""
    values = _first_values([sample.mask for sample in images.samples if sample.mask])
    shown = ", ".join(map(str, sorted(values)[:12]))
    return f" (values in the first masks: {shown}{', ...' * (len(values) > 12)})" if values else ""


def _first_values(masks: Sequence[Path]) -> set[int]:
    """The values in :data:`_LOOKED_AT` masks, evenly spread; none where one of them can't be read."""
    values: set[int] = set()
    for mask in masks[:: max(1, len(masks) // _LOOKED_AT)][:_LOOKED_AT]:
        try:
            values.update(np.unique(_read_numbers(mask)).tolist())
        except DataError:  # reported when it is read, if its image can be
            return set()
    return values


def read_mask(sample: ImageSample, num_classes: int) -> np.ndarray:
    """Class of each pixel: ``(H, W)``, uint8 for up to 255 classes (255 is ignored), else int64.

    Palette masks give their indices; the values of known data sets become classes. Where there are only instances, 1 is
    any instance and 0 the rest.

    Raises:
        DataError: if the mask can't be read, has colours instead of numbers, another size than its image, or a value
            for which there is no class.
    """
    numbers, source = read_stored(sample), sample.mask or sample.instances
    if sample.mask is None:
        return numbers.astype(np.uint8)
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


def read_stored(sample: ImageSample) -> np.ndarray:
    """``(H, W)``: the values in the mask of an image as stored; of instances alone, 1 for any and 0 for the rest.

    Raises:
        DataError: if there is no mask, it can't be read, has colours instead of numbers, or doesn't fit its image.
    """
    source = sample.mask or sample.instances
    if source is None:
        raise DataError(f"{sample.path}: has no mask")
    numbers = _read_numbers(source, sample.pixels.max_pixels)
    _check_fit(source, numbers.shape, sample.path, image_size(sample.path))
    return numbers if sample.mask is not None else numbers > 0


def check_headers(images: ImageSet) -> None:
    """Compare the sizes and orientations of images and masks by their headers, before anything is fitted to them.

    Images whose header can't be read are left for the reader, which counts them. Cost: 0.2 ms a file.

    Raises:
        DataError: for the first mask that does not fit its image.
    """
    for sample in images.samples:
        mask = sample.mask or sample.instances
        if mask is None:
            continue
        try:
            size = image_size(sample.path)
        except DataError:
            continue
        with reading(mask, "a mask"), open_binary(mask) as file, Image.open(file) as picture:
            mask_size = (picture.height, picture.width)
            is_turned = picture.getexif().get(_ORIENTATION, 1) >= 5
        _check_fit(mask, mask_size[::-1] if is_turned else mask_size, sample.path, size)


def _check_fit(mask: Path, mask_size: tuple[int, ...], image: Path, size: tuple[int, int]) -> None:
    """Refuse a mask of another size than its image, or of which it can't be known whether it belongs to the picture as
    stored or as shown: the image is turned or mirrored by its EXIF orientation, and the mask has none."""
    if mask_size != size:
        turned = mask_size == size[::-1] and _orientation(image) >= 5
        raise DataError(
            f"{mask}: {mask_size[1]}x{mask_size[0]} pixels, its image {image.name} has {size[1]}x{size[0]}; "
            f"they must be the same{' (the image is turned by its EXIF orientation, the mask is not)' * turned}"
        )
    orientation = _orientation(image)
    if orientation == 1 or (orientation >= 5 and size[0] != size[1]) or _orientation(mask) == orientation:
        return
    raise DataError(
        f"{image}: has the EXIF orientation {orientation}, its mask {mask.name} has none, and it can't be known "
        "whether the mask is of the picture as stored or as shown; save the image upright, without EXIF orientation"
    )


def _read_numbers(path: Path, max_pixels: int = NO_PIXELS.max_pixels) -> np.ndarray:
    """``(H, W)``: the values of a mask as stored, turned by its own EXIF orientation."""
    with reading(path, "a mask"), open_binary(path) as file, Image.open(file) as image:
        if image.width * image.height > max_pixels:
            raise DataError(
                f"{path}: {image.width}x{image.height} pixels, more than max_pixels={max_pixels}; make it smaller"
            )
        if image.mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
            raise DataError(
                f"{path}: a mask of mode {image.mode}, it needs one number a pixel (grey or palette): "
                "the line in classes.txt, from 0"
            )
        if image.format == "JPEG":
            raise DataError(f"{path}: a mask saved as JPEG, which changes its values; save masks as PNG")
        bits, mode = _stored_bits(path, image), image.mode
        numbers = np.asarray(ImageOps.exif_transpose(image))
    if mode == "L" and bits in (2, 4):  # Pillow stretches them to 0..255
        numbers = numbers // (255 // (2**bits - 1))
    return numbers.astype(np.uint8) if numbers.dtype == bool else numbers


def _stored_bits(path: Path, image: Image.Image) -> int | None:
    """Bits of a value in the file, of PNG and TIFF; None of other formats."""
    if image.format == "PNG":
        with open_binary(path) as file:
            start = file.read(25)
        return start[24] if start.startswith(_PNG) and len(start) == 25 else None
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (1,))
        return int(bits[0] if isinstance(bits, tuple) else bits)
    return None


def _orientation(path: Path) -> int:
    """The EXIF orientation of an image, 1..8; 1 if there is none."""
    with reading(path, "an image"), open_binary(path) as file, Image.open(file) as image:
        return int(image.getexif().get(_ORIENTATION, 1))


def eval_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """``(size, size)``: the mask by nearest pixel, in the rule of ``F.interpolate(mode="nearest")``."""
    rows, columns = (_nearest(side, size) for side in mask.shape)
    return mask[rows[:, None], columns[None, :]]


def _nearest(side: int, size: int) -> np.ndarray:
    """``(size,)``: which of ``side`` places each of ``size`` places takes."""
    ramp = torch.arange(side, dtype=torch.float32)[None, None]  # as masks travel in the sources
    return F.interpolate(ramp, size=size, mode="nearest")[0, 0].long().numpy()
