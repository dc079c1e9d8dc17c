"""Docstrings as Markdown, for the API pages: they are written as plain text with double backticks and roles."""

import re
from typing import Any

import griffe

_CODE = re.compile(r"(``.*?``|`[^`]*`|^ *>>> .*$)", re.M | re.S)
_ROLE = re.compile(r":(?:func|class|meth|data|attr|mod):`~?")
_LABEL = re.compile(r"(?<=[^\n])\n(?=[A-Z][\w ]{2,30}: )")


def as_markdown(text: str) -> str:
    """Roles become code, stars stay stars, and each ``Label: ...`` line of a module begins a paragraph."""
    parts = _CODE.split(_LABEL.sub("\n\n", _ROLE.sub("`", text)))
    parts[::2] = [part.replace("*", "\\*") for part in parts[::2]]
    return "".join(parts)


class Docstrings(griffe.Extension):
    """Called by mkdocstrings for all that it collects."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
