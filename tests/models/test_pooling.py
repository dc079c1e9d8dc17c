"""Pooling of an encoder: timm's functions, with PRR where it is asked for and nowhere else."""

import pytest
import timm
import torch
from timm.layers import AttentionPoolPrr, set_fused_attn
from torch.nn import functional as F
from torch.testing import assert_close

from smalti.errors import ConfigError
from smalti.exporters.timm import timm_model
from smalti.functional.refinement import prr_refine
from smalti.layers.last_block import Chosen
from smalti.layers.pooling import PRRConfig, PRRPool
from smalti.methods.teacher import Teacher
from smalti.models.build import build_encoder, encoder_from_config
from smalti.models.encoder import Encoder

KINDS: dict[str, dict[str, object]] = {
    "class token": {},
    "registers": {"reg_tokens": 2},
    "no class token": {"class_token": False},
    "registers alone": {"class_token": False, "reg_tokens": 2},
}
NORMS = PRRConfig(pre_norm=True, post_norm=True)


def small(**arguments: object) -> Encoder:
    shape = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "seed": 0}
    return build_encoder("vit_tiny_patch16_224", **{**shape, **arguments}).eval()  # type: ignore[arg-type]


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("has_class_token", [True, False])
@pytest.mark.parametrize("norms", [False, True])
def test_it_is_timms_class_with_its_names(has_class_token: bool, norms: bool) -> None:
    ours = PRRPool(24, 3, 1, has_class_token, PRRConfig(pre_norm=norms, post_norm=norms)).double()
    theirs = AttentionPoolPrr(24, 3, "token" if has_class_token else "avg", norms, norms).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    tokens = torch.randn(2, 17, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(ours(tokens), theirs(tokens), atol=1e-12, rtol=0)
    assert isinstance(ours, AttentionPoolPrr)
    assert not norms or len(list(ours.parameters())) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", ["prr", "map", "avg", "auto"])
def test_the_plain_timm_model_pools_alike(kind: str, pool: str) -> None:
    encoder = small(**KINDS[kind])
    encoder.set_pool(pool, fresh=True)
    plain = timm_model(encoder)
    assert plain.global_pool == {"auto": "token" if encoder.has_class_token else "avg"}.get(pool, pool)
    with torch.no_grad():
        assert_close(plain(images()), encoder.image_features(images()))


@pytest.mark.parametrize("kind", KINDS)
def test_prr_reads_tokens_behind_the_norm_and_leaves_patches_unrefined(kind: str) -> None:
    encoder = small(**KINDS[kind])
    before = encoder.encode(images())
    encoder.set_pool("prr")
    after = encoder.encode(images())
    assert torch.equal(before.patches, after.patches) and torch.equal(before.prefix, after.prefix)
    refined = prr_refine(torch.cat([after.prefix, after.patches], 1), 3)
    expected = refined[:, 0] if encoder.has_class_token else refined.mean(1)
    assert_close(encoder.image_features(images()), expected)
    assert not torch.allclose(expected, after.patches.mean(1), atol=1e-3)
    if encoder.has_class_token:
        assert not torch.allclose(expected, after.prefix[:, 0], atol=1e-3)


def test_without_a_class_token_the_mean_may_leave_registers_out() -> None:
    encoder = small(class_token=False, reg_tokens=2)
    encoder.set_pool("prr", PRRConfig(include_prefix=False))
    features = encoder.encode(images())
    refined = prr_refine(torch.cat([features.prefix, features.patches], 1), 3)
    assert_close(encoder.pooled(features), refined[:, 2:].mean(1))
    with pytest.raises(ConfigError, match="this encoder has a class token; leave it out"):
        small().set_pool("prr", PRRConfig(include_prefix=False))


def test_prr_has_neither_parameters_nor_buffers_so_that_weights_go_both_ways() -> None:
    plain, refined = small(seed=1), small(seed=2)
    refined.set_pool("prr")
    assert [key for key in refined.vit.state_dict() if "pool" in key] == []
    assert not list(refined.vit.attn_pool.parameters()) and not list(refined.vit.attn_pool.buffers())
    refined.vit.load_state_dict(plain.vit.state_dict(), strict=True)
    plain.vit.load_state_dict(refined.vit.state_dict(), strict=True)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", **{**{**refined.timm_args(), "global_pool": "avg"}, **refined.model_args}
    )
    theirs.load_state_dict(refined.vit.state_dict(), strict=True)


def test_a_pooling_asked_for_wins_over_the_encoders_own() -> None:
    # timm's model.pool(x, pool_type="avg") ignores the type where there is an attention pool
    encoder = small(reg_tokens=2)
    encoder.set_pool("prr")
    features = encoder.encode(images())
    assert torch.equal(encoder.pooled(features, "avg"), features.patches.mean(1))
    assert torch.equal(encoder.pooled(features, "cls"), features.prefix[:, 0])
    plain = small(reg_tokens=2)
    assert_close(plain.pooled(plain.encode(images()), "prr"), encoder.pooled(features))


def test_pooling_can_be_changed_and_changed_back() -> None:
    # timm asserts in reset_classifier(n, "prr"), and after reset_classifier(n, "avg") takes the prefix into the mean
    encoder = small(reg_tokens=2)
    features = encoder.encode(images())
    encoder.set_pool("prr")
    encoder.set_pool("avg")
    assert encoder.vit.attn_pool is None and not encoder.vit.pool_include_prefix
    assert torch.equal(encoder.image_features(images()), features.patches.mean(1))
    plain = timm_model(encoder)
    assert not plain.pool_include_prefix
    assert_close(plain(images()), features.patches.mean(1))


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_prefix_tokens_stay_out_of_pooled_vectors_also_where_timm_takes_them_in(pool: str) -> None:
    encoder = build_encoder("test_vit3", img_size=32, depth=2, seed=0)
    encoder.set_pool(pool, fresh=True)
    features = encoder.encode(images())
    if pool == "avg":
        assert torch.equal(encoder.pooled(features), features.patches.mean(1))
    plain = timm_model(encoder)
    assert_close(plain.forward_features(images()), torch.cat([features.prefix, features.patches], dim=1))
    assert_close(plain(images()), encoder.image_features(images()))
    with pytest.raises(ConfigError, match="pooled from patches only"):
        build_encoder("test_vit3", img_size=32, depth=2, pool_include_prefix=True)


def test_earlier_layers_are_read_without_losing_the_pool_and_never_refined() -> None:
    # timm's prune_intermediate_layers(prune_head=True) removes it; forward_intermediates never applies it
    encoder, plain = small(), small()
    encoder.set_pool("prr")
    tokens, grid = encoder.embed_patches(images())
    sequence = encoder.assemble(tokens, encoder.positions(grid))
    for ours, theirs in zip(
        encoder.forward_layers(sequence, [0, -1]), plain.forward_layers(sequence, [0, -1]), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert isinstance(encoder.vit.attn_pool, PRRPool)


@pytest.mark.parametrize("pool", ["avg", "map", "prr"])
def test_chosen_tokens_are_unrefined_but_the_first_stands_for_the_image(pool: str) -> None:
    encoder = small(reg_tokens=2)
    tokens, grid = encoder.embed_patches(images())
    sequence = encoder.assemble(tokens, encoder.positions(grid))
    wanted = torch.zeros(sequence.shape[:2], dtype=torch.bool)
    wanted[:, [0, 5, 7]] = True
    chosen = Chosen.where(wanted)
    plain = encoder.forward_chosen(sequence, chosen).unflatten(0, (2, 3))
    encoder.set_pool(pool, fresh=True)
    found = encoder.forward_chosen(sequence, chosen).unflatten(0, (2, 3))
    assert_close(found[:, 1:], plain[:, 1:])
    assert_close(found[:, 0], encoder.image_features(images()))
    assert not torch.allclose(found[:, 0], plain[:, 0], atol=1e-3)


def test_timms_switch_for_fused_attention_may_come_later() -> None:
    encoder = small(class_token=False)
    set_fused_attn(False)
    try:
        encoder.set_pool("prr")
        unfused = encoder.image_features(images())
    finally:
        set_fused_attn(True)
    assert_close(encoder.image_features(images()), unfused)


def test_tokens_without_the_final_norm_are_what_the_norm_is_given() -> None:
    encoder = small()
    raw, normed = encoder.encode(images(), norm=False), encoder.encode(images())
    assert_close(encoder.vit.norm(raw.patches), normed.patches)
    assert not torch.allclose(raw.patches, normed.patches, atol=1e-3)


@pytest.mark.parametrize(("pool", "prr"), [("map", PRRConfig()), ("prr", NORMS), ("prr", PRRConfig(num_heads=2))])
def test_the_description_builds_it_again(pool: str, prr: PRRConfig) -> None:
    encoder = small()
    encoder.set_pool(pool, prr, fresh=True)
    again, other = (encoder_from_config(encoder.config(), seed) for seed in (3, 3))
    assert again.config() == encoder.config()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), other.parameters(), strict=True))
    again.vit.load_state_dict(encoder.vit.state_dict(), strict=True)
    assert torch.equal(again.eval().image_features(images()), encoder.image_features(images()))


@pytest.mark.parametrize(("pool", "prr"), [("map", None), ("prr", NORMS)])
def test_a_teacher_follows_the_parameters_of_a_pooling(pool: str, prr: PRRConfig | None) -> None:
    student = small()
    student.set_pool(pool, prr, fresh=True)
    teacher = Teacher(student)
    with torch.no_grad():
        for parameter in student.vit.attn_pool.parameters():
            parameter.add_(1.0)
    teacher.update(student, 0.75)
    followed = teacher.module.vit.attn_pool.state_dict()
    assert followed
    for name, value in student.vit.attn_pool.state_dict().items():
        assert_close(followed[name], value - 0.75)


def test_trained_parameters_stay_where_the_same_pooling_is_asked_for_again() -> None:
    encoder = small()
    encoder.set_pool("map", fresh=True)
    pool = encoder.vit.attn_pool
    encoder.set_pool("map")
    assert encoder.vit.attn_pool is pool
    encoder.set_pool("cls")
    with pytest.raises(ConfigError, match="pool=map has parameters, and vit_tiny_patch16_224 comes without"):
        encoder.set_pool("map")
    with pytest.raises(ConfigError, match="pool=map has parameters"):
        encoder.pooled(encoder.encode(images()), "map")
    with pytest.raises(ConfigError, match="pool=prr has parameters"):
        encoder.set_pool("prr", NORMS)
    assert encoder.pool == "cls" and encoder.vit.attn_pool is None


@pytest.mark.parametrize("prr", [NORMS, PRRConfig(num_heads=2)])
def test_prr_settings_that_timm_lacks_are_not_exported(prr: PRRConfig) -> None:
    encoder = small()
    encoder.set_pool("prr", prr, fresh=True)
    with pytest.raises(ConfigError, match=r"timm's PRR pooling has the backbone's number of heads.*prr\.pre_norm"):
        timm_model(encoder)
    encoder.set_pool("prr", PRRConfig(num_heads=3))  # the backbone's own, named
    assert timm_model(encoder).global_pool == "prr"


def test_mistakes_are_one_line_each() -> None:
    with pytest.raises(ConfigError, match="PRR with 5 heads on tokens of width 24"):
        small().set_pool("prr", PRRConfig(num_heads=5))
    with pytest.raises(ConfigError, match=r"prr\.\* is about pool=prr, and pool=cls"):
        small().set_pool("cls", NORMS)
    with pytest.raises(ConfigError, match=r"encoder\.global_pool=prr: write pool=prr"):
        small(global_pool="prr")
    with pytest.raises(ConfigError, match="one of auto, cls, avg, map, prr is needed"):
        small().set_pool("max")


def test_other_backbones_take_the_pooling_as_it_is() -> None:
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, num_classes=0).eval()
    before = {name: value.clone() for name, value in eva.state_dict().items()}
    pool = PRRPool(eva.embed_dim, eva.blocks[0].attn.num_heads, eva.num_prefix_tokens, has_class_token=True)
    with torch.no_grad():
        tokens = F.layer_norm(eva.forward_features(torch.randn(1, 3, 28, 28)), (eva.embed_dim,))
        assert_close(pool(tokens), prr_refine(tokens, 3)[:, 0])
    assert eva.state_dict().keys() == before.keys()
