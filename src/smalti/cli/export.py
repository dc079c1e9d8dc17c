"""``smalti export``: write an encoder as a timm model, as a model of transformers, or as ONNX."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import PositiveInt

from smalti.cli.options import Debug, EncoderSpec, Out, Partial, needed, take
from smalti.cli.setting_docs import Setting, describe
from smalti.config import ImageSize, PathText, settings
from smalti.errors import ConfigError

if TYPE_CHECKING:
    from smalti.exporters.card import Provenance
    from smalti.models.encoder import Encoder

NAME = "export"
Input = Literal["normalized", "unit"]


@settings
class ExportConfig:
    """Settings of ``smalti export``."""

    to: Literal["timm", "hf", "onnx"] = "timm"
    """Format: ``timm`` and ``hf`` (Hugging Face transformers) write safetensors and config.json, ``onnx`` two models,
    or three with ``ranker``."""
    weights: str | None = None
    """Which network of a run or a file: student or teacher; None: the one that the method exports."""
    pool: str | None = None
    """Pooling of the image vector: auto, cls, avg or prr; None: the encoder's own."""
    input: Input = "normalized"
    """onnx: what the models take: ``normalized`` images, as the timm model, or ``unit``: pixels in 0..1, normalised
    inside."""
    image_size: ImageSize | None = None
    """onnx: side of the images in pixels; None: the encoder's own."""
    keep: PositiveInt | None = None
    """onnx: fixed number of patches that ``keep.onnx`` takes; None: any number."""
    ranker: PathText | None = None
    """onnx: a run of ``ranker``; ``ranked.onnx`` then takes images alone and encodes the ``keep`` patches that rank
    first."""
    load: dict[str, Any] | None = None
    """Group: how imported weights are adapted, such as ``load.img_size=384``."""


def own_settings() -> list[Setting]:
    """For ``smalti settings export``."""
    return list(describe(ExportConfig))


def command(
    encoder: EncoderSpec,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings, such as to=onnx input=unit weights=teacher.", show_default=False
        ),
    ] = None,
    out: Out = None,
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="OWNER/NAME", help="Also upload the folder to the Hugging Face hub."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --push: only list what would be uploaded; needs no network.")
    ] = False,
    partial: Partial = False,
    debug: Debug = False,
) -> None:
    """Write an encoder for timm, transformers or ONNX.

    The files are loaded again and compared with the encoder before they are renamed into place. All formats take
    normalised images, unless `input=unit` says otherwise for ONNX; the printed summary and the README.md beside the
    files name range, mean and std.

    With `to=onnx`, `encoder.onnx` takes whole images; `keep.onnx` also takes the patches to encode (`ids_keep`, the
    first patches of an order). The batch size is free. Both also output class scores if the run trained a classifier.

    With `ranker=RUN keep=K`, `ranked.onnx` takes images alone, ranks their patches and encodes the first K.

    `--push OWNER/NAME` uploads the folder after it was checked; a new repository is private. `--push OWNER/NAME
    --dry-run` lists files, sizes and the front matter of the model card instead.

    Settings: `to` `weights` `pool` `load.*`, and of ONNX `input` `image_size` `keep` `ranker`. `smalti settings export`
    explains them.
    """
    out = needed(out, "--out", "exported")
    given = take(words, ExportConfig)
    if given.to != "onnx":
        if given.input == "unit":
            raise ConfigError(f"input=unit only applies to to=onnx; to={given.to} takes normalized images")
        if given.image_size or given.keep or given.ranker:
            raise ConfigError("image_size, keep and ranker only apply to to=onnx; leave them out")

    from smalti.cli.options import load_encoder
    from smalti.exporters.hf import check_transformers
    from smalti.exporters.hub import check_repository
    from smalti.exporters.onnx import check_onnx
    from smalti.exporters.timm import check_target
    from smalti.runs.provenance import history

    if dry_run and push is None:
        raise ConfigError("--dry-run lists what --push OWNER/NAME would upload; give both")
    if push is not None:
        check_repository(push)
    if given.to == "onnx":
        check_onnx()
        check_target(out)
    if given.to == "hf":
        check_transformers()
        check_target(out)
    model = load_encoder(encoder, weights=given.weights, pool=given.pool, partial=partial, load=given.load, debug=debug)
    _write(model, out, given, history(model, encoder, push))
    if push is not None:
        _push(out, push, dry_run)


def _write(model: "Encoder", out: Path, given: ExportConfig, provenance: "Provenance") -> None:
    """Write the folder and print how to use it."""
    from smalti.exporters.card import input_words
    from smalti.exporters.hf import export_hf
    from smalti.exporters.onnx import KEEP, RANKED, WHOLE, export_onnx
    from smalti.exporters.timm import export_timm
    from smalti.runs.build import load_ranker

    if given.to == "onnx":
        ranker = None if given.ranker is None else load_ranker(given.ranker)
        made = export_onnx(
            model,
            out,
            image_size=given.image_size,
            keep=given.keep,
            input=given.input,
            ranker=ranker,
            provenance=provenance,
        )
        print(
            f"written: {made.path}  (largest difference in ONNX Runtime: {made.difference:.1e} of the largest number)"
        )
        print(f'use it:  onnxruntime.InferenceSession("{made.path / WHOLE}"): images -> {", ".join(made.outputs)}')
        print(f'         onnxruntime.InferenceSession("{made.path / KEEP}"): images, ids_keep -> the same')
        if ranker is not None:
            print(f'         onnxruntime.InferenceSession("{made.path / RANKED}"): images -> the same, ids_keep')
        print(f"images:  {input_words(model, given.input)}")
        return
    if given.to == "hf":
        saved = export_hf(model, out, provenance)
        print(f"written: {saved.path}  (largest difference after reloading by transformers: {saved.difference:.1e})")
        print(f'use it:  transformers.AutoModel.from_pretrained("{saved.path}")  # {saved.kind}')
    else:
        written = export_timm(model, out, provenance)
        print(f"written: {written.path}  (largest difference after reloading through timm: {written.difference:.1e})")
        print(f'use it:  timm.create_model("local-dir:{written.path}", pretrained=True)')
    print(f"images:  {input_words(model, 'normalized')}")


def _push(folder: Path, repository: str, dry_run: bool) -> None:
    """Upload a folder, or list what would be uploaded."""
    from smalti.exporters.hub import plan_upload, push

    if not dry_run:
        print(f"pushed:  {push(folder, repository)}")
        return
    plan = plan_upload(folder, repository)
    print(f"would upload to {repository}, in a new private repository if there is none:")
    for name, size in plan.files:
        print(f"  {name}  {size:,} bytes")
    print("model card:")
    if "license" not in plan.front_matter:
        print("  license: not stated; the hub will show none")
    for key, value in plan.front_matter.items():
        print(f"  {key}: {', '.join(value) if isinstance(value, list) else value}")
