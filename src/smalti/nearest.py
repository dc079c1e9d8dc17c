"""The known name nearest to a misspelled one."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], only_typos: bool = False) -> str | None:
    """The known name most similar to an unknown one; None if none is similar.

    Names within a few typing errors (letters swapped, missing, added or wrong) come first. Longer names also match by
    the fraction of text in common, unless ``only_typos``.

    Example:
        >>> nearest("mea", ["mp3", "mae", "neco"])
        'mae'
    """
    known = sorted(known)
    if not known:
        return None
    lower = name.lower()
    best = min(known, key=lambda other: num_typos(lower, other.lower()))
    if num_typos(lower, best.lower()) <= len(name) // 3:
        return best
    return None if only_typos else next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.6)), None)


def num_typos(one: str, other: str) -> int:
    """Number of typing errors between two texts: characters inserted, deleted, replaced, or swapped with a neighbour
    (optimal string alignment distance).

    Example:
        >>> num_typos("mea", "mae"), num_typos("steps", "step"), num_typos("mea", "mp3")
        (1, 1, 2)
    """
    before: list[int] = []
    last = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        row = [i]
        for j, b in enumerate(other, start=1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]
