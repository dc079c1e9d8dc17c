"""Read users' files; any problem becomes a one-line error that names the file.

Parsers raise many kinds of exceptions (``RecursionError`` for ten thousand brackets, ``OverflowError`` for ``1e999``,
``MemoryError`` for an impossible shape). So each reader parses inside :func:`reading`, which converts all of them.
"""

import contextlib
import csv
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from smalti.errors import DataError, SmaltiError, one_line

_LONGEST = 200  # characters of a reason or a value in an error


@contextlib.contextmanager
def reading(path: Path | str, what: str, error: type[SmaltiError] = DataError, advice: str = "") -> Iterator[None]:
    """Turn every exception of a parser into ``PATH: can't be read as WHAT (REASON); ADVICE``.

    Only put the parsing of one file into the block: a bug in it would be reported as a problem of the file, and only
    ``--debug`` would show where it is. Smalti's errors pass unchanged.

    Args:
        path: the file.
        what: what the file should be, with its article, such as ``a JSON file``.
        error: class of the error to raise.
        advice: what the user can do.

    Raises:
        error: from any exception other than a :class:`SmaltiError`.
    """
    try:
        yield
    except SmaltiError:
        raise
    except Exception as problem:
        text = f"{path}: can't be read as {what} ({reason(problem)})"
        raise error(f"{text}; {advice}" if advice else text) from problem


def reason(problem: Exception) -> str:
    """The message of an exception, as a short phrase.

    Example:
        >>> reason(KeyError("grid"))
        "it lacks 'grid'"
    """
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    if isinstance(problem, RecursionError):
        return "it is nested too deeply"
    if isinstance(problem, MemoryError):
        return "it needs more memory than is available"
    if isinstance(problem, UnicodeDecodeError):
        return f"it isn't UTF-8 text: byte {problem.start} is {problem.object[problem.start]:#04x}"
    if isinstance(problem, KeyError):
        return f"it lacks {'' if isinstance(problem.args[0], str) else 'entry '}{shorten(str(problem))}"
    if isinstance(problem, (TypeError, AttributeError, IndexError)):
        return f"it has an unexpected structure: {shorten(str(problem))}"
    return shorten(str(problem)) or type(problem).__name__


def shorten(text: str) -> str:
    """The first line of a text with control characters escaped; the middle of a long line is replaced by dots."""
    line = one_line(text.strip().partition("\n")[0].strip())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 50]} ... {line[-45:]}"


def read_json(path: Path, what: str = "a JSON file", error: type[SmaltiError] = DataError) -> Any:
    """Content of a JSON file.

    Raises:
        error: if it can't be read or isn't JSON.
    """
    with reading(path, what, error):
        return json.loads(path.read_bytes())


def read_mapping(path: Path, what: str = "a JSON file", error: type[SmaltiError] = DataError) -> dict[str, Any]:
    """Content of a JSON file, which must be an object.

    Raises:
        error: if it can't be read, isn't JSON, or isn't an object.
    """
    content = read_json(path, what, error)
    if not isinstance(content, dict):
        raise error(f"{path}: can't be read as {what} (it holds a {type(content).__name__}, an object is needed)")
    return content


def as_number(text: str) -> float:
    """A cell of a table as a number; NaN if it isn't one."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_csv(path: Path, error: type[SmaltiError] = DataError) -> list[dict[str, str]]:
    """Rows of a CSV file with a header; an incomplete last row, as after a kill, is skipped.

    Raises:
        error: if it can't be read, isn't CSV, or its rows differ in length.
    """
    with reading(path, "a CSV file", error), path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
        if rows and (None in rows[-1].values() or None in rows[-1]):
            rows.pop()
        if any(None in row.values() or None in row for row in rows):
            raise ValueError("its rows differ in length")
    return rows


def check_columns(path: Path, names: Iterable[str]) -> None:
    """Check that the columns of a table have different names; blank names may repeat.

    Raises:
        DataError: if two columns have the same name.
    """
    seen = set[str]()
    for name in map(str.strip, names):
        if name and name in seen:
            raise DataError(f"{path}: has two columns named '{shorten(name)}'; keep one")
        seen.add(name)
