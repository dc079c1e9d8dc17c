"""Scores and orders of patches from who depends on whom: PageRank, its first step, and a cover without redundancy.

A dependency graph is ``A`` with ``A[n, j]`` in [0, 1]: how much patch n leans on patch j. Letters: N patches. What lies
on the diagonal is not looked at.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import ConfigError, ShapeError
from smalti.functional.precision import at_least_float32

DANGLING = 1e-12
"""A patch whose weights sum to less leans on nobody; what it would hand on goes where the teleport goes."""
DEGENERATE = 1e-6
"""N times the spread of the scores below which all patches count alike."""
IN_HAND = {"cpu": 2**21}
"""Bytes of graphs that are worked on at a time: on a CPU what its cache holds; elsewhere 256 MiB."""


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
    """How much influence each patch has: ``r = (1 - c) b + c P r`` (Guo et al., arXiv:2511.22281, Sec. 3).

    The paper says that P is column-stochastic, not how it comes from A. ``influence`` divides each *row* of A by its
    sum and transposes: a patch scores when patches that score lean on it; networkx's PageRank of the graph whose edge
    n -> j weighs ``A[n, j]``. ``literal`` divides each *column*, which takes out how much a patch is leaned on, the
    very thing to find; it is the PageRank of the transposed graph.

    Args:
        dependency: square; any batch, also none; weights in [0, 1], any float type (computed in float32 at least).
        damping: c, in [0, 1).
        personalization: b, ``(..., N)``, not negative, any sum above 0, for each graph or for all; None: 1/N.
        orientation: ``influence`` or ``literal``.
        method: ``power`` iterates; ``solve`` solves ``(I - c P) r = (1 - c) b`` in float64.
        tol: of ``power``, the sum of absolute changes in a graph below which it stops. Graphs that are worked on
            together go on until all are there, so a batch changes a graph's scores by less than this.
        max_iterations: of ``power``; each makes the error at least c times smaller.

    Returns:
        Scores that sum to 1, in the type that was computed in (float32 for half precision).

    Raises:
        ShapeError: if it isn't square, or ``personalization`` doesn't fit.
        ConfigError: for weights outside of [0, 1] or not finite, another damping, a personalization without any mass,
            or if ``power`` does not get there.
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
    """The share of all patches' dependence that falls on each patch: PageRank's first step from equal scores.

    Where it orders patches as PageRank does, iterating adds nothing.

    Args:
        dependency: as for :func:`pagerank`.

    Returns:
        Scores that sum to 1.
    """
    graph = _checked(dependency)
    num = graph.shape[-1]
    shares, dangling = _row_factors(graph)
    uniform = graph.new_full(graph.shape[:-1], 1 / num)
    return _handed_on(graph, shares, dangling, uniform, uniform)


@torch.no_grad()
def coverage_order(dependency: Float[Tensor, "*B N N"]) -> Int[Tensor, "*B N"]:
    """Patches in an order that covers the others early: each is the one that raises ``sum_n max_j A[n, j]`` over those
    taken (and itself) most. Ours, not the paper's: PageRank ranks what is redundant beside what it repeats.

    Greedy on a monotone submodular function (facility location; Nemhauser, Wolsey & Fisher 1978), so each prefix
    covers at least 1 - 1/e of what any set of its size can. Equal gains: the lower index first.

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
    """Patches by descending score; of equal ones the lower index comes first. ``descending(...)[..., 0]`` is the most
    important patch."""
    return torch.argsort(-scores, dim=-1, stable=True)


def ranks_of(order: Int[Tensor, "*B N"]) -> Int[Tensor, "*B N"]:
    """The place of each patch in an order; 0 is first."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def is_degenerate(scores: Float[Tensor, "*B N"]) -> Tensor:
    """``(*B,)`` True where all scores are alike, so that their order says nothing but which index is lower."""
    return scores.shape[-1] * (scores.amax(-1) - scores.amin(-1)) < DEGENERATE


def _check_shape(dependency: Tensor) -> None:
    if dependency.ndim < 2 or dependency.shape[-1] != dependency.shape[-2] or not dependency.shape[-1]:
        raise ShapeError(f"a dependency graph of shape {tuple(dependency.shape)}; (..., N, N) with N >= 1 is needed")


def _at_once(dependency: Tensor) -> int:
    """How many graphs are worked on together."""
    size = dependency.shape[-1] ** 2 * max(4, dependency.element_size())
    return max(1, IN_HAND.get(dependency.device.type, 2**28) // size)


def _checked(dependency: Tensor) -> Tensor:
    _check_shape(dependency)
    graph = at_least_float32(dependency)
    if graph.numel():
        low, high = (float(value) for value in graph.aminmax())
        if not (low >= 0 and high <= 1):  # also false for what is no number
            raise ConfigError(f"weights of a dependency graph lie in {low:.4g}..{high:.4g}; 0..1 is needed")
    if bool(graph.diagonal(dim1=-2, dim2=-1).any()):  # CoMAE's has none: no copy then
        graph = graph.clone()
        graph.diagonal(dim1=-2, dim2=-1).zero_()
    return graph


def _teleport(personalization: Tensor | None, dependency: Tensor) -> Tensor:
    """``(*B, N)``, sums to 1, in the type to compute in."""
    shape, num = dependency.shape[:-1], dependency.shape[-1]
    like = at_least_float32(dependency[..., :0])
    if personalization is None:
        return like.new_full(shape, 1 / num)
    try:
        mass = personalization.to(like).expand(shape)
    except RuntimeError:
        raise ShapeError(
            f"personalization of shape {tuple(personalization.shape)} for graphs {tuple(dependency.shape)}"
        ) from None
    total = mass.sum(-1, keepdim=True)
    if mass.numel() and not (bool((mass >= 0).all()) and bool((total > 0).all()) and bool(total.isfinite().all())):
        raise ConfigError("personalization needs finite masses, none below 0 and some above it")
    return mass / total


def _row_factors(graph: Tensor) -> tuple[Tensor, Tensor]:
    """1 / sum of each row (0 where it dangles), and 1.0 where it does."""
    sums = graph.sum(-1)
    is_dangling = sums < DANGLING
    return torch.where(is_dangling, 0.0, 1 / sums), is_dangling.to(graph.dtype)


def _handed_on(graph: Tensor, shares: Tensor, dangling: Tensor, scores: Tensor, teleport: Tensor) -> Tensor:
    """``P r`` without ever making P: rows are scaled in the vector."""
    product = torch.matmul((scores * shares)[..., None, :], graph)[..., 0, :]
    return product + teleport * (scores * dangling).sum(-1, keepdim=True)


def _iterate(graph: Tensor, damping: float, teleport: Tensor, tol: float, max_iterations: int) -> Tensor:
    shares, dangling = _row_factors(graph)
    scores = teleport
    for _ in range(max_iterations):
        before = scores
        scores = damping * _handed_on(graph, shares, dangling, before, teleport) + (1 - damping) * teleport
        scores = scores / scores.sum(-1, keepdim=True)
        change = (scores - before).abs().sum(-1)
        # float32 can't come closer than its own rounding
        if not change.numel() or float(change.max()) < max(tol, 8 * torch.finfo(scores.dtype).eps):
            return scores
    raise ConfigError(f"PageRank did not settle to {tol:g} in {max_iterations} iterations; use method='solve'")


def _solve(graph: Tensor, damping: float, teleport: Tensor) -> Tensor:
    weights, mass = graph.double(), teleport.double()
    sums = weights.sum(-1, keepdim=True)
    weights = torch.where(sums < DANGLING, mass[:, None], weights / sums)
    one = torch.eye(weights.shape[-1], dtype=torch.float64, device=weights.device)
    scores = torch.linalg.solve(one - damping * weights.mT, (1 - damping) * mass)
    return scores / scores.sum(-1, keepdim=True)
