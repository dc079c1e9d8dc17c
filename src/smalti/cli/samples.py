"""``smalti samples``: the embedded scenes as ordinary folders."""

from typing import Annotated

from pydantic import Field, PositiveInt

from smalti.cli.options import Debug, Out, Quiet, Settings, needed, take
from smalti.config import settings, to_tree

NAME = "samples"


@settings
class SamplesConfig:
    """How many scenes, how large, which."""

    num_train: PositiveInt = 2000
    """Scenes for training."""
    num_val: PositiveInt = 400
    """Scenes for evaluation."""
    num_objects_train: PositiveInt = 100
    """Images of one object for each class, for training."""
    num_objects_val: PositiveInt = 40
    """The same for evaluation."""
    size: Annotated[int, Field(ge=16, le=4096)] = 96
    """Side of the images in pixels."""
    seed: int = 0
    """Of everything."""


def command(words: Settings = None, out: Out = None, quiet: Quiet = False, debug: Debug = False) -> None:
    """Write scenes on real photographs with exact masks, instances, boxes and classes.

    Settings: num_train, num_val, num_objects_train, num_objects_val, size (pixels), seed.
    """
    out = needed(out, "--out", "samples")
    given = take(words, SamplesConfig)

    from smalti.data.samples import write_samples

    print(f"written: {write_samples(out, **to_tree(given))}")
