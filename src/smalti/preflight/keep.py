"""What an encoder saves on this machine if it encodes only some patches, ranking them included.

Letters: N patches of an image, K kept ones.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from smalti.exporters.ranked import RankedModel, check_keep, check_ranker
from smalti.functional.orders import random_orders
from smalti.methods.ranker import DistilledRanker, RankerConfig
from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder
from smalti.preflight.dataset import fact_line

BATCHES = (1, 8)
_ROUNDS, _MIN_ROUNDS, _ENOUGH_S = 7, 3, 10.0
"""Most and fewest rounds, and the seconds after which the fewest are enough."""


@dataclass(frozen=True)
class KeepTiming:
    """Seconds per image in batches of one size, medians of interleaved rounds."""

    batch_size: int
    whole_s: float
    """All N patches."""
    keep_s: float
    """K patches of a known order."""
    ranked_s: float
    """K patches that a ranker chooses."""


@dataclass(frozen=True)
class KeepReport:
    """Time of an encoder with all patches, with some, and with ranking included."""

    encoder: str
    keep: int
    """K."""
    num_patches: int
    """N."""
    device: str
    threads: int
    ranker: str
    """What chooses the patches, in words."""
    timings: tuple[KeepTiming, ...]

    @property
    def pays(self) -> bool:
        """Whether ranking and K patches take less time than all N, in each batch size."""
        return all(one.ranked_s < one.whole_s for one in self.timings)

    def lines(self) -> list[str]:
        """The times and what they mean, as text."""
        found = [
            fact_line(
                "keep",
                f"{self.keep} of {self.num_patches} patches of {self.encoder} on {self.device}, "
                f"{self.threads} thread{'s' * (self.threads != 1)}",
            )
        ]
        for one in self.timings:
            found.append(
                fact_line(
                    "",
                    f"batches of {one.batch_size}: {1e3 * one.whole_s:.3g} ms per image with all patches, "
                    f"{1e3 * one.keep_s:.3g} ms with {self.keep} ({one.keep_s / one.whole_s:.2f}), "
                    f"{1e3 * one.ranked_s:.3g} ms with ranking ({one.ranked_s / one.whole_s:.2f})",
                )
            )
        verdict = (
            "saves time on this machine; smalti evaluate --protocol keep-curve measures the accuracy"
            if self.pays
            else "saves no time on this machine"
        )
        return [*found, fact_line("", f"ranked by {self.ranker}: keeping {self.keep} patches {verdict}")]


@torch.inference_mode()
def measure_keep(encoder: Encoder, keep: int, ranker: DistilledRanker | None = None, source: str = "") -> KeepReport:
    """Measure an encoder with all patches, with K, and with K that a ranker chooses.

    Args:
        encoder: on the device to measure.
        keep: K.
        ranker: chooses the patches. None: one of the default size with random weights, which costs the same.
        source: where the ranker comes from.

    Raises:
        ConfigError: if ``keep`` isn't in 1..N, or the ranker takes other images or patches.
    """
    size = encoder.img_size
    grid = encoder.check_size(*size)
    check_keep(keep, grid, size)
    if ranker is None:
        source = "a ranker of the default size"
        ranker = _default_ranker(encoder)
    check_ranker(ranker, encoder, size, keep)
    device = next(encoder.parameters()).device
    model = RankedModel(encoder, ranker.to(device), keep).eval()
    timings = []
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        images = encoder.normalize(torch.rand(batch, encoder.in_chans, *size, generator=generator).to(device))
        ids = random_orders(torch.arange(batch, device=device), grid[0] * grid[1])[:, :keep]
        jobs: tuple[Callable[[], torch.Tensor], ...] = (
            lambda images=images: encoder.image_features(images),  # type: ignore[misc]
            lambda images=images, ids=ids: encoder.image_features(images, ids),  # type: ignore[misc]
            lambda images=images: model(images),  # type: ignore[misc]
        )
        timings.append(KeepTiming(batch, *(seconds / batch for seconds in _medians(jobs))))
    threads = torch.get_num_threads()
    return KeepReport(encoder.name, keep, grid[0] * grid[1], device.type, threads, source, tuple(timings))


def _default_ranker(encoder: Encoder) -> DistilledRanker:
    """An untrained ranker of the method's default size for the images and patches of an encoder."""
    described = dict(DistilledRanker.defaults["encoder"])
    small = build_encoder(
        described.pop("name"),
        img_size=encoder.img_size,
        patch_size=encoder.patch_size,
        in_chans=encoder.in_chans,
        seed=0,
        **described,
    )
    return DistilledRanker(small, RankerConfig(order="halton")).eval()  # any order: none is read


def _medians(jobs: tuple[Callable[[], torch.Tensor], ...]) -> list[float]:
    """Median seconds of each job; the jobs are interleaved, so that other load affects all of them."""
    taken: list[list[float]] = [[] for _ in jobs]
    began = time.perf_counter()
    for number in range(_ROUNDS + 1):
        if number > _MIN_ROUNDS and time.perf_counter() - began > _ENOUGH_S:
            break
        for job, times in zip(jobs, taken, strict=True):
            started = time.perf_counter()
            job().sum().item()  # ends on the CPU, so a GPU has finished
            if number:  # the first call also allocates
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in taken]
