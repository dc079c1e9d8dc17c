"""Random numbers that belong to a sample.

Numbers from torch's generator depend on everything sampled before, so on batch size, workers and the number of
processes. These depend only on the sample's key (its seed) and a stream: a counter-based generator (splitmix64's
finaliser on a Weyl sequence), computed on the device of the keys.
"""

import struct

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN, _MIX_A, _MIX_B = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def sample_uniform(keys: Int[Tensor, " B"], count: int, stream: int = 0) -> Float[Tensor, "B M"]:
    """Uniform numbers in [0, 1), ``count`` per sample.

    Args:
        keys: ``(B,)`` int64, one per sample; equal keys give equal numbers.
        count: M, numbers per sample.
        stream: separates numbers for different purposes within one step.

    Returns:
        ``(B, count)`` float32 on the device of ``keys``, multiples of 2**-24.

    Source: Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014, Fig. 16 (mix64 variant 13).
    """
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    start = _mix(keys + _mix(torch.full_like(keys, stream + 1) * _GOLDEN))
    bits = _mix(start[:, None] + counter * _GOLDEN)  # int64 arithmetic wraps, as the generator requires
    return _shift(bits, 40).float() * 2.0**-24


def sample_normal(keys: Int[Tensor, " B"], count: int, stream: int = 0) -> Float[Tensor, "B M"]:
    """Standard normal numbers, ``count`` per sample: :func:`sample_uniform` through the inverse CDF.

    Returns:
        ``(B, count)`` float32 on the device of ``keys``, within -5.5..5.5.
    """
    centred = (
        sample_uniform(keys, count, stream).double() + 2.0**-25
    )  # never 0 or 1; float32 would round the largest up
    return torch.special.ndtri(centred).float()


def sample_beta(keys: Int[Tensor, " B"], a: int, b: int, stream: int = 0) -> Float[Tensor, " B"]:
    """A Beta(a, b) number per sample, in [0, 1): the a-th smallest of ``a + b - 1`` uniform ones.

    Args:
        keys: as in :func:`sample_uniform`.
        a: integer, at least 1.
        b: integer, at least 1.
        stream: as in :func:`sample_uniform`.

    Source: David & Nagaraja, "Order Statistics", 3rd ed., Sec. 2.3.
    """
    return sample_uniform(keys, a + b - 1, stream).sort(dim=1).values[:, a - 1]


def step_key(progress: float, device: torch.device | None = None) -> Int[Tensor, " 1"]:
    """The key of a step, equal in all processes and parts of a batch: the bits of its progress."""
    return torch.full((1,), struct.unpack("<q", struct.pack("<d", progress))[0], dtype=torch.int64, device=device)


def fork_keys(keys: Int[Tensor, " B"], branch: int) -> Int[Tensor, " B"]:
    """Different keys for another view of the same samples; branch 0 returns the keys."""
    return keys if branch == 0 else _mix(keys + _mix(torch.full_like(keys, branch)))


def place_keys(keys: Int[Tensor, " B"], count: int) -> Int[Tensor, "B N"]:
    """A key for each of ``count`` positions of a sample, independent of when they are sampled."""
    places = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    return _mix(_mix(keys)[:, None] + _mix(places * _GOLDEN))


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_A
    z = (z ^ _shift(z, 27)) * _MIX_B
    return z ^ _shift(z, 31)


def _shift(z: Tensor, places: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (z >> places) & ((1 << (64 - places)) - 1)
