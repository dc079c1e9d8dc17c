"""``smalti export``: hand the encoder on."""

from typing import Annotated, Any, Literal, get_args

import typer
from pydantic import PositiveInt

from smalti.cli.options import Debug, EncoderSpec, Out, Partial, Settings, needed, take
from smalti.config import ImageSize, settings
from smalti.errors import ConfigError

NAME = "export"
FORMATS = ("timm", "onnx")
Input = Literal["normalized", "unit"]


@settings
class ExportConfig:
    """What is handed on."""

    weights: str | None = None
    """Network of a run or a file: student or teacher."""
    pool: str | None = None
    """The vector that stands for an image, other than the encoder's own: auto, cls, avg or prr."""
    load: dict[str, Any] | None = None
    """Group: how weights of others are fitted, such as load.img_size."""
    image_size: ImageSize | None = None
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
    input: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="RANGE",
            help="onnx: normalized (as the timm model, the default), or unit: in 0..1, normalised inside.",
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="student or teacher, of a run that has both.")
    ] = None,
    partial: Partial = False,
    debug: Debug = False,
) -> None:
    """Write an encoder as a plain timm model, or as ONNX; it is loaded again and compared before it gets its name.

    Both want normalised images, unless --input unit says otherwise for onnx. The last line printed, a README.md beside
    the files and the files themselves name range, mean and std.

    With --to onnx: encoder.onnx takes whole images, keep.onnx also which patches to look at (ids_keep, the first of an
    order); any batch, classes too where a run has learned some.

    Settings: weights (as --weights), pool (the vector of an image, see docs/pooling.md), load.* (how weights of others
    are fitted, see docs/weights.md); of onnx: image_size, keep (a fixed number of patches).
    """
    out = needed(out, "--out", "exported")
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: this version exports to {' and '.join(FORMATS)}")

    if input not in (None, *get_args(Input)):
        raise ConfigError(f"--input {input}: choose {' or '.join(get_args(Input))}")
    if to != "onnx" and input == "unit":
        raise ConfigError(f"--input unit is for --to onnx; --to {to} takes normalized images, as timm's models do")
    wanted: Input = "unit" if input == "unit" else "normalized"
    given = take(words, ExportConfig)
    if to != "onnx" and (given.image_size or given.keep):
        raise ConfigError(f"image_size and keep are for --to onnx; --to {to} keeps the model as it is")

    from smalti.cli.options import load_encoder
    from smalti.exporters.card import input_words
    from smalti.exporters.onnx import KEEP, WHOLE, check_onnx, export_onnx
    from smalti.exporters.timm import check_target, export_timm

    if to == "onnx":
        check_onnx()
        check_target(out)
    model = load_encoder(
        encoder, weights=weights or given.weights, pool=given.pool, partial=partial, load=given.load, debug=debug
    )
    if to == "onnx":
        made = export_onnx(model, out, image_size=given.image_size, keep=given.keep, input=wanted)
        print(
            f"written: {made.path}  (largest difference in ONNX Runtime: {made.difference:.1e} of the largest number)"
        )
        print(f'use it:  onnxruntime.InferenceSession("{made.path / WHOLE}"): images -> {", ".join(made.outputs)}')
        print(f'         onnxruntime.InferenceSession("{made.path / KEEP}"): images, ids_keep -> the same')
        print(f"images:  {input_words(model, wanted)}")
        return
    written = export_timm(model, out)
    print(f"written: {written.path}  (largest difference after reloading through timm: {written.difference:.1e})")
    print(f'use it:  timm.create_model("local-dir:{written.path}", pretrained=True)')
    print(f"images:  {input_words(model, wanted)}")
