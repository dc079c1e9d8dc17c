"""What a candidate costs on this machine: parameters, time per image, memory."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from smalti.choosing.candidates import Candidate
from smalti.models.encoder import Encoder, eval_mode
from smalti.models.inner_layers import InnerLayers
from smalti.models.licences import licence_of

BATCH = 4
ROUNDS = 5


@dataclass(frozen=True)
class Cost:
    """Of one candidate, up to the last block that it reads."""

    parameters: int
    weights_mib: float
    """MiB of the weights in float32."""
    ms_per_image: float
    """Milliseconds, median of interleaved rounds, in batches of 4."""
    embed_dim: int
    """Width of its tokens."""
    licence: str | None
    """As timm or the model's own files state it; None: not stated."""


@torch.inference_mode()
def measure_costs(candidates: Sequence[Candidate], encoders: Mapping[str, Encoder]) -> dict[str, Cost]:
    """Cost of each candidate, by name; rounds are interleaved, so that other load affects all of them.

    Args:
        candidates: which.
        encoders: name of an encoder -> itself, on the device to measure.
    """
    readings = {one.name: InnerLayers(encoders[one.encoder], one.layers) for one in candidates}
    taken: dict[str, list[float]] = {name: [] for name in readings}
    for number in range(ROUNDS + 1):
        for candidate in candidates:
            read = readings[candidate.name]
            side = candidate.image_size
            device = next(read.parameters()).device
            images = torch.zeros(BATCH, read.in_chans, side, side, device=device)
            with eval_mode(read):
                started = time.perf_counter()
                read.encode(images).patches.sum().item()  # ends on the CPU, so a GPU has finished
            if number:  # the first call also allocates
                taken[candidate.name].append((time.perf_counter() - started) / BATCH)
    return {one.name: _cost(one, readings[one.name], 1e3 * statistics.median(taken[one.name])) for one in candidates}


def _cost(candidate: Candidate, read: InnerLayers, ms_per_image: float) -> Cost:
    unused = sum(p.numel() for block in read.vit.blocks[max(candidate.layers) :] for p in block.parameters())
    number = sum(p.numel() for p in read.parameters()) - unused
    return Cost(number, number * 4 / 2**20, ms_per_image, read.embed_dim, licence_of(candidate.encoder))


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names that no other beats in both: no shorter time with at least the quality; fastest first.

    Args:
        points: name -> time (lower is better) and quality (higher is better).
    """
    front, best = list[str](), float("-inf")
    for name, (_, quality) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if quality > best:
            front.append(name)
            best = quality
    return front
