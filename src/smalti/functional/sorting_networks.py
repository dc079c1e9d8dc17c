"""Sorting networks: layers of comparators.

Letters: W wires, R numbers to sort, K the next power of two.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smalti.errors import ConfigError
from smalti.functional.transfer import move

NETWORKS = ("bitonic", "odd_even")
SMALLEST = 1e-30
"""Lower limit of weights in the logarithm, since odd-even networks and light tails underflow."""


@dataclass(frozen=True)
class Layer:
    """Comparators that act in parallel, as a view of the wires: ``(groups, 2, width)`` from wire ``start``."""

    start: int
    groups: int
    width: int
    merge: bool
    """Whether it is the first layer of a bitonic merge, before which the two wires of a comparator share no inputs."""
    sign: Tensor | None
    """``(groups, width)``: 1 if wire a takes the smaller number, -1 if the larger, 0 for no comparator; None: all 1."""

    def split(self, wires: Tensor) -> tuple[Tensor, Tensor]:
        """Wires a and b, ``(groups, width, ...)`` each, as views of ``(W, ...)``."""
        stop = self.start + 2 * self.groups * self.width
        pairs = wires[self.start : stop].view(self.groups, 2, self.width, *wires.shape[1:])
        return pairs[:, 0], pairs[:, 1]


@functools.lru_cache(maxsize=64)
def layers_for(network: str, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Layer, ...]:
    """The layers of a network with their signs on a device; cached."""
    return tuple(
        layer if layer.sign is None else replace(layer, sign=move(layer.sign.to(dtype), device))
        for layer in network_layers(network, size)
    )


@functools.lru_cache(maxsize=64)
def network_layers(network: str, size: int) -> tuple[Layer, ...]:
    """The comparators of a network, in order.

    Args:
        network: ``bitonic``: log^2 layers; wires are padded to K, and the first ``K - size`` have no comparators.
            ``odd_even``: ``size`` layers of neighbours.
        size: R, at least 2.

    Raises:
        ConfigError: for another name, fewer than 2 numbers, or a size that the pruned bitonic network can't sort, such
            as 22, 38, 42 to 46 and 54.

    Source: Batcher, "Sorting networks and their applications", 1968; the pruning is that of Petersen et al.'s code.
    """
    if network not in NETWORKS:
        raise ConfigError(f"network={network!r}: one of {', '.join(NETWORKS)} is needed")
    if size < 2:
        raise ConfigError(f"{size} numbers can't be sorted; at least 2 are needed")
    layers = _odd_even(size) if network == "odd_even" else _bitonic(size)
    if network == "bitonic" and not _sorts(layers, size):
        raise ConfigError(f"the bitonic network can't sort {size} numbers; use network='odd_even', or a power of two")
    return layers


def _odd_even(size: int) -> tuple[Layer, ...]:
    return tuple(Layer(number % 2, (size - number % 2) // 2, 1, False, None) for number in range(size))


def _bitonic(size: int) -> tuple[Layer, ...]:
    padded = 1 << (size - 1).bit_length()
    wires = torch.arange(padded)
    layers = []
    for block in range(padded.bit_length() - 1):
        for width in (1 << shift for shift in range(block, -1, -1)):
            first = wires.view(-1, 2, width)[:, 0]
            sign = 1 - 2 * ((first >> (block + 1)) & 1)  # every other sequence is sorted in descending order
            sign = torch.where(first < padded - size, 0, sign)
            layers.append(Layer(0, padded // (2 * width), width, width == 1 << block, sign))
    return tuple(layers)


def _sorts(layers: tuple[Layer, ...], size: int) -> bool:
    """Whether hard comparators sort: exact by the 0-1 principle for small sizes, else on fixed random rows."""
    g = torch.Generator().manual_seed(size)
    if size <= 16:
        rows = ((torch.arange(2**size)[None] >> torch.arange(size)[:, None]) & 1).float()
    else:
        probabilities = torch.rand(1, 4096, generator=g)
        rows = (torch.rand(size, 4096, generator=g) < probabilities).float()
    padded = 2 * max(layer.start + layer.groups * layer.width for layer in layers[:1])
    wires = torch.cat([torch.full((padded - size, rows.shape[1]), -1.0), rows]) if padded > size else rows
    wires = wires.clone()
    for layer in layers:
        a, b = layer.split(wires)
        sign = torch.ones(a.shape[:2]) if layer.sign is None else layer.sign
        swap = (sign[..., None] * (a - b)) > 0
        delta = (a - b) * swap
        a -= delta
        b += delta
    alive = wires[padded - size :] if padded > size else wires
    return bool((alive[1:] >= alive[:-1]).all())
