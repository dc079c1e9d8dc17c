"""Kernels of patch tokens, and how well two of them agree (centred kernel alignment)."""

import torch
from jaxtyping import Float
from torch import Tensor


def centred_kernel(tokens: Float[Tensor, "*B n E"], unbiased: bool = False) -> Float[Tensor, "*B n n"]:
    """``H K H`` with ``K = S S^T`` and ``H = I - 1 1^T / n``: similarities of tokens, less what all have in common.

    Args:
        tokens: ``(..., n, E)``, in float32 or float64 outside autocast.
        unbiased: U-centring: the diagonal is left out of all means, and is 0. For n of at least 3.

    Source: Kornblith et al., arXiv:1905.00414v4, Sec. 3; U-centring: Székely and Rizzo, Ann. Statist. 42(6), 2014,
    whose inner products are, up to ``n (n - 3)``, the unbiased HSIC of Song et al., JMLR 13, 2012, Eq. (5).
    """
    centred = tokens - tokens.mean(-2, keepdim=True)  # before the product: differences of large numbers lose digits
    kernel = centred @ centred.mT
    if not unbiased:
        return kernel
    count = kernel.shape[-1]
    off_diagonal = 1 - torch.eye(count, dtype=kernel.dtype, device=kernel.device)
    kernel = kernel * off_diagonal
    rows = kernel.sum(-1, keepdim=True)
    total = rows.sum(-2, keepdim=True)
    return off_diagonal * (kernel - (rows + rows.mT) / (count - 2) + total / ((count - 1) * (count - 2)))


def kernel_alignment(
    kernel: Float[Tensor, "*B n n"], other: Float[Tensor, "*B n n"]
) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """CKA of two centred kernels: the cosine of the kernels as vectors, at most 1.

    Args:
        kernel: from :func:`centred_kernel`.
        other: likewise, with the same ``unbiased``.

    Returns:
        ``(...)`` the alignment, 0 where a kernel is zero;
        ``(...)`` 1 where both kernels are above zero, else 0.

    Source: Kornblith et al., arXiv:1905.00414v4, Sec. 3, "Centered Kernel Alignment".
    """
    norms = [one.square().sum((-2, -1)) for one in (kernel, other)]
    is_defined = (norms[0] > 0) & (norms[1] > 0)
    scales = [torch.where(is_defined, norm, 1.0).rsqrt() for norm in norms]  # each alone: their product underflows
    alignment = (kernel * other).sum((-2, -1)) * scales[0] * scales[1]
    return alignment, is_defined.to(alignment.dtype)


def kernel_rank(kernel: Float[Tensor, "*B n n"]) -> Float[Tensor, "*B"]:
    """Participation ratio ``tr(K)^2 / |K|^2`` of a centred kernel: how many directions its tokens fill, 0 if all are
    equal. It needs no eigenvalues."""
    trace = kernel.diagonal(dim1=-2, dim2=-1).sum(-1)
    size = kernel.square().sum((-2, -1))
    return torch.where(size > 0, trace.square() / torch.where(size > 0, size, 1.0), 0.0)
