"""Timing several ways to do one thing: interleaved, so that a busy machine is unfair to all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Timing(NamedTuple):
    """CPU seconds of one call."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median * 1e3:.2f} ms ({self.low * 1e3:.2f} to {self.high * 1e3:.2f})"


def interleave(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """CPU time of each way, one call of every way a round, after a first round that doesn't count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if i:
                times[name].append(time.process_time() - start)
    return {name: Timing(statistics.median(all_), min(all_), max(all_)) for name, all_ in times.items()}


def report(question: str, timings: Mapping[str, Timing], ours: str, peer: str, goal: float) -> None:
    """Print the ratio of medians, both times with their range, and whether the goal is met."""
    ratio = timings[ours].median / timings[peer].median
    verdict = "met" if ratio <= goal else "MISSED"
    print(
        f"BENCH {question} ratio={ratio:.3f} goal<={goal} {verdict} "
        f"{ours}={timings[ours]} {peer}={timings[peer]} (median, min to max)"
    )
