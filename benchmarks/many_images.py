"""Time and memory to open many images: ``python benchmarks/many_images.py [COUNT] [--flat]``.

A folder of hard links to a few small files (1,000 class folders, or one with ``--flat``) and tar shards of the same
images are made in the current folder and removed. Each is opened in its own process, which then makes the source that
the training loader reads from. Memory is what the process takes more than before, at most, and after that.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

GOALS = {"folder": 20.0, "shards, first time": None, "shards": 5.0}
"""Seconds, of 1,000,000 images."""
GOAL_MIB = 700
MOST_LINKS = 60_000  # of one file; ext4 allows 65,000
CLASSES = 1000


def make_folder(folder: Path, count: int, flat: bool) -> None:
    """``count`` images, of which as few as possible are files of their own."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for number in range(count):
        if number % MOST_LINKS == 0:
            source = folder.with_name(f"source_{number}.jpg")
            cv2.imwrite(str(source), pixels)
        inside = folder if flat else folder / f"n{number * CLASSES // count:08d}"
        if number == 0 or (not flat and number * CLASSES // count != (number - 1) * CLASSES // count):
            inside.mkdir(parents=True)
        os.link(source, inside / f"image_{number:08d}.jpg")


def opened(data: str) -> None:
    """Open images in this process, and print seconds and MiB."""
    from smalti.data.images.folders import open_images

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, used = time.perf_counter(), time.process_time()
    images = open_images(data).training()
    source = images.source(3)
    fingerprint, labels = images.fingerprint(), images.labels
    took, used = time.perf_counter() - began, time.process_time() - used
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
        now = next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) - before
    assert len(source) == len(images) and (labels is None or len(labels) == len(images))
    source.read(len(source) // 2)
    print(f"{took:.2f} {used:.2f} {peak:.0f} {now / 1024:.0f} {fingerprint}")


def measure(name: str, data: Path, count: int) -> str:
    """Open data in a new process, and print its figures; its fingerprint comes back."""
    done = subprocess.run([sys.executable, __file__, "--open", str(data)], check=True, capture_output=True, text=True)
    took, used, peak, now, fingerprint = done.stdout.split()
    goal = GOALS[name]
    verdict = ""
    if goal is not None and count == 1_000_000:
        verdict = (
            f" goal<={goal:g}s,{GOAL_MIB}MiB {'met' if float(took) <= goal and int(peak) <= GOAL_MIB else 'MISSED'}"
        )
    print(
        f"BENCH open {count:,} images, {name}: {took} s (CPU {used} s), {peak} MiB at most, {now} MiB kept{verdict}",
        flush=True,
    )
    return fingerprint


def main(count: int, flat: bool) -> None:
    """Make the images, measure, and remove them."""
    home = Path(tempfile.mkdtemp(prefix="many_images_", dir=Path.cwd()))
    try:
        folder, shards = home / "folder", home / "shards"
        make_folder(folder, count, flat)
        found = [measure("folder", folder, count)]
        subprocess.run([sys.executable, "-m", "smalti", "shard", folder, "--out", shards, "--quiet"], check=True)
        (shards / ".smalti_index").unlink()
        found += [measure(name, shards, count) for name in ("shards, first time", "shards")]
        assert len(set(found)) == 1, found
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["--open"]:
        opened(words[1])
    else:
        numbers = [int(word) for word in words if word.isdigit()]
        main(numbers[0] if numbers else 1_000_000, "--flat" in words)
