"""Principal components of patch tokens, and their alignment between two encoders.

Letters: B images, N = h*w patches, D embed_dim, K components kept.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

NUM_COLOURS = 3


def reduce_patches(patches: Float[Tensor, "B N D"], num_components: int) -> tuple[Float[Tensor, "B N K"], float]:
    """Patch tokens, centred over all images and projected on their directions of largest variance.

    The sign of each direction, which PCA doesn't determine, makes its largest entry positive, so that pages are
    reproducible.

    Returns:
        ``(B, N, K)`` coordinates with ``K = min(num_components, D)``, largest variance first; the explained fraction
        of the variance, 1 if there is no variance.
    """
    from scipy.linalg import eigh  # heavy, and only needed here

    features = patches.flatten(0, 1)
    centred = (features - features.mean(0)).double()
    scatter = (centred.T @ centred).numpy()
    dim = scatter.shape[0]
    values, vectors = eigh(scatter, subset_by_index=[max(dim - num_components, 0), dim - 1])  # ascending
    basis = np.ascontiguousarray(vectors[:, ::-1])
    largest = np.take_along_axis(basis, np.abs(basis).argmax(0, keepdims=True), axis=0)
    basis *= np.where(largest < 0, -1.0, 1.0)
    total = float(np.trace(scatter))
    fraction = float(values.clip(min=0).sum()) / total if total > 0 else 1.0
    return (centred @ torch.from_numpy(basis)).float().view(*patches.shape[:2], -1), fraction


def align_components(
    coordinates: Float[Tensor, "B N K"],
    grid: tuple[int, int],
    reference: Float[Tensor, "B M R"],
    reference_grid: tuple[int, int],
) -> Float[Tensor, "B N 3"]:
    """The first three components, reordered and with signs chosen to match the reference's first three.

    Components are only swapped and mirrored, never mixed: each encoder keeps its own directions. The assignment
    maximises the sum of absolute correlations over the positions of all images; components without a partner stay at
    the end unchanged, and missing ones are zero.

    Args:
        coordinates: coordinates of one encoder, from :func:`reduce_patches`.
        grid: ``(h, w)`` of its images.
        reference: coordinates of another encoder on the same images.
        reference_grid: ``(h, w)`` of the reference, which is resampled bilinearly if the grids differ.
    """
    from scipy.optimize import linear_sum_assignment  # heavy, and only needed here

    ours, theirs = (_three(x) for x in (coordinates, reference))
    batch, number = ours.shape[:2]
    maps = theirs.transpose(1, 2).reshape(batch, NUM_COLOURS, *reference_grid)
    if reference_grid != grid:
        maps = torch.nn.functional.interpolate(maps, grid, mode="bilinear", align_corners=False, antialias=True)
    theirs = maps.reshape(batch, NUM_COLOURS, number).transpose(1, 2)
    one, other = (x.flatten(0, 1).double() for x in (ours, theirs))
    one, other = (x - x.mean(0) for x in (one, other))
    norms = one.norm(dim=0)[:, None] * other.norm(dim=0)[None]
    correlation = torch.where(norms > 0, one.T @ other / norms.clamp(min=1e-30), 0.0).numpy()  # (ours, theirs)
    rows, columns = linear_sum_assignment(-np.abs(correlation))
    order = rows[np.argsort(columns)]
    signs = np.where(correlation[order, np.arange(NUM_COLOURS)] < 0, -1.0, 1.0)
    return ours[..., torch.from_numpy(order)] * torch.from_numpy(signs).float()


def _three(coordinates: Float[Tensor, "B N K"]) -> Float[Tensor, "B N 3"]:
    first = coordinates[..., :NUM_COLOURS]
    return torch.nn.functional.pad(first, (0, NUM_COLOURS - first.shape[-1]))
