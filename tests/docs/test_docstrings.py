"""Docstrings come out as Markdown that means the same."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("griffe")

SPEC = importlib.util.spec_from_file_location("docs_docstrings", Path(__file__).parents[2] / "docs" / "docstrings.py")
assert SPEC and SPEC.loader
docstrings = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(docstrings)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("See :func:`load` and :class:`~smalti.Encoder`.", "See `load` and `smalti.Encoder`."),
        ("P = C*ph*pw values, ``C*ph``", "P = C\\*ph\\*pw values, ``C*ph``"),
        ("MAE.\n\nPaper: He.\nLetters: B.", "MAE.\n\nPaper: He.\n\nLetters: B."),
        ("One.\n\nArgs:\n    a: one\n    b: two * 3", "One.\n\nArgs:\n    a: one\n    b: two \\* 3"),
        ("Example:\n    >>> 2 * 3\n    6", "Example:\n    >>> 2 * 3\n    6"),
    ],
)
def test_docstrings_become_markdown(text: str, wanted: str) -> None:
    assert docstrings.as_markdown(text) == wanted
