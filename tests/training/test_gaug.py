"""GAug as a setting of a run: what it trains, keeps and exports, and who refuses it."""

import inspect
from pathlib import Path

import pytest
import torch
from test_methods import batch, build
from torch.testing import assert_close

import smalti
from smalti.errors import ConfigError
from smalti.exporters.onnx import export_onnx
from smalti.exporters.timm import export_timm
from smalti.layers.gaussian_bias import Places
from smalti.layers.last_block import Chosen
from smalti.methods.base import get_method, method_names
from smalti.models.block_attention import block_attention
from smalti.models.build import build_encoder, clone_encoder, encoder_from_config
from smalti.models.encoder import Encoder
from smalti.models.loading import as_loaded
from training.test_loop import train, weights

TAKES = [name for name in method_names() if get_method(name).has_encoder and not get_method(name).hides_positions]
REFUSES = [name for name in method_names() if get_method(name).has_encoder and get_method(name).hides_positions]
TINY = {
    "encoder": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "data": {"image_size": 32},
    "steps": 1,
    "batch_size": 2,
}


def images(side: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def encoder() -> Encoder:
    made = build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, seed=0)
    made.attach_gaug((4, 4), seed=1)
    with torch.no_grad():
        for block in made.vit.blocks:
            torch.nn.init.normal_(block.gaug.height.weight)  # heights that differ, as after training
    return made.eval()


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("gaug") / "run", photos, "dino", gaug=True)


@pytest.mark.parametrize("name", TAKES)
def test_every_bias_is_trained(name: str, photos: Path) -> None:
    method = build(name, gaug=True)
    torch.stack(list(method(batch(method, photos), 0.5).values())).sum().backward()
    grouped = {id(parameter) for group in method.param_groups() for parameter in group["params"]}
    biases = {key: p for key, p in method.named_parameters() if ".gaug." in key and p.requires_grad}
    # a pooled class token doesn't read the last block's patches, whose bias has no effect on it
    last = f".{method.networks()[method.export_network].depth - 1}.gaug."
    assert biases and all(p.grad is not None and p.grad.abs().sum() > 0 for key, p in biases.items() if last not in key)
    assert {id(p) for p in biases.values()} <= grouped


@pytest.mark.parametrize("name", REFUSES)
def test_methods_that_predict_positions_refuse_it(name: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"gaug=true: {name} hides positions"):
        smalti.train(name, photos, tmp_path / "run", overrides={**TINY, "gaug": True}, quiet=True)
    assert not (tmp_path / "run").exists()


def test_bad_values_are_refused_before_anything_is_written(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gaug: mar trains no encoder"):
        smalti.train("mar", photos, tmp_path / "run", overrides={"gaug": True}, quiet=True)
    with pytest.raises(ConfigError, match="gaug='perhaps'"):
        train(tmp_path / "run", photos, "dino", gaug="perhaps")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_has_it_and_its_baseline_too(run: Path) -> None:
    held = weights(run)
    names = {name for name in held if ".gaug." in name}
    assert {name.split(".")[0] for name in names} == {"student", "teacher"}
    encoder = smalti.load(run)
    assert encoder.gaug == encoder.check_size(*encoder.img_size)
    key = next(name for name in sorted(names) if name.startswith("teacher") and name.endswith("blocks.0.gaug.var.bias"))
    assert_close(encoder.vit.blocks[0].gaug.var.bias, held[key])
    first = smalti.load(run / "checkpoints" / "step_00000000") if (run / "checkpoints/step_00000000").exists() else None
    assert first is None or first.gaug == encoder.gaug


def test_training_continues_with_the_biases_of_init(run: Path, photos: Path, tmp_path: Path) -> None:
    still = {"steps": 1, "encoder": None, "optim": {"lr": 0.0, "freeze_encoder_ratio": 0}}
    again = train(tmp_path / "again", photos, "mae", init=str(run), **still)
    first, second = smalti.load(run), smalti.load(again)
    assert second.gaug == first.gaug
    assert_close(second.vit.blocks[1].gaug.height.weight, first.vit.blocks[1].gaug.height.weight)
    with pytest.raises(ConfigError, match="gaug=true: mp3 hides positions"):
        smalti.train("mp3", photos, tmp_path / "mp3", overrides={"init": str(run), "steps": 1}, quiet=True)


def test_all_other_weights_are_those_of_a_run_without_it() -> None:
    one, other = build("dino").state_dict(), build("dino", gaug=True).state_dict()
    assert {key for key in other if key not in one} == {key for key in other if ".gaug." in key} != set()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_description_builds_it_again_and_as_loaded_keeps_it(encoder: Encoder) -> None:
    again = encoder_from_config(encoder.config(), seed=3)
    again.load_state_dict(encoder.state_dict())
    expected = encoder.encode(images()).patches
    for other in (again.eval(), as_loaded(encoder), clone_encoder(encoder)):
        assert_close(other.encode(images()).patches, expected)
    for wrong in ([4], "4x4", [4, "4"], [1, 1]):
        with pytest.raises(ConfigError, match=r"gaug|grid of 1x1"):
            encoder_from_config({**encoder.config(), "gaug": wrong})


def test_every_way_through_the_blocks_has_the_bias(encoder: Encoder) -> None:
    patches, prefix, grid = encoder.encode(images())
    tokens = torch.cat([prefix, patches], dim=1)
    plain = clone_encoder(encoder)
    plain.gaug = None
    assert not torch.allclose(plain.encode(images()).patches, patches, atol=1e-3)
    assert_close(encoder.encode_with_attention(images())[0].patches, patches)
    sequence, places = encoder.assemble(encoder.embed_patches(images())[0], encoder.positions(grid)), Places(grid)
    assert_close(encoder.forward_layers(sequence, [-1], places=places)[0], tokens)
    marks = torch.rand(tokens.shape[:2], generator=torch.Generator().manual_seed(0)) > 0.5
    assert_close(encoder.forward_chosen(sequence, Chosen.where(marks), places), tokens[marks])
    everything = torch.arange(16).flip(0).expand(2, -1)
    assert_close(encoder.encode(images(), ids_keep=everything).patches, patches.flip(1))
    for run in (encoder.forward_tokens, lambda x: encoder.forward_layers(x, [0])):
        with pytest.raises(ConfigError, match="needs the places of the patches"):
            run(sequence)
    assert inspect.signature(encoder.forward_tokens).parameters["places"].default is None


def test_pictures_of_attention_have_the_bias(encoder: Encoder) -> None:
    with torch.no_grad():
        for block in encoder.vit.blocks:
            block.gaug.height.weight.zero_()
            block.gaug.height.bias.fill_(30.0)  # each patch attends to itself
    rows = torch.stack(list(block_attention(encoder, images()[:1])))[:, :, 1:]
    assert rows.diagonal(dim1=-2, dim2=-1).min() > 0.99


def test_timm_refuses_and_onnx_is_equal(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gaug=true adds a Gaussian bias .* export it with to=onnx"):
        export_timm(encoder, tmp_path / "timm")
    assert not (tmp_path / "timm").exists()
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = export_onnx(encoder, tmp_path / "onnx").path
    session = onnxruntime.InferenceSession(folder / "encoder.onnx", providers=["CPUExecutionProvider"])
    tokens, vector = session.run(None, {"images": images().numpy()})
    assert_close(torch.from_numpy(tokens), encoder.encode(images()).patches, atol=1e-4, rtol=1e-4)
    assert_close(torch.from_numpy(vector), encoder.image_features(images()), atol=1e-4, rtol=1e-4)
    assert encoder.vit.blocks[0].attn.fused_attn  # the copy was changed, not the encoder
