"""Numbers and settings as people write them."""

import math
from typing import Any


def plain(value: Any) -> str:
    """The value of a setting; a dash for none.

    Example:
        >>> plain({"lr": 0.1, "betas": [0.9, 0.95]})
        'lr 0.1, betas 0.9, 0.95'
    """
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items()) or "–"
    return "–" if value is None else str(value)


def as_float(value: Any) -> float:
    """A number, or NaN for anything else."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def decimals(value: float) -> str:
    """Three decimals, or one for large numbers; a dash for what isn't finite.

    Example:
        >>> decimals(0.5), decimals(1234.5), decimals(math.nan)
        ('0.500', '1,234.5', '–')
    """
    if not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as far as they matter.

    Example:
        >>> duration(59.6), duration(3700)
        ('1 min 00 s', '1 h 01 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
