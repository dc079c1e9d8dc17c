"""How many pictures saved again are found, and what else is: ``python benchmarks/near_duplicates.py FOLDER...``.

Of each folder, 400 images (seeded) are changed in each way and looked for among all; then all images are compared with
one another. Pairs found there are no copies of ours: look at them.
"""

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from smalti.data.images.decode import read_image
from smalti.data.images.image_files import find_images
from smalti.data.images.near_duplicates import find_near, reduce_picture

NUM_CHANGED = 400


def resized(image: np.ndarray, width: int, height: int, interpolation: int) -> np.ndarray:
    """The image at another size."""
    return cv2.resize(image, (max(1, width), max(1, height)), interpolation=interpolation)


def half(image: np.ndarray, interpolation: int = cv2.INTER_AREA) -> np.ndarray:
    """The image at half its size."""
    return resized(image, image.shape[1] // 2, image.shape[0] // 2, interpolation)


def saved(image: np.ndarray, ending: str, setting: int, quality: int) -> np.ndarray:
    """The image as a lossy format keeps it."""
    done, data = cv2.imencode(ending, image[..., ::-1], [setting, quality])
    assert done
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """The image as a JPEG."""
    return saved(image, ".jpg", cv2.IMWRITE_JPEG_QUALITY, quality)


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "PNG to JPEG, quality 90": lambda image: jpeg(image, 90),
    "JPEG, quality 50": lambda image: jpeg(image, 50),
    "WebP, quality 50": lambda image: saved(image, ".webp", cv2.IMWRITE_WEBP_QUALITY, 50),
    "half size (area)": half,
    "half size (cubic)": lambda image: half(image, cv2.INTER_CUBIC),
    "half size, JPEG 50": lambda image: jpeg(half(image), 50),
    "224x224, JPEG 75": lambda image: jpeg(resized(image, 224, 224, cv2.INTER_LINEAR), 75),
}


def main(folder: Path) -> None:
    """Print the figures of one folder."""
    paths = [folder / name for name in find_images(folder).names]
    drawn = set(random.Random(0).sample(range(len(paths)), min(NUM_CHANGED, len(paths))))
    pictures, places, names = [], [], []
    changed: dict[str, list[np.ndarray | None]] = {name: [] for name in CHANGES}
    seconds = 0.0
    for number, path in enumerate(paths):
        image = read_image(path)
        start = time.process_time()
        picture = reduce_picture(image)
        seconds += time.process_time() - start
        if picture is None:
            continue
        if number in drawn:
            places.append(len(pictures))
            for name, change in CHANGES.items():
                changed[name].append(reduce_picture(change(image)))
        pictures.append(picture)
        names.append(path)
    known = np.stack(pictures)
    print(
        f"{folder}: {len(paths):,} images, {len(paths) - len(known)} too flat; {seconds / len(paths) * 1e3:.2f} ms each"
    )
    for name, results in changed.items():
        kept = [(place, one) for place, one in zip(places, results, strict=True) if one is not None]
        found = find_near(np.stack([one for _, one in kept]), known)
        right = sum(int(at == place) for at, (place, _) in zip(found, kept, strict=True))
        wrong = sum(int(at >= 0) for at in found) - right
        print(f"  {name:24s} found {right / len(places):.1%} of {len(places)}, another image instead: {wrong}")
    start = time.process_time()
    found = find_near(known)
    seconds = time.process_time() - start
    pairs = len(known) * (len(known) - 1) // 2
    print(f"  {pairs:,} pairs compared in {seconds:.2f} s, near-duplicates: {(found >= 0).sum()}")
    for one in np.flatnonzero(found >= 0):
        print(f"    {names[one]} = {names[found[one]]}")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(Path(argument))
