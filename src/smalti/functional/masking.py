"""Patch masks: random, crosses, blocks; and numbers of masked patches."""

import itertools
import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smalti.errors import ConfigError
from smalti.functional.random import sample_uniform

_ROUNDS = 16  # tries of the block sampler per call of the generator
_ASPECT = 0.3


def random_mask(
    noise: Float[Tensor, "B N"], num_keep: int
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B N"], Int[Tensor, "B N"]]:
    """Mask a random subset of patches, the same number in every image: those with the largest noise.

    Args:
        noise: ``(B, N)`` independent uniform numbers, from :func:`smalti.functional.random.sample_uniform`.
        num_keep: number of visible patches, 1..N; papers round differently, so each method computes its own.

    Returns:
        ``(B, L)`` ids_keep, raster indices of the visible patches, with ``L = num_keep``;
        ``(B, N)`` mask, True where a patch is masked;
        ``(B, N)`` ids_restore, which puts visible and masked tokens, in this order, back into raster order.

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
    """Visible and masked tokens back in raster order, with the ``ids_restore`` of :func:`random_mask`."""
    tokens = torch.cat([visible, hidden], dim=1)
    return tokens.gather(1, ids_restore[..., None].expand(-1, -1, tokens.shape[-1]))


def cross_mask(
    keys: Int[Tensor, " M"], counts: Int[Tensor, " M"], grid: tuple[int, int], *, stream: int = 0
) -> Bool[Tensor, "M N"]:
    """Mask patches by crosses, a whole row and a whole column each, centred on random patches; the last is cut to fit.

    Centres are sampled among unmasked patches, so no two crosses share a row or a column. Of the last cross, the
    patches nearest to its centre in L1 distance are masked, with ties broken at random.

    Args:
        keys: one per mask; keys on the CPU avoid a synchronisation per cross.
        counts: number of patches to mask, 0..N; met exactly.
        grid: ``(h, w)``, N = h * w.
        stream: as for :func:`smalti.functional.random.sample_uniform`.

    Returns:
        ``(M, N)`` True where a patch is masked, on the device of ``keys``.

    Source: shown in Liu et al., "Intertwined content and positional features", ICML 2025; the exact rule is ours.
    """
    height, width = grid
    places = torch.arange(height * width, device=keys.device)
    rows, columns = places // width, places % width
    # order of centres and of ties; one sample serves all crosses, since the remaining patches stay in random order
    centres, ties = sample_uniform(keys, 2 * height * width, stream).chunk(2, dim=1)
    mask = torch.zeros(len(keys), height * width, dtype=torch.bool, device=keys.device)
    while (mask.sum(1) < counts).any():
        centre = centres.masked_fill(mask, -1).argmax(1, keepdim=True)
        down, across = (rows - rows[centre]).abs(), (columns - columns[centre]).abs()  # (M, N)
        is_member = ((down == 0) | (across == 0)) & ~mask
        order = (down + across + ties).masked_fill(~is_member, torch.inf).argsort(1).argsort(1)
        mask |= is_member & (order < (counts - mask.sum(1))[:, None])
    return mask


def block_mask(
    keys: Int[Tensor, " M"],
    counts: Int[Tensor, " M"],
    grid: tuple[int, int],
    *,
    smallest: float,
    largest: int | None = None,
    tries: int = 10,
    stream: int = 0,
) -> Bool[Tensor, "M N"]:
    """Mask patches by random rectangles, until enough are masked or ``tries`` in a row fail.

    A rectangle's area is uniform between ``smallest`` and the number still to mask; the logarithm of height / width is
    uniform between those of 0.3 and 1 / 0.3. It must be smaller than the grid in both directions, and mask at least one
    new patch and not too many. So a mask may have fewer patches than its count, and never more.

    Args:
        keys: one per mask; keys on the CPU avoid a synchronisation per try.
        counts: number of patches to mask, 0..N.
        grid: ``(h, w)``, N = h * w.
        smallest: area in patches: ``(min(h, w) // 3) ** 2`` in iBOT, 4 in DINOv2. If fewer remain, areas lie between
            both numbers, too.
        largest: largest area of a rectangle; None: the number still to mask.
        tries: failures in a row after which a mask is complete.
        stream: as for :func:`smalti.functional.random.sample_uniform`; this and the next 1000 streams are used.

    Returns:
        ``(M, N)`` True where a patch is masked, on the device of ``keys``.

    Source: Bao et al., BEiT, arXiv:2106.08254v2, Alg. 1; Zhou et al., iBOT, arXiv:2111.07832v3; Oquab et al., DINOv2,
        arXiv:2304.07193v2, with the numbers of their released code.
    """
    height, width = grid
    mask = torch.zeros(len(keys), height, width, dtype=torch.bool, device=keys.device)
    left = counts.clone()
    misses = torch.zeros_like(left)
    rows, columns = (torch.arange(n, device=keys.device) for n in grid)
    bound = height * width if largest is None else largest
    for number in itertools.count():
        active = (left > 0) & (misses < tries)
        if not active.any():
            return mask.flatten(1)
        if number % _ROUNDS == 0:
            draws = sample_uniform(keys, 4 * _ROUNDS, stream + number // _ROUNDS).reshape(len(keys), _ROUNDS, 4)
        size, shape, y, x = draws[:, number % _ROUNDS].double().unbind(1)
        area = smallest + size * (left.clamp(max=bound) - smallest)
        ratio = torch.exp((2 * shape - 1) * math.log(_ASPECT))
        h, w = (area * ratio).clamp(min=0).sqrt().round(), (area / ratio).clamp(min=0).sqrt().round()
        top, start = (y * (height - h + 1)).floor(), (x * (width - w + 1)).floor()
        is_row = (rows >= top[:, None]) & (rows < (top + h)[:, None])  # (M, h)
        is_column = (columns >= start[:, None]) & (columns < (start + w)[:, None])
        box = is_row[:, :, None] & is_column[:, None, :]
        new = (box & ~mask).sum((1, 2))
        taken = active & (h < height) & (w < width) & (new > 0) & (new <= left)
        mask |= box & taken[:, None, None]
        left -= new * taken
        misses = torch.where(taken, 0, misses + 1)
    raise AssertionError("count has no end")


def stratified_counts(
    noise: Float[Tensor, "M 2"],
    num_masked: int,
    ratios: tuple[float, float],
    num_patches: int,
    from_end: bool = False,
) -> Int[Tensor, " M"]:
    """Numbers of patches to mask in M views: ``num_masked`` of them are masked, with stratified ratios.

    The i-th masked view samples its ratio between edges i and i + 1 of ``linspace(*ratios, num_masked + 1)`` and masks
    ``int(N * ratio)`` patches, so that all batches have about the same number of masked patches.

    Args:
        noise: uniform in 0..1; the first number orders the views, the second is the position in the stratum.
        num_masked: 0..M.
        ratios: smallest and largest fraction of patches.
        num_patches: N.
        from_end: mask the last views of the order, not the first: two calls that mask at most M views together never
            mask the same one.

    Source: Oquab et al., DINOv2, arXiv:2304.07193v2, released code.
    """
    rank = noise[:, 0].argsort(stable=True).argsort(stable=True)
    if from_end:
        rank = len(rank) - 1 - rank
    low, high = ratios
    ratio = low + (high - low) * (rank + noise[:, 1].double()) / max(num_masked, 1)
    return torch.where(rank < num_masked, (num_patches * ratio).long(), 0)
