"""Position: tokens that say where they are, tokens that say only what they show, and tokens that say nothing."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocols.position import (
    UNITS,
    cell_distances,
    cells,
    chance,
    fit_readout,
    grid_panel,
    match_panel,
    offset_ratio,
    position,
    r2_of_images,
    spatial_entropy,
)
from smalti.models.encoder import Encoder
from smalti.models.pooling import PatchFeatures


class PlaceEncoder(Encoder):
    """Each token is the number of its patch."""

    def encode(self, images):
        grid = self.check_size(*images.shape[-2:])
        tokens = F.one_hot(torch.arange(grid[0] * grid[1]), self.embed_dim).float().expand(len(images), -1, -1)
        return PatchFeatures(tokens, tokens[:, :1], grid)


class NoiseEncoder(PlaceEncoder):
    """Tokens depend on the image alone, not on the place."""

    def encode(self, images):
        grid = self.check_size(*images.shape[-2:])
        tokens = [
            torch.randn(grid[0] * grid[1], self.embed_dim, generator=torch.Generator().manual_seed(int(seed)))
            for seed in (images.double().flatten(1).sum(1).abs() * 1000).long()
        ]
        return PatchFeatures(torch.stack(tokens), torch.zeros(len(images), 1, self.embed_dim), grid)


def with_class(encoder, cls):
    return cls(encoder.vit, encoder.name, encoder.model_args, mean=(0.0,), std=(1.0,))


def settings(**values):
    return EvalConfig(own={"position": {"num_images": 20, **values}})


def test_chance_is_the_variance_of_the_places():
    for side, expected in ((7, 0.111111), (14, 0.096154), (16, 0.094444), (37, 0.087963)):
        assert chance(side) == pytest.approx(expected, abs=1e-6)
        assert cells((side, 3)).var(0, correction=0)[0].item() == pytest.approx(chance(side))
    assert r2_of_images(torch.full((1, 49, 2), 0.5).double(), cells((7, 7)), (7, 7)) == pytest.approx(0)
    assert r2_of_images(cells((7, 7))[None], cells((7, 7)), (7, 7)) == pytest.approx(1)
    single = r2_of_images(cells((1, 4))[None], cells((1, 4)), (1, 4))
    assert math.isnan(single[0, 0]) and single[0, 1] == 1


def test_ridge_reads_what_tokens_contain_and_no_more():
    generator = torch.Generator().manual_seed(0)
    places = cells((8, 8))
    mixed = torch.randn(2, 32, generator=generator).double()
    tokens = 4 * (places - 0.5) @ mixed + torch.randn(40, 64, 32, generator=generator).double()

    def error(of):
        readout = fit_readout(of[:20], places)
        return float((readout(of[20:]) - places).square().mean()), readout

    before, readout = error(tokens)
    assert before < 0.01
    first = torch.linalg.qr(readout.weight).Q
    _, readout = error(tokens - tokens @ first @ first.T)
    both = torch.linalg.qr(torch.cat([first, readout.weight], 1)).Q
    after, _ = error(tokens - tokens @ both @ both.T)  # two planes removed
    assert after > 0.95 * chance(8)


def test_the_ridge_is_that_of_its_normal_equations():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 6, 4, generator=generator).double()
    places = cells((2, 3))
    x, y = tokens.flatten(0, 1).numpy(), np.tile(places.numpy(), (3, 1))
    x, y = x - x.mean(0), y - y.mean(0)
    penalty = 1e-3 * x.var(0).mean() * len(x)
    expected = np.linalg.lstsq(
        np.concatenate([x, np.sqrt(penalty) * np.eye(4)]), np.concatenate([y, np.zeros((4, 2))]), rcond=None
    )[0]
    assert fit_readout(tokens, places).weight.numpy() == pytest.approx(expected)


def test_spatial_entropy_by_hand():
    assert spatial_entropy(np.zeros((4, 4), int)) == pytest.approx(1)  # 16 patches, 4 in each place
    assert spatial_entropy(np.tile(np.arange(4), (8, 1))) == 0  # each cluster in a place of its own
    half = np.tile([0, 0, 1, 1], (8, 1))  # each cluster in two of four places
    assert spatial_entropy(half) == pytest.approx(0.5)
    assert math.isnan(spatial_entropy(np.arange(8).reshape(2, 4)))  # all clusters are too small
    assert spatial_entropy(np.where(np.arange(16).reshape(4, 4) == 0, 1, 0)) == pytest.approx(
        -(3 / 15 * np.log(3 / 15) + 3 * 4 / 15 * np.log(4 / 15)) / np.log(4)
    )  # the cluster of one patch does not count


def test_offsets_are_counted_relative_to_chance():
    queries, matches = np.arange(6), np.arange(6)
    ratio = offset_ratio(queries, matches, (2, 3))
    assert ratio.shape == (3, 5) and ratio[1, 2] == 6 and ratio.sum() == 6
    everywhere = offset_ratio(np.repeat(queries, 6), np.tile(matches, 6), (2, 3))
    assert everywhere == pytest.approx(np.ones((3, 5)))
    assert cell_distances((2, 2)).tolist()[0] == pytest.approx([0, 1, 1, math.sqrt(2)])


def test_tokens_of_places_are_read_perfectly(tiny, photos, features_of):
    scores = position(features_of(with_class(tiny, PlaceEncoder), photos, "images"), settings(clusters=16))
    assert list(scores.metrics) == list(UNITS)
    assert scores.metrics["position_r2"] > 0.99
    assert scores.metrics["same_cell"] == 1 and scores.metrics["match_distance"] == 0
    assert scores.metrics["spatial_entropy"] == pytest.approx(0, abs=1e-9)
    assert scores.settings["num_fitted"] == scores.settings["num_evaluated"] == 10
    assert "160 fitted patches are few for tokens of 192 dimensions" in scores.settings["fit_note"]
    assert scores.tallies["position_r2"].whole.sum() == 10
    assert scores.tallies["match_distance"].score() == scores.metrics["match_distance"]
    (picture,) = scores.pictures.values()
    assert picture.shape == (280, 560, 3) and picture.dtype == np.uint8


def test_tokens_without_places_score_at_chance(tiny, photos, features_of):
    metrics = position(features_of(with_class(tiny, NoiseEncoder), photos, "images"), settings(clusters=8)).metrics
    assert metrics["position_r2"] < 0.05
    assert metrics["same_cell"] < 0.2  # of 160 matches, with a chance of 1/16
    assert metrics["match_distance"] == pytest.approx(1, abs=0.15)
    assert metrics["spatial_entropy"] > 0.7


def test_equal_tokens_are_not_read(constant, photos, features_of):
    metrics = position(features_of(constant, photos, "images"), settings()).metrics
    assert metrics["position_r2"] == pytest.approx(
        0, abs=1e-6
    )  # how k-means splits equal tokens is a matter of rounding


def test_batch_size_does_not_matter(tiny, photos, features_of):
    whole = position(features_of(tiny, photos, "images"), settings())
    parts = position(features_of(tiny, photos, "images", batch_size=5), settings())
    for name in ("position_r2", "match_distance"):
        assert parts.metrics[name] == pytest.approx(whole.metrics[name], abs=0.02)


def test_pictures_show_what_is_read():
    read = grid_panel(cells((4, 4)), (4, 4))
    nothing = grid_panel(torch.full((16, 2), 0.5).double(), (4, 4))
    blue, dot = ((panel[..., 0] < 100).sum() for panel in (read, nothing))
    assert blue > 1000 and 0 < dot < 50
    same = torch.arange(16)[None]
    panel = match_panel(same, same, (4, 4)).astype(int)
    assert panel[140, 140].sum() > 600 > panel[30, 30].sum()  # pale in the middle, dark elsewhere
    assert match_panel(torch.zeros(1, 1).long(), torch.ones(1, 1).long(), (1, 3)).shape == (280, 280, 3)


def test_mistakes_get_one_line(tiny, tmp_path, photos, features_of):
    with pytest.raises(ConfigError, match="images of 8 pixels have a single patch, which has no position"):
        position(features_of(tiny, photos, "images"), EvalConfig(image_size=8))
    (tmp_path / "a.jpg").write_bytes((photos / "00.jpg").read_bytes())
    features = features_of(tiny, tmp_path, "images")
    with pytest.raises(DataError, match=r"position fits on half of the images .* but 1 of the 1 images can be read"):
        position(features, EvalConfig())
