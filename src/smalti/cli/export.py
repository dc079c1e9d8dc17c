"""``smalti export``: hand the encoder on."""

from typing import Annotated

import typer

from smalti.cli.options import Debug, EncoderSpec, Out, Partial, needed
from smalti.errors import ConfigError

NAME = "export"


def command(
    encoder: EncoderSpec,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="timm: safetensors and config.json.")] = "timm",
    out: Out = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="student or teacher, of a run that has both.")
    ] = None,
    partial: Partial = False,
    debug: Debug = False,
) -> None:
    """Write an encoder as a plain timm model; it is loaded again and compared before it gets its name."""
    out = needed(out, "--out", "exported")
    if to != "timm":
        raise ConfigError(f"--to {to}: this version exports to timm")

    from smalti.export.timm import export_timm
    from smalti.models.loading import load

    written = export_timm(load(encoder, network=weights, partial=partial), out)
    print(f"written: {written.path}  (largest difference after reloading through timm: {written.difference:.1e})")
    print(f'use it:  timm.create_model("local-dir:{written.path}", pretrained=True)')
