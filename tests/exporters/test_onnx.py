"""ONNX files give torch's numbers for any batch and any patches; what can't be written leaves nothing behind."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

import jaxtyping
import pytest
import timm
import torch
from torch.testing import assert_close

from command import smalti
from smalti.errors import ConfigError, MissingExtraError, ShapeError, WeightsError
from smalti.exporters import onnx as export
from smalti.exporters.card import CARD, Input
from smalti.exporters.onnx import CONFIG, KEEP, RANKED, WHOLE, OnnxExport, export_onnx
from smalti.exporters.timm import export_timm
from smalti.functional.orders import random_orders
from smalti.methods.ranker import DistilledRanker, RankerConfig
from smalti.models.build import build_encoder, clone_encoder
from smalti.models.encoder import ClassHead, Encoder

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx")
pytest.importorskip("onnxscript", reason="the extra onnx")


@pytest.fixture(autouse=True, scope="module")
def unchecked() -> Iterator[None]:
    """torch's exporter can't trace the checks of shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def tiny(**arguments) -> Encoder:
    return build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, seed=0, depth=1, embed_dim=24, num_heads=2, **arguments
    )


def run(path: Path, images: torch.Tensor, ids: torch.Tensor | None = None) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()} | ({} if ids is None else {"ids_keep": ids.numpy()})
    return [torch.from_numpy(found) for found in session.run(None, feed)]


def small_ranker(seed: int = 1) -> DistilledRanker:
    torch.manual_seed(seed)
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, seed=seed, depth=1, embed_dim=24, num_heads=2
    )
    encoder.set_normalization((0.2,), (0.7,))  # another than that of the exported encoder
    method = DistilledRanker(encoder, RankerConfig(order="halton"))
    torch.nn.init.normal_(method.head.weight)
    return method.eval()


class Case(NamedTuple):
    """An encoder in training mode and its files."""

    encoder: Encoder
    made: OnnxExport
    ranker: DistilledRanker | None = None


# An export takes many seconds, so that the tests share a few.


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """With a head; any number of patches."""
    encoder = tiny().train()
    encoder.class_head = ClassHead(torch.randn(3, 24), torch.randn(3), ("a", "b", "c"), "halton")
    return Case(encoder, export_onnx(encoder, tmp_path_factory.mktemp("classes") / "out"))


@pytest.fixture(scope="module")
def registers(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """With registers and a head, without class token, of one channel and for larger images; any number of patches."""
    encoder = tiny(reg_tokens=2, class_token=False, global_pool="avg", in_chans=1).train()
    encoder.class_head = ClassHead(torch.randn(3, 24), torch.randn(3), ("a", "b", "c"), "halton")
    return Case(encoder, export_onnx(encoder, tmp_path_factory.mktemp("registers") / "out", image_size=48))


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Of five patches, with a ranker, for both forms of images."""
    cases = {}
    for input in get_args(Input):
        encoder, ranker = tiny().eval(), small_ranker()
        encoder.set_normalization((0.3, 0.4, 0.5), (0.2, 0.25, 0.2))
        out = tmp_path_factory.mktemp("ranked") / input
        cases[input] = Case(encoder, export_onnx(encoder, out, keep=5, input=input, ranker=ranker), ranker)
    return cases


@pytest.mark.parametrize(("name", "size"), [("classes", 32), ("registers", 48)])
@torch.no_grad()
def test_files_give_torch_s_numbers_for_any_batch_and_any_patches(name, size, request):
    encoder, made, _ = request.getfixturevalue(name)
    side = size // 8
    assert made.outputs == ("tokens", "vector", "logits") and made.difference < 1e-4
    assert sorted(path.name for path in made.path.iterdir()) == [CARD, CONFIG, WHOLE, KEEP]
    assert list(made.path.parent.iterdir()) == [made.path] and encoder.training
    encoder = clone_encoder(encoder).eval()
    for batch, count in ((1, side**2), (5, 3)):
        images = torch.rand(batch, encoder.in_chans, size, size)
        order = random_orders(torch.arange(batch), side**2)
        pixels = encoder.normalize(images)
        tokens, vector, logits = run(made.path / WHOLE, pixels)
        assert_close(tokens, encoder.encode(pixels).patches, atol=1e-4, rtol=0)
        assert_close(vector, encoder.image_features(pixels), atol=1e-4, rtol=0)
        assert_close(logits, vector @ encoder.class_head.weight.T + encoder.class_head.bias, atol=1e-4, rtol=0)
        few = run(made.path / KEEP, pixels, order[:, :count])
        assert few[0].shape == (batch, count, 24)
        assert_close(few[1], encoder.image_features(pixels, order[:, :count]), atol=1e-4, rtol=0)
    described = json.loads((made.path / CONFIG).read_text())
    assert (described["classes"], described["order"], described["grid"]) == (["a", "b", "c"], "halton", [side, side])


def test_free_axes_have_names(classes):
    for name, kept in ((WHOLE, 16), (KEEP, "kept")):
        session = onnxruntime.InferenceSession(classes.made.path / name, providers=["CPUExecutionProvider"])
        shapes = {axes.name: axes.shape for axes in (*session.get_inputs(), *session.get_outputs())}
        assert shapes.pop("ids_keep", ["batch", kept]) == ["batch", kept]
        assert shapes == {
            "images": ["batch", 3, 32, 32],
            "tokens": ["batch", kept, 24],
            "vector": ["batch", 24],
            "logits": ["batch", 3],
        }


@torch.no_grad()
def test_timm_and_onnx_want_the_same_input_unless_told_otherwise(ranked, tmp_path):
    encoder = ranked["normalized"].encoder
    images = torch.rand(2, 3, 32, 32)
    pixels = encoder.normalize(images)
    model = timm.create_model(f"local-dir:{export_timm(encoder, tmp_path / 'timm').path}", pretrained=True).eval()
    expected = model.forward_features(pixels)[:, 1:]
    same, unit = (ranked[name].made for name in ("normalized", "unit"))
    assert_close(run(same.path / WHOLE, pixels)[0], expected, atol=1e-4, rtol=0)
    assert_close(run(unit.path / WHOLE, images)[0], expected, atol=1e-4, rtol=0)
    for made, word in ((same, "normalised: (pixels in 0..1 - mean) / std"), (unit, "in 0..1; the model itself")):
        for name in (WHOLE, KEEP):
            session = onnxruntime.InferenceSession(made.path / name, providers=["CPUExecutionProvider"])
            told = session.get_modelmeta().custom_metadata_map
            assert (told["input"], told["mean"], told["std"]) == (made.path.name, "(0.3, 0.4, 0.5)", "(0.2, 0.25, 0.2)")
            assert word in told["range"]
        assert word in (made.path / CARD).read_text() and word in (made.path / CONFIG).read_text()
    assert (
        "normalised: (pixels in 0..1 - mean) / std, with mean (0.3, 0.4, 0.5)" in (tmp_path / "timm" / CARD).read_text()
    )


def test_a_fixed_number_of_patches(ranked):
    made = ranked["normalized"].made
    assert made.outputs == ("tokens", "vector")
    images, order = torch.rand(2, 3, 32, 32), random_orders(torch.arange(2), 16)
    assert run(made.path / KEEP, images, order[:, :5])[0].shape == (2, 5, 24)
    with pytest.raises(Exception, match="invalid dimensions for input: ids_keep"):
        run(made.path / KEEP, images, order[:, :6])


def test_different_outputs_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_write", lambda *_: None)
    monkeypatch.setattr(export, "compare", lambda *_: float("nan"))
    with pytest.raises(WeightsError, match="ONNX Runtime's outputs differ from torch's by nan"):
        export_onnx(tiny(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_write", lambda *_: pytest.fail("too late"))
    for keep in (0, 17):
        with pytest.raises(ConfigError, match=rf"keep={keep}: an image of 32x32 pixels has 16 patches; 1\.\.16"):
            export_onnx(tiny(), tmp_path / "out", keep=keep)
    with pytest.raises(ShapeError, match="does not divide"):
        export_onnx(tiny(), tmp_path / "out", image_size=30)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").touch()
    with pytest.raises(ConfigError, match=r"not empty \(it holds note.txt\)"):
        export_onnx(tiny(), tmp_path / "full")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"export to ONNX needs onnxscript: pip install \"smalti\[onnx\]\""):
        export_onnx(tiny(), tmp_path / "out")


def test_the_command_names_mistakes_in_one_line(tmp_path):
    for words, line in (
        (["to=jax"], "to='jax': input should be 'timm', 'hf' or 'onnx'"),
        (["input=unit"], "input=unit only applies to to=onnx; to=timm takes normalized images"),
        (["to=onnx", "input=raw"], "input='raw': input should be 'normalized' or 'unit'"),
        (["keep=4"], "image_size, keep and ranker only apply to to=onnx"),
        (["to=onnx", "keep=400"], "has 196 patches; 1..196"),
        (["too=onnx"], "did you mean 'to'?"),
    ):
        done = smalti("export", "random:vit_tiny_patch16_224", "--out", tmp_path / "o", *words, code=2)
        assert line in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("input", ["normalized", "unit"])
@torch.no_grad()
def test_a_ranker_chooses_the_patches_inside_the_file(input, ranked):
    encoder, made, ranker = ranked[input]
    assert made.difference < 1e-4 and (made.path / RANKED).is_file()
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = encoder.normalize(pixels) if input == "normalized" else pixels
    tokens, vector, ids = run(made.path / RANKED, images)
    scores = ranker.scores(ranker.encoder.normalize(pixels))
    assert (ids == scores.topk(5, dim=1).indices).all()
    expected = encoder.encode(encoder.normalize(pixels), ids_keep=ids)
    assert_close(tokens, expected.patches, atol=1e-4, rtol=0)
    assert_close(vector, encoder.pooled(expected), atol=1e-4, rtol=0)


def test_a_ranker_of_other_patches_or_without_keep_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="ranker needs keep=K"):
        export_onnx(tiny(), tmp_path / "out", ranker=small_ranker())
    with pytest.raises(ConfigError, match=r"scores 4x4 patches of 32x32 px .* takes 8x8 of 64x64 px"):
        export_onnx(tiny(), tmp_path / "out", image_size=64, keep=3, ranker=small_ranker())
    assert not list(tmp_path.iterdir())
