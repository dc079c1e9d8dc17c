"""``smalti export``: hand the encoder on."""

from typing import Annotated, Any

import typer

from smalti.cli.options import Debug, EncoderSpec, Out, Partial, Settings, needed, take
from smalti.config import settings
from smalti.errors import ConfigError

NAME = "export"


@settings
class ExportConfig:
    """What is handed on."""

    weights: str | None = None
    """Network of a run or a file: student or teacher."""
    pool: str | None = None
    """The vector that stands for an image, other than the encoder's own: auto, cls, avg or prr."""
    load: dict[str, Any] | None = None
    """Group: how weights of others are fitted, such as load.img_size."""


def command(
    encoder: EncoderSpec,
    words: Settings = None,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="timm: safetensors and config.json.")] = "timm",
    out: Out = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="student or teacher, of a run that has both.")
    ] = None,
    partial: Partial = False,
    debug: Debug = False,
) -> None:
    """Write an encoder as a plain timm model; it is loaded again and compared before it gets its name.

    Settings: weights (as --weights), pool (the vector of an image, see docs/pooling.md), load.* (how weights of others
    are fitted, see docs/weights.md).
    """
    out = needed(out, "--out", "exported")
    if to != "timm":
        raise ConfigError(f"--to {to}: this version exports to timm")

    given = take(words, ExportConfig)

    from smalti.cli.options import load_encoder
    from smalti.export.timm import export_timm

    model = load_encoder(
        encoder, weights=weights or given.weights, pool=given.pool, partial=partial, load=given.load, debug=debug
    )
    written = export_timm(model, out)
    print(f"written: {written.path}  (largest difference after reloading through timm: {written.difference:.1e})")
    print(f'use it:  timm.create_model("local-dir:{written.path}", pretrained=True)')
