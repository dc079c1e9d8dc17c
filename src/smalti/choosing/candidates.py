"""What is compared: an encoder, the blocks that are read, and the size of the images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smalti.errors import ConfigError
from smalti.models.encoder import Encoder

Reading = Literal["last", "3/4", "1/2", "last4"]
"""Which blocks are read: the last one, the one at 3/4 or half of the depth, or the last four, concatenated."""
READINGS: tuple[Reading, ...] = ("last", "3/4", "1/2", "last4")
LARGEST_DEFAULT = 448
"""Pixels: default image sizes are the encoder's own and twice that, up to this."""


@dataclass(frozen=True)
class Candidate:
    """A frozen encoder as it would be used."""

    encoder: str
    """Name of the encoder, as in :func:`smalti.load`."""
    layers: tuple[int, ...]
    """Numbers of the blocks whose tokens are concatenated, 1 the first."""
    depth: int
    """Number of blocks of the encoder."""
    image_size: int
    """Side of the images in pixels."""

    @property
    def reading(self) -> str:
        """The blocks in words."""
        if self.layers == (self.depth,):
            return f"last layer ({self.depth})"
        if len(self.layers) == 1:
            return f"layer {self.layers[0]} of {self.depth}"
        return f"layers {self.layers[0]} to {self.layers[-1]}"

    @property
    def name(self) -> str:
        """Encoder, layers and size, for tables and sentences."""
        return f"{short_name(self.encoder)}, {self.reading}, {self.image_size} px"


def short_name(spec: str) -> str:
    """An encoder's name without the folders of its file."""
    head, at, file = spec.partition("@")
    if at:
        return f"{head}@{Path(file).name}"
    return str(Path(*Path(spec).parts[-2:])) if "/" in spec and ":" not in spec else spec


def layers_of(reading: Reading, depth: int) -> tuple[int, ...]:
    """Numbers of the blocks that a reading means, 1 the first."""
    if reading == "last4":
        return tuple(range(max(1, depth - 3), depth + 1))
    part = {"last": 1.0, "3/4": 0.75, "1/2": 0.5}[reading]
    return (max(1, round(part * depth)),)


def sizes_of(encoder: Encoder, wanted: Sequence[int]) -> tuple[int, ...]:
    """Image sizes to try: those that are wanted, else the encoder's own, at most 448, and twice that if it is at most
    448.

    Raises:
        ShapeError: if the patch size does not divide a wanted size.
        ConfigError: if the encoder's own size isn't square and none is given.
    """
    if wanted:
        for size in wanted:
            encoder.check_size(size, size)
        return tuple(wanted)
    height, width = encoder.img_size
    if height != width:
        raise ConfigError(f"{encoder.name} takes {height}x{width} images; name square sizes: image_sizes=[224]")
    step = max(encoder.patch_size)
    own = min(height, max(step, LARGEST_DEFAULT // step * step))
    return tuple(size for size in (own, 2 * own) if size == own or size <= LARGEST_DEFAULT)


def candidates_of(
    spec: str, encoder: Encoder, readings: Sequence[Reading], sizes: Sequence[int], own_size_only: bool = False
) -> Iterator[Candidate]:
    """All candidates of an encoder; readings that name the same blocks are one."""
    for size in sizes_of(encoder, sizes)[: 1 if own_size_only else None]:
        for layers in dict.fromkeys(layers_of(reading, encoder.depth) for reading in readings):
            yield Candidate(spec, layers, encoder.depth, size)
