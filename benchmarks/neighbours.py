"""Nearest neighbours: search against the bare matrix product, labels against what the public code does, and memory.

    python benchmarks/neighbours.py

Goals: search, at 20,000 and 100,000 keys of 384 numbers and k=30, at most 1.3 of the matrix product alone (written into
memory that is there already), with exactly the indices of a full sort; class counts of patches at most 0.08 of one-hot
masks and their mean; labels from neighbours at most 0.06 of gathering the neighbours' keys and labels and taking
cosines again; memory above keys and labels at most 1.2 times when the keys grow 5 times, or the judged images 4 times.
Memory is the growth of the resident set's peak over judging images batch by batch, in processes apart.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from _bench import interleave, report
from smalti.evaluation.protocols.in_context import upsampled_argmax
from smalti.evaluation.tally import PixelTally
from smalti.functional.neighbours import mix_labels, nearest, patch_counts

DIM, K, CLASSES, TEMPERATURE = 384, 30, 21, 0.02
QUERIES = 512
SIDE, PATCH = 448, 16
IMAGES_AT_ONCE, IMAGES = 2, 4


def unit(count: int, seed: int) -> Tensor:
    """Random unit vectors."""
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def search(num_keys: int) -> None:
    queries, keys = unit(QUERIES, 0), unit(num_keys, 1)
    room = torch.empty(256, num_keys)

    def product() -> None:
        for part in queries.split(256):
            torch.mm(part, keys.T, out=room)

    timings = interleave({"ours": lambda: nearest(queries, keys, K), "product": product}, rounds=9)
    report(f"neighbours search {QUERIES}x{num_keys}x{DIM}", timings, "ours", "product", 1.3)
    expected = (queries @ keys.T).sort(dim=1, descending=True, stable=True).indices[:, :K]
    same = torch.equal(nearest(queries, keys, K)[1], expected)
    print(f"      indices of a full sort: {'all equal' if same else 'DIFFERENT'}")


def masks() -> Tensor:
    """Blobs of classes, and some void."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, CLASSES, (8, SIDE // 8, SIDE // 8), generator=g, dtype=torch.uint8)
    blobs = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    blobs[:, :5] = 255
    return blobs


def labels() -> None:
    truth, side = masks(), SIDE // PATCH

    def one_hot() -> Tensor:
        no_void = truth.where(truth != 255, 0).long()
        cells = F.one_hot(no_void, CLASSES).view(-1, side, PATCH, side, PATCH, CLASSES)
        return cells.float().mean((2, 4)).flatten(1, 2)

    def ours() -> Tensor:
        return patch_counts(truth.where(truth != 255, 0), (PATCH, PATCH), CLASSES, 255)

    assert torch.equal(ours() / PATCH**2, one_hot())
    timings = interleave({"ours": ours, "one-hot": one_hot}, rounds=9)
    report(f"neighbours labels of 8 masks of {SIDE} px, {CLASSES} classes", timings, "ours", "one-hot", 0.08)


def aggregation() -> None:
    queries, keys = unit(QUERIES, 0), unit(50_000, 1)
    counts = torch.randint(0, 8, (len(keys), CLASSES), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    shares = counts / counts.sum(1, keepdim=True)
    sims, places = nearest(queries, keys, K)

    def ours() -> Tensor:
        return mix_labels((sims / TEMPERATURE).softmax(1), places, counts)

    def gathered() -> Tensor:
        cosine = F.cosine_similarity(queries[:, None], keys[places], dim=2)
        weights = (cosine / TEMPERATURE).softmax(1)
        return torch.einsum("qk,qkc->qc", weights, shares[places])

    torch.testing.assert_close(ours(), gathered(), atol=1e-5, rtol=0)
    timings = interleave({"ours": ours, "gathered": gathered}, rounds=15)
    report(f"neighbours labels of {QUERIES} queries, k={K}", timings, "ours", "gathered", 0.06)


def extra_mib(num_keys: int, num_images: int) -> float:
    """Peak above keys, labels and masks in MiB, in a process of its own."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "memory", str(num_keys), str(num_images)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def measure_memory(num_keys: int, num_images: int) -> None:
    """Print the growth of the peak of the resident set over judging images against a memory."""

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    def judge(keys: Tensor, images: int) -> None:
        side = SIDE // PATCH
        tally = PixelTally(CLASSES, images)
        for first in range(0, images, IMAGES_AT_ONCE):
            tokens = unit(IMAGES_AT_ONCE * side * side, first)
            sims, places = nearest(tokens, keys, K)
            mixed = mix_labels((sims / TEMPERATURE).softmax(1), places, counts)
            for i, shares in enumerate(mixed.view(IMAGES_AT_ONCE, side, side, CLASSES)):
                tally.update(truth[None], upsampled_argmax(shares, SIDE)[None], [first + i])
        tally.iou("skip").score()

    keys, truth = unit(num_keys, 1), masks()[0]
    counts = torch.randint(0, 8, (num_keys, CLASSES), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    judge(keys[:100], IMAGES_AT_ONCE)  # loads code
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    judge(keys, num_images)
    print(status("VmHWM") - before)


def memory() -> None:
    base = extra_mib(20_000, IMAGES)
    for what, grown, times in (
        ("keys 20,000 to 100,000", extra_mib(100_000, IMAGES), 5),
        (f"judged images {IMAGES} to {4 * IMAGES}", extra_mib(20_000, 4 * IMAGES), 4),
    ):
        verdict = "met" if grown <= 1.2 * base else "MISSED"
        print(
            f"BENCH neighbours memory, {what} ({times} times): ratio={grown / base:.2f} goal<=1.2 {verdict} "
            f"{base:.0f} to {grown:.0f} MiB above keys and labels"
        )


def main() -> None:
    torch.set_num_threads(1)
    for num_keys in (20_000, 100_000):
        search(num_keys)
    labels()
    aggregation()
    memory()


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        torch.set_num_threads(1)
        measure_memory(int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
