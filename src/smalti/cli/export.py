"""``smalti export``: hand the encoder on."""

from typing import Annotated, Any

import typer
from pydantic import PositiveInt

from smalti.cli.options import Debug, EncoderSpec, Out, Partial, Settings, needed, take
from smalti.config import settings
from smalti.errors import ConfigError

NAME = "export"
FORMATS = ("timm", "onnx")


@settings
class ExportConfig:
    """What is handed on."""

    weights: str | None = None
    """Network of a run or a file: student or teacher."""
    pool: str | None = None
    """The vector that stands for an image, other than the encoder's own: auto, cls, avg or prr."""
    load: dict[str, Any] | None = None
    """Group: how weights of others are fitted, such as load.img_size."""
    image_size: PositiveInt | None = None
    """onnx: pixels; None takes the encoder's own."""
    keep: PositiveInt | None = None
    """onnx: number of patches that keep.onnx looks at; None leaves it free."""


def command(
    encoder: EncoderSpec,
    words: Settings = None,
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="timm: safetensors and config.json; onnx: two models.")
    ] = "timm",
    out: Out = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="student or teacher, of a run that has both.")
    ] = None,
    partial: Partial = False,
    debug: Debug = False,
) -> None:
    """Write an encoder as a plain timm model, or as ONNX; it is loaded again and compared before it gets its name.

    With --to onnx: encoder.onnx takes whole images, keep.onnx also which patches to look at (ids_keep, the first of an
    order); any batch, classes too where a run has learned some.

    Settings: weights (as --weights), pool (the vector of an image, see docs/pooling.md), load.* (how weights of others
    are fitted, see docs/weights.md); of onnx: image_size, keep (a fixed number of patches).
    """
    out = needed(out, "--out", "exported")
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: this version exports to {' and '.join(FORMATS)}")

    given = take(words, ExportConfig)
    if to != "onnx" and (given.image_size or given.keep):
        raise ConfigError(f"image_size and keep are for --to onnx; --to {to} keeps the model as it is")

    from smalti.cli.options import load_encoder
    from smalti.export.onnx import KEEP, WHOLE, check_onnx, export_onnx
    from smalti.export.timm import check_target, export_timm

    if to == "onnx":
        check_onnx()
        check_target(out)
    model = load_encoder(
        encoder, weights=weights or given.weights, pool=given.pool, partial=partial, load=given.load, debug=debug
    )
    if to == "onnx":
        made = export_onnx(model, out, image_size=given.image_size, keep=given.keep)
        print(
            f"written: {made.path}  (largest difference in ONNX Runtime: {made.difference:.1e} of the largest number)"
        )
        print(f'use it:  onnxruntime.InferenceSession("{made.path / WHOLE}"): images -> {", ".join(made.outputs)}')
        print(f'         onnxruntime.InferenceSession("{made.path / KEEP}"): images, ids_keep -> the same')
        return
    written = export_timm(model, out)
    print(f"written: {written.path}  (largest difference after reloading through timm: {written.difference:.1e})")
    print(f'use it:  timm.create_model("local-dir:{written.path}", pretrained=True)')
