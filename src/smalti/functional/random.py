"""Random numbers that belong to a sample.

A number drawn from torch's own generator depends on everything drawn before it, so on batch size, workers and the
number of processes. These depend on nothing but the sample's key and a stream name: a counter-based generator
(splitmix64's finaliser on a Weyl sequence), computed on the device of the keys.
"""

import struct

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN, _MIX_A, _MIX_B = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def sample_uniform(keys: Int[Tensor, " B"], count: int, stream: int = 0) -> Float[Tensor, "B M"]:
    """Uniform numbers in [0, 1), ``count`` of them for each sample.

    Args:
        keys: ``(B,)`` int64, one a sample; equal keys give equal numbers.
        count: M, numbers a sample.
        stream: separates draws for different purposes within one step.

    Returns:
        ``(B, count)`` float32 on the device of ``keys``, multiples of 2**-24.

    Source: Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014, Fig. 16 (mix64 variant 13).
    """
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    start = _mix(keys + _mix(torch.full_like(keys, stream + 1) * _GOLDEN))
    bits = _mix(start[:, None] + counter * _GOLDEN)  # int64 arithmetic wraps, as the generator wants
    return _shift(bits, 40).float() * 2.0**-24


def sample_normal(keys: Int[Tensor, " B"], count: int, stream: int = 0) -> Float[Tensor, "B M"]:
    """Standard normal numbers, ``count`` of them for each sample: :func:`sample_uniform` through the inverse law.

    Returns:
        ``(B, count)`` float32 on the device of ``keys``, within -5.5..5.5.
    """
    centred = (
        sample_uniform(keys, count, stream).double() + 2.0**-25
    )  # never 0 nor 1; float32 would round the largest up
    return torch.special.ndtri(centred).float()


def sample_beta(keys: Int[Tensor, " B"], a: int, b: int, stream: int = 0) -> Float[Tensor, " B"]:
    """A number of the Beta(a, b) law for each sample, in [0, 1): the a-th smallest of ``a + b - 1`` uniform ones.

    Args:
        keys: as in :func:`sample_uniform`.
        a: whole, at least 1.
        b: likewise.
        stream: as in :func:`sample_uniform`.

    Source: David & Nagaraja, "Order Statistics", 3rd ed., Sec. 2.3.
    """
    return sample_uniform(keys, a + b - 1, stream).sort(dim=1).values[:, a - 1]


def step_key(progress: float, device: torch.device | None = None) -> Int[Tensor, " 1"]:
    """A key that is a step's own, the same in every process and every part of a batch: the bits of its progress."""
    return torch.full((1,), struct.unpack("<q", struct.pack("<d", progress))[0], dtype=torch.int64, device=device)


def fork_keys(keys: Int[Tensor, " B"], branch: int) -> Int[Tensor, " B"]:
    """Keys of their own for a second view of the same samples; branch 0 is the keys themselves."""
    return keys if branch == 0 else _mix(keys + _mix(torch.full_like(keys, branch)))


def place_keys(keys: Int[Tensor, " B"], count: int) -> Int[Tensor, "B N"]:
    """A key for each of ``count`` places of a sample, so that what is drawn there is the place's own, whenever."""
    places = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    return _mix(_mix(keys)[:, None] + _mix(places * _GOLDEN))


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_A
    z = (z ^ _shift(z, 27)) * _MIX_B
    return z ^ _shift(z, 31)


def _shift(z: Tensor, places: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (z >> places) & ((1 << (64 - places)) - 1)
