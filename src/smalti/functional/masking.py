"""Which patches are hidden."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smalti.errors import ConfigError
from smalti.functional.random import sample_uniform


def random_mask(
    noise: Float[Tensor, "B N"], num_keep: int
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B N"], Int[Tensor, "B N"]]:
    """Hide a random subset of patches, the same number in every image: those with the largest noise.

    Args:
        noise: ``(B, N)`` independent uniform numbers, from :func:`smalti.functional.random.sample_uniform`.
        num_keep: how many patches stay visible, 1..N; papers round differently, so each method computes its own.

    Returns:
        ``(B, L)`` ids_keep, raster numbers of the visible patches, with ``L = num_keep``;
        ``(B, N)`` mask, True where a patch is hidden;
        ``(B, N)`` ids_restore, which puts visible and hidden tokens, in this order, back into raster order.

    Raises:
        ConfigError: if ``num_keep`` is not in 1..N.

    Source: He et al., MAE, arXiv:2111.06377v3, Sec. 3, "Simple implementation".
    """
    num_patches = noise.shape[1]
    if not 1 <= num_keep <= num_patches:
        raise ConfigError(
            f"masking leaves {num_keep} of {num_patches} patches visible; "
            f"choose a mask_ratio that leaves 1..{num_patches}"
        )
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :num_keep], ids_restore >= num_keep, ids_restore


def restore_order(
    visible: Float[Tensor, "B L D"], hidden: Float[Tensor, "B M D"], ids_restore: Int[Tensor, "B N"]
) -> Float[Tensor, "B N D"]:
    """Visible and hidden tokens back in raster order, with the ``ids_restore`` of :func:`random_mask`."""
    tokens = torch.cat([visible, hidden], dim=1)
    return tokens.gather(1, ids_restore[..., None].expand(-1, -1, tokens.shape[-1]))


def cross_mask(
    keys: Int[Tensor, " M"], counts: Int[Tensor, " M"], grid: tuple[int, int], *, stream: int = 0
) -> Bool[Tensor, "M N"]:
    """Hide patches by crosses, a whole row and a whole column each, about random patches; the last is cut to fit.

    Centres are drawn among the patches that are not hidden yet, so no two crosses share a row or a column. Of the last
    cross those members are hidden that are nearest to its centre, rows and columns away added, ties at random.

    Args:
        keys: one a mask; where masks don't need the device, keys on the CPU spare a wait for it at each cross.
        counts: how many patches to hide, 0..N; exactly as many are.
        grid: ``(h, w)``, N = h * w.
        stream: as for :func:`smalti.functional.random.sample_uniform`.

    Returns:
        ``(M, N)`` True where a patch is hidden, on the device of ``keys``.

    Source: named and drawn in Liu et al., "Intertwined content and positional features", ICML 2025; the rule is ours.
    """
    height, width = grid
    places = torch.arange(height * width, device=keys.device)
    rows, columns = places // width, places % width
    # the order of centres, and of ties; one draw serves all crosses, since what is left is still in random order
    centres, ties = sample_uniform(keys, 2 * height * width, stream).chunk(2, dim=1)
    mask = torch.zeros(len(keys), height * width, dtype=torch.bool, device=keys.device)
    while (mask.sum(1) < counts).any():
        centre = centres.masked_fill(mask, -1).argmax(1, keepdim=True)
        down, across = (rows - rows[centre]).abs(), (columns - columns[centre]).abs()  # (M, N)
        is_member = ((down == 0) | (across == 0)) & ~mask
        order = (down + across + ties).masked_fill(~is_member, torch.inf).argsort(1).argsort(1)
        mask |= is_member & (order < (counts - mask.sum(1))[:, None])
    return mask
