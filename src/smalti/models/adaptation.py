"""Which parameters of a pretrained encoder are trained: all, the last blocks, the norms, or low-rank updates.

Letters: r rank, n outputs, m inputs of a linear layer.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from smalti.errors import ConfigError
from smalti.models.encoder import Encoder

FULL, NORMS, LAST, LORA = "full", "norms", "last", "lora"


class LowRank(nn.Module):
    """The weight of a linear layer as ``W + B A``, with W frozen; B is zero at the start.

    Args:
        weight: W, ``(n, m)``.
        rank: r.

    Source: Hu et al., LoRA, arXiv:2106.09685v2, Sec. 4.1 (here alpha = r: a factor of 1).
    """

    def __init__(self, weight: Float[Tensor, "n m"], rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, weight: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """The updated weight."""
        return weight + self.B @ self.A


def parse_adapt(how: str) -> tuple[str, int]:
    """``adapt`` as a kind and its number (0 for ``full`` and ``norms``).

    Raises:
        ConfigError: for anything but ``full``, ``norms``, ``last:N`` and ``lora:R``.
    """
    kind, colon, number = how.partition(":")
    if kind in (FULL, NORMS) and not colon:
        return kind, 0
    if kind in (LAST, LORA) and number.isdecimal() and int(number) >= 1:
        return kind, int(number)
    raise ConfigError(f"adapt={how}: full, norms, last:N or lora:R is needed, with N and R at least 1")


def attach_lora(encoder: Encoder, rank: int, seed: int) -> None:
    """Add low-rank updates to all linear layers of the blocks; the outputs stay as they are.

    Args:
        encoder: changed in place.
        rank: r.
        seed: of A; torch's global random state is unchanged.

    Raises:
        ConfigError: if a layer is too small for this rank.
    """
    layers = _linear_layers(encoder)
    smallest = min(min(layer.weight.shape) for layer in layers)
    if rank > smallest:
        raise ConfigError(f"adapt=lora:{rank}: the smallest layer of {encoder.name} has rank {smallest}; choose less")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**63)
        for layer in layers:
            update = LowRank(layer.weight, rank).to(layer.weight.device)
            parametrize.register_parametrization(layer, "weight", update)
    encoder.lora = rank


@torch.no_grad()
def merge_lora(encoder: Encoder) -> None:
    """Add the low-rank updates to the weights, so that the encoder is a plain one again."""
    if encoder.lora is None:
        return
    for layer in _linear_layers(encoder):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    encoder.lora = None


def _linear_layers(encoder: Encoder) -> list[nn.Linear]:
    """Linear layers of attention and MLP in all blocks."""
    return [
        module
        for name, module in encoder.vit.blocks.named_modules()
        if isinstance(module, nn.Linear) and ".gaug." not in name
    ]


def freeze(encoder: Encoder, how: str) -> None:
    """Turn off gradients of what ``adapt`` leaves as it is; nothing is turned on.

    Args:
        encoder: with its low-rank updates, for ``lora:R``.
        how: ``full``, ``norms``, ``last:N`` or ``lora:R``.

    Raises:
        ConfigError: for another value, or more blocks than there are.
    """
    kind, number = parse_adapt(how)
    if kind == FULL:
        return
    if kind == LAST and number > encoder.depth:
        raise ConfigError(f"adapt={how}: {encoder.name} has {encoder.depth} blocks")
    vit = encoder.vit
    trained: set[nn.Parameter] = set()
    if kind == LAST:
        parts = [*vit.blocks[-number:], vit.norm, *([] if vit.attn_pool is None else [vit.attn_pool])]
        trained = {parameter for part in parts for parameter in part.parameters()}
    elif kind == NORMS:
        norms = [module for module in vit.modules() if isinstance(module, nn.LayerNorm)]
        trained = {parameter for norm in norms for parameter in norm.parameters()}
    else:
        updates = [module for module in vit.modules() if isinstance(module, LowRank)]
        trained = {parameter for update in updates for parameter in update.parameters()}
    for parameter in encoder.parameters():
        if parameter not in trained:
            parameter.requires_grad_(False)
