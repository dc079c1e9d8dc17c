import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from smalti.errors import ConfigError, WeightsError
from smalti.exporters.timm import TOLERANCE, export_timm
from smalti.models.build import build_encoder, encoder_from_config
from smalti.models.encoder import Encoder

ENCODERS = {
    "class token": dict(img_size=64),
    "five channels": dict(img_size=64, in_chans=5),
    "one channel": dict(img_size=64, in_chans=1),
    "registers": dict(img_size=64, reg_tokens=4, no_embed_class=True),
    "no class token": dict(img_size=64, class_token=False),
    "oblong, layer scale": dict(img_size=(32, 64), init_values=1e-5),
    "fixed drop path": dict(img_size=64, drop_path_rate=0.5),
}


def tiny(**arguments) -> Encoder:
    return build_encoder("vit_tiny_patch16_224", seed=0, depth=2, embed_dim=48, **arguments)


@pytest.mark.parametrize("arguments", ENCODERS.values(), ids=ENCODERS.keys())
def test_timm_opens_the_folder_and_gives_the_same_tokens(tmp_path, arguments):
    encoder = tiny(**arguments)
    export = export_timm(encoder.train(), tmp_path / "out")
    assert export.path == tmp_path / "out" and export.difference <= TOLERANCE
    assert sorted(path.name for path in export.path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{export.path}", pretrained=True).eval()
    images = torch.rand(2, encoder.in_chans, *encoder.img_size)
    with torch.no_grad():
        assert_close(model(images), encoder.eval().image_features(images), atol=1e-6, rtol=0)
    assert list(model.pretrained_cfg["mean"]) == list(encoder.mean)
    assert list(tmp_path.iterdir()) == [export.path]  # no temporary folder is left


@pytest.mark.parametrize("arguments", ENCODERS.values(), ids=ENCODERS.keys())
def test_the_key_smalti_describes_the_encoder_for_these_weights(tmp_path, arguments):
    encoder = tiny(**arguments)
    folder = export_timm(encoder, tmp_path / "out").path
    again = encoder_from_config(json.loads((folder / "config.json").read_text())["smalti"])
    again.vit.load_state_dict(load_file(folder / "model.safetensors"))
    images = torch.randint(0, 256, (2, encoder.in_chans, *encoder.img_size), dtype=torch.uint8)
    with torch.no_grad():
        ours, theirs = encoder.eval().encode(images), again.eval().encode(images)
    assert torch.equal(ours.patches, theirs.patches) and torch.equal(ours.prefix, theirs.prefix)


def test_a_new_head_can_be_put_on_it(tmp_path):
    folder = export_timm(tiny(img_size=64), tmp_path / "out").path
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7, img_size=96)
    assert model(torch.rand(1, 3, 96, 96)).shape == (1, 7)


def test_an_empty_folder_is_filled_and_a_full_one_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    export_timm(tiny(img_size=32), tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"not empty \(it holds README.md\)"):
        export_timm(tiny(img_size=32), tmp_path / "empty")


def test_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file, a folder is needed"):
        export_timm(tiny(img_size=32), tmp_path / "out")
    with pytest.raises(ConfigError, match="can't be written"):
        export_timm(tiny(img_size=32), tmp_path / "out" / "below")


def test_a_model_that_differs_is_not_left_behind(tmp_path: Path):
    encoder = tiny(img_size=32)
    with torch.no_grad():
        encoder.vit.norm.weight.fill_(float("nan"))
    with pytest.raises(WeightsError, match="differs from the encoder by nan"):
        export_timm(encoder, tmp_path / "out")
    assert not list(tmp_path.iterdir())
