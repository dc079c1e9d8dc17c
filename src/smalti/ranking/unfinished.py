"""Orders of the images that are ranked so far, on disk, so that an interrupted ranking goes on where it was stopped.

The folder ``.NAME.unfinished`` beside the file of orders holds ``key.txt``, which changes with all that determines the
orders, and numbered parts. Letters: R rows (images in their flip states), N patches.
"""

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from smalti.files import unfinished_folder, write_atomically

KEY_FILE = "key.txt"
FLUSH_S = 30.0
"""Seconds between two parts."""


@dataclass(frozen=True)
class Rows:
    """Orders of some consecutive images."""

    done: int
    """Images that were read for them, or could not be read."""
    places: list[int] = field(default_factory=list)
    """``(R,)`` indices of the images in the set."""
    flips: list[bool] = field(default_factory=list)
    """``(R,)``."""
    orders: dict[str, Tensor] = field(default_factory=dict)
    """Name -> ``(R, N)`` int16."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """Name -> ``(R, N)`` float32, for orders that have them."""
    degenerate: dict[str, Tensor] = field(default_factory=dict)
    """Name -> ``(R,)`` True if all patches have the same score."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Name -> time to compute these orders."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of images that could not be read."""


def join(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, in their order."""

    def merged(groups: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
        listed = list(groups)
        names = dict.fromkeys(name for group in listed for name in group)
        return {name: torch.cat([group[name] for group in listed if name in group]) for name in names}

    names = dict.fromkeys(name for part in parts for name in part.seconds)
    return Rows(
        done=sum(part.done for part in parts),
        places=[place for part in parts for place in part.places],
        flips=[flip for part in parts for flip in part.flips],
        orders=merged(part.orders for part in parts),
        scores=merged(part.scores for part in parts),
        degenerate=merged(part.degenerate for part in parts),
        seconds={name: sum(part.seconds.get(name, 0.0) for part in parts) for name in names},
        skipped=[item for part in parts for item in part.skipped],
    )


class Unfinished:
    """The folder of an unfinished ranking.

    Args:
        orders: the file of orders that is being made.
        key: changes with everything that determines the orders; parts under another key are removed.
    """

    def __init__(self, orders: Path, key: str) -> None:
        self.folder = unfinished_folder(orders)
        self._key = key
        self._waiting: list[Rows] = []
        self._written = time.monotonic()
        self.parts = self._read()
        """Parts of an earlier call."""

    @property
    def done(self) -> int:
        """Images that earlier calls have ranked."""
        return sum(part.done for part in self.parts)

    def add(self, rows: Rows) -> None:
        """Add rows; they are written from time to time."""
        self._waiting.append(rows)
        if time.monotonic() - self._written >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are not written yet.

        Raises:
            ConfigError: if the folder can't be written.
        """
        if not self._waiting:
            return
        if not (self.folder / KEY_FILE).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / KEY_FILE, self._key)
        rows = join(self._waiting)
        number = len(list(self.folder.glob("*.safetensors")))
        write_atomically(self.folder / f"{number:06d}.safetensors", _encode(rows))
        self._waiting, self._written = [], time.monotonic()

    def remove(self) -> None:
        """Remove the folder: the orders are complete, or others are wanted."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> list[Rows]:
        key = self.folder / KEY_FILE
        if not key.is_file() or key.read_text(encoding="utf-8", errors="replace") != self._key:
            self.remove()
            return []
        parts = []
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                parts.append(_decode(path.read_bytes()))
            except (OSError, SafetensorError, KeyError, ValueError):  # damaged: from here on it is ranked again
                break
        for path in sorted(self.folder.glob("*.safetensors"))[len(parts) :]:
            path.unlink()
        return parts


def _encode(rows: Rows) -> bytes:
    tensors = {
        f"{group}/{name}": value.contiguous()
        for group in ("orders", "scores", "degenerate")
        for name, value in getattr(rows, group).items()
    }
    plain = {name: getattr(rows, name) for name in ("done", "places", "flips", "seconds", "skipped")}
    return safetensors.torch.save(tensors, metadata={"rows": json.dumps(plain)})


def _decode(data: bytes) -> Rows:
    tensors = safetensors.torch.load(data)
    length = int.from_bytes(data[:8], "little")
    plain = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["rows"])
    groups: dict[str, dict[str, Tensor]] = {"orders": {}, "scores": {}, "degenerate": {}}
    for key, value in tensors.items():
        group, _, name = key.partition("/")
        groups[group][name] = value
    skipped = [(str(path), str(reason)) for path, reason in plain.pop("skipped")]
    return Rows(
        **plain, skipped=skipped, orders=groups["orders"], scores=groups["scores"], degenerate=groups["degenerate"]
    )
