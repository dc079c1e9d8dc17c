"""Equivariance: tokens that show their patch follow it everywhere, tokens that say where they are nowhere."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocols.equivariance import (
    VIEWS,
    compare_views,
    enlarge,
    equivariance,
    flipped,
    match,
    shift_step,
    shifted,
)


def content(images):
    """Mean colour of each 8x8 patch, as directions."""
    return F.avg_pool2d(images, 8).flatten(2).mT - 0.5


def place(images):
    """The number of each patch, as directions."""
    count = images.shape[-1] * images.shape[-2] // 64
    return torch.eye(count).expand(len(images), -1, -1)


def noise(channels, size):
    """One colour a patch."""
    g = torch.Generator().manual_seed(0)
    return torch.rand(2, channels, size // 8, size // 8, generator=g).repeat_interleave(8, 2).repeat_interleave(8, 3)


def test_tokens_of_content_follow_their_patches():
    for found in compare_views(noise(16, 40), content, (4, 4), (8, 8)):
        assert found["flip"][0] == found["shift"][0] == 1.0
        assert all(contrast > 0.2 for _, contrast in found.values())


def test_tokens_of_content_follow_an_enlarged_middle():
    rows = torch.arange(48) / 48
    smooth = torch.stack([rows[:, None].expand(48, 48), rows[None].expand(48, 48), torch.full((48, 48), 0.9)])[None]
    assert compare_views(smooth, content, (5, 5), (8, 8))[0]["zoom"][0] == 1.0
    astray = compare_views(smooth, lambda images: content(images).roll(5, 1), (5, 5), (8, 8))[0]  # a row further down
    assert astray["zoom"][0] < 0.5


def test_tokens_of_places_follow_nothing():
    for found in compare_views(noise(3, 40), place, (4, 4), (8, 8)):
        assert found["flip"][0] == found["shift"][0] == 0.0
        assert found["flip"][1] < 0 and found["shift"][1] < 0
        assert found["zoom"][0] <= 0.25  # the middle of the map is where it is


def test_equal_tokens_find_nothing():
    assert match(torch.full((5, 3), 0.3), torch.full((5, 3), 0.3)) == (0.0, pytest.approx(0.0, abs=1e-6))


def test_match_by_hand():
    tokens = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    others = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    # cosines: (1, .71, 0), (0, .71, 1), (.6, .99, .8): only the first finds its partner
    found, contrast = match(tokens, others)
    assert found == pytest.approx(1 / 3)
    root = 2**-0.5
    assert contrast == pytest.approx((1 + root + 0.8) / 3 - (root + 0 + 0 + 1 + 0.6 + 1.4 * root) / 6)


def test_numbers_of_partners():
    assert flipped((2, 3)).tolist() == [2, 1, 0, 5, 4, 3]
    here, there = shifted((3, 3), (1, 1))
    assert (here.tolist(), there.tolist()) == ([4, 5, 7, 8], [0, 1, 3, 4])
    assert shift_step((3, 14)) == (1, 3)


def test_an_enlarged_middle_is_the_middle_upsampled():
    images = torch.rand(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    inner = F.interpolate(images[..., 4:12, 4:12], (16, 16), mode="bilinear", align_corners=False)
    assert_close(enlarge(images)[..., 1:-1, 1:-1], inner[..., 1:-1, 1:-1])  # its rim looks beyond the middle


def test_scores(tiny, photos, constant, features_of):
    scores = equivariance(features_of(tiny, photos, "images"), EvalConfig(own={"equivariance": {"num_images": 7}}))
    assert list(scores.metrics) == [
        "match",
        *(f"match_{v}" for v in VIEWS),
        "contrast",
        *(f"contrast_{v}" for v in VIEWS),
    ]
    assert scores.metrics["match"] == pytest.approx(np.mean([scores.metrics[f"match_{view}"] for view in VIEWS]))
    assert scores.settings["num_images"] == 7 == scores.tallies["match"].whole.sum()
    assert scores.settings["chance"] == {"flip": 1 / 16, "shift": 1 / 9, "zoom": 1 / 16}
    same = equivariance(features_of(constant, photos, "images"), EvalConfig())
    assert same.metrics["match"] == 0.0 and same.metrics["contrast"] == pytest.approx(0, abs=1e-6)


def test_batch_size_does_not_matter(tiny, photos, features_of):
    whole = equivariance(features_of(tiny, photos, "images"), EvalConfig())
    parts = equivariance(features_of(tiny, photos, "images", batch_size=5), EvalConfig())
    assert parts.metrics == pytest.approx(whole.metrics, abs=2e-3)


def test_mistakes_get_one_line(tiny, tmp_path, photos, features_of):
    with pytest.raises(ConfigError, match="images of 16 pixels have 2x2 patches, but equivariance needs at least 3x3"):
        equivariance(features_of(tiny, photos, "images"), EvalConfig(image_size=16))
    (tmp_path / "a.png").write_bytes((photos / "00.jpg").read_bytes()[:50])
    features = features_of(tiny, tmp_path, "images")
    with pytest.raises(DataError, match="none of the 1 images can be read"):
        equivariance(features, EvalConfig())
    assert len(features.skipped) == 1
