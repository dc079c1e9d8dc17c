"""WAV and FLAC files, through soundfile (extra ``audio``)."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from smalti.errors import DataError, MissingExtraError
from smalti.reading import reading

ENDINGS = (".wav", ".flac")
_BLOCK_FRAMES = 1 << 20
"""Of the file in memory at a time, besides the result."""


class SoundHeader(NamedTuple):
    """What a file says about itself."""

    num_channels: int
    rate_hz: float
    num_frames: int


def open_sound(path: Path) -> SoundHeader:
    """The header of a file.

    Raises:
        DataError: if it can't be read.
        MissingExtraError: without soundfile.
    """
    soundfile = _soundfile(path)
    with reading(path, "sound"):
        found = soundfile.info(str(path))
        return SoundHeader(found.channels, float(found.samplerate), found.frames)


def read_sound(path: Path, places: Sequence[int]) -> tuple[Float[np.ndarray, " S"], ...]:
    """All samples of some channels, -1 to 1; the file is decoded block by block.

    Args:
        path: the file.
        places: numbers of the channels, from 0.

    Raises:
        DataError: if it can't be read, or ends before its header says.
        MissingExtraError: without soundfile.
    """
    soundfile = _soundfile(path)
    with reading(path, "sound"), soundfile.SoundFile(str(path)) as file:
        values = tuple(np.empty(file.frames) for _ in places)
        done = 0
        for block in file.blocks(_BLOCK_FRAMES, dtype="float64", always_2d=True):
            for place, into in zip(places, values, strict=True):
                into[done : done + len(block)] = block[:, place]
            done += len(block)
        if done < file.frames:
            raise DataError(f"{path}: holds {done:,} samples, its header says {file.frames:,}")
    return values


def _soundfile(path: Path) -> ModuleType:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: without the library that it wraps
        raise MissingExtraError(f'{path}: reading sound needs soundfile: pip install "smalti[audio]"') from None
    return soundfile
