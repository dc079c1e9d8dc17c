"""``smalti samples``: write the embedded sample data to a folder."""

import warnings
from typing import Annotated, Literal

import typer
from pydantic import Field, PositiveInt

from smalti.cli.options import Debug, Out, Quiet, needed, take
from smalti.cli.setting_docs import Setting, describe
from smalti.config import Seed, parse_overrides, settings

NAME = "samples"
SCENES = ("num_train", "num_val", "num_objects_train", "num_objects_val", "size", "seed")
"""Settings of ``kind=scenes``."""
SLEEP = ("num_nights_train", "num_nights_val", "epochs", "num_channels")
MOTION = ("num_people_train", "num_people_val", "minutes")


@settings
class SamplesConfig:
    """Settings of ``smalti samples``."""

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
    kind: Literal["scenes", "sleep", "motion"] = "scenes"
    """What to write: scenes, synthetic nights of EEG with sleep stages (``sleep``), or synthetic recordings of an
    accelerometer with activities (``motion``)."""
    num_nights_train: PositiveInt = 24
    """``sleep``: nights for training, one per subject."""
    num_nights_val: PositiveInt = 8
    """``sleep``: nights for evaluation."""
    epochs: PositiveInt = 60
    """``sleep``: windows of 30 s in a night."""
    num_channels: Annotated[int, Field(ge=1, le=6)] = 1
    """``sleep``: EEG channels."""
    num_people_train: PositiveInt = 24
    """``motion``: recordings for training, one per person."""
    num_people_val: PositiveInt = 8
    """``motion``: recordings for evaluation."""
    minutes: Annotated[float, Field(ge=1, le=1440)] = 10
    """``motion``: length of a recording."""
    seed: Seed = 0
    """Of everything."""


def own_settings() -> list[Setting]:
    """For ``smalti settings samples``."""
    return list(describe(SamplesConfig))


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as num_train=100 size=64.", show_default=False),
    ] = None,
    out: Out = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write sample data: scenes with masks, EEG or motion.

    Scenes are composed on real photographs, with exact masks, instances, boxes and classes.

    Settings: `num_train` `num_val` `num_objects_train` `num_objects_val` `size` `seed`; `kind=sleep` writes nights of
    EEG with `num_nights_train` `num_nights_val` `epochs` `num_channels`; `kind=motion` recordings of an accelerometer
    with `num_people_train` `num_people_val` `minutes`. `smalti settings samples` explains them.
    """
    out = needed(out, "--out", "samples")
    given = take(words, SamplesConfig)
    named = set(parse_overrides(words or [])) - {"kind", "seed"}
    if idle := sorted(named - set({"scenes": SCENES, "sleep": SLEEP, "motion": MOTION}[given.kind])):
        warnings.warn(f"{', '.join(idle)}: no effect on kind={given.kind}", stacklevel=2)
    if given.kind == "sleep":
        from smalti.data.signals.sleep_samples import write_nights

        written = write_nights(
            out,
            num_train=given.num_nights_train,
            num_test=given.num_nights_val,
            epochs=given.epochs,
            num_channels=given.num_channels,
            seed=given.seed,
        )
    elif given.kind == "motion":
        from smalti.data.signals.motion_samples import write_motion

        written = write_motion(
            out,
            num_train=given.num_people_train,
            num_test=given.num_people_val,
            minutes=given.minutes,
            seed=given.seed,
        )
    else:
        from smalti.data.samples import write_samples

        scenes = {name: getattr(given, name) for name in SCENES}
        written = write_samples(out, **scenes)
    print(f"written: {written}")
