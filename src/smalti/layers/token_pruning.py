"""Learned pruning of tokens: modules that predict which tokens a network may drop, and how many each stage keeps.

Source: Rao et al., DynamicViT, NeurIPS 2021, arXiv:2106.02034v2, Sec. 3.2 and 3.4.
Letters: B images, N tokens, D their width, S stages.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smalti.functional.precision import at_least_float32

NUM_STAGES = 3
"""S in the paper."""


class PredictionModule(nn.Module):
    """Whether to drop or to keep each token, from the token and the mean of those that are still kept.

    Args:
        dim: D, at least 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.embed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * half), nn.GELU())
        self.decide = nn.Sequential(
            nn.Linear(2 * half, half), nn.GELU(), nn.Linear(half, half // 2), nn.GELU(), nn.Linear(half // 2, 2)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Float[Tensor, "B N D"], keep: Float[Tensor, "B N"]) -> Float[Tensor, "B N 2"]:
        """``(B, N, 2)`` float32 log-probabilities of dropping and of keeping each token.

        Args:
            tokens: patch tokens, without prefix tokens.
            keep: the current decision, 1 for tokens that are still there, else 0; without any, the mean is 0.
        """
        local, shared = self.embed(tokens).chunk(2, dim=-1)  # half of the features each
        weight = keep[..., None].to(shared.dtype)
        mean = (shared * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        features = torch.cat([local, mean.expand_as(local)], dim=-1)
        return at_least_float32(self.decide(features)).log_softmax(-1)


@dataclass(frozen=True)
class TokenPruning:
    """Prediction modules that were trained with a network; not a part of it."""

    blocks: tuple[int, ...]
    """The block before which each stage drops tokens, ascending, 0 the first."""
    keep_ratio: float
    """rho of training: stage s = 1..S keeps rho^s of the tokens."""
    predictors: nn.ModuleList
    """One :class:`PredictionModule` for each stage."""

    def check(self, depth: int) -> "TokenPruning":
        """These values, if a network of ``depth`` blocks can have them.

        Raises:
            ValueError: if it can't.
        """
        if not self.blocks or list(self.blocks) != sorted({*self.blocks} & {*range(depth)}):
            raise ValueError(f"blocks {list(self.blocks)} of {depth}")
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep ratio {self.keep_ratio}")
        return self

    def redrawn(self, dim: int, seed: int) -> "TokenPruning":
        """The same stages with random prediction modules for tokens of width ``dim``."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed % 2**63)
            return replace(self, predictors=nn.ModuleList(PredictionModule(dim) for _ in self.blocks))

    def counts(self, num_patches: int, keep_ratio: float | None = None) -> tuple[int, ...]:
        """Number of patches that each stage keeps: ``floor(rho^s N)``, at least one.

        Args:
            num_patches: N.
            keep_ratio: rho, in (0, 1]; None: that of training.
        """
        ratio = self.keep_ratio if keep_ratio is None else keep_ratio
        # the small number: 0.3 * 10 is a little below 3
        return tuple(max(1, math.floor(ratio**stage * num_patches + 1e-9)) for stage in range(1, len(self.blocks) + 1))

    def mean_kept(self, num_patches: int, depth: int, keep_ratio: float | None = None) -> float:
        """Mean over the blocks of the fraction of patches that a block sees.

        Args:
            num_patches: N.
            depth: number of blocks.
            keep_ratio: as in :meth:`counts`.
        """
        ends = (*self.blocks[1:], depth)
        seen = self.blocks[0] * num_patches
        for first, end, count in zip(self.blocks, ends, self.counts(num_patches, keep_ratio), strict=True):
            seen += (end - first) * count
        return seen / (depth * num_patches)


def stage_blocks(depth: int) -> tuple[int, ...]:
    """Blocks before which tokens are dropped: after each quarter of the depth, which is 3, 6 and 9 of 12.

    A network of fewer than four blocks has fewer stages; with a single block there is none.

    Source: Rao et al., arXiv:2106.02034v2, Sec. 4; the released code for depths of 12, 16 and 20.
    """
    quarters = (depth * stage // (NUM_STAGES + 1) for stage in range(1, NUM_STAGES + 1))
    return tuple(sorted({block for block in quarters if block}))
