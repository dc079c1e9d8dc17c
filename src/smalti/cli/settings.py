"""``smalti settings``: list settings with type, default and meaning."""

import importlib
import shutil
import textwrap
from collections.abc import Iterable
from typing import Annotated

import typer

from smalti.cli import completion
from smalti.cli.options import Debug, Imports
from smalti.cli.setting_docs import Setting, describe
from smalti.config import field_names, flatten, unknown_key
from smalti.errors import ConfigError
from smalti.registry import listed

NAME = "settings"
VERBS = ("choose", "embed", "evaluate", "export", "generate", "rank", "samples", "shard")
"""Commands with settings of their own, returned by ``own_settings`` of their modules."""


def command(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[KEY|GROUP|METHOD|COMMAND]",
            help="Such as `optim.lr`, `data`, `mae` or `export`; without it, all settings of training.",
            show_default=False,
            autocompletion=completion.methods,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="Settings and defaults of training this method.",
            autocompletion=completion.methods,
        ),
    ] = None,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """List settings with type, default and meaning.

    Settings follow a command as `key=value`. `null` stands for None, `[1, 2]` for a list.
    """
    if method is None and what in listed("method"):
        what, method = "method", what
    if what in VERBS and method is None:
        found = importlib.import_module(f"smalti.cli.{what}").own_settings()
    else:
        found = chosen(list(run_settings(method)), what, method)
    print("\n".join(_text(setting) for setting in found))
    if what is None and method is None:
        print("\nmethod.*\n    Settings of the method: smalti settings METHOD (smalti methods lists them)")


def run_settings(method: str | None = None) -> Iterable[Setting]:
    """Settings of a training run; with ``method``, also the method's own settings and its defaults for the others."""
    from smalti.methods.base import get_method
    from smalti.runs.config import RunConfig

    if method is None:
        defaults = {}
    else:
        cls = get_method(method)
        yield from describe(cls.Config, "method.")
        defaults = flatten(cls.defaults)
    for setting in describe(RunConfig, defaults=defaults):
        if setting.key.partition(".")[0] != "method":
            yield setting


def chosen(settings: list[Setting], what: str | None, method: str | None) -> list[Setting]:
    """The settings of a key or group.

    Raises:
        ConfigError: if there are none; the nearest name is suggested.
    """
    if what is None:
        return settings
    prefix = what.removesuffix("*").removesuffix(".")
    found = [setting for setting in settings if f"{setting.key}.".startswith(f"{prefix}.")]
    if found:
        return found
    group, _, name = prefix.rpartition(".")
    if method is None and "method" in (group, prefix):
        example = next(iter(methods_with(name)), "mae")
        raise ConfigError(
            f"{prefix} depends on the method; name it, for example smalti settings {prefix} --method {example}"
        )
    keys = [setting.key for setting in settings]
    if method is None and methods_with(name):
        keys.append(f"method.{name}")
    inside = [key for key in keys if key.rpartition(".")[0] == group] if group else []
    top = {key.partition(".")[0] for key in keys}
    raise ConfigError(
        unknown_key(name, (key.rpartition(".")[2] for key in inside), group, "setting", keys)
        if inside
        else unknown_key(prefix, (*top, *listed("method"), *VERBS), kind="setting, method or command", elsewhere=keys)
    )


def methods_with(name: str) -> list[str]:
    """Methods that have a setting named ``name``."""
    from smalti.methods.base import get_method, method_names

    return [method for method in method_names() if name in field_names(get_method(method).Config)]


def _text(setting: Setting) -> str:
    """Key, type and default, then the meaning on the next lines, wrapped to the width of the terminal."""
    columns = max(40, shutil.get_terminal_size().columns)
    head, meaning = (
        textwrap.fill(
            text,
            columns,
            initial_indent=indent,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for text, indent in ((setting.line, ""), (setting.meaning, "    "))
    )
    return f"{head}\n{meaning}" if meaning.strip() else head
