"""Copies of pictures (identical files, near-duplicates) within the training images, and of evaluated ones in these."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smalti.data.images.near_duplicates import SIDE, find_near
from smalti.data.images.scan import ScannedImage

Pair = tuple[Path, Path]


@dataclass(frozen=True)
class Copies:
    """Images that are also among others."""

    of: str
    """Which images, such as ``val``."""
    among: str
    """Which others, such as ``train``; the same as ``of``: those before each."""
    count: int
    """Images that were compared with the others."""
    identical: tuple[Pair, ...]
    """An image and another file with its bytes, for each that has one."""
    near: tuple[Pair, ...]
    """An image and its near-duplicate, for each that has one and no identical file."""

    @property
    def is_leak(self) -> bool:
        """Whether images to be evaluated are trained on."""
        return self.of != self.among and bool(self.identical or self.near)


def find_copies(
    images: Sequence[ScannedImage], among: Sequence[ScannedImage] | None = None, *, of: str, others: str
) -> Copies:
    """Which images are copies of others.

    Args:
        images: what to look for.
        among: images to search; None: for each image those before it.
        of: what to call ``images``.
        others: what to call ``among``.
    """
    first: dict[bytes, ScannedImage] = {}
    for one in among or ():
        first.setdefault(one.digest, one)
    identical: list[Pair] = []
    rest: list[ScannedImage] = []
    for one in images:
        known = first.get(one.digest) if one.digest else None
        if known is not None:
            identical.append((one.path, known.path))
        else:
            rest.append(one)
            if among is None:
                first[one.digest] = one
    rest = [one for one in rest if one.picture is not None]
    where = rest if among is None else [one for one in first.values() if one.picture is not None]
    found = find_near(_stack(rest), None if among is None else _stack(where))
    near = [(one.path, where[place].path) for one, place in zip(rest, found, strict=True) if place >= 0]
    return Copies(of, others, len(images), tuple(identical), tuple(near))


def _stack(images: Sequence[ScannedImage]) -> np.ndarray:
    """``(n, 16, 16, 3)``, also for none."""
    pictures = [one.picture for one in images if one.picture is not None]
    return np.stack(pictures) if pictures else np.zeros((0, SIDE, SIDE, 3), np.uint8)
