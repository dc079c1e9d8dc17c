"""Names of many files in two arrays: a million Python strings would take hundreds of MB in every data worker."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np


class Names(Sequence[str]):
    """Names in a fixed order; about 8 bytes each beside their text."""

    def __init__(self, names: Iterable[str] | bytes, ends: np.ndarray | None = None) -> None:
        """
        Args:
            names: the names; or all of them as one text of bytes, as :func:`os.fsencode` makes them.
            ends: ``(n,)`` int64, with bytes: where each name ends.
        """
        if isinstance(names, bytes):
            assert ends is not None
            self.text, self.ends = names, ends
        else:
            words: Sequence[str | bytes] = [*names]
            joined = "".join(words)  # type: ignore[arg-type]
            if not joined.isascii():  # else a character is a byte
                words = [os.fsencode(word) for word in words]
            self.text = os.fsencode(joined)
            self.ends = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> "Names": ...
    def __getitem__(self, place: int | slice) -> "str | Names":
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        return os.fsdecode(self.text[self.ends[place - 1] if place else 0 : self.ends[place]])

    def __iter__(self) -> Iterator[str]:
        ends = self.ends.tolist()
        pairs = zip([0, *ends[:-1]], ends, strict=True) if ends else ()
        if self.text.isascii():
            text = self.text.decode()
            return iter([text[start:end] for start, end in pairs])  # twice as fast as a generator
        return iter([os.fsdecode(self.text[start:end]) for start, end in pairs])

    def take(self, places: np.ndarray) -> "Names":
        """Some of the names, in a given order."""
        starts = np.concatenate([[0], self.ends[:-1]])[places] if len(self) else self.ends[places]
        ends = self.ends[places]
        parts = [self.text[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        return Names(b"".join(parts), np.cumsum(ends - starts, dtype=np.int64))

    def find(self, name: str) -> int | None:
        """Place of a name in names that are sorted by their bytes; None if it isn't among them."""
        wanted, low, high = os.fsencode(name), 0, len(self)
        while low < high:
            middle = (low + high) // 2
            found = self.text[self.ends[middle - 1] if middle else 0 : self.ends[middle]]
            if found == wanted:
                return middle
            low, high = (middle + 1, high) if found < wanted else (low, middle)
        return None
