"""Communities of a weighted graph: the partition with the shortest two-level description of a random walk.

The map equation: how many bits per step name the walk's place, if each community has names of its own. Nodes among
which the walk stays long share a community. Communities are found by moving nodes, then communities, while that
shortens the description, from several random orders (Infomap's two levels, without its refinement).
Letters: V nodes, M communities, p visit rate of a node, q exit rate of a community.

Sources: Rosvall & Bergstrom, PNAS 105(4), 2008 (the map equation); Blondel et al., arXiv:0803.0476 (moves and
aggregation); Schaub, Lambiotte & Barahona, arXiv:1109.6623 (Markov time).
"""

import numpy as np
from jaxtyping import Float, Int

from smalti.errors import ConfigError

_GAIN = 1e-12
"""Bits per step by which a move must shorten the description."""


def communities(
    weights: Float[np.ndarray, "V V"], markov_time: float = 1.0, trials: int = 10, seed: int = 0
) -> Int[np.ndarray, " V"]:
    """The community of each node, numbered from 0 in the order of their first nodes.

    Args:
        weights: ``(V, V)`` symmetric, not negative; loops (the diagonal) are ignored. A node without edges is a
            community.
        markov_time: steps of the walk per name: above 1 communities are larger, below 1 smaller.
        trials: random orders; the shortest description is used.
        seed: of the orders.

    Raises:
        ConfigError: if the weights aren't symmetric or one is negative, or the time isn't above 0.

    Cost: ``O(V^2)`` for each pass over the nodes.
    """
    flow = walk_flow(weights, markov_time)
    if not flow.any():
        return np.arange(len(weights))
    visits = flow.sum(1) / markov_time
    best, best_length = np.zeros(len(weights), dtype=np.int64), np.inf
    for trial in range(trials):
        found = _optimize(flow, visits, np.random.default_rng((seed, trial)))
        length = description_length(flow, visits, found)
        if length < best_length - _GAIN:
            best, best_length = found, length
    return _renumbered(best)


def walk_flow(weights: Float[np.ndarray, "V V"], markov_time: float = 1.0) -> Float[np.ndarray, "V V"]:
    """``(V, V)`` rates at which the walk crosses edges, times the Markov time; without loops.

    Raises:
        ConfigError: as :func:`communities`.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if not np.isfinite(weights).all() or (weights < 0).any() or not np.allclose(weights, weights.T):
        raise ConfigError("weights of a graph: finite numbers, not negative and the same in both directions are needed")
    if markov_time <= 0:
        raise ConfigError(f"markov_time={markov_time}: a time above 0 is needed")
    flow = weights * (1 - np.eye(len(weights)))
    return flow * (markov_time / flow.sum() if flow.any() else 0.0)


def description_length(
    flow: Float[np.ndarray, "V V"], visits: Float[np.ndarray, " V"], assigned: Int[np.ndarray, " V"]
) -> float:
    """Bits per step of the two-level description: the map equation.

    Args:
        flow: from :func:`walk_flow`.
        visits: p, rate of visits of each node; they add up to 1.
        assigned: community of each node.
    """
    indicator = (assigned[:, None] == np.unique(assigned)).astype(np.float64)  # (V, M)
    between = indicator.T @ flow @ indicator
    exits = between.sum(1) - between.diagonal()
    inside = indicator.T @ visits
    index, within = _plogp(float(exits.sum())) - _plogp(exits).sum(), _plogp(exits + inside).sum() - _plogp(exits).sum()
    return float(index + within - _plogp(visits).sum())


def _optimize(
    flow: Float[np.ndarray, "V V"], visits: Float[np.ndarray, " V"], generator: np.random.Generator
) -> Int[np.ndarray, " V"]:
    """Move nodes, merge each community into one node, and repeat until nothing moves."""
    assigned = np.arange(len(flow))  # of the original nodes
    while True:
        moved = _move_nodes(flow, visits, generator)
        kept, moved = np.unique(moved, return_inverse=True)
        assigned = moved[assigned]
        if len(kept) == len(flow):
            return assigned
        indicator = (moved[:, None] == np.arange(len(kept))).astype(np.float64)
        flow, visits = indicator.T @ flow @ indicator, indicator.T @ visits  # the diagonal is the flow inside
        flow = flow * (1 - np.eye(len(flow)))


def _move_nodes(
    flow: Float[np.ndarray, "V V"], visits: Float[np.ndarray, " V"], generator: np.random.Generator
) -> Int[np.ndarray, " V"]:
    """Move each node to the neighbouring community that shortens the description most, until none does."""
    num = len(flow)
    assigned = np.arange(num)
    out = flow.sum(1)  # flow without loops that leaves a node
    exits, inside = out.copy(), visits.copy()
    is_moving = True
    while is_moving:
        is_moving = False
        for node in generator.permutation(num):
            own = assigned[node]
            to = np.bincount(assigned, weights=flow[node], minlength=num)  # flow to each community
            candidates = np.unique(np.append(assigned[flow[node] > 0], own))
            # exit rates with the node taken out of its community, and put into a candidate
            left_exit, left_inside = exits[own] - out[node] + 2 * to[own], inside[own] - visits[node]
            there_exit = np.where(candidates == own, left_exit, exits[candidates])
            there_inside = np.where(candidates == own, left_inside, inside[candidates])
            new_exit, new_inside = there_exit + out[node] - 2 * to[candidates], there_inside + visits[node]
            total = exits.sum() - exits[own] + left_exit  # without the node
            lengths = _plogp(total - there_exit + new_exit) + _terms(new_exit, new_inside)
            lengths -= _terms(there_exit, there_inside)
            best = int(lengths.argmin())
            if candidates[best] == own or lengths[best] > lengths[candidates == own][0] - _GAIN:
                continue
            exits[own], inside[own] = max(left_exit, 0.0), max(left_inside, 0.0)
            target = candidates[best]
            exits[target], inside[target] = max(new_exit[best], 0.0), new_inside[best]
            assigned[node] = target
            is_moving = True
    return assigned


def _terms(exits: Float[np.ndarray, " M"], inside: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """A community's part of the map equation."""
    return _plogp(exits + inside) - 2 * _plogp(exits)


def _plogp(rate: Float[np.ndarray, "*M"] | float) -> Float[np.ndarray, "*M"]:
    """``p log2 p``, 0 at 0 and below (rounding)."""
    rate = np.asarray(np.maximum(rate, 0.0))
    return np.asarray(rate * np.log2(np.where(rate > 0, rate, 1.0)))


def _renumbered(assigned: Int[np.ndarray, " V"]) -> Int[np.ndarray, " V"]:
    _, first, inverse = np.unique(assigned, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]
