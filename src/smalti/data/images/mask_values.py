"""Values in a sample of masks: number of pixels and meaning of each."""

import random
from dataclasses import dataclass

import numpy as np

from smalti.data.images.image_set import IGNORED, REFUSED, ImageSample, ImageSet, as_text
from smalti.data.images.masks import BLACK_AND_WHITE_REMEDY, is_black_and_white, read_stored
from smalti.data.views import Skipped
from smalti.errors import DataError

_MOST = 50
_SHOWN = 8
_IGNORED_NAME = "(ignored)"


@dataclass(frozen=True)
class MaskValues:
    """The values in a sample of the masks of an image set."""

    masks: int
    """Images that have a mask or instances."""
    looked_at: int
    """Masks in the sample."""
    pixels: dict[int, int]
    """``{value: pixels}``, by value; of instances alone, 1 is any of them."""
    names: dict[int, str]
    """``{value: its class, or "(ignored)"}``; without the values that mean nothing."""
    unreadable: tuple[Skipped, ...]
    """Masks of the sample that can't be used."""
    classes: int | None
    """Classes that there are; None without ``classes.txt``."""
    of: str
    """The layout."""

    @property
    def problems(self) -> list[str]:
        """What an evaluation on the masks would refuse or misread, a sentence each."""
        found = []
        if self.unreadable:
            path, why = self.unreadable[0]
            why = why.removeprefix(f"{as_text(path)}: ")
            found.append(
                f"{len(self.unreadable)} of {self.looked_at} masks can't be used, the first: {as_text(path)}: {why}"
            )
        if self.classes is None and self.pixels:
            found.append(
                f"masks hold the values {_listed(list(self.pixels))}, but there is no classes.txt to name them"
            )
        if is_black_and_white(self.pixels.keys()) and (self.classes or 0) <= IGNORED:
            found.append(f"masks hold only 0 and {IGNORED}, and {IGNORED} is ignored; {BLACK_AND_WHITE_REMEDY}")
        unknown = [value for value in self.pixels if value not in self.names]
        if unknown and self.classes is not None and self.of == "masks":
            found.append(
                f"masks hold the values {_listed(unknown)}, but classes.txt names {self.classes} classes "
                f"(0..{self.classes - 1}; {IGNORED} is ignored); add lines, or set eval.mask_values or eval.ignore"
            )
        elif unknown and self.classes is not None:
            found.append(f"masks hold the values {_listed(unknown)}, which no mask of {self.of} has")
        return found


def count_values(images: ImageSet, most: int = _MOST) -> MaskValues | None:
    """Values in at most so many masks, drawn from all by a fixed seed; None if no image has a mask."""
    samples = [sample for sample in images.samples if sample.mask is not None or sample.instances is not None]
    if not samples:
        return None
    drawn = sorted(random.Random(0).sample(range(len(samples)), min(most, len(samples))))
    pixels: dict[int, int] = {}
    unreadable = []
    for place in drawn:
        sample = samples[place]
        try:
            values, counts = np.unique(read_stored(sample), return_counts=True)
        except DataError as error:
            unreadable.append(Skipped(sample.mask or sample.instances or sample.path, str(error)))
            continue
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            pixels[int(value)] = pixels.get(int(value), 0) + count
    pixels = dict(sorted(pixels.items()))
    names = {value: name for value in pixels if (name := _name(value, samples[0], images.classes))}
    number = len(images.classes) if images.classes else None
    return MaskValues(len(samples), len(drawn), pixels, names, tuple(unreadable), number, images.layout)


def _name(value: int, sample: ImageSample, classes: tuple[str, ...] | None) -> str | None:
    """The class of a value, or that it is ignored; None if it means nothing."""
    known = classes or ()
    if sample.label_map is not None:
        value = int(sample.label_map.classes(np.array([value]))[0])
        if value == REFUSED:
            return None
    if value == IGNORED and len(known) <= IGNORED:
        return _IGNORED_NAME
    return known[value] if 0 <= value < len(known) else None


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values[:_SHOWN])) + ", ..." * (len(values) > _SHOWN)
