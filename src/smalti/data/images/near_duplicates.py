"""Near-duplicates: the same picture saved again, resized, re-encoded or in another format.

Each image is reduced to 16x16 pixels. Candidates are pairs whose hashes (signs of low frequencies, as in pHash) differ
in few bits; of these, a pair is one picture if its reduced pixels differ little beside their contrast. Crops, mirror
images and turned ones are other pictures here. The thresholds were chosen on four data sets: docs/data.md,
``benchmarks/near_duplicates.py``.

Letters: n pictures, m pictures they are compared with.
"""

import cv2
import numpy as np

from smalti.data.images.decode import as_picture

SIDE = 16
MAX_DIST = 8
"""Bits of 63 in which the hashes of a candidate pair may differ."""
_MAX_ERROR, _MAX_RELATIVE = 1.0, 0.15
"""Root mean square difference that a pair may have, of 255: rounding, and this much of the lower contrast."""
_MIN_CONTRAST = 2.0
"""Standard deviation of the pixels, of 255, below which a picture is too flat to be distinguished from others."""
_NUM_LOW = 8
_MOST_CANDIDATES = 256
_CHUNK = 4096
_GREY = np.array([0.299, 0.587, 0.114], np.float32)


def reduce_picture(image: np.ndarray) -> np.ndarray | None:
    """``(16, 16, 3)`` uint8, by means over areas; images of more than 8 bits are stretched to their own range.

    Args:
        image: ``(H, W)`` or ``(H, W, C)``, of any type; of more than three channels the first three are taken.

    Returns:
        None for a picture that is too flat to be compared, or has values that aren't finite.
    """
    image = image[..., None] if image.ndim == 2 else image[..., :3]
    with np.errstate(all="ignore"):  # floats may hold anything
        image = image if image.dtype == np.uint8 else image.astype(np.float32)
        small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        if not np.isfinite(small).all():
            return None
        picture = as_picture(small.reshape(SIDE, SIDE, -1))
    return picture if _contrast(picture) >= _MIN_CONTRAST else None


def find_near(pictures: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """``(n,)``: the place of the same picture in ``among``, the most similar one; -1 if there is none.

    Each picture is compared with all others, 8 bytes each, so the cost is quadratic with a small factor: about 7 s
    for 100,000 pictures among themselves. Of more than 256 candidates, those with the most similar hashes are compared.

    Args:
        pictures: ``(n, 16, 16, 3)``, from :func:`reduce_picture`.
        among: ``(m, 16, 16, 3)``; None compares each picture with those before it.
    """
    codes, contrast = _describe(pictures)
    others = pictures if among is None else among
    other_codes, other_contrast = (codes, contrast) if among is None else _describe(among)
    found = np.full(len(pictures), -1)
    for place, picture in enumerate(pictures):
        until = place if among is None else len(others)
        dist = np.bitwise_count(other_codes[:until] ^ codes[place])
        near = np.flatnonzero(dist <= MAX_DIST)
        if len(near) > _MOST_CANDIDATES:
            near = near[np.argsort(dist[near], kind="stable")[:_MOST_CANDIDATES]]
        if len(near):
            error = np.sqrt(np.square(others[near] - picture.astype(np.float32)).mean(axis=(1, 2, 3)))
            allowed = _MAX_ERROR + _MAX_RELATIVE * np.minimum(other_contrast[near], contrast[place])
            best = int((error - allowed).argmin())
            if error[best] <= allowed[best]:
                found[place] = near[best]
    return found


def _contrast(pictures: np.ndarray) -> np.ndarray:
    """``(...,)`` for ``(..., 16, 16, 3)``: the standard deviation over the pixels, the mean of the channels."""
    return np.asarray(pictures.std(axis=(-3, -2)).mean(axis=-1))


def _describe(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(n,)`` uint64: which of the 63 lowest frequencies of the grey picture lie above their median; and ``(n,)``: its
    contrast.

    Source: Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, Sec. 3.2.1 (DCT).
    """
    position = np.arange(SIDE)
    cosines = np.cos(np.pi * (2 * position + 1) * np.arange(_NUM_LOW)[:, None] / (2 * SIDE)).astype(np.float32)
    codes, contrast = np.zeros(len(pictures), np.uint64), np.zeros(len(pictures), np.float32)
    for first in range(0, len(pictures), _CHUNK):
        chunk = pictures[first : first + _CHUNK]
        grey = chunk @ _GREY
        waves = (cosines @ grey @ cosines.T).reshape(len(grey), -1)[:, 1:]  # without the mean
        bits = waves > np.median(waves, axis=1, keepdims=True)
        codes[first : first + _CHUNK] = np.packbits(np.pad(bits, ((0, 0), (0, 1))), axis=1).view(np.uint64)[:, 0]
        contrast[first : first + _CHUNK] = _contrast(chunk)
    return codes, contrast
