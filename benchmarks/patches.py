"""What do patches off the grid cost: 196 boxes of 8 to 32 pixels in each of 8 images of 224, resized to 16 x 16?

All boxes of the batch at once, boxes drawn before, against a loop of torchvision's crop-and-resize (bilinear,
antialiased) over the same boxes; the goal is a ratio of at most 0.14. Below it, without a goal: a barer loop,
F.interpolate on slices, and the patches of ``offgrid``, which need no resizing and are copied, against both loops
(torchvision's then does nothing but cut). Then four times the patches: at most 4.2 times the cost. CPU time, one
thread, interleaved.

    python benchmarks/patches.py
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import resized_crop

sys.path.insert(0, str(Path(__file__).parent))
from _bench import interleave, report
from smalti.functional.offgrid import PatchSampler

BATCH, NUM_PATCHES, SIZE, PATCH = 8, 196, 224, 16


def crop_and_resize(images: Tensor, boxes: list[list[list[int]]]) -> Tensor:
    """The loop, by torchvision."""
    crops = [
        resized_crop(image, y0, x0, y1 - y0, x1 - x0, [PATCH, PATCH], antialias=True)
        for image, its in zip(images, boxes, strict=True)
        for x0, y0, x1, y1 in its
    ]
    return torch.stack(crops)


def slice_and_interpolate(images: Tensor, boxes: list[list[list[int]]]) -> Tensor:
    """The barer loop."""
    crops = [
        F.interpolate(image[None, :, y0:y1, x0:x1], (PATCH, PATCH), mode="bilinear", antialias=True)
        for image, its in zip(images, boxes, strict=True)
        for x0, y0, x1, y1 in its
    ]
    return torch.cat(crops)


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).contiguous(memory_format=torch.channels_last)
    for kind in ("offgrid_scale", "offgrid"):
        sampler = PatchSampler((PATCH, PATCH), kind, NUM_PATCHES)
        boxes = sampler.boxes(torch.arange(BATCH), images)
        plain = boxes.int().tolist()
        ways = {
            "ours": lambda s=sampler, b=boxes: s.cut(images, b),
            "torchvision": lambda p=plain: crop_and_resize(images, p),
            "interpolate": lambda p=plain: slice_and_interpolate(images, p),
        }
        timings = interleave(ways, rounds=9)
        if kind == "offgrid_scale":
            report(f"patches {kind}", timings, "ours", "torchvision", goal=0.14)
        for peer in ("torchvision", "interpolate"):
            ratio = timings["ours"].median / timings[peer].median
            print(f"      {kind}, copied or resized, to the loop of {peer}: ratio={ratio:.3f} {peer}={timings[peer]}")
        many = PatchSampler((PATCH, PATCH), kind, 4 * NUM_PATCHES)
        more = many.boxes(torch.arange(BATCH), images)
        grown = interleave(
            {"once": ways["ours"], "fourfold": lambda s=many, b=more: s.cut(images, b)},
            rounds=15,
        )
        report(f"patches {kind}, four times as many", grown, "fourfold", "once", goal=4.2)


if __name__ == "__main__":
    main()
