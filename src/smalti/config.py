"""Settings: YAML and dotted ``key=value`` overrides become frozen, documented pydantic dataclasses.

A setting is a field of a class decorated with :func:`settings`, beside the code it steers, its meaning in the string
on the line below. Unknown keys are refused with the nearest name; numbers such as ``1e-4``, which PyYAML reads as
text, are converted by the field's type.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform, get_args

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from smalti.errors import ConfigError
from smalti.files import write_atomically

T = TypeVar("T")
Tree = dict[str, Any]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only pydantic dataclass that refuses unknown keys and keeps field docs."""
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=False)
    return pydantic_dataclass(config=config, frozen=True, kw_only=True)(cls)  # type: ignore[return-value]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 wants a point in front of an exponent; here ``1e-5`` is a number, too."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> Tree:
    """The mapping in a YAML file, with dotted keys unfolded (``{"method.mask_ratio": 1}`` nests).

    Raises:
        ConfigError: if the file is missing, isn't YAML, or holds something else than a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read as a YAML file ({error})") from error
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}: not valid YAML{line}; expected lines such as 'steps: 1000'") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, needs a mapping of settings such as 'steps: 1000'")
    return unfold(tree)


def parse_overrides(words: Iterable[str]) -> Tree:
    """The tree that trailing ``key=value`` words describe; values are read as YAML scalars or lists.

    Example:
        >>> parse_overrides(["steps=10", "optim.lr=1e-3", "eval.protocols=[knn]"])
        {'steps': 10, 'optim': {'lr': 0.001}, 'eval': {'protocols': ['knn']}}

    Raises:
        ConfigError: if a word has no ``=`` or an empty key.
    """
    flat: Tree = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"'{word}' is not a setting; write key=value, for example steps=1000")
        try:
            flat[key.strip()] = yaml.load(text, Loader=_Loader) if text else ""
        except yaml.YAMLError:
            flat[key.strip()] = text
    return unfold(flat)


def unfold(tree: Mapping[str, Any]) -> Tree:
    """Nest dotted keys: ``{"a.b": 1, "a.c": 2}`` becomes ``{"a": {"b": 1, "c": 2}}``.

    A plain value and dotted keys under one name may stand together (``method: mae`` with ``method.mask_ratio: 0.6``):
    the plain value becomes the key ``name``.

    Raises:
        ConfigError: if a key that isn't text is found.
    """
    result: Tree = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ConfigError(f"settings have text keys, got {key!r}")
        node: Tree = {}
        leaf = node
        *parents, last = key.split(".")
        for parent in parents:
            leaf = leaf.setdefault(parent, {})
        leaf[last] = unfold(value) if isinstance(value, Mapping) else value
        result = merge(result, node)
    return result


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """The inverse of :func:`unfold`: nested settings as dotted keys; an empty group stays as it is.

    Example:
        >>> flatten({"optim": {"lr": 0.1}, "seed": 0})
        {'optim.lr': 0.1, 'seed': 0}
    """
    flat: Tree = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """``base`` updated by ``over``, nested mapping by nested mapping; neither is changed."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, Mapping) and value is not None:
            result[key] = merge(old, value if isinstance(value, Mapping) else {"name": value})
        elif isinstance(value, Mapping) and old is not None:
            result[key] = merge({"name": old}, value)
        else:
            result[key] = value
    return result


def build(cls: type[T], tree: Mapping[str, Any], where: str = "settings", group: str = "") -> T:
    """An instance of a settings class from a tree of plain values.

    Args:
        cls: a class decorated with :func:`settings`.
        tree: nested plain values, as read from YAML.
        where: what to name in errors: a file, or "settings".
        group: the group of settings that this is, such as ``method``.

    Raises:
        ConfigError: one line: the first unknown key with its nearest name, or the first value that doesn't fit.
    """
    try:
        return TypeAdapter(cls).validate_python(dict(tree))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_problem(cls, error, group)}") from None


def _first_problem(cls: type, error: ValidationError, group: str) -> str:
    """One line about the first problem in a validation error, unknown keys first."""
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] in ("unexpected_keyword_argument", "extra_forbidden")]
    problem = (unknown or problems)[0]
    path = ".".join([*([group] if group else []), *(str(part) for part in problem["loc"])])
    if unknown:
        parent = cls
        for part in problem["loc"][:-1]:
            parent = _field_type(parent, str(part))
        *groups, name = path.split(".")
        return unknown_key(name, field_names(parent), ".".join(groups))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}={problem.get('input')!r}: {message[0].lower()}{message[1:]}"


def unknown_key(name: str, known: Iterable[str], group: str = "") -> str:
    """The line for a key that doesn't exist: says which group it was looked for in, and the nearest name.

    Example:
        >>> unknown_key("mask_ration", ["mask_ratio", "norm_pix_loss"], "method")
        "method has no field 'mask_ration'; did you mean 'mask_ratio'?"
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'?" if near else f"it has: {', '.join(known)}"
    return f"{group or 'settings'} has no field '{name}'; {hint}"


def field_names(cls: type) -> list[str]:
    """Names of the fields of a settings class, in the order of their definition."""
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def field_docs(cls: type) -> dict[str, tuple[Any, str]]:
    """``{name: (default, meaning)}`` of a settings class, for help texts and method cards."""
    documented = getattr(cls, "__pydantic_fields__", {})
    inherited = {
        name: info.description
        for base in reversed(cls.__mro__)  # pydantic reads the strings of a class's own fields only
        for name, info in getattr(base, "__pydantic_fields__", {}).items()
        if info.description
    }
    return {
        name: (
            info.get_default(call_default_factory=True) if not info.is_required() else None,
            info.description or inherited.get(name, ""),
        )
        for name, info in documented.items()
    }


def _field_type(cls: type, name: str) -> type:
    """The settings class of a nested field; ``object`` where there is none."""
    info = getattr(cls, "__pydantic_fields__", {}).get(name)
    annotation = info.annotation if info else object
    for candidate in (annotation, *get_args(annotation)):
        if dataclasses.is_dataclass(candidate):
            return candidate  # type: ignore[return-value]
    return object


def to_tree(value: Any) -> Any:
    """Plain values (what YAML and JSON can hold) of a settings object."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_tree(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_tree(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def write_yaml(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a tree as YAML, to a temporary name first and then renamed."""
    write_atomically(path, yaml.safe_dump(to_tree(tree), sort_keys=False, allow_unicode=True))
