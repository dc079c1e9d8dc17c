"""Orders of all images: what is found is what the image shows, for both flip states, within memory."""

import cv2
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from brightness import Bright
from smalti.data.images.folders import open_images
from smalti.data.images.labelled import eval_image
from smalti.data.order_files import check_fits, read_orders
from smalti.errors import ConfigError, DataError
from smalti.functional.graphs import descending, pagerank
from smalti.functional.patches import patchify
from smalti.models.build import build_encoder
from smalti.ranking.rankers import (
    AttentionRanker,
    GraphRanker,
    PixelRanker,
    check_memory,
    choose_names,
    largest_batch,
    patch_variance,
    rank_images,
)


def test_bright_patches_come_first_in_each_image_and_its_mirror_image(bright, pictures, tmp_path):
    images = open_images(str(pictures))
    told = []
    ranked = rank_images(
        bright, images, bright.default, batch_size=3, progress=lambda what, done, total: told.append((done, total))
    )
    assert told[-1] == (9, 9) and len(ranked.skipped) == 1 and ranked.skipped[0].path.name == "z.png"
    assert len(ranked.places) == 16 and sum(ranked.flips) == 8
    ranked.write(tmp_path / "o.parquet", bright)
    cache = read_orders(tmp_path / "o.parquet")
    assert cache.unreadable == {"train/a/z.png"} and cache.seconds["variance"] > 0
    assert cache.grid == (4, 4) and cache.source == "a toy"
    for sample, name in zip(images.samples, images.names, strict=True):
        if name.endswith("z.png"):
            continue
        shown = eval_image(sample.path, 32, 3, "centre")
        for flip in (False, True):
            light = (shown[:, ::-1] if flip else shown).reshape(4, 8, 4, 8, 3).mean((1, 3, 4)).flatten()
            expected = (-light).argsort(kind="stable").tolist()
            for order in ("collapse", "in_strength"):
                assert cache.orders(order, [name], [flip])[0].tolist() == expected
            assert cache.orders("coverage", [name], [flip])[0, 0] == expected[0]
    assert set(cache.scores) == {"collapse", "in_strength", "variance"}
    check_fits(cache, images, (4, 4), flips_needed=True)  # the damaged one is known to be
    lost = next(name for name in images.names if name.endswith("z.png"))
    for order in ("collapse", "collapse_shuffled", "collapse_reversed"):
        assert cache.table(order, images.names)[images.names.index(lost)].tolist() == [list(range(16))] * 2
    assert set(cache.seconds) == set(bright.default) and all(0 < value < 10 for value in cache.seconds.values())
    whole = cache.scores["collapse"].sum(1)
    assert_close(whole, torch.ones_like(whole))


def test_scores_are_pagerank_of_the_graph(pictures):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8))
    toy = Bright()
    found = GraphRanker(toy, 8, "a toy", damping=0.5).rank(images, ["collapse"])["collapse"]
    scores = pagerank(toy.dependency(images), damping=0.5)
    assert_close(found.score, scores) and torch.equal(found.order, descending(scores))


def test_batches_and_chunks_leave_orders_as_they_are(bright, pictures):
    images = open_images(str(pictures))
    one = rank_images(bright, images, bright.default, batch_size=1)
    four = rank_images(bright, images, bright.default, batch_size=4)
    at = {place: row for row, place in enumerate(zip(four.places, four.flips, strict=True))}
    rows = [at[place] for place in zip(one.places, one.flips, strict=True)]
    assert all(torch.equal(one.orders[name], four.orders[name][rows]) for name in bright.default)


def test_equal_scores_are_counted(pictures):
    class Even(Bright):
        def dependency(self, images, chunk=None):
            return torch.full((len(images), 16, 16), 0.5)

    ranked = rank_images(GraphRanker(Even(), 8, "even"), open_images(str(pictures)), ["collapse"], both_flips=False)
    assert ranked.degenerate["collapse"].all() and not any(ranked.flips)
    assert ranked.orders["collapse"].tolist() == [list(range(16))] * 8


@pytest.mark.parametrize("registers", [0, 3])
def test_attention_is_the_class_tokens_in_the_last_block(registers):
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3, reg_tokens=registers
    ).eval()
    ranker = AttentionRanker(encoder, "mine")
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8))
    found = ranker.rank(images, ["attention"])["attention"]
    vit = encoder.vit
    block = vit.blocks[-1]
    features = encoder.assemble(
        *(lambda tokens, grid: (tokens, encoder.positions(grid)))(*encoder.embed_patches(encoder.normalize(images)))
    )
    with torch.no_grad():
        x = vit.blocks[0](vit.norm_pre(features))
        x = block.norm1(x)
        qkv = block.attn.qkv(x).reshape(4, x.shape[1], 3, 3, 8).permute(2, 0, 3, 1, 4)
        weights = (qkv[0][:, :, :1] @ qkv[1].mT / 8**0.5).softmax(-1)[:, :, 0, 1 + registers :].mean(1)
    assert_close(found.score, weights) and torch.equal(found.order, descending(weights))


def test_an_encoder_that_cannot_rank():
    without = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, class_token=False, global_pool="avg"
    )
    with pytest.raises(ConfigError, match="mine has no class token, whose attention ranks the patches"):
        AttentionRanker(without, "mine")


def test_variance_is_that_of_a_patch_in_all_channels():
    images = torch.rand(2, 3, 16, 16)
    assert_close(patch_variance(images, (2, 2)), patchify(images, (8, 8)).var(-1, correction=0))
    whole = (images * 255).round().byte()
    assert_close(patch_variance(whole, (2, 2)), patch_variance(whole.float() / 255, (2, 2)))


def test_pictures_of_sixteen_bits_and_of_one_channel(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), rng.integers(0, 2**16, (40, 40), dtype=np.uint16))
    cv2.imwrite(str(tmp_path / "4.png"), rng.integers(0, 2**8, (40, 40), dtype=np.uint8))
    ranked = rank_images(PixelRanker(32, 1, (4, 4), "pixels"), open_images(str(tmp_path)), ["variance"])
    assert ranked.orders["variance"].shape == (8, 16) and len(ranked.scores["variance"].unique()) > 20


def test_names_that_a_ranker_can_give(bright):
    asked, named = choose_names(bright, [])
    assert asked == bright.default and set(named) - set(asked) == {
        "collapse_reversed",
        "collapse_static",
        "collapse_shuffled",
    }
    assert choose_names(bright, ["collapse_static", "halton", "fixed_random:3", "variance"]) == (
        ("collapse", "variance"),
        ("collapse_static", "halton", "fixed_random:3", "variance"),
    )
    pixels = PixelRanker(32, 3, (4, 4), "runs/mae")
    with pytest.raises(
        ConfigError, match="order 'collapse_static' needs a run of comae; runs/mae has variance, raster"
    ):
        choose_names(pixels, ["collapse_static"])
    with pytest.raises(ConfigError, match="order 'attention' needs an encoder with a class token; a toy has collapse"):
        choose_names(bright, ["attention"])
    with pytest.raises(ConfigError, match="there is no order 'colapse'"):
        choose_names(bright, ["colapse"])


def test_what_does_not_fit_into_memory_is_refused_with_what_does(bright):
    assert bright.bytes_needed(8) > 8 * 4 * 16**2 * 4
    free = bright.bytes_needed(5) + 10_000
    assert largest_batch(bright, free - 8 * 16 * 6) == 5
    check_memory(bright, 5, 8, 1, free, "cpu")
    with pytest.raises(
        ConfigError,
        match=r"batch_size=64: graphs of 16x16 patches need about .* MiB, but .* is free on cpu; batch_size=5 fits",
    ):
        check_memory(bright, 64, 8, 1, free, "cpu")
    tall = GraphRanker(Bright(64, 2), 64, "a toy")
    free = tall.bytes_needed(1) - tall.pass_bytes * (tall.targets_at_once(1) - 3)
    with pytest.raises(ConfigError, match=r"batch_size=1: graphs of 1024x1024 .*; batch_size=1 chunk=3 fits"):
        check_memory(tall, 1, 0, 1, free, "a GPU")
    check_memory(GraphRanker(Bright(64, 2), 64, "a toy", chunk=3), 1, 0, 1, free, "a GPU")
    with pytest.raises(ConfigError, match="not even batch_size=1 fits; rank at a smaller image size"):
        check_memory(tall, 1, 0, 1, 1e6, "a GPU")
    with pytest.raises(ConfigError, match=r"orders of 4,000,000 rows of 16 patches need .* GiB"):
        check_memory(bright, 1, 4_000_000, 4, 1e9, "cpu")
    with pytest.raises(ConfigError, match="batch_size=0: at least 1 is needed"):
        check_memory(bright, 0, 1, 1, 1e9, "cpu")


def test_orders_of_another_data_set_are_refused(bright, pictures, tmp_path):
    images = open_images(str(pictures))
    rank_images(bright, images, ["collapse"], both_flips=False).write(tmp_path / "o.parquet", bright)
    cv2.imwrite(str(tmp_path / "x.png"), np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(DataError, match="has orders of 0 of the 1 images"):
        check_fits(read_orders(tmp_path / "o.parquet"), open_images(str(tmp_path)), (4, 4), False)


def test_no_image_that_can_be_read(bright, pictures, tmp_path):
    (tmp_path / "a.png").write_bytes((pictures / "train" / "a" / "z.png").read_bytes())
    with pytest.raises(DataError, match=r"none of 1 images can be read; the first: .*a.png"):
        rank_images(bright, open_images(str(tmp_path)), ["collapse"])
