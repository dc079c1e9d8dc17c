"""Schedules over the progress of training."""

import math


def half_cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from ``start`` at progress 0 to ``end`` at 1.

    Example:
        >>> tuple(round(half_cosine(1.0, 0.0, progress), 2) for progress in (0, 0.25, 0.5, 1))
        (1.0, 0.85, 0.5, 0.0)

    Source: Loshchilov & Hutter, SGDR, arXiv:1608.03983v5, Eq. (5), without restarts.
    """
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
