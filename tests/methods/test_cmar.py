"""CMAR: which tokens an order shows, and where it starts from."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from small_mar import SMALL, make, views
from smalti.data.images.folders import open_images
from smalti.data.order_files import write_orders
from smalti.errors import ConfigError, DataError, ShapeError
from smalti.functional.graphs import ranks_of
from smalti.functional.orders import fixed_random, halton
from smalti.layers.tokens import TokenConfig, build_tokens
from smalti.methods.cmar import CMAR, CMARConfig, sampler_ratio
from smalti.methods.mar import drawn_per_step


def make_cmar(**config: object) -> CMAR:
    torch.manual_seed(1)
    return CMAR(build_tokens(TokenConfig(kind="pixels", patch_size=2), 8, 1), CMARConfig(**{**SMALL, **config}))


@pytest.fixture
def ranked(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of four images and a file with an order for each and its mirror image."""
    import cv2

    folder, names = tmp_path / "images", [f"{n}.png" for n in range(4)]
    folder.mkdir()
    for number, name in enumerate(names):
        cv2.imwrite(str(folder / name), np.full((8, 8), 40 * number, dtype=np.uint8))
    orders = torch.stack([fixed_random(16, seed) for seed in range(8)])
    file = tmp_path / "orders.parquet"
    write_orders(
        file,
        images=[name for name in names for _ in range(2)],
        splits=[None] * 8,
        flips=[False, True] * 4,
        orders={"collapse": orders},
        grid=(4, 4),
        image_size=8,
        root=str(folder),
        source="a test",
    )
    return folder, file


def test_what_is_visible_is_the_top_of_the_order() -> None:
    """Hiding a share leaves exactly the ranks 0 .. N - ceil(share N) - 1 visible."""
    cmar, batch, seen = make_cmar(order="halton", random_order_prob=0.0), views(), {}
    network = cmar.network

    class Spy(torch.nn.Module):
        head, null_class = network.head, network.null_class

        def forward(self, known: torch.Tensor, visible: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            seen["visible"], seen["known"] = visible, known
            return network(known, visible, *rest)

    cmar.network = Spy()
    ranks = ranks_of(halton((4, 4)))
    for step in range(20):
        cmar(batch, step / 20)
        num_visible = 16 - math.ceil(cmar.mask_ratio(step / 20) * 16)
        for image in range(4):
            assert sorted(ranks[seen["visible"][image]].tolist()) == list(range(num_visible))
        tokens = cmar.encode(batch.global_crops, batch.keys)
        assert torch.equal(seen["known"], tokens[:, halton((4, 4))[:num_visible]])


def test_orders_come_from_the_file_by_image_and_flip_state(ranked: tuple[Path, Path]) -> None:
    folder, file = ranked
    cmar = make_cmar(orders=str(file)).eval()
    cmar.bind(open_images(str(folder)), 8)
    batch = dataclasses.replace(
        views(), index=torch.tensor([2, 0, 2, 3]), flips=torch.tensor([False, True, True, False])
    )
    expected = torch.stack([fixed_random(16, seed) for seed in (4, 1, 5, 6)])
    assert torch.equal(cmar.orders(batch), expected)
    reversed_ = make_cmar(order="collapse_reversed", orders=str(file)).eval()
    reversed_.bind(open_images(str(folder)), 8)
    assert torch.equal(reversed_.orders(batch), expected.flip(1))
    unmirrored = make_cmar(orders=str(file), flip_prob=0.0).eval()
    unmirrored.bind(open_images(str(folder)), 8)
    assert torch.equal(unmirrored.orders(dataclasses.replace(batch, flips=batch.flips & False))[1], fixed_random(16, 0))


def test_a_tenth_of_orders_is_random_in_training_and_none_in_evaluation() -> None:
    cmar, batch = make_cmar(order="fixed_random:3"), views(3000)
    is_own = (cmar.train().orders(batch) == fixed_random(16, 3)).all(1)
    assert 0.88 < is_own.float().mean() < 0.92
    assert (cmar.eval().orders(batch) == fixed_random(16, 3)).all()
    everywhere = make_cmar(order="random").orders(batch)
    assert len(everywhere.unique(dim=0)) == 3000


def test_the_hidden_share_is_what_sampling_meets() -> None:
    num_tokens = iterations = 400
    left, met = num_tokens, []
    for count in drawn_per_step(num_tokens, iterations):
        met.append(left / num_tokens)
        left -= count
    drawn = [sampler_ratio(step / iterations) for step in range(iterations)]
    assert drawn[0] == 1.0 and min(drawn) > 0
    # where a token at least must be drawn in each step, sampling leaves the cosine: few steps make it plain
    left, met = 4000, []
    for count in drawn_per_step(4000, 40):
        met.append(left / 4000)
        left -= count
    assert_close(torch.tensor(met), torch.tensor([sampler_ratio(step / 40) for step in range(40)]), atol=1e-3, rtol=0)
    paper = make_cmar(order="halton", ratio="paper")
    assert min(paper.mask_ratio(step / 50) for step in range(50)) >= 0.7
    assert min(make_cmar(order="halton").mask_ratio(step / 50) for step in range(50)) < 0.2


def test_it_starts_from_the_averaged_weights_of_a_mar() -> None:
    mar, cmar = make(), make_cmar(order="halton")
    mar.num_updates.fill_(100)
    with torch.no_grad():
        mar.average.module.embed.weight += 1
        mar.tokens.scale.fill_(0.123)
    cmar.start_from(mar)
    assert torch.equal(cmar.network.embed.weight, mar.average.module.embed.weight)
    assert torch.equal(cmar.average.module.embed.weight, mar.average.module.embed.weight)
    assert cmar.num_updates == 0 and cmar.tokens.scale == mar.tokens.scale
    with pytest.raises(ConfigError, match="with other sizes"):
        make_cmar(order="halton", embed_dim=32).start_from(mar)


def test_mistakes_are_one_clear_line(ranked: tuple[Path, Path]) -> None:
    folder, file = ranked
    with pytest.raises(ConfigError, match="there is no order 'colapse'"):
        make_cmar(order="colapse")
    with pytest.raises(ConfigError, match=r"give its file as method.orders=FILE"):
        make_cmar()
    with pytest.raises(ConfigError, match="variance needs pixels"):
        make_cmar(order="variance")
    with pytest.raises(ConfigError, match="random_order_prob=2"):
        make_cmar(order="halton", random_order_prob=2.0)
    torch.manual_seed(0)
    coarse = CMAR(build_tokens(TokenConfig(kind="pixels", patch_size=4), 8, 1), CMARConfig(**SMALL, orders=str(file)))
    with pytest.raises(ShapeError, match="orders of 4x4 patches, the images have 2x2"):
        coarse.bind(open_images(str(folder)), 8)
    (folder / "new.png").write_bytes((folder / "0.png").read_bytes())
    with pytest.raises(DataError, match="has orders of 4 of the 5 images"):
        make_cmar(orders=str(file)).bind(open_images(str(folder)), 8)
