"""Settings as text: what a user would type."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, PositiveInt

from smalti.cli.setting_docs import as_typed, describe, type_text
from smalti.config import Count, Seed, Workers, parse_overrides, settings


@settings
class Inner:
    rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """A ``rate``,
    on two lines."""


@settings
class Outer:
    name: str
    """Needed."""
    inner: Inner = Inner()
    """Always there."""
    maybe: Inner | None = None
    """Sometimes there."""
    mixed: str | Inner = "auto"
    """A word or a group."""
    sizes: tuple[int, ...] = (1, 2)
    """Sizes."""


def test_groups_are_walked_and_defaults_are_as_typed() -> None:
    lines = {one.key: (one.line, one.meaning) for one in describe(Outer, "x.", {"x.inner.rate": 0.5})}
    assert lines == {
        "x.name": ("x.name (str)", "Needed."),
        "x.inner.rate": ("x.inner.rate (float > 0 and < 1 or null, default 0.5)", "A rate, on two lines."),
        "x.maybe.rate": ("x.maybe.rate (float > 0 and < 1 or null, default null)", "A rate, on two lines."),
        "x.mixed.rate": ("x.mixed.rate (float > 0 and < 1 or null, default null)", "A rate, on two lines."),
        "x.mixed": ("x.mixed (str or group, default auto)", "A word or a group."),
        "x.sizes": ("x.sizes (list of int, default [1, 2])", "Sizes."),
    }


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (Count, "int >= 1"),
        (Seed, "int >= 0"),
        (Workers, "int in 0..1024"),
        (PositiveInt | None, "int > 0 or null"),
        (Literal["a", 1, None], "a or 1 or null"),
        (tuple[float, float], "[float, float]"),
        (list[str], "list of str"),
        (dict[str, Any], "mapping of str to any"),
        (Path, "path"),
        (bool | str, "bool or str"),
        (tuple[Annotated[float, Field(ge=0, le=1)], ...], "list of float in 0..1"),
    ],
)
def test_types_in_words(annotation: Any, text: str) -> None:
    assert type_text(annotation) == text


@pytest.mark.parametrize("value", [None, True, 1e-8, "auto", (1, 2.5), "", "null", {"a": 1}])
def test_a_default_can_be_typed_again(value: Any) -> None:
    read = parse_overrides([f"key={as_typed(value)}"])["key"]
    assert read == (list(value) if isinstance(value, tuple) else value)
