"""Exact nearest neighbours by matrix products, and labels that come from neighbours.

No index: similarities are computed chunk by chunk, and of each chunk only the best are kept. Among equal similarities
the key that comes first wins, so the result does not depend on how the work is cut into chunks (beyond the rounding of
the matrix product). To that end a similarity and the place of its key travel in one whole number whose order is the
order of the result.

Letters: Q queries, M keys, D embed_dim, K neighbours, C classes, B images, H W their pixels, N = h*w patches.
"""

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from smalti.errors import ConfigError, ShapeError

_QUERIES_AT_ONCE, _KEYS_AT_ONCE = 256, 20480
_MIXED_AT_ONCE = 128  # queries whose neighbours' labels are in memory: small enough to stay in the cache
_BLOCK = 32  # similarities of which only the greatest is looked at first
_LAST_PLACE = 2**32 - 1
_RERANKED = 2  # times K: what half precision hands on to be compared in float32


def nearest(
    queries: Float[Tensor, "Q D"],
    keys: Float[Tensor, "M D"],
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    query_chunk: int = _QUERIES_AT_ONCE,
    key_chunk: int = _KEYS_AT_ONCE,
) -> tuple[Float[Tensor, "Q K"], Int[Tensor, "Q K"]]:
    """The k keys with the greatest inner product with each query, exactly; of unit vectors that is the cosine.

    Args:
        queries: ``(Q, D)``; their length scales the similarities and not the order.
        keys: ``(M, D)`` on the same device, of any float type; normalised by the caller, if cosines are wanted.
        k: K, neighbours a query, 1..M.
        dtype: of the matrix product. In ``float16`` and ``bfloat16`` its best 2k keys are compared again in float32,
            so that the result is that of float32 unless rounding throws a neighbour out of the best 2k.
        query_chunk: queries a chunk; memory and time, not the result.
        key_chunk: keys a chunk, likewise.

    Returns:
        ``(Q, K)`` float32 inner products in falling order, and the places of those keys; the first of equals first.

    Raises:
        ConfigError: if ``k`` is less than 1 or more than there are keys.

    Cost: Q * M * D multiplications, and ``query_chunk * key_chunk`` similarities in memory.
    """
    if not 1 <= k <= len(keys):
        raise ConfigError(f"k={k} neighbours of {len(keys)} keys; choose a k in 1..{len(keys)}")
    is_half = dtype in (torch.float16, torch.bfloat16)
    wanted = min(_RERANKED * k, len(keys)) if is_half else k
    sims = torch.empty(len(queries), k, device=queries.device)
    places = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    # One place in memory for all products: fresh pages would cost as much as choosing the neighbours does.
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
    """How many pixels of each class each patch has.

    Args:
        masks: ``(B, H, W)`` classes 0..C-1, or ``ignore``, which is counted nowhere.
        patch_size: height and width of a patch; they divide H and W.
        num_classes: C.
        ignore: value of pixels without a label.

    Returns:
        ``(B, N, C)`` counts, patches in raster order: uint8 where a patch has up to 255 pixels, int16 up to 32767,
        else int32. A quarter to a half of the shares in float32, and exact.

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
    # A bin a patch and class, and one a patch for what is ignored.
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
    """Weighted mean of the class shares of neighbours: neither their keys nor shares of the whole memory are made.

    Args:
        weights: ``(Q, K)`` of the neighbours, such as a softmax over their similarities.
        places: ``(Q, K)`` of the neighbours among the M.
        counts: ``(M, C)`` pixels of each class; a row without any contributes nothing.
    """
    mixed = torch.empty(len(places), counts.shape[1], device=weights.device)
    for first in range(0, len(places), _MIXED_AT_ONCE):
        part = slice(first, first + _MIXED_AT_ONCE)
        chosen = counts.index_select(0, places[part].flatten()).view(-1, places.shape[1], counts.shape[1]).float()
        shares = weights[part] / chosen.sum(2).clamp(min=1)
        mixed[part] = torch.einsum("qk,qkc->qc", shares, chosen)
    return mixed


def _best(
    queries: Float[Tensor, "Q D"], keys: Float[Tensor, "M D"], k: int, key_chunk: int, room: Float[Tensor, " L"]
) -> Int[Tensor, "Q K"]:
    """The k greatest packed similarities of each query, in falling order."""
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first in range(0, len(keys), key_chunk):
        part = keys[first : first + key_chunk].to(queries.dtype)
        sims = torch.mm(queries, part.T, out=room[: len(queries) * len(part)].view(len(queries), len(part)))
        found = torch.cat([best, _candidates(sims, k, first)], dim=1)
        best = found.topk(min(k, found.shape[1]), dim=1).values
    return best


def _candidates(sims: Float[Tensor, "Q M"], k: int, first: int) -> Int[Tensor, "Q L"]:
    """Packed similarities among which the k greatest of each query are.

    They lie in the k blocks with the greatest maxima: any other block has k greater ones before it, or equal ones that
    come first. So all but these blocks are read once, for their maximum.
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
    """Similarity and rank in one whole number, which is greater where the similarity is, or the rank among equals."""
    bits = (sims.float() + 0.0).view(torch.int32)  # -0 becomes 0, which it equals
    bits ^= (bits >> 31) & 0x7FFFFFFF  # floats below zero count backwards
    packed = bits.long()
    packed <<= 32
    packed |= ranks
    return packed


def _place_of(packed: Int[Tensor, "Q K"]) -> Int[Tensor, "Q K"]:
    return _LAST_PLACE - (packed & _LAST_PLACE)


def _sim_of(packed: Int[Tensor, "Q K"]) -> Float[Tensor, "Q K"]:
    bits = (packed >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
