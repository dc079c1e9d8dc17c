"""Views of images: one training sample, a batch of them, and the transform that makes a sample from an image."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


class Skipped(NamedTuple):
    """An image that couldn't be read, and why."""

    path: Path
    reason: str


@dataclass
class SampleViews:
    """The views of one image."""

    crops: tuple[np.ndarray, ...]
    """One a ViewSpec: ``(count, S, S, C)``, uint8 or float32 in 0..1."""
    boxes: np.ndarray
    """``(V, 4)`` float32, x0 y0 x1 y1 in pixels of the source image."""
    flips: np.ndarray
    """``(V,)`` bool."""
    source_size: tuple[int, int]
    """Height and width of the source image."""
    index: int = 0
    """Place in the image set."""
    key: int = 0
    """Random key of the sample."""
    label: int | None = None
    """Its class, if the layout has one."""


@dataclass
class Views:
    """A batch of views, view-major: view 0 of all images, then view 1 of all images, ..."""

    crops: tuple[Tensor, ...]
    """One a ViewSpec: ``(V_s * B, C, S, S)`` in channels-last memory, uint8 0..255 or float32 0..1."""
    boxes: Tensor
    """``(V * B, 4)`` float32, x0 y0 x1 y1 in pixels of the source image."""
    flips: Tensor
    """``(V * B,)`` bool."""
    source_size: Tensor
    """``(B, 2)`` int64, height and width."""
    index: Tensor
    """``(B,)`` int64, place in the image set."""
    keys: Tensor
    """``(B,)`` int64, a hash of (seed, epoch, index): the sample's own randomness."""
    skipped: tuple[Skipped, ...] = ()
    """Unreadable images that were replaced while this batch was made."""
    labels: Tensor | None = None
    """``(B,)`` int64, class of each image; None if the layout has none."""
    host_keys: Tensor | None = None
    """``keys`` where they were before :meth:`to`: on the CPU, for draws that need no device."""

    @property
    def cpu_keys(self) -> Tensor:
        """``keys`` on the CPU; without a wait for the device, if the batch came from there."""
        return self.keys.cpu() if self.keys.device.type == "cpu" or self.host_keys is None else self.host_keys

    @property
    def batch_size(self) -> int:
        """Images in the batch."""
        return self.index.shape[0]

    @property
    def num_views(self) -> tuple[int, ...]:
        """Views per image in each entry of ``crops``."""
        return tuple(crops.shape[0] // self.batch_size for crops in self.crops)

    @property
    def global_crops(self) -> Tensor:
        """The first entry of ``crops``."""
        return self.crops[0]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Views":
        """The same batch on a device."""
        return replace(
            self,
            crops=tuple(crops.to(device, non_blocking=non_blocking) for crops in self.crops),
            boxes=self.boxes.to(device, non_blocking=non_blocking),
            flips=self.flips.to(device, non_blocking=non_blocking),
            source_size=self.source_size.to(device, non_blocking=non_blocking),
            index=self.index.to(device, non_blocking=non_blocking),
            keys=self.keys.to(device, non_blocking=non_blocking),
            host_keys=self.keys if self.keys.device.type == "cpu" else self.host_keys,
            labels=None if self.labels is None else self.labels.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Views":
        """The same batch in page-locked memory, from which copies to a GPU overlap with computation."""
        return replace(
            self,
            crops=tuple(crops.pin_memory() for crops in self.crops),
            boxes=self.boxes.pin_memory(),
            flips=self.flips.pin_memory(),
            source_size=self.source_size.pin_memory(),
            index=self.index.pin_memory(),
            keys=self.keys.pin_memory(),
            labels=None if self.labels is None else self.labels.pin_memory(),
        )


@runtime_checkable
class ViewMaker(Protocol):
    """How an image, or a window of a signal, becomes a training sample; it is sent to workers, so it is picklable."""

    @property
    def num_views(self) -> int:
        """Views per image, of all sizes."""

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> SampleViews:
        """The views of one image, all randomness from ``rng``."""


def collate(samples: Sequence[SampleViews], skipped: Sequence[Skipped] = ()) -> Views:
    """A batch of samples, view-major; uint8 if all images are, else float32 in 0..1."""
    batch = len(samples)
    crops = []
    for place, first in enumerate(samples[0].crops):
        is_uint8 = all(sample.crops[place].dtype == np.uint8 for sample in samples)
        # (V_s * B, S, S, C) in memory, seen as (V_s * B, C, S, S): channels-last costs nothing this way
        stack = torch.empty(len(first) * batch, *first.shape[1:], dtype=torch.uint8 if is_uint8 else torch.float32)
        target = stack.numpy()
        for b, sample in enumerate(samples):
            views = sample.crops[place]
            if not is_uint8 and views.dtype == np.uint8:
                views = views.astype(np.float32) / np.float32(255)
            target[b::batch] = views
        crops.append(stack.permute(0, 3, 1, 2))
    boxes = np.stack([sample.boxes for sample in samples], axis=1)  # (V, B, 4)
    flips = np.stack([sample.flips for sample in samples], axis=1)
    labels = [sample.label for sample in samples if sample.label is not None]
    return Views(
        crops=tuple(crops),
        boxes=torch.from_numpy(boxes.reshape(-1, 4)),
        flips=torch.from_numpy(flips.reshape(-1)),
        source_size=torch.tensor([sample.source_size for sample in samples], dtype=torch.int64),
        index=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        keys=torch.tensor([sample.key for sample in samples], dtype=torch.int64),
        skipped=tuple(skipped),
        labels=torch.tensor(labels, dtype=torch.int64) if len(labels) == batch else None,
    )
