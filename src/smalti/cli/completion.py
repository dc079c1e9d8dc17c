"""Shell completion of names, read from source text so that nothing heavy is imported."""

from collections.abc import Iterator

import typer

from smalti.registry import listed


def methods(ctx: typer.Context, incomplete: str) -> Iterator[tuple[str, str]]:
    """Methods, as the first word of a command or the value of an option."""
    if not ctx.params.get("words") and not ctx.params.get("name"):
        yield from _starting(incomplete, {name: method.summary for name, method in listed("method").items()})


def protocols(incomplete: str) -> Iterator[tuple[str, str]]:
    """Protocols, also after a comma."""
    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    found = {name: one.summary for name, one in listed("protocol").items() if name not in taken}
    for name, summary in _starting(last, found):
        yield f"{before}{comma}{name}", summary


def recipes(incomplete: str) -> Iterator[str]:
    """Recipes that come with Smalti."""
    from smalti.runs.recipes import recipe_files

    yield from (path.name for path in recipe_files() if path.name.startswith(incomplete))


def plans(incomplete: str) -> Iterator[str]:
    """Plans that come with Smalti."""
    from smalti.runs.recipes import plan_files

    yield from (path.name for path in plan_files() if path.name.startswith(incomplete))


def _starting(text: str, names: dict[str, str]) -> Iterator[tuple[str, str]]:
    yield from ((name, meaning) for name, meaning in names.items() if name.startswith(text))
