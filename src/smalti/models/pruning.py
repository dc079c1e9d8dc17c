"""Encode images with learned pruning: each stage removes the tokens that its prediction module would rather drop.

Letters: B images, N patches, k of them that the last stage keeps, R prefix tokens, D embed_dim.
"""

import torch
from jaxtyping import Num
from torch import Tensor

from smalti.layers.gaussian_bias import Places
from smalti.layers.token_pruning import TokenPruning
from smalti.models.encoder import Encoder
from smalti.models.pooling import PatchFeatures


def encode_pruned(
    encoder: Encoder, images: Num[Tensor, "B C H W"], pruning: TokenPruning, keep_ratio: float | None = None
) -> PatchFeatures:
    """Tokens of images after all stages; removed tokens are not computed any more.

    Args:
        encoder: the network that was trained with ``pruning``.
        images: as for :meth:`Encoder.encode`.
        pruning: on the encoder's device.
        keep_ratio: rho, in (0, 1]; None: that of training.

    Returns:
        ``patches`` has the k kept patches, in raster order; ``grid`` is that of the whole image.

    Source: Rao et al., DynamicViT, arXiv:2106.02034v2, Sec. 3.4 (inference).
    """
    if images.dtype == torch.uint8:
        images = encoder.normalize(images)
    tokens, grid = encoder.embed_patches(images)
    num_prefix, (batch, num_patches) = encoder.num_prefix_tokens, tokens.shape[:2]
    counts = dict(zip(pruning.blocks, pruning.counts(num_patches, keep_ratio), strict=True))
    predictors = dict(zip(pruning.blocks, pruning.predictors, strict=True))
    sequence = encoder.vit.norm_pre(encoder.assemble(tokens, encoder.positions(grid)))
    places = torch.arange(num_patches, device=images.device).expand(batch, -1)
    for number, block in enumerate(encoder.vit.blocks):
        if number in counts and counts[number] < places.shape[1]:
            patches = sequence[:, num_prefix:]
            score = predictors[number](patches, patches.new_ones(patches.shape[:2]))[..., 1]
            best = score.topk(counts[number], dim=1).indices.sort(dim=1).values
            kept = patches.gather(1, best[..., None].expand(-1, -1, patches.shape[-1]))
            sequence, places = torch.cat([sequence[:, :num_prefix], kept], dim=1), places.gather(1, best)
        sequence = encoder.run_block(block, sequence, Places(grid, places))
    sequence = encoder.vit.norm(sequence)
    return PatchFeatures(sequence[:, num_prefix:], sequence[:, :num_prefix], grid)
