"""Which patches are hidden."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smalti.errors import ConfigError


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
