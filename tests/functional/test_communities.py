"""Communities: the map equation by hand, planted partitions, networkx as a second opinion, and symmetries."""

import math

import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalti.errors import ConfigError
from smalti.functional.communities import communities, description_length, walk_flow


def ring_of_cliques(count: int, size: int) -> np.ndarray:
    return networkx.to_numpy_array(networkx.ring_of_cliques(count, size))


def length_by_loops(weights: np.ndarray, assigned: list[int], markov_time: float = 1.0) -> float:
    """Rosvall & Bergstrom: H of the exits, and of each community's visits and exit, weighted by their rates."""
    total = weights.sum()
    visits = weights.sum(1) / total
    pairs = [(i, j) for i in range(len(assigned)) for j in range(len(assigned)) if assigned[i] != assigned[j]]
    pairs = [(i, j) for i in range(len(assigned)) for j in range(len(assigned)) if assigned[i] != assigned[j]]
    exits = {m: markov_time * sum(weights[i, j] for i, j in pairs if assigned[i] == m) / total for m in set(assigned)}

    def entropy(rates: list[float]) -> float:
        known = [rate / sum(rates) for rate in rates if rate > 0]
        return -sum(rate * math.log2(rate) for rate in known)

    bits = sum(exits.values()) * entropy(list(exits.values())) if any(exits.values()) else 0.0
    for m, leaving in exits.items():
        inside = [visits[i] for i, a in enumerate(assigned) if a == m]
        bits += (leaving + sum(inside)) * entropy([leaving, *inside])
    return bits


@given(seed=st.integers(0, 50), markov_time=st.sampled_from([0.5, 1.0, 2.0]))
def test_the_description_length_is_the_map_equation(seed: int, markov_time: float) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.random((6, 6)) * (rng.random((6, 6)) < 0.7)
    weights = (weights + weights.T) * (1 - np.eye(6)) + 1e-3 * (1 - np.eye(6))
    assigned = rng.integers(0, 3, 6)
    flow = walk_flow(weights, markov_time)
    found = description_length(flow, flow.sum(1) / markov_time, assigned)
    assert found == pytest.approx(length_by_loops(weights, assigned.tolist(), markov_time))


def test_two_triangles_and_a_bridge_by_hand() -> None:
    weights = networkx.to_numpy_array(networkx.Graph([(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3), (2, 3)]))
    assert communities(weights).tolist() == [0, 0, 0, 1, 1, 1]
    flow = walk_flow(weights)
    # 14 half-edges: visits 2/14 or 3/14, each community is left at 1/14
    visits = np.array([2, 2, 3, 3, 2, 2]) / 14
    rates = [1 / 14, 2 / 14, 2 / 14, 3 / 14]
    inside = -sum(rate * math.log2(rate / sum(rates)) for rate in rates)
    expected = 2 / 14 * 1 + 2 * inside
    assert description_length(flow, visits, np.array([0, 0, 0, 1, 1, 1])) == pytest.approx(expected)


@pytest.mark.parametrize(("count", "size"), [(3, 4), (6, 5), (12, 6)])
def test_cliques_in_a_ring_are_found_as_networkx_finds_them(count: int, size: int) -> None:
    weights = ring_of_cliques(count, size)
    found = communities(weights)
    parts = networkx.community.louvain_communities(networkx.from_numpy_array(weights), seed=0)
    assert {frozenset(np.flatnonzero(found == m).tolist()) for m in set(found.tolist())} == set(map(frozenset, parts))
    assert found.tolist() == np.repeat(np.arange(count), size).tolist()  # numbered by their first nodes


def test_no_partition_of_a_small_graph_is_shorter() -> None:
    rng = np.random.default_rng(3)
    weights = rng.random((6, 6)) ** 3
    weights = (weights + weights.T) * (1 - np.eye(6))
    flow = walk_flow(weights)
    visits = flow.sum(1)
    every = np.stack(np.meshgrid(*[np.arange(6)] * 6, indexing="ij"), -1).reshape(-1, 6)
    every = every[(every <= np.arange(6)).all(1)]
    shortest = min(description_length(flow, visits, one) for one in every)
    assert description_length(flow, visits, communities(weights)) == pytest.approx(shortest)


def test_a_longer_markov_time_merges_communities() -> None:
    weights = ring_of_cliques(8, 4)
    counts = [len(set(communities(weights, markov_time=time).tolist())) for time in (0.2, 1.0, 20.0)]
    assert counts[0] >= counts[1] == 8 > counts[2]


def test_numbers_of_nodes_and_scale_of_weights_do_not_matter() -> None:
    weights = ring_of_cliques(5, 4)
    order = np.random.default_rng(0).permutation(20)
    found, turned = communities(weights), communities(7.5 * weights[np.ix_(order, order)])
    assert (found[order][:, None] == found[order]).tolist() == (turned[:, None] == turned).tolist()


def test_nodes_without_edges_stay_alone() -> None:
    weights = np.zeros((5, 5))
    assert communities(weights).tolist() == [0, 1, 2, 3, 4]
    weights[1, 3] = weights[3, 1] = 1
    assert communities(weights).tolist() == [0, 1, 2, 1, 3]
    np.fill_diagonal(weights, 9.0)  # loops are ignored
    assert communities(weights).tolist() == [0, 1, 2, 1, 3]


@pytest.mark.parametrize("pair", [(1.0, 2.0), (-1.0, -1.0), (math.nan, math.nan)])
def test_weights_that_are_no_graph_are_refused(pair: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="weights of a graph"):
        communities(np.array([[0.0, pair[0]], [pair[1], 0.0]]))
    with pytest.raises(ConfigError, match="markov_time=0"):
        communities(np.ones((2, 2)), markov_time=0.0)
