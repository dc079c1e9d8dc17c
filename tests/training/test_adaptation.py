"""Training a part of a pretrained encoder, and recomputed activations: what changes, what stays, what is saved."""

from pathlib import Path

import pytest
import torch

import smalti
from smalti.errors import ConfigError
from smalti.exporters.timm import export_timm
from smalti.models.adaptation import LowRank, attach_lora, freeze, merge_lora, parse_adapt
from smalti.models.build import build_encoder, clone_encoder, encoder_from_config
from smalti.models.encoder import Encoder
from smalti.models.loading import as_loaded
from smalti.runs.train import resume
from training.test_loop import train, weights

PLAIN = ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3})
FUSED = ("vit_small_patch16_dinov3_qkvb", {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2})
SPLIT = ("eva02_base_patch14_224", {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2})


def encoder_of(kind: tuple[str, dict]) -> Encoder:
    return build_encoder(kind[0], img_size=32, seed=0, **kind[1]).eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def start(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, to start from."""
    return train(tmp_path_factory.mktemp("start") / "run", photos, "mae", steps=2)


@pytest.mark.parametrize("kind", [PLAIN, FUSED, SPLIT], ids=["plain", "fused with biases", "split"])
@torch.no_grad()
def test_low_rank_updates_change_nothing_then_something_then_merge(kind) -> None:
    encoder = encoder_of(kind)
    before, names = encoder.encode(images()).patches, set(encoder.state_dict())
    attach_lora(encoder, 2, seed=1)
    assert torch.equal(encoder.encode(images()).patches, before)
    updates = [module for module in encoder.modules() if isinstance(module, LowRank)]
    assert len(updates) == sum(isinstance(module, torch.nn.Linear) for module in encoder.vit.blocks.modules())
    for number, update in enumerate(updates):  # each of them has an effect
        update.B.normal_(generator=torch.Generator().manual_seed(number))
        assert not torch.equal(encoder.encode(images()).patches, before)
        update.B.zero_()
    for update in updates:
        update.B.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    changed = encoder.encode(images()).patches
    copy = as_loaded(encoder)
    assert copy.lora is None and set(copy.state_dict()) == names
    assert (copy.encode(images()).patches - changed).abs().max() < 1e-5
    merge_lora(encoder)
    assert torch.equal(encoder.encode(images()).patches, copy.encode(images()).patches)


def test_a_description_with_updates_builds_them_again_and_clones_are_apart() -> None:
    encoder = encoder_of(PLAIN)
    attach_lora(encoder, 3, seed=1)
    again = encoder_from_config(encoder.config(), seed=2)
    assert again.lora == 3
    again.load_state_dict(encoder.state_dict())
    copy = clone_encoder(encoder)
    with torch.no_grad():
        next(module for module in copy.modules() if isinstance(module, LowRank)).B.fill_(1.0)
        assert torch.equal(again.eval().encode(images()).patches, encoder.encode(images()).patches)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("full", lambda name: True),
        ("last:1", lambda name: name.startswith(("vit.blocks.2.", "vit.norm."))),
        ("last:3", lambda name: name.startswith(("vit.blocks.", "vit.norm."))),
        ("norms", lambda name: ".norm" in name),
    ],
)
def test_what_is_frozen(how: str, expected) -> None:
    encoder = encoder_of(PLAIN)
    freeze(encoder, how)
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == expected(name), name


@pytest.mark.parametrize("method", ["mae", "dino"])
@pytest.mark.parametrize("how", ["last:1", "norms", "lora:2"])
def test_only_that_part_moves_also_in_the_teacher(
    method: str, how: str, start: Path, photos: Path, tmp_path: Path
) -> None:
    run = train(tmp_path / "run", photos, method, init=str(start), encoder=None, steps=2, adapt=how)
    before, after = smalti.load(start, quiet=True).state_dict(), smalti.load(run, quiet=True).state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    last = smalti.load(start, quiet=True).depth - 1
    allowed = {
        "last:1": lambda name: name.startswith((f"vit.blocks.{last}.", "vit.norm.")),
        "norms": lambda name: ".norm" in name,
        "lora:2": lambda name: name.startswith("vit.blocks.") and name.endswith("weight") and "norm" not in name,
    }[how]
    assert moved and all(allowed(name) for name in moved)
    assert after.keys() == before.keys()  # a plain encoder


def test_a_run_with_updates_is_resumed_and_exported(start: Path, photos: Path, tmp_path: Path) -> None:
    settings = {"init": str(start), "encoder": None, "adapt": "lora:2"}
    whole = train(tmp_path / "whole", photos, "dino", steps=4, **settings)
    half = train(tmp_path / "half", photos, "dino", steps=4, checkpoint={"every": 2}, **settings)
    for folder in (half / "checkpoints").glob("step_00000004"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    (half / "run.json").write_text((half / "run.json").read_text().replace('"finished"', '"was_finished"'))
    resume(half, quiet=True)
    first, second = weights(whole), weights(half)
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
    assert any("parametrizations" in name for name in first)
    assert export_timm(smalti.load(whole, quiet=True), tmp_path / "out").difference < 1e-6


def test_recomputed_activations_give_the_same_weights(start: Path, photos: Path, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", photos, "mae", steps=2, drop_path=0.3)
    again = train(tmp_path / "again", photos, "mae", steps=2, drop_path=0.3, checkpointing=True)
    first, second = weights(plain), weights(again)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("how", ["last", "last:0", "lora:0", "lora:-1", "norms:2", "half", "last:two"])
def test_wrong_values_are_one_line(how: str) -> None:
    with pytest.raises(ConfigError, match=f"adapt={how}: full, norms, last:N or lora:R is needed"):
        parse_adapt(how)


def test_mistakes_are_found_before_training(start: Path, photos: Path, tmp_path: Path) -> None:
    for settings, line in (
        ({"adapt": "last:1"}, "adapt=last:1 keeps a part of trained weights as it is; name these with --init"),
        ({"adapt": "last:99", "init": str(start), "encoder": None}, "adapt=last:99: .* has . blocks"),
        ({"adapt": "lora:9999", "init": str(start), "encoder": None}, "adapt=lora:9999: the smallest layer"),
    ):
        with pytest.raises(ConfigError, match=line):
            train(tmp_path / "run", photos, "mae", **settings)
        assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="adapt: mar trains no encoder"):
        smalti.train("mar", photos, tmp_path / "run", overrides={"adapt": "norms"}, quiet=True)
