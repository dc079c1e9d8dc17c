"""The adapter says the same as timm, for every kind of vision transformer."""

import pytest
import timm
import torch
from torch.testing import assert_close

from smalti.errors import ConfigError, ShapeError
from smalti.exporters.timm import timm_model
from smalti.layers.position_field import PositionField
from smalti.models.build import build_encoder, clone_encoder, encoder_from_config
from smalti.models.encoder import Encoder

KINDS = {
    "class token": {"name": "vit_tiny_patch16_224"},
    "registers": {"name": "vit_small_patch14_reg4_dinov2", "img_size": 28},
    "no class token": {"name": "vit_medium_patch16_reg4_gap_256"},
    "LayerScale, five channels": {"name": "vit_tiny_patch16_224", "in_chans": 5, "init_values": 0.1},
    "pre-norm": {"name": "vit_tiny_patch16_224", "pre_norm": True},
    "no positions": {"name": "vit_tiny_patch16_224", "pos_embed": "none"},
    "oblong": {"name": "vit_tiny_patch16_224", "img_size": [32, 48]},
}


def small(name: str, **arguments: object) -> Encoder:
    arguments = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3, "seed": 0, **arguments}
    return build_encoder(name, **arguments).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_encode_equals_timm(kind: str) -> None:
    encoder = small(**KINDS[kind])
    images = torch.randn(2, encoder.in_chans, *encoder.img_size)
    with torch.no_grad():
        features = encoder.encode(images)
        expected = timm_model(encoder).forward_features(images)
    assert_close(torch.cat([features.prefix, features.patches], 1), expected, atol=1e-6, rtol=0)
    h, w = features.grid
    assert features.patches.shape == (2, h * w, encoder.embed_dim)
    assert features.prefix.shape[1] == encoder.num_prefix_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_visible_patches_alone_are_embedded_as_among_all(kind: str) -> None:
    encoder = small(**KINDS[kind])
    images = torch.randn(2, encoder.in_chans, *encoder.img_size)
    tokens, grid = encoder.embed_patches(images)
    ids_keep = torch.stack([torch.randperm(tokens.shape[1])[:2] for _ in images])
    some, _ = encoder.embed_patches(images, ids_keep)
    positions = encoder.positions(grid)
    whole = encoder.assemble(tokens, positions)[:, encoder.num_prefix_tokens :]
    part = encoder.assemble(some, positions, ids_keep)[:, encoder.num_prefix_tokens :]
    expected = whole.gather(1, ids_keep[..., None].expand(-1, -1, encoder.embed_dim))
    assert_close(part, expected, atol=1e-5, rtol=1e-5)


def test_other_sizes_resample_positions_as_timm_does() -> None:
    encoder = small("vit_tiny_patch16_224")
    plain = timm.create_model(
        "vit_tiny_patch16_224", **{**encoder.timm_args(), **encoder_args(), "dynamic_img_size": True}
    )
    plain.load_state_dict(encoder.vit.state_dict())
    images = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        tokens = plain.eval().forward_features(images)
        assert_close(encoder.encode(images).patches, tokens[:, 1:], atol=1e-6, rtol=0)
        encoder.pos_antialias = False
        assert not torch.allclose(encoder.encode(images).patches, tokens[:, 1:], atol=1e-6)


def encoder_args() -> dict[str, int]:
    return {"depth": 2, "embed_dim": 24, "num_heads": 3}


def test_chosen_layers_end_with_the_encoder_s_output() -> None:
    encoder = small("vit_tiny_patch16_224")
    images = torch.randn(1, 3, 32, 32)
    tokens, grid = encoder.embed_patches(images)
    sequence = encoder.assemble(tokens, encoder.positions(grid))
    first, last = encoder.forward_layers(sequence, [0, -1])
    assert_close(last, encoder.forward_tokens(sequence))
    assert not torch.allclose(first, last)
    with pytest.raises(ConfigError, match=r"has 2 blocks, 0..1"):
        encoder.forward_layers(sequence, [2])


@pytest.mark.parametrize("kind", ["class token", "registers", "LayerScale, five channels", "pre-norm"])
def test_attention_is_what_the_last_block_multiplies_values_with(kind: str) -> None:
    encoder = small(**KINDS[kind])
    images = torch.randn(2, encoder.in_chans, *encoder.img_size)
    with torch.no_grad():
        features, attention = encoder.encode_with_attention(images)
        assert_close(features.patches, encoder.encode(images).patches)
        attn = encoder.vit.blocks[-1].attn
        attn.fused_attn, seen = False, []
        attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
        encoder.encode(images)
    assert_close(attention, seen[0][:, :, 0, encoder.num_prefix_tokens :])


def test_uint8_images_are_normalised_by_encode() -> None:
    encoder = small("vit_tiny_patch16_224")
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    by_hand = (images / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    assert_close(encoder.normalize(images), by_hand)
    assert_close(encoder.encode(images).patches, encoder.encode(by_hand).patches)


def test_image_features_are_the_class_token_or_the_mean_patch() -> None:
    encoder = small("vit_tiny_patch16_224")
    images = torch.randn(2, 3, 32, 32)
    features = encoder.encode(images)
    assert_close(encoder.image_features(images), features.prefix[:, 0])
    assert_close(timm_model(encoder)(images), encoder.image_features(images), atol=1e-6, rtol=0)
    encoder.set_pool("avg")
    assert_close(encoder.image_features(images), features.patches.mean(1))
    assert_close(timm_model(encoder)(images), encoder.image_features(images), atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="pool=cls needs a class token"):
        small("vit_medium_patch16_reg4_gap_256").set_pool("cls")
    with pytest.raises(ConfigError, match="one of auto, cls, avg"):
        encoder.set_pool("max")


def test_the_description_builds_the_same_architecture() -> None:
    encoder = small("vit_tiny_patch16_224", in_chans=2, init_values=0.5, mean=[0.3, 0.4], std=[0.2])
    encoder.set_pool("avg")
    again = encoder_from_config(encoder.config())
    assert again.config() == encoder.config()
    again.vit.load_state_dict(encoder.vit.state_dict())
    images = torch.randint(0, 256, (1, 2, 32, 32), dtype=torch.uint8)
    assert_close(again.eval().encode(images).patches, encoder.encode(images).patches)


def test_seeded_weights_leave_torch_s_own_randomness_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one, two = small("vit_tiny_patch16_224", seed=3), small("vit_tiny_patch16_224", seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.vit.pos_embed, two.vit.pos_embed)


def test_drop_path_grows_from_block_to_block() -> None:
    encoder = small("vit_tiny_patch16_224", depth=3)
    encoder.set_drop_path(0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.vit.blocks]
    assert rates == [0.0, 0.1, 0.2]
    with pytest.raises(ConfigError, match="drop_path=1"):
        encoder.set_drop_path(1.0)


def test_mistakes_are_one_line_each() -> None:
    with pytest.raises(ConfigError, match="has no class token"):
        small("vit_medium_patch16_reg4_gap_256").encode_with_attention(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="did you mean 'vit_small_patch16_224'"):
        build_encoder("vit_smal_patch16_224")
    with pytest.raises(ConfigError, match="timm's 'resnet18' is neither a VisionTransformer nor an Eva"):
        build_encoder("resnet18")
    with pytest.raises(ConfigError, match="encoder has no field 'depht'; did you mean 'depth'"):
        build_encoder("vit_tiny_patch16_224", depht=3)
    with pytest.raises(ConfigError, match="as a vision transformer"):
        build_encoder("vit_tiny_patch16_224", num_heads=5)
    with pytest.raises(ShapeError, match="100x100 pixels, which patch_size=16 does not divide; crop them to 96x96"):
        build_encoder("vit_small_patch16_224", img_size=100)
    encoder = small("vit_tiny_patch16_224")
    with pytest.raises(ShapeError, match="images have 1 channels, vit_tiny_patch16_224 takes 3"):
        encoder.normalize(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ConfigError, match="std has 2 values, the images have 3 channels"):
        encoder.set_normalization([0.5], [0.2, 0.2])
    with pytest.raises(ConfigError, match="above 0"):
        encoder.set_normalization([0.5], [0.0])


FIELDS = {
    "class token": {"name": "vit_tiny_patch16_224"},
    "registers": {
        "name": "vit_small_patch14_reg4_dinov2",
        "img_size": 28,
    },  # timm's table has no row before the patches
    "registers with rows": {"name": "vit_tiny_patch16_224", "reg_tokens": 2},
    "no class token": {"name": "vit_medium_patch16_reg4_gap_256"},
    "oblong": {"name": "vit_tiny_patch16_224", "img_size": [32, 48]},
}


def with_field(kind: str) -> Encoder:
    encoder = small(**FIELDS[kind])
    encoder.attach_field(PositionField(24, (7, 9), encoder.has_class_token, mode="bilinear"))
    encoder.position_field.init_normal(1.0)
    return encoder.eval()


@pytest.mark.parametrize("kind", FIELDS)
def test_a_field_becomes_a_table_of_a_plain_timm_model_with_equal_outputs(kind: str) -> None:
    encoder = with_field(kind)
    images = torch.randn(2, 3, *encoder.img_size)
    with torch.no_grad():
        features = encoder.encode(images)
        expected = torch.cat([features.prefix, features.patches], 1)
        assert_close(timm_model(encoder).forward_features(images), expected, atol=1e-6, rtol=0)
        table = clone_encoder(encoder)
        table.tabulate_field()
        assert table.position_field is None and table.vit.pos_embed.requires_grad
        assert_close(table.encode(images).patches, features.patches, atol=1e-6, rtol=0)
    assert "position_field" not in table.config()


def test_a_field_is_read_at_the_grid_of_use() -> None:
    encoder = with_field("class token")
    patches, prefix = encoder.positions((5, 3))
    assert torch.equal(patches, encoder.position_field.whole((5, 3)))
    assert torch.equal(prefix, encoder.position_field.class_position)
    half = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    crops, _ = encoder.positions((4, 2), half)
    whole, _ = encoder.positions((4, 4))
    assert_close(crops.unflatten(1, (4, 2)), whole.unflatten(1, (4, 4))[:, :, :2])
    with pytest.raises(ConfigError, match="has a position table; only a position field"):
        small("vit_tiny_patch16_224").positions((2, 2), half)


def test_a_description_builds_the_field_again() -> None:
    encoder = with_field("registers")
    again = encoder_from_config(encoder.config())
    again.load_state_dict(encoder.state_dict())
    images = torch.randn(1, 3, 28, 28)
    assert_close(again.eval().encode(images).patches, encoder.encode(images).patches)
    with pytest.raises(ConfigError, match="can't be built"):
        encoder_from_config({**encoder.config(), "position_field": {"grid": [3]}})


def test_without_a_table_there_is_no_field() -> None:
    with pytest.raises(ConfigError, match="no position embedding"):
        small("vit_tiny_patch16_224", pos_embed="none").attach_field(PositionField(24))


def test_weights_that_shall_know_no_positions_lose_their_field() -> None:
    encoder = with_field("class token")
    encoder.drop_positions()
    patches, _ = encoder.positions((2, 2))
    assert not patches.any()


@pytest.mark.parametrize("gaug", [False, True])
def test_checkpointing_keeps_less_for_the_backward_pass_and_changes_no_gradient(gaug: bool) -> None:
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, seed=0
    )
    if gaug:
        encoder.attach_gaug((4, 4), seed=0)
    encoder.set_drop_path(0.3)
    encoder.train()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for checkpointing in (False, True):
        encoder.checkpointing = checkpointing
        kept: list[int] = []
        encoder.zero_grad()
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):  # noqa: B023
            tokens = encoder.encode(images).patches
        held = sum(kept)
        tokens.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
        found.append((held, tokens.detach(), gradients))
    (whole, one, theirs), (less, other, ours) = found
    assert less < 0.4 * whole and torch.equal(one, other) and len(ours) > 30
    assert_close(ours, theirs)
    with torch.no_grad():
        assert torch.equal(encoder.eval().encode(images).patches, encoder.encode(images).patches)
