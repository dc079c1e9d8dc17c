"""Image-independent patch orders, and statistics of orders.

``order[..., 0]`` is the patch that comes first, an index in raster order; its rank is 0. Letters: N patches of an h x w
grid, M images.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import ConfigError, ShapeError
from smalti.functional.graphs import ranks_of
from smalti.functional.random import sample_uniform

_STREAM = 71  # random stream of an image


def raster(grid: tuple[int, int]) -> Int[Tensor, " N"]:
    """Row by row from the top left."""
    _check_grid(grid)
    return torch.arange(grid[0] * grid[1])


def centre_out(grid: tuple[int, int]) -> Int[Tensor, " N"]:
    """By distance from the centre of the grid, nearest first; ties: the lower index first."""
    return _distance(grid).argsort(stable=True)


def border_in(grid: tuple[int, int]) -> Int[Tensor, " N"]:
    """By distance from the centre of the grid, farthest first; ties: the lower index first."""
    return (-_distance(grid)).argsort(stable=True)


def spiral(grid: tuple[int, int]) -> Int[Tensor, " N"]:
    """Along a spiral from the centre to the top left corner, each step to a neighbour."""
    _check_grid(grid)
    left = raster(grid).view(grid)
    path = []
    while left.numel():  # inwards: the top row, then rotate the rest by 90 degrees
        path.append(left[0])
        left = torch.rot90(left[1:])
    return torch.cat(path).flip(0)


def halton(grid: tuple[int, int]) -> Int[Tensor, " N"]:
    """Cells in the order in which the Halton sequence (base 2 for rows, base 3 for columns) first visits them.

    Any prefix is spread evenly over the grid. Source: Besnier et al., arXiv:2503.17076, for its use.
    """
    from scipy.stats import qmc  # heavy, and only needed here

    _check_grid(grid)
    height, width = grid
    num, seen = height * width, 4 * height * width
    while True:
        points = qmc.Halton(2, scramble=False).random(seen)[1:]  # without the first point, the corner (0, 0)
        cells = np.floor(points[:, 0] * height).astype(int) * width + np.floor(points[:, 1] * width).astype(int)
        _, first = np.unique(cells, return_index=True)
        if len(first) == num:
            return torch.from_numpy(cells[np.sort(first)])
        seen *= 2


def fixed_random(num_patches: int, seed: int = 0) -> Int[Tensor, " N"]:
    """One random permutation for all images: the control for orders that don't depend on the image."""
    return torch.randperm(num_patches, generator=torch.Generator().manual_seed(seed))


def random_orders(keys: Int[Tensor, " B"], num_patches: int) -> Int[Tensor, "B N"]:
    """A random permutation per image, determined by its key, independent of batch, process and workers."""
    return sample_uniform(keys, num_patches, _STREAM).argsort(dim=1, stable=True)


def num_kept(num_patches: int, rate: float) -> int:
    """Number of patches kept if the fraction ``rate`` is dropped: ``N - floor(rate N)``, at least one.

    Raises:
        ConfigError: for a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"rate={rate:g} of dropped patches: 0..1 (1 excluded) is needed")
    dropped = int(rate * num_patches + 1e-9)  # 0.29 * 100 is 28.999999999999996
    return max(1, num_patches - dropped)


def static_order(orders: Int[Tensor, "M N"]) -> Int[Tensor, " N"]:
    """Patches by their mean rank over images; ties: the lower index first."""
    return ranks_of(orders).double().mean(0).argsort(stable=True)


def image_dependence(orders: Int[Tensor, "M N"]) -> dict[str, float]:
    """How much orders depend on the image rather than on the position (Guo et al.'s published orders: 0.95 position).

    Returns:
        ``static_correlation``: mean over images of the correlation between its ranks and the mean ranks of the others;
        1: all the same. ``position_variance_ratio``: variance over patches of the mean rank, divided by that of all
        ranks;
        chance: 1/M, 1: all the same.

    Raises:
        ShapeError: for fewer than two images, or fewer than two patches.
    """
    if orders.ndim != 2 or min(orders.shape) < 2:
        raise ShapeError(f"orders of shape {tuple(orders.shape)}; (M, N) with M and N of at least 2 are needed")
    ranks = ranks_of(orders).double()
    others = (ranks.sum(0) - ranks) / (len(ranks) - 1)
    spread = ranks[0].var(correction=0)  # of 0..N-1, the same in all rows
    return {
        "static_correlation": float(_correlation(ranks, others).mean()),
        "position_variance_ratio": float(ranks.mean(0).var(correction=0) / spread),
    }


def top_overlap(first: Int[Tensor, "*B N"], second: Int[Tensor, "*C N"], k: int) -> Float[Tensor, "*D"]:
    """Fraction of the first k patches of one order that are among the first k of the other; chance: k/N.

    Args:
        first: orders.
        second: orders of the same patches; batch axes broadcast.
        k: 1..N.

    Raises:
        ConfigError: if k isn't in 1..N.
    """
    if not 1 <= k <= first.shape[-1]:
        raise ConfigError(f"k={k}: it must lie in 1..{first.shape[-1]}")
    return ((ranks_of(first) < k) & (ranks_of(second) < k)).sum(-1).double() / k


def rank_correlation(first: Int[Tensor, "*B N"], second: Int[Tensor, "*C N"]) -> Float[Tensor, "*D"]:
    """Spearman's correlation of two orders; batch axes broadcast."""
    return _correlation(ranks_of(first).double(), ranks_of(second).double())


def residual_correlation(first: Int[Tensor, "M N"], second: Int[Tensor, "M N"]) -> Float[Tensor, " M"]:
    """Correlation of the ranks of two orders after subtracting each one's mean rank of every position over the images.

    What two rankings share beyond one order for all images. NaN for an image with no deviation from the mean.
    """
    ranks = [ranks_of(orders).double() for orders in (first, second)]
    deviations = [each - each.mean(0) for each in ranks]
    flat = torch.stack([each.abs().amax(-1) < 1e-9 for each in deviations]).any(0)
    return _correlation(*deviations).masked_fill(flat, torch.nan)


def neighbour_correlation(orders: Int[Tensor, "*B N"], grid: tuple[int, int]) -> Float[Tensor, "*B"]:
    """Correlation of the ranks of patches that share an edge; near 0 without spatial structure."""
    if orders.shape[-1] != grid[0] * grid[1]:
        raise ShapeError(
            f"orders of {orders.shape[-1]} patches for a grid of {grid[0]}x{grid[1]}; the numbers must match"
        )
    ranks = ranks_of(orders).double().view(*orders.shape[:-1], *grid)
    pairs = ((ranks[..., 1:, :], ranks[..., :-1, :]), (ranks[..., 1:], ranks[..., :-1]))
    one = torch.cat([torch.cat([a.flatten(-2), b.flatten(-2)], -1) for a, b in pairs], -1)
    other = torch.cat([torch.cat([b.flatten(-2), a.flatten(-2)], -1) for a, b in pairs], -1)
    return _correlation(one, other)


def area_under(accuracy: Float[Tensor, " S"], rates: Float[Tensor, " S"]) -> tuple[float, float]:
    """Area under a curve over rates of dropped patches (trapezoidal rule), and the area divided by the range of the
    rates.

    Raises:
        ConfigError: unless rates are ascending.
    """
    if len(rates) < 2 or not bool((rates[1:] > rates[:-1]).all()):
        raise ConfigError("a curve needs at least two ascending rates")
    area = float(torch.trapezoid(accuracy.double(), rates.double()))
    return area, area / float(rates[-1] - rates[0])


def knee(accuracy: Float[Tensor, " S"], rates: Float[Tensor, " S"]) -> float:
    """The rate at the knee of a decreasing, concave curve: with both axes scaled to [0, 1], the largest ``y - (1 -
    x)``.

    Source: Satopaa et al., *Finding a "Kneedle" in a haystack*, 2011, without smoothing. NaN for a constant curve.
    """
    x = (rates - rates.min()) / (rates.max() - rates.min())
    height = accuracy.max() - accuracy.min()
    if not height > 0:
        return float("nan")
    return float(rates[((accuracy - accuracy.min()) / height - (1 - x)).argmax()])


def _check_grid(grid: tuple[int, int]) -> None:
    if min(grid) < 1:
        raise ShapeError(f"grid of {grid[0]}x{grid[1]} patches; at least 1x1 is needed")


def _distance(grid: tuple[int, int]) -> Tensor:
    """Squared distance of each cell from the centre, in units of half cells, which are integers."""
    _check_grid(grid)
    rows, columns = (2 * torch.arange(side) - (side - 1) for side in grid)
    return (rows[:, None] ** 2 + columns[None] ** 2).flatten()


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    first, second = (values - values.mean(-1, keepdim=True) for values in (first, second))
    return (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1)).clamp(min=1e-300)
