"""Common parts of dense protocols: masks as targets, upsampling, tokens of augmented images."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F

from smalti.data.crops import random_resized_crop, resize
from smalti.data.images.decode import image_size
from smalti.data.images.folders import ImageSample, ImageSet
from smalti.data.images.labelled import eval_mask, read_mask
from smalti.data.loader import sample_key
from smalti.data.views import Skipped
from smalti.errors import DataError
from smalti.evaluation.features import Features
from smalti.evaluation.metrics import IGNORE

CROP_AREA, CROP_ASPECT, FLIP_PROB = (0.8, 1.0), (3 / 4, 4 / 3), 0.5
Alter = Callable[..., tuple[np.ndarray, np.ndarray]]
"""``alter(image (H, W, C), mask (H, W), rng=...)`` -> an image ``(S, S, C)`` and a mask ``(M, M)``."""


def upsampling(side: int, size: int) -> Float[Tensor, "M h"]:
    """Bilinear upsampling along one axis as a matrix: ``F.interpolate`` without aligned corners."""
    return F.interpolate(torch.eye(side)[None], size=size, mode="linear", align_corners=False)[0].T.contiguous()


def ignored_value(num_classes: int) -> int:
    """The value of ignored pixels: 255, or -1 (none) if 255 is a class."""
    return IGNORE if num_classes <= IGNORE else -1


def read_masks(images: ImageSet, num_classes: int, size: int) -> Integer[Tensor, "n M M"]:
    """Masks of all images, resized by nearest pixel; those of unreadable images are never used and hold zeros.

    Raises:
        DataError: if the mask of a readable image is missing, damaged, or has a value that isn't a class.
    """
    masks = torch.zeros(len(images), size, size, dtype=torch.uint8 if num_classes <= IGNORE else torch.int64)
    for place, sample in enumerate(images.samples):
        mask = mask_of_readable(sample, num_classes)
        if mask is not None:
            masks[place] = torch.from_numpy(eval_mask(mask, size))
    return masks


def unlabelled_of(images: ImageSet, masks: Integer[Tensor, "n M M"], ignore: int, called: str) -> list[int]:
    """Indices of the evaluated images whose masks from :func:`read_masks` have no labelled pixel; warns about them.


    Raises:
        DataError: if no mask has a labelled pixel.
    """
    places = (masks == ignore).flatten(1).all(1).nonzero()[:, 0].tolist()
    if len(places) == len(images):
        raise DataError(f"{images.root}: no labelled pixel in the masks of all {len(images)} {called}")
    warn_unlabelled(images, places, called)
    return places


def warn_unlabelled(images: ImageSet, places: Sequence[int], called: str) -> None:
    """Warn about images without a labelled pixel; a single call site lets Python filter repeated warnings."""
    if places:
        first = images.samples[places[0]].path.name
        warnings.warn(
            f"{images.root}: {len(places)} of {len(images)} {called} have no labelled pixel and are skipped "
            f"(the first is {first})",
            stacklevel=1,  # the same location for all
        )


def mask_of_readable(sample: ImageSample, num_classes: int) -> np.ndarray | None:
    """The mask; None if the image can't be read."""
    try:
        return read_mask(sample, num_classes)
    except DataError:
        try:
            image_size(sample.path)
        except DataError:
            return None
        raise


def augmented_tokens(
    features: Features, order: Sequence[int], batch_size: int, seed: int, epoch: int, alter: Alter
) -> Iterator[tuple[Float[Tensor, "B N D"], Integer[Tensor, "B M M"], list[int]]]:
    """Tokens, masks and indices of augmented training images; randomness depends on (seed, epoch, image) only.

    Args:
        features: features of the training images.
        order: indices of the images in the split.
        batch_size: images per batch; unreadable images are skipped.
        seed: seed of the augmentation.
        epoch: epoch of the augmentation.
        alter: augments an image and its mask: ``alter(image, mask, rng=...)``.
    """
    images, num_classes = features.data.train, len(features.data.classes)
    channels = features.encoder.in_chans

    def make(position: int) -> tuple[Tensor, Tensor, int] | Skipped:
        sample = images.samples[position]
        try:
            image = sample.read(channels)
        except DataError as error:
            return Skipped(sample.path, str(error).removeprefix(f"{sample.path}: "))
        mask = read_mask(sample, num_classes)
        pixels, mask = alter(image, mask, rng=np.random.default_rng(sample_key(seed, epoch, position)))
        scaled = torch.from_numpy(pixels).permute(2, 0, 1).float()
        return scaled / 255 if pixels.dtype == np.uint8 else scaled, torch.from_numpy(mask), position

    with ThreadPoolExecutor(max(1, features.num_workers)) as pool:
        for start in range(0, len(order), batch_size):
            made = list(pool.map(make, order[start : start + batch_size]))
            features.skipped.update({str(item.path): item.reason for item in made if isinstance(item, Skipped)})
            whole = [item for item in made if not isinstance(item, Skipped)]
            if not whole:
                continue
            parts = [
                features.patches(torch.stack([pixels for pixels, _, _ in whole[i : i + features.batch_size]]))
                for i in range(0, len(whole), features.batch_size)
            ]
            masks, places = torch.stack([mask for _, mask, _ in whole]), [place for _, _, place in whole]
            yield torch.cat(parts).float(), masks, places


def crop_and_flip(
    image: np.ndarray, mask: np.ndarray, *, size: int, mask_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The same random crop of an image and its mask, mirrored with probability 0.5.

    Args:
        image: ``(H, W, C)``.
        mask: ``(H, W)``.
        size: side of the resulting image; antialiased bicubic (the papers' code: bilinear).
        mask_size: side of the resulting mask; nearest pixel.
        rng: source of randomness.
    """
    top, left, height, width = random_resized_crop(rng, mask.shape[0], mask.shape[1], CROP_AREA, CROP_ASPECT)
    window = np.s_[top : top + height, left : left + width]
    pixels = resize(image[window], size).reshape(size, size, -1)  # OpenCV drops a single channel's axis
    labels = eval_mask(mask[window], mask_size)
    if rng.random() < FLIP_PROB:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    return np.ascontiguousarray(pixels), np.ascontiguousarray(labels)
