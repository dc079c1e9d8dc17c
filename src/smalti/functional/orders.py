"""Orders of patches that look at no image, and what orders have in common.

``order[..., 0]`` is the patch that comes first, an index in raster order; its rank is 0. Letters: N patches of an h x w
grid, M images.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import qmc
from torch import Tensor

from smalti.errors import ConfigError, ShapeError
from smalti.functional.graphs import ranks_of
from smalti.functional.random import sample_uniform

_STREAM = 71  # of an image's random numbers


def raster(grid: tuple[int, int]) -> Int[Tensor, " N"]:
    """Row by row from the upper left."""
    _check_grid(grid)
    return torch.arange(grid[0] * grid[1])


def centre_out(grid: tuple[int, int]) -> Int[Tensor, " N"]:
    """By distance from the centre of the grid; of equal ones the lower index first."""
    return _distance(grid).argsort(stable=True)


def border_in(grid: tuple[int, int]) -> Int[Tensor, " N"]:
    """By distance from the centre, the farthest first; of equal ones the lower index first."""
    return (-_distance(grid)).argsort(stable=True)


def spiral(grid: tuple[int, int]) -> Int[Tensor, " N"]:
    """Along a path from the centre to the upper left corner, each step to a neighbour, ring around ring."""
    _check_grid(grid)
    left = raster(grid).view(grid)
    path = []
    while left.numel():  # inwards: the upper row, then what is left turned by a quarter
        path.append(left[0])
        left = torch.rot90(left[1:])
    return torch.cat(path).flip(0)


def halton(grid: tuple[int, int]) -> Int[Tensor, " N"]:
    """Cells as the Halton sequence (base 2 down, base 3 across, from its first point on) visits them, each once.

    Any first part of it lies evenly over the grid. Source: Besnier et al., arXiv:2503.17076, for the use.
    """
    _check_grid(grid)
    height, width = grid
    num, seen = height * width, 4 * height * width
    while True:
        points = qmc.Halton(2, scramble=False).random(seen)[1:]  # the first is the corner (0, 0) itself
        cells = np.floor(points[:, 0] * height).astype(int) * width + np.floor(points[:, 1] * width).astype(int)
        _, first = np.unique(cells, return_index=True)
        if len(first) == num:
            return torch.from_numpy(cells[np.sort(first)])
        seen *= 2


def fixed_random(num_patches: int, seed: int = 0) -> Int[Tensor, " N"]:
    """One permutation for all images: what any order that is not an image's own must be held against."""
    return torch.randperm(num_patches, generator=torch.Generator().manual_seed(seed))


def random_orders(keys: Int[Tensor, " B"], num_patches: int) -> Int[Tensor, "B N"]:
    """A permutation for each image, drawn from its key: the same in any batch, process and number of workers."""
    return sample_uniform(keys, num_patches, _STREAM).argsort(dim=1, stable=True)


def num_kept(num_patches: int, rate: float) -> int:
    """How many patches are left when a share of them is dropped: ``N - floor(rate N)``, at least one.

    Raises:
        ConfigError: for a rate outside of 0..1 (1 excluded).
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"a rate of {rate:g} of dropped patches; 0..1 (1 excluded) is needed")
    dropped = int(rate * num_patches + 1e-9)  # 0.29 * 100 is 28.999999999999996
    return max(1, num_patches - dropped)


def static_order(orders: Int[Tensor, "M N"]) -> Int[Tensor, " N"]:
    """Patches by their mean rank over images; of equal ones the lower index first."""
    return ranks_of(orders).double().mean(0).argsort(stable=True)


def image_dependence(orders: Int[Tensor, "M N"]) -> dict[str, float]:
    """How much of orders is one order for all images (Guo et al.'s published ones: 0.95 of the variance).

    Returns:
        ``static_correlation``: mean over images of the correlation between its ranks and the mean ranks of the others;
        1: all alike. ``position_variance_ratio``: variance over patches of the mean rank, divided by that of all ranks;
        1/M is chance, 1: all alike.

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
    """Share of the first k patches of one order that are among the first k of the other; chance is k/N.

    Args:
        first: orders.
        second: orders of the same patches; batches broadcast.
        k: in 1..N.

    Raises:
        ConfigError: for another k.
    """
    if not 1 <= k <= first.shape[-1]:
        raise ConfigError(f"k={k}: it must lie in 1..{first.shape[-1]}")
    return ((ranks_of(first) < k) & (ranks_of(second) < k)).sum(-1).double() / k


def rank_correlation(first: Int[Tensor, "*B N"], second: Int[Tensor, "*C N"]) -> Float[Tensor, "*D"]:
    """Spearman's correlation of two orders; batches broadcast."""
    return _correlation(ranks_of(first).double(), ranks_of(second).double())


def neighbour_correlation(orders: Int[Tensor, "*B N"], grid: tuple[int, int]) -> Float[Tensor, "*B"]:
    """Correlation of the ranks of patches that share an edge; near 0 where an order follows nothing in space."""
    if orders.shape[-1] != grid[0] * grid[1]:
        raise ShapeError(f"orders of {orders.shape[-1]} patches for a grid of {grid[0]}x{grid[1]}")
    ranks = ranks_of(orders).double().view(*orders.shape[:-1], *grid)
    pairs = ((ranks[..., 1:, :], ranks[..., :-1, :]), (ranks[..., 1:], ranks[..., :-1]))
    one = torch.cat([torch.cat([a.flatten(-2), b.flatten(-2)], -1) for a, b in pairs], -1)
    other = torch.cat([torch.cat([b.flatten(-2), a.flatten(-2)], -1) for a, b in pairs], -1)
    return _correlation(one, other)


def area_under(accuracy: Float[Tensor, " S"], rates: Float[Tensor, " S"]) -> tuple[float, float]:
    """Trapezoid of a curve over rates of dropped patches, and the same divided by the range of the rates.

    Raises:
        ConfigError: unless rates rise.
    """
    if len(rates) < 2 or not bool((rates[1:] > rates[:-1]).all()):
        raise ConfigError("a curve needs at least two rates that rise")
    area = float(torch.trapezoid(accuracy.double(), rates.double()))
    return area, area / float(rates[-1] - rates[0])


def knee(accuracy: Float[Tensor, " S"], rates: Float[Tensor, " S"]) -> float:
    """The rate at which a falling, concave curve bends most: both axes to [0, 1], the largest ``y - (1 - x)``.

    Source: Satopaa et al., *Finding a "Kneedle" in a haystack*, 2011, without smoothing. NaN for a curve that is flat.
    """
    x = (rates - rates.min()) / (rates.max() - rates.min())
    height = accuracy.max() - accuracy.min()
    if not height > 0:
        return float("nan")
    return float(rates[((accuracy - accuracy.min()) / height - (1 - x)).argmax()])


def _check_grid(grid: tuple[int, int]) -> None:
    if min(grid) < 1:
        raise ShapeError(f"a grid of {grid[0]}x{grid[1]} patches; at least one of each is needed")


def _distance(grid: tuple[int, int]) -> Tensor:
    """Squared, of each cell from the centre, in whole numbers: half cells."""
    _check_grid(grid)
    rows, columns = (2 * torch.arange(side) - (side - 1) for side in grid)
    return (rows[:, None] ** 2 + columns[None] ** 2).flatten()


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    first, second = (values - values.mean(-1, keepdim=True) for values in (first, second))
    return (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1)).clamp(min=1e-300)
