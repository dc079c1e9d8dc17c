"""Settings: YAML and dotted ``key=value`` overrides become frozen, documented pydantic dataclasses.

A setting is a field of a class decorated with :func:`settings`, next to the code that uses it; the string below the
field is its documentation. For unknown keys, the nearest name is suggested; numbers such as ``1e-4``, which PyYAML
reads as text, are converted by the field's type.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from smalti.errors import ConfigError
from smalti.files import write_atomically
from smalti.nearest import nearest
from smalti.reading import reading, shorten

T = TypeVar("T")
Tree = dict[str, Any]

Count = Annotated[int, Field(ge=1, lt=2**31)]
"""A count of at least 1."""
BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]
"""Images per batch."""
CountFromZero = Annotated[int, Field(ge=0, lt=2**31)]
"""A count of at least 0."""
ImageSize = Annotated[int, Field(ge=1, le=16384)]
"""Side of an encoder's input in pixels; the limit is a million patches of 16 pixels, more than attention can handle."""
Few = Annotated[int, Field(ge=0, le=1024)]
"""A count of things made one by one, such as views of an image."""
Width = Annotated[int, Field(ge=1, le=65536)]
"""Width of tokens or of a hidden layer."""
Depth = Annotated[int, Field(ge=1, le=1024)]
"""Number of layers, at least 1."""
DepthFromZero = Annotated[int, Field(ge=0, le=1024)]
"""Number of layers, at least 0."""
NumHeads = Annotated[int, Field(ge=1, le=1024)]
"""Attention heads."""
Workers = Annotated[int, Field(ge=0, le=1024)]
"""Data-loading worker processes; 0: load in the main process."""
Ratio = Annotated[float, Field(ge=0, le=1)]
"""A fraction or probability, in 0..1."""
RatioBelowOne = Annotated[float, Field(ge=0, lt=1)]
"""A fraction in [0, 1)."""
PositiveRatio = Annotated[float, Field(gt=0, le=1)]
"""A fraction in (0, 1]."""
Positive = Annotated[float, Field(gt=0)]
"""A number above 0."""
NonNegative = Annotated[float, Field(ge=0)]
"""A number of at least 0."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed in the range that torch, NumPy and scikit-learn accept."""


@dataclasses.dataclass(frozen=True)
class NamesPath:
    """Marks a setting whose text names a file or folder; see :func:`resolve_paths`."""


PathText = Annotated[str, NamesPath()]
"""``PATH``, ``NAME=PATH`` or ``timm:NAME@PATH``; relative paths are made absolute before a run is written."""

OWN = "own"
"""Field that holds the groups of a class with :func:`open_groups`."""
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}  # pydantic's names
_DEEPEST = 16  # groups inside of groups
_MOST_VALUES = 100_000  # in a YAML file, aliases expanded


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only pydantic dataclass that rejects unknown keys and non-finite numbers, and
    keeps field docs. Its constructor raises :class:`ConfigError` with one line."""
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=False, allow_inf_nan=False)
    made: Any = pydantic_dataclass(config=config, frozen=True, kw_only=True)(cls)
    construct = made.__init__

    @functools.wraps(construct)
    def checked(self: Any, **values: Any) -> None:
        try:
            construct(self, **values)
        except ValidationError as error:
            raise ConfigError(_first_problem(made, error, cls.__name__, values)) from None

    made.__init__ = checked
    return made


class _Loader(yaml.SafeLoader):
    """YAML 1.1 requires a decimal point before an exponent; here ``1e-5`` is also a number. Dates stay text. Recursive
    aliases, and those that expand to more values than any recipe has, are rejected."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return self.construct_document(node)


def _count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values below a node with its aliases expanded."""
    if id(node) not in known:
        known[id(node)] = 0  # until it is counted; only a recursive alias looks it up before
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_count_values(child, known) for child in children)
    count = known[id(node)]
    if not count:
        raise yaml.MarkedYAMLError(problem="an alias contains itself", problem_mark=node.start_mark)
    if count > _MOST_VALUES:
        raise yaml.MarkedYAMLError(
            problem=f"its aliases expand to more than {_MOST_VALUES:,} values", problem_mark=node.start_mark
        )
    return count


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> Tree:
    """The mapping in a YAML file, with dotted keys unfolded (``{"method.mask_ratio": 1}`` nests).

    Raises:
        ConfigError: if the file is missing, isn't YAML, or isn't a mapping.
    """
    with reading(path, "a YAML file", ConfigError):
        text = path.read_text(encoding="utf-8")
        try:
            tree = yaml.load(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            where = error.problem_mark
            line = f" at line {where.line + 1}" if where else ""
            why = shorten(str(error.problem))
            raise ConfigError(f"{path}: not valid YAML{line} ({why}); write lines such as 'steps: 1000'") from error
        if tree is None:
            return {}
        if not isinstance(tree, dict):
            raise ConfigError(
                f"{path}: holds a {type(tree).__name__}, needs a mapping of settings such as 'steps: 1000'"
            )
        return unfold(tree)


def parse_overrides(words: Iterable[str]) -> Tree:
    """Parse ``key=value`` words into a tree; values are parsed as YAML scalars or lists, or kept as text if that fails.


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
            raise ConfigError(f"'{shorten(word)}' is not of the form key=value; write for example steps=1000")
        try:
            flat[key.strip()] = yaml.load(text, Loader=_Loader) if text else ""
        except (
            Exception
        ):  # a bracket in a file name, `0x_`, 5,000 digits: kept as text, which the setting's type validates
            flat[key.strip()] = text
    return unfold(flat)


def unfold(tree: Mapping[str, Any]) -> Tree:
    """Nest dotted keys: ``{"a.b": 1, "a.c": 2}`` becomes ``{"a": {"b": 1, "c": 2}}``.

    A plain value can be combined with dotted keys of the same name (``method: mae`` with ``method.mask_ratio: 0.6``):
    the plain value becomes the key ``name``.

    Raises:
        ConfigError: if a key isn't text.
    """
    result: Tree = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ConfigError(f"setting names must be text, got {_shown(key)}")
        if key.count(".") > _DEEPEST:
            raise ConfigError(f"setting names have at most {_DEEPEST} dots, got {_shown(key)}")
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
        where: source of the settings in errors: a file or "settings"; may be empty.
        group: name of the group of settings, such as ``method``.

    Raises:
        ConfigError: for an unknown key (the nearest name is suggested), or an invalid value.
    """
    try:
        built = TypeAdapter(cls).validate_python(dict(tree))
    except ValidationError as error:
        raise ConfigError(f"{where}{': ' if where else ''}{_first_problem(cls, error, group, tree)}") from None
    for key, value in flatten(to_tree(built), f"{group}." if group else "").items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{where}: {key}={_shown(value)}: an integer of at most 64 bits is needed")
    return built


def _first_problem(cls: type, error: ValidationError, group: str, tree: Mapping[str, Any]) -> str:
    """One line about the first problem in a validation error, unknown keys first."""
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] in ("unexpected_keyword_argument", "extra_forbidden")]
    problem = (unknown or problems)[0]
    if isinstance(cause := problem.get("ctx", {}).get("error"), ConfigError):  # raised by one of our validators
        return str(cause)
    path = ".".join([*([group] if group else []), *(str(part) for part in problem["loc"])])
    if unknown:
        parent = cls
        for part in problem["loc"][:-1]:
            parent = _field_type(parent, str(part))
        *groups, name = path.split(".")
        wrong = {".".join(str(part) for part in p["loc"]) for p in unknown}
        given = [key for key in flatten(to_tree(tree)) if key not in wrong]  # in groups that are plain mappings
        elsewhere = [f"{group}.{key}" if group else key for key in (*all_keys(cls), *given)]
        return unknown_key(name, key_names(parent), ".".join(groups), elsewhere=elsewhere)
    message = problem["msg"].removeprefix("Value error, ")
    message = message.partition(", unable to parse")[0]  # pydantic says it twice
    if problem["type"] in ("list_type", "tuple_type"):
        message = "a list is needed, such as [a,b]"
    limits = problem.get("ctx", {})
    for limit, words in _LIMITS.items():
        if limit in limits:
            message = f"{words} {str(limits[limit]).removesuffix('.0')} is needed"
    return f"{path}={_shown(problem.get('input'))}: {message[0].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    """A value as shown in errors."""
    try:
        return shorten(repr(value))
    except ValueError:  # Python doesn't convert integers of more than 4300 digits to text
        return "a value too long to show"


def unknown_key(
    name: str, known: Iterable[str], group: str = "", kind: str = "field", elsewhere: Iterable[str] = ()
) -> str:
    """Error message for an unknown name, with the nearest known name.

    Args:
        name: the unknown name.
        known: existing names.
        group: what should have a field of this name; empty: ``settings`` for fields, nothing for other kinds.
        kind: kind of thing: field, method, protocol, recipe ...
        elsewhere: full names in other groups, such as ``data.channels``; those that end in ``name`` are suggested
            first.

    Example:
        >>> unknown_key("mask_ration", ["mask_ratio", "norm_pix_loss"], "method")
        "method has no field 'mask_ration'; did you mean 'mask_ratio'?"
        >>> unknown_key("maee", ["mae", "mp3"], kind="method")
        "there is no method 'maee'; did you mean 'mae'?"
        >>> unknown_key("channels", ["seed", "steps"], elsewhere=["data.channels", "optim.lr"])
        "settings has no field 'channels'; did you mean 'data.channels'?"
    """
    known = sorted(known)
    owner = group or ("settings" if kind == "field" else "")
    line = f"{owner} has no {kind} '{shorten(name)}'" if owner else f"there is no {kind} '{shorten(name)}'"
    own = f"{group}.{name}" if group else name
    same = [key for key in dict.fromkeys(elsewhere) if key.rpartition(".")[2] == name and key != own]
    if same:
        outermost = min(key.count(".") for key in same)
        choice = [repr(key) for key in same if key.count(".") == outermost][:3]
        return f"{line}; did you mean {' or '.join(choice)}?"
    near = nearest(name, known)
    if near is None:
        outermost_last = sorted(elsewhere, key=lambda key: -key.count("."))
        lasts = {key.rpartition(".")[2]: key for key in outermost_last}
        near = lasts.get(nearest(name, lasts, only_typos=True) or "")
    return f"{line}; " + (
        f"did you mean '{near}'?" if near else f"{'it has' if owner else 'there are'}: {', '.join(known)}"
    )


def field_names(cls: type) -> list[str]:
    """Names of the fields of a settings class, in the order of definition."""
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def open_groups(cls: type) -> Mapping[str, type]:
    """Groups of a settings class that aren't fields, by name: those of ``eval`` are the protocols.

    Such a class has a static method ``open_groups`` and keeps the groups in a field ``own``.
    """
    find = getattr(cls, "open_groups", None)
    return find() if find is not None else {}


def key_names(cls: type) -> list[str]:
    """Keys allowed in a group of settings: its fields and its open groups."""
    groups = open_groups(cls)
    return [name for name in field_names(cls) if not (groups and name == OWN)] + list(groups)


def all_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all settings in a settings class and its groups."""
    for name in key_names(cls):
        inner = _field_type(cls, name)
        if inner is object:
            yield f"{prefix}{name}"
        else:
            yield from all_keys(inner, f"{prefix}{name}.")


def field_docs(cls: type) -> dict[str, tuple[Any, str]]:
    """``{name: (default, meaning)}`` of a settings class, for help texts and method cards."""
    fields = getattr(cls, "__pydantic_fields__", {})
    docs = {name: text for base in reversed(cls.__mro__) for name, text in _written_docs(base).items()}
    return {
        name: (info.get_default(call_default_factory=True) if not info.is_required() else None, docs.get(name, ""))
        for name, info in fields.items()
    }


@functools.cache
def _written_docs(cls: type) -> dict[str, str]:
    """The string below each field of a class, from its source; pydantic would read it whenever the class is defined."""
    if not hasattr(cls, "__pydantic_fields__"):
        return {}
    try:
        source = inspect.getsource(cls)
    except OSError:  # defined interactively
        return {}
    (tree,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(below.value.value)
        for field, below in itertools.pairwise(tree.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def _field_type(cls: type, name: str) -> type:
    """The settings class of a nested field or open group; ``object`` if there is none."""
    if name not in field_names(cls) and name in (groups := open_groups(cls)):
        return groups[name]
    info = getattr(cls, "__pydantic_fields__", {}).get(name)
    annotation = info.annotation if info else object
    for candidate in (annotation, *get_args(annotation)):
        if dataclasses.is_dataclass(candidate):
            return candidate  # type: ignore[return-value]
    return object


def resolve_paths(
    tree: Mapping[str, Any], cls: type, resolve: Callable[[str], str], groups: Mapping[str, type] | None = None
) -> Tree:
    """The tree with every setting of type :data:`PathText` replaced by ``resolve(text)``.

    Args:
        tree: nested plain values of ``cls``, complete or not; unknown keys stay as they are.
        cls: a class decorated with :func:`settings`.
        resolve: makes a path absolute.
        groups: settings classes of groups whose type in ``cls`` is a base class, such as ``method``.
    """
    result = dict(tree)
    fields = getattr(cls, "__pydantic_fields__", {})
    for key, value in tree.items():
        if isinstance(value, Mapping):
            inner = (groups or {}).get(key) or _field_type(cls, key)
            result[key] = resolve_paths(value, inner, resolve)
        elif key in fields and _names_path(fields[key].annotation, fields[key].metadata):
            if isinstance(value, str):
                result[key] = resolve(value)
            elif isinstance(value, (list, tuple)):
                result[key] = [resolve(item) if isinstance(item, str) else item for item in value]
    return result


def _names_path(annotation: Any, metadata: Iterable[Any] = ()) -> bool:
    """Whether a type, or a part of it, is :data:`PathText`."""
    if any(isinstance(item, NamesPath) for item in (*metadata, *getattr(annotation, "__metadata__", ()))):
        return True
    return any(_names_path(part) for part in get_args(annotation) if part is not annotation)


def to_tree(value: Any) -> Any:
    """Plain values (what YAML and JSON can hold) of a settings object."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tree = {field.name: to_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {**tree, **tree.pop(OWN)} if hasattr(value, "open_groups") else tree
    if isinstance(value, Mapping):
        return {str(key): to_tree(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_tree(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def write_yaml(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a tree as YAML, atomically."""
    write_atomically(path, yaml.safe_dump(to_tree(tree), sort_keys=False, allow_unicode=True))
