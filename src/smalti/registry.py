"""Registry of methods and protocols: Smalti's own and those of other packages.

Lists are read from source text: nothing is imported, so that ``smalti methods``, help and shell completion are quick. A
method is a class below ``@register("NAME")``, a protocol a function below ``@register_protocol("NAME")``, both at the
top level of a module. Other packages are found by their entry points (groups ``smalti.methods`` and
``smalti.protocols``, each naming a module) and by ``--import MODULE``.
"""

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from smalti.errors import ConfigError, SmaltiError

Kind = Literal["method", "protocol"]
IMPORTS = "SMALTI_IMPORT"
"""Environment variable with the modules of ``--import``, separated by ``os.pathsep``; child processes see it, too."""
_PACKAGE = Path(__file__).parent
_FOLDERS: Mapping[Kind, Path] = {"method": _PACKAGE / "methods", "protocol": _PACKAGE / "evaluation"}
_DECORATORS: Mapping[Kind, str] = {"method": "register", "protocol": "register_protocol"}
_imported: set[str] = set()


@dataclass(frozen=True)
class Entry:
    """A registered method or protocol, as found in its source text."""

    name: str
    """Name on the command line."""
    file: Path
    """Source file."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Class attributes that are strings, such as ``title`` and ``paper``."""
    docstring: str = ""
    """Docstring of the class or function."""

    @property
    def summary(self) -> str:
        """One line: the title, else the first line of the docstring without its full stop."""
        lines = self.docstring.strip().splitlines() or [""]
        return self.facts.get("title", lines[0].removesuffix("."))

    @property
    def place(self) -> str:
        """Source file within Smalti, such as ``methods/mae.py``; the full path for other packages."""
        return str(self.file.relative_to(_PACKAGE) if self.file.is_relative_to(_PACKAGE) else self.file)


class Outside(NamedTuple):
    """A module of another package."""

    module: str
    """Dotted name, or path of a source file."""
    origin: str
    """Where it was named, for errors."""
    is_asked: bool
    """Whether the user named it with ``--import``."""


def listed(kind: Kind) -> dict[str, Entry]:
    """All methods or protocols by name, in alphabetical order.

    Raises:
        ConfigError: if two have the same name, or a module of ``--import`` doesn't exist.
    """
    found: dict[str, Entry] = {}
    sources = [(sorted(_FOLDERS[kind].rglob("*.py")), "smalti")]
    sources += [(_sources(one), one.origin) for one in outside(kind)]
    for files, origin in sources:
        for entry in (entry for file in files for entry in entries_in(file, kind)):
            if found.setdefault(entry.name, entry).file != entry.file:
                raise ConfigError(f"{origin}: {clash(kind, entry.name, found[entry.name].place, entry.place)}")
    return dict(sorted(found.items()))


def clash(kind: Kind, name: str, one: str, other: str) -> str:
    """Error message for two methods or protocols of the same name."""
    return f"two {kind}s are named '{name}': {one} and {other}; rename or remove one"


def use_modules(modules: Iterable[str]) -> None:
    """Add modules that register methods or protocols, for this process and its children.

    Args:
        modules: dotted names, or paths of source files.
    """
    known = [module for module in os.environ.get(IMPORTS, "").split(os.pathsep) if module]
    more = [str(Path(module).resolve()) if module.endswith(".py") else module for module in modules]
    os.environ[IMPORTS] = os.pathsep.join(dict.fromkeys([*known, *more]))


def outside(kind: Kind) -> Iterator[Outside]:
    """Modules of other packages that register methods or protocols."""
    for point in _entry_points(f"smalti.{kind}s", tuple(sys.path)):
        package = point.dist.name if point.dist else "an unknown package"
        yield Outside(point.module, f"package {package} (entry point {point.name})", is_asked=False)
    for module in os.environ.get(IMPORTS, "").split(os.pathsep):
        if module:
            yield Outside(module, f"--import {module}", is_asked=True)


@functools.cache
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[importlib.metadata.EntryPoint, ...]:
    """Entry points of the packages on ``path``, which is ``sys.path``: finding them reads a file of each package."""
    return tuple(importlib.metadata.entry_points(group=group))


def import_outside(kind: Kind) -> None:
    """Import the modules of other packages, which registers their methods or protocols. A package that can't be
    imported is skipped with a warning.

    Raises:
        ConfigError: if a module of ``--import`` can't be imported, or two methods or protocols have the same name.
    """
    for one in outside(kind):
        if one.module in _imported:
            continue
        _imported.add(one.module)  # before: the module may look up methods itself
        try:
            _import(one)
        except SmaltiError as error:
            _imported.discard(one.module)
            raise ConfigError(f"{one.origin}: {error}") from error
        except Exception as error:
            line = f"{one.origin}: can't be imported ({type(error).__name__}: {error})"
            if one.is_asked:
                _imported.discard(one.module)
                raise ConfigError(line) from error
            warnings.warn(f"{line}; its {kind}s are not available", stacklevel=2)


def _import(one: Outside) -> None:
    name = _findable(one)
    module = importlib.import_module(name)
    if one.module.endswith(".py") and Path(module.__file__ or "").resolve() != Path(one.module):
        raise ConfigError(f"another module is named '{name}' ({module.__file__}); rename the file")


def _findable(one: Outside) -> str:
    """The module's name; the working directory, or the folder of a source file, is added to the search path, also for
    data workers."""
    folder = Path(one.module).parent if one.module.endswith(".py") else Path.cwd()
    if one.is_asked and str(folder) not in sys.path:
        sys.path.append(str(folder))
    return Path(one.module).stem if one.module.endswith(".py") else one.module


def _sources(one: Outside) -> list[Path]:
    """Source files of a module, or of all modules of a package, without importing it.

    Raises:
        ConfigError: if a module named with ``--import`` doesn't exist.
    """
    first, *others = _findable(one).split(".")
    spec = importlib.util.find_spec(first)
    path = Path(one.module) if one.module.endswith(".py") else Path(spec.origin if spec and spec.origin else first)
    if others and spec and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]).joinpath(*others)
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if path.is_file():
        return sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    if one.is_asked:
        raise ConfigError(f"{one.origin}: the module doesn't exist")
    return []


def entries_in(file: Path, kind: Kind) -> Iterator[Entry]:
    """Methods or protocols that a source file registers at its top level.

    Args:
        file: Python source.
        kind: what to look for.
    """
    text = file.read_text(encoding="utf-8")
    if f"{_DECORATORS[kind]}(" not in text:
        return
    try:
        module = ast.parse(text)
    except SyntaxError:  # reported when it is imported
        return
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
    """Name of a decorator with arguments: ``register`` in ``@register("x")`` and ``@base.register("x")``."""
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _text(node: ast.expr | None, constants: Mapping[str, str]) -> str | None:
    """The string value of an expression: a literal, or a constant of the module."""
    if isinstance(node, ast.Name):
        return constants.get(node.id)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _texts(body: list[ast.stmt]) -> dict[str, str]:
    """``{name: text}`` of the string assignments in a module or class."""
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
