"""Principal components of patch tokens, and how those of two encoders are brought side by side.

Letters: B images, N = h*w patches, D embed_dim, K components kept.
"""

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

NUM_COLOURS = 3


def reduce_patches(patches: Float[Tensor, "B N D"], num_components: int) -> tuple[Float[Tensor, "B N K"], float]:
    """Patch tokens less their mean over all images, along their directions of largest variance.

    The sign of a direction, which PCA leaves open, makes its largest entry positive, so that a page comes out the same
    each time.

    Returns:
        ``(B, N, K)`` coordinates with ``K = min(num_components, D)``, largest variance first; the share of the variance
        that they hold, 1 where there is no variance.
    """
    features = patches.flatten(0, 1)
    centred = (features - features.mean(0)).double()
    scatter = (centred.T @ centred).numpy()
    dim = scatter.shape[0]
    values, vectors = scipy.linalg.eigh(scatter, subset_by_index=[max(dim - num_components, 0), dim - 1])  # ascending
    basis = np.ascontiguousarray(vectors[:, ::-1])
    largest = np.take_along_axis(basis, np.abs(basis).argmax(0, keepdims=True), axis=0)
    basis *= np.where(largest < 0, -1.0, 1.0)
    total = float(np.trace(scatter))
    share = float(values.clip(min=0).sum()) / total if total > 0 else 1.0
    return (centred @ torch.from_numpy(basis)).float().view(*patches.shape[:2], -1), share


def align_components(
    coordinates: Float[Tensor, "B N K"],
    grid: tuple[int, int],
    reference: Float[Tensor, "B M R"],
    reference_grid: tuple[int, int],
) -> Float[Tensor, "B N 3"]:
    """The first three components in the order and with the signs in which they resemble the reference's first three.

    Components are only swapped and mirrored, never mixed: each encoder keeps its own directions. Of all assignments
    that with the greatest sum of absolute correlations over the places of all images is taken; a component that the
    reference has no partner for stays at the end as it is, and missing ones are zero.

    Args:
        coordinates: of one encoder, from :func:`reduce_patches`.
        grid: ``(h, w)`` of its images.
        reference: of another encoder on the same images.
        reference_grid: ``(h, w)`` of the reference; where it differs, it is resampled bilinearly.
    """
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
