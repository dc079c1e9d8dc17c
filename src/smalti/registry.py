"""Which methods and protocols exist, read from source text: nothing is imported, so that lists, help and shell
completion are quick.

A method is a class below ``@register("NAME")``, a protocol a function below ``@register_protocol("NAME")``, both at the
top level of a module. Adding a file to the package is enough to be listed.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

Kind = Literal["method", "protocol"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_PACKAGE = Path(__file__).parent
_FOLDERS: Mapping[Kind, Path] = {"method": _PACKAGE / "methods", "protocol": _PACKAGE / "evaluation"}
_DECORATORS: Mapping[Kind, str] = {"method": "register", "protocol": "register_protocol"}


@dataclass(frozen=True)
class Entry:
    """A registered method or protocol, as its source text describes it."""

    name: str
    """As the command line spells it."""
    file: Path
    """Source file."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Class attributes that are plain text, such as ``title`` and ``paper``."""
    docstring: str = ""
    """Of the class or function."""

    @property
    def summary(self) -> str:
        """One line: the title, else the first line of the docstring without its full stop."""
        lines = self.docstring.strip().splitlines() or [""]
        return self.facts.get("title", lines[0].removesuffix("."))


def listed(kind: Kind) -> dict[str, Entry]:
    """All methods or protocols by name, in alphabetical order."""
    found = [entry for file in sorted(_FOLDERS[kind].rglob("*.py")) for entry in entries_in(file, kind)]
    return {entry.name: entry for entry in sorted(found, key=lambda entry: entry.name)}


def entries_in(file: Path, kind: Kind) -> Iterator[Entry]:
    """What a source file registers at its top level.

    Args:
        file: Python source.
        kind: what to look for.
    """
    text = file.read_text(encoding="utf-8")
    if f"{_DECORATORS[kind]}(" not in text:
        return
    module = ast.parse(text)
    constants = _texts(module.body)
    for node in module.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        for decorator in node.decorator_list:
            if _called(decorator) == _DECORATORS[kind] and isinstance(decorator, ast.Call) and decorator.args:
                name = _text(decorator.args[0], constants)
                if name is not None:
                    yield Entry(name, file, _texts(node.body), ast.get_docstring(node) or "")


def _called(decorator: ast.expr) -> str:
    """Name of a decorator that is called: ``register`` in ``@register("x")`` and ``@base.register("x")``."""
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _text(node: ast.expr | None, constants: Mapping[str, str]) -> str | None:
    """The text that an expression is: a literal, or a constant of the module."""
    if isinstance(node, ast.Name):
        return constants.get(node.id)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _texts(body: list[ast.stmt]) -> dict[str, str]:
    """``{name: text}`` of the assignments of text in a module or class."""
    found: dict[str, str] = {}
    for node in body:
        names: list[ast.expr] = []
        value: ast.expr | None = None
        if isinstance(node, ast.AnnAssign):
            names, value = [node.target], node.value
        elif isinstance(node, ast.Assign):
            names, value = node.targets, node.value
        text = _text(value, found)
        found.update({name.id: text for name in names if isinstance(name, ast.Name) and text is not None})
    return found
