"""Nearest neighbours: equal to a full sort, however the work is cut; labels of patches by hand and by plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from smalti.errors import ConfigError, ShapeError
from smalti.functional.neighbours import mix_labels, nearest, patch_counts

E8 = torch.tensor([[[0, 0, 1, 1], [0, 2, 1, 1], [0, 0, 2, 2], [0, 0, 2, 255]]])
"""Masks of known-answer example E8: patches of 2x2 pixels, 3 classes."""


def full_sort(queries, keys, k):
    """Float64 similarities of everything, sorted, the first of equals first."""
    ordered = (queries.double() @ keys.double().T).sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :k].float(), ordered.indices[:, :k]


def whole_numbers(seed, num_queries, num_keys, dim=3):
    """Vectors whose inner products are exact in any float type, with many ties."""
    g = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randint(-2, 3, (n, dim), generator=g).float() for n in (num_queries, num_keys))
    return queries, keys


@given(
    seed=st.integers(0, 10_000),
    num_queries=st.integers(0, 9),
    num_keys=st.integers(1, 400),
    query_chunk=st.integers(1, 10),
    key_chunk=st.integers(1, 500),
    k=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_search_equals_a_full_sort_however_it_is_cut(seed, num_queries, num_keys, query_chunk, key_chunk, k, dtype):
    queries, keys = whole_numbers(seed, num_queries, num_keys)
    k = min(k, num_keys)
    sims, places = nearest(queries, keys, k, dtype=dtype, query_chunk=query_chunk, key_chunk=key_chunk)
    expected = full_sort(queries, keys, k)
    assert torch.equal(places, expected[1])
    assert torch.equal(sims, expected[0])


@given(seed=st.integers(0, 10_000), num_keys=st.integers(2000, 3000), k=st.integers(1, 20))
def test_only_blocks_with_great_maxima_are_looked_into_and_nothing_is_lost(seed, num_keys, k):
    g = torch.Generator().manual_seed(seed)
    queries, keys = torch.randn(4, 5, generator=g), torch.randn(num_keys, 5, generator=g)
    keys[seed % num_keys :] *= 2  # neighbours crowd at one end
    sims, places = nearest(queries, keys, k)
    expected = full_sort(queries, keys, k)
    assert_close(sims, expected[0])
    assert (places == expected[1]).float().mean() > 0.99  # a near tie may fall the other way


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_half_precision_with_reranking_finds_what_float32_finds(dtype, stored):
    g = torch.Generator().manual_seed(0)
    queries, keys = (F.normalize(torch.randn(n, 32, generator=g), dim=1) for n in (50, 5000))
    keys = keys.to(stored)
    sims, places = nearest(queries, keys, 10, dtype=dtype)
    expected_sims, expected = nearest(queries, keys, 10)
    assert torch.equal(places, expected)
    assert_close(sims, expected_sims)
    bare = (queries.to(dtype) @ keys.to(dtype).T).topk(10, dim=1).indices
    assert not torch.equal(bare, expected)  # without the second look it doesn't


def test_e10_keys_have_length_one_and_queries_any():
    keys = F.normalize(torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 2.0], [-1.0, 0.0]]), dim=1)
    query = torch.tensor([[6.0, 8.0]])
    sims, places = nearest(query, keys, 4)
    assert places.tolist() == [[0, 1, 2, 3]]
    assert_close(sims, torch.tensor([[10.0, 9.6, 8.0, -6.0]]))
    sims, places = nearest(F.normalize(query, dim=1), keys, 2)  # the order is the same, the softmax asks for cosines
    weights = (sims / 0.02).softmax(1)
    assert_close(weights, torch.tensor([[0.880797, 0.119203]]), atol=1e-5, rtol=0)
    counts = torch.tensor([[4, 0, 0], [2, 2, 0], [0, 0, 4], [0, 0, 4]], dtype=torch.uint8)
    assert_close(mix_labels(weights, places, counts), torch.tensor([[0.940399, 0.059601, 0.0]]), atol=1e-5, rtol=0)


def test_equal_keys_come_in_their_order_and_zero_has_no_sign():
    keys = torch.zeros(3000, 4)
    keys[::2] = -0.0
    sims, places = nearest(torch.randn(2, 4), keys, 5, key_chunk=700)
    assert places.tolist() == [[0, 1, 2, 3, 4]] * 2 and not sims.any()


@pytest.mark.parametrize("k", [0, 4])
def test_more_neighbours_than_keys_are_refused(k):
    with pytest.raises(ConfigError, match=f"k={k}: there are 3 keys; choose a k in 1..3"):
        nearest(torch.ones(1, 2), torch.ones(3, 2), k)


def test_e8_class_counts_of_patches():
    ignored = patch_counts(E8, (2, 2), 3, ignore=255)
    assert ignored.dtype == torch.uint8
    assert ignored.tolist() == [[[3, 0, 1], [0, 4, 0], [4, 0, 0], [0, 0, 3]]]
    parity = patch_counts(E8.where(E8 != 255, 0), (2, 2), 3, ignore=255)
    assert (parity / 4).tolist() == [[[0.75, 0, 0.25], [0, 1, 0], [1, 0, 0], [0.25, 0, 0.75]]]


@given(
    seed=st.integers(0, 1000),
    num_classes=st.integers(1, 300),
    patch=st.sampled_from([(1, 1), (2, 3), (16, 16), (200, 200)]),
)
def test_counts_equal_plain_loops(seed, num_classes, patch):
    g = torch.Generator().manual_seed(seed)
    ignore = 255 if num_classes <= 255 else -1
    masks = torch.randint(0, num_classes, (2, 2 * patch[0], 3 * patch[1]), generator=g)
    masks[torch.rand(masks.shape, generator=g) < 0.1] = ignore
    if num_classes <= 255:
        masks = masks.to(torch.uint8)
    counts = patch_counts(masks, patch, num_classes, ignore)
    for b in range(2):
        for n in range(6):
            top, left = n // 3 * patch[0], n % 3 * patch[1]
            pixels = masks[b, top : top + patch[0], left : left + patch[1]].flatten().long()
            expected = torch.bincount(pixels[pixels != ignore], minlength=num_classes)
            assert torch.equal(counts[b, n].long(), expected)


def test_masks_that_the_patches_do_not_fill_are_refused():
    with pytest.raises(ShapeError, match="masks are 4x4 pixels, which patch_size=3x2 does not divide"):
        patch_counts(E8, (3, 2), 3, 255)


@pytest.mark.parametrize(
    ("temperature", "k", "weights", "label"),
    [
        (0.02, 3, (0.999955, 0.000045, 0.0), (0.999977, 0.000023)),
        (0.1, 3, (0.880762, 0.119198, 0.000040), (0.940361, 0.059639)),
        (0.1, 2, (0.880797, 0.119203), (0.940399, 0.059601)),
    ],
)
def test_e9_labels_from_neighbours(temperature, k, weights, label):
    keys = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    counts = torch.tensor([[2, 0], [1, 1], [0, 4]], dtype=torch.uint8)
    sims, places = nearest(F.normalize(torch.tensor([[2.0, 0.0]]), dim=1), keys, k)
    found = (sims / temperature).softmax(1)
    assert_close(found, torch.tensor([weights]), atol=1e-6, rtol=0)
    assert_close(mix_labels(found, places, counts), torch.tensor([label]), atol=1e-6, rtol=0)


def test_a_neighbour_without_a_label_contributes_nothing():
    counts = torch.tensor([[0, 0], [1, 3]], dtype=torch.uint8)
    mixed = mix_labels(torch.tensor([[0.5, 0.5]]), torch.tensor([[0, 1]]), counts)
    assert mixed.tolist() == [[0.125, 0.375]]
