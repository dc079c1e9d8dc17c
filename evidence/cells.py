"""Finished cells of a comparison as one small archive, so that a long plan can go on later or on another machine.

    python evidence/cells.py pack runs/cifar/compare evidence/cells/part-cifar.tar.xz
    python evidence/cells.py unpack evidence/cells/part-cifar.tar.xz runs/cifar/compare

The archive holds results, details and costs of each cell, without checkpoints (20 to 500 KB a cell), and the measured
numbers of steps. ``smalti compare`` with the same plan finds these cells finished and trains only what is missing. A
cell that was stopped before its evaluation is left out.
"""

import argparse
import tarfile
from pathlib import Path

from smalti.comparison.cell import RESULTS_FILE, RUN
from smalti.comparison.plan import CELLS, STEPS
from smalti.comparison.run import PLAN_FILE
from smalti.files import is_free


def is_finished(cell: Path) -> bool:
    """Whether a cell has results of an evaluation."""
    return any((folder / RESULTS_FILE).is_file() for folder in cell.iterdir() if folder.is_dir())


def pack(comparison: Path, archive: Path) -> int:
    """Write the finished cells of a comparison; returns their number."""
    cells = sorted(cell for cell in (comparison / CELLS).iterdir() if cell.is_dir() and is_finished(cell))
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz") as file:
        file.add(comparison / PLAN_FILE, PLAN_FILE)
        for path in sorted((comparison / STEPS).glob("*.json")):
            file.add(path, path.relative_to(comparison).as_posix())
        for cell in cells:
            for path in sorted(cell.rglob("*")):
                if path.is_file() and path.relative_to(cell).parts[0] != RUN:
                    file.add(path, path.relative_to(comparison).as_posix())
    return len(cells)


def unpack(archive: Path, comparison: Path) -> int:
    """Put the cells of an archive into a new folder; returns their number."""
    if not is_free(comparison):
        raise SystemExit(f"{comparison}: is not empty; choose another folder")
    comparison.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as file:
        file.extractall(comparison, filter="data")
    return len(list((comparison / CELLS).iterdir()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    number = {"pack": pack, "unpack": unpack}[options.what](options.source, options.target)
    print(f"{options.target}: {number} cells")


if __name__ == "__main__":
    main()
