"""A small diffusion model for single tokens, conditioned on a vector.

Letters: M tokens, D their dimensions, C width of the condition, W width of the head.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.functional.diffusion import Process, add_noise, bound_term, make_process, step_back
from smalti.functional.precision import at_least_float32
from smalti.functional.random import sample_normal, sample_uniform

TIME_DIM = 256
_START = 1 << 20  # random stream of the initial noise in sampling; steps use their index


def time_features(t: Int[Tensor, " M"], dim: int = TIME_DIM) -> Float[Tensor, "M E"]:
    """Cosines, then sines, of a step's index at frequencies from 1 down to almost 1/10000."""
    rates = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class AdaLNBlock(nn.Module):
    """An MLP with adaptive layer norm: scale, shift and gate come from the condition and start at 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Float[Tensor, "M W"], condition: Float[Tensor, "M W"]) -> Float[Tensor, "M W"]:
        """``x`` plus the residual branch; ``condition`` after its SiLU."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class DiffusionHead(nn.Module):
    """Learns the distribution of a token given a condition by noise prediction, and samples from it.

    Args:
        token_dim: D.
        condition_dim: C.
        width: W.
        depth: residual blocks.
        num_steps: number of diffusion steps.

    Source: Li et al., MAR, arXiv:2406.11838v3, Sec. 3.2 and App. B.
    """

    takes_guidance = True

    def __init__(self, token_dim: int, condition_dim: int, width: int, depth: int, num_steps: int = 1000) -> None:
        super().__init__()
        if depth < 1 or width < 1:
            raise ConfigError(f"diffusion head with {depth} blocks of width {width}; at least 1 is needed for both")
        self.token_dim, self.num_steps = token_dim, num_steps
        self.embed = nn.Linear(token_dim, width)
        self.embed_condition = nn.Linear(condition_dim, width)
        self.embed_time = nn.Sequential(nn.Linear(TIME_DIM, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(AdaLNBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, 2 * token_dim)
        for name, table in make_process(num_steps)._asdict().items():
            self.register_buffer(f"process_{name}", table, persistent=False)
        self.reset()

    def reset(self) -> None:
        """Reinitialise: the head then predicts zero noise, and a log variance halfway between its bounds."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in self.embed_time.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for part in self.modules():
            if isinstance(part, AdaLNBlock | DiffusionHead):
                nn.init.zeros_(part.modulation.weight)
        nn.init.zeros_(self.out.weight)

    @property
    def process(self) -> Process:
        """The full diffusion process, on the head's device."""
        return Process(*(getattr(self, f"process_{name}") for name in Process._fields))

    def predict(
        self, noisy: Float[Tensor, "M D"], t: Int[Tensor, " M"], condition: Float[Tensor, "M C"]
    ) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M D"]]:
        """Predicted noise of tokens at step t of the full process, and position of the log variance between its
        bounds."""
        told = F.silu(self.embed_time(time_features(t).to(condition.dtype)) + self.embed_condition(condition))
        x = self.embed(noisy)
        for block in self.blocks:
            x = block(x, told)
        shift, scale = self.modulation(told).chunk(2, dim=1)
        noise, fraction = at_least_float32(self.out(self.norm(x) * (1 + scale) + shift)).chunk(2, dim=1)
        return noise, fraction

    def forward(
        self, tokens: Float[Tensor, "M D"], condition: Float[Tensor, "M C"], keys: Int[Tensor, " M"], repeats: int = 1
    ) -> dict[str, Tensor]:
        """``noise``, the squared error of the noise, and ``bound``, which trains the variance: ``(M,)`` each.

        Args:
            tokens: target tokens.
            condition: condition of each token.
            keys: random key of each token.
            repeats: noise levels per token.
        """
        count, process = len(tokens), self.process
        # separate random streams per repeat: first the step, then the noise
        share = torch.cat([sample_uniform(keys, 1, 2 * number)[:, 0] for number in range(repeats)])
        noise = torch.cat([sample_normal(keys, self.token_dim, 2 * number + 1) for number in range(repeats)])
        t = (share * self.num_steps).long()
        clean = at_least_float32(tokens).repeat(repeats, 1)
        noisy = add_noise(clean, noise.to(clean), process, t)
        guess, fraction = self.predict(noisy, t, condition.repeat(repeats, 1))
        terms = {
            "noise": (guess - noise).square().mean(1),
            "bound": bound_term(clean, noisy, guess, fraction, process, t),
        }
        return {name: term.view(repeats, count).mean(0) for name, term in terms.items()}

    @torch.no_grad()
    def sample(
        self,
        condition: Float[Tensor, "M C"],
        keys: Int[Tensor, " M"],
        *,
        num_steps: int = 100,
        temperature: float = 1.0,
        null_condition: Float[Tensor, "M C"] | None = None,
        guidance: float = 1.0,
        clip: float | None = None,
    ) -> Float[Tensor, "M D"]:
        """Sample tokens given their conditions, by ancestral sampling.

        Args:
            condition: condition of each token.
            keys: random key of each token: equal keys and conditions give equal tokens, independent of the batch.
            num_steps: number of sampling steps, evenly spaced.
            temperature: factor on the added noise.
            null_condition: condition of each token without its class, for guidance other than 1.
            guidance: scale of classifier-free guidance; 1: none.
            clip: largest absolute value of estimates of clean tokens; None: no limit, as in MAR.

        Raises:
            ConfigError: if ``num_steps`` isn't between 2 and the number of diffusion steps.
        """
        process = make_process(self.num_steps, num_steps).to(condition.device)
        x = sample_normal(keys, self.token_dim, _START)
        for t in reversed(range(num_steps)):
            step = process.steps[t].expand(len(x))
            if null_condition is None:
                noise, fraction = self.predict(x, step, condition)
            else:  # both get the same added noise, so one x is enough
                both, fractions = self.predict(x.repeat(2, 1), step.repeat(2), torch.cat([condition, null_condition]))
                with_class, without = both.chunk(2)
                noise, fraction = without + guidance * (with_class - without), fractions[: len(x)]
            fresh = sample_normal(keys, self.token_dim, t) if t else torch.zeros_like(x)
            x = step_back(x, noise, fraction, fresh, process, t, temperature, clip)
        return x
