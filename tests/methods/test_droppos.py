"""DropPos against its definition."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.functional.masking import random_mask
from smalti.functional.positions import matching_cells
from smalti.functional.random import sample_uniform
from smalti.methods.droppos import (
    DropPos,
    DropPosConfig,
    legacy_labels,
    position_loss,
    similarity_to_class,
    smoothed_labels,
)
from smalti.models.build import build_encoder
from smalti.models.pooling import PatchFeatures
from smalti.runs.train import train
from smalti.training.logs import LOG_FILE, read_csv


def tiny(img_size: int = 32, class_token: bool = True, **config: object) -> DropPos:
    torch.manual_seed(0)
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        img_size=img_size,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        class_token=class_token,
        seed=0,
    )
    return DropPos(encoder, DropPosConfig(**{"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, **config}))


def views(images: torch.Tensor) -> Views:
    batch = len(images)
    return Views(
        crops=(images,),
        boxes=torch.zeros(batch, 4),
        flips=torch.zeros(batch, dtype=torch.bool),
        source_size=torch.full((batch, 2), 32),
        index=torch.arange(batch),
        keys=torch.arange(batch),
        skipped=(),
    )


def noise(batch: int = 3, size: int = 32) -> Views:
    generator = torch.Generator().manual_seed(1)
    return views(torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator))


@given(h=st.integers(1, 6), w=st.integers(1, 6), sigma=st.floats(0.0, 3.0))
def test_labels_are_distributions_that_peak_at_the_true_cell(h: int, w: int, sigma: float) -> None:
    table = smoothed_labels((h, w), sigma)
    assert_close(table.sum(1), torch.ones(h * w))
    assert torch.equal(table.argmax(1), torch.arange(h * w))


def test_without_spread_a_label_is_its_cell_alone() -> None:
    assert torch.equal(smoothed_labels((14, 14), 0.0), torch.eye(196))
    assert torch.equal(legacy_labels((14, 14), 16, 0.0), torch.eye(196))


def test_smoothing_is_the_definition_by_plain_loops() -> None:
    table = smoothed_labels((3, 4), 0.8)
    for m in range(12):
        weights = [math.exp(-((m // 4 - n // 4) ** 2 + (m % 4 - n % 4) ** 2) / 0.8**2) for n in range(12)]
        assert_close(table[m], torch.tensor(weights) / sum(weights))


def test_a_cell_s_neighbours_are_those_of_the_14_by_14_grid() -> None:
    table = smoothed_labels((14, 14), 1.0)
    assert sorted(table[100].topk(5).indices.tolist()) == [86, 99, 100, 101, 114]


def test_the_released_table_has_its_quirks() -> None:  # known answers
    table = legacy_labels((14, 14), 16, 1.0)
    assert sorted(table[100].topk(5).indices.tolist()) == [84, 99, 100, 101, 116]
    assert_close(table[0].sum().item(), 0.886, rtol=0, atol=5e-4)
    assert_close(table[195].sum().item(), 0.66, rtol=0, atol=5e-3)
    assert_close(table[100].sum().item(), 1.0, rtol=0, atol=1e-3)  # in the middle of both grids


def test_the_spread_shrinks_to_nothing() -> None:
    method = tiny()
    assert_close(method.label_table(0.25), smoothed_labels((4, 4), 0.75))
    assert torch.equal(method.label_table(1.0), torch.eye(16))
    assert torch.equal(tiny(sigma_decay=False).label_table(1.0), smoothed_labels((4, 4), 1.0))


def test_equal_logits_cost_log_k_and_the_truth_its_own_entropy() -> None:
    table = smoothed_labels((3, 3), 1.0)[None]
    weights = torch.rand(1, 9) + 0.1
    assert_close(position_loss(torch.zeros(1, 9, 9), table, weights).item(), math.log(9), rtol=1e-6, atol=0)
    entropy = torch.special.entr(table).sum(-1)
    assert_close(position_loss(table.log(), table, weights), (entropy * weights).sum() / weights.sum())


def test_tokens_count_by_their_weights_over_the_whole_batch() -> None:
    logits, target = torch.randn(2, 3, 5), torch.randn(2, 3, 5).softmax(-1)
    weights = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.5]])
    terms = [weights[b, m] * F.cross_entropy(logits[b, m], target[b, m]) for b in range(2) for m in range(3)]
    assert_close(position_loss(logits, target, weights), torch.stack(terms).sum() / 3.5)
    assert position_loss(logits, target, torch.zeros(2, 3)) == 0


def test_the_loss_has_the_right_gradient() -> None:
    target = torch.randn(2, 2, 4, dtype=torch.float64).softmax(-1)
    logits = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: position_loss(x, target, torch.tensor([[1.0, 2.0], [0.5, 0.0]]).double()), logits)


def test_a_vit_sees_49_of_196_patches_and_the_places_of_12(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder("vit_tiny_patch16_224", img_size=224, embed_dim=24, depth=1, num_heads=3, seed=0)
    method = DropPos(encoder, DropPosConfig(decoder_dim=16, decoder_depth=1, decoder_num_heads=2))
    method.pos_token.data.fill_(7.0)
    sequences, given = [], []
    forward, assemble = encoder.forward_tokens, encoder.assemble
    monkeypatch.setattr(encoder, "forward_tokens", lambda x, **more: sequences.append(x.shape) or forward(x, **more))
    monkeypatch.setattr(
        encoder, "assemble", lambda x, positions, *ids: given.append(positions[0]) or assemble(x, positions, *ids)
    )
    method(noise(2, 224), 0.0)
    assert sequences == [(2, 1 + 49, 24), (2, 1 + 196, 24)]  # the second one weighs the patches
    is_dropped = (given[0] == 7.0).all(-1)
    assert is_dropped.sum(1).tolist() == [37, 37]
    table = encoder.vit.pos_embed[0, 1:]
    assert all((row - table).abs().amax(1).min() < 1e-6 for row in given[0][~is_dropped])


@pytest.mark.parametrize("attentive", [False, True])
def test_the_step_is_the_papers_computed_the_long_way(attentive: bool) -> None:
    method, batch = tiny(attentive=attentive, pos_mask_ratio=0.5, mask_ratio=0.5).eval(), noise()
    loss = method(batch, 0.3)["position"]

    encoder, decoder, vit = method.encoder, method.decoder, method.encoder.vit
    x = encoder.normalize(batch.crops[0])
    ids_keep, _, _ = random_mask(sample_uniform(batch.keys, 16), 8)
    order = sample_uniform(batch.keys, 8, stream=1).argsort(dim=1)
    everything = vit.patch_embed(x).flatten(1, 2)
    full = vit.norm(vit.blocks(torch.cat([vit.cls_token.expand(3, -1, -1), everything + vit.pos_embed[:, 1:]], 1)))
    table = smoothed_labels((4, 4), 0.7)
    cost = weight = torch.zeros(())
    for b in range(3):
        tokens, dropped = [vit.cls_token[0, 0]], order[b, 4:].tolist()
        for place, patch in enumerate(ids_keep[b].tolist()):
            position = method.pos_token[0, 0] if place in dropped else vit.pos_embed[0, 1 + patch]
            tokens.append(everything[b, patch] + position)
        hidden = decoder.embed(vit.norm(vit.blocks(torch.stack(tokens)[None])))
        logits = decoder.head(decoder.norm(decoder.blocks(hidden)))[0, 1:]
        likeness = torch.stack([F.cosine_similarity(full[b, 0], full[b, 1 + n], dim=0) for n in range(16)])
        likeness = (likeness / 0.1).softmax(0)
        likeness = likeness / likeness[ids_keep[b]].sum()
        for place in dropped:
            patch = ids_keep[b, place]
            w = likeness[patch] if attentive else 1.0
            cost = cost + w * F.cross_entropy(logits[place], table[patch])
            weight = weight + w
    assert_close(loss, cost / weight, rtol=1e-5, atol=1e-6)


def test_dropped_positions_do_not_reach_the_network() -> None:
    method = tiny(attentive=False).eval()
    batch = noise()
    before = method(batch, 0.0)["position"]
    ids_keep, _, _ = random_mask(sample_uniform(batch.keys[:1], 16), 4)
    known = ids_keep[0, sample_uniform(batch.keys[:1], 4, stream=1).argsort(dim=1)[0, :1]]
    one = Views(
        batch.crops[:1], **{k: getattr(batch, k)[:1] for k in ("boxes", "flips", "source_size", "index", "keys")}
    )
    one.crops = (batch.crops[0][:1],)
    alone = method(one, 0.0)["position"]
    with torch.no_grad():
        others = [n for n in range(16) if n != int(known)]
        method.encoder.vit.pos_embed[:, [1 + n for n in others]] += torch.randn(15, 24)
    assert torch.equal(method(one, 0.0)["position"], alone)
    assert not torch.equal(method(batch, 0.0)["position"], before)  # the other images' known patches are among them


def test_stand_ins_for_positions() -> None:
    for kind in ("zeros", "shuffled"):
        method = tiny(pos_token=kind, mask_ratio=0.0, pos_mask_ratio=0.5)
        assert method.pos_token is None
        ids = torch.arange(16).flip(0)[None].repeat(2, 1)
        dropped = torch.stack([torch.arange(8), torch.arange(4, 12)])
        is_dropped = torch.zeros(2, 16, dtype=torch.bool).scatter(1, dropped, True)
        shown = method._positions_with_gaps((4, 4), ids, dropped, is_dropped)[0]
        table = method.encoder.vit.pos_embed[0, 1:]
        assert_close(shown[~is_dropped], table[ids[~is_dropped]])
        if kind == "zeros":
            assert shown[is_dropped].abs().max() == 0
        else:
            seen = torch.cdist(shown, table[None]).argmin(-1)
            assert (seen != ids)[is_dropped].all()  # each has a wrong one
            assert torch.equal(seen.sort(1).values, ids.sort(1).values)


def test_weights_of_patches_by_hand() -> None:
    features = PatchFeatures(torch.tensor([[[2.0, 0.0], [0.0, 3.0]]]), torch.tensor([[[5.0, 0.0]]]), (1, 2))
    weights = similarity_to_class(features)[0]
    assert_close(weights, torch.tensor([math.exp(10), 1.0]) / (math.exp(10) + 1))


def test_confident_tokens_are_left_out() -> None:
    method, batch = tiny(ignore_confident=True, attentive=False, sigma=0.0), noise()
    plain = tiny(attentive=False, sigma=0.0)(batch, 0.0)["position"]
    assert_close(method(batch, 0.0)["position"], plain)  # no likelihood exceeds that of the true cell alone: 1
    smooth = tiny(ignore_confident=True, attentive=False, sigma=50.0, sigma_decay=False)
    with torch.no_grad():
        smooth.decoder.head.weight.zero_()
        smooth.decoder.head.bias.fill_(-20.0)
        smooth.decoder.head.bias[0] = 20.0
    ids_keep, _, _ = random_mask(sample_uniform(batch.keys, 16), 4)
    order = sample_uniform(batch.keys, 4, stream=1).argsort(dim=1)
    is_first = ids_keep.gather(1, order[:, 1:]) == 0
    log_pred = smooth.decoder.head.bias.log_softmax(0)
    costs = -(smoothed_labels((4, 4), 50.0) @ log_pred)[ids_keep.gather(1, order[:, 1:])]
    assert_close(smooth(batch, 0.0)["position"], costs[~is_first].mean())


def test_reconstruction_joins_in() -> None:
    method, batch = tiny(reconstruct=True), noise()
    losses = method(batch, 0.0)
    assert sorted(losses) == ["position", "reconstruction"]
    both = tiny(reconstruct=True, decoder_depth=2)
    assert len(both.pixel_decoder.blocks) == len(both.decoder.blocks) == 2  # as in the released code
    method.pixel_decoder = None
    assert_close(losses["position"], 0.05 * method(batch, 0.0)["position"])


def test_cells_of_another_grid() -> None:
    assert torch.equal(matching_cells((4, 4), (4, 4)), torch.arange(16))
    assert matching_cells((1, 4), (1, 2)).tolist() == [0, 0, 1, 1]
    assert matching_cells((2, 2), (4, 4)).tolist() == [5, 7, 13, 15]  # a centre on an edge is the later cell's


def test_the_default_decoder_of_a_vit_base_is_the_published_one() -> None:
    decoder = DropPos(build_encoder("vit_base_patch16_224", depth=1), DropPosConfig()).decoder
    assert (decoder.embed.out_features, len(decoder.blocks), decoder.blocks[0].attn.num_heads) == (512, 2, 16)
    assert decoder.head.weight.shape == (196, 512)


def test_a_short_run_finds_positions(graded_photos: Path, tmp_path: Path) -> None:
    settings = {
        "encoder": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
        "data": {"image_size": 32},
        "method": {
            "decoder_dim": 16,
            "decoder_depth": 1,
            "decoder_num_heads": 2,
            "mask_ratio": 0.25,
            "crop_scale": [0.8, 1.0],
        },
        "steps": 150,
        "batch_size": 16,
        "optim": {"lr": 5e-3},
        "log": {"every": 10},
    }
    rows = read_csv(train("droppos", graded_photos, tmp_path / "run", overrides=settings, quiet=True) / LOG_FILE)
    accuracy = [float(row["position_accuracy"]) for row in rows]
    assert accuracy[0] < 1 / 16 and accuracy[-1] > 2 / 16  # chance is 1/16, give or take 0.006, the best by rows 1/4


def test_mistakes_are_one_line_each() -> None:
    with pytest.raises(ConfigError, match=r"DropPosConfig.mask_ratio=1.0: less than 1 is needed"):
        tiny(mask_ratio=1.0)
    with pytest.raises(ConfigError, match=r"DropPosConfig.pos_mask_ratio=0.0: more than 0 is needed"):
        tiny(pos_mask_ratio=0.0)
    with pytest.raises(ConfigError, match=r"DropPosConfig.sigma=.*: at least 0 is needed"):
        tiny(sigma=-1.0)
    with pytest.raises(ConfigError, match=r"use method.attentive=false"):
        tiny(class_token=False)
    with pytest.raises(ConfigError, match=r"8x8 cells .* fewer than the 10x10 patches"):
        tiny(img_size=80, legacy_smoothing=True)
    with pytest.raises(ConfigError, match="needs masked patches"):
        tiny(mask_ratio=0.0, reconstruct=True)
    with pytest.raises(ConfigError, match="decoder_dim=16 must be a multiple of decoder_num_heads=3"):
        tiny(decoder_num_heads=3)


def windows(**config: object) -> DropPos:
    """On windows of signals of two channels in ten patches."""
    torch.manual_seed(0)
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        img_size=(1, 80),
        in_chans=2,
        patch_size=[1, 8],
        embed_dim=24,
        depth=1,
        num_heads=3,
        mean=(0.0,),
        std=(1.0,),
        seed=0,
    )
    return DropPos(encoder, DropPosConfig(**{"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, **config}))


def test_labels_of_signals_are_smoothed_along_time() -> None:
    method = windows(sigma=1.5)
    table = method.label_table(0.0)
    assert table.shape == (10, 10)
    for m in range(10):
        weights = [math.exp(-((m - n) ** 2) / 1.5**2) for n in range(10)]
        assert_close(table[m], torch.tensor(weights) / sum(weights))
    assert torch.equal(method.label_table(1.0), torch.eye(10))


def test_windows_of_signals_are_not_augmented_and_positions_of_the_row_are_predicted() -> None:
    method = windows(mask_ratio=0.2, attentive=False)
    window = np.random.default_rng(0).normal(size=(1, 80, 2)).astype(np.float32)
    assert_close(method.make_views(0)(window, np.random.default_rng(1)).crops[0][0], window)
    batch = views(torch.from_numpy(window).permute(2, 0, 1)[None].repeat(3, 1, 1, 1))
    loss = method(batch, 1.0)["position"]  # one-hot labels
    ids_keep, _, _ = random_mask(sample_uniform(batch.keys, 10), 8)
    dropped = sample_uniform(batch.keys, 8, 1).argsort(dim=1, stable=True)[:, 2:]
    positions = method.encoder.positions((1, 10))
    assert positions is not None
    patch_pos = positions[0].expand(3, -1, -1).gather(1, ids_keep[..., None].expand(-1, -1, 24)).clone()
    for row, lost in enumerate(dropped.tolist()):
        patch_pos[row, lost] = method.pos_token[0]
    tokens, _ = method.encoder.embed_patches(batch.global_crops, ids_keep)
    sequence = method.encoder.forward_tokens(method.encoder.assemble(tokens, (patch_pos, positions[1])))
    logits = method.decoder(sequence, dropped + 1)
    expected = F.cross_entropy(logits.flatten(0, 1), ids_keep.gather(1, dropped).flatten())
    assert_close(loss, expected)


def test_the_table_of_the_released_code_is_for_images() -> None:
    with pytest.raises(ConfigError, match=r"legacy_smoothing=True: .* the patches of signals lie in a row; leave"):
        windows(legacy_smoothing=True)
