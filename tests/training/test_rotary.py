"""Methods on encoders with rotary positions: who trains them, who leaves the rotation out, who refuses them."""

from pathlib import Path

import pytest
import torch
from test_methods import SMALL, batch
from timm.optim import create_optimizer_v2

import smalti
from smalti.errors import ConfigError
from smalti.evaluation.protocols.detection import freeze_blocks
from smalti.evaluation.tuning import rate_positions, trainable_copy
from smalti.exporters.onnx import export_onnx
from smalti.layers.gaussian_bias import Places
from smalti.layers.stochastic_depth import StepPart, part_of_step
from smalti.methods.base import Method, get_method, method_names
from smalti.models.adaptation import freeze
from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder
from training.test_loop import train

DINOV3 = {"name": "vit_small_patch16_dinov3", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
MIXED = {**DINOV3, "name": "vit_small_patch16_rope_mixed_224"}
REFUSE = {
    "droppos": "has rotary positions",
    "intertwined": "masked positions need a table or a field; set method.position_loss=false",
}
WITHOUT = ("mp3", "part")
ROTATE = [
    name
    for name in method_names()
    if get_method(name).has_encoder and name not in (*REFUSE, *WITHOUT, "ranker", "cvit", "dynamicvit")
]


def encoder_of(arguments: dict) -> Encoder:
    return build_encoder(arguments["name"], img_size=32, seed=0, **{k: v for k, v in arguments.items() if k != "name"})


def method_of(name: str, arguments: dict) -> Method:
    cls = get_method(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        method = cls(encoder_of(arguments), cls.Config(**SMALL.get(name, {}))).train()
        with torch.no_grad():  # away from the initialisation, where attention is nearly uniform
            for parameter in method.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return method


def loss_of(method: Method, photos: Path) -> torch.Tensor:
    return torch.stack(list(method(batch(method, photos), 0.5).values())).sum()


def trained(method: Method) -> Encoder:
    """The encoder that learns; a teacher follows it."""
    return next(
        part for part in method.modules() if isinstance(part, Encoder) and next(part.parameters()).requires_grad
    )


@pytest.mark.parametrize("name", ROTATE)
def test_methods_train_it_and_their_loss_sees_the_rotation(name: str, photos: Path) -> None:
    method, still = method_of(name, MIXED), method_of(name, MIXED)
    loss = loss_of(method, photos)
    loss.backward()
    freqs = trained(method).vit.rope.freqs
    assert freqs.grad is not None and freqs.grad.abs().max() > 0
    plain = {id(p) for group in method.param_groups() if not group["weight_decay_scale"] for p in group["params"]}
    assert id(freqs) in plain
    with torch.no_grad():
        for part in still.modules():
            if isinstance(part, Encoder):
                part.vit.rope.freqs.zero_()  # rotates by nothing
    assert loss_of(still, photos).item() != loss.item()


@pytest.mark.parametrize("how", ["last:1", "norms", "lora:2"])
def test_frequencies_are_frozen_with_the_blocks(how: str) -> None:
    encoder = encoder_of(MIXED)
    freeze(encoder, how)
    assert not encoder.vit.rope.freqs.requires_grad
    copy = trainable_copy(encoder, 0.0)
    freeze_blocks(copy, 1)
    assert not copy.vit.rope.freqs.requires_grad and copy.vit.blocks[1].attn.qkv.weight.requires_grad


def test_fine_tuning_gives_frequencies_the_first_layer_s_rate_and_no_weight_decay() -> None:
    encoder = encoder_of(MIXED)
    copy = trainable_copy(encoder, 0.0)
    optimizer = create_optimizer_v2(copy.vit, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    rate_positions(optimizer, encoder, copy)
    having = [group for group in optimizer.param_groups if any(p is copy.vit.rope.freqs for p in group["params"])]
    assert len(having) == 1 and having[0]["weight_decay"] == 0
    (stem,) = {
        group["lr_scale"] for group in optimizer.param_groups if any(p is copy.vit.cls_token for p in group["params"])
    }
    assert having[0]["lr_scale"] == stem < 0.5
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(copy.vit.parameters()))


@pytest.mark.parametrize("name", WITHOUT)
def test_methods_without_positions_leave_the_rotation_out_and_fine_tuning_turns_it_on(name: str, photos: Path) -> None:
    method = method_of(name, MIXED)
    loss_of(method, photos).backward()
    encoder = trained(method)
    assert encoder.vit.rope.freqs.grad is None or not encoder.vit.rope.freqs.grad.any()
    assert encoder.rotation(Places((4, 4))) is None
    encoder.draw_positions()
    assert encoder.rotation(Places((4, 4))) is not None


@pytest.mark.parametrize(("name", "line"), REFUSE.items())
def test_methods_that_replace_positions_refuse_it(name: str, line: str, photos: Path, tmp_path: Path) -> None:
    settings = {"encoder": DINOV3, "data": {"image_size": 32}, "steps": 1, "batch_size": 2}
    with pytest.raises(ConfigError, match=line):
        smalti.train(name, photos, tmp_path / "run", overrides=settings, quiet=True)
    assert not (tmp_path / "run").exists()


WHOLE_GRID = (10, 14)


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_crops_read_the_coordinates_of_their_place(is_mirrored: bool) -> None:
    encoder = encoder_of(DINOV3)
    whole = encoder.rotation(Places(WHOLE_GRID)).of_block(0)
    box = torch.tensor([[3 / 14, 2 / 10, 11 / 14, 8 / 10]])
    rows = whole.unflatten(0, WHOLE_GRID)[2:8, 3:11]
    if is_mirrored:
        box, rows = box[:, [2, 1, 0, 3]], rows.flip(1)
    boxes = torch.cat([torch.tensor([[0.0, 0, 1, 1]]), box])
    crop = encoder.rotation(Places((6, 8), boxes=boxes)).of_block(0)
    assert crop.shape == (2, 1, 48, whole.shape[-1])
    assert (crop[1, 0] - rows.flatten(0, 1)).abs().max() < 5e-6
    assert torch.allclose(crop[0, 0], encoder.rotation(Places((6, 8))).of_block(0), atol=5e-6)
    ids = torch.stack([torch.randperm(48, generator=torch.Generator().manual_seed(n))[:5] for n in (0, 1)])
    kept = encoder.rotation(Places((6, 8), ids, boxes)).of_block(1)
    assert torch.equal(kept, torch.stack([crop[n, :, ids[n]] for n in (0, 1)]))


def test_each_sample_of_a_batch_has_its_own_box_also_with_stochastic_depth() -> None:
    encoder = method_of("mae", DINOV3).encoder.eval()
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.2, 0.1, 0.9, 1.0], [0.0, 0.0, 1.0, 1.0]])
    sequence = encoder.assemble(torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0)), None)
    together = encoder.forward_tokens(sequence, places=Places((4, 4), boxes=boxes))
    for n in range(3):
        alone = encoder.forward_tokens(sequence[n : n + 1], places=Places((4, 4), boxes=boxes[n : n + 1]))
        assert torch.allclose(alone, together[n : n + 1], atol=1e-5)
    own = encoder.forward_tokens(sequence, places=Places((4, 4)))
    assert torch.allclose(own[2], together[2], atol=1e-5) and (own[:2] - together[:2]).abs().amax((1, 2)).min() > 1e-3
    encoder.train().set_drop_path(0.5)
    with part_of_step(StepPart(3, 3, 0, 3)):
        some = encoder.forward_tokens(sequence, places=Places((4, 4), boxes=boxes))
    parts = []
    for n in range(3):
        with part_of_step(StepPart(3, 3, n, 1)):
            parts.append(encoder.forward_tokens(sequence[n : n + 1], places=Places((4, 4), boxes=boxes[n : n + 1])))
    assert torch.allclose(torch.cat(parts), some, atol=1e-5)


def test_intertwined_trains_it_at_the_places_of_crops(photos: Path) -> None:
    def method(**more: object) -> Method:
        cls = get_method("intertwined")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = cls(encoder_of(DINOV3), cls.Config(**{**SMALL["intertwined"], "position_loss": False, **more}))
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        return made.train()

    placed, alone = method(), method(field=False)
    loss = loss_of(placed, photos)
    loss.backward()
    assert loss.item() != loss_of(alone, photos).item()
    assert trained(placed).vit.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    with pytest.raises(ConfigError, match="can't be read at the place of a crop, as DINOv3's can"):
        get_method("intertwined")(encoder_of(MIXED), placed.config)
    with pytest.raises(ConfigError, match="reads no positions at boxes; only DINOv3's does"):
        encoder_of(MIXED).rotation(Places((4, 4), boxes=torch.tensor([[0.0, 0, 1, 1]])))


def test_a_run_is_trained_resumed_loaded_and_exported(photos: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", photos, "mae", encoder=DINOV3, steps=2)
    encoder = smalti.load(run, quiet=True)
    assert encoder.is_rotary and encoder.name == DINOV3["name"]
    made = export_onnx(encoder, tmp_path / "onnx")
    assert made.difference < 1e-4
    again = train(tmp_path / "again", photos, "dino", init=str(run), encoder=None, steps=1)
    assert smalti.load(again, quiet=True).num_prefix_tokens == encoder.num_prefix_tokens
