"""What source text says is registered equals what is registered."""

import subprocess
import sys
from pathlib import Path

import pytest

from smalti.evaluation.protocol import find_protocol, protocol_names
from smalti.methods.base import get_method, method_names
from smalti.registry import entries_in, listed


def test_methods_read_from_source_are_those_of_the_registry() -> None:
    entries = listed("method")
    assert tuple(entries) == method_names()
    for name, entry in entries.items():
        method = get_method(name)
        assert (entry.summary, entry.facts["paper"]) == (method.title, method.paper)
        assert f"smalti.methods.{entry.file.stem}" == method.__module__


def test_protocols_read_from_source_are_those_of_the_registry() -> None:
    entries = listed("protocol")
    assert set(entries) == set(protocol_names())
    for name, entry in entries.items():
        assert entry.summary == find_protocol(name).summary.removesuffix(".")


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from smalti.registry import listed; listed('method'), listed('protocol')\n"
        "print(*{'torch', 'numpy', 'pydantic', 'smalti.methods'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("source", "name", "summary"),
    [
        ('@register("a")\nclass A:\n    title = "one " "two"\n    paper: str = "none"\n', "a", "one two"),
        (
            'NAME = "b"\n\n@base.register(NAME)\n@other\nclass B:\n    """First line.\n\n    More."""\n',
            "b",
            "First line",
        ),
        ('@register("c")\nclass C:\n    pass\n', "c", ""),
    ],
)
def test_names_and_texts_are_found_as_they_may_be_written(source: str, name: str, summary: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(source)
    (entry,) = entries_in(tmp_path / "x.py", "method")
    assert (entry.name, entry.summary) == (name, summary)


def test_what_is_registered_inside_of_functions_or_under_computed_names_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text('def f():\n    @register("a")\n    class A: ...\n\n@register(f())\nclass B: ...\n')
    assert list(entries_in(tmp_path / "x.py", "method")) == []
