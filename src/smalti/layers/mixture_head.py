"""A mixture of Gaussians for single tokens, whose likelihood is exact.

Letters: M tokens, D their dimensions, C width of the condition, W width of the head, K components.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.functional.precision import at_least_float32
from smalti.functional.random import sample_normal, sample_uniform


def mixture_log_likelihood(
    tokens: Float[Tensor, "M D"],
    logits: Float[Tensor, "M K"],
    means: Float[Tensor, "M K D"],
    stds: Float[Tensor, "M K D"],
) -> Float[Tensor, " M"]:
    """Log density of tokens in nats, under mixtures of Gaussians with diagonal covariance.

    Args:
        tokens: one token per mixture.
        logits: logits of the components.
        means: means of the components.
        stds: standard deviations, positive.
    """
    z = (tokens[:, None] - means) / stds
    log_density = -0.5 * z.square() - stds.log() - 0.5 * math.log(2 * math.pi)
    return torch.logsumexp(F.log_softmax(logits, dim=-1) + log_density.sum(-1), dim=-1)


class MixtureHead(nn.Module):
    """The distribution of a token given a condition, as a mixture of K Gaussians with diagonal covariance.

    Not in MAR's paper, which learns that distribution by diffusion; the MLP is that of its diffusion head, without
    time.

    Args:
        token_dim: D.
        condition_dim: C.
        width: W.
        depth: residual blocks.
        num_components: K.
        min_std: smallest standard deviation, since densities are unbounded for repeated tokens.
    """

    takes_guidance = False

    def __init__(
        self,
        token_dim: int,
        condition_dim: int,
        width: int,
        depth: int,
        num_components: int = 8,
        min_std: float = 0.01,
    ) -> None:
        super().__init__()
        if num_components < 1 or not min_std > 0:
            raise ConfigError(
                f"mixture of {num_components} components with min_std={min_std}: at least 1 component and a positive "
                "min_std are needed"
            )
        self.token_dim, self.num_components, self.min_std = token_dim, num_components, min_std
        self.embed = nn.Linear(condition_dim, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, num_components * (1 + 2 * token_dim))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.out.weight, std=0.02)
        with torch.no_grad():  # components with equal initial weights would stay equal
            nn.init.normal_(self.out.bias[num_components : num_components * (1 + token_dim)])

    def mixture(
        self, condition: Float[Tensor, "M C"]
    ) -> tuple[Float[Tensor, "M K"], Float[Tensor, "M K D"], Float[Tensor, "M K D"]]:
        """Logits, means and standard deviations of the mixtures, at least float32."""
        x = self.embed(condition)
        for block in self.blocks:
            x = x + block(x)
        k, d = self.num_components, self.token_dim
        logits, means, raw = torch.split(at_least_float32(self.out(self.norm(x))), [k, k * d, k * d], dim=1)
        return logits, means.view(-1, k, d), self.min_std + F.softplus(raw.view(-1, k, d))

    def log_likelihood(self, tokens: Float[Tensor, "M D"], condition: Float[Tensor, "M C"]) -> Float[Tensor, " M"]:
        """Log density of tokens given their conditions, in nats."""
        return mixture_log_likelihood(at_least_float32(tokens), *self.mixture(condition))

    def forward(
        self, tokens: Float[Tensor, "M D"], condition: Float[Tensor, "M C"], keys: Int[Tensor, " M"], repeats: int = 1
    ) -> dict[str, Tensor]:
        """``likelihood``: negative log density in nats per dimension, ``(M,)``; exact, so ``repeats`` has no effect."""
        return {"likelihood": -self.log_likelihood(tokens, condition) / self.token_dim}

    @torch.no_grad()
    def sample(
        self,
        condition: Float[Tensor, "M C"],
        keys: Int[Tensor, " M"],
        *,
        num_steps: int = 1,
        temperature: float = 1.0,
        null_condition: Float[Tensor, "M C"] | None = None,
        guidance: float = 1.0,
        clip: float | None = None,
    ) -> Float[Tensor, "M D"]:
        """Sample tokens given their conditions; arguments as for the diffusion head, but ``num_steps`` and ``clip``
        have no effect.

        Raises:
            ConfigError: for guidance, which is defined for noise predictions.
        """
        if null_condition is not None and guidance != 1:
            raise ConfigError("guidance (cfg) needs method.head=diffusion; a mixture predicts no noise to guide")
        logits, means, stds = self.mixture(condition)
        shares = F.softmax(logits, dim=-1).cumsum(1)
        chosen = (sample_uniform(keys, 1, 0) > shares).sum(1).clamp(max=self.num_components - 1)
        rows = torch.arange(len(chosen), device=chosen.device)
        noise = sample_normal(keys, self.token_dim, 1)
        return means[rows, chosen] + temperature * stds[rows, chosen] * noise
