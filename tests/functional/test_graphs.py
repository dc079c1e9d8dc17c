"""Dependency graphs: PageRank against networkx, scipy and closed forms; orders and their properties; exact worlds."""

import math

import networkx
import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from smalti.errors import ConfigError, ShapeError
from smalti.functional.graphs import coverage_order, descending, in_strength, is_degenerate, pagerank, ranks_of


def random_graphs(*batch: int, num: int = 12, seed: int = 0) -> Tensor:
    weights = torch.rand(*batch, num, num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weights**3  # some much larger than others


def by_networkx(graph: Tensor, damping: float = 0.85) -> Tensor:
    table = graph.clone().fill_diagonal_(0).numpy()
    found = networkx.pagerank(
        networkx.from_numpy_array(table, create_using=networkx.DiGraph), alpha=damping, tol=1e-14, max_iter=2000
    )
    return torch.tensor([found[node] for node in range(len(table))], dtype=torch.float64)


@pytest.mark.parametrize("method", ["power", "solve"])
@pytest.mark.parametrize("damping", [0.5, 0.85, 0.99])
def test_influence_is_networkx_of_the_graph_and_literal_of_the_transposed(method: str, damping: float) -> None:
    graphs = random_graphs(3)
    ours = pagerank(graphs, damping, method=method, tol=1e-14)
    literal = pagerank(graphs, damping, orientation="literal", method=method, tol=1e-14)
    for graph, scores, other in zip(graphs, ours, literal, strict=True):
        assert_close(scores, by_networkx(graph, damping), rtol=0, atol=1e-9)
        assert_close(other, by_networkx(graph.T, damping), rtol=0, atol=1e-9)


def test_scores_are_the_leading_eigenvector_of_the_google_matrix() -> None:
    graph, teleport = random_graphs(num=20), torch.rand(20, generator=torch.Generator().manual_seed(1)).double()
    weights = graph.clone().fill_diagonal_(0).numpy()
    stochastic = (weights / weights.sum(1, keepdims=True)).T
    mass = (teleport / teleport.sum()).numpy()
    google = 0.85 * stochastic + 0.15 * np.outer(mass, np.ones(20))
    value, vector = scipy.sparse.linalg.eigs(google, k=1)
    expected = torch.tensor((vector[:, 0] / vector[:, 0].sum()).real)
    assert_close(value.real[0], 1.0, rtol=1e-9, atol=0)
    assert_close(pagerank(graph, personalization=teleport), expected, rtol=0, atol=1e-9)


def test_a_patch_that_all_lean_on_tells_the_orientations_apart() -> None:
    graph = torch.full((9, 9), 0.05, dtype=torch.float64)
    graph[:, 4] = 0.95
    assert descending(pagerank(graph))[0] == 4
    literal = pagerank(graph, orientation="literal")
    assert float(literal.max() - literal.min()) < 1e-9 and bool(is_degenerate(literal))


def test_known_answers() -> None:
    constant = pagerank(torch.full((2, 7, 7), 0.3))
    assert_close(constant, torch.full((2, 7), 1 / 7))
    assert is_degenerate(constant).all()
    star = torch.zeros(5, 5, dtype=torch.float64)
    star[1:, 0] = 0.7  # all lean on the hub, the hub on nobody: it dangles
    expected = (0.03 + 0.17) / (1 + 4 * 0.17)  # leaf = 0.03 + 0.17 hub, hub = 1 - 4 leaf
    assert_close(float(pagerank(star, tol=1e-13)[1]), expected, rtol=1e-9, atol=0)
    assert_close(float(pagerank(star, tol=1e-13)[0]), 1 - 4 * expected, rtol=1e-9, atol=0)
    assert_close(pagerank(torch.zeros(4, 4)), torch.full((4,), 0.25))
    assert pagerank(torch.ones(1, 1)).tolist() == [1.0]


@given(seed=st.integers(0, 10_000), num=st.integers(2, 14))
def test_renaming_patches_renames_scores_and_the_size_of_rows_is_nothing(seed: int, num: int) -> None:
    graph = random_graphs(num=num, seed=seed)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    scores = pagerank(graph, tol=1e-13)
    assert_close(pagerank(graph[order][:, order], tol=1e-13), scores[order], rtol=0, atol=1e-10)
    sizes = torch.rand(num, 1, generator=torch.Generator().manual_seed(seed + 1)).double() * 0.9 + 0.1
    assert_close(pagerank(graph * sizes, tol=1e-13), scores, rtol=0, atol=1e-10)
    assert_close(float(scores.sum()), 1.0)
    assert bool((scores > 0).all())
    dense = graph.clone().fill_diagonal_(0.9)  # self loops are not looked at
    assert torch.equal(pagerank(dense), pagerank(graph.clone().fill_diagonal_(0.0)))


def test_methods_batches_and_types_agree() -> None:
    graphs = random_graphs(2, 3, num=64)
    graphs[0, 1, 5] = 0  # dangles
    power, solved = pagerank(graphs, tol=1e-13), pagerank(graphs, method="solve")
    assert_close(power, solved, rtol=0, atol=1e-11)
    assert_close(pagerank(graphs[0, 1], tol=1e-13), power[0, 1], rtol=0, atol=1e-11)
    assert_close(pagerank(graphs.float()).double(), power, rtol=0, atol=1e-5 / 64)
    assert pagerank(graphs.half()).dtype == torch.float32
    assert pagerank(graphs[:0]).shape == (0, 3, 64) and pagerank(graphs[:0], method="solve").shape == (0, 3, 64)


def test_in_strength_is_the_first_step_from_equal_scores() -> None:
    graph = random_graphs(num=9)
    weights = graph.clone().fill_diagonal_(0)
    expected = (weights / weights.sum(1, keepdim=True)).sum(0) / 9
    assert_close(in_strength(graph), expected)
    assert_close(pagerank(graph, damping=1e-9), torch.full((9,), 1 / 9, dtype=torch.float64), atol=1e-8, rtol=0)


def test_coverage_takes_what_adds_most_by_plain_loops() -> None:
    graphs = random_graphs(2, num=8)
    for graph, order in zip(graphs, coverage_order(graphs).tolist(), strict=True):
        own = graph.clone().fill_diagonal_(1.0).tolist()
        covered, left, expected = [0.0] * 8, list(range(8)), []
        while left:
            gains = [sum(max(own[n][j] - covered[n], 0.0) for n in range(8)) for j in left]
            best = left[gains.index(max(gains))]
            expected.append(best)
            left.remove(best)
            covered = [max(covered[n], own[n][best]) for n in range(8)]
        assert order == expected


def test_coverage_leaves_out_what_repeats_and_pagerank_does_not() -> None:
    graph = torch.full((8, 8), 0.01, dtype=torch.float64)
    graph[:4, 0], graph[:4, 1] = 0.9, 0.85  # two patches say the same about the first four
    graph[4:7, 7] = 0.5  # another one says something of the others
    assert descending(pagerank(graph))[:2].tolist() == [0, 1]
    assert coverage_order(graph)[:2].tolist() == [0, 7]


def test_orders_and_ranks() -> None:
    scores = torch.tensor([[0.2, 0.5, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    order = descending(scores)
    assert order.tolist() == [[1, 0, 2, 3], [0, 1, 2, 3]]  # the lower index first
    assert ranks_of(order).tolist() == [[1, 0, 2, 3], [0, 1, 2, 3]]
    assert ranks_of(torch.tensor([3, 0, 2, 1])).tolist() == [1, 3, 2, 0]


def test_wrong_input() -> None:
    with pytest.raises(ShapeError, match=r"shape \(3, 4\); \(..., N, N\)"):
        pagerank(torch.zeros(3, 4))
    with pytest.raises(ConfigError, match=r"-0.5..1; 0..1 is needed"):
        pagerank(torch.tensor([[0.0, 1.0], [-0.5, 0.0]]))
    with pytest.raises(ConfigError, match="nan"):
        coverage_order(torch.tensor([[0.0, math.nan], [0.5, 0.0]]))
    with pytest.raises(ConfigError, match=r"damping=1\.0"):
        pagerank(torch.zeros(3, 3), damping=1.0)
    with pytest.raises(ConfigError, match="orientation='up'"):
        pagerank(torch.zeros(3, 3), orientation="up")
    with pytest.raises(ConfigError, match="method='qr'"):
        pagerank(torch.zeros(3, 3), method="qr")
    with pytest.raises(ConfigError, match="did not converge to 1e-10 in 2 iterations; use method='solve'"):
        pagerank(random_graphs(num=6), max_iterations=2)
    with pytest.raises(ShapeError, match=r"personalization of shape \(4,\)"):
        pagerank(torch.zeros(3, 3), personalization=torch.ones(4))
    with pytest.raises(ConfigError, match="personalization needs finite values"):
        pagerank(torch.zeros(3, 3), personalization=torch.zeros(3))
