"""One paper, one file. Importing this package imports them all, which fills the registry."""

import importlib
import pkgutil

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")

from smalti.methods.base import Method, get_method, method_names  # noqa: E402

__all__ = ["Method", "get_method", "method_names"]
