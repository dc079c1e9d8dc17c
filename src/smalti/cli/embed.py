"""``smalti embed``: write the features of a folder of images to a file."""

import sys
from typing import Annotated, Any, Literal

import typer

from smalti.cli.options import (
    Data,
    Debug,
    EncoderSpec,
    Out,
    Partial,
    Quiet,
    needed,
    pixels_of_run,
    settings_of_run,
)
from smalti.cli.setting_docs import Setting, describe
from smalti.config import BatchSize, ImageSize, build, parse_overrides, settings
from smalti.data.images.pixels import PixelConfig

NAME = "embed"


@settings
class EmbedConfig(PixelConfig):
    """How images are encoded."""

    weights: str | None = None
    """Network of a run: student or teacher."""
    pool: str | None = None
    """Pooling: cls, avg or auto; None: the encoder's own."""
    batch_size: BatchSize = 64
    """Images per batch."""
    image_size: ImageSize | None = None
    """Side of the images in pixels; None: the encoder's own."""
    dtype: Literal["float32", "float16"] = "float32"
    """Data type of the features in the file."""
    load: dict[str, Any] | None = None
    """Group: how imported weights are adapted, such as load.pos_antialias."""


def own_settings() -> list[Setting]:
    """For ``smalti settings embed``."""
    return list(describe(EmbedConfig))


def command(
    encoder: EncoderSpec,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as pool=avg dtype=float16.", show_default=False),
    ] = None,
    data: Data = None,
    level: Annotated[str, typer.Option("--level", metavar="LEVEL", help="`image` or `patch`.")] = "image",
    out: Out = None,
    partial: Partial = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write features of images to a .parquet or .npz file.

    Settings: `weights` `pool` `batch_size` `image_size` `dtype` `scale` `max_pixels` `load.*`. `smalti settings embed`
    explains them.
    """
    data, out = needed(data, "--data", "DIR"), needed(out, "--out", "features.parquet")
    given = build(EmbedConfig, {**pixels_of_run(settings_of_run(encoder)), **parse_overrides(words or [])})

    from smalti.cli.options import best_device, load_encoder
    from smalti.data.images.folders import open_images
    from smalti.exporters.embeddings import embed

    images = open_images(data).with_pixels(given.pixels)
    if not quiet:
        print(f"data: {images.account()}", file=sys.stderr)
    model = load_encoder(
        encoder, weights=given.weights, pool=given.pool, partial=partial, load=given.load, debug=debug
    ).to(best_device())
    written = embed(
        model,
        images,
        out,
        level=level,
        pool=model.pool,
        image_size=given.image_size,
        batch_size=given.batch_size,
        dtype=given.dtype,
    )
    print(f"written: {written}")
