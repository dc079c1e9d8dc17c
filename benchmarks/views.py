"""How long does one core take for DINO's multi-crop, 2 x 224 and 8 x 96, of a 500 x 375 JPEG, from its bytes?

Against LightlySSL's DINOTransform (extra ``bench``), with its own defaults and Pillow's decoding, on the same bytes and
with the same probabilities and strengths. Ours gives uint8, which is normalised on the device; theirs float32,
normalised. CPU time, one thread, interleaved. The goal is a ratio of at most 0.25.

    python benchmarks/views.py
"""

import io
import itertools
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from _bench import interleave, report
from smalti.data.color import ColorConfig
from smalti.data.crops import MultiCrop, ViewSpec
from smalti.data.images.decode import decode_image
from smalti.data.views import collate

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "ihc.png", "motorcycle_left.png", "rocket.jpg")
ROUNDS = 40


def jpegs() -> list[bytes]:
    """scikit-image's photographs as JPEGs of 500 x 375 pixels."""
    spec = find_spec("skimage")
    assert spec is not None and spec.origin is not None, 'pip install "smalti[samples]"'
    result = []
    for name in PHOTOGRAPHS:
        with Image.open(Path(spec.origin).parent / "data" / name) as image:
            width, height = image.size
            width = min(width, height * 4 // 3)
            picture = image.convert("RGB").crop((0, 0, width, width * 3 // 4)).resize((500, 375))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        result.append(file.getvalue())
    return result


def main() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    from lightly.transforms import DINOTransform

    files = jpegs()
    theirs = DINOTransform(n_local_views=8)
    color = ColorConfig(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_prob=0.8, gray_prob=0.2)
    ours = MultiCrop(
        [
            ViewSpec(count=2, size=224, scale=(0.4, 1.0), color=color, blur_prob=(1.0, 0.1), solarize_prob=(0.0, 0.2)),
            ViewSpec(count=8, size=96, scale=(0.05, 0.4), color=color, blur_prob=0.5),
        ]
    )
    keys = itertools.count()

    def run_ours() -> None:
        for file in files:
            image = decode_image(file)
            collate([ours(image, np.random.Generator(np.random.Philox(key=next(keys))))])

    def run_theirs() -> None:
        for file in files:
            theirs(Image.open(io.BytesIO(file)).convert("RGB"))

    timings = interleave({"ours": run_ours, "lightly": run_theirs}, ROUNDS)
    per_image = {name: type(timing)(*(seconds / len(files) for seconds in timing)) for name, timing in timings.items()}
    report("views", per_image, "ours", "lightly", goal=0.25)


if __name__ == "__main__":
    main()
