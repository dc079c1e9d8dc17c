"""Five names for an encoder; weights of others; files that are damaged, unsafe or of another architecture."""

import argparse
import json
import math
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import smalti
from smalti.errors import WeightsError
from smalti.exporters.timm import export_timm
from smalti.models.build import build_encoder
from smalti.models.layouts import to_timm_names
from smalti.models.loading import load
from smalti.models.weights import load_vit, read_tensors, unwrap

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return build_encoder(NAME, seed=1).vit.state_dict()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, state: dict[str, torch.Tensor]) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(state, path)
    return path


def test_random_weights_are_seeded() -> None:
    assert torch.equal(load(f"random:{NAME}", seed=1).vit.pos_embed, load(f"random:{NAME}", seed=1).vit.pos_embed)
    assert not torch.equal(load(f"random:{NAME}").vit.pos_embed, load(f"random:{NAME}", seed=1).vit.pos_embed)


def test_local_weights_say_how_many_tensors_matched(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = smalti.load(f"timm:{NAME}@{file}")
    assert "150 of 150 tensors matched" in capsys.readouterr().err
    assert encoder.pretrained and not encoder.training
    assert encoder.mean == (0.485, 0.456, 0.406)
    assert smalti.load(f"timm:{NAME}.augreg_in21k@{file}", quiet=True).mean == (0.5, 0.5, 0.5)


def test_hub_weights_out_of_reach_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.create_model", _only_without_weights)
    with pytest.raises(WeightsError, match=f"give a local file as timm:{NAME}@FILE"):
        load(f"timm:{NAME}")


def _only_without_weights(name: str, pretrained: bool = False, _real=__import__("timm").create_model, **arguments):
    if pretrained:
        raise OSError("name resolution failed")
    return _real(name, **arguments)


@pytest.mark.parametrize("wrap", ["flat", "state_dict", "teacher", "module", "model"])
def test_layouts_of_others_are_unwrapped(wrap: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    content: object = {
        "flat": state,
        "state_dict": {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
        "teacher": {
            "student": {k: v * 0 for k, v in state.items()},
            "teacher": {f"backbone.{k}": v for k, v in state.items()} | {"head.mlp.0.weight": torch.ones(2, 2)},
            "args": argparse.Namespace(arch="vit_tiny"),
        },
        "module": {"module." + k: v for k, v in state.items()},
        "model": {"model": {**state, "decoder_blocks.0.norm1.weight": torch.ones(3), "mask_token": torch.ones(1)}},
    }[wrap]
    torch.save(content, tmp_path / "x.pth")
    encoder = load(f"timm:{NAME}@{tmp_path / 'x.pth'}", quiet=True)
    assert_close(encoder.vit.pos_embed.detach(), state["pos_embed"])


def test_dinov2_registers_fold_the_class_position() -> None:
    encoder = build_encoder("vit_small_patch14_reg4_dinov2", img_size=28, depth=1, embed_dim=24, num_heads=3, seed=0)
    own = encoder.vit.state_dict()
    positions = torch.randn(1, 5, 24)
    theirs = {k: v for k, v in own.items() if k not in ("reg_token", "pos_embed", "cls_token")}
    theirs |= {"register_tokens": own["reg_token"], "cls_token": torch.ones(1, 1, 24), "pos_embed": positions}
    theirs |= {"mask_token": torch.zeros(1, 24)}
    report = load_vit(encoder.vit, to_timm_names(theirs), "file")
    assert (report.matched, report.total) == (len(own), len(own))
    assert_close(encoder.vit.cls_token.detach(), 1 + positions[:, :1])
    assert_close(encoder.vit.pos_embed.detach(), positions[:, 1:])


def test_positions_of_another_grid_are_resampled_and_it_is_said(state: dict[str, torch.Tensor]) -> None:
    encoder = build_encoder(NAME, img_size=96, seed=0)
    report = load_vit(encoder.vit, state, "file")
    assert "resampled pos_embed from 14x14 to 6x6" in str(report)
    assert "150 of 150" in str(report)


def test_another_architecture_is_named(file: Path) -> None:
    with pytest.raises(WeightsError, match=r"a ViT 192 wide, 12 deep, patch 16.*the model is a ViT 384 wide"):
        load(f"timm:vit_small_patch16_224@{file}")


def test_a_partial_match_is_refused_unless_told(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "part.safetensors"
    save_file({k: v for k, v in state.items() if not k.startswith("blocks.11")}, path)
    with pytest.raises(WeightsError, match=r"138 of 150 tensors matched; missing blocks.11.*--partial"):
        load(f"timm:{NAME}@{path}")
    assert load(f"timm:{NAME}@{path}", partial=True, quiet=True).depth == 12


def test_truncated_safetensors_are_refused(file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(WeightsError, match="can't be read as a safetensors file"):
        load(f"timm:{NAME}@{broken}")


class Evil:
    """Creates a file when unpickled without care."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (_touch, (self.path,))


def _touch(path: str) -> None:
    Path(path).touch()


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickled_objects_are_refused_and_never_run(how: str, tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "evil.pth"
    if how == "torch":
        torch.save({"state_dict": {"cls_token": torch.ones(1)}, "args": Evil(str(trap))}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(str(trap)), protocol=2))
    with pytest.raises(WeightsError, match=r"pickled Python objects|can't be read as a torch file"):
        load(f"timm:{NAME}@{path}")
    assert not trap.exists()


def test_other_mistakes_are_one_line_each(tmp_path: Path, file: Path) -> None:
    with pytest.raises(WeightsError, match="no such run or file; an encoder is one of RUN"):
        load(tmp_path / "nothing")
    with pytest.raises(WeightsError, match="contains no complete checkpoint"):
        load(tmp_path)
    with pytest.raises(WeightsError, match=r"without a config.json beside them.*try timm:vit_tiny_patch16_224@"):
        load(file)
    with pytest.raises(WeightsError, match="does not exist"):
        load(f"timm:{NAME}@{tmp_path / 'no.pth'}")
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(WeightsError, match="not a known kind of weights file"):
        load(f"timm:{NAME}@{tmp_path / 'x.txt'}")
    (tmp_path / "x.pth").write_text("hello")
    with pytest.raises(WeightsError, match=r"x.pth: (can't be read as a torch file|holds pickled)"):
        load(f"timm:{NAME}@{tmp_path / 'x.pth'}")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="no vision transformer found"):
        load(f"timm:{NAME}@{tmp_path / 'a.safetensors'}")
    with pytest.raises(WeightsError, match="not tensors by name"):
        unwrap([1])


def test_two_networks_in_one_file_are_refused(state: dict[str, torch.Tensor]) -> None:
    both = {f"{prefix}.{k}": v for prefix in ("model", "teacher") for k, v in state.items()}
    with pytest.raises(WeightsError, match="holds 2 vision transformers"):
        to_timm_names(both)


def test_half_precision_weights_become_float32(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "half.safetensors")
    encoder = load(f"timm:{NAME}@{tmp_path / 'half.safetensors'}", quiet=True)
    assert encoder.vit.pos_embed.dtype == torch.float32


def test_a_prefix_reads_only_its_tensors(tmp_path: Path) -> None:
    save_file({"a.x": torch.ones(1), "b.x": torch.zeros(1)}, tmp_path / "t.safetensors")
    assert list(read_tensors(tmp_path / "t.safetensors", prefix="a.")) == ["x"]
    assert set(load_file(tmp_path / "t.safetensors")) == {"a.x", "b.x"}


def test_a_real_vit_loads_whole(shared: Path) -> None:
    path = shared / "weights" / "vit_small_patch14_dinov2_imgfocus_fp16.safetensors"
    encoder = load(f"timm:vit_small_patch14_dinov2@{path}", quiet=True)
    assert (encoder.embed_dim, encoder.depth, encoder.img_size) == (384, 12, (518, 518))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 346316432\n"
PAGE = "<!DOCTYPE html>\n<html><body>Sign in to download</body></html>"


@pytest.mark.parametrize("ending", ["pth", "safetensors", "npz"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, "is a Git LFS pointer, not the weights; fetch them with: git lfs pull --include x"),
        (PAGE, "is a web page, not the weights"),
        ("", "is empty"),
    ],
)
def test_what_is_saved_in_the_place_of_weights_is_named(tmp_path: Path, ending: str, content: str, words: str) -> None:
    path = tmp_path / f"x.{ending}"
    path.write_text(content)
    for spec in (path, f"timm:{NAME}@{path}"):
        with pytest.raises(WeightsError, match=rf"x\.{ending}: {words}"):
            load(spec)


def test_a_torch_file_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, object] = {"weight": 1}
    content["group"] = content
    torch.save(content, tmp_path / "loop.pth")
    with pytest.raises(WeightsError, match=r"loop\.pth: .*it is nested too deeply"):
        load(f"timm:{NAME}@{tmp_path / 'loop.pth'}")


def test_arrays_of_impossible_shape_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 99999), }".ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 16)
    with pytest.raises(WeightsError, match=r"x\.npz: can't be read as an npz file"):
        load(f"timm:{NAME}@{path}")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("mean", [math.nan, 0.5, 0.5], "finite numbers are needed"),
        ("std", [math.inf, 0.5, 0.5], "finite numbers are needed"),
        ("std", "wide", r"out/(model\.safetensors|config\.json): "),
        ("model_args", {"depth": -1}, r"encoder\.depth=-1: a number from 1 to 1024"),
        ("model_args", {"img_size": 10**9}, r"encoder\.img_size=1000000000: a number from 1 to 16384"),
        ("model_args", {"patch_size": 0}, r"encoder\.patch_size=0"),
        ("model_args", [1], "can't be read as an encoder"),
        ("architecture", 7, "can't be read as an encoder"),
    ],
)
def test_a_description_that_cannot_be_is_one_line(tmp_path: Path, key: str, value: object, words: str) -> None:
    encoder = build_encoder(NAME, img_size=32, depth=1, embed_dim=12, num_heads=1, seed=0)
    export_timm(encoder, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["smalti"][key] = value
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=words):
        load(tmp_path / "out/model.safetensors")
