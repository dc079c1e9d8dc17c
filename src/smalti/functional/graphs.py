"""Patch scores and orders from dependency graphs: PageRank, its first step, and a greedy cover.

A dependency graph is ``A`` with ``A[n, j]`` in [0, 1]: how much patch n depends on patch j. Letters: N patches. The
diagonal is ignored.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import ConfigError, ShapeError
from smalti.functional.precision import at_least_float32

DANGLING = 1e-12
"""A patch whose weights sum to less is dangling; its score is distributed like the teleport."""
DEGENERATE = 1e-6
"""N times the spread of the scores below which all patches count as equal."""
IN_HAND = {"cpu": 2**21}
"""Bytes of graphs processed at a time: on a CPU, what fits into its cache; elsewhere 256 MiB."""


@torch.no_grad()
def pagerank(
    dependency: Float[Tensor, "*B N M"],
    damping: float = 0.85,
    personalization: Float[Tensor, "*C K"] | None = None,
    orientation: str = "influence",
    method: str = "power",
    tol: float = 1e-10,
    max_iterations: int = 1000,
) -> Float[Tensor, "*B N"]:
    """Influence of each patch by PageRank: ``r = (1 - c) b + c P r`` (Guo et al., arXiv:2511.22281, Sec. 3).

    In the paper P is column-stochastic, but its computation from A is not given. ``influence`` divides each *row* of A
    by its sum and transposes: a patch has a high score if patches with high scores depend on it; this is networkx's
    PageRank of the graph with edges n -> j of weight ``A[n, j]``. ``literal`` divides each *column*, which removes how
    much others depend on a patch, the quantity of interest; it is the PageRank of the transposed graph.

    Args:
        dependency: square, with any or no batch axes; weights in [0, 1], any float type (computed in at least float32).
        damping: c, in [0, 1).
        personalization: b, ``(..., N)``, not negative, any positive sum, per graph or for all; None: 1/N.
        orientation: ``influence`` or ``literal``.
        method: ``power`` iterates; ``solve`` solves ``(I - c P) r = (1 - c) b`` in float64.
        tol: for ``power``, the sum of absolute changes in a graph below which it stops. Graphs processed together
            continue until all have converged, so the batch changes a graph's scores by less than this.
        max_iterations: for ``power``; each iteration reduces the error at least by the factor c.

    Returns:
        Scores that sum to 1, in the type of the computation (float32 for half precision).

    Raises:
        ShapeError: if it isn't square, or ``personalization`` has another shape.
        ConfigError: for weights outside of [0, 1] or not finite, an invalid damping, a personalization that sums to 0,
            or if ``power`` does not converge.
    """
    if not 0 <= damping < 1:
        raise ConfigError(f"damping={damping}: it must lie in 0..1 (1 excluded)")
    for name, given, known in (
        ("orientation", orientation, ("influence", "literal")),
        ("method", method, ("power", "solve")),
    ):
        if given not in known:
            raise ConfigError(f"{name}={given!r}: one of {', '.join(known)} is needed")
    _check_shape(dependency)
    batch, num = dependency.shape[:-2], dependency.shape[-1]
    teleport = _teleport(personalization, dependency).reshape(-1, num)
    at_once, found = _at_once(dependency), []
    parts = torch.split(dependency.reshape(-1, num, num), at_once)
    for graphs, mass in zip(parts, torch.split(teleport, at_once), strict=True):
        graph = _checked(graphs)
        graph = graph.mT if orientation == "literal" else graph
        if method == "solve":
            found.append(_solve(graph, damping, mass).to(graph.dtype))
        else:
            found.append(_iterate(graph, damping, mass, tol, max_iterations))
    return torch.cat(found).view(*batch, num) if found else teleport.view(*batch, num)


@torch.no_grad()
def in_strength(dependency: Float[Tensor, "*B N N"]) -> Float[Tensor, "*B N"]:
    """Fraction of all patches' dependence on each patch: PageRank's first step from equal scores.

    If it gives the same order as PageRank, iterating adds nothing.

    Args:
        dependency: as for :func:`pagerank`.

    Returns:
        Scores that sum to 1.
    """
    graph = _checked(dependency)
    num = graph.shape[-1]
    row_factors, dangling = _row_factors(graph)
    uniform = graph.new_full(graph.shape[:-1], 1 / num)
    return _propagate(graph, row_factors, dangling, uniform, uniform)


@torch.no_grad()
def coverage_order(dependency: Float[Tensor, "*B N N"]) -> Int[Tensor, "*B N"]:
    """Order that covers the other patches early: each patch is the one that increases ``sum_n max_j A[n, j]`` over the
    chosen ones most. Ours, not the paper's: PageRank ranks redundant patches next to each other.

    Greedy maximisation of a monotone submodular function (facility location; Nemhauser, Wolsey & Fisher 1978), so each
    prefix covers at least 1 - 1/e of the best set of its size. Ties: the lower index first.

    Args:
        dependency: as for :func:`pagerank`.

    Returns:
        ``order[..., 0]`` is the first patch.
    """
    graph = _checked(dependency)
    num = graph.shape[-1]
    graph = torch.where(torch.eye(num, dtype=torch.bool, device=graph.device), 1.0, graph)  # a patch covers itself
    batch = graph.shape[:-2]
    covered = graph.new_zeros(*batch, num)
    taken = torch.zeros(*batch, num, dtype=torch.bool, device=graph.device)
    order = torch.empty(*batch, num, dtype=torch.long, device=graph.device)
    for place in range(num):
        gain = (graph - covered[..., None]).clamp(min=0).sum(-2)  # of each j
        chosen = gain.masked_fill(taken, -1).argmax(-1, keepdim=True)
        order[..., place] = chosen[..., 0]
        taken.scatter_(-1, chosen, True)
        column = graph.gather(-1, chosen[..., None, :].expand(*batch, num, 1))[..., 0]
        covered = torch.maximum(covered, column)
    return order


def descending(scores: Float[Tensor, "*B N"]) -> Int[Tensor, "*B N"]:
    """Patches by descending score; ties: the lower index first. ``descending(...)[..., 0]`` is the most important
    patch."""
    return torch.argsort(-scores, dim=-1, stable=True)


def ranks_of(order: Int[Tensor, "*B N"]) -> Int[Tensor, "*B N"]:
    """The rank of each patch in an order; 0 is first."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def is_degenerate(scores: Float[Tensor, "*B N"]) -> Tensor:
    """``(*B,)`` True if all scores are nearly equal, so that their order only follows the indices."""
    return scores.shape[-1] * (scores.amax(-1) - scores.amin(-1)) < DEGENERATE


def _check_shape(dependency: Tensor) -> None:
    if dependency.ndim < 2 or dependency.shape[-1] != dependency.shape[-2] or not dependency.shape[-1]:
        raise ShapeError(f"dependency graph of shape {tuple(dependency.shape)}; (..., N, N) with N >= 1 is needed")


def _at_once(dependency: Tensor) -> int:
    """Number of graphs processed together."""
    size = dependency.shape[-1] ** 2 * max(4, dependency.element_size())
    return max(1, IN_HAND.get(dependency.device.type, 2**28) // size)


def _checked(dependency: Tensor) -> Tensor:
    _check_shape(dependency)
    graph = at_least_float32(dependency)
    if graph.numel():
        low, high = (float(value) for value in graph.aminmax())
        if not (low >= 0 and high <= 1):  # also false for NaN
            raise ConfigError(f"weights of a dependency graph lie in {low:.4g}..{high:.4g}; 0..1 is needed")
    if bool(graph.diagonal(dim1=-2, dim2=-1).any()):  # zero in CoMAE's graphs: no copy
        graph = graph.clone()
        graph.diagonal(dim1=-2, dim2=-1).zero_()
    return graph


def _teleport(personalization: Tensor | None, dependency: Tensor) -> Tensor:
    """``(*B, N)``, sums to 1, in the type of the computation."""
    shape, num = dependency.shape[:-1], dependency.shape[-1]
    like = at_least_float32(dependency[..., :0])
    if personalization is None:
        return like.new_full(shape, 1 / num)
    try:
        mass = personalization.to(like).expand(shape)
    except RuntimeError:
        raise ShapeError(
            f"personalization of shape {tuple(personalization.shape)} for graphs of shape {tuple(dependency.shape)}"
        ) from None
    total = mass.sum(-1, keepdim=True)
    if mass.numel() and not (bool((mass >= 0).all()) and bool((total > 0).all()) and bool(total.isfinite().all())):
        raise ConfigError("personalization needs finite values of at least 0, some of them above 0")
    return mass / total


def _row_factors(graph: Tensor) -> tuple[Tensor, Tensor]:
    """1 / sum of each row (0 if dangling), and 1.0 if dangling."""
    sums = graph.sum(-1)
    is_dangling = sums < DANGLING
    return torch.where(is_dangling, 0.0, 1 / sums), is_dangling.to(graph.dtype)


def _propagate(graph: Tensor, row_factors: Tensor, dangling: Tensor, scores: Tensor, teleport: Tensor) -> Tensor:
    """``P r`` without building P: rows are scaled in the vector."""
    product = torch.matmul((scores * row_factors)[..., None, :], graph)[..., 0, :]
    return product + teleport * (scores * dangling).sum(-1, keepdim=True)


def _iterate(graph: Tensor, damping: float, teleport: Tensor, tol: float, max_iterations: int) -> Tensor:
    row_factors, dangling = _row_factors(graph)
    scores = teleport
    for _ in range(max_iterations):
        before = scores
        scores = damping * _propagate(graph, row_factors, dangling, before, teleport) + (1 - damping) * teleport
        scores = scores / scores.sum(-1, keepdim=True)
        change = (scores - before).abs().sum(-1)
        # float32 can't be more accurate than its rounding
        if not change.numel() or float(change.max()) < max(tol, 8 * torch.finfo(scores.dtype).eps):
            return scores
    raise ConfigError(f"PageRank did not converge to {tol:g} in {max_iterations} iterations; use method='solve'")


def _solve(graph: Tensor, damping: float, teleport: Tensor) -> Tensor:
    weights, mass = graph.double(), teleport.double()
    sums = weights.sum(-1, keepdim=True)
    weights = torch.where(sums < DANGLING, mass[:, None], weights / sums)
    one = torch.eye(weights.shape[-1], dtype=torch.float64, device=weights.device)
    scores = torch.linalg.solve(one - damping * weights.mT, (1 - damping) * mass)
    return scores / scores.sum(-1, keepdim=True)
