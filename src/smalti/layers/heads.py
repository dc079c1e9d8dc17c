"""Heads of self-distillation: projection to unit vectors, and prototypes."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Three-layer MLP with GELU, then L2 normalisation.

    Args:
        in_dim: width of the tokens.
        hidden_dim: width of the two hidden layers.
        out_dim: width of the bottleneck.

    Source: Caron et al., DINO, arXiv:2104.14294v2, App. C "Projection head": truncated normal 0.02, biases 0.
    """

    def __init__(self, in_dim: int, hidden_dim: int = 2048, out_dim: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, out_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
        """Unit vectors, ``(..., out_dim)``."""
        return F.normalize(self.mlp(tokens), dim=-1)


class Prototypes(nn.Module):
    """Bias-free linear layer with weight normalisation: cosine similarity to each prototype, times its gain.

    Args:
        in_dim: width of the (unit) input.
        num_prototypes: K.
        train_gain: train the gain of each prototype; otherwise it is fixed at 1.

    Source: Caron et al., DINO, arXiv:2104.14294v2, App. C; ``norm_last_layer`` of its code is ``not train_gain``.
    """

    def __init__(self, in_dim: int, num_prototypes: int, train_gain: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(in_dim, num_prototypes, bias=False).weight.detach().clone())
        self.gain = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=train_gain)

    def matrix(self) -> Float[Tensor, "K E"]:
        """Unit prototypes times their gains."""
        return F.normalize(self.weight, dim=-1) * self.gain

    def forward(self, x: Float[Tensor, "*B E"]) -> Float[Tensor, "*B K"]:
        """Logits, ``(..., num_prototypes)``."""
        return F.linear(x, self.matrix())


class PrototypeHead(nn.Module):
    """A projection head followed by prototypes.

    Args:
        in_dim: width of the tokens.
        hidden_dim: as for :class:`ProjectionHead`.
        bottleneck_dim: width of the unit vectors.
        num_prototypes: K.
        train_gain: as for :class:`Prototypes`.
    """

    def __init__(
        self, in_dim: int, hidden_dim: int, bottleneck_dim: int, num_prototypes: int, train_gain: bool = False
    ) -> None:
        super().__init__()
        self.projection = ProjectionHead(in_dim, hidden_dim, bottleneck_dim)
        self.prototypes = Prototypes(bottleneck_dim, num_prototypes, train_gain)

    def forward(self, tokens: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        """Logits, ``(..., num_prototypes)``."""
        return self.prototypes(self.projection(tokens))
