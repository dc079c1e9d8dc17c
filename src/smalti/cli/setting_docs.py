"""Settings classes as text: each setting with its key, type, default and meaning."""

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from smalti.config import OWN, field_docs, open_groups, to_tree

_NAMES: Mapping[Any, str] = {type(None): "null", int: "int", float: "float", str: "str", bool: "bool", Any: "any"}


@dataclass(frozen=True)
class Setting:
    """One setting, as the command line takes it."""

    key: str
    """Key with its groups: ``optim.lr``."""
    type: str
    """Type in words, such as ``int >= 1 or null``."""
    default: str
    """Default as it would be typed; empty if there is none."""
    meaning: str

    @property
    def line(self) -> str:
        """Key, type and default."""
        return f"{self.key} ({self.type}{f', default {self.default}' if self.default else ''})"


def describe(cls: type, prefix: str = "", defaults: Mapping[str, Any] | None = None) -> Iterator[Setting]:
    """All settings of a settings class and its groups, in the order of definition.

    Args:
        cls: decorated with :func:`smalti.config.settings`.
        prefix: prefix of the keys, such as ``method.``.
        defaults: defaults that override those of the class, by dotted key (with the prefix).
    """
    fields = getattr(cls, "__pydantic_fields__", {})
    groups = open_groups(cls)
    for name, (default, meaning) in field_docs(cls).items():
        if groups and name == OWN:
            continue
        key, info = f"{prefix}{name}", fields[name]
        group = _group(info.annotation)
        if group is not None:
            yield from describe(group, f"{key}.", defaults)
            if info.annotation is group or set(get_args(info.annotation)) == {group, type(None)}:
                continue
        default = (defaults or {}).get(key, default)
        shown = "" if info.is_required() else as_typed(default)
        yield Setting(
            key, type_text(info.annotation, info.metadata), shown, " ".join(meaning.replace("``", "").split())
        )
    for name, group in groups.items():
        yield from describe(group, f"{prefix}{name}.", defaults)


def _group(annotation: Any) -> type | None:
    """The settings class in a field's type; None if there is none."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and is_dataclass(candidate):
            return candidate
    return None


def as_typed(value: Any) -> str:
    """A value as it would be typed after ``key=``.

    Example:
        >>> as_typed(None), as_typed(True), as_typed((0.2, 1.0)), as_typed("auto")
        ('null', 'true', '[0.2, 1.0]', 'auto')
    """
    return yaml.safe_dump(to_tree(value), default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words.

    Args:
        annotation: type annotation of a field.
        metadata: limits, as stored by pydantic.

    Example:
        >>> type_text(int | None), type_text(tuple[float, ...]), type_text(Literal["fp32", "bf16"])
        ('int or null', 'list of float', 'fp32 or bf16')
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(parts[0], parts[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(part) for part in parts))
    if origin is Literal:
        return " or ".join(map(as_typed, parts))
    if origin in (tuple, list):
        if origin is list or parts[-1] is Ellipsis:
            return f"list of {type_text(parts[0])}"
        return f"[{', '.join(map(type_text, parts))}]"
    if origin is dict:
        return f"mapping of {type_text(parts[0])} to {type_text(parts[1])}"
    if isinstance(annotation, type) and is_dataclass(annotation):
        return "group"
    return f"{_NAMES.get(annotation, getattr(annotation, '__name__', str(annotation)).lower())}{_limits(metadata)}"


def _limits(metadata: Sequence[Any]) -> str:
    """Limits after a type; technical upper limits, such as 64 bits, are omitted."""
    found: dict[str, Any] = {}
    for item in (part for one in metadata for part in (*getattr(one, "metadata", ()), one)):
        for sign in ("ge", "gt", "le", "lt"):
            limit = getattr(item, sign, None)
            if limit is not None and not (sign in ("le", "lt") and limit >= 2**31):
                found[sign] = limit
    if "ge" in found and "le" in found:
        return f" in {found['ge']}..{found['le']}"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return " and".join(f" {signs[sign]} {limit}" for sign, limit in found.items())
