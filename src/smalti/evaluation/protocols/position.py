"""Position: how much patch tokens say about where their patch lies in the image; needs no labels.

Three questions: how well a ridge regression reads row and column from a token, how evenly clusters of tokens spread
over the image, and whether the most similar patches of other images lie in the same place.
Source: the question is that of RASA (Franca, arXiv:2507.14137, Sec. 2.3 and App. D.8), which removes what a linear head
reads of the position, and which plots the entropy of clusters over positions. The measures are our own, so there are no
published numbers to compare with.
Content is not independent of the position (the sky is at the top), so even tokens that know nothing of the position
score above chance on photos; and tokens that are all the same score 0. Read it together with another protocol.
Letters: n images, half of them fit the regression and are searched for neighbours (F), half are evaluated (E);
N = h*w patches, D embed_dim, K clusters.
"""

import dataclasses

import cv2
import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from smalti.config import Count, settings
from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import spread
from smalti.evaluation.features import Features
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.protocols.overclustering import cluster
from smalti.evaluation.result import FRACTION
from smalti.evaluation.tally import Tally, tally_mean
from smalti.functional.neighbours import nearest
from smalti.functional.spectra import sum_moments

RIDGE = 1e-3
"""Penalty of the regression, as a fraction of the mean variance of a dimension of the tokens."""
ITERS = 20
MIN_PATCHES = 8
"""Clusters with fewer patches have no entropy."""
QUERIES = 2048
"""Patches of all evaluated images that look for a neighbour, drawn once for all encoders."""
ENOUGH = 4
"""Fitted patches per dimension below which a note says that the regression overfits."""
PANEL_PX, MARGIN_PX = 280, 20
READ = "1: perfect, 0: nothing is read (can be negative), lower is better"
UNITS = {
    "position_r2": READ,
    "position_r2_row": READ,
    "position_r2_column": READ,
    "same_cell": "0 to 1, lower is better",
    "match_distance": "1: neighbours ignore the position, 0: all lie in the same place, higher is better",
    "spatial_entropy": FRACTION,
}

CAPTION = (
    "Left: where patches are read, mean over evaluated images; lines join neighbours in the grid. A point in the "
    "middle: nothing is read. An even grid: the position is read perfectly. Right: where the nearest patch of another "
    "image lies, relative to the patch itself in the middle; pale cells are found more often than by chance, dark ones "
    "less often."
)


def cells(grid: tuple[int, int]) -> Float[Tensor, "N 2"]:
    """Row and column of each patch, 0 to 1; 0 along a side of one patch."""
    rows, columns = (torch.arange(side, dtype=torch.float64) / max(side - 1, 1) for side in grid)
    return torch.cartesian_prod(rows, columns)


def chance(side: int) -> float:
    """Mean squared error of the best constant for ``side`` positions in 0..1: (h + 1) / (12 (h - 1)); 0 for one."""
    return (side + 1) / (12 * (side - 1)) if side > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class Readout:
    """A linear map from tokens to row and column."""

    token_mean: Float[Tensor, " D"]
    place_mean: Float[Tensor, " 2"]
    weight: Float[Tensor, "D 2"]

    def __call__(self, tokens: Float[Tensor, "... D"]) -> Float[Tensor, "... 2"]:
        """Predicted row and column, float64."""
        return self.place_mean + (tokens.double() - self.token_mean) @ self.weight


def fit_readout(tokens: Float[Tensor, "n N D"], places: Float[Tensor, "N 2"]) -> Readout:
    """Ridge regression of the places on centred tokens, in closed form from their moments.

    Args:
        tokens: ``(n, N, D)`` of the images to fit.
        places: of :func:`cells`.
    """
    width = tokens.shape[-1]
    moments = sum_moments(torch.cat([one.double(), places], dim=1) for one in tokens)
    covariance = moments.covariance
    inner, outer = covariance[:width, :width], covariance[:width, width:]
    penalty = (RIDGE * inner.diagonal().mean()).clamp(min=1e-12)  # tokens that don't vary predict the mean
    weight = torch.linalg.solve(inner + penalty * torch.eye(width, dtype=inner.dtype), outer)
    return Readout(moments.mean[:width], moments.mean[width:], weight)


def r2_of_images(
    read: Float[Tensor, "n N 2"], places: Float[Tensor, "N 2"], grid: tuple[int, int]
) -> Float[np.ndarray, "n 2"]:
    """1 - error / chance of row and column in each image; NaN along a side of one patch."""
    errors = (read - places).square().mean(1).numpy()
    limits = np.array([chance(side) for side in grid])
    return 1 - np.divide(errors, limits, out=np.full_like(errors, np.nan), where=limits > 0)


def spatial_entropy(labels: Int[np.ndarray, "n N"]) -> float:
    """Entropy of each cluster's histogram over the N places, divided by that of an even one, log min(N, size).

    Returns:
        Mean over the clusters of at least 8 patches, 0..1; NaN if there is none.
    """
    found = []
    for label in np.unique(labels):
        counts = (labels == label).sum(0)
        size = counts.sum()
        if size >= MIN_PATCHES:
            fractions = counts[counts > 0] / size
            found.append(-(fractions * np.log(fractions)).sum() / np.log(min(labels.shape[1], size)))
    return float(np.mean(found)) if found else float("nan")


def cell_distances(grid: tuple[int, int]) -> Float[Tensor, "N N"]:
    """Distance between all cells, in patches."""
    corners = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in grid))
    return torch.cdist(corners, corners, compute_mode="donot_use_mm_for_euclid_dist")


def draw_queries(seed: int, image: int, num_patches: int, number: int) -> Int[Tensor, " q"]:
    """Up to ``number`` patches of an image, in raster order."""
    drawn = np.random.default_rng((seed, image)).permutation(num_patches)[:number]
    return torch.from_numpy(np.sort(drawn))


@settings
class PositionConfig:
    """Settings of ``position``."""

    num_images: Count = 128
    """Number of images to measure, spread evenly over the set: every second one fits, the others are evaluated."""
    clusters: Count = 50
    """Number of clusters of patches, fewer if there are fewer than 8 patches for each."""


@register_protocol("position", need="images", settings=PositionConfig, has_presets=False, takes_norm=True)
@torch.no_grad()
def position(features: Features, config: EvalConfig) -> Scores:
    """How well the position of a patch is read from its token, and position bias of neighbours; needs no labels."""
    own: PositionConfig = config.of("position")
    size = features.dense_size(config.image_size)
    images = features.data.test
    grid = features.encoder.check_size(size, size)
    num_patches = grid[0] * grid[1]
    if num_patches < 2:
        raise ConfigError(
            f"images of {size} pixels have a single patch, which has no position; set a larger eval.image_size"
        )
    chosen = spread(len(images), own.num_images)
    subset = dataclasses.replace(images, samples=tuple(images.samples[place] for place in chosen))
    found, numbers = list[Tensor](), list[int]()
    for encoded, positions in features.encode(
        subset, size, "squash", features.batch_size, "position", norm=features.norm
    ):
        found.append(features.round(encoded.patches).float().cpu())
        numbers += positions
    is_fitted = torch.tensor([number % 2 == 0 for number in numbers])
    if not is_fitted.any() or is_fitted.all():
        raise DataError(
            f"{images.root}: position fits on half of the images and evaluates the other half, but {len(numbers)} of "
            f"the {len(subset)} {features.evaluated} can be read; give at least 2 in each half"
        )
    tokens = torch.cat(found)
    evaluated = [chosen[number] for number in numbers if number % 2]
    places = cells(grid)
    readout = fit_readout(tokens[is_fitted], places)
    read = torch.stack([readout(one) for one in tokens[~is_fitted]])
    r2 = np.full((len(images), 2), np.nan)
    r2[evaluated] = r2_of_images(read, places, grid)

    queries = torch.stack(
        [draw_queries(config.seed, place, num_patches, max(1, QUERIES // len(evaluated))) for place in evaluated]
    )
    matches = _match(tokens[is_fitted], tokens[~is_fitted], queries, features.device)
    distances = cell_distances(grid)
    same, apart, expected = np.full((3, len(images)), np.nan)
    same[evaluated] = (matches == queries).double().mean(1).numpy()
    apart[evaluated] = distances[queries, matches].sum(1).numpy()
    expected[evaluated] = distances.mean(1)[queries].sum(1).numpy()
    num_fitted, width = int(is_fitted.sum()) * num_patches, tokens.shape[2]
    used = max(1, min(own.clusters, len(tokens) * num_patches // MIN_PATCHES))
    labels = cluster(tokens.flatten(0, 1).numpy(), used, config.seed, iters=ITERS).reshape(len(tokens), num_patches)

    tallies = {
        "position_r2": tally_mean(_mean_of_known(r2)),
        "position_r2_row": tally_mean(r2[:, 0]),
        "position_r2_column": tally_mean(r2[:, 1]),
        "same_cell": tally_mean(same),
        "match_distance": Tally(np.nan_to_num(apart)[:, None], np.nan_to_num(expected)[:, None]),
    }
    scores = {name: tally.score() for name, tally in tallies.items()}
    settings = {
        "image_size": size,
        "resize": "to a square, aspect ratio ignored",
        "num_images": len(tokens),
        "num_fitted": int(is_fitted.sum()),
        "num_evaluated": len(evaluated),
        "grid": list(grid),
        "ridge": RIDGE,
        "fit_note": f"{num_fitted} fitted patches are few for tokens of {width} dimensions, so that position_r2 is too "
        "low; set a larger eval.position.num_images or eval.image_size"
        if num_fitted < ENOUGH * width
        else "",
        "chance": {"same_cell": 1 / num_patches},
        "queries_per_image": queries.shape[1],
        "num_clusters": used,
        "cache_dtype": config.cache_dtype,
    }
    return Scores(
        {**scores, "spatial_entropy": spatial_entropy(labels)},
        settings,
        {},
        units=UNITS,
        tallies=tallies,
        pictures={CAPTION: np.concatenate([grid_panel(read.mean(0), grid), match_panel(queries, matches, grid)], 1)},
    )


def _match(
    fitted: Float[Tensor, "F N D"], evaluated: Float[Tensor, "E N D"], queries: Int[Tensor, "E q"], device: torch.device
) -> Int[Tensor, "E q"]:
    """Cell of the patch with the largest cosine similarity among all patches of the fitted images."""
    keys = F.normalize(fitted.flatten(0, 1).to(device), dim=1)
    asked = evaluated.gather(1, queries[..., None].expand(-1, -1, evaluated.shape[2])).flatten(0, 1)
    _, found = nearest(F.normalize(asked.to(device), dim=1), keys, 1)
    return (found.cpu() % fitted.shape[1]).view_as(queries)


def _mean_of_known(values: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
    """Mean over the axes that have one."""
    known = np.isfinite(values)
    total = np.where(known, values, 0).sum(1)
    return np.divide(total, known.sum(1), out=np.full(len(values), np.nan), where=known.any(1))


def grid_panel(read: Float[Tensor, "N 2"], grid: tuple[int, int]) -> UInt8[np.ndarray, "P P 3"]:
    """The grid of patches as it is read: an even grid if it is read perfectly, a point if not at all."""
    panel = np.full((PANEL_PX, PANEL_PX, 3), 255, np.uint8)
    inner = PANEL_PX - 2 * MARGIN_PX

    def points(where: Tensor) -> np.ndarray:
        at = (where.flip(-1).clamp(-0.05, 1.05) * inner + MARGIN_PX).round().numpy().astype(np.int32)
        return at.reshape(*grid, 2)  # x, y

    for where, colour in ((cells(grid), (225, 225, 225)), (read, (0, 114, 178))):
        at = points(where)
        for line in (*at, *at.swapaxes(0, 1)):
            cv2.polylines(panel, [np.ascontiguousarray(line)], False, colour, 1, cv2.LINE_AA)
        for point in at.reshape(-1, 2).tolist():
            cv2.circle(panel, point, 2, colour, cv2.FILLED)
    return panel


def match_panel(
    queries: Int[Tensor, "E q"], matches: Int[Tensor, "E q"], grid: tuple[int, int]
) -> UInt8[np.ndarray, "P P 3"]:
    """How often a match lies at each offset, relative to a match with any patch; offsets of up to half the grid."""
    ratio = offset_ratio(queries.flatten().numpy(), matches.flatten().numpy(), grid)
    (top, left), (down, across) = ((side - 1 - side // 2 for side in grid), (side + side // 2 for side in grid))
    middle = ratio[top:down, left:across]
    # colours by the logarithm: 1 is the middle of the scale, 16 times the chance its end
    shade = np.log2(np.clip(middle, 1 / 16, 16)) / 8 + 0.5
    colours = (matplotlib.colormaps["magma"](shade)[..., :3] * 255).round().astype(np.uint8)
    inner = PANEL_PX - 2 * MARGIN_PX
    panel = np.full((PANEL_PX, PANEL_PX, 3), 255, np.uint8)
    panel[MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX] = cv2.resize(
        colours, (inner, inner), interpolation=cv2.INTER_NEAREST
    )
    return panel


def offset_ratio(
    queries: Int[np.ndarray, " m"], matches: Int[np.ndarray, " m"], grid: tuple[int, int]
) -> Float[np.ndarray, "H W"]:
    """Number of matches at each offset, divided by the number expected if every cell were as likely.

    Returns:
        ``(2h - 1, 2w - 1)``; the middle is the same place. 0 where nothing can lie.
    """
    found, expected = np.zeros((2, 2 * grid[0] - 1, 2 * grid[1] - 1))
    (down, across), (row, column) = divmod(queries, grid[1]), divmod(matches, grid[1])
    np.add.at(found, (row - down + grid[0] - 1, column - across + grid[1] - 1), 1)
    for top, left in zip(down, across, strict=True):
        expected[grid[0] - 1 - top : 2 * grid[0] - 1 - top, grid[1] - 1 - left : 2 * grid[1] - 1 - left] += 1
    expected /= grid[0] * grid[1]
    return np.divide(found, expected, out=np.zeros_like(found), where=expected > 0)
