"""LOCA against its definition."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from smalti.data.views import Views, collate
from smalti.errors import ConfigError
from smalti.functional.boxes import reference_cells
from smalti.functional.masking import random_mask
from smalti.functional.random import sample_uniform, step_key
from smalti.functional.transport import sinkhorn
from smalti.layers.cross_attention import CrossAttentionBlock
from smalti.methods.loca import LOCA, LOCAConfig, cluster_loss, me_max, position_loss
from smalti.models.build import build_encoder
from smalti.runs.train import train
from smalti.training.logs import LOG_FILE, read_csv

SMALL = {"num_prototypes": 16, "hidden_dim": 32, "bottleneck_dim": 8, "num_small_queries": 2}


def tiny(class_token: bool = False, **config: object) -> LOCA:
    torch.manual_seed(0)
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        class_token=class_token,
        seed=0,
    )
    return LOCA(encoder, LOCAConfig(**{**SMALL, **config}))


def batch(method: LOCA, count: int = 3, size: int = 32) -> Views:
    crops, samples = method.make_views(size), []
    for place in range(count):
        rng = np.random.default_rng([5, place])
        samples.append(crops(rng.integers(0, 256, (60, 70, 3), dtype=np.uint8), rng))
    views = collate(samples)
    views.keys = torch.arange(count)
    return views


def box(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def test_cells_by_hand() -> None:  # a reference of 4x4 cells of 10 px at (100, 50)
    reference, plain, mirrored = box(100, 50, 140, 90), torch.tensor([False]), torch.tensor([True])
    assert reference_cells(reference, plain, reference, (4, 4), (4, 4)).tolist() == [list(range(16))]
    assert reference_cells(reference, mirrored, reference, (4, 4), (4, 4))[0, :4].tolist() == [3, 2, 1, 0]
    # half of the query lies left of the reference; its rows are 5 px, so two share one row of cells
    assert reference_cells(box(80, 60, 120, 80), plain, reference, (4, 4), (4, 4)).reshape(4, 4).tolist() == [
        [-1, -1, 4, 5],
        [-1, -1, 4, 5],
        [-1, -1, 8, 9],
        [-1, -1, 8, 9],
    ]
    assert (reference_cells(box(0, 0, 40, 40), plain, reference, (2, 2), (4, 4)) == -1).all()


def cells_by_map(reference: tuple[int, ...], query: tuple[int, ...], flip: bool, size: int, view: int) -> torch.Tensor:
    """Labels as the released code has them: the reference's numbers, enlarged, cut, and shrunk twice by the nearest.

    Args:
        reference: x, y, width, height.
        query: likewise.
        flip: mirror the result.
        size: patches of the view.
        view: its pixels.
    """
    (rx, ry, rw, rh), (qx, qy, qw, qh) = reference, query
    numbers = torch.arange(196.0).reshape(1, 1, 14, 14)
    image = torch.full((1, 1, 500, 500), -1.0)  # the reference's numbers where it lies, -1 elsewhere
    image[..., ry : ry + rh, rx : rx + rw] = F.interpolate(numbers, (rh, rw), mode="nearest-exact")
    crop = F.interpolate(image[..., qy : qy + qh, qx : qx + qw], (view, view), mode="nearest-exact")
    by_map = F.interpolate(crop, (size, size), mode="nearest-exact")[0, 0].long()
    return (by_map.flip(1) if flip else by_map).flatten()


def cells_by_centre(reference: tuple[int, ...], query: tuple[int, ...], flip: bool, size: int) -> torch.Tensor:
    boxes = [box(x, y, x + w, y + h) for x, y, w, h in (query, reference)]
    return reference_cells(boxes[0], torch.tensor([flip]), boxes[1], (size, size), (14, 14))[0]


@given(seed=st.integers(0, 2**31), flip=st.booleans(), patch=st.sampled_from([(6, 96), (14, 224)]))
def test_cells_are_those_of_the_released_code_s_map(seed: int, flip: bool, patch: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    sides, places = rng.integers(30, 150, (2, 2)), rng.integers(0, 50, (2, 2))
    (rw, rh), (qw, qh) = sides.tolist()
    (rx, ry), (qx, qy) = places.tolist()
    size, view = patch
    differs = cells_by_centre((rx, ry, rw, rh), (qx, qy, qw, qh), flip, size) != cells_by_map(
        (rx, ry, rw, rh), (qx, qy, qw, qh), flip, size, view
    )

    share = (torch.arange(size) + 0.5) / size
    x, y = qx + (1 - share if flip else share) * qw, qy + share * qh
    u, v = (x - rx) / rw * 14, (y - ry) / rh * 14
    near = lambda place, side, query: (  # noqa: E731
        (place - place.round()).abs() * side / 14 <= 0.5 + 0.5 * query / view + 1e-3
    )
    # within half a source pixel and half a pixel of the view
    is_near_edge = near(v, rh, qh)[:, None] | near(u, rw, qw)[None, :]
    assert not (differs.reshape(size, size) & ~is_near_edge).any()


def test_one_label_in_twenty_is_not_that_of_the_released_code() -> None:  # at ImageNet's sizes
    crops, rng = tiny(num_small_queries=9).make_views(224), np.random.default_rng(0)
    differing = total = 0
    for _ in range(60):
        (ry, rx, rh, rw), *queries = crops.draw_boxes(rng, 375, 500)
        for number, (qy, qx, qh, qw) in enumerate(queries):
            size, view = (14, 224) if number == 0 else (6, 96)
            ours = cells_by_centre((rx, ry, rw, rh), (qx, qy, qw, qh), False, size)
            theirs = cells_by_map((rx, ry, rw, rh), (qx, qy, qw, qh), False, size, view)
            differing, total = differing + int((ours != theirs).sum()), total + len(ours)
    assert 0.04 < differing / total < 0.065


def test_weights_start_as_in_the_released_code() -> None:
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=96, depth=1, num_heads=3, class_token=False, seed=0
    )
    method = LOCA(encoder, LOCAConfig(num_prototypes=64, hidden_dim=128, bottleneck_dim=32))
    xavier = lambda inputs, outputs: math.sqrt(6 / (inputs + outputs))  # noqa: E731
    block = method.student.encoder.vit.blocks[0]
    for joint in (block.attn.qkv.weight, method.relative.attn.in_proj_weight):
        for part in joint.chunk(3):  # each a matrix of its own
            assert 0.99 * xavier(96, 96) < part.abs().max().item() <= xavier(96, 96)
    for layer in (block.mlp.fc1, method.relative.mlp.fc1):
        assert 0.99 * xavier(96, 384) < layer.weight.abs().max().item() <= xavier(96, 384)
        assert 0 < layer.bias.abs().max().item() < 1e-5
    assert not block.attn.proj.bias.any() and not block.attn.qkv.bias.any()
    lecun = (encoder.vit.patch_embed.proj, method.student.head.mlp[0], method.position_head)
    for layer, inputs in zip(lecun, (192, 96, 96), strict=True):
        std = inputs**-0.5
        assert_close(layer.weight.std().item(), std, rtol=0.05, atol=0)
        assert layer.weight.abs().max().item() <= 2 * std / 0.8796 and not layer.bias.any()
    assert_close(method.student.prototypes.weight.norm(dim=-1), torch.ones(64))
    trained = build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    trained.pretrained, before = True, trained.vit.blocks[0].attn.qkv.weight.clone()
    assert torch.equal(LOCA(trained, LOCAConfig(**SMALL)).student.encoder.vit.blocks[0].attn.qkv.weight, before)


def test_colours_and_crops_are_tensorflow_s() -> None:
    for spec in tiny().make_views(32).specs:
        assert spec.uniform == "height" and spec.aspect == (0.75, 1.33)
        assert spec.color.add_brightness and spec.color.brightness == 0.4


def test_a_vit_sees_39_reference_70_large_and_36_small_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=224, embed_dim=24, depth=1, num_heads=3, class_token=False, seed=0
    )
    method = LOCA(encoder, LOCAConfig(**{**SMALL, "num_small_queries": 9}))
    crops = method.make_views(224)
    assert [(spec.count, spec.size, spec.scale) for spec in crops.specs] == [
        (1, 224, (0.32, 1.0)),
        (1, 224, (0.32, 1.0)),
        (9, 96, (0.05, 0.32)),
    ]
    seen = []
    relative = method.relative.forward
    monkeypatch.setattr(method.relative, "forward", lambda q, r: seen.append((q.shape, r.shape)) or relative(q, r))
    method(batch(method, 1, 224), 0.0)
    assert seen == [((1, 70 + 9 * 36, 24), (1, 39, 24))]


def test_kept_reference_tokens_are_consecutive_anywhere() -> None:
    kept = tiny(reference_keep_ratio=0.25)._draw_reference(torch.arange(400), 16)
    assert (kept.diff(dim=1) == 1).all()
    assert sorted(set(kept[:, 0].tolist())) == list(range(13))


def test_token_drops_are_redrawn_at_each_step() -> None:
    method = tiny()
    first, again, later = (method._draw_large(step_key(p), 16) for p in (0.0, 0.0, 0.001))
    assert len(first) == 1 and torch.equal(first, again) and not torch.equal(first, later)


def test_equal_logits_cost_log_k_over_labelled_tokens_only() -> None:
    labels = torch.tensor([[0, -1, 3], [-1, -1, 2]])
    assert_close(position_loss(torch.zeros(2, 3, 4), labels).item(), math.log(4), rtol=1e-6, atol=0)
    logits = torch.randn(2, 3, 4)
    terms = [-logits[b, q].log_softmax(-1)[labels[b, q]] for b, q in ((0, 0), (0, 2), (1, 2))]
    assert_close(position_loss(logits, labels), torch.stack(terms).mean())
    assert position_loss(logits, torch.full((2, 3), -1)) == 0


def test_clusters_by_plain_loops() -> None:
    student, target = torch.randn(2, 3, 5).log_softmax(-1), torch.rand(2, 4, 5)
    cells = torch.tensor([[3, -1, 0], [1, 1, -1]])
    terms = [-(target[b, cells[b, q]] * student[b, q]).sum() for b, q in ((0, 0), (0, 2), (1, 0), (1, 1))]
    assert_close(cluster_loss(student, target, cells), torch.stack(terms).mean())


def test_me_max_is_least_where_all_prototypes_are_used() -> None:
    one_each = torch.eye(4)[None].clamp(min=1e-30).log()
    assert_close(me_max(one_each).item(), -math.log(4), rtol=1e-5, atol=0)
    assert_close(me_max(one_each[:, :1]).item(), 0.0, rtol=0, atol=1e-6)


def test_the_losses_have_the_right_gradients() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, -1, 3], [-1, -1, 2]])
    target = torch.rand(2, 4, 4, dtype=torch.float64)
    assert gradcheck(lambda x: position_loss(x, labels), logits)
    assert gradcheck(lambda x: cluster_loss(x.log_softmax(-1), target, labels), logits)
    assert gradcheck(lambda x: me_max(x.log_softmax(-1)), logits)


def test_cross_attention_by_hand() -> None:
    block = CrossAttentionBlock(8, 2)
    queries, tokens = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    q_in, kv_in = block.query_norm(queries), block.token_norm(tokens)
    q, k, v = (
        F.linear(x, w, b)
        for x, w, b in zip(
            (q_in, kv_in, kv_in), block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True
        )
    )
    heads = [(q[..., part] @ k[..., part].mT / 2).softmax(-1) @ v[..., part] for part in (slice(0, 4), slice(4, 8))]
    x = queries + block.attn.out_proj(torch.cat(heads, -1))
    hidden = F.gelu(block.mlp.fc1(block.mlp_norm(x)), approximate="tanh")
    assert_close(block(queries, tokens), x + block.mlp.fc2(hidden))
    with pytest.raises(ConfigError, match="3 cross-attention heads don't divide"):
        CrossAttentionBlock(8, 3)


@pytest.mark.parametrize("cluster", [True, False])
def test_the_step_is_the_papers_computed_the_long_way(cluster: bool) -> None:
    method = tiny(cluster=cluster).eval()
    views = batch(method)
    if cluster:
        with torch.no_grad():  # a student that no longer equals its teacher
            for parameter in method.student.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    losses = method(views, 0.25)

    def encode(network: torch.nn.Module, images: torch.Tensor, ids: torch.Tensor, position: bool) -> torch.Tensor:
        encoder, vit = network.encoder, network.encoder.vit
        grid = images.shape[-1] // 8
        tokens = vit.patch_embed(encoder.normalize(images)).flatten(1, 2)
        table = vit.pos_embed.mT.reshape(1, 24, 4, 4)
        if grid != 4:
            table = F.interpolate(table, (grid, grid), mode="bilinear", antialias=True)
        tokens = tokens + table.flatten(2).mT if position else tokens
        return vit.norm(vit.blocks(tokens[:, ids]))

    key = torch.tensor([0.25], dtype=torch.float64).view(torch.int64)
    start = int(sample_uniform(key, 1, 0) * 14)
    kept, large = torch.arange(start, start + 3), random_mask(sample_uniform(key, 16, 1), 6)[0][0]
    everything = torch.arange(16)
    student, teacher = method.student, method.teacher.module if cluster else None
    shown = (
        encode(teacher, views.crops[0], everything, True)[:, kept]
        if cluster
        else encode(student, views.crops[0], kept, True)
    )
    if cluster:
        reference = teacher.logits(encode(teacher, views.crops[0], everything, True))
        target = sinkhorn(reference.flatten(0, 1), 0.05, 3, True).reshape(3, 16, 16)
    position_costs, cluster_costs, assignments = [], [], []
    for view, crops in enumerate((views.crops[1], *views.crops[2].split(3)), start=1):
        ids = large if view == 1 else torch.arange((crops.shape[-1] // 8) ** 2)
        tokens = encode(student, crops, ids, cluster)
        logits = method.position_head(method.norm(method.relative(tokens, shown)))
        side = crops.shape[-1] // 8
        for b in range(3):
            where, ref = views.boxes[3 * view + b].tolist(), views.boxes[b].tolist()
            for place, patch in enumerate(ids.tolist()):
                u, v = (patch % side + 0.5) / side, (patch // side + 0.5) / side
                u = 1 - u if views.flips[3 * view + b] else u
                x, y = where[0] + u * (where[2] - where[0]), where[1] + v * (where[3] - where[1])
                column = math.floor((x - ref[0]) / (ref[2] - ref[0]) * 4)
                row = math.floor((y - ref[1]) / (ref[3] - ref[1]) * 4)
                log_pred = None
                if cluster:
                    log_pred = (student.logits(tokens[b, place][None, None])[0, 0] / 0.1).log_softmax(-1)
                    assignments.append(log_pred.exp())
                if 0 <= column < 4 and 0 <= row < 4:
                    position_costs.append(-logits[b, place].log_softmax(-1)[4 * row + column])
                    if cluster:
                        cluster_costs.append(-(target[b, 4 * row + column] * log_pred).sum())
    assert_close(losses["position"], torch.stack(position_costs).mean(), rtol=1e-4, atol=1e-5)
    if cluster:
        mean = torch.stack(assignments).mean(0)
        assert_close(losses["cluster"], torch.stack(cluster_costs).mean(), rtol=1e-4, atol=1e-5)
        assert_close(losses["me_max"], (mean * mean.log()).sum(), rtol=1e-4, atol=1e-5)


def test_without_the_cluster_loss_there_is_no_teacher_and_queries_have_no_positions() -> None:
    method = tiny(cluster=False)
    assert list(method.networks()) == ["student"] and list(method(batch(method), 0.0)) == ["position"]
    seen = []
    positions = method.student.encoder.positions
    method.student.encoder.positions = lambda grid: seen.append(grid) or positions(grid)
    method(batch(method), 0.0)
    assert seen == [(4, 4)]  # the reference's alone


def test_both_readings_of_the_blur() -> None:
    released, intended = (tiny(blur=blur).make_views(32).specs for blur in ("released", "intended"))
    assert [spec.blur_prob for spec in released] == [0.0, 0.0, 0.0]
    assert [spec.blur_prob for spec in intended] == [1.0, 0.1, 0.5]
    assert [spec.flip_prob for spec in released] == [0.0, 0.5, 0.5]
    assert [spec.solarize_prob for spec in released] == [0.0, 0.2, 0.0]
    assert len(tiny(num_small_queries=0).make_views(32).specs) == 2


def test_positions_are_learned_and_resized_linearly() -> None:
    encoder = tiny().student.encoder
    assert encoder.pos_mode == "bilinear" and encoder.vit.pos_embed.requires_grad
    assert abs(encoder.vit.pos_embed.std().item() - 24**-0.5) < 0.03


def test_the_teacher_follows_the_student() -> None:
    method = tiny(momentum=0.5)
    before = method.teacher.module.encoder.vit.norm.weight.clone()
    with torch.no_grad():
        method.student.encoder.vit.norm.weight += 1
    method.after_step(0.0)
    assert_close(method.teacher.module.encoder.vit.norm.weight, before + 0.5)


def test_a_short_run_finds_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smalti.methods.loca.LARGE_SCALE", (0.7, 1.0))
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    down = np.linspace(0, 1, 48)[:, None, None]
    for number in range(16):  # from one colour to another: the jitter of brightness hides rows of grey images
        image = (1 - down) * [20, 110, 220] + down * [220, 110, 20] + rng.normal(0, 5, (48, 48, 3))
        cv2.imwrite(str(photos / f"{number:02d}.png"), np.clip(image, 0, 255).astype(np.uint8))
    settings = {
        "encoder": {
            "name": "vit_tiny_patch16_224",
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 3,
            "class_token": False,
        },
        "data": {"image_size": 32},
        "method": {**SMALL, "reference_keep_ratio": 0.5, "momentum": 0.9},
        "steps": 120,
        "batch_size": 16,
        "drop_path": 0.0,
        "optim": {"lr": 5e-3},
        "log": {"every": 40},
    }
    rows = read_csv(train("loca", photos, tmp_path / "run", overrides=settings, quiet=True) / LOG_FILE)
    chance = math.log(16)  # of the 16 cells; the best by rows alone is about log 4, and an accuracy of 1/4
    assert float(rows[-1]["loss/position"]) < chance - 0.3
    assert float(rows[-1]["position_accuracy"]) - 1 / 16 > (1 / 4 - 1 / 16) / 3


def test_mistakes_are_one_line_each() -> None:
    with pytest.raises(ConfigError, match=r"LOCAConfig.reference_keep_ratio=0.0: more than 0 is needed"):
        tiny(reference_keep_ratio=0.0)
    with pytest.raises(ConfigError, match=r"LOCAConfig.momentum=.* is needed"):
        tiny(momentum=2.0)
    with pytest.raises(ConfigError, match=r"method.reference_keep_ratio=0.01 keeps 0 of 16 patches"):
        few = tiny(reference_keep_ratio=0.01)
        few(batch(few), 0.0)
