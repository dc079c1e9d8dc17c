"""Everything Smalti raises on purpose, as one small tree.

A user's mistake is one of these, with one line that says what came, what is needed and what to do; the command line
prints that line and exits with 2. Anything else that escapes is a bug of ours and keeps its traceback.
"""


def one_line(text: str) -> str:
    """A text with control characters, ends of lines and what is no text written out: names of files hold all of them.

    Example:
        >>> one_line("a\\nb")
        'a\\\\nb'
    """
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


class SmaltiError(Exception):
    """Base of all errors that Smalti raises on purpose; its text is one line for the user."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(SmaltiError, ValueError):
    """A setting, recipe, plan or command-line value that can't be used."""


class ShapeError(SmaltiError, ValueError):
    """Images, tokens or boxes of a size that the operation can't take."""


class DataError(SmaltiError, ValueError):
    """Images, masks, labels or folders that are missing, unreadable or don't fit together."""


class WeightsError(SmaltiError, ValueError):
    """A checkpoint that is missing, damaged, unsafe to load or of another architecture."""


class RunError(SmaltiError, RuntimeError):
    """A training run that can't go on: a non-finite loss for the third time, a full disk, a broken run directory."""


class MissingExtraError(SmaltiError, ImportError):
    """An optional dependency that isn't installed; the text names the extra and the command that installs it."""
