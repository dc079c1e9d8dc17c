"""DSE: known answers of its terms, what must not change them, and the weight over the checkpoints of a run."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocols.dense_structure import (
    UNITS,
    Structure,
    candidates,
    dense_structure,
    dimension,
    distances_to_others,
    find_clusters,
    radii,
    run_curve,
    run_weight,
    shuffle_patches,
    split_evenly,
    structure,
)

TOKENS = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [10.0, 0.0], [10.0, 4.0]]], dtype=torch.float64)
LABELS = torch.tensor([[0, 0, 1, 1]])


def few(**settings):
    return EvalConfig(own={"dense-structure": {"repeats": 2, "num_images": 16, **settings}})


def test_the_score_by_hand():
    assert radii(TOKENS[0], LABELS[0]) == pytest.approx([1, 2])
    others = distances_to_others(TOKENS[0], LABELS[0])
    assert others.tolist() == pytest.approx([10.198039, 8.246211, 9, 9.848858], abs=1e-6)
    found = structure(TOKENS, LABELS, LABELS, [[0]], dimension(TOKENS))
    assert found.m_inter == pytest.approx(1.937473, abs=1e-6)
    assert found.m_intra_image == found.m_intra_group == pytest.approx(0.311715, abs=1e-6)
    assert found.m_dim == pytest.approx(1)  # one image
    assert found.dse == pytest.approx(2.625758, abs=1e-6)


def test_a_cluster_of_few_tokens_is_divided_by_the_width():
    tokens = torch.zeros(3, 8)
    tokens[0, 0], tokens[1, 0] = 3.0, -3.0
    assert radii(tokens, torch.tensor([0, 0, 1])) == pytest.approx([(18 / 8) ** 0.5])  # a single token is skipped


def test_tokens_that_fill_all_dimensions_have_a_dimension_of_one():
    assert dimension(torch.eye(4)[:, None]) == pytest.approx(1)
    assert dimension(torch.eye(4)[:, :1].expand(4, 3).mT[:, None].contiguous()) == pytest.approx(1 / 3)
    two = torch.diag(torch.tensor([3.0, 1.0]))
    assert dimension(two[:, None]) == pytest.approx(1.754765 / 2, abs=1e-6)


def draw_tokens():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(6, 10, 5, generator=generator, dtype=torch.float64) + 1
    own = torch.randint(3, (6, 10), generator=generator)
    shared = torch.randint(4, (6, 10), generator=generator)
    return tokens, own, shared


def terms(tokens, own, shared, groups, m_dim=0.0):
    found = structure(tokens, own, shared, groups, m_dim)
    return [found.m_inter, found.m_intra_image, found.m_intra_group]


def test_scale_rotation_and_order_change_nothing():
    tokens, own, shared = draw_tokens()
    groups = [[0, 1, 2], [3, 4, 5]]
    expected = terms(tokens, own, shared, groups)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    assert terms(7 * tokens @ rotation, own, shared, groups) == pytest.approx(expected, abs=1e-6)
    assert dimension(7 * tokens @ rotation) == pytest.approx(dimension(tokens), abs=1e-6)
    images, patches = torch.tensor([5, 3, 4, 2, 0, 1]), torch.randperm(10, generator=torch.Generator().manual_seed(2))
    moved = [one[images][:, patches] for one in (tokens, own, shared)]
    assert terms(*moved, groups) == pytest.approx(expected, abs=1e-6)
    assert dimension(tokens[images][:, patches]) == pytest.approx(dimension(tokens), abs=1e-6)


def test_the_formula_as_plain_loops():
    tokens, own, shared = draw_tokens()
    groups = [[0, 1, 2], [3, 4, 5]]
    every = tokens.flatten(0, 1).numpy()
    scale = np.linalg.norm(every - every.mean(0), axis=1).mean()

    def radius(members):
        values = np.linalg.svd(members - members.mean(0), compute_uv=False)
        return values.sum() / np.sqrt(max(len(members) - 1, 5))

    def of_clusters(points, labels):
        return [radius(points[labels == label]) for label in np.unique(labels) if (labels == label).sum() > 1]

    intra_image = np.mean([np.mean(of_clusters(t.numpy(), o.numpy())) for t, o in zip(tokens, own, strict=True)])
    in_groups, inter = [], []
    for group in groups:
        points, labels = tokens[group].flatten(0, 1).numpy(), shared[group].flatten().numpy()
        in_groups += of_clusters(points, labels)
        nearest = []
        for point, label in zip(points, labels, strict=True):
            others = [points[labels == other].mean(0) for other in np.unique(labels) if other != label]
            nearest.append(min(np.linalg.norm(point - other) for other in others))
        inter.append(np.mean(nearest))
    expected = np.array([np.mean(inter), intra_image, np.mean(in_groups)]) / scale
    assert terms(tokens, own, shared, groups) == pytest.approx(expected)


def test_equal_tokens_are_finite(constant, photos, features_of):
    tokens = torch.full((2, 6, 3), 0.3)
    found = structure(tokens, torch.zeros(2, 6).long(), torch.zeros(2, 6).long(), [[0, 1]], 0.5)
    assert found == Structure(0.0, (0.0, 0.0), 0.0, 0.5)
    metrics = dense_structure(features_of(constant, photos, "images"), few()).metrics
    assert metrics["m_inter"] == metrics["m_intra_image"] == metrics["m_intra_group"] == 0
    assert metrics["dse"] == metrics["m_dim"] == pytest.approx(1 / 16, abs=1e-4)


def test_separate_clusters_are_found_and_score_higher_than_noise():
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(6)[torch.arange(60) % 6]
    scores = {}
    for name, spread in (("clusters", 0.05), ("noise", 5.0)):
        tokens = (centres + spread * torch.randn(60, 6, generator=generator)).view(3, 20, 6)
        labels = find_clusters(tokens.flatten(0, 1), 6, (0,)).view(3, 20)
        scores[name] = structure(tokens, labels, labels, [[0, 1, 2]], 0.0).dse
        if name == "clusters":
            pairs = {(int(label), number % 6) for number, label in enumerate(labels.flatten())}
            assert len(pairs) == 6
    assert scores["clusters"] > 1 > scores["noise"]


def test_no_image_is_left_out_of_the_groups():
    assert split_evenly(16, 8) == [list(range(8)), list(range(8, 16))]
    assert [len(part) for part in split_evenly(20, 8)] == [10, 10]
    assert split_evenly(3, 8) == [[0, 1, 2]]


def test_shuffling_keeps_the_patches_of_each_image():
    tokens = torch.arange(24.0).view(2, 12, 1)
    shuffled = shuffle_patches(tokens, 0)
    assert_close(shuffled.sort(1).values, tokens)
    assert not torch.equal(shuffled[0].argsort(0), shuffled[1].argsort(0))


def test_the_weight_of_a_run():
    assert run_weight([1, 2, 4, 3], [0.5, 0.4, 0.6, 0.7]) == pytest.approx(10)
    metrics = [
        {"dse": 0.0, "m_inter": inner + 1.0, "m_intra_image": 0.5, "m_intra_group": 1.5, "m_dim": dim}
        for inner, dim in zip([1, 2, 4, 3], [0.5, 0.4, 0.6, 0.7], strict=True)
    ]
    chart = run_curve([10, 20, 30, 40], metrics)
    assert chart.lines[0].y == pytest.approx((6, 6, 10, 10)) and chart.lines[0].x == (10, 20, 30, 40)
    metrics[2]["m_inter"] += 1.0  # a single highest one
    assert "Candidates, the best first: step 30." in run_curve([10, 20, 30, 40], metrics).explanation
    assert run_curve([10, 20, 30], metrics[:3]) is None
    assert run_curve([1, 2, 3, 4], [metrics[0]] * 4) is None  # nothing changed
    assert run_curve([1, 2, 3, 4], [*metrics[:3], {"dse": 1.0}]) is None


def test_candidates_are_the_highest_maxima():
    assert candidates([1, 3, 2, 2.5, 2.4, 5, 1, 4, 4, 0]) == [5, 8, 1]


def test_scores_and_their_spread(tiny, photos, features_of):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    scores = dense_structure(features_of(tiny, photos, "images"), few())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert list(scores.metrics) == list(UNITS)
    assert all(np.isfinite(value) for value in scores.metrics.values())
    assert 0 < scores.metrics["m_dim"] <= 1
    m = scores.metrics
    assert m["dse"] == pytest.approx(m["m_inter"] + m["m_dim"] - (m["m_intra_image"] + m["m_intra_group"]) / 2)
    assert scores.tallies["m_intra_image"].score() == pytest.approx(m["m_intra_image"])
    assert scores.settings["num_images"] == 16 == scores.tallies["m_intra_image"].whole.sum()
    assert np.mean(scores.settings["scores_of_repeats"]["dse"]) == pytest.approx(m["dse"])
    (picture,) = scores.pictures.values()
    assert picture.shape == (3 * 116 - 4, 8 * 116 - 4, 3) and picture.dtype == np.uint8


def test_batches_change_rounding_only(tiny, photos, features_of):
    whole = dense_structure(features_of(tiny, photos, "images"), few())
    parts = dense_structure(features_of(tiny, photos, "images", batch_size=5), few())
    assert parts.metrics["m_dim"] == pytest.approx(whole.metrics["m_dim"], rel=1e-3)
    assert parts.metrics["dse"] == pytest.approx(whole.metrics["dse"], abs=0.05)


def test_mistakes_get_one_line(tiny, tmp_path, photos, features_of):
    with pytest.raises(ConfigError, match="images of 8 pixels have 1x1 patches, too few for 3 clusters"):
        dense_structure(features_of(tiny, photos, "images"), EvalConfig(image_size=8))
    with pytest.raises(ConfigError, match="a group of 8 images of 32 pixels has 128 patches, too few for 500 clusters"):
        dense_structure(features_of(tiny, photos, "images"), few(clusters_group=500))
    (tmp_path / "a.png").write_bytes((photos / "00.jpg").read_bytes()[:50])
    (tmp_path / "b.jpg").write_bytes((photos / "00.jpg").read_bytes())
    with pytest.raises(DataError, match="at least 2 images, but 1 of the 2 images can be read"):
        dense_structure(features_of(tiny, tmp_path, "images"), EvalConfig())
