"""The site reads every docstring without a warning: ``make docs`` is strict."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

griffe = pytest.importorskip("griffe", reason="the extra docs")
SOURCES = Path(__file__).parents[2] / "src"


def objects(parent) -> Iterator:
    for member in parent.members.values():
        if not member.is_alias:
            yield member
            if member.is_module or member.is_class:
                yield from objects(member)


def test_sections_of_docstrings_are_well_formed(caplog: pytest.LogCaptureFixture) -> None:
    package = griffe.load("smalti", search_paths=[SOURCES], allow_inspection=False)
    with caplog.at_level(logging.WARNING):
        seen = [one.docstring.parse("google", warn_unknown_params=False) for one in objects(package) if one.docstring]
    assert len(seen) > 1000
    assert not caplog.messages
