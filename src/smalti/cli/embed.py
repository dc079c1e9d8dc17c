"""``smalti embed``: features of a folder of images as a table."""

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
    Settings,
    needed,
    pixels_of_run,
    settings_of_run,
)
from smalti.config import BatchSize, ImageSize, build, parse_overrides, settings
from smalti.data.images.pixels import PixelConfig

NAME = "embed"


@settings
class EmbedConfig(PixelConfig):
    """How images are encoded."""

    weights: str | None = None
    """Network of a run: student or teacher."""
    pool: str | None = None
    """cls, avg or auto; None takes the encoder's own."""
    batch_size: BatchSize = 64
    """Images at a time."""
    image_size: ImageSize | None = None
    """Pixels; None takes the encoder's own."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the numbers in the file."""
    load: dict[str, Any] | None = None
    """Group: how weights of others are fitted, such as load.pos_antialias."""


def command(
    encoder: EncoderSpec,
    words: Settings = None,
    data: Data = None,
    level: Annotated[str, typer.Option("--level", metavar="LEVEL", help="image or patch.")] = "image",
    out: Out = None,
    partial: Partial = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write features of all images, as .parquet or .npz.

    Settings: weights, pool, batch_size, image_size, dtype (float32 or float16), scale, max_pixels, load.* (see
    docs/weights.md).
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
