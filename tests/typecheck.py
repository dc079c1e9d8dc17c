"""How signatures are checked in tests: beartype, with ints welcome where floats are (PEP 484's numeric tower).

jaxtyping's hook checks a call twice, before and after, and keeps a memo of shapes for all functions. A run of all tests
makes tens of millions of calls, so :func:`check_once` replaces its decorator: the same annotations, in one check.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, jaxtyped

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeCheckError))


def check_once(function: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """In place of ``jaxtyping.jaxtyped``: functions with arrays in their signature get its memo of shapes, the others
    beartype alone. What is neither a plain function nor fully resolved is left to jaxtyping."""
    if function is None:
        return functools.partial(check_once, typechecker=typechecker)
    if not isinstance(function, types.FunctionType) or inspect.isgeneratorfunction(function):
        return jaxtyped(function, typechecker=typechecker)
    kinds = [_holds(annotation) for annotation in function.__annotations__.values()]
    if None in kinds:
        return jaxtyped(function, typechecker=typechecker)
    checked = typechecker(function)
    if any(kinds):
        checked = jaxtyped(checked, typechecker=None)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return (function if jaxtyping.config.jaxtyping_disable else checked)(*args, **kwargs)

    return wrapped


def _holds(annotation: Any) -> bool | None:
    """Whether an annotation names an array, None if it has parts that are still text."""
    if isinstance(annotation, typing.TypeAliasType if hasattr(typing, "TypeAliasType") else ()):
        return _holds(annotation.__value__)
    if isinstance(annotation, str | typing.ForwardRef | typing.TypeVar):
        return None
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    if typing.get_origin(annotation) is typing.Literal:
        return False
    parts = typing.get_args(annotation)
    kinds = [kind for part in parts for kind in map(_holds, part if isinstance(part, list) else [part])]
    return None if None in kinds else any(kinds)
