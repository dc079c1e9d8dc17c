"""Exact nearest neighbours by matrix products, and labels from neighbours.

Brute force: similarities are computed in chunks, and only the best of each chunk are kept. Ties go to the first key, so
the result doesn't depend on the chunks (except for rounding of the matrix product). For this, a similarity and the
index of its key are packed into one integer, which sorts in the order of the result.

Letters: Q queries, M keys, D embed_dim, K neighbours, C classes, B images, H W their pixels, N = h*w patches.
"""

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from smalti.errors import ConfigError, ShapeError

_QUERIES_AT_ONCE, _KEYS_AT_ONCE = 256, 20480
_MIXED_AT_ONCE = 128  # queries whose neighbours' labels are in memory: fits into the cache
_BLOCK = 32  # similarities of which only the maximum is compared first
_LAST_PLACE = 2**32 - 1
_RERANKED = 2  # times K: candidates from half precision, compared again in float32


def nearest(
    queries: Float[Tensor, "Q D"],
    keys: Float[Tensor, "M D"],
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    query_chunk: int = _QUERIES_AT_ONCE,
    key_chunk: int = _KEYS_AT_ONCE,
) -> tuple[Float[Tensor, "Q K"], Int[Tensor, "Q K"]]:
    """The k keys with the largest inner product with each query (cosine similarity for unit vectors); exact.

    Args:
        queries: ``(Q, D)``; their norm scales the similarities but not the order.
        keys: ``(M, D)`` on the same device, of any float type; normalised by the caller for cosine similarity.
        k: K, neighbours per query, 1..M.
        dtype: type of the matrix product. With ``float16`` and ``bfloat16``, the best 2k keys are compared again in
            float32, so that the result is that of float32 unless rounding drops a neighbour from the best 2k.
        query_chunk: queries per chunk; affects memory and time, not the result.
        key_chunk: keys per chunk; affects memory and time, not the result.

    Returns:
        ``(Q, K)`` float32 inner products in descending order, and the indices of those keys; ties in order of index.

    Raises:
        ConfigError: if ``k`` is less than 1 or more than there are keys.

    Cost: Q * M * D multiplications, and ``query_chunk * key_chunk`` similarities in memory.
    """
    if not 1 <= k <= len(keys):
        raise ConfigError(f"k={k}: there are {len(keys)} keys; choose a k in 1..{len(keys)}")
    is_half = dtype in (torch.float16, torch.bfloat16)
    wanted = min(_RERANKED * k, len(keys)) if is_half else k
    sims = torch.empty(len(queries), k, device=queries.device)
    places = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    # One buffer for all products: new memory pages would cost as much as selecting the neighbours.
    room = torch.empty(min(query_chunk, len(queries)) * min(key_chunk, len(keys)), dtype=dtype, device=queries.device)
    for first in range(0, len(queries), query_chunk):
        chunk = queries[first : first + query_chunk].float()
        packed = _best(chunk.to(dtype), keys, wanted, key_chunk, room)
        if is_half:
            found = _place_of(packed)
            exact = torch.einsum("qd,qkd->qk", chunk, keys[found].float())
            packed = _pack(exact, _LAST_PLACE - found).topk(k, dim=1).values
        sims[first : first + len(chunk)], places[first : first + len(chunk)] = _sim_of(packed), _place_of(packed)
    return sims, places


def patch_counts(
    masks: Integer[Tensor, "B H W"], patch_size: tuple[int, int], num_classes: int, ignore: int
) -> Integer[Tensor, "B N C"]:
    """Number of pixels of each class in each patch.

    Args:
        masks: ``(B, H, W)`` classes 0..C-1, or ``ignore``, which isn't counted.
        patch_size: height and width of a patch; they divide H and W.
        num_classes: C.
        ignore: value of pixels without a label.

    Returns:
        ``(B, N, C)`` counts, patches in raster order: uint8 if a patch has up to 255 pixels, int16 up to 32767, else
        int32. Exact, and smaller than float32 fractions.

    Raises:
        ShapeError: if the patch size does not divide the masks.
    """
    (num_images, height, width), (patch_h, patch_w) = masks.shape, patch_size
    if height % patch_h or width % patch_w:
        raise ShapeError(f"masks are {height}x{width} pixels, which patch_size={patch_h}x{patch_w} does not divide")
    h, w = height // patch_h, width // patch_w
    num_pixels = patch_h * patch_w
    dtype = torch.uint8 if num_pixels <= 255 else torch.int16 if num_pixels <= 32767 else torch.int32
    counts = torch.empty(num_images, h * w, num_classes, dtype=dtype, device=masks.device)
    # one bin per patch and class, and one per patch for ignored pixels
    cells = torch.arange(h * w, device=masks.device).view(h, 1, w, 1).expand(h, patch_h, w, patch_w)
    cells = cells.reshape(height, width) * (num_classes + 1)
    for place, mask in enumerate(masks):
        bins = cells + mask.masked_fill(mask == ignore, num_classes)
        found = torch.bincount(bins.flatten(), minlength=h * w * (num_classes + 1))
        counts[place] = found.view(h * w, num_classes + 1)[:, :num_classes]
    return counts


def mix_labels(
    weights: Float[Tensor, "Q K"], places: Int[Tensor, "Q K"], counts: Integer[Tensor, "M C"]
) -> Float[Tensor, "Q C"]:
    """Weighted mean of the class fractions of neighbours, without computing fractions of the whole memory.

    Args:
        weights: ``(Q, K)`` weights of the neighbours, such as a softmax over their similarities.
        places: ``(Q, K)`` indices of the neighbours among the M.
        counts: ``(M, C)`` pixels of each class; empty rows contribute nothing.
    """
    mixed = torch.empty(len(places), counts.shape[1], device=weights.device)
    for first in range(0, len(places), _MIXED_AT_ONCE):
        part = slice(first, first + _MIXED_AT_ONCE)
        chosen = counts.index_select(0, places[part].flatten()).view(-1, places.shape[1], counts.shape[1]).float()
        fractions = weights[part] / chosen.sum(2).clamp(min=1)
        mixed[part] = torch.einsum("qk,qkc->qc", fractions, chosen)
    return mixed


def _best(
    queries: Float[Tensor, "Q D"], keys: Float[Tensor, "M D"], k: int, key_chunk: int, room: Float[Tensor, " L"]
) -> Int[Tensor, "Q K"]:
    """The k largest packed similarities of each query, in descending order."""
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first in range(0, len(keys), key_chunk):
        part = keys[first : first + key_chunk].to(queries.dtype)
        sims = torch.mm(queries, part.T, out=room[: len(queries) * len(part)].view(len(queries), len(part)))
        found = torch.cat([best, _candidates(sims, k, first)], dim=1)
        best = found.topk(min(k, found.shape[1]), dim=1).values
    return best


def _candidates(sims: Float[Tensor, "Q M"], k: int, first: int) -> Int[Tensor, "Q L"]:
    """Packed similarities that include the k largest of each query.

    These lie in the k blocks with the largest maxima, since any other block has k larger ones before it, or equal ones
    that come first. So all other blocks are read only once, for their maximum.
    """
    num_blocks = sims.shape[1] // _BLOCK
    ranks = _LAST_PLACE - torch.arange(first, first + sims.shape[1], device=sims.device)
    if num_blocks <= 2 * k:
        return _pack(sims, ranks)
    whole = sims[:, : num_blocks * _BLOCK].view(len(sims), num_blocks, _BLOCK)
    maxima = _pack(whole.amax(2), ranks[: num_blocks * _BLOCK : _BLOCK])
    blocks = (_place_of(maxima.topk(k, dim=1).values) - first) // _BLOCK  # (Q, k)
    inside = whole.gather(1, blocks[:, :, None].expand(-1, -1, _BLOCK))
    best = _pack(inside, (_LAST_PLACE - first - blocks * _BLOCK)[:, :, None] - torch.arange(_BLOCK, device=sims.device))
    return torch.cat([best.flatten(1), _pack(sims[:, num_blocks * _BLOCK :], ranks[num_blocks * _BLOCK :])], dim=1)


def _pack(sims: Float[Tensor, "*S"], ranks: Int[Tensor, "..."]) -> Int[Tensor, "*S"]:
    """Pack similarity and rank into one integer, ordered by similarity, then by rank."""
    bits = (sims.float() + 0.0).view(torch.int32)  # -0 becomes 0
    bits ^= (bits >> 31) & 0x7FFFFFFF  # the bits of negative floats are in reverse order
    packed = bits.long()
    packed <<= 32
    packed |= ranks
    return packed


def _place_of(packed: Int[Tensor, "Q K"]) -> Int[Tensor, "Q K"]:
    return _LAST_PLACE - (packed & _LAST_PLACE)


def _sim_of(packed: Int[Tensor, "Q K"]) -> Float[Tensor, "Q K"]:
    bits = (packed >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
