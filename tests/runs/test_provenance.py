"""What a model card says of an encoder's training, start weights, licence and gain."""

import json
from pathlib import Path

import pytest
import yaml

import smalti
from command import smalti as command
from smalti.models.licences import licence_note, licence_of
from smalti.runs.provenance import history
from training.test_loop import train


@pytest.mark.parametrize(
    ("spec", "licence"),
    [
        ("timm:vit_small_patch16_dinov3", "dinov3-license"),
        ("timm:vit_small_patch16_dinov3.lvd1689m@weights.safetensors", "dinov3-license"),
        ("timm:vit_small_patch14_dinov2", "apache-2.0"),
        ("timm:no_such_model", None),
        ("random:vit_small_patch16_dinov3", None),
        ("runs/a", None),
    ],
)
def test_licences_are_those_that_timm_states(spec: str, licence: str | None) -> None:
    assert licence_of(spec) == licence
    assert bool(licence_note(spec)) == (licence == "dinov3-license")


def test_a_folder_of_hugging_face_states_its_licence_or_its_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert licence_of(f"hf:{tmp_path}") is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov3_vit"}))
    assert licence_of(f"hf:{tmp_path}") == "dinov3-license"
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    assert "cc-by-nc-4.0 (as its files state it)" in licence_note(f"hf:{tmp_path}")


def test_the_card_of_a_run_names_data_seed_start_and_gain(photos: Path, tmp_path: Path) -> None:
    first = train(tmp_path / "first", photos, "mae", steps=1)
    second = train(tmp_path / "second", photos, "mae", steps=1, seed=3, init=str(first), encoder=None)
    command("export", second, "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    about = json.loads((second / "run.json").read_text())
    for words in (
        "## Provenance",
        "**Method**: mae (He et al. 2021",
        "seed 3",
        about["names_digest"],
        "**Start weights**: `first`; licence: that of your data and run",
        "**Measured**: nothing on labelled images",
        f"**Exported by**: Smalti {smalti.__version__}",
    ):
        assert words in card, words
    assert str(tmp_path) not in card.replace(f"local-dir:{tmp_path}", "")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["tags"][-1] == "mae" and "license" not in front and "base_model" not in front


def test_the_card_of_published_weights_names_their_licence() -> None:
    encoder = smalti.load("random:test_vit", quiet=True)
    provenance = history(encoder, "timm:vit_small_patch16_dinov3@/somewhere/else/file.pth")
    assert provenance.lines[0] == "**Weights**: `timm:vit_small_patch16_dinov3@file.pth`"
    assert provenance.lines[1] == "**Licence**: dinov3-license, as timm states it for its own weights of this name"
